"""Routers: Keras layers from tokens `(T, D)` to a `Routing`."""

from keras_moe.ops.routing import Routing as Routing
from keras_moe.routers.named import get as get
from keras_moe.routers.router import Router as Router
from keras_moe.routers.top_k_router import TopKRouter as TopKRouter
