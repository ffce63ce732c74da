"""Training by several processes, one for each device (PyTorch)."""

import contextlib
import json
import random
import weakref
import zipfile

import keras

from keras_moe import backend
from keras_moe.backend.torch import collectives
from keras_moe.checks import check_int
from keras_moe.checks import check_positive
from keras_moe.distribution.engine import Engine
from keras_moe.distribution.process_dispatcher import ProcessDispatcher
from keras_moe.distribution.process_files import read_sharded
from keras_moe.distribution.process_files import write_sharded
from keras_moe.distribution.process_model import ProcessModel
from keras_moe.distribution.process_state import check_divided
from keras_moe.distribution.process_state import check_same
from keras_moe.stacked import expert_shards

DEFAULT_TIMEOUT = 600.0
OPTIONS = ("timeout",)


def initialize(timeout=DEFAULT_TIMEOUT, seed=None):
    """Joins the processes that `torchrun` started; nothing to do in one.

    All processes then draw the same random numbers.

    Args:
        timeout: float. Seconds after which a process that waits for another
            gives up with an error. Defaults to `600.0`.
        seed: int, or `None` for a new one. The seed of
            `keras.utils.set_random_seed` in all processes. Defaults to `None`.
    """
    check_positive("timeout", timeout)
    already = collectives.is_started()
    collectives.start(timeout)
    if collectives.num_processes() > 1 and not already:
        if seed is None:
            seed = collectives.broadcast_object(random.getrandbits(31))
        keras.utils.set_random_seed(seed)


def make(divide, timeout=DEFAULT_TIMEOUT):
    """The engine of an `ExpertParallel`.

    Args:
        divide: `divide(number of devices) -> (expert shards, data shards)`.
        timeout: As for `ExpertParallel`.
    """
    return ProcessEngine(divide(collectives.num_processes())[0], timeout)


