import keras
from keras import ops

from keras_moe.checks import check_at_least
from keras_moe.checks import check_positive
from keras_moe.recommendation.tasks.weighting.task_weighting import (
    TaskWeighting,
)


@keras.saving.register_keras_serializable("keras_moe")
class FAMO(TaskWeighting):
    """Weights under which all losses shrink equally fast, from losses alone.

    ```
    z      = softmax(xi)
    loss   = c * sum over t of z[t] * log(loss[t]),  c = 1 / sum(z / loss)
    change = log(loss[t]) - log(loss[t] at the next step)
    xi    -= learning_rate * (d softmax(xi) / d xi @ change + decay * xi)
    ```

    The loss is not a mean of losses, and may be negative. `c` makes its
    gradient a weighted mean of the losses' gradients.

    The paper computes the losses of a batch again after the step. Here `change`
    compares a batch with the next one, which costs nothing. Over many steps the
    changes add up to the difference between the last loss and the first, so
    that the noise of batches cancels. (The authors' code updates `xi` with Adam
    and a rate of 0.025, which would let this noise add up.)

    The sum is over the tasks with labels in the batch. A task without labels
    keeps its last loss for the next comparison.

    Args:
        learning_rate: float. Step size of `xi`. Defaults to `1.0`.
        decay: float. Weight decay of `xi`, which pulls the weights towards
            equality. Defaults to `1e-3`.
        epsilon: float. Losses below `epsilon` count as `epsilon`. Defaults to
            `1e-8`.
        **kwargs: Arguments of `keras.layers.Layer`.

    Raises:
        ValueError: If `learning_rate` or `epsilon` is not positive, or `decay`
            negative.

    Example:

    >>> weighting = keras_moe.models.FAMO(learning_rate=0.5)

    Reference:

    - [Liu et al., 2023](https://arxiv.org/abs/2306.03792), algorithm 1
    """

    def __init__(self, learning_rate=1.0, decay=1e-3, epsilon=1e-8, **kwargs):
        super().__init__(**kwargs)
        check_positive("learning_rate", learning_rate)
        check_at_least("decay", decay, 0)
        check_positive("epsilon", epsilon)
        self.learning_rate = learning_rate
        self.decay = decay
        self.epsilon = epsilon

    def create(self, tasks):
        self._xi = self.add_state("xi", 0.0)
        self._last_logs = self.add_state("last_logs", 0.0)
        self._seen = self.add_state("seen", 0.0)

    def combine(self, losses, present, gram=None):
        logs = ops.log(ops.maximum(losses, self.epsilon))
        self._update(ops.stop_gradient(logs), present)
        z = self.task_weights() * present
        # Above epsilon, a task's gradient is c * z / loss times the loss's own.
        scale = ops.sum(
            z / ops.maximum(ops.stop_gradient(losses), self.epsilon)
        )
        return ops.sum(z * logs) / ops.where(scale > 0, scale, 1.0)

    def _update(self, logs, present):
        xi, z = self._xi.value, self.task_weights()
        both = present * self._seen.value
        change = both * (self._last_logs.value - logs)
        slope = z * (change - ops.sum(z * change))
        compared = ops.cast(ops.any(both > 0), "float32")
        step = self.learning_rate * (slope + self.decay * xi)
        self._xi.assign(xi - compared * step)
        self._last_logs.assign(
            ops.where(present > 0, logs, self._last_logs.value)
        )
        self._seen.assign(ops.maximum(self._seen.value, present))

    def task_weights(self):
        return ops.softmax(self._xi.value)

    def get_config(self):
        return {
            **super().get_config(),
            "learning_rate": self.learning_rate,
            "decay": self.decay,
            "epsilon": self.epsilon,
        }
