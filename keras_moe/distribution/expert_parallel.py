import importlib

import keras

from keras_moe.checks import check_at_least
from keras_moe.checks import check_int

_ENGINES = {"jax": "mesh", "torch": "process", "tensorflow": "replica"}


class ExpertParallel:
    """Divides the experts among devices, and the batch among all of them.

    ```
    devices = num_data_shards * num_expert_shards
    ```

    Every device computes its own part of each batch. In a `MoE` layer the rows
    of a token travel to the devices that own its experts and back. A device
    owns `num_experts / num_expert_shards` experts of each layer, with their
    gradients and optimizer state; all other weights are whole on every device.

    The model stays as it is. It is built, compiled, trained and saved inside
    the scope:

    ```python
    keras_moe.distribution.initialize()
    strategy = keras_moe.distribution.ExpertParallel(num_expert_shards=4)
    with strategy.scope():
        model = make_model()
        model.compile(optimizer="adam", loss="mse")
        model = strategy.distribute(model)
        model.fit(x, y, batch_size=256)
        model.save("model.keras")
    ```

    Losses, expert bias, logs and gradients are of the whole batch, and a saved
    file is the same for any number of devices.

    What the devices are depends on the backend:

    - JAX: those of `keras.distribution.list_devices()`, of all processes, which
      one program drives. `batch_size` is the size of the whole batch.
    - PyTorch: one for each process of `torch.distributed`.
    - TensorFlow: the replicas of a `tf.distribute` strategy.

    Args:
        num_expert_shards: int, or `None`. Devices that own the experts
            together; it must divide the number of experts of every `MoE`
            layer. `None` is the number of devices divided by
            `num_data_shards`. Defaults to `None`.
        num_data_shards: int, or `None`. Groups of devices that each own all
            experts. `None` is as many as there are devices for. Defaults to
            `None`.
        devices: list of str, or `None`. JAX: names of the devices to use.
            Defaults to `None`, all of them.
        slack: float. JAX: room for rows beyond an even division among the
            owners, as a fraction of it. Rows without room travel in a further
            round, so nothing is lost. Defaults to `0.0625`.

    Raises:
        ValueError: If the numbers do not make up the number of devices.

    Reference:

    - [Lepikhin et al., 2020](https://arxiv.org/abs/2006.16668), section 3
    """

    def __init__(
        self,
        num_expert_shards=None,
        num_data_shards=None,
        devices=None,
        slack=0.0625,
    ):
        for name, number in (
            ("num_expert_shards", num_expert_shards),
            ("num_data_shards", num_data_shards),
        ):
            if number is not None:
                check_int(name, number, 1)
        check_at_least("slack", slack, 0)
        backend = _ENGINES[keras.config.backend()]
        engine = importlib.import_module(
            f"keras_moe.distribution.{backend}_engine"
        )
        devices = engine.as_devices(devices)
        expert_shards, data_shards = divide(
            len(devices), num_expert_shards, num_data_shards
        )
        self.num_expert_shards = expert_shards
        self.num_data_shards = data_shards
        self.slack = slack
        self._engine = engine.make(expert_shards, data_shards, devices, slack)

    def scope(self):
        """The context in which a model is built, compiled and trained."""
        return self._engine.scope()

    def distribute(self, model):
        """Readies a compiled model for `fit`, and checks it.

        Args:
            model: A built `keras.Model`, made in the scope.

        Returns:
            The model.

        Raises:
            ValueError: If the experts of a layer are not divided.
        """
        return self._engine.distribute(model)


def divide(devices, num_expert_shards, num_data_shards):
    """`(num_expert_shards, num_data_shards)` that make up all devices."""
    expert, data = num_expert_shards, num_data_shards
    if expert is None:
        expert = devices // (data or 1)
    if data is None:
        data = devices // expert
    if expert * data != devices:
        raise ValueError(
            "`num_expert_shards` times `num_data_shards` must be the number of "
            f"devices. Received: num_expert_shards={num_expert_shards}, "
            f"num_data_shards={num_data_shards}, for {devices} devices"
        )
    return expert, data
