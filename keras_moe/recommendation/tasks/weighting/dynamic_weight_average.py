import keras
from keras import ops

from keras_moe.checks import check_int
from keras_moe.checks import check_positive
from keras_moe.recommendation.tasks.weighting.task_weighting import (
    TaskWeighting,
)


@keras.saving.register_keras_serializable("keras_moe")
class DynamicWeightAverage(TaskWeighting):
    """More weight for tasks whose loss goes down more slowly (DWA).

    ```
    ratio[t]  = mean loss[t] of last period / mean loss[t] of period before
    weight    = T * softmax(ratio / temperature)
    loss      = sum over t of weight[t] * loss[t]
    ```

    A period is an epoch of `fit`, or `update_steps` steps. In the first two,
    all weights are 1. A task without labels in one of the last two periods has
    the ratio 1.

    Args:
        temperature: float. Larger values make the weights more equal. Defaults
            to `2.0`.
        update_steps: int. Length of a period in training steps; needed in a
            training loop without `fit`. Defaults to `None`: an epoch.
        **kwargs: Arguments of `keras.layers.Layer`.

    Raises:
        ValueError: If `temperature` is not positive, or `update_steps` not a
            positive int.

    Example:

    >>> weighting = keras_moe.models.DynamicWeightAverage(update_steps=100)

    Reference:

    - [Liu et al., 2019](https://arxiv.org/abs/1803.10704), equation 7
    """

    def __init__(self, temperature=2.0, update_steps=None, **kwargs):
        super().__init__(**kwargs)
        check_positive("temperature", temperature)
        if update_steps is not None:
            check_int("update_steps", update_steps, 1)
        self.temperature = temperature
        self.update_steps = update_steps

    def create(self, tasks):
        self._sums = self.add_state("sums", 0.0)
        self._counts = self.add_state("counts", 0.0)
        self._steps = self.add_state("steps", 0.0, shape=())
        # Negative as long as there is no such period.
        self._last = self.add_state("last", -1.0)
        self._before = self.add_state("before", -1.0)

    def combine(self, losses, present, gram=None):
        # The period's own losses are not yet part of its weights.
        total = ops.sum(self.task_weights() * losses)
        self._sums.assign_add(ops.stop_gradient(losses * present))
        self._counts.assign_add(present)
        self._steps.assign_add(1.0)
        if self.update_steps is not None:
            self._end_period(self._steps.value >= self.update_steps)
        return total

    def end_epoch(self):
        if self.update_steps is None:
            self._end_period(ops.convert_to_tensor(True))

    def _end_period(self, ended):
        sums, counts = self._sums.value, self._counts.value
        means = ops.where(counts > 0, sums / ops.maximum(counts, 1.0), -1.0)
        last, before = self._last.value, self._before.value
        self._before.assign(ops.where(ended, last, before))
        self._last.assign(ops.where(ended, means, last))
        for variable in (self._sums, self._counts, self._steps):
            variable.assign(ops.where(ended, 0.0, variable.value))

    def task_weights(self):
        last, before = self._last.value, self._before.value
        known = ops.logical_and(last >= 0, before > 0)
        ratios = ops.where(known, last / ops.where(known, before, 1.0), 1.0)
        return self.num_tasks * ops.softmax(ratios / self.temperature)

    def get_config(self):
        return {
            **super().get_config(),
            "temperature": self.temperature,
            "update_steps": self.update_steps,
        }
