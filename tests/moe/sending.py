"""A layer that always sends rows, beside one that may use a fused kernel."""

from keras_moe.dispatch import Dispatcher
from keras_moe.layers import MoE


class RowDispatcher(Dispatcher):
    """Sends rows, and keeps the group sizes of each exchange."""

    moves_rows = True

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.group_sizes = []

    def exchange(self, rows, group_sizes, *args, **kwargs):
        self.group_sizes.append(group_sizes)
        return super().exchange(rows, group_sizes, *args, **kwargs)


class Sending(MoE):
    """`MoE` with a `RowDispatcher`."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        send_rows(self)


def send_rows(layer):
    """Gives a layer a `RowDispatcher` of the same settings, and returns it."""
    old = layer.dispatcher
    layer.dispatcher = RowDispatcher(old.capacity, old.weights_on)
    layer.dispatcher.seed_generator = old.seed_generator
    return layer.dispatcher
