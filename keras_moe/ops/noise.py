import keras
from keras import ops


def gumbel(shape, dtype, seed):
    """Draws from the standard Gumbel distribution.

    The largest of `logits + gumbel` is a sample from their softmax, the `k`
    largest are one without replacement.

    Args:
        shape: Shape of the draws.
        dtype: Their dtype.
        seed: A `keras.random.SeedGenerator`.

    Returns:
        Tensor of that shape, finite.
    """
    draws = keras.random.uniform(shape, dtype=dtype, seed=seed)
    # Neither end of (0, 1) has a finite logarithm of its logarithm.
    draws = ops.clip(draws, 1e-20, 1 - 2**-24)
    return -ops.log(-ops.log(draws))
