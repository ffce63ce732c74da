"""Noise on logits: Gumbel and normal draws, and the load they lead to."""

import math

import keras
from keras import ops

from keras_moe.checks import is_number
from keras_moe.ops.selection import take_chosen
from keras_moe.ops.selection import top_k_indices

THRESHOLDS = ("exact", "shared")


def gumbel(shape, dtype, seed):
    """Draws from the standard Gumbel distribution.

    The largest entry of `logits + gumbel` is a sample from the softmax of the
    logits; the `k` largest are a sample of `k` without replacement.

    Args:
        shape: Shape of the draws.
        dtype: Dtype of the draws.
        seed: A `keras.random.SeedGenerator`.

    Returns:
        Tensor of this shape, finite.
    """
    draws = keras.random.uniform(shape, dtype=dtype, seed=seed)
    # At 0 and 1 the result would be infinite.
    draws = ops.clip(draws, 1e-20, 1 - 2**-24)
    return -ops.log(-ops.log(draws))


def with_noise(logits, noise_stddev, gumbel_noise, seed):
    """Logits plus normal noise plus Gumbel noise.

    Args:
        logits: Tensor.
        noise_stddev: float. Standard deviation of the normal noise. 0 adds
            none.
        gumbel_noise: float. Factor of the standard Gumbel noise. 0 adds none.
        seed: A `keras.random.SeedGenerator`, or `None` if both are 0.

    Returns:
        Tensor of the shape of the logits.
    """
    shape, dtype = ops.shape(logits), logits.dtype
    if noise_stddev > 0:
        logits = logits + keras.random.normal(
            shape, stddev=noise_stddev, dtype=dtype, seed=seed
        )
    if gumbel_noise > 0:
        logits = logits + gumbel_noise * gumbel(shape, dtype, seed)
    return logits


def expected_load(
    clean_logits, noisy_logits, noise_stddev, top_k, threshold="exact"
):
    """Probability that an expert is chosen if its noise is drawn again.

    ```
    noisy_logits = clean_logits + noise_stddev * normal
    load         = normal_cdf((clean_logits - thresholds) / noise_stddev)
    ```

    An expert is among the `top_k` if its logit exceeds its threshold. The sum
    over the tokens is a load which, unlike the counts, has a gradient: through
    logits, thresholds and standard deviation.

    Where the standard deviation is 0 (at most `1e-10`), the load is 1 for the
    chosen experts and 0 for the others, without a gradient. With `top_k = E`
    the load is 1.

    Args:
        clean_logits: `(T, E)`.
        noisy_logits: `(T, E)`. The logits that the experts were chosen by.
        noise_stddev: `(T, E)`, or a float. Standard deviation of the noise.
        top_k: int, at most `E`.
        threshold: `"exact"` is the `top_k`-th largest noisy logit of the other
            experts (Shazeer et al.); the load of a token then sums to `top_k`
            on average. `"shared"` is the `top_k`-th largest of all (V-MoE and
            Tutel), which is higher for the chosen experts. Defaults to
            `"exact"`.

    Returns:
        `(T, E)`, float32, or float64 if the logits are.

    Raises:
        ValueError: If `threshold` is not known, or `top_k` is not between 1
            and `E`.

    Example:

    >>> logits = keras.ops.array([[2.0, 1.0]])
    >>> load = keras_moe.ops.expected_load(logits, logits, 1.0, top_k=1)
    >>> [round(float(p), 3) for p in load[0]]
    [0.841, 0.159]

    Reference:

    - [Shazeer et al., 2017](https://arxiv.org/abs/1701.06538), equations 8 to
      10
    - [Riquelme et al., 2021](https://arxiv.org/abs/2106.05974), appendix A
    """
    if threshold not in THRESHOLDS:
        raise ValueError(
            f"`threshold` must be one of {THRESHOLDS}. "
            f"Received: threshold={threshold!r}"
        )
    num_experts = clean_logits.shape[-1]
    if not 1 <= top_k <= num_experts:
        raise ValueError(
            "`top_k` must be between 1 and the number of experts. "
            f"Received: top_k={top_k}, num_experts={num_experts}"
        )
    dtype = keras.backend.standardize_dtype(clean_logits.dtype)
    dtype = dtype if dtype == "float64" else "float32"
    clean_logits = ops.cast(clean_logits, dtype)
    noisy_logits = ops.cast(noisy_logits, dtype)
    if top_k == num_experts:
        return ops.ones_like(clean_logits)
    best = top_k_indices(noisy_logits, top_k + 1)  # (T, K + 1)
    values = take_chosen(noisy_logits, best)
    chosen = ops.any(
        ops.expand_dims(best[:, :top_k], -1)
        == ops.arange(num_experts, dtype="int32"),
        axis=1,
    )  # (T, E)
    if is_number(noise_stddev) and noise_stddev == 0:
        # Without the error function, which TensorFlow cannot run in a program
        # that JAX has exported.
        return ops.cast(chosen, dtype)
    thresholds = values[:, top_k - 1 : top_k]
    if threshold == "exact":
        thresholds = ops.where(chosen, values[:, top_k:], thresholds)
    stddev = ops.cast(noise_stddev, dtype) + ops.zeros_like(clean_logits)
    # For a smaller one the gradient of the division would overflow.
    noisy = stddev > 1e-10
    stddev = ops.where(noisy, stddev, ops.ones_like(stddev))
    # Beyond 10 the probability is 0 or 1 in float32.
    margin = ops.clip((clean_logits - thresholds) / stddev, -10.0, 10.0)
    load = 0.5 * (1 + ops.erf(margin * math.sqrt(0.5)))
    return ops.where(noisy, load, ops.cast(chosen, dtype))
