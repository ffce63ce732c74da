"""Capacities of experts, and how rows reach them and come back."""

from keras_moe.dispatch.capacity import Capacity as Capacity
from keras_moe.dispatch.dispatcher import Dispatcher as Dispatcher
from keras_moe.dispatch.dispatcher import SendingPlan as SendingPlan
