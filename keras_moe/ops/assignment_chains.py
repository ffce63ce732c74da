"""The step of `balanced_assignment`: moving tokens along a chain of experts.

In a chain, each expert passes one token on to the next. Scores are `(G, S, E)`
for `G` groups of `S` tokens; experts are `(G, S)` int32, `E` for a token
without an expert.
"""

from keras import ops

LOWEST = -1e30  # not -inf: a difference of two would be NaN
TIE = 1e-5  # scores this close to each other count as equal


def holds(experts, num_experts):
    """Whether expert e has token s, `(G, S, E)` bool."""
    index = ops.arange(num_experts, dtype="int32")
    return ops.equal(ops.expand_dims(experts, -1), index)


def move_along_best_chain(scores, experts, sources, sinks, least_gain):
    """Moves one token from expert to expert along the best chain.

    Args:
        scores: `(G, S, E)`.
        experts: `(G, S)` int32.
        sources: `(G, E)` bool. The experts that a chain may begin with.
        sinks: `(G, E)` bool. The experts that a chain may end with, disjoint
            from the sources.
        least_gain: `(G, 1)`. A chain that does not gain more is not used.

    Returns:
        `(experts, moved)`, `moved` `(G, 1)` bool.
    """
    held = holds(experts, scores.shape[-1])  # (G, S, E)
    zeros = ops.zeros_like(scores)
    own = ops.sum(ops.where(held, scores, zeros), axis=-1, keepdims=True)
    gains = scores - own  # (G, S, E)
    moves = best_moves(gains, experts)
    following, gain = best_chains(moves, sinks)
    gain = ops.where(sources, gain, ops.full_like(gain, LOWEST))
    start = ops.cast(ops.argmax(gain, axis=1), "int32")  # (G,)
    following, on_chain = follow(following, start, moves, sinks)
    moved = ops.max(gain, axis=1, keepdims=True) > least_gain
    on_chain = ops.logical_and(on_chain, moved)
    return _move(gains, held, experts, following, on_chain), moved


def best_moves(gains, experts):
    """The largest gain of a token that moves from e to f, `(G, E, E)`."""
    groups, _, num_experts = ops.shape(gains)
    offset = ops.cumsum(ops.ones_like(experts[:, :1]), axis=0) - 1  # (G, 1)
    none = groups * num_experts
    segments = ops.where(
        experts < num_experts, offset * num_experts + experts, none
    )
    moves = ops.segment_max(
        ops.reshape(gains, (-1, num_experts)),
        ops.reshape(segments, (-1,)),
        num_segments=none + 1,
    )
    moves = ops.reshape(moves[:-1], (groups, num_experts, num_experts))
    return ops.maximum(moves, LOWEST)  # experts without tokens


def best_chains(moves, sinks):
    """The best chain from each expert to a sink (Bellman and Ford).

    Args:
        moves: `(G, E, E)`. Gain of a move from e to f.
        sinks: `(G, E)` bool.

    Returns:
        `(following, gain)`: the next expert of the chain, `(G, E)` int32, where
        the last expert follows itself, and the gain, `(G, E)`.
    """
    num_experts = moves.shape[-1]
    itself = ops.arange(num_experts, dtype="int32")

    def improves(following, gain, changed, rounds):
        return ops.logical_and(changed, rounds < num_experts)

    def improve(following, gain, changed, rounds):
        through = moves + ops.expand_dims(gain, 1)
        best = ops.max(through, axis=-1)
        better = best > gain + 0.1 * TIE
        expert = ops.cast(ops.argmax(through, axis=-1), "int32")
        following = ops.where(better, expert, following)
        gain = ops.where(better, best, gain)
        return following, gain, ops.any(better), rounds + 1

    gain = ops.zeros_like(moves[:, 0])  # (G, E)
    gain = ops.where(sinks, gain, ops.full_like(gain, LOWEST))
    following = ops.zeros_like(gain, dtype="int32") + itself
    changed = ops.ones((), dtype="bool")
    rounds = ops.zeros((), dtype="int32")
    state = (following, gain, changed, rounds)
    return ops.while_loop(improves, improve, state)[:2]


def follow(following, start, moves, sinks):
    """The experts of the chain from `start`, without the last one.

    If rounding errors made a circle of the chain, it is replaced by the move
    from its start to the best sink.

    Args:
        following: `(G, E)` int32.
        start: `(G,)` int32.
        moves: `(G, E, E)`.
        sinks: `(G, E)` bool.

    Returns:
        `(following, on_chain)`: `(G, E)` int32 and bool.
    """
    num_experts = moves.shape[-1]

    def after(expert):
        index = ops.expand_dims(expert, 1)
        return ops.take_along_axis(following, index, axis=1)[:, 0]

    def underway(on_chain, expert, rounds):
        going = ops.any(ops.not_equal(after(expert), expert))
        return ops.logical_and(going, rounds < num_experts)

    def go_on(on_chain, expert, rounds):
        going = ops.not_equal(after(expert), expert)
        here = ops.logical_and(
            holds(expert, num_experts), ops.expand_dims(going, 1)
        )
        return ops.logical_or(on_chain, here), after(expert), rounds + 1

    on_chain = ops.zeros_like(sinks)
    rounds = ops.zeros((), dtype="int32")
    on_chain, last, _ = ops.while_loop(
        underway, go_on, (on_chain, start, rounds)
    )
    circle = ops.expand_dims(ops.not_equal(after(last), last), 1)  # (G, 1)
    at_start = holds(start, num_experts)  # (G, E)
    first = ops.expand_dims(ops.expand_dims(start, 1), 1)
    direct = ops.take_along_axis(moves, first, axis=1)[:, 0]  # (G, E)
    direct = ops.where(sinks, direct, ops.full_like(direct, 2 * LOWEST))
    direct = ops.cast(ops.argmax(direct, axis=1, keepdims=True), "int32")
    return (
        ops.where(ops.logical_and(circle, at_start), direct, following),
        ops.where(circle, at_start, on_chain),
    )


def _move(gains, held, experts, following, on_chain):
    """Moves the best token of each expert on the chain to the next expert."""
    to = ops.broadcast_to(ops.expand_dims(following, 1), ops.shape(gains))
    gain = ops.take_along_axis(gains, to, axis=-1)  # token s, from expert e
    gain = ops.where(held, gain, ops.full_like(gain, 2 * LOWEST))
    best = ops.cast(ops.argmax(gain, axis=1, keepdims=True), "int32")
    position = ops.cumsum(ops.ones_like(experts), axis=1) - 1
    chosen = ops.equal(ops.expand_dims(position, -1), best)  # (G, S, E)
    chosen = ops.logical_and(chosen, held)
    chosen = ops.logical_and(chosen, ops.expand_dims(on_chain, 1))
    target = ops.sum(ops.where(chosen, to, ops.zeros_like(to)), axis=-1)
    target = ops.cast(target, "int32")
    return ops.where(ops.any(chosen, axis=-1), target, experts)
