import functools
import importlib

import keras

from keras_moe.checks import check_int

_ENGINES = {"jax": "mesh", "torch": "process", "tensorflow": "replica"}


def initialize(**options):
    """Joins the processes that train together; call it before anything else.

    In one process there is nothing to do. Several are found in the environment:

    - JAX: as `keras.distribution.initialize` finds them, or
      `jax.distributed.initialize` on a cluster or a TPU pod.
    - PyTorch: what `torchrun` sets. Options: `timeout`, the seconds that a
      process waits for another before it gives up, and `seed`.
    - TensorFlow: nothing is done here; `TF_CONFIG` is read by the strategy.

    Args:
        **options: As above.

    Raises:
        TypeError: If an option is not one of the backend's.

    Example:

    >>> keras_moe.distribution.initialize()
    """
    _engine_module().initialize(**options)


class ExpertParallel:
    """Divides the experts among devices, and the batch among all of them.

    ```
    devices = num_data_shards * num_expert_shards  (* num_model_shards on JAX)
    ```

    Every device computes its own part of each batch. In a `MoE` layer the rows
    of a token travel to the devices that own its experts and back. A device
    owns `num_experts / num_expert_shards` experts of each layer, with their
    gradients and optimizer state (on TensorFlow it only computes them, see
    below); all other weights are whole on every device.

    The model stays as it is. It is made, compiled, trained and saved inside the
    scope:

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

    What a device is depends on the backend:

    - JAX: one program drives all of them, and `batch_size` is the size of the
      whole batch. The distribution is a `keras.distribution.ModelParallel`.
      Options: `devices`, the names of the devices, by default all of
      `keras.distribution.list_devices()`; `num_model_shards` (1), devices that
      compute each expert of `GLUExperts` and `MLPExperts` together, with a part
      of its hidden width each; `slack` (0.0625), the room for rows
      beyond an even division among the owners, as a fraction of it. Rows
      without room travel in a further round, so nothing is lost; `exchange`
      (`"padded"`), or `"ragged"` to send only the rows that there are and no
      padding, on GPUs and TPUs, where it has not been run yet.
    - PyTorch: each process of `torchrun` has one, and gets its part of each
      batch from `split`. Option: `timeout` (600.0), the seconds that a process
      waits for another before it gives up.
    - TensorFlow: the replicas of a `tf.distribute` strategy, whose weights are
      whole on every device: what is divided is the computation. Option:
      `strategy`, by default the present one, several workers if there is a
      `TF_CONFIG`, or a `MirroredStrategy` of all devices. With several workers
      `train_step` takes the place of `fit`, and each gets its part from
      `split`.

    Args:
        num_expert_shards: int, or `None`. Devices that own the experts
            together; it must divide the number of experts of every `MoE`
            layer. `None` is the number of devices divided by
            `num_data_shards`. Defaults to `None`.
        num_data_shards: int, or `None`. Groups of devices that each own all
            experts. `None` is as many as there are devices for. Defaults to
            `None`.
        **options: As above.

    Attributes:
        num_expert_shards, num_data_shards: ints.
        num_processes, process_index: ints. The processes that feed a part of
            each batch, and this one among them.

    Raises:
        ValueError: If the numbers do not make up the number of devices, or an
            option is not one of the backend's.

    Example:

    >>> strategy = keras_moe.distribution.ExpertParallel(num_expert_shards=1)
    >>> with strategy.scope():
    ...     layer = keras_moe.layers.MoE(num_experts=4, intermediate_dim=8)
    ...     inputs = keras.Input((3,))
    ...     model = keras.Model(inputs, layer(inputs))
    ...     model.compile("sgd", "mse")
    ...     model = strategy.distribute(model)

    Reference:

    - [Lepikhin et al., 2020](https://arxiv.org/abs/2006.16668), section 3
    """

    def __init__(self, num_expert_shards=None, num_data_shards=None, **options):
        for name, number in (
            ("num_expert_shards", num_expert_shards),
            ("num_data_shards", num_data_shards),
        ):
            if number is not None:
                check_int(name, number, 1)
        engine = _engine_module()
        unknown = sorted(set(options) - set(engine.OPTIONS))
        if unknown:
            raise ValueError(
                f"On the backend {keras.config.backend()!r}, ExpertParallel "
                f"takes the options {engine.OPTIONS}. Received: {unknown}"
            )
        self._engine = engine.make(
            functools.partial(_divide, num_expert_shards, num_data_shards),
            **options,
        )
        self.num_expert_shards = self._engine.num_expert_shards
        self.num_data_shards = self._engine.num_data_shards
        self.num_processes = self._engine.num_processes
        self.process_index = self._engine.process_index

    def scope(self):
        """The context in which a model is made, compiled and trained."""
        return self._engine.scope()

    def distribute(self, model):
        """Readies a compiled model for `fit`, and checks it.

        Args:
            model: A built `keras.Model`, made in the scope.

        Returns:
            The model.

        Raises:
            ValueError: If the model was made elsewhere, or its experts cannot
                be divided.
        """
        return self._engine.distribute(model)

    def load_model(self, filepath, custom_objects=None, compile=True):
        """Loads a `.keras` file, made on any number of devices.

        Args:
            filepath: Path of the file.
            custom_objects: As for `keras.saving.load_model`.
            compile: bool. Whether to compile the model as it was, with the
                state of its optimizer. Defaults to `True`.

        Returns:
            A model that is ready for `fit`.
        """
        return self._engine.load_model(filepath, custom_objects, compile)

    def train_step(self, model):
        """A training step for several workers, where `fit` fails (TensorFlow).

        ```python
        step = strategy.train_step(model)
        for x_batch, y_batch in batches:  # the parts of this worker
            logs = step(x_batch, y_batch)
        ```

        Each call is a step of `fit`, with Keras' losses, metrics and
        optimizer. All workers must take part in each, with batches of one size.

        Args:
            model: A built and compiled `keras.Model`, made in the scope.

        Returns:
            `step(x, y, sample_weight=None)`, which returns a dict of floats:
            the loss and the metrics of all workers since
            `model.reset_metrics()`.

        Raises:
            NotImplementedError: On the other backends, where `fit` does it.
            ValueError: As for `distribute`.
        """
        return self._engine.train_step(model)

    def split(self, *arrays, batch_size):
        """The part of this process in each batch.

        With it, `fit(..., batch_size=batch_size // num_processes,
        shuffle=False)` sees in each step what one process would see.

        Args:
            *arrays: NumPy arrays or tensors with the same number of examples.
            batch_size: int. Size of the batches of all processes together.

        Returns:
            The parts, as a tuple if there are several arrays; all of them where
            one process feeds all devices.

        Raises:
            ValueError: If a batch does not divide among the processes.
        """
        return self._engine.split(*arrays, batch_size=batch_size)

    def save_sharded(self, model, folder):
        """Writes a model that is too large for one process (PyTorch).

        Each process writes its own experts and their optimizer state to one
        folder, which `load_sharded` reads in any number of processes: in one,
        with a model that was made without a scope, `model.save` then makes a
        plain file of it. If a save is interrupted, what was there before is
        whole, as `folder` or, for a moment, as `folder.old`.

        Args:
            model: A distributed model.
            folder: Path that all processes can write to.

        Raises:
            NotImplementedError: On the other backends.
        """
        self._engine.save_sharded(model, folder)

    def load_sharded(self, model, folder):
        """Reads what `save_sharded` wrote into a model of the same layers.

        Args:
            model: A built model. If it is compiled, its optimizer's state is
                read too.
            folder: Path.

        Raises:
            NotImplementedError: On the other backends.
        """
        self._engine.load_sharded(model, folder)


def _engine_module():
    name = _ENGINES[keras.config.backend()]
    return importlib.import_module(f"keras_moe.distribution.{name}_engine")


def _divide(num_expert_shards, num_data_shards, devices):
    """`(num_expert_shards, num_data_shards)` that make up all devices."""
    expert, data = num_expert_shards, num_data_shards
    if expert is None:
        expert = devices // (data or 1)
    if data is None:
        data = devices // max(expert, 1)
    if expert * data != devices:
        raise ValueError(
            "`num_expert_shards` times `num_data_shards` must be the number of "
            f"devices. Received: num_expert_shards={num_expert_shards}, "
            f"num_data_shards={num_data_shards}, for {devices} devices"
        )
    return expert, data
