"""Routers: Keras layers from tokens `(T, D)` to a `Routing`."""

from keras_moe.ops.routing import Routing as Routing
from keras_moe.routers.base_router import BASERouter as BASERouter
from keras_moe.routers.cosine_router import CosineRouter as CosineRouter
from keras_moe.routers.dense_router import DenseRouter as DenseRouter
from keras_moe.routers.dselect_k_router import DSelectKRouter as DSelectKRouter
from keras_moe.routers.entmax_router import EntmaxRouter as EntmaxRouter
from keras_moe.routers.expert_choice_router import (
    ExpertChoiceRouter as ExpertChoiceRouter,
)
from keras_moe.routers.gshard_router import GShardRouter as GShardRouter
from keras_moe.routers.hash_router import HashRouter as HashRouter
from keras_moe.routers.hierarchical_router import (
    HierarchicalRouter as HierarchicalRouter,
)
from keras_moe.routers.linear_router import LinearRouter as LinearRouter
from keras_moe.routers.mlp_router import MLPRouter as MLPRouter
from keras_moe.routers.named_routers import get as get
from keras_moe.routers.noisy_top_k_router import NoisyRouting as NoisyRouting
from keras_moe.routers.noisy_top_k_router import (
    NoisyTopKRouter as NoisyTopKRouter,
)
from keras_moe.routers.random_router import RandomRouter as RandomRouter
from keras_moe.routers.ranking_router import RankingRouter as RankingRouter
from keras_moe.routers.relu_router import ReLURouter as ReLURouter
from keras_moe.routers.router import Router as Router
from keras_moe.routers.sinkhorn_router import SinkhornRouter as SinkhornRouter
from keras_moe.routers.soft_router import SoftRouter as SoftRouter
from keras_moe.routers.soft_router import SoftRouting as SoftRouting
from keras_moe.routers.sparse_mixer_router import (
    SparseMixerRouter as SparseMixerRouter,
)
from keras_moe.routers.sphero_router import SpheroRouter as SpheroRouter
from keras_moe.routers.stateful_router import StatefulRouting as StatefulRouting
from keras_moe.routers.task_router import TaskRouter as TaskRouter
from keras_moe.routers.top_k_router import TopKRouter as TopKRouter
from keras_moe.routers.top_p_router import TopPRouter as TopPRouter
