import keras
from keras import ops

from keras_moe import backend
from keras_moe.checks import check_bool
from keras_moe.checks import check_int
from keras_moe.checks import check_int_up_to
from keras_moe.checks import check_one_of
from keras_moe.ops.masking import zero_masked
from keras_moe.ops.routing import Routing
from keras_moe.ops.scores import normalize_weights
from keras_moe.ops.scores import score
from keras_moe.ops.selection import take_chosen
from keras_moe.routers.choice_arguments import as_normalize_weights
from keras_moe.routers.choice_arguments import check_weights
from keras_moe.routers.hash_table import as_table
from keras_moe.routers.hash_table import balanced_table
from keras_moe.routers.linear_router import LinearRouter

WEIGHTS = ("uniform", "learned")


@keras.saving.register_keras_serializable("keras_moe")
class HashRouter(LinearRouter):
    """Looks the experts of a token up in a fixed table, by the token's id.

    ```
    indices = table[context mod num_ids]
    weights = weight_scale / top_k                          "uniform"
    weights = score_activation(logits)[indices]             "learned"
    weights = weights / (sum(weights) + normalize_epsilon)  if normalize_weights
    weights = weights * weight_scale
    ```

    The choice needs no training and no balancing loss; the more equally
    frequent the ids, the more equal the loads. `"learned"` weights
    (DeepSeek-V4) come from the token itself, with a kernel as in other routers.

    If the table names an expert twice for an id, these are two choices, and
    their weights add up.

    Args:
        num_experts: int. Number of experts.
        table: Integer array of shape `(num_ids, top_k)` or `(num_ids,)` with
            experts from 0 to `num_experts - 1`, or `None` for a random table
            made from `num_ids`, `top_k` and `seed`, in which all experts are
            equally frequent and no id has one twice. It is a non-trainable
            variable and saved with the weights; a given one is part of the
            config too. Defaults to `None`.
        num_ids: int. Number of ids of a random table. Defaults to `None`.
        top_k: int. Experts per token. Defaults to the width of `table`, or
            `1`.
        weights: `"uniform"` or `"learned"`. Defaults to `"uniform"`.
        score_activation: `"softmax"`, `"sigmoid"` or `"sqrt_softplus"`, for
            learned weights. Defaults to `"softmax"`.
        normalize_weights: bool. Whether to divide the learned weights of a
            token by their sum. Defaults to `True` for `top_k > 1`; refused for
            `top_k=1`, where the weight would always be one.
        normalize_epsilon: float. Added to that sum. Defaults to `1e-20`.
        weight_scale: float. Factor of the weights. Defaults to `1.0`.
        seed: int. Seed of the random table, and of the jitter. Defaults to
            `0`.
        **kwargs: Arguments of `keras_moe.routers.LinearRouter` for learned
            weights: `jitter`, `temperature`, `use_bias`, initializers,
            regularizer.

    Call arguments:
        tokens: Tensor of shape `(T, D)`. Of no effect for uniform weights.
        mask: Boolean tensor of shape `(T,)`, or `None`. The ids of masked
            tokens are ignored; these tokens get the experts of id 0.
        training: bool. Whether to apply jitter.
        context: Integer tensor of shape `(T,)` or `(T, 1)`: the ids, which are
            taken modulo `num_ids`. A negative id is an error where the values
            are known.

    Input shape:
        `(T, D)`

    Output:
        A `keras_moe.routers.Routing` with `K = top_k`, in the order of the
        table. With uniform weights, its logits are 0 and its probs the share
        of the choices that each expert has, otherwise as in `TopKRouter`.

    Raises:
        ValueError: If an argument is out of range, `table` does not fit, or
            `context` is missing, of another shape, not of integers or
            negative.

    Example:

    >>> router = keras_moe.routers.HashRouter(4, table=[[0, 2], [3, 1]])
    >>> routing = router(keras.ops.ones((3, 8)), context=[1, 0, 1])
    >>> keras.ops.convert_to_numpy(routing.expert_indices).tolist()
    [[3, 1], [0, 2], [3, 1]]

    Reference:

    - [Roller et al., 2021](https://arxiv.org/abs/2106.04426), section 3
    """

    uses_context = True
    needs_context = True
    routing_class = Routing
    why_no_eval_top_k = (
        "its table holds the experts of an id in no order of rank"
    )

    def __init__(
        self,
        num_experts,
        table=None,
        num_ids=None,
        top_k=None,
        weights="uniform",
        score_activation="softmax",
        normalize_weights=None,
        normalize_epsilon=1e-20,
        weight_scale=1.0,
        seed=0,
        **kwargs,
    ):
        super().__init__(num_experts, seed=seed, **kwargs)
        if table is not None:
            table = as_table(table, num_experts)
            if num_ids not in (None, len(table)):
                raise ValueError(
                    "`num_ids` must be None or the number of rows of `table`. "
                    f"Received: num_ids={num_ids}, "
                    f"table.shape={table.shape}"
                )
            if top_k not in (None, table.shape[1]):
                raise ValueError(
                    "`top_k` must be None or the width of `table`. "
                    f"Received: top_k={top_k}, table.shape={table.shape}"
                )
            num_ids, top_k = table.shape
        top_k = 1 if top_k is None else top_k
        if table is None:
            if num_ids is None:
                raise ValueError(
                    "Either `table` or `num_ids` must be given. "
                    "Received: table=None, num_ids=None"
                )
            check_int("num_ids", num_ids, 1)
            check_int_up_to("top_k", top_k, "num_experts", num_experts)
        check_one_of("weights", weights, WEIGHTS)
        check_weights(score_activation, normalize_epsilon, weight_scale)
        if normalize_weights is None:
            normalize_weights = top_k > 1
        check_bool("normalize_weights", normalize_weights)
        if weights == "learned":
            as_normalize_weights(normalize_weights, top_k)
        self.num_ids = num_ids
        self.top_k = top_k
        self.weights_kind = weights
        self.score_activation = score_activation
        self.normalize_weights = normalize_weights
        self.normalize_epsilon = normalize_epsilon
        self.weight_scale = weight_scale
        self._given_table = table

    @property
    def choices_per_token(self):
        return self.top_k

    def build(self, tokens_shape):
        if self.weights_kind == "learned":
            super().build(tokens_shape)
        self.table = self.add_weight(
            name="table",
            shape=(self.num_ids, self.top_k),
            dtype="int32",
            initializer=self._initial_table,
            trainable=False,
        )

    def _initial_table(self, shape, dtype=None):
        table = self._given_table
        if table is None:
            table = balanced_table(
                self.num_ids, self.num_experts, self.top_k, self.seed
            )
        return ops.convert_to_tensor(table, dtype="int32")

    def call(self, tokens, mask=None, training=None, context=None):
        if mask is not None:
            mask = ops.cast(mask, "bool")
        ids = self._ids(context, mask)
        indices = ops.take(self.table, ids, axis=0)  # (T, K)
        if self.weights_kind == "uniform":
            return self._uniform(indices)
        logits = self.logits(zero_masked(tokens, mask), training)
        probs = score(logits, self.score_activation)
        weights = take_chosen(probs, indices)
        if self.normalize_weights:
            weights = normalize_weights(weights, self.normalize_epsilon)
        return Routing(logits, probs, indices, weights * self.weight_scale)

    def _uniform(self, indices):
        expert = ops.arange(self.num_experts, dtype="int32")
        chosen = ops.equal(ops.expand_dims(indices, -1), expert)  # (T, K, E)
        probs = ops.mean(ops.cast(chosen, self.compute_dtype), axis=1)
        weights = ops.ones_like(indices, dtype=self.compute_dtype)
        weights = weights * (self.weight_scale / self.top_k)
        return Routing(ops.zeros_like(probs), probs, indices, weights)

    def compute_output_spec(
        self, tokens, mask=None, training=None, context=None
    ):
        self._check_context(context)
        return super().compute_output_spec(
            tokens, mask=mask, training=training, context=context
        )

    def _check_context(self, context):
        if context is None:
            raise ValueError(
                "`context` must be given to HashRouter: the ids of the tokens, "
                "of shape (T,) or (T, 1). Received: context=None"
            )
        shape = tuple(context.shape)
        if len(shape) not in (1, 2) or shape[1:] not in ((), (1,)):
            raise ValueError(
                "`context` must be of shape (T,) or (T, 1). "
                f"Received: context.shape={shape}"
            )
        dtype = keras.backend.standardize_dtype(context.dtype)
        if "int" not in dtype:
            # A float may have been rounded on the way.
            raise ValueError(
                "`context` must be of an integer dtype. "
                f"Received: context.dtype={dtype}"
            )

    def _ids(self, context, mask):
        """The rows of the table, `(T,)` int32."""
        if context is not None:
            context = ops.convert_to_tensor(context)
        self._check_context(context)
        ids = ops.reshape(context, (-1,))
        dtype = keras.backend.standardize_dtype(ids.dtype)
        if dtype not in ("int64", "uint32", "uint64"):
            ids = ops.cast(ids, "int32")
        ids = zero_masked(ids, mask)
        if not backend.is_symbolic(ids) and bool(ops.any(ids < 0)):
            raise ValueError(
                "`context` must not contain negative ids where `mask` is not "
                f"False. Received: {int(ops.min(ids))}"
            )
        ids = ops.mod(ids, ops.cast(self.num_ids, ids.dtype))
        return ops.cast(ids, "int32")

    def get_config(self):
        table = self._given_table
        return {
            **super().get_config(),
            "table": None if table is None else table.tolist(),
            "num_ids": self.num_ids,
            "top_k": self.top_k,
            "weights": self.weights_kind,
            "score_activation": self.score_activation,
            "normalize_weights": self.normalize_weights,
            "normalize_epsilon": self.normalize_epsilon,
            "weight_scale": self.weight_scale,
        }
