"""The largest number of rows that an expert takes."""

import math
from fractions import Fraction

from keras import ops

from keras_moe.ops.sizes import as_number
from keras_moe.ops.sizes import larger
from keras_moe.ops.sizes import smaller


def expert_capacity(
    num_tokens, num_experts, top_k, capacity_factor, rule="ceil", multiple_of=1
):
    """The largest number of rows that each expert takes.

    With `N` tokens, `E` experts, `K = top_k` and the factor `c`:

    | rule | capacity | as in |
    |---|---|---|
    | `"ceil"` | `ceil(N K c / E)` | GShard, Switch, Megatron |
    | `"floor"` | `floor(N K c / E)`, may be 0 | MegaBlocks |
    | `"v_moe"` | `ceil(N K c / E)`, up to a multiple of 4 | V-MoE |
    | `"deepspeed"` | `max(ceil(N K c / E), 4)` | DeepSpeed |
    | `"mesh"` | `max(min(N, floor(N c / E)), 4)` | Mesh TF, ST-MoE |
    | `"flaxformer"` | `max(round(N c / E), 4)` | flaxformer |
    | `"lingvo"` | `floor(N c / E)`, from 1 up to a multiple of 4 | lingvo |
    | `"tutel"` | `K floor(c ceil(N / E))` | Tutel |
    | `"maxtext"` | `floor(max(c ceil(N K / E), c))` | MaxText |
    | `"fastmoe"` | `floor(ceil(c N) K / E)` | FastMoE |

    Three rules leave `K` out. `round` rounds halves to the even number.

    `capacity_factor=1` is the share of a perfectly balanced routing where the
    rule includes `K`. The factor is taken as a fraction and everything is
    computed in whole numbers: in floats, `100 * 1.1 / 10` is a little over 11
    and `"ceil"` would give 12.

    Args:
        num_tokens: int, or an integer tensor if it is not known statically.
            Masked tokens count.
        num_experts: int.
        top_k: int. Experts per token.
        capacity_factor: float. `None` or infinity means no limit.
        rule: str. One of the rules above. Defaults to `"ceil"`.
        multiple_of: int. The result is rounded up to a multiple of it. Defaults
            to `1`.

    Returns:
        int, an int32 tensor if `num_tokens` is one, or `None` for no limit.

    Raises:
        ValueError: If `rule` is not one of the rules.

    Example:

    >>> keras_moe.ops.expert_capacity(1000, 16, top_k=2, capacity_factor=1.25)
    157

    Reference:

    - [Lepikhin et al., 2020](https://arxiv.org/abs/2006.16668), section 2.2
    - [Fedus et al., 2021](https://arxiv.org/abs/2101.03961), equation 3
    """
    if rule not in CAPACITY_RULES:
        raise ValueError(
            f"`rule` must be one of {CAPACITY_RULES}. Received: rule={rule!r}"
        )
    if capacity_factor is None or math.isinf(capacity_factor):
        return None
    factor = _as_fraction(capacity_factor)
    is_tensor = ops.is_tensor(num_tokens)
    if is_tensor:
        num_tokens = ops.cast(num_tokens, "int64")
    capacity = _RULES[rule](num_tokens, num_experts, top_k, factor)
    capacity = _round_up(capacity, multiple_of)
    return ops.cast(capacity, "int32") if is_tensor else capacity


def _as_fraction(factor):
    """The fraction that the float stands for: 11/10 for 1.1."""
    exact = Fraction(float(factor))
    fraction = exact.limit_denominator(10**6)
    if abs(fraction - exact) > exact / 10**7:  # a very small factor
        fraction = exact.limit_denominator(int(min(10**6 / exact, 10**15)))
        # Not 0, and a product with a number of tokens fits into int64.
        fraction = max(fraction, Fraction(1, 10**15))
    return fraction


def _floor(n, fraction):
    return n * fraction.numerator // fraction.denominator


def _ceil(n, fraction):
    return -(-n * fraction.numerator // fraction.denominator)


def _round(n, fraction):
    """Rounds to the nearest int, halves to the even one."""
    twice = 2 * n * fraction.numerator + fraction.denominator
    up = twice // (2 * fraction.denominator)
    is_half = _equal(twice, up * 2 * fraction.denominator)
    return up - is_half * (up % 2)


def _round_up(n, multiple):
    return n if multiple == 1 else -(-n // multiple) * multiple


def _equal(a, b):
    a, b = as_number(a), as_number(b)
    if ops.is_tensor(a):
        return ops.cast(a == b, a.dtype)
    return int(a == b)


_RULES = {
    "ceil": lambda n, e, k, c: _ceil(n, c * k / e),
    "floor": lambda n, e, k, c: _floor(n, c * k / e),
    "v_moe": lambda n, e, k, c: _round_up(_ceil(n, c * k / e), 4),
    "deepspeed": lambda n, e, k, c: larger(_ceil(n, c * k / e), 4),
    "mesh": lambda n, e, k, c: larger(smaller(_floor(n, c / e), n), 4),
    "flaxformer": lambda n, e, k, c: larger(_round(n, c / e), 4),
    "lingvo": lambda n, e, k, c: _round_up(larger(_floor(n, c / e), 1), 4),
    "tutel": lambda n, e, k, c: k * _floor(-(-n // e), c),
    "maxtext": lambda n, e, k, c: larger(
        _floor(-(-n * k // e), c), math.floor(c)
    ),
    "fastmoe": lambda n, e, k, c: _ceil(n, c) * k // e,
}
CAPACITY_RULES = tuple(_RULES)
