"""Sums and exchanges over the replicas of a strategy, inside the forward pass.

The replicas of a `MirroredStrategy` are threads that trace one graph, and share
Keras' layers with their lists of losses. TensorFlow's own way to add up over
replicas stops a thread until the others have come as far: a replica then finds
the losses of another in the list. Here each replica adds an operation to the
graph instead, and none waits while it is traced.

Only the first version of TensorFlow's collective operations will do. Those of
the second are run in the order in which they were traced, so that the first
replica would wait for ever for the second.
"""

import itertools
import threading
import weakref

import numpy as np
import tensorflow as tf

from keras_moe.backend.tensorflow.groups import compiles_with_xla

# Strategies number their own groups from 1.
FIRST_GROUP_KEY = 1 << 20
# Of all traces. Each call takes another multiple of it, below 2 ** 31: enough
# for a million steps.
MOST_KEYS = 1 << 11
_lock = threading.Lock()
_group_keys = {}  # devices -> int
_traces = weakref.WeakKeyDictionary()  # graph -> _Trace
_last_instance_key = 0


def replica_context():
    """The replica that is traced or run now; `None` if there is one alone."""
    context = tf.distribute.get_replica_context()
    if context is None or context.num_replicas_in_sync == 1:
        return None
    return context


def workers(strategy):
    """`(number of worker processes, which of them this is)`."""
    resolver = strategy.cluster_resolver
    cluster = resolver.cluster_spec() if resolver else None
    number = cluster.num_tasks("worker") if cluster else 1
    # A TPU strategy has one process, whatever its hosts.
    if number == 1 or isinstance(strategy, tf.distribute.TPUStrategy):
        return 1, 0
    return number, resolver.task_id


class Team:
    """Some replicas of a strategy, and which of them this one is.

    Args:
        context: As `replica_context` returns it.
        size: int. Number of replicas of a team, next to each other. A divisor
            of the number of all; `None` for all.
    """

    def __init__(self, context, size=None):
        self._context = context
        self.size = size or context.num_replicas_in_sync
        devices = context.strategy.extended.worker_devices
        # One trace for all replicas, or one replica for each worker.
        self.is_tpu = isinstance(context.strategy, tf.distribute.TPUStrategy)
        self._is_alone = self.is_tpu or len(devices) == 1
        number = context.num_replicas_in_sync
        if self.size < number and (self._is_alone or len(devices) < number):
            raise NotImplementedError(
                "On TPUs, and with several workers, all replicas exchange with "
                f"each other. Received: {number} replicas in teams of "
                f"{self.size}"
            )
        if self._is_alone:
            self._replica, self._devices = 0, ("workers",)
            self.rank = context.replica_id_in_sync_group
            return
        self._replica = int(
            tf.get_static_value(context.replica_id_in_sync_group)
        )
        self.rank = self._replica % self.size
        first = self._replica - self.rank
        self._devices = devices[first : first + self.size]

    def sum(self, tensor):
        """The sum of the replicas' tensors. It has no gradient."""
        if self._is_alone:
            return self._context.all_reduce("SUM", tensor)
        return tf.raw_ops.CollectiveReduce(
            input=tensor,
            merge_op="Add",
            final_op="Id",
            subdiv_offsets=[0],
            **self._keys(),
        )

    def gather(self, tensor):
        """The tensors of all, `(S, ...)`, of one shape and not empty."""
        tensor = tensor[tf.newaxis]
        shape = (self.size, *tensor.shape[1:])
        if self._is_alone:
            gathered = self._context.all_gather(tensor, axis=0)
            return tf.ensure_shape(gathered, shape)
        return tf.raw_ops.CollectiveGather(
            input=tensor, shape=shape, **self._keys()
        )

    def exchange(self, blocks):
        """Sends block `i` to replica `i`: `(S, n, ...)` -> `(S, n, ...)`.

        Block `i` of the result comes from replica `i`. Gradients travel back
        in the same way.
        """

        @tf.custom_gradient
        def call(blocks):
            return self._exchange(blocks), self._exchange

        return call(blocks)

    def _exchange(self, blocks):
        if self.is_tpu or not self._is_alone:
            return self.gather(blocks)[:, self.rank]
        keys = self._keys()
        # Blocks have another size at each call, and so must have another key.
        calls, first = itertools.count(), keys["instance_key"]
        if first >= MOST_KEYS:
            raise NotImplementedError(
                "Workers exchange rows in at most 2048 places of all steps "
                f"that were traced. Received: {first}"
            )
        key = tf.numpy_function(
            lambda: np.int32(first + MOST_KEYS * next(calls)), [], tf.int32
        )
        return tf.raw_ops.CollectiveAllToAllV2(
            input=blocks,
            group_size=self.size,
            group_key=keys["group_key"],
            instance_key=key,
            ordering_token=[],
        )

    def _keys(self):
        """Attributes that tell TensorFlow which operations belong together."""
        _check_compiled()
        with _lock:
            group = _group_keys.setdefault(
                self._devices, FIRST_GROUP_KEY + len(_group_keys)
            )
            trace = _traces.setdefault(_outermost_graph(), _Trace())
            instance = trace.instance_key(self._replica)
        return {
            "group_size": self.size,
            "group_key": group,
            "instance_key": instance,
            "communication_hint": "ring",
        }


class _Trace:
    """The keys of a graph: the n-th of one replica is the n-th of each."""

    def __init__(self):
        self._keys = []
        self._used = {}  # replica -> int

    def instance_key(self, replica):
        global _last_instance_key
        n = self._used.get(replica, 0)
        self._used[replica] = n + 1
        if n == len(self._keys):
            # Never used again by another trace.
            _last_instance_key += 1
            self._keys.append(_last_instance_key)
        return self._keys[n]


def _outermost_graph():
    """The graph of the compiled step, whatever branch of it is traced."""
    graph = tf.compat.v1.get_default_graph()
    while getattr(graph, "outer_graph", None) is not None:
        if not hasattr(graph.outer_graph, "outer_graph"):
            break  # what is around all functions
        graph = graph.outer_graph
    return graph


def _check_compiled():
    if tf.executing_eagerly() or compiles_with_xla():
        how = "XLA" if compiles_with_xla() else "run_eagerly=True"
        raise NotImplementedError(
            "The replicas of a TensorFlow strategy on several devices add up "
            "their routing in graphs only: compile the model with "
            "`run_eagerly=False` and `jit_compile=False`, or put "
            "`strategy.run` into a `tf.function`. "
            f"Received: {how}"
        )
