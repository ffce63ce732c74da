import keras
from keras import ops

from keras_moe.checks import check_int_up_to
from keras_moe.checks import check_one_of
from keras_moe.checks import check_seed
from keras_moe.ops.routing import Routing
from keras_moe.ops.selection import top_k_indices
from keras_moe.routers.router import Router

KINDS = ("uniform", "round_robin")


@keras.saving.register_keras_serializable("keras_moe")
class RandomRouter(Router):
    """Sends each token to `top_k` experts whatever the token is.

    ```
    "uniform":      top_k different experts at random, anew in each call
    "round_robin":  (t * top_k + j) mod num_experts, for j below top_k
    weights         = 1 / top_k
    ```

    This is the baseline that a learned router has to beat. Round robin also
    serves benchmarks, as the loads differ by one token at most. The router has
    no weights and learns nothing. In inference `"uniform"` goes round robin
    too, so that the same input gives the same output; there the experts of a
    token depend on its position among all tokens of the batch, so that causal
    layers refuse the router.

    Args:
        num_experts: int. Number of experts to choose from.
        top_k: int. Experts per token. Defaults to `2`.
        kind: `"uniform"` or `"round_robin"`. Defaults to `"uniform"`.
        seed: int, or `None`. Seed of `"uniform"`. Defaults to `None`.
        **kwargs: Arguments of `keras_moe.routers.Router`.

    Call arguments:
        tokens: Tensor of shape `(T, D)`. Only `T` is used.
        mask: Boolean tensor of shape `(T,)`, or `None`. Ignored here; `MoE`
            leaves masked tokens out.
        training: bool. Whether `"uniform"` draws experts.

    Input shape:
        `(T, D)`

    Output:
        A `keras_moe.routers.Routing` with `K = top_k`, logits of 0 and probs
        of `1 / num_experts`.

    Raises:
        ValueError: If an argument is out of range.

    Example:

    >>> router = keras_moe.routers.RandomRouter(4, top_k=2, kind="round_robin")
    >>> routing = router(keras.ops.ones((3, 8)))
    >>> keras.ops.convert_to_numpy(routing.expert_indices).tolist()
    [[0, 1], [2, 3], [0, 1]]
    """

    looks_ahead = True
    distinct_choices = True
    routing_class = Routing
    why_no_eval_top_k = "it does not rank the experts"

    def __init__(
        self, num_experts, top_k=2, kind="uniform", seed=None, **kwargs
    ):
        super().__init__(num_experts, **kwargs)
        check_int_up_to("top_k", top_k, "num_experts", num_experts)
        check_one_of("kind", kind, KINDS)
        check_seed("seed", seed)
        self.top_k = top_k
        self.kind = kind
        self.seed = seed
        # Every call advances it: a router that draws nothing has none.
        if kind == "uniform":
            self.seed_generator = keras.random.SeedGenerator(seed)

    @property
    def choices_per_token(self):
        return self.top_k

    def call(self, tokens, mask=None, training=None, num_sequences=1):
        # From the shape alone: masked tokens may be NaN.
        logits = ops.zeros(
            (ops.shape(tokens)[0], self.num_experts), dtype=self.compute_dtype
        )
        probs = ops.full_like(logits, 1 / self.num_experts)
        if training and self.kind == "uniform":
            draws = keras.random.uniform(
                ops.shape(logits),
                dtype=self.compute_dtype,
                seed=self.seed_generator,
            )
            indices = top_k_indices(draws, self.top_k)
        else:
            indices = self._round_robin(logits)
        weights = ops.full_like(probs[:, : self.top_k], 1 / self.top_k)
        return Routing(logits, probs, indices, weights)

    def _round_robin(self, logits):
        ones = ops.ones_like(logits[:, :1], dtype="int32")
        # Small before it is multiplied, so that nothing overflows.
        token = ops.mod(ops.cumsum(ones, axis=0) - 1, self.num_experts)
        choice = ops.arange(self.top_k, dtype="int32")
        indices = ops.mod(token * self.top_k + choice, self.num_experts)
        return ops.cast(indices, "int32")

    def get_config(self):
        return {
            **super().get_config(),
            "top_k": self.top_k,
            "kind": self.kind,
            "seed": self.seed,
        }
