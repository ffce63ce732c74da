"""Layers that join routers, experts and losses."""

from keras_moe.dispatch.capacity import Capacity as Capacity
from keras_moe.moe.mixture_of_heads import MixtureOfHeads as MixtureOfHeads
from keras_moe.moe.moe import MoE as MoE
from keras_moe.moe.soft_moe import SoftMoE as SoftMoE
from keras_moe.recommendation.features.bucketized import (
    Bucketized as Bucketized,
)
from keras_moe.recommendation.features.categorical import (
    Categorical as Categorical,
)
from keras_moe.recommendation.features.embedded import Embedded as Embedded
from keras_moe.recommendation.features.feature_embedding import (
    FeatureEmbedding as FeatureEmbedding,
)
from keras_moe.recommendation.features.multi_categorical import (
    MultiCategorical as MultiCategorical,
)
from keras_moe.recommendation.features.numeric import Numeric as Numeric
from keras_moe.recommendation.features.sequence import Sequence as Sequence
from keras_moe.recommendation.gates.layer_networks import (
    LayerNetworks as LayerNetworks,
)
from keras_moe.recommendation.gates.multi_gate_moe import (
    MultiGateMoE as MultiGateMoE,
)
from keras_moe.recommendation.gates.task_gates import TaskGates as TaskGates
from keras_moe.recommendation.layers.aitm_transfer import (
    AITMTransfer as AITMTransfer,
)
from keras_moe.recommendation.layers.balanced_experts import (
    BalancedExperts as BalancedExperts,
)
from keras_moe.recommendation.layers.cross_net_mix import (
    CrossNetMix as CrossNetMix,
)
from keras_moe.recommendation.layers.cross_stitch import (
    CrossStitch as CrossStitch,
)
from keras_moe.recommendation.layers.epnet import EPNet as EPNet
from keras_moe.recommendation.layers.gate_nu import GateNU as GateNU
from keras_moe.recommendation.layers.partitioned_normalization import (
    PartitionedNormalization as PartitionedNormalization,
)
from keras_moe.recommendation.layers.ppnet import PPNet as PPNet
from keras_moe.recommendation.layers.star_dense import STARDense as STARDense
from keras_moe.recommendation.layers.sub_network_routing import (
    SubNetworkRouting as SubNetworkRouting,
)
from keras_moe.stacked.stacked_dense import StackedDense as StackedDense
from keras_moe.stacked.stacked_mlp import StackedMLP as StackedMLP
from keras_moe.vision.layers.attention_pooling import (
    AttentionPooling as AttentionPooling,
)
from keras_moe.vision.layers.cond_conv2d import CondConv2D as CondConv2D
from keras_moe.vision.layers.contrastive_head import (
    ContrastiveHead as ContrastiveHead,
)
from keras_moe.vision.layers.conv_next_block import (
    ConvNeXtBlock as ConvNeXtBlock,
)
from keras_moe.vision.layers.dit_block import DiTBlock as DiTBlock
from keras_moe.vision.layers.encoder_block import EncoderBlock as EncoderBlock
from keras_moe.vision.layers.image_converter import (
    ImageConverter as ImageConverter,
)
from keras_moe.vision.layers.inverted_residual_block import (
    InvertedResidualBlock as InvertedResidualBlock,
)
from keras_moe.vision.layers.patch_embedding import (
    PatchEmbedding as PatchEmbedding,
)
from keras_moe.vision.layers.patch_merging import PatchMerging as PatchMerging
from keras_moe.vision.layers.text_embedding import (
    TextEmbedding as TextEmbedding,
)
from keras_moe.vision.layers.token_mixing import TokenMixing as TokenMixing
from keras_moe.vision.layers.window_attention import (
    WindowAttention as WindowAttention,
)
