import math
from fractions import Fraction

from keras import ops


def expert_capacity(num_tokens, num_experts, top_k, capacity_factor):
    """Number of rows each expert takes at most.

    ```
    ceil(num_tokens * top_k * capacity_factor / num_experts)
    ```

    `capacity_factor=1` is the share of a perfectly balanced routing; `top_k`
    is part of the formula (GShard and Switch write it for `top_k` 2 and 1).
    It is computed in whole numbers, with the fraction that the factor stands
    for: in binary `100 * 1.1 / 10` is a little over 11 and would give 12.

    Args:
        num_tokens: int, or an integer tensor where it is not known statically.
            Masked tokens count: it is the size of the batch, padding included.
        num_experts: int.
        top_k: int. Experts per token.
        capacity_factor: float, or `None` or infinity for no limit.

    Returns:
        int, an int32 tensor if `num_tokens` is one, or `None` for no limit.

    Example:

    >>> keras_moe.ops.expert_capacity(1000, 16, top_k=2, capacity_factor=1.25)
    157

    Reference:

    - [Lepikhin et al., 2020](https://arxiv.org/abs/2006.16668), section 2.2
    - [Fedus et al., 2021](https://arxiv.org/abs/2101.03961), equation 3
    """
    if capacity_factor is None or math.isinf(capacity_factor):
        return None
    factor = Fraction(capacity_factor).limit_denominator(1_000_000)
    share = factor * top_k / num_experts
    if not ops.is_tensor(num_tokens):  # an int, or a symbolic size of JAX
        return -(-num_tokens * share.numerator // share.denominator)
    rows = ops.cast(num_tokens, "int64") * share.numerator
    return ops.cast(-(-rows // share.denominator), "int32")
