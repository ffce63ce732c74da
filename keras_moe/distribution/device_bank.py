"""A bank of experts as one device of a mesh holds it."""

import contextlib

import keras
from keras import ops

from keras_moe import backend
from keras_moe.experts import Experts
from keras_moe.stacked import expert_shards

# How far apart the draws of two calls, and of two rounds of a call, begin.
_DRAWS_PER_CALL = 256
_DEVICES = 65536


class WholeBatchNeeded(Exception):
    """Experts changed state or added losses, which are of the whole batch."""


class DeviceBank:
    """The variables of experts, as arrays for `backend.per_device`.

    Variables that are divided along their first axis, the experts, make each
    device the owner of some experts. Divided along the hidden width of the
    experts, they make it compute a part of the sum that an output is. All
    others are whole on every device.

    Args:
        experts: A layer of experts, built.
        distribution: The active `keras.distribution.Distribution`.
        whole: bool. Whether every device gets all of every variable, however
            they are stored. Defaults to `False`.

    Attributes:
        axis: Name of the mesh axis that divides the experts, or `None`.
        hidden: Name of the mesh axis that divides the hidden width, or `None`.
        arrays, specs: The variables' values, and how they are divided.
        num_states: Number of seeds, which each device continues.
    """

    def __init__(self, experts, distribution, whole=False):
        self._experts = experts
        variables = experts.variables
        self._seeds = [v for v in variables if _is_seed(v)]
        self._banks = [v for v in variables if not _is_seed(v)]
        axes = [
            None if whole else _axis(v, 0, distribution) for v in self._banks
        ]
        self.axis = next((axis for axis in axes if axis is not None), None)
        names = [
            variable.path
            for variable, axis in zip(self._banks, axes, strict=True)
            if axis != self.axis and not expert_shards.is_shared(variable)
        ]
        if names:
            raise ValueError(
                "The layout must divide all variables of a bank of experts "
                f"along their first axis, or none. Received: {names} whole, "
                f"others divided along {self.axis!r}"
            )
        wide = [expert_shards.hidden_axis(v) for v in self._banks]
        hidden = {
            None if whole else _axis(v, place, distribution)
            for v, place in zip(self._banks, wide, strict=True)
            if place is not None
        }
        # Divided in several ways, or as the tokens are, it is computed whole.
        self.hidden = hidden.pop() if len(hidden) == 1 else None
        if self.hidden in (self.axis, distribution.batch_dim_name):
            self.hidden = None
        self.is_divided = self.axis is not None or self.hidden is not None
        self.arrays = [v.value for v in (*self._banks, *self._seeds)]
        self.specs = [
            _spec(axis, place, self.hidden)
            for axis, place in zip(axes, wide, strict=True)
        ]
        self.specs += [()] * len(self._seeds)
        self.num_states = len(self._seeds)
        # Of a variable with experts.
        self._first_bank = axes.index(self.axis) if axes else None

    @contextlib.contextmanager
    def on_device(self, values, axes):
        """Inside `per_device`: `(experts with these values, states)`.

        `states()` gives the seeds after the computation.
        """
        number = len(self._banks)
        values, seeds = values[:number], values[number:]
        # Devices draw different numbers.
        if self.hidden is not None:
            axes = (*axes, self.hidden)
        shifts = [
            ops.cast(backend.device_index(axes), seed.dtype) for seed in seeds
        ]
        mapping = [
            (variable, seed + _entries(shift, 0))
            for variable, seed, shift in zip(
                self._seeds, seeds, shifts, strict=True
            )
        ]
        if not self.is_divided:
            mapping += zip(self._banks, values, strict=True)
        scope = keras.StatelessScope(state_mapping=mapping, collect_losses=True)

        def states():
            if not self.is_divided:
                self._check_is_local(scope, values)
            after = [scope.get_current_value(v) for v in self._seeds]
            return [
                value - _entries(shift, 0)
                for value, shift in zip(after, shifts, strict=True)
            ]

        experts = self._experts
        if self.is_divided:
            num_experts = self._experts.num_experts
            if self.axis is not None:
                num_experts = values[self._first_bank].shape[0]
            experts = OwnExperts(
                *(experts, self._banks, values, num_experts, self._seeds),
                hidden=self.hidden,
            )
        with scope:
            yield experts, states

    def _check_is_local(self, scope, values):
        for variable, value in zip(self._banks, values, strict=True):
            if scope.get_current_value(variable) is not value:
                raise WholeBatchNeeded
        if scope.losses:
            raise WholeBatchNeeded

    def assign(self, states):
        for variable, value in zip(self._seeds, states, strict=True):
            variable.assign(value)


