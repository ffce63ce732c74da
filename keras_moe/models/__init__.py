"""Ready-made models, and what trains them."""

from keras_moe.models.multi_task.group_auc_callback import GroupAUC as GroupAUC
from keras_moe.models.multi_task.heads import AITMHeads as AITMHeads
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
from keras_moe.models.recommendation.adatt import AdaTT as AdaTT
from keras_moe.models.recommendation.aitm import AITM as AITM
from keras_moe.models.recommendation.cgc import CGC as CGC
from keras_moe.models.recommendation.dlrm_moe import DLRMMoE as DLRMMoE
from keras_moe.models.recommendation.esmm import ESMM as ESMM
from keras_moe.models.recommendation.home import HoME as HoME
from keras_moe.models.recommendation.m3oe import M3oE as M3oE
from keras_moe.models.recommendation.mmoe import MMoE as MMoE
from keras_moe.models.recommendation.omoe import OMoE as OMoE
from keras_moe.models.recommendation.pepnet import PEPNet as PEPNet
from keras_moe.models.recommendation.ple import PLE as PLE
from keras_moe.models.recommendation.sasrec_moe import SASRecMoE as SASRecMoE
from keras_moe.models.recommendation.shared_bottom import (
    SharedBottom as SharedBottom,
)
from keras_moe.models.recommendation.snr import SNR as SNR
from keras_moe.models.recommendation.star import STAR as STAR
from keras_moe.models.recommendation.stem import STEM as STEM
