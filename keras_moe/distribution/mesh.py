"""Dispatching on a mesh of devices that one program drives (JAX).

Keras divides the batch and the variables over the mesh, and the compiler
divides what it knows. Sorting, sending and grouped products it would do for the
whole batch on every device, so each device does them for its own tokens.
"""

import types

from keras import ops

from keras_moe import backend
from keras_moe.dispatch import Capacity
from keras_moe.dispatch import Dispatcher
from keras_moe.distribution.device_bank import DeviceBank
from keras_moe.distribution.device_bank import WholeBatchNeeded
from keras_moe.distribution.device_bank import check_can_divide
from keras_moe.distribution.mesh_engine import DEFAULT_SLACK
from keras_moe.distribution.mesh_engine import MeshEngine
from keras_moe.ops.routing import Routing
from keras_moe.ops.sizes import is_symbolic_size


def token_axes(distribution):
    """The mesh axes that divide the batch, as a tuple."""
    if isinstance(distribution, MeshEngine):
        return distribution.batch_axes
    return (distribution.batch_dim_name,)


def num_devices(distribution, axes):
    shape = dict(
        zip(
            distribution.device_mesh.axis_names,
            distribution.device_mesh.shape,
            strict=True,
        )
    )
    number = 1
    for axis in axes:
        number *= shape[axis]
    return number


class Exchange(Dispatcher):
    """Sends rows to the devices that own their experts.

    Args:
        axis: Name of the mesh axis whose devices own the experts, or `None`
            if all own a part of each.
        slack, ragged: As for `exchange_rows`.
        weights_on, capacity: As for `Dispatcher`.
    """

    moves_rows = True

    def __init__(self, axis, slack, ragged, **kwargs):
        super().__init__(**kwargs)
        self.axis = axis
        self.slack = slack
        self.ragged = ragged

    def exchange(
        self, rows, group_sizes, experts, training=None, max_group_size=None
    ):
        if self.axis is None:  # this device has a part of every expert
            bank = experts.with_values(experts.values)
            with experts.drawing(experts.next_seeds(), 0):
                outputs = bank(rows, group_sizes, training=training)
            return experts.sum_parts(outputs)

        def compute(rows, expert, values, first, seeds):
            bank = experts.with_values(values)
            exists = ops.cast(expert < bank.num_experts, "float32")
            routing = Routing(
                logits=None,
                probs=None,
                expert_indices=ops.expand_dims(expert, -1),
                expert_weights=ops.expand_dims(exists, -1),
            )
            with experts.drawing(seeds, first):
                outputs = Dispatcher()(rows, routing, bank, training=training)
            return experts.sum_parts(outputs[0])

        return backend.exchange_rows(
            rows,
            group_sizes,
            compute,
            experts.values,
            experts.next_seeds(),
            self.axis,
            self.slack,
            self.ragged,
        )


def dispatch(
    distribution,
    dispatcher,
    tokens,
    routing,
    experts,
    mask=None,
    training=None,
    router=None,
    num_sequences=1,
):
    """What `dispatcher` returns, computed by the devices of a mesh.

    Args:
        distribution: The active `keras.distribution.Distribution`.
        dispatcher: A `Dispatcher` that does not move rows itself.
        tokens, routing, experts, mask, training, router, num_sequences: As for
            the dispatcher.
    """
    num_tokens = tokens.shape[0]

    def everything():
        return dispatcher(
            tokens, routing, experts, mask, training, router, num_sequences
        )

    if _is_for_one_device(distribution, num_tokens):
        return everything()
    if not experts.built:
        experts.build((None, *tokens.shape[1:]))
    bank = DeviceBank(experts, distribution)
    indices, weights = routing.expert_indices, routing.expert_weights
    inner = {"weights_on": dispatcher.weights_on}
    capacity = dispatcher.capacity
    if capacity.limits(training):
        # Over the whole batch, as on one device.
        plan = dispatcher.plan(
            routing, experts.num_experts, mask, training, router, num_sequences
        )
        indices = ops.where(plan.rows.kept, indices, experts.num_experts)
        weights, mask = plan.weights, None
    else:
        # Without the seed that a policy may have: devices make no variables.
        inner["capacity"] = Capacity(
            normalize_kept_weights=capacity.normalize_kept_weights
        )
    arrays, fills = [tokens, indices, weights], [0, experts.num_experts, 0]
    if mask is not None:
        arrays.append(mask)
        fills.append(False)
    if isinstance(distribution, MeshEngine):
        distribution.check_divided(experts, bank)
    if not bank.is_divided:
        local = Dispatcher(**inner)
    else:
        check_can_divide(experts)
        slack, ragged = DEFAULT_SLACK, False
        if isinstance(distribution, MeshEngine):
            slack, ragged = distribution.slack, distribution.ragged
        local = Exchange(bank.axis, slack, ragged, **inner)
    router = _declarations(router, num_tokens, num_sequences)

    def compute(own, tokens, indices, weights, mask=None):
        routing = Routing(None, None, indices, weights)
        return local(tokens, routing, own, mask, training, router)

    try:
        return _on_devices(compute, distribution, bank, arrays, fills)
    except WholeBatchNeeded:  # the compiler divides what it can
        return everything()


