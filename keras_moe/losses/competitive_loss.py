import keras
from keras import ops

from keras_moe.checks import check_positive


@keras.saving.register_keras_serializable("keras_moe")
class CompetitiveLoss(keras.losses.Loss):
    """Negative log-likelihood of a target under a mixture of the experts.

    ```
    loss = -log(sum over e of p[e] * exp(-|y_true - output[e]|^2
                                         / (2 * variance)))
    ```

    Each expert is a Gaussian around its output. The expert nearest to the
    target gets the largest part of the gradient, and the gate learns to give it
    more weight: experts compete for examples. (With the squared error of the
    mixed output they cooperate.) It does not measure balance. It is 0 if all
    experts hit the target, and never negative for probabilities, as the
    constants of the Gaussians are left out.

    The prediction holds the outputs of all experts and, as its last channel,
    the logarithms of their probabilities. Make these with `log_softmax`: the
    `log` of a probability of 0 gives a finite loss here, but its gradient is
    not finite.

    Args:
        variance: float. Variance of the Gaussians. Defaults to `1.0`.
        reduction: As in `keras.losses.Loss`. Defaults to
            `"sum_over_batch_size"`.
        name: string. Defaults to `"competitive_loss"`.
        dtype: As in `keras.losses.Loss`.

    Call arguments:
        y_true: Tensor of shape `(batch, dim)`.
        y_pred: Tensor of shape `(batch, num_experts, dim + 1)`.

    Raises:
        ValueError: If `variance` is not positive and finite, or the shapes do
            not fit.

    Example:

    ```python
    x = keras.Input((8,))
    outputs = [keras.layers.Dense(3)(x) for _ in range(2)]
    log_probs = keras.ops.log_softmax(keras.layers.Dense(2)(x))
    y = keras.ops.concatenate(
        [keras.ops.stack(outputs, axis=1), log_probs[..., None]], axis=-1
    )
    model = keras.Model(x, y)
    model.compile("adam", keras_moe.losses.CompetitiveLoss())
    ```

    Reference:

    - [Jacobs et al., 1991](https://doi.org/10.1162/neco.1991.3.1.79), equation
      1.3
    """

    def __init__(
        self,
        variance=1.0,
        reduction="sum_over_batch_size",
        name="competitive_loss",
        dtype=None,
    ):
        super().__init__(name=name, reduction=reduction, dtype=dtype)
        check_positive("variance", variance)
        self.variance = variance

    def call(self, y_true, y_pred):
        true, pred = tuple(y_true.shape), tuple(y_pred.shape)
        if len(true) != 2 or len(pred) != 3 or pred[-1] != true[-1] + 1:
            raise ValueError(
                "`y_true` must be of shape (batch, dim) and `y_pred` of shape "
                "(batch, num_experts, dim + 1). "
                f"Received: y_true.shape={true}, y_pred.shape={pred}"
            )
        dtype = keras.backend.standardize_dtype(y_pred.dtype)
        dtype = dtype if dtype == "float64" else "float32"
        y_true = ops.expand_dims(ops.cast(y_true, dtype), 1)  # (B, 1, D)
        y_pred = ops.cast(y_pred, dtype)
        distances = ops.sum(ops.square(y_true - y_pred[..., :-1]), axis=-1)
        # If all experts were impossible, minus infinity would give NaN.
        log_probs = ops.maximum(y_pred[..., -1], -1e30)  # (B, E)
        likelihoods = log_probs - distances / (2 * self.variance)
        return -ops.logsumexp(likelihoods, axis=-1)

    def get_config(self):
        return {**super().get_config(), "variance": self.variance}
