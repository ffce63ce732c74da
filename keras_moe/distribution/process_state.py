"""What processes compare, and how the methods of a model are replaced."""

import functools

import keras

from keras_moe.backend.torch import collectives
from keras_moe.stacked import expert_shards


def replace_methods(model, owner, *names):
    """Lets `owner.name(original, ...)` answer calls of `model.name(...)`.

    The model stays of its class, so that its files name it.
    """
    for name in names:
        replacement, original = getattr(owner, name), getattr(model, name)
        setattr(model, name, functools.partial(replacement, original))


def check_same(what, value):
    """Raises in all processes unless all have the same value."""
    if collectives.num_processes() == 1:
        return
    values = collectives.gather_objects(value)
    if any(other != values[0] for other in values):
        number = next(n for n, v in enumerate(values) if v != values[0])
        raise ValueError(
            f"All processes must have the same {what}. Received: "
            f"{_difference(values[0], values[number])} "
            f"in the processes 0 and {number}"
        )


def _difference(first, second):
    if isinstance(first, list) and isinstance(second, list):
        if len(first) != len(second):
            return f"{len(first)} and {len(second)} entries"
        if first != second:
            pairs = zip(first, second, strict=True)
            first, second = next(pair for pair in pairs if pair[0] != pair[1])
    return f"{first} and {second}"


def check_divided(model):
    """Raises unless the experts of all layers are divided."""
    for layer in _with_sublayers(model):
        if getattr(layer, "routed", False) and layer.variables:
            marks = [expert_shards.mark_of(v) for v in layer.variables]
            if not any(marks):
                raise ValueError(
                    "These experts cannot be divided among processes, or were "
                    "not built under `scope()`: take a bank of "
                    "`keras_moe.experts` with stacked weights, such as "
                    "`GLUExperts`, or `num_expert_shards=1`. Received: "
                    f"experts={layer!r}"
                )


def _with_sublayers(layer):
    """The layer and all layers that its attributes hold, each once."""
    found, seen, left = [], set(), [layer]
    while left:
        value = left.pop()
        if id(value) in seen:
            continue
        seen.add(id(value))
        if isinstance(value, keras.layers.Layer):
            found.append(value)
            left += vars(value).values()
        elif isinstance(value, dict):
            left += value.values()
        elif isinstance(value, (list, tuple)):
            left += value
    return found


def mark_state(optimizer, model):
    """Marks the variables of an optimizer that belong to divided banks."""
    references = {
        variable.path.replace("/", "_"): variable
        for variable in model.trainable_variables
    }
    for variable in optimizer.variables:
        name = variable.path.rpartition("/")[2]
        fitting = [path for path in references if name.startswith(f"{path}_")]
        if not fitting:
            continue
        reference = references[max(fitting, key=len)]
        mark = expert_shards.mark_of(reference)
        if mark is not None and variable.shape == reference.shape:
            expert_shards.mark(variable, mark.shard)


def signature(model):
    """What must be equal in all processes."""
    return [
        (
            tuple(variable.shape),
            variable.dtype,
            variable.trainable,
            expert_shards.mark_of(variable) is not None,
        )
        for variable in model.variables
    ]


def is_seed(variable):
    return variable.path.endswith("seed_generator_state")
