import keras
from keras import ops

from keras_moe.checks import check_seed
from keras_moe.recommendation.tasks.weighting.task_weighting import (
    TaskWeighting,
)


@keras.saving.register_keras_serializable("keras_moe")
class RandomLossWeighting(TaskWeighting):
    """New random weights at each training step (RLW).

    ```
    weight = T * softmax(standard normal numbers)
    loss   = sum over t of weight[t] * loss[t]
    ```

    A simple baseline that is hard to beat. The weights sum to the number of
    tasks, as in an unweighted sum; in the paper they sum to 1.

    Args:
        seed: int. Seed of the random numbers. Defaults to `None`: a random
            seed.
        **kwargs: Arguments of `keras.layers.Layer`.

    Raises:
        ValueError: If `seed` is neither an int nor `None`.

    Example:

    >>> weighting = keras_moe.models.RandomLossWeighting(seed=0)

    Reference:

    - [Lin et al., 2022](https://arxiv.org/abs/2111.10603), section 3.1
    """

    def __init__(self, seed=None, **kwargs):
        super().__init__(**kwargs)
        check_seed("seed", seed)
        self.seed = seed
        self.seed_generator = keras.random.SeedGenerator(seed)

    def combine(self, losses, present, gram=None):
        draws = keras.random.normal(
            (self.num_tasks,), dtype="float32", seed=self.seed_generator
        )
        return ops.sum(self.num_tasks * ops.softmax(draws) * losses)

    def get_config(self):
        return {**super().get_config(), "seed": self.seed}
