"""Experts over the replicas of a TensorFlow strategy.

TensorFlow's strategies keep a copy of each variable on each device, so what is
shared is the computation, not the memory for weights: each replica computes
only its own experts, and Keras adds up the gradients.

Between worker processes with one device each, rows travel by an all-to-all. The
replicas of a process, as those of `MirroredStrategy`, gather all rows and take
theirs, which sends as many times more as there are replicas: the all-to-all of
TensorFlow 2.21 stops for ever there.
"""

import contextlib

import numpy as np
from keras import ops

from keras_moe import backend
from keras_moe.checks import check_int
from keras_moe.dispatch.dispatcher import Dispatcher
from keras_moe.distribution.engine import Engine
from keras_moe.distribution.part_dispatcher import PartDispatcher
from keras_moe.ops.routing import Routing
from keras_moe.stacked import expert_shards

OPTIONS = ("strategy",)


def initialize():
    """Nothing to do: the strategy of several workers reads `TF_CONFIG`."""


def make(divide, strategy=None):
    """The engine of an `ExpertParallel`.

    Args:
        divide: `divide(number of devices) -> (expert shards, data shards)`.
        strategy: As for `ExpertParallel`.
    """
    strategy = backend.native.as_strategy(strategy)
    return ReplicaEngine(divide(strategy.num_replicas_in_sync)[0], strategy)


class ReplicaEngine(Engine):
    """Runs each expert on one replica of a team of TensorFlow replicas.

    Args:
        num_expert_shards: int. Number of replicas that share out the experts,
            a divisor of the number of replicas. `None` for all of them.
            Defaults to `None`.
        strategy: A `tf.distribute.Strategy`, or `None` for a
            `MirroredStrategy` of all GPUs, or of all CPU devices without one,
            or of several workers if the environment has a `TF_CONFIG`. On one
            device it is TensorFlow's default strategy. Defaults to `None`.

    Raises:
        ValueError: If the number of shards does not divide the replicas.
    """

    def __init__(self, num_expert_shards=None, strategy=None):
        self.strategy = backend.native.as_strategy(strategy)
        replicas = self.strategy.num_replicas_in_sync
        if num_expert_shards is None:
            num_expert_shards = replicas
        check_int("num_expert_shards", num_expert_shards, minimum=1)
        if replicas % num_expert_shards:
            raise ValueError(
                "`num_expert_shards` must be a divisor of the number of "
                "replicas of the TensorFlow strategy. Received: "
                f"num_expert_shards={num_expert_shards}, {replicas} replicas"
            )
        self.num_expert_shards = num_expert_shards
        self.num_data_shards = replicas // num_expert_shards
        self.num_replicas = replicas
        self.num_processes, self.process_index = (
            backend.native.collectives.workers(self.strategy)
        )

    def distribute(self, model):
        """Checks a compiled model, and makes its optimizer clip gradients.

        Keras clips the gradient of each replica, and cannot accumulate
        gradients here. The optimizer of the returned model does both with the
        gradients of the whole batch, as on one device.

        Args:
            model: A model that was made and compiled in `scope()`.

        Returns:
            The model.

        Raises:
            ValueError: If it was made elsewhere, or compiled with
                `run_eagerly=True` or `jit_compile=True`.
        """
        replicas = backend.num_replicas(model)
        if replicas != self.num_replicas:
            raise ValueError(
                "The model must be made inside `scope()`. Received a model of "
                f"{replicas} replicas, and {self.num_replicas} in the strategy"
            )
        if self.num_replicas > 1 and model.compiled:
            if model.run_eagerly or model.jit_compile is True:
                raise ValueError(
                    "On several TensorFlow replicas, steps run as graphs: "
                    "compile with `run_eagerly=False, jit_compile=False`. "
                    f"Received: run_eagerly={model.run_eagerly}, "
                    f"jit_compile={model.jit_compile}"
                )
            backend.native.update_together(model.optimizer)
        return model

    def train_step(self, model):
        self.distribute(model)
        if not model.compiled:
            raise ValueError(
                f"The model must be compiled. Received: model={model!r}"
            )
        return backend.native.train_step(model)

    @contextlib.contextmanager
    def scope(self):
        """The context in which the model is made."""
        # Each replica has all experts; the shard only leads to this engine.
        whole = expert_shards.ExpertShard(0, 1, self)
        with self.strategy.scope(), expert_shards.dividing(whole):
            yield

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
    ):
        """What `dispatcher` returns, with the experts on their replicas.

        Args:
            dispatcher: A `keras_moe.dispatch.Dispatcher`.
            tokens, routing, experts, mask, training, router, num_sequences: As
                for a call of it.

        Returns:
            `(outputs, group_sizes)` of this replica's own tokens.
        """
        expert_shards.check_divides(experts.num_experts, self.num_expert_shards)
        context = backend.native.collectives.replica_context()
        if context is not None:
            dispatcher = _ReplicaDispatcher(
                dispatcher, context, self.num_expert_shards
            )
        return dispatcher(
            tokens, routing, experts, mask, training, router, num_sequences
        )


