import keras
from keras import ops

from keras_moe.checks import check_number
from keras_moe.recommendation.tasks.weighting.task_weighting import (
    TaskWeighting,
)


@keras.saving.register_keras_serializable("keras_moe")
class UncertaintyWeighting(TaskWeighting):
    """Losses divided by a learned variance of each task's noise.

    ```
    loss = sum over t of c[t] * exp(-s[t]) * loss[t] + s[t] / 2
    ```

    `s[t]` is the logarithm of the variance: one trainable number for each task,
    which the model's optimizer updates with all others. `c[t]` is 1/2 for a
    regression and 1 otherwise. A task without labels in the batch has no
    gradient for its `s[t]`. The loss may become negative.

    Args:
        initial_log_variance: float. Initial value of `s`. Defaults to `0.0`.
        **kwargs: Arguments of `keras.layers.Layer`.

    Raises:
        ValueError: If `initial_log_variance` is not a finite number.

    Example:

    >>> weighting = keras_moe.models.UncertaintyWeighting()

    Reference:

    - [Kendall et al., 2018](https://arxiv.org/abs/1705.07115), equations 7 and
      10
    """

    def __init__(self, initial_log_variance=0.0, **kwargs):
        super().__init__(**kwargs)
        check_number("initial_log_variance", initial_log_variance)
        self.initial_log_variance = initial_log_variance

    def create(self, tasks):
        self._log_variances = self.add_weight(
            name="log_variances",
            shape=(len(tasks),),
            initializer=keras.initializers.Constant(self.initial_log_variance),
            dtype="float32",
            autocast=False,
        )
        self._halves = [0.5 if t.type == "regression" else 1.0 for t in tasks]

    def combine(self, losses, present, gram=None):
        penalties = 0.5 * self._log_variances.value
        return ops.sum(self.task_weights() * losses + present * penalties)

    def task_weights(self):
        return ops.convert_to_tensor(self._halves, "float32") * ops.exp(
            -self._log_variances.value
        )

    def get_config(self):
        return {
            **super().get_config(),
            "initial_log_variance": self.initial_log_variance,
        }
