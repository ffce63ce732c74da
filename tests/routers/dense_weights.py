import keras
from keras import ops


class DenseWeights(keras.layers.Layer):
    """A router as a layer of one output: what each expert weighs, `(T, E)`."""

    def __init__(self, router):
        super().__init__(dtype=router.dtype_policy.name)
        self.router = router
        self.supports_masking = True

    def build(self, tokens_shape):
        if not self.router.built:
            self.router.build(tokens_shape)

    def call(self, tokens, mask=None, training=None):
        routing = self.router(tokens, mask=mask, training=training)
        experts = ops.arange(self.router.num_experts, dtype="int32")
        chosen = ops.equal(
            ops.expand_dims(routing.expert_indices, -1), experts
        )  # (T, K, E)
        weights = ops.expand_dims(routing.expert_weights, -1)
        return ops.sum(ops.cast(chosen, weights.dtype) * weights, axis=1)
