import keras

from keras_moe.checks import check_bool
from keras_moe.checks import check_int


class Router(keras.layers.Layer):
    """Base class of routers: scores the experts for each token and chooses.

    A subclass makes its weights in `build(tokens_shape)` and returns a
    `keras_moe.routers.Routing` from `call(tokens, mask=None, training=None)`.
    Routing decisions do not survive rounding, so routers compute in float32
    under every dtype policy (in float64 under `"float64"`).

    A subclass declares in attributes, which `MoE` and the losses read, what
    else it needs or offers:

    - `uses_context = True`: `call` also takes `context`, a tensor `(T, ...)` or
      `None`: what `MoE` was given as `context`, for each token. It may hold
      token ids, task ids or the logits of an earlier layer.
    - `needs_context = True`: `context` must not be `None`.
    - `looks_ahead = True`: the routing of a token depends on other tokens, also
      on later ones. Then `call` also takes `num_sequences`, an int or a scalar
      tensor: the tokens are that many sequences of equal length, one after the
      other. A causal layer refuses such a router, unless it has
      `allow_lookahead=True`.
    - `distinct_choices = True`: no token is sent twice to one expert. Some
      experts need less memory then.
    - `choices_per_token`: int, the largest `K` of a routing, or `None` if it is
      not known.
    - `per`: which tokens are routed together: `"batch"`, `"sequence"` or an
      int, a number of sequences.
    - `routing_class`: the class of what `call` returns, or `None` if it is not
      known. Losses that need more than a `Routing` check it.
    - `why_no_eval_top_k`: str. Why the number of experts cannot be another one
      in inference; `keras_moe.conversion.set_eval_top_k` says so.

    Args:
        num_experts: int. Number of experts to choose from.
        allow_lookahead: bool. Whether a causal layer may use this router even
            if it looks ahead, for models that score whole sequences only.
            Defaults to `False`.
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

    uses_context = False
    needs_context = False
    looks_ahead = False
    allow_lookahead = False
    distinct_choices = False
    choices_per_token = None
    per = "batch"
    routing_class = None
    why_no_eval_top_k = ""

    def __init__(
        self, num_experts, *, allow_lookahead=False, dtype=None, **kwargs
    ):
        policy = keras.dtype_policies.get(dtype or keras.config.dtype_policy())
        float64 = policy.compute_dtype == "float64"
        super().__init__(dtype="float64" if float64 else "float32", **kwargs)
        check_int("num_experts", num_experts, minimum=1)
        check_bool("allow_lookahead", allow_lookahead)
        self.num_experts = num_experts
        self.allow_lookahead = allow_lookahead
        self.supports_masking = True

    def max_rows(self, num_tokens, num_sequences):
        """The most choices that all tokens make together.

        `None` stands for `T * K`. A router with a large `K` whose tokens make
        far fewer choices saves memory by telling their number.
        """
        return None

    def max_choices(self, eval_top_k):
        """The most choices of a token if `eval_top_k` were that of inference.

        With `None` these are the choices in training.
        """
        return self.choices_per_token

    def compute_mask(self, inputs, previous_mask):
        return None  # a Routing has no positions to mask

    def get_config(self):
        return {
            **super().get_config(),
            "num_experts": self.num_experts,
            "allow_lookahead": self.allow_lookahead,
        }
