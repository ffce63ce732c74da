import keras
from keras import ops

from keras_moe.checks import check_seed
from keras_moe.recommendation.tasks.weighting.task_weighting import (
    TaskWeighting,
)


@keras.saving.register_keras_serializable("keras_moe")
class PCGrad(TaskWeighting):
    """Gradients without the parts that conflict with other tasks' gradients.

    ```
    for each task i:
        p[i] = g[i]
        for each other task j, in random order:
            p[i] -= min(p[i] . g[j], 0) / |g[j]|^2 * g[j]
    gradient = sum over i of p[i]
    ```

    `g[t]` is the gradient of the task's loss for all trainable variables. Each
    `p[i]` is a weighted sum of these gradients. Their inner products suffice to
    find the weights, and the result is the gradient of the losses' weighted
    sum. This costs a second forward pass, and a backward pass for each task.
    The `loss` that `fit` reports is the weighted sum; compare models by the
    losses of tasks.

    Args:
        seed: int. Seed of the orders. Defaults to `None`: a random seed.
        **kwargs: Arguments of `keras.layers.Layer`.

    Raises:
        ValueError: If `seed` is neither an int nor `None`.

    Example:

    >>> weighting = keras_moe.models.PCGrad(seed=0)

    Reference:

    - [Yu et al., 2020](https://arxiv.org/abs/2001.06782), algorithm 1
    """

    uses_gradients = True

    def __init__(self, seed=None, **kwargs):
        super().__init__(**kwargs)
        check_seed("seed", seed)
        self.seed = seed
        self.seed_generator = keras.random.SeedGenerator(seed)

    def combine(self, losses, present, gram=None):
        orders = ops.argsort(
            keras.random.uniform(
                (self.num_tasks, self.num_tasks), seed=self.seed_generator
            ),
            axis=-1,
        )
        weights = projected_weights(gram, orders)
        return ops.sum(ops.stop_gradient(weights) * losses)

    def get_config(self):
        return {**super().get_config(), "seed": self.seed}


def projected_weights(gram, orders):
    """Weights of the tasks' gradients in the sum of projected gradients.

    Args:
        gram: `(T, T)`. Inner products of the gradients.
        orders: int `(T, T)`. For each task the order of the others.

    Returns:
        The weights, `(T,)`.
    """
    num_tasks = gram.shape[0]
    parts = ops.eye(num_tasks)  # Row i: p[i] as a sum of gradients.
    norms = ops.diagonal(gram)
    for step in range(num_tasks):
        other = ops.one_hot(orders[:, step], num_tasks)  # (T, T)
        others = 1.0 - ops.diagonal(other)  # Not the task itself.
        products = ops.sum(ops.matmul(parts, gram) * other, axis=-1)
        squared = ops.sum(other * norms, axis=-1)
        factors = ops.minimum(products, 0.0) / ops.where(
            squared > 0, squared, 1.0
        )
        parts = parts - ops.expand_dims(factors * others, 1) * other
    return ops.sum(parts, axis=0)
