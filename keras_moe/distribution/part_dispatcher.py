from keras import ops

from keras_moe import backend
from keras_moe.dispatch import Capacity
from keras_moe.dispatch import Dispatcher
from keras_moe.ops.dispatch_plan import plan_dispatch
from keras_moe.ops.routing import Routing


class PartDispatcher(Dispatcher):
    """A dispatcher for a part of the batch.

    Which choices a capacity keeps is decided over the whole batch, except with
    the policy `"random"`, which each device follows alone.

    A subclass has `gather_rows(tensor)`, which returns the rows of all devices
    and where those of this one start.

    Args:
        dispatcher: The `Dispatcher` whose options count.
        is_whole: bool. Whether the part is all there is.
    """

    def __init__(self, dispatcher, is_whole):
        # What `Dispatcher.__init__` makes, without a second seed.
        self.capacity = dispatcher.capacity
        self.weights_on = dispatcher.weights_on
        self.seed_generator = dispatcher.seed_generator
        self._is_whole = is_whole

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
            self._is_whole
            or not capacity.limits(training)
            or capacity.per != "batch"
            or capacity.drop_policy == "random"
            or backend.has_no_values(routing.expert_indices)
        ):
            return super().plan(
                routing, num_experts, mask, training, router, num_sequences
            )
        kept = self._kept(routing, num_experts, mask, training)
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

    def _kept(self, routing, num_experts, mask, training):
        """Which own choices are kept of those of all devices, `(T, K)` bool."""
        capacity, indices = self.capacity, routing.expert_indices
        num_own = ops.shape(indices)[0]
        if mask is not None:
            real = ops.expand_dims(mask, -1)
            indices = ops.where(real, indices, num_experts)
        indices, start = self.gather_rows(indices)
        probs = weights = None
        if capacity.drop_policy == "priority":
            probs, _ = self.gather_rows(routing.probs)
        elif capacity.drop_policy == "weight":
            weights, _ = self.gather_rows(routing.expert_weights)
        num_tokens, top_k = ops.shape(indices)
        _, plan = plan_dispatch(
            Routing(None, probs, indices, weights),
            num_experts,
            capacity=capacity.rows_per_expert(
                num_tokens, num_experts, top_k, training
            ),
            drop_policy=capacity.drop_policy,
        )
        return plan.kept[start : start + num_own]
