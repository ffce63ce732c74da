"""Who has room, and how rows reach their experts and come back."""

from keras_moe.dispatch.capacity import Capacity as Capacity