class OwnExperts:
    """The experts of one device, called as the whole bank is.

    Args:
        experts: The whole bank.
        variables, values: Its variables, and their values on this device.
        num_own: int. Number of experts of this device.
        seeds: The bank's seeds, variables.
        hidden: Name of the mesh axis that divides the hidden width, or `None`.

    Attributes:
        num_experts: int. Number of experts of all devices.
        values: The weights of the experts of this device.
    """

    def __init__(self, experts, variables, values, num_own, seeds, hidden=None):
        self._experts = experts
        self._variables = variables
        self._num_own = num_own
        self._seeds = seeds
        self._hidden = hidden
        self.values = list(values)
        self.num_experts = experts.num_experts
        self.compute_dtype = experts.compute_dtype
        self.uses_max_group_size = experts.uses_max_group_size
        self.built = True

    def with_values(self, values):
        """A bank of the experts of this device alone."""
        bank = object.__new__(type(self._experts))
        bank.__dict__.update(self._experts.__dict__)
        replaced = {}
        for variable, value in zip(self._variables, values, strict=True):
            value = ops.cast(value, bank.compute_dtype)
            if self._hidden and expert_shards.hidden_axis(variable) is None:
                # What is added to a sum is added by one of its devices.
                is_first = backend.device_index(self._hidden) == 0
                value = ops.where(is_first, value, ops.zeros_like(value))
            replaced[id(variable)] = value
        for name, value in self._experts.__dict__.items():
            if id(value) in replaced:
                bank.__dict__[name] = replaced[id(value)]
        bank.__dict__["num_experts"] = self._num_own
        return bank

    def sum_parts(self, outputs):
        """The outputs, from those of the parts of the hidden width."""
        if self._hidden is None:
            return outputs
        return backend.sum_over(outputs, self._hidden)

    def next_seeds(self):
        """Seeds for `drawing`, other ones in each call."""
        seeds = []
        for variable in self._seeds:
            key, count = ops.unstack(variable.value)
            seeds.append(ops.stack([key, count * _DRAWS_PER_CALL]))
            variable.assign(variable.value + _entries(0, 1))
        return seeds

    @contextlib.contextmanager
    def drawing(self, seeds, first):
        """Inside, the bank draws from these seeds, and changes no state.

        A round may be computed more than once, and must draw the same numbers.

        Args:
            seeds: From `next_seeds`.
            first: int or scalar tensor that differs between rounds.
        """
        shift = ops.cast(first, "uint32") * _DEVICES
        scope = keras.StatelessScope(
            state_mapping=[
                (variable, seed + _entries(shift, 0))
                for variable, seed in zip(self._seeds, seeds, strict=True)
            ],
            collect_losses=True,
        )
        with scope:
            yield
        if scope.losses:
            raise ValueError(
                "Experts that are divided among devices add no losses, and "
                "take no `activity_regularizer`. "
                f"Received: experts={self._experts!r}"
            )


def check_can_divide(experts):
    """Raises unless the experts can be computed on the devices that own them.

    Their variables must be the banks of one layer, `(E, ...)` each.
    """
    own = {id(value) for value in vars(experts).values()}
    if not isinstance(experts, Experts) or any(
        id(v) not in own for v in experts.variables if not _is_seed(v)
    ):
        raise ValueError(
            "Only banks of `keras_moe.experts` with variables of their own, "
            "stacked by expert, can be divided among devices. "
            f"Received: experts={experts!r}"
        )


def _is_seed(variable):
    return variable.dtype == "uint32"


def _entries(key, count):
    """What is added to a seed, its key and its counter."""
    return ops.cast(ops.stack([key, count]), "uint32")


def _axis(variable, place, distribution):
    """Name of the mesh axis that divides an axis of a variable, or `None`."""
    layout = distribution.get_variable_layout(variable)
    axes = tuple(layout.axes) if layout is not None else ()
    mesh = distribution.device_mesh
    # A variable that was made on another mesh keeps the layout of that one.
    if len(axes) <= place or axes[place] not in mesh.axis_names:
        return None
    size = mesh.shape[mesh.axis_names.index(axes[place])]
    return axes[place] if size > 1 else None


def _spec(axis, place, hidden):
    """The names of the mesh axes that divide the first axes of a variable."""
    if hidden is None or place is None:
        return (axis,)
    return (axis, *[None] * (place - 1), hidden)
