"""Expert parallelism for one program that drives a mesh of devices (JAX)."""

import keras

from keras_moe import backend
from keras_moe.stacked import expert_shards

# Room for the rows of one owner beyond an even division.
DEFAULT_SLACK = 0.0625


def as_devices(devices):
    """The names of the devices, for `None` of all."""
    return devices or keras.distribution.list_devices()


def make(*args):
    return MeshEngine(*args)


class MeshEngine(keras.distribution.ModelParallel):
    """Divides the batch over all devices, and the experts over some.

    Args:
        num_expert_shards: int. Devices that own the experts together.
        num_data_shards: int. Groups of these devices.
        devices: list of device names.
        slack: Room for rows beyond an even division, a fraction of it.
    """

    batch_axes = ("data", "expert")

    def __init__(self, num_expert_shards, num_data_shards, devices, slack):
        mesh = keras.distribution.DeviceMesh(
            (num_data_shards, num_expert_shards),
            self.batch_axes,
            devices,
        )
        super().__init__(
            layout_map=keras.distribution.LayoutMap(mesh),
            batch_dim_name="data",
        )
        self.num_expert_shards = num_expert_shards
        self.slack = slack

    def distribute(self, model):
        """The model: Keras divides it as it is made."""
        return model

    def check_divided(self, experts):
        """Raises if no variable of routed experts is divided.

        Called for experts of which none is, which is right for one owner.
        """
        if self.num_expert_shards > 1 and experts.variables:
            raise ValueError(
                "The experts are not divided among the devices: they are no "
                "bank of `keras_moe.experts`, or were built before their `MoE` "
                "layer was made. "
                f"Received: experts={experts!r}, "
                f"num_expert_shards={self.num_expert_shards}"
            )

    @property
    def num_model_replicas(self):
        return self.device_mesh.devices.size

    def get_data_layout(self, data_shape):
        devices = self.device_mesh.devices.size
        if data_shape[0] is not None and data_shape[0] % devices:
            below = data_shape[0] // devices * devices
            nearest = [n for n in (below, below + devices) if n]
            raise ValueError(
                "The batch must divide among the devices. Received: a batch "
                f"of {data_shape[0]} for {devices} devices; the nearest "
                f"sizes that do are {nearest}"
            )
        return _BatchLayout(["data"] + [None] * (len(data_shape) - 1), self)

    def get_variable_layout(self, variable):
        if not expert_shards.is_bank(variable):
            return super().get_variable_layout(variable)
        check_divides(variable.shape[0], self.num_expert_shards)
        axes = ["expert"] + [None] * (len(variable.shape) - 1)
        return keras.distribution.TensorLayout(axes, self.device_mesh)


def check_divides(num_experts, num_expert_shards):
    if num_experts % num_expert_shards:
        possible = [n for n in range(1, num_experts + 1) if not num_experts % n]
        nearest = sorted(possible, key=lambda n: abs(n - num_expert_shards))[:2]
        raise ValueError(
            "`num_expert_shards` must divide the number of experts. Received: "
            f"num_expert_shards={num_expert_shards} for {num_experts} experts; "
            f"the nearest numbers that do are {sorted(nearest)}"
        )


class _BatchLayout(keras.distribution.TensorLayout):
    """Divides the first axis over two axes of the mesh, which Keras cannot."""

    def __init__(self, axes, engine):
        super().__init__(axes, engine.device_mesh)
        self._batch_axes = engine.batch_axes

    @property
    def backend_layout(self):
        return backend.batch_sharding(
            self.device_mesh.backend_mesh, self._batch_axes, len(self.axes)
        )
