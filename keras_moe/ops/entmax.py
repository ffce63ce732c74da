"""Sparse alternatives to softmax: probabilities with exact zeros."""

import math

import keras
from keras import ops

from keras_moe import backend


def sparsemax(x, axis=-1):
    """The point of the probability simplex that is nearest to `x`.

    ```
    p = max(x - tau, 0)        tau such that p sums to one
    ```

    It is `entmax` with `alpha=2`, computed by sorting. Infinities, NaN and half
    precision are treated as in `entmax`.

    Args:
        x: Tensor, such as logits `(T, E)`.
        axis: int. The axis that sums to one. Defaults to `-1`.

    Returns:
        Tensor of the shape and dtype of `x`.

    Example:

    >>> p = keras_moe.ops.sparsemax(keras.ops.array([1.0, 0.5, -1.0]))
    >>> keras.ops.convert_to_numpy(p).tolist()
    [0.75, 0.25, 0.0]

    Reference:

    - [Martins and Astudillo, 2016](https://arxiv.org/abs/1602.02068),
      algorithm 1
    """
    return _map(x, 2.0, axis, _sparsemax)


def entmax15(x, axis=-1):
    """Between softmax and sparsemax: `entmax` with `alpha=1.5`.

    ```
    p = max(x / 2 - tau, 0) ** 2        tau such that p sums to one
    ```

    It is computed by sorting. Infinities, NaN and half precision are treated as
    in `entmax`.

    Args:
        x: Tensor, such as logits `(T, E)`.
        axis: int. The axis that sums to one. Defaults to `-1`.

    Returns:
        Tensor of the shape and dtype of `x`.

    Example:

    >>> p = keras_moe.ops.entmax15(keras.ops.array([0.0, -2.0, -3.0]))
    >>> keras.ops.convert_to_numpy(p).tolist()
    [1.0, 0.0, 0.0]

    Reference:

    - [Peters et al., 2019](https://arxiv.org/abs/1905.05702), section 3
    """
    return _map(x, 1.5, axis, _entmax15)


def entmax(x, alpha, axis=-1):
    """Probabilities that are exactly zero where `x` is small.

    ```
    p = max((alpha - 1) * x - tau, 0) ** (1 / (alpha - 1))
    ```

    where `tau` makes `p` sum to one. A larger `alpha` gives more zeros; as
    `alpha` goes to 1, the result goes to softmax. `tau` is found by bisection,
    and for the floats 1.5 and 2 by sorting.

    The gradient has a closed form, which can be differentiated again. An entry
    of minus infinity gives zero and gets no gradient; if all entries are minus
    infinity, all results are zero. A NaN makes its whole row NaN. Half
    precision is computed in float32.

    Args:
        x: Tensor, such as logits `(T, E)`.
        alpha: float above 1, or a tensor, which gets a gradient too: a scalar,
            or of the shape of `x` with size 1 at `axis`.
        axis: int. The axis that sums to one. Defaults to `-1`.

    Returns:
        Tensor of the shape and dtype of `x`.

    Raises:
        ValueError: If a float `alpha` is not above 1 and finite, or a tensor
            `alpha` does not have size 1 at `axis`.

    Example:

    >>> p = keras_moe.ops.entmax(keras.ops.array([2.0, 1.0, -3.0]), 1.2)
    >>> [round(float(value), 3) for value in p]
    [0.766, 0.234, 0.0]

    Reference:

    - [Peters et al., 2019](https://arxiv.org/abs/1905.05702), section 3
    - [Correia et al., 2019](https://arxiv.org/abs/1909.00015), proposition 1
      (gradient of `alpha`)
    """
    if isinstance(alpha, (int, float)):
        if not 1 < alpha < math.inf:
            raise ValueError(
                f"`alpha` must be above 1 and finite. Received: alpha={alpha}"
            )
        closed_form = {1.5: _entmax15, 2: _sparsemax}.get(alpha)
        if closed_form is not None:
            return _map(x, alpha, axis, closed_form)
    return _map(x, alpha, axis, _bisect)


def _map(x, alpha, axis, solve):
    x = ops.convert_to_tensor(x)
    if 0 in x.shape:  # torch has no maximum of nothing
        return x
    dtype = keras.backend.standardize_dtype(x.dtype)
    compute_dtype = "float64" if dtype == "float64" else "float32"
    x = ops.moveaxis(ops.cast(x, compute_dtype), axis, -1)
    highest = ops.max(ops.stop_gradient(x), axis=-1, keepdims=True)
    empty = ops.equal(highest, float("-inf"))
    highest = ops.where(empty, ops.zeros_like(highest), highest)
    shifted = ops.stop_gradient(x) - highest  # nothing above 0
    inputs = (x,)
    if not isinstance(alpha, (int, float)):
        alpha = _by_row(alpha, highest, axis, compute_dtype)
        inputs = (x, alpha)
    else:
        alpha = ops.full((1,) * len(x.shape), alpha, compute_dtype)
    alpha = ops.stop_gradient(alpha)
    p = solve(shifted, alpha)
    not_a_number = ops.any(ops.isnan(shifted), axis=-1, keepdims=True)
    p = ops.where(not_a_number, ops.full_like(p, float("nan")), p)
    p = backend.with_gradient(_value, _gradients, inputs, (p, highest, alpha))
    if dtype in ("float16", "bfloat16"):
        p = ops.cast(p, dtype)
    return ops.moveaxis(p, -1, axis)


