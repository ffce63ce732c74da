"""Ready-made models, and what trains them."""

from keras_moe.recommendation.models.adatt import AdaTT as AdaTT
from keras_moe.recommendation.models.aitm import AITM as AITM
from keras_moe.recommendation.models.cgc import CGC as CGC
from keras_moe.recommendation.models.dlrm_moe import DLRMMoE as DLRMMoE
from keras_moe.recommendation.models.esmm import ESMM as ESMM
from keras_moe.recommendation.models.home import HoME as HoME
from keras_moe.recommendation.models.m3oe import M3oE as M3oE
from keras_moe.recommendation.models.mmoe import MMoE as MMoE
from keras_moe.recommendation.models.omoe import OMoE as OMoE
from keras_moe.recommendation.models.pepnet import PEPNet as PEPNet
from keras_moe.recommendation.models.ple import PLE as PLE
from keras_moe.recommendation.models.sasrec_moe import SASRecMoE as SASRecMoE
from keras_moe.recommendation.models.shared_bottom import (
    SharedBottom as SharedBottom,
)
from keras_moe.recommendation.models.snr import SNR as SNR
from keras_moe.recommendation.models.star import STAR as STAR
from keras_moe.recommendation.models.stem import STEM as STEM
from keras_moe.recommendation.tasks.group_auc_callback import (
    GroupAUC as GroupAUC,
)
from keras_moe.recommendation.tasks.heads import AITMHeads as AITMHeads
from keras_moe.recommendation.tasks.multi_task_model import (
    MultiTaskModel as MultiTaskModel,
)
from keras_moe.recommendation.tasks.order_penalty import (
    OrderPenalty as OrderPenalty,
)
from keras_moe.recommendation.tasks.task_spec import TaskSpec as TaskSpec
from keras_moe.recommendation.tasks.weighting.dynamic_weight_average import (
    DynamicWeightAverage as DynamicWeightAverage,
)
from keras_moe.recommendation.tasks.weighting.famo import FAMO as FAMO
from keras_moe.recommendation.tasks.weighting.geometric_loss import (
    GeometricLoss as GeometricLoss,
)
from keras_moe.recommendation.tasks.weighting.grad_norm import (
    GradNorm as GradNorm,
)
from keras_moe.recommendation.tasks.weighting.pc_grad import PCGrad as PCGrad
from keras_moe.recommendation.tasks.weighting.random_loss_weighting import (
    RandomLossWeighting as RandomLossWeighting,
)
from keras_moe.recommendation.tasks.weighting.static_weighting import (
    StaticWeighting as StaticWeighting,
)
from keras_moe.recommendation.tasks.weighting.task_weighting import (
    TaskWeighting as TaskWeighting,
)
from keras_moe.recommendation.tasks.weighting.uncertainty_weighting import (
    UncertaintyWeighting as UncertaintyWeighting,
)
from keras_moe.vision.models.cond_conv_backbone import (
    CondConvBackbone as CondConvBackbone,
)
from keras_moe.vision.models.conv_next_moe_backbone import (
    ConvNeXtMoEBackbone as ConvNeXtMoEBackbone,
)
from keras_moe.vision.models.diffusion_task import (
    DiffusionTask as DiffusionTask,
)
from keras_moe.vision.models.dit_moe_backbone import (
    DiTMoEBackbone as DiTMoEBackbone,
)
from keras_moe.vision.models.image_classifier import (
    MoEImageClassifier as MoEImageClassifier,
)
from keras_moe.vision.models.image_classifier import (
    VMoEImageClassifier as VMoEImageClassifier,
)
from keras_moe.vision.models.image_text_moe import ImageTextMoE as ImageTextMoE
from keras_moe.vision.models.keras_hub_models import (
    register_with_keras_hub as register_with_keras_hub,
)
from keras_moe.vision.models.mixer_moe_backbone import (
    MixerMoEBackbone as MixerMoEBackbone,
)
from keras_moe.vision.models.multi_task_vision_moe import (
    MultiTaskVisionMoE as MultiTaskVisionMoE,
)
from keras_moe.vision.models.soft_moe_backbone import (
    SoftMoEBackbone as SoftMoEBackbone,
)
from keras_moe.vision.models.swin_moe_backbone import (
    SwinMoEBackbone as SwinMoEBackbone,
)
from keras_moe.vision.models.vmoe_backbone import VMoEBackbone as VMoEBackbone
