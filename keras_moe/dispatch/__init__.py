"""Who has room, and how rows reach their experts and come back."""

from keras_moe.dispatch.capacity import Capacity as Capacity
from keras_moe.dispatch.dispatcher import Dispatcher as Dispatcher
from keras_moe.dispatch.dispatcher import SendingPlan as SendingPlan
