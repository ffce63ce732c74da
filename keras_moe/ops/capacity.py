import math

from keras import ops


def expert_capacity(num_tokens, num_experts, top_k, capacity_factor):
    """Number of rows each expert takes at most.

    ```
    ceil(num_tokens * top_k * capacity_factor / num_experts)
    ```

    `capacity_factor=1` is the share of a perfectly balanced routing; `top_k`
    is part of the formula (GShard and Switch write it for `top_k` 2 and 1).
    The quotient is reduced by 1e-6 before it is rounded up, since binary
    fractions would otherwise add a row (`100 * 1.1 / 10` is a little over 11).

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
    share = top_k * capacity_factor / num_experts
    if not ops.is_tensor(num_tokens):
        return math.ceil(num_tokens * share - 1e-6)
    # Only TensorFlow has sizes that are tensors, so float64 is at hand.
    rows = ops.cast(num_tokens, "float64") * share
    return ops.cast(ops.ceil(rows - 1e-6), "int32")