def apply(distribution, layer, function, tokens):
    """`function(layer, tokens)`, on each device for its own tokens.

    Args:
        distribution: The active `keras.distribution.Distribution`.
        layer: A built layer, whole on every device.
        function: Returns as many rows as it gets tokens, each from its token.
        tokens: `(T, ...)`.
    """
    if _is_for_one_device(distribution, tokens.shape[0]):
        return function(layer, tokens)
    bank = DeviceBank(layer, distribution, whole=True)

    def compute(own, tokens):
        return function(own, tokens), ops.zeros((), "int32")

    try:
        return _on_devices(compute, distribution, bank, [tokens], [0])[0]
    except WholeBatchNeeded:
        return function(layer, tokens)


def _on_devices(compute, distribution, bank, arrays, fills):
    """Runs `compute(bank, *arrays)` on each device for its own tokens.

    Args:
        compute: Returns `(outputs, numbers)`: one output for each token, and
            numbers that are summed over the devices.
        distribution: The active `keras.distribution.Distribution`.
        bank: A `DeviceBank`.
        arrays: list of `(T, ...)`.
        fills: list. What stands for the tokens that are missing for an even
            division.
    """
    axes = token_axes(distribution)
    if bank.axis is not None and bank.axis not in axes:
        axes = (*axes, bank.axis)
    num_tokens = arrays[0].shape[0]
    missing = -num_tokens % num_devices(distribution, axes)
    if missing:
        arrays = [
            _pad(x, missing, y) for x, y in zip(arrays, fills, strict=True)
        ]
    number = len(arrays)

    def on_device(*arrays):
        with bank.on_device(arrays[number:], axes) as (own, states):
            outputs, numbers = compute(own, *arrays[:number])
        return outputs, backend.sum_over(numbers, axes), *states()

    outputs, numbers, *states = backend.per_device(
        on_device,
        distribution.device_mesh.backend_mesh,
        (*arrays, *bank.arrays),
        (*[(axes,)] * number, *bank.specs),
        ((axes,), (), *[()] * bank.num_states),
    )
    bank.assign(states)
    return outputs[:num_tokens] if missing else outputs, numbers


def _is_for_one_device(distribution, num_tokens):
    # A model whose sizes are symbolic is being exported.
    return is_symbolic_size(num_tokens) or (
        distribution.device_mesh.devices.size == 1
    )


def _pad(array, number, fill):
    missing = ops.full((number, *array.shape[1:]), fill, array.dtype)
    return ops.concatenate([array, missing])


def _declarations(router, num_tokens, num_sequences):
    """What a dispatcher asks a router, for the tokens of one device."""
    if router is None:
        return None
    most = router.max_rows(num_tokens, num_sequences)
    return types.SimpleNamespace(
        distinct_choices=router.distinct_choices,
        # All of them may be on one device.
        max_rows=lambda *_: most,
    )
