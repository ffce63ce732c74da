"""Rows to the processes that hold their experts, and back."""

import numpy as np
from keras import ops

from keras_moe import backend
from keras_moe.backend.torch import collectives
from keras_moe.dispatch import Capacity
from keras_moe.dispatch import Dispatcher
from keras_moe.ops.dispatch_plan import plan_dispatch
from keras_moe.ops.routing import Routing


class ProcessDispatcher(Dispatcher):
    """A dispatcher for a part of the batch and of the experts.

    Rows travel to the processes of an expert group that hold their experts.
    Which choices a capacity keeps is decided over the whole batch, except with
    the policy `"random"`, which each process follows alone.

    Args:
        dispatcher: The `Dispatcher` whose options count.
        engine: A `ProcessEngine`.
    """

    def __init__(self, dispatcher, engine):
        if type(dispatcher) is not Dispatcher:
            raise ValueError(
                "Several processes send rows in their own way, and take a "
                "dispatcher of the class `Dispatcher` alone. "
                f"Received: dispatcher={dispatcher!r}"
            )
        self.moves_rows = engine.num_expert_shards > 1
        # What `Dispatcher.__init__` makes, without a second seed.
        self.capacity = dispatcher.capacity
        self.weights_on = dispatcher.weights_on
        self.seed_generator = dispatcher.seed_generator
        self.engine = engine

    def plan(
        self,
        routing,
        num_experts,
        mask=None,
        training=None,
        router=None,
        num_sequences=1,
    ):
        capacity = self.capacity
        if (
            self.engine.num_processes == 1
            or not capacity.limits(training)
            or capacity.per != "batch"
            or capacity.drop_policy == "random"
            or backend.has_no_values(routing.expert_indices)
        ):
            return super().plan(
                routing, num_experts, mask, training, router, num_sequences
            )
        kept = _kept(routing, num_experts, mask, training, capacity)
        indices = ops.where(kept, routing.expert_indices, num_experts)
        dropless = Dispatcher(
            Capacity(normalize_kept_weights=capacity.normalize_kept_weights)
        )
        return dropless.plan(
            routing._replace(expert_indices=indices),
            num_experts,
            ops.any(kept, axis=-1),
            training,
            router,
            num_sequences,
        )

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
            rows[:num_used], link, send, receive, group
        )
        outputs = _compute(rows, received, experts, training)
        outputs, link = collectives.exchange_rows(
            outputs, link, receive, send, group
        )
        self.engine.keep_link(link)
        unused = (num_rows - num_used, *outputs.shape[1:])
        return ops.concatenate([outputs, ops.zeros(unused, outputs.dtype)])


def _kept(routing, num_experts, mask, training, capacity):
    """Which own choices are kept of those of all processes, `(T, K)` bool."""
    indices = routing.expert_indices
    if mask is not None:
        real = ops.expand_dims(mask, -1)
        indices = ops.where(real, indices, num_experts)
    indices, start = collectives.gather_rows(indices)
    probs = weights = None
    if capacity.drop_policy == "priority":
        probs, _ = collectives.gather_rows(routing.probs)
    elif capacity.drop_policy == "weight":
        weights, _ = collectives.gather_rows(routing.expert_weights)
    num_tokens, top_k = indices.shape
    _, plan = plan_dispatch(
        Routing(None, probs, indices, weights),
        num_experts,
        capacity=capacity.rows_per_expert(
            num_tokens, num_experts, top_k, training
        ),
        drop_policy=capacity.drop_policy,
    )
    return plan.kept[start : start + routing.expert_indices.shape[0]]


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
