from typing import Any
from typing import NamedTuple

from keras import ops

from keras_moe.ops.masking import zero_masked
from keras_moe.routers.top_k_router import TopKRouter


class StatefulRouting(NamedTuple):
    """A `Routing` with what the router of the next layer takes as its context.

    Fields:
        logits: `(T, E)`. Raw scores.
        probs: `(T, E)`. Scores that the weights come from.
        expert_indices: `(T, K)` int32. The chosen experts.
        expert_weights: `(T, K)`. Their weights.
        state: `(T, C)`, as `MLPRouter.state` computes it.
    """

    logits: Any
    probs: Any
    expert_indices: Any
    expert_weights: Any
    state: Any


class StatefulRouter(TopKRouter):
    """Base class of routers that hand a state on from layer to layer.

    The `context` of a layer is the `state` of the one before it. A subclass
    makes `(logits, state)`, `(T, E)` and `(T, state_dim)`, in
    `logits_and_state(tokens, training, context)`; its context is `(T,
    state_dim)` with zeros in the first layer, or `None` without a `state_dim`.

    Args:
        num_experts: int. Number of experts to choose from.
        top_k: int. Experts per token.
        state_dim: int, or `None` for a router that uses no state.
        **kwargs: Arguments of `keras_moe.routers.TopKRouter`.
    """

    routing_class = StatefulRouting

    def __init__(self, num_experts, top_k, state_dim, **kwargs):
        super().__init__(num_experts, top_k, **kwargs)
        self.state_dim = state_dim
        self.uses_context = state_dim is not None

    def call(self, tokens, mask=None, training=None, context=None):
        tokens = zero_masked(tokens, mask)
        context = self._as_context(context, tokens, mask)
        logits, state = self.logits_and_state(tokens, training, context)
        noisy = self.noisy_logits(logits, training)
        return StatefulRouting(
            *self.route(logits, noisy, mask, training), state
        )

    def state(self, tokens, context=None):
        """What the router of the next layer takes as its `context`.

        Args:
            tokens: Tensor of shape `(T, D)`.
            context: The `state` of the layer before, or `None`.

        Returns:
            The field `state` of what the router returns in inference.
        """
        tokens = ops.cast(ops.convert_to_tensor(tokens), self.compute_dtype)
        if not self.built:
            self.build(tokens.shape)
        context = self._as_context(context, tokens, None)
        return self.logits_and_state(tokens, False, context)[1]

    def _as_context(self, context, tokens, mask):
        if self.state_dim is None:
            if context is not None:
                raise ValueError(
                    "`context` needs a `residual`. Received: residual=None"
                )
            return None
        if context is None:
            return ops.tile(ops.zeros_like(tokens[:, :1]), (1, self.state_dim))
        context = ops.cast(ops.convert_to_tensor(context), self.compute_dtype)
        if len(context.shape) != 2 or context.shape[-1] != self.state_dim:
            raise ValueError(
                "`context` must be of the shape (T, projection_dim) or (T, E) "
                f"of the state of a router like this one, (T, {self.state_dim})"
                f". Received: context.shape={tuple(context.shape)}"
            )
        return zero_masked(context, mask)

    def logits_and_state(self, tokens, training, context):
        raise NotImplementedError(
            f"{type(self).__name__} must define "
            "`logits_and_state(tokens, training, context)`."
        )
