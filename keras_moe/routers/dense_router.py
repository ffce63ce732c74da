import keras
from keras import ops

from keras_moe.checks import check_one_of
from keras_moe.ops.routing import Routing
from keras_moe.ops.scores import score
from keras_moe.routers.linear_router import LinearRouter


@keras.saving.register_keras_serializable("keras_moe")
class DenseRouter(LinearRouter):
    """Sends each token to all experts: the classic mixture of experts.

    ```
    logits  = (tokens * jitter) @ kernel + bias     jitter only in training
    weights = score_activation(logits / temperature)
    ```

    Every expert is computed for every token, so no computation is saved.
    Nothing has to be balanced either: every expert learns from every token, in
    proportion to its weight. It is also the gate of multi-gate mixtures (MMoE).
    All of it is computed in float32.

    Args:
        num_experts: int. Number of experts.
        score_activation: `"softmax"` over the experts, whose weights sum to
            one, or `"sigmoid"` of each, whose do not. Defaults to `"softmax"`.
        **kwargs: Arguments of `LinearRouter`: `jitter`, `temperature`,
            `use_bias`, `kernel_initializer`, `bias_initializer`,
            `kernel_regularizer`, `seed`, and of `keras_moe.routers.Router`.

    Call arguments:
        tokens: Tensor of shape `(T, D)`.
        mask: Boolean tensor of shape `(T,)`, or `None`. Each token is routed on
            its own, so it is ignored here; `MoE` leaves masked tokens out.
        training: bool. Whether to apply jitter.

    Input shape:
        `(T, D)`

    Output:
        A `keras_moe.routers.Routing` with `K = E`. The choices stand in the
        order of the experts, 0 to `E - 1`, and not best first as elsewhere:
        there is nothing to choose.

    Raises:
        ValueError: If an argument is out of range, or `D` is not static.

    Example:

    >>> router = keras_moe.routers.DenseRouter(num_experts=3)
    >>> routing = router(keras.ops.ones((2, 8)))
    >>> keras.ops.convert_to_numpy(routing.expert_indices).tolist()
    [[0, 1, 2], [0, 1, 2]]

    Reference:

    - [Jacobs et al., 1991](https://doi.org/10.1162/neco.1991.3.1.79)
    - [Ma et al., 2018](https://doi.org/10.1145/3219819.3220007), section 4
      (multi-gate mixtures)
    """

    distinct_choices = True
    routing_class = Routing
    why_no_eval_top_k = "each token has all experts"

    def __init__(self, num_experts, score_activation="softmax", **kwargs):
        super().__init__(num_experts, **kwargs)
        check_one_of(
            "score_activation", score_activation, ("softmax", "sigmoid")
        )
        self.score_activation = score_activation

    @property
    def choices_per_token(self):
        return self.num_experts

    def call(self, tokens, mask=None, training=None):
        logits = self.logits(tokens, training)  # (T, E)
        weights = score(logits, self.score_activation)
        experts = ops.arange(self.num_experts, dtype="int32")
        # Weights are never negative, so this adds 0. A constant without a token
        # would make TensorFlow's graph optimizer divide by zero.
        indices = experts + ops.cast(weights < 0, "int32")
        return Routing(logits, weights, indices, weights)

    def get_config(self):
        return {
            **super().get_config(),
            "score_activation": self.score_activation,
        }
