"""The rules that move the expert bias, which balances without a loss.

- `"sign"`: a step of fixed size against the load. Algorithm 1 of Wang et al.,
  2024 (https://arxiv.org/abs/2408.15664).
- `"quantile"`: to the quantile of the scores at which each expert would have
  had its equal share of the tokens. One step of coordinate descent on the dual
  of the balanced assignment: Su, 2026 (https://kexue.fm/archives/11619), and
  Megatron-LM (https://github.com/NVIDIA/Megatron-LM/pull/5349).
"""

from keras import ops

from keras_moe import backend
from keras_moe.checks import check_at_least
from keras_moe.checks import check_one_of
from keras_moe.ops.order_statistics import kth_largest
from keras_moe.ops.scores import rankable
from keras_moe.ops.selection import take_chosen
from keras_moe.ops.selection import top_k_indices

BIAS_KINDS = (False, True, "scores", "logits")
# The rules, and the default rate of each.
BIAS_UPDATES = {"sign": 1e-3, "quantile": 1.0}


def as_bias_update_rate(rate, rule):
    """The rate, for `None` the default of the rule."""
    check_one_of("bias_update", rule, tuple(BIAS_UPDATES))
    if rate is None:
        return BIAS_UPDATES[rule]
    check_at_least("bias_update_rate", rate, 0)
    if rule == "quantile" and rate > 1:
        raise ValueError(
            "`bias_update_rate` must be at most 1 with "
            "`bias_update='quantile'`: it is the share of the new bias. "
            f"Received: bias_update_rate={rate}"
        )
    return rate


def sign_change(counts):
    """1 for an expert with less than the mean load, -1 with more, `(E,)`."""
    return ops.sign(ops.mean(counts) - counts)


def equalizing_bias(scores, bias, top_k, mask=None):
    """The bias with which each expert would get its equal share.

    ```
    threshold[t] = the (top_k + 1)-th largest of scores[t] + bias
    result[e]    = -(the (T * top_k // E + 1)-th largest over the tokens of
                     scores[:, e] - threshold)
    ```

    Thus `T * top_k // E` tokens score expert `e` above their threshold, which
    is the best score among the experts they did not choose.

    Args:
        scores: `(T, E)`.
        bias: `(E,)`. The bias that the experts were chosen with.
        top_k: int, below `E`.
        mask: `(T,)` bool, or `None`. `False` tokens do not count.

    Where several devices train together, the tokens of all of them count.

    Returns:
        `(E,)`; `bias` itself if there is no token.
    """
    scores = rankable(scores)
    ranked = scores + bias
    best = top_k_indices(ranked, top_k + 1)
    margins = scores - take_chosen(ranked, best)[:, top_k:]  # (T, E)
    if mask is None:
        mask = ops.ones_like(margins[:, 0], dtype="bool")
    margins = ops.where(ops.expand_dims(mask, -1), margins, float("-inf"))
    # One row more, which is there if no token is.
    margins = ops.pad(margins, [[1, 0], [0, 0]], constant_values=float("-inf"))
    count = backend.all_reduce_sum(ops.sum(ops.cast(mask, "int32")))
    larger = count * top_k // scores.shape[-1]
    if backend.world_size() > 1:
        result = -kth_largest(margins, larger + 1)
    else:
        last = ops.sum(ops.ones_like(mask, dtype="int32"))
        result = -ops.take(ops.sort(margins, axis=0), last - larger, axis=0)
    return ops.where(count > 0, result, bias)
