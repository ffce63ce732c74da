"""Ready-made models, and what trains them."""

from keras_moe.models.multi_task.group_auc_callback import GroupAUC as GroupAUC
from keras_moe.models.multi_task.multi_task_model import (
    MultiTaskModel as MultiTaskModel,
)
from keras_moe.models.multi_task.order_penalty import (
    OrderPenalty as OrderPenalty,
)
from keras_moe.models.multi_task.task_spec import TaskSpec as TaskSpec
from keras_moe.models.multi_task.weighting.dynamic_weight_average import (
    DynamicWeightAverage as DynamicWeightAverage,
)
from keras_moe.models.multi_task.weighting.famo import FAMO as FAMO
from keras_moe.models.multi_task.weighting.geometric_loss import (
    GeometricLoss as GeometricLoss,
)
from keras_moe.models.multi_task.weighting.grad_norm import GradNorm as GradNorm
from keras_moe.models.multi_task.weighting.pc_grad import PCGrad as PCGrad
from keras_moe.models.multi_task.weighting.random_loss_weighting import (
    RandomLossWeighting as RandomLossWeighting,
)
from keras_moe.models.multi_task.weighting.static_weighting import (
    StaticWeighting as StaticWeighting,
)
from keras_moe.models.multi_task.weighting.task_weighting import (
    TaskWeighting as TaskWeighting,
)
from keras_moe.models.multi_task.weighting.uncertainty_weighting import (
    UncertaintyWeighting as UncertaintyWeighting,
)
from keras_moe.models.recommendation.mmoe import MMoE as MMoE
from keras_moe.models.recommendation.ple import PLE as PLE