class ProcessEngine(Engine):
    """Divides the experts of a model among processes.

    The processes are replicas of expert groups: process `r` holds share `r %
    num_expert_shards` of the experts, and `num_expert_shards` processes in a
    row hold all of them. Each computes on its own part of the batch; tokens
    travel to their experts within a group.

    Args:
        num_expert_shards: int, or `None` for the number of processes. Processes
            that share the experts among them. Defaults to `None`.
        timeout: float. Seconds after which a process that waits for another
            gives up with an error. Defaults to `600.0`.

    Attributes:
        num_processes, process_index: ints.
        num_replicas: int. Number of expert groups.
        expert_group, replica_group: The processes that hold all experts
            together, and those that hold the same.
        shard: An `ExpertShard`.
    """

    waits_for_rows = True

    def __init__(self, num_expert_shards=None, timeout=DEFAULT_TIMEOUT):
        check_positive("timeout", timeout)
        self.num_processes = size = collectives.num_processes()
        self.process_index = index = collectives.process_index()
        shards = size if num_expert_shards is None else num_expert_shards
        check_int("num_expert_shards", shards, 1)
        check_same("num_expert_shards", shards)
        if size % shards:
            divisors = [n for n in range(1, size + 1) if size % n == 0]
            raise ValueError(
                "`num_expert_shards` must divide the number of processes, as "
                f"{divisors} do. Received: num_expert_shards={shards}, "
                f"{size} processes"
            )
        self.num_expert_shards = shards
        self.num_replicas = self.num_data_shards = size // shards
        self.shard = expert_shards.ExpertShard(index % shards, shards, self)
        self.expert_group = self.replica_group = None
        self._link = None
        self._models = weakref.WeakSet()
        if size > 1:
            expert_groups = [
                range(first, first + shards) for first in range(0, size, shards)
            ]
            replica_groups = [range(n, size, shards) for n in range(shards)]
            self.expert_group = _own_group(expert_groups, index, timeout)
            self.replica_group = _own_group(replica_groups, index, timeout)

    def scope(self):
        """Layers that are built inside hold the own experts only."""
        return expert_shards.dividing(self.shard)

    def dispatch(
        self,
        dispatcher,
        tokens,
        routing,
        experts,
        mask=None,
        training=None,
        router=None,
        num_sequences=1,
        meanwhile=None,
    ):
        """What the dispatcher returns, computed by all processes of a group.

        Args:
            meanwhile: Called while rows travel, if they do. Defaults to `None`.
            others: As for a call of the dispatcher.

        Returns:
            `(outputs, group_sizes)` of the tokens of this process.
        """
        if not experts.built:
            with self.scope():
                experts.build((None, *tokens.shape[1:]))
        marks = [expert_shards.mark_of(v) for v in experts.variables]
        marks = [mark for mark in marks if mark is not None]
        if training and not backend.has_no_values(tokens):
            if any(not mark.is_distributed for mark in marks):
                raise RuntimeError(
                    "A model built under `scope()` is trained after `model = "
                    "strategy.distribute(model)`, which lets its processes add "
                    "up their gradients."
                )
        if self.num_processes > 1 and (marks or experts.variables):
            dispatcher = ProcessDispatcher(dispatcher, self, meanwhile)
        return dispatcher(
            tokens, routing, experts, mask, training, router, num_sequences
        )

    def distribute(self, model):
        """The model, to be trained and saved by all processes together.

        Args:
            model: A built `keras.Model`, changed in place.

        Returns:
            The model.
        """
        if not model.built:
            raise ValueError(
                "The model must be built before it is distributed: call it, or "
                f"`model.build`. Received: {model!r}"
            )
        if self.num_expert_shards > 1:
            check_divided(model)
        if self.num_processes > 1 and model not in self._models:
            ProcessModel(model, self)
            self._models.add(model)
        for variable in model.variables:
            mark = expert_shards.mark_of(variable)
            if mark is not None:
                mark.is_distributed = True
        return model

    def load_model(self, filepath, custom_objects=None, compile=True):
        """Loads a `.keras` file into processes of any number.

        Args:
            filepath: Path of a file that `model.save` wrote.
            custom_objects: As for `keras.saving.load_model`.
            compile: bool. Whether to compile the model as it was, with the
                state of its optimizer. Defaults to `True`.

        Returns:
            A distributed model.
        """
        with self.scope():
            model = keras.saving.load_model(
                filepath, custom_objects=custom_objects, compile=False
            )
        self.distribute(model)
        config = compile and _compile_config(filepath)
        if config:
            with keras.saving.custom_object_scope(custom_objects or {}):
                model.compile_from_config(config)
            model.load_weights(filepath)
        return model

    def save_sharded(self, model, folder):
        """Writes a model that may be too large for one process to hold.

        Each process writes its own experts and their optimizer state to one
        folder, which `load_sharded` reads in any number of processes: in one,
        with a model built without `scope()`, `model.save` then makes a plain
        file of it. A save that is interrupted leaves the folder before whole,
        as `folder` or, for a moment, as `folder.old`.

        Args:
            model: A distributed model.
            folder: Path that all processes can write to.
        """
        write_sharded(model, folder, self.num_expert_shards)

    def load_sharded(self, model, folder):
        """Reads what `save_sharded` wrote into a model of the same layers.

        Args:
            model: A built model. If it is compiled, its optimizer's state is
                read too.
            folder: Path.
        """
        read_sharded(model, folder, self.num_expert_shards)

    @contextlib.contextmanager
    def linked(self):
        """Links the exchanges of one training step (see `exchange_rows`)."""
        self._link = collectives.first_link()
        try:
            yield
        finally:
            self._link = None

    def link(self):
        return collectives.first_link() if self._link is None else self._link

    def keep_link(self, link):
        if self._link is not None:
            self._link = link

    def close_link(self, loss):
        """The loss; its gradient goes through all exchanges of the step."""
        if self._link is None:
            return loss
        link, self._link = self._link, collectives.first_link()
        return loss + keras.ops.cast(link, loss.dtype)


def _own_group(groups, index, timeout):
    made = [collectives.new_group(group, timeout) for group in groups]
    return next(
        group
        for group, members in zip(made, groups, strict=True)
        if index in members
    )


def _compile_config(filepath):
    with zipfile.ZipFile(filepath) as archive:
        return json.loads(archive.read("config.json")).get("compile_config")