def _by_row(alpha, rows, axis, dtype):
    alpha = ops.cast(ops.convert_to_tensor(alpha), dtype)
    if len(alpha.shape) == len(rows.shape):
        alpha = ops.moveaxis(alpha, axis, -1)
    if len(alpha.shape) > 0 and alpha.shape[-1] != 1:
        raise ValueError(
            "A tensor `alpha` must be a scalar or have the size 1 at `axis`. "
            f"Received: alpha.shape={tuple(alpha.shape)}, axis={axis}"
        )
    return alpha + ops.zeros_like(rows)


def _at_least(x, number):
    # On torch `maximum` with a number makes float32 of float64.
    return ops.where(x < number, ops.full_like(x, number), x)


def _descending(x):
    # Entries more than 1 below the highest give zero. Large negative ones would
    # cost the cumulative sums their precision.
    return ops.flip(ops.sort(_at_least(x, -1.0), axis=-1), axis=-1)


def _sparsemax(x, alpha):
    descending = _descending(x)
    rank = ops.arange(1, x.shape[-1] + 1, dtype=x.dtype)
    inside = 1 + rank * descending > ops.cumsum(descending, axis=-1)
    tau = _threshold(descending, inside)
    # Once more, since `cumsum` on torch has at most float32 precision.
    return ops.relu(x - _threshold(x, x > tau))


def _threshold(x, inside):
    total = ops.sum(ops.where(inside, x, ops.zeros_like(x)), -1, keepdims=True)
    size = ops.sum(ops.cast(inside, x.dtype), axis=-1, keepdims=True)
    return (total - 1) / _at_least(size, 1.0)


def _entmax15(x, alpha):
    x = x / 2
    descending = _descending(x)
    rank = ops.arange(1, x.shape[-1] + 1, dtype=x.dtype)
    mean = ops.cumsum(descending, axis=-1) / rank
    square = ops.cumsum(ops.square(descending), axis=-1) / rank
    gap = 1 / rank - (square - ops.square(mean))
    tau = mean - ops.sqrt(ops.relu(gap))  # if the first `rank` are kept
    inside = ops.cast(tau <= descending, x.dtype)
    size = ops.sum(inside, axis=-1, keepdims=True)
    at_size = ops.cast(ops.equal(rank, size), x.dtype)
    tau = ops.sum(tau * at_size, axis=-1, keepdims=True)
    # The difference of squares loses digits. Two steps of Newton's method get
    # them back; it converges from anywhere, since the sum is convex in tau.
    for _ in range(2):
        kept = ops.relu(x - tau)
        excess = ops.sum(ops.square(kept), axis=-1, keepdims=True) - 1
        slope = 2 * ops.sum(kept, axis=-1, keepdims=True)  # at the root >= 2
        tau = tau + excess / _at_least(slope, 1.0)
    return ops.square(ops.relu(x - tau))


def _bisect(x, alpha):
    if x.shape[-1] == 1:  # XLA cannot compile the loop for size 1
        return _sparsemax(x, alpha)
    rate = alpha - 1
    x = rate * x
    # Bisects 1 + tau, which stays precise if alpha is close to 1.
    low = ops.zeros_like(ops.max(x, axis=-1, keepdims=True))
    high = low - ops.expm1(-rate * math.log(x.shape[-1]))
    float64 = keras.backend.standardize_dtype(x.dtype) == "float64"
    # A loop compiles faster than unrolled steps.
    state = (low, high, x, rate + low)
    low = ops.fori_loop(0, 60 if float64 else 30, _halve, state)[0]
    p = _above(low, x, rate)
    return p / _at_least(ops.sum(p, axis=-1, keepdims=True), 0.5)


def _above(threshold, x, rate):
    return ops.exp(ops.log1p(_at_least(x - threshold, -1.0)) / rate)


def _halve(step, state):
    low, high, x, rate = state
    middle = (low + high) / 2
    total = ops.sum(_above(middle, x, rate), axis=-1, keepdims=True)
    low = ops.where(total >= 1, middle, low)
    high = ops.where(total >= 1, high, middle)
    return low, high, x, rate


def _value(*arguments):
    p, _, _ = arguments[-3:]
    # On torch, the constant itself must not become part of the graph.
    return ops.copy(p)


def _gradients(d_p, *arguments):
    *inputs, p, highest, alpha = arguments
    # From the inputs, so that the gradients can be differentiated again.
    p = backend.with_gradient(
        _value, _gradients, tuple(inputs), (p, highest, alpha)
    )
    shifted = inputs[0] - highest
    if len(inputs) == 2:
        alpha = inputs[1]
    inside = ops.logical_not(p <= 0)  # a NaN stays one
    zeros = ops.zeros_like(p)
    s = ops.where(inside, ops.where(inside, p, zeros + 1) ** (2 - alpha), zeros)
    # At least 1, unless the row is empty.
    total = _at_least(ops.sum(s, axis=-1, keepdims=True), 0.5)
    center = ops.sum(s * d_p, axis=-1, keepdims=True) / total
    d_x = s * (d_p - center)
    if len(inputs) == 1:
        return (d_x,)
    entropy = -p * ops.log(ops.where(inside, p, zeros + 1))
    x = ops.where(inside, shifted, zeros)
    slope = ops.sum(entropy + s * x, axis=-1, keepdims=True) / total
    d_alpha = d_p * (entropy + s * (x - slope)) / (alpha - 1)
    return d_x, ops.sum(d_alpha, axis=-1, keepdims=True)
