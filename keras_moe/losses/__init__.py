"""Balancing losses: small serialisable objects from a `Routing` to a scalar."""

from keras_moe.losses.load_balancing_loss import (
    LoadBalancingLoss as LoadBalancingLoss,
)
from keras_moe.losses.named import get as get
from keras_moe.losses.router_z_loss import RouterZLoss as RouterZLoss
from keras_moe.losses.routing_loss import RoutingLoss as RoutingLoss
