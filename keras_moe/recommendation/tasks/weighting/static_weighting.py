import keras
from keras import ops

from keras_moe.checks import check_positive
from keras_moe.recommendation.tasks.weighting.task_weighting import (
    TaskWeighting,
)


@keras.saving.register_keras_serializable("keras_moe")
class StaticWeighting(TaskWeighting):
    """The sum of the losses, each times the `weight` of its task.

    With `decay` the weights change with time, as in PLE:

    ```
    loss = sum over t of weight[t] * decay[t] ** epochs * loss[t]
    ```

    Args:
        decay: float, or a list or tuple of floats, one for each task. Factor of
            a weight after each epoch of `fit`. Defaults to `1.0`.
        **kwargs: Arguments of `keras.layers.Layer`.

    Raises:
        ValueError: If a `decay` is not positive; in `compile`, if their number
            is not the number of tasks.

    Example:

    >>> weighting = keras_moe.models.StaticWeighting(decay=[1.0, 0.9])

    Reference:

    - [Tang et al., 2020](https://doi.org/10.1145/3383313.3412236), equation 10
    """

    def __init__(self, decay=1.0, **kwargs):
        super().__init__(**kwargs)
        for factor in decay if isinstance(decay, (list, tuple)) else [decay]:
            check_positive("decay", factor)
        self.decay = decay

    def create(self, tasks):
        if isinstance(self.decay, (list, tuple)):
            if len(self.decay) != len(tasks):
                raise ValueError(
                    f"`decay` must be one number, or {len(tasks)}, one a "
                    f"task. Received: decay={self.decay!r}"
                )
        self._factors = self.add_state("factors", 1.0)

    def combine(self, losses, present, gram=None):
        return ops.sum(self._factors.value * losses)

    def task_weights(self):
        return self._factors.value

    def end_epoch(self):
        decay = ops.convert_to_tensor(self.decay, "float32")
        self._factors.assign(self._factors.value * decay)

    def get_config(self):
        return {**super().get_config(), "decay": self.decay}
