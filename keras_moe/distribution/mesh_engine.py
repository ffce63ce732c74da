"""Expert parallelism for one program that drives a mesh of devices (JAX)."""

import os

import keras

from keras_moe import backend
from keras_moe.checks import check_at_least
from keras_moe.checks import check_int
from keras_moe.checks import check_one_of
from keras_moe.distribution.engine import Engine
from keras_moe.stacked import expert_shards

_SEVERAL_PROCESSES = (
    "KERAS_DISTRIBUTION_JOB_ADDRESSES",
    "KERAS_DISTRIBUTION_NUM_PROCESSES",
    "JAX_COORDINATOR_ADDRESS",
)
# Room for the rows of one owner beyond an even division.
DEFAULT_SLACK = 0.0625
OPTIONS = ("devices", "num_model_shards", "slack", "exchange")


def initialize():
    """Joins the processes that the environment tells of."""
    if any(name in os.environ for name in _SEVERAL_PROCESSES):
        keras.distribution.initialize()


def make(
    divide,
    devices=None,
    num_model_shards=1,
    slack=DEFAULT_SLACK,
    exchange="padded",
):
    """The engine of an `ExpertParallel`.

    Args:
        divide: `divide(number of devices) -> (expert shards, data shards)`.
        devices, num_model_shards, slack, exchange: As for `ExpertParallel`.
    """
    check_at_least("slack", slack, 0)
    check_one_of("exchange", exchange, ("padded", "ragged"))
    check_int("num_model_shards", num_model_shards, 1)
    devices = devices or keras.distribution.list_devices()
    if len(devices) % num_model_shards:
        raise ValueError(
            "`num_model_shards` must divide the number of devices. Received: "
            f"num_model_shards={num_model_shards}, {len(devices)} devices"
        )
    if exchange == "ragged" and any("cpu" in name for name in devices):
        raise ValueError(
            "`exchange='ragged'` needs GPUs or TPUs: XLA cannot do it on CPUs. "
            f"Received: devices={devices}"
        )
    shards = divide(len(devices) // num_model_shards)
    ragged = exchange == "ragged"
    return MeshEngine(*shards, num_model_shards, devices, slack, ragged)


class MeshEngine(keras.distribution.ModelParallel, Engine):
    """Divides the batch over all devices, and the experts over some.

    Args:
        num_expert_shards: int. Devices that own the experts together.
        num_data_shards: int. Groups of these devices.
        num_model_shards: int. Devices that compute an expert together.
        devices: list of device names.
        slack: Room for rows beyond an even division, a fraction of it.
        ragged: bool. Whether only the rows travel that there are.
    """

    batch_axes = ("data", "expert")

    def __init__(
        self,
        num_expert_shards,
        num_data_shards,
        num_model_shards,
        devices,
        slack,
        ragged=False,
    ):
        mesh = keras.distribution.DeviceMesh(
            (num_data_shards, num_expert_shards, num_model_shards),
            (*self.batch_axes, "model"),
            devices,
        )
        super().__init__(
            layout_map=keras.distribution.LayoutMap(mesh),
            batch_dim_name="data",
        )
        self.num_expert_shards = num_expert_shards
        self.num_data_shards = num_data_shards
        self.num_model_shards = num_model_shards
        self.slack = slack
        self.ragged = ragged

    def distribute(self, model):
        """Checks the model, which is divided as it was made."""
        for variable in model.variables if model.built else ():
            held = len(variable.value.sharding.device_set)
            if held != self.device_mesh.devices.size:
                raise ValueError(
                    "The model must be made in the scope of the strategy. "
                    f"Received: {variable.path} on {held} devices, for "
                    f"{self.device_mesh.devices.size}"
                )
        return model

    def check_divided(self, experts, bank):
        """Raises unless routed experts are divided as the mesh is.

        Args:
            experts: The layer.
            bank: Its `DeviceBank`. Experts without weights need no owner.
        """
        if self.num_expert_shards > 1 and not bank.axis and experts.variables:
            raise ValueError(
                "The experts are not divided among the devices: their weights "
                "are not stacked by expert (`LayerExperts`, `MixedExperts`, "
                "layers of another library), or they were built before their "
                "`MoE` layer was made. "
                f"Received: experts={experts!r}, "
                f"num_expert_shards={self.num_expert_shards}"
            )
        if self.num_model_shards > 1 and not bank.hidden and experts.variables:
            raise ValueError(
                "`num_model_shards` divides the hidden width of `GLUExperts` "
                "and `MLPExperts` whose activation acts on each unit alone. "
                f"Received: num_model_shards={self.num_model_shards}, "
                f"experts={experts!r}"
            )

    def _check_width(self, width):
        if width % self.num_model_shards:
            raise ValueError(
                "`num_model_shards` must divide the hidden width of the "
                f"experts. Received: num_model_shards={self.num_model_shards} "
                f"for intermediate_dim={width}"
            )

    # Keras divides a `tf.data.Dataset` among processes by these.
    @property
    def num_model_replicas(self):
        return self.num_data_shards * self.num_expert_shards

    @property
    def process_index(self):
        return self.data_shard_id

    def get_data_layout(self, data_shape):
        devices = self.num_model_replicas
        if data_shape[0] is not None and data_shape[0] % devices:
            below = data_shape[0] // devices * devices
            nearest = [n for n in (below, below + devices) if n]
            raise ValueError(
                "The batch must divide among the devices that share it. "
                f"Received: a batch of {data_shape[0]} for {devices} devices; "
                f"the nearest sizes that do are {nearest}"
            )
        return _BatchLayout(["data"] + [None] * (len(data_shape) - 1), self)

    def get_variable_layout(self, variable):
        if not expert_shards.is_bank(variable):
            return super().get_variable_layout(variable)
        expert_shards.check_divides(variable.shape[0], self.num_expert_shards)
        axes = ["expert"] + [None] * (len(variable.shape) - 1)
        hidden = expert_shards.hidden_axis(variable)
        if hidden is not None:
            self._check_width(variable.shape[hidden])
            axes[hidden] = "model"
        return keras.distribution.TensorLayout(axes, self.device_mesh)


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
