"""Sending tokens to their experts, as a layer's capacity and router say."""

from keras import ops

from keras_moe.ops.dispatch import dispatch


def send(layer, tokens, routing, mask, training, num_sequences):
    """Dispatches the tokens `(T, ...)` of a layer.

    Returns:
        `(rows, group_sizes, plan, max_group_size)`: what `dispatch` returns,
        and an upper bound of the group sizes, static where sizes are.
    """
    num_tokens, top_k = ops.shape(routing.expert_indices)
    capacity = layer.capacity
    group_size = capacity.group_size(num_tokens, num_sequences)
    size = capacity.of(group_size, layer.num_experts, top_k, training)
    max_rows = None
    if hasattr(layer.router, "max_rows"):
        max_rows = layer.router.max_rows(num_tokens, num_sequences)
    draws = training and capacity.drop_policy == "random"
    rows, group_sizes, plan = dispatch(
        tokens,
        routing,
        layer.num_experts,
        mask,
        size,
        capacity.drop_policy,
        None if capacity.per == "batch" else group_size,
        max_rows,
        seed=layer.seed_generator if draws else None,
    )
    max_group_size = num_tokens * top_k
    if getattr(layer.router, "distinct_choices", False):
        max_group_size = num_tokens
    if size is not None:
        known = isinstance(size, int) and isinstance(max_group_size, int)
        if known and group_size > 0:
            groups = -(-num_tokens // group_size)
            max_group_size = min(size * groups, max_group_size)
    return rows, group_sizes, plan, max_group_size