class _ReplicaDispatcher(PartDispatcher):
    """Sends rows to the replicas of a team that compute their experts.

    Each replica makes a block of rows for each, of the size of the largest
    block of all, and gets one from each.
    """

    def __init__(self, dispatcher, context, num_expert_shards):
        self._all = self._team = backend.native.collectives.Team(context)
        # XLA would need to know the number of tokens on each replica.
        super().__init__(dispatcher, is_whole=self._all.is_tpu)
        self.moves_rows = num_expert_shards > 1
        if 1 < num_expert_shards < self._all.size:
            self._team = backend.native.collectives.Team(
                context, num_expert_shards
            )

    def gather_rows(self, tensor):
        number = ops.cast(ops.shape(tensor)[0], "int32")
        numbers = self._all.gather(number)  # (R,)
        longest = ops.maximum(ops.max(numbers), 1)
        parts = self._all.gather(
            _resized(ops.stop_gradient(tensor), longest)
        )  # (R, longest, ...)
        parts = [parts[i, : numbers[i]] for i in range(self._all.size)]
        starts = ops.cumsum(numbers) - numbers
        return ops.concatenate(parts), starts[self._all.rank]

    def exchange(
        self, rows, group_sizes, experts, training=None, max_group_size=None
    ):
        if not self.moves_rows:
            return super().exchange(
                rows, group_sizes, experts, training, max_group_size
            )
        team, num_experts = self._team, experts.num_experts
        owners = np.arange(num_experts) // (num_experts // team.size)
        owns = ops.convert_to_tensor(np.arange(team.size)[:, None] == owners)
        sizes = team.gather(group_sizes)  # (S, E)
        # Rows from each replica to each, and the longest block. Collectives
        # need one shape on all replicas, and one row at least.
        sent = ops.matmul(sizes, ops.transpose(ops.cast(owns, "int32")))
        longest = ops.maximum(ops.max(sent), 1)
        own = sent[team.rank]  # (S,)
        starts = ops.cumsum(own) - own
        blocks = [
            _resized(rows[starts[i] : starts[i] + own[i]], longest)
            for i in range(team.size)
        ]
        received = team.exchange(ops.stack(blocks))  # (S, longest, ...)
        sizes = ops.where(owns[team.rank], sizes, 0)
        indices = ops.concatenate(
            [_experts_of_rows(sizes[i], longest) for i in range(team.size)]
        )  # (S * longest,)
        indices = ops.expand_dims(indices, -1)
        exists = ops.cast(indices < num_experts, "float32")
        outputs, _ = Dispatcher()(
            ops.reshape(received, (-1, *received.shape[2:])),
            Routing(None, None, indices, exists),
            experts,
            training=training,
        )
        outputs = ops.reshape(outputs, (team.size, longest, *outputs.shape[1:]))
        outputs = team.exchange(outputs)
        outputs = [outputs[i, : own[i]] for i in range(team.size)]
        return _resized(ops.concatenate(outputs), ops.shape(rows)[0])


def _resized(rows, size):
    """The first `size` rows, with zeros after the last."""
    rows = rows[:size]
    num_rows, *shape = ops.shape(rows)
    zeros = ops.zeros((size - num_rows, *shape), rows.dtype)
    return ops.concatenate([rows, zeros])


def _experts_of_rows(group_sizes, num_rows):
    """The expert of each row, `(num_rows,)`; `E` after the last group."""
    ends = ops.cumsum(group_sizes)
    rows = ops.arange(num_rows, dtype="int32")
    return ops.searchsorted(ends, rows, side="right")
