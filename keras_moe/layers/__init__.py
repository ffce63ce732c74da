"""Layers that join routers, experts and losses."""

from keras_moe.layers.aitm_transfer import AITMTransfer as AITMTransfer
from keras_moe.layers.balanced_experts import BalancedExperts as BalancedExperts
from keras_moe.layers.capacity import Capacity as Capacity
from keras_moe.layers.cross_net_mix import CrossNetMix as CrossNetMix
from keras_moe.layers.cross_stitch import CrossStitch as CrossStitch
from keras_moe.layers.epnet import EPNet as EPNet
from keras_moe.layers.feature_embedding import (
    FeatureEmbedding as FeatureEmbedding,
)
from keras_moe.layers.features.bucketized import Bucketized as Bucketized
from keras_moe.layers.features.categorical import Categorical as Categorical
from keras_moe.layers.features.embedded import Embedded as Embedded
from keras_moe.layers.features.multi_categorical import (
    MultiCategorical as MultiCategorical,
)
from keras_moe.layers.features.numeric import Numeric as Numeric
from keras_moe.layers.features.sequence import Sequence as Sequence
from keras_moe.layers.gate_nu import GateNU as GateNU
from keras_moe.layers.moe import MoE as MoE
from keras_moe.layers.multi_gate_moe import MultiGateMoE as MultiGateMoE
from keras_moe.layers.partitioned_normalization import (
    PartitionedNormalization as PartitionedNormalization,
)
from keras_moe.layers.ppnet import PPNet as PPNet
from keras_moe.layers.soft_moe import SoftMoE as SoftMoE
from keras_moe.layers.stacked_dense import StackedDense as StackedDense
from keras_moe.layers.stacked_mlp import StackedMLP as StackedMLP
from keras_moe.layers.star_dense import STARDense as STARDense
from keras_moe.layers.sub_network_routing import (
    SubNetworkRouting as SubNetworkRouting,
)
