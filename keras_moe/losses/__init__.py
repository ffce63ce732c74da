"""Balancing losses: small serialisable objects from a `Routing` to a scalar.

Beside them `OrthogonalityRegularizer`, on weights, and `CompetitiveLoss`, on
the targets of a model.
"""

from keras_moe.losses.communication_balance_loss import (
    CommunicationBalanceLoss as CommunicationBalanceLoss,
)
from keras_moe.losses.competitive_loss import CompetitiveLoss as CompetitiveLoss
from keras_moe.losses.device_balance_loss import (
    DeviceBalanceLoss as DeviceBalanceLoss,
)
from keras_moe.losses.entropy_loss import EntropyLoss as EntropyLoss
from keras_moe.losses.importance_loss import ImportanceLoss as ImportanceLoss
from keras_moe.losses.load_balancing_loss import (
    LoadBalancingLoss as LoadBalancingLoss,
)
from keras_moe.losses.load_loss import LoadLoss as LoadLoss
from keras_moe.losses.mutual_information_loss import (
    MutualInformationLoss as MutualInformationLoss,
)
from keras_moe.losses.named_losses import get as get
from keras_moe.losses.orthogonality_regularizer import (
    OrthogonalityRegularizer as OrthogonalityRegularizer,
)
from keras_moe.losses.router_z_loss import RouterZLoss as RouterZLoss
from keras_moe.losses.routing_loss import RoutingLoss as RoutingLoss
