import keras
from keras import ops

from keras_moe.checks import check_positive
from keras_moe.recommendation.tasks.weighting.task_weighting import (
    TaskWeighting,
)


@keras.saving.register_keras_serializable("keras_moe")
class GeometricLoss(TaskWeighting):
    """The geometric mean of the losses (GLS), whose scales do not matter.

    ```
    loss = (product over t of loss[t] * weight[t]) ** (1 / T)
    ```

    The mean is over the tasks with labels in the batch. `TaskSpec.weight`
    multiplies the whole product, so it changes only the step size.
    Losses must not be negative; those below `epsilon` count as `epsilon` and
    have no gradient.

    Args:
        epsilon: float. Lower bound of the losses. Defaults to `1e-8`.
        **kwargs: Arguments of `keras.layers.Layer`.

    Raises:
        ValueError: If `epsilon` is not positive.

    Example:

    >>> weighting = keras_moe.models.GeometricLoss()

    Reference:

    - [Chennupati et al., 2019](https://arxiv.org/abs/1904.08492), equation 2
    """

    def __init__(self, epsilon=1e-8, **kwargs):
        super().__init__(**kwargs)
        check_positive("epsilon", epsilon)
        self.epsilon = epsilon

    def combine(self, losses, present, gram=None):
        logs = present * ops.log(ops.maximum(losses, self.epsilon))
        count = ops.sum(present)
        mean = ops.exp(ops.sum(logs) / ops.maximum(count, 1.0))
        return mean * ops.cast(count > 0, "float32")

    def get_config(self):
        return {**super().get_config(), "epsilon": self.epsilon}
