"""Which variables hold experts, and banks that are divided among processes.

While `dividing(shard)` is active, a bank of experts that is built makes
variables of its own experts alone, and marks each with a `BankShard`. Whoever
trains or saves such variables reads the mark.
"""

import contextlib

from keras_moe.checks import nearest_divisors

_active = None
_new_bank = (None, None)  # path and hidden axis of what is being made


def check_divides(num_experts, num_expert_shards):
    """Raises unless each shard gets as many experts as any other."""
    if num_experts % num_expert_shards:
        raise ValueError(
            "`num_expert_shards` must divide the number of experts; the "
            f"nearest for {num_experts} experts: "
            f"{nearest_divisors(num_experts, num_expert_shards)}. Received: "
            f"num_expert_shards={num_expert_shards}, num_experts={num_experts}"
        )


class ExpertShard:
    """Which share of all experts this process holds.

    Args:
        index: int. Number of this share.
        count: int. Number of shares, each with the same number of experts.
        engine: What sends rows to the processes that hold their experts.
    """

    def __init__(self, index, count, engine=None):
        self.index = index
        self.count = count
        self.engine = engine
        # Values of whole banks and of their optimizer state, by the id of the
        # variable; there while a file is written.
        self.full_values = None

    def bounds(self, num_experts):
        """The first own expert, and the one after the last."""
        check_divides(num_experts, self.count)
        size = num_experts // self.count
        return self.index * size, (self.index + 1) * size


class BankShard:
    """The mark of a variable, of which this process holds a share.

    Attributes:
        shard: The `ExpertShard`.
        is_distributed: bool. Whether the model's training takes care of it.
    """

    def __init__(self, shard):
        self.shard = shard
        self.is_distributed = False


@contextlib.contextmanager
def making_bank(path, hidden_axis=None):
    """The variable of this path, made inside, holds routed experts.

    Args:
        path: str, or `None` if it does not.
        hidden_axis: Its axis of the experts' hidden width, or `None`.
    """
    global _new_bank
    before, _new_bank = _new_bank, (path, hidden_axis)
    try:
        yield
    finally:
        _new_bank = before


def note_bank(variable, hidden_axis=None):
    """Notes that a variable holds routed experts, `(E, ...)`."""
    variable.holds_routed_experts = True
    variable.hidden_axis = hidden_axis


def note_shared(variable):
    """Notes that all experts of a bank use a variable as a whole."""
    variable.is_shared_by_experts = True


def is_shared(variable):
    return getattr(variable, "is_shared_by_experts", False)


def is_bank(variable):
    """Whether a variable holds routed experts; asked as it is made (JAX).

    A path alone does not say it: another model may use it for other weights.
    """
    return variable.path == _new_bank[0] or getattr(
        variable, "holds_routed_experts", False
    )


def hidden_axis(variable):
    """The axis of the experts' hidden width, `None` if there is none."""
    if variable.path == _new_bank[0]:
        return _new_bank[1]
    return getattr(variable, "hidden_axis", None)


@contextlib.contextmanager
def dividing(shard):
    """Banks built inside hold only the experts of the `ExpertShard`."""
    global _active
    before, _active = _active, shard
    try:
        yield
    finally:
        _active = before


def active():
    """The `ExpertShard` of banks that are built now, or `None`."""
    return _active


def mark(variable, shard):
    variable.expert_shard = BankShard(shard)


def mark_of(variable):
    """The `BankShard` of a variable, `None` of one that is whole."""
    return getattr(variable, "expert_shard", None)


def to_file(variable, value):
    """What a file holds for a variable: the experts of all processes.

    Args:
        variable: The variable.
        value: Its value, returned if the variable is whole.
    """
    of_bank = mark_of(variable)
    if of_bank is None or of_bank.shard.count == 1:
        return value
    values = of_bank.shard.full_values
    if values is None:
        raise RuntimeError(
            "The experts of this model are divided among processes. Save it "
            "with `model.save` or `model.save_weights` after "
            "`model = strategy.distribute(model)`, and on all processes."
        )
    return values[id(variable)]


def from_file(variable, value):
    """The own part of what a file holds for a variable."""
    of_bank = mark_of(variable)
    if of_bank is None:
        return value
    size = variable.shape[0]
    if value.shape[0] != size * of_bank.shard.count:
        return value  # of other experts: the caller will say so
    start = size * of_bank.shard.index
    return value[start : start + size]
