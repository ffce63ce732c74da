import keras


class Router(keras.layers.Layer):
    """Base class of routers: scores the experts for each token and chooses.

    A subclass makes its weights in `build(tokens_shape)` and returns a
    `keras_moe.routers.Routing` from `call(tokens, mask=None, training=None)`.
    Routing decisions do not survive rounding, so routers compute in float32
    under every dtype policy (in float64 under `"float64"`).

    Args:
        num_experts: int. Number of experts to choose from.
        **kwargs: Arguments of `keras.layers.Layer`.

    Raises:
        ValueError: If `num_experts` is not a positive int.

    Example:

    ```python
    class FirstExpertRouter(keras_moe.routers.Router):
        def call(self, tokens, mask=None, training=None):
            num_tokens = keras.ops.shape(tokens)[0]
            probs = keras.ops.one_hot(
                keras.ops.zeros((num_tokens,), "int32"), self.num_experts
            )
            return keras_moe.routers.Routing(
                logits=probs,
                probs=probs,
                expert_indices=keras.ops.zeros((num_tokens, 1), "int32"),
                expert_weights=keras.ops.ones((num_tokens, 1)),
            )
    ```
    """

    def __init__(self, num_experts, *, dtype=None, **kwargs):
        policy = keras.dtype_policies.get(dtype or keras.config.dtype_policy())
        float64 = policy.compute_dtype == "float64"
        super().__init__(dtype="float64" if float64 else "float32", **kwargs)
        if not isinstance(num_experts, int) or num_experts < 1:
            raise ValueError(
                "`num_experts` must be a positive int. "
                f"Received: num_experts={num_experts!r}"
            )
        self.num_experts = num_experts
        self.supports_masking = True

    def compute_mask(self, inputs, previous_mask):
        return None  # a Routing has no positions to mask

    def get_config(self):
        return {**super().get_config(), "num_experts": self.num_experts}
