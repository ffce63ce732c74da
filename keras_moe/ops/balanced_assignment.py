"""Balanced assignment of tokens to experts with the largest total score.

Each expert has a price, and each token takes the expert with the largest
`score - price`. For any prices, this is the best assignment with these loads.
Steps of Sinkhorn's algorithm find prices with nearly equal loads. Then each
step moves one token along the cheapest chain of moves from expert to expert,
which keeps the assignment the best with its loads (successive shortest paths),
until the loads are equal.
"""

from keras import ops

from keras_moe import backend
from keras_moe.ops.assignment_chains import LOWEST
from keras_moe.ops.assignment_chains import TIE
from keras_moe.ops.assignment_chains import holds
from keras_moe.ops.assignment_chains import move_along_best_chain

_PRICE_STEPS = 40


def balanced_assignment(scores, mask=None):
    """Assigns equally many tokens to each expert, with the best total score.

    ```
    maximize    sum over t of scores[t, expert[t]]
    subject to  floor(T / E) <= tokens of each expert <= ceil(T / E)
    ```

    The loads are exact. The total is the largest possible up to about 1e-5
    standard deviations of the scores per token: scores closer than this count
    as equal, and equal tokens are spread by their position. A score that is
    not finite counts as the smallest finite one.

    Unbalanced scores take longer: one step of `T * E` operations for each token
    that the prices leave on a full expert. The steps are a `while` loop. There
    is no gradient.

    Args:
        scores: `(T, E)`, or `(G, T, E)` for `G` separate groups.
        mask: `(T,)` or `(G, T)` bool, or `None`. `False` tokens are not
            assigned, and `T` is the number of the others. Defaults to `None`.

    Returns:
        `(T,)` or `(G, T)` int32. The expert of each token, `E` for masked ones.

    Example:

    >>> experts = keras_moe.ops.balanced_assignment(
    ...     [[3.0, 0.0], [5.0, 0.0], [9.0, 8.0], [9.0, 1.0]]
    ... )
    >>> keras.ops.convert_to_numpy(experts).tolist()
    [1, 0, 1, 0]

    Reference:

    - [Lewis et al., 2021](https://arxiv.org/abs/2103.16716), section 3.1 (the
      problem)
    - [Ahuja et al., 1993](https://dl.acm.org/doi/10.5555/137406), section 9.7
      (successive shortest paths)
    """
    scores = ops.stop_gradient(ops.convert_to_tensor(scores))
    grouped = len(scores.shape) == 3
    if not grouped:
        scores = ops.expand_dims(scores, 0)
        mask = None if mask is None else ops.expand_dims(mask, 0)
    scores = ops.cast(scores, "float32")
    like_tokens = ops.zeros_like(scores[..., 0], dtype="int32")  # (G, S)
    # A while loop needs values, which a meta tensor does not have. An argmax
    # needs at least one token.
    if backend.has_no_values(scores) or scores.shape[1] == 0:
        return like_tokens if grouped else like_tokens[0]
    keep = ops.equal(like_tokens, 0)
    if mask is not None:
        keep = ops.cast(mask, "bool")
    scores = _standardize(scores, keep)
    experts = _best(scores - _prices(scores, keep), keep)
    count = ops.sum(ops.cast(keep, "int32"), axis=1, keepdims=True)  # (G, 1)
    experts = _balance(scores, experts, count)
    return experts if grouped else experts[0]


def _standardize(scores, keep):
    """Finite scores of deviation 1 and row maximum 0, without exact ties."""
    num_experts = scores.shape[-1]
    finite = ops.logical_and(ops.isfinite(scores), ops.expand_dims(keep, -1))
    largest = ops.full_like(scores, -LOWEST)
    lowest = ops.min(ops.where(finite, scores, largest), (1, 2), keepdims=True)
    scores = ops.where(finite, scores, lowest)
    scores = scores - ops.max(scores, axis=-1, keepdims=True)
    # In two steps, so that no square overflows.
    scale = ops.max(ops.abs(scores), axis=(1, 2), keepdims=True)
    scores = scores / ops.where(scale > 0, scale, ops.ones_like(scale))
    row_mean = ops.mean(scores, axis=-1, keepdims=True)
    kept = ops.cast(ops.expand_dims(keep, -1), scores.dtype)
    variance = ops.sum(kept * ops.square(scores - row_mean), (1, 2), True)
    variance = variance / (ops.maximum(ops.sum(kept, (1, 2), True), 1.0))
    variance = variance / num_experts
    positive = variance > 0
    scores = scores / ops.sqrt(ops.where(positive, variance, 1.0))
    ones = ops.ones_like(scores[..., 0], dtype="int32")
    position = ops.expand_dims(ops.cumsum(ones, axis=1) - 1, -1)  # (G, S, 1)
    expert = ops.arange(num_experts, dtype="int32")
    turn = ops.mod(expert - position, num_experts)
    return scores - TIE / num_experts * ops.cast(turn, scores.dtype)


def _prices(scores, keep):
    """Sinkhorn's algorithm with falling temperature, `(G, 1, E)`."""
    kept = ops.cast(ops.expand_dims(keep, -1), scores.dtype)
    count = ops.maximum(ops.sum(kept, axis=1, keepdims=True), 1.0)
    num_experts = scores.shape[-1]

    def step(i, prices):
        temperature = ops.power(2.0, 1.0 - 0.3 * ops.cast(i, scores.dtype))
        shares = ops.softmax((scores - prices) / temperature, axis=-1)
        share = ops.sum(kept * shares, axis=1, keepdims=True) / count
        return prices + temperature * ops.log(num_experts * share + 1e-6)

    start = ops.zeros_like(ops.sum(scores, axis=1, keepdims=True))
    if num_experts == 1:
        return start  # Keras warns of a softmax of one number
    return ops.fori_loop(0, _PRICE_STEPS, step, start)


def _best(scores, keep):
    best = ops.cast(ops.argmax(scores, axis=-1), "int32")
    return ops.where(keep, best, ops.full_like(best, scores.shape[-1]))


def _balance(scores, experts, count):
    """Moves tokens between experts until all loads are equal."""
    num_experts = scores.shape[-1]
    floor, rest = count // num_experts, ops.mod(count, num_experts)
    ceil = floor + ops.cast(rest > 0, "int32")  # (G, 1)
    # One step per token is enough; the rest allows for rounding errors.
    most_steps = 2 * ops.shape(experts)[1] + num_experts

    def unfinished(experts, active, steps):
        return ops.logical_and(ops.any(active), steps < most_steps)

    def step(experts, active, steps):
        loads = ops.sum(ops.cast(holds(experts, num_experts), "int32"), axis=1)
        too_full = ops.any(loads > ceil, axis=1, keepdims=True)
        too_empty = ops.any(loads < floor, axis=1, keepdims=True)
        must = ops.logical_or(too_full, too_empty)
        # First empty the experts above the bounds, then fill those below. Last,
        # choose the best experts to have one token more.
        sources = ops.where(too_full, loads > ceil, loads > floor)
        filling = ops.logical_and(too_empty, ops.logical_not(too_full))
        sinks = ops.where(filling, loads < floor, loads < ceil)
        experts, active = move_along_best_chain(
            scores, experts, sources, sinks, ops.where(must, LOWEST / 2, TIE)
        )
        return experts, active, steps + 1

    active = ops.ones_like(count, dtype="bool")
    steps = ops.zeros((), dtype="int32")
    return ops.while_loop(unfinished, step, (experts, active, steps))[0]
