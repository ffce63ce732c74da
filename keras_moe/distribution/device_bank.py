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
    device the owner of some experts; all others are whole on every device.

    Args:
        experts: A layer of experts, built.
        distribution: The active `keras.distribution.Distribution`.
        whole: bool. Whether every device gets all of every variable, however
            they are stored. Defaults to `False`.

    Attributes:
        axis: Name of the mesh axis that divides the experts, or `None`.
        arrays, specs: The variables' values, and how they are divided.
        num_states: Number of seeds, which each device continues.
    """

    def __init__(self, experts, distribution, whole=False):
        self._experts = experts
        variables = experts.variables
        self._seeds = [v for v in variables if _is_seed(v)]
        self._banks = [v for v in variables if not _is_seed(v)]
        axes = [
            None if whole else _first_axis(v, distribution) for v in self._banks
        ]
        self.axis = next((axis for axis in axes if axis is not None), None)
        self._divided = self.axis is not None
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
        self.arrays = [v.value for v in (*self._banks, *self._seeds)]
        self.specs = [(a,) if a else () for a in axes]
        self.specs += [()] * len(self._seeds)
        self.num_states = len(self._seeds)
        self._first_bank = axes.index(self.axis) if self._divided else None

    @contextlib.contextmanager
    def on_device(self, values, axes):
        """Inside `per_device`: `(experts with these values, states)`.

        `states()` gives the seeds after the computation.
        """
        number = len(self._banks)
        values, seeds = values[:number], values[number:]
        # Devices draw different numbers.
        shifts = [
            ops.cast(backend.device_index(axes), seed.dtype) for seed in seeds
        ]
        mapping = [
            (variable, seed + _entries(shift, 0))
            for variable, seed, shift in zip(
                self._seeds, seeds, shifts, strict=True
            )
        ]
        if not self._divided:
            mapping += zip(self._banks, values, strict=True)
        scope = keras.StatelessScope(state_mapping=mapping, collect_losses=True)

        def states():
            if not self._divided:
                self._check_is_local(scope, values)
            after = [scope.get_current_value(v) for v in self._seeds]
            return [
                value - _entries(shift, 0)
                for value, shift in zip(after, shifts, strict=True)
            ]

        experts = self._experts
        if self._divided:
            num_experts = values[self._first_bank].shape[0]
            experts = OwnExperts(
                experts, self._banks, values, num_experts, self._seeds
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

    Attributes:
        num_experts: int. Number of experts of all devices.
        values: The weights of the experts of this device.
    """

    def __init__(self, experts, variables, values, num_own, seeds):
        self._experts = experts
        self._variables = variables
        self._num_own = num_own
        self._seeds = seeds
        self.values = list(values)
        self.num_experts = experts.num_experts
        self.compute_dtype = experts.compute_dtype
        self.uses_max_group_size = experts.uses_max_group_size
        self.built = True

    def with_values(self, values):
        """A bank of the experts of this device alone."""
        bank = object.__new__(type(self._experts))
        bank.__dict__.update(self._experts.__dict__)
        replaced = {
            id(variable): ops.cast(value, bank.compute_dtype)
            for variable, value in zip(self._variables, values, strict=True)
        }
        for name, value in self._experts.__dict__.items():
            if id(value) in replaced:
                bank.__dict__[name] = replaced[id(value)]
        bank.__dict__["num_experts"] = self._num_own
        return bank

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


def _first_axis(variable, distribution):
    layout = distribution.get_variable_layout(variable)
    axes = tuple(layout.axes) if layout is not None else ()
    mesh = distribution.device_mesh
    # A variable that was made on another mesh keeps the layout of that one.
    if not axes or axes[0] not in mesh.axis_names:
        return None
    size = mesh.shape[mesh.axis_names.index(axes[0])]
    return axes[0] if size > 1 else None
