import keras
from keras import ops

from keras_moe.checks import check_at_least
from keras_moe.checks import check_positive
from keras_moe.recommendation.tasks.weighting.task_weighting import (
    TaskWeighting,
)


@keras.saving.register_keras_serializable("keras_moe")
class GradNorm(TaskWeighting):
    """Weights that give tasks that learn slowly larger gradients.

    ```
    norm[t]   = weight[t] * |gradient of loss[t]|
    rate[t]   = loss[t] / its first value, divided by the mean over tasks
    target[t] = mean norm * rate[t] ** alpha
    weight   -= learning_rate * gradient of sum(|norm - target|), target fixed
    weight   *= sum(weight before the step) / sum(weight)
    loss      = sum over t of weight[t] * loss[t]
    ```

    The gradients are taken for all trainable variables of layers that more than
    one task uses, except `<task>_tower_...` and `<task>_logits`. Means and sums
    are over the tasks with labels in the batch; others keep their weight. This
    costs a second forward pass, and a backward pass for each task.

    Args:
        alpha: float. Strength with which slow tasks are favoured; with 0 all
            tasks get equal norms. Defaults to `1.5`.
        learning_rate: float. Step size of the weights. Defaults to `0.025`.
        **kwargs: Arguments of `keras.layers.Layer`.

    Raises:
        ValueError: If `alpha` is negative or `learning_rate` not positive.

    Example:

    >>> weighting = keras_moe.models.GradNorm(alpha=0.5)

    Reference:

    - [Chen et al., 2018](https://arxiv.org/abs/1711.02257), algorithm 1
    """

    uses_gradients = True

    def __init__(self, alpha=1.5, learning_rate=0.025, **kwargs):
        super().__init__(**kwargs)
        check_at_least("alpha", alpha, 0)
        check_positive("learning_rate", learning_rate)
        self.alpha = alpha
        self.learning_rate = learning_rate

    def create(self, tasks):
        self._factors = self.add_state("factors", 1.0)
        self._first = self.add_state("first", -1.0)  # Negative: not yet seen.

    def select(self, variables, shared):
        if not shared:
            raise ValueError(
                "GradNorm needs trainable variables that more than one task "
                f"uses. Received: {[v.path for v in variables]}"
            )
        return shared

    def combine(self, losses, present, gram=None):
        # A copy: where assigning is in place, the gradient would belong to the
        # weights of the next step.
        factors = ops.copy(self._factors.value)
        self._update(ops.stop_gradient(losses), present, gram)
        return ops.sum(factors * losses)

    def _update(self, losses, present, gram):
        first = self._first.value
        new = ops.logical_and(present > 0, first < 0)
        first = ops.where(new, losses, first)
        factors = self._factors.value
        count = ops.maximum(ops.sum(present), 1.0)
        norms = ops.sqrt(ops.maximum(ops.diagonal(gram), 0.0))
        mean_norm = ops.sum(present * factors * norms) / count
        rates = present * losses / ops.where(first > 0, first, 1.0)
        mean_rate = ops.sum(rates) / count
        rates = rates / ops.where(mean_rate > 0, mean_rate, 1.0)
        targets = mean_norm * ops.power(rates, self.alpha)
        slopes = present * norms * ops.sign(factors * norms - targets)
        # With a negative weight, training would increase the loss.
        moved = ops.maximum(factors - self.learning_rate * slopes, 1e-3)
        before, after = ops.sum(present * factors), ops.sum(present * moved)
        moved = moved * before / ops.where(after > 0, after, 1.0)
        self._factors.assign(ops.where(present > 0, moved, factors))
        self._first.assign(first)

    def task_weights(self):
        return self._factors.value

    def get_config(self):
        return {
            **super().get_config(),
            "alpha": self.alpha,
            "learning_rate": self.learning_rate,
        }
