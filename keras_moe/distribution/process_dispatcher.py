"""Rows to the processes that hold their experts, and back."""

import numpy as np
from keras import ops

from keras_moe import backend
from keras_moe.backend.torch import collectives
from keras_moe.dispatch import Dispatcher
from keras_moe.distribution.part_dispatcher import PartDispatcher


class ProcessDispatcher(PartDispatcher):
    """A dispatcher for a part of the batch and of the experts.

    Rows travel to the processes of an expert group that hold their experts.

    Args:
        dispatcher: The `Dispatcher` whose options count.
        engine: A `ProcessEngine`.
        meanwhile: Called while rows travel to their experts, if they do.
            Defaults to `None`.
    """

    def __init__(self, dispatcher, engine, meanwhile=None):
        if type(dispatcher) is not Dispatcher:
            raise ValueError(
                "Several processes send rows in their own way, and take a "
                "dispatcher of the class `Dispatcher` alone. "
                f"Received: dispatcher={dispatcher!r}"
            )
        super().__init__(dispatcher, is_whole=engine.num_processes == 1)
        self.moves_rows = engine.num_expert_shards > 1
        self.engine = engine
        self.meanwhile = meanwhile

    def gather_rows(self, tensor):
        return collectives.gather_rows(tensor)

    def exchange(
        self, rows, group_sizes, experts, training=None, max_group_size=None
    ):
        if not self.moves_rows:
            return super().exchange(
                rows, group_sizes, experts, training, max_group_size
            )
        shards, group = self.engine.num_expert_shards, self.engine.expert_group
        by_owner = ops.reshape(group_sizes, (shards, -1))  # (S, own experts)
        if backend.has_no_values(rows):
            return experts(rows, by_owner[0], training=training)
        received = collectives.exchange_sizes(by_owner, group)
        send, receive = (
            ops.convert_to_numpy(sizes).sum(axis=1).tolist()
            for sizes in (by_owner, received)
        )
        num_rows, num_used = rows.shape[0], sum(send)
        link = self.engine.link()
        rows, link = collectives.exchange_rows(
            rows[:num_used], link, send, receive, group, self.meanwhile
        )
        outputs = _compute(rows, received, experts, training)
        outputs, link = collectives.exchange_rows(
            outputs, link, receive, send, group
        )
        self.engine.keep_link(link)
        unused = (num_rows - num_used, *outputs.shape[1:])
        return ops.concatenate([outputs, ops.zeros(unused, outputs.dtype)])


def _compute(rows, sizes, experts, training):
    """The own experts' results, in the order in which the rows came.

    Args:
        rows: `(n, ...)`, sorted by the process they came from, then by expert.
        sizes: `(S, own experts)` int32, rows of each.
    """
    num_shards, num_own = sizes.shape
    expert = np.tile(np.arange(num_own, dtype="int32"), num_shards)
    expert = ops.repeat(
        ops.convert_to_tensor(expert), ops.reshape(sizes, (-1,))
    )
    order = backend.stable_argsort(expert, num_own)
    group_sizes = ops.sum(sizes, axis=0)
    if rows.shape[0] and rows.dtype == _compute_dtype(experts, rows):
        ones = ops.ones((rows.shape[0],), "float32")
        outputs = experts.mix(rows, ones, order, group_sizes, training=training)
        if outputs is not None:
            return outputs
    outputs = experts(
        ops.take(rows, order, axis=0), group_sizes, training=training
    )
    back = backend.stable_argsort(order, rows.shape[0])
    return ops.take(outputs, back, axis=0)


def _compute_dtype(experts, rows):
    return ops.zeros((), experts.compute_dtype).dtype
