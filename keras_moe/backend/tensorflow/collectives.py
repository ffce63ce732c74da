"""Sums over the replicas of a strategy, inside the forward pass.

The replicas of a `MirroredStrategy` are threads that trace one graph, and share
Keras' layers with their lists of losses. TensorFlow's own way to add up over
replicas stops a thread until the others have come as far: a replica then finds
the losses of another in the list. Here each replica adds an operation to the
graph instead, and none waits while it is traced.

Only the first version of TensorFlow's collective operations will do. Those of
the second are run in the order in which they were traced, so that the first
replica would wait for ever for the second.
"""

import threading
import weakref

import tensorflow as tf

from keras_moe.backend.tensorflow.groups import compiles_with_xla

# Strategies number their own groups from 1.
FIRST_GROUP_KEY = 1 << 20
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


def reduce(tensor, context, operation="Add"):
    """The sum, or with `"Max"` the largest, of the replicas' tensors."""
    if len(context.strategy.extended.worker_devices) == 1:
        # One replica for each worker or, on a TPU, one trace for all.
        name = {"Add": "SUM"}[operation]
        return context.all_reduce(name, tensor)
    return tf.raw_ops.CollectiveReduce(
        input=tensor,
        merge_op=operation,
        final_op="Id",
        subdiv_offsets=[0],
        **_keys(context),
    )


def gather(tensor, context):
    """The tensors of all replicas, which have one shape: `(R, ...)`."""
    size = context.num_replicas_in_sync
    return tf.raw_ops.CollectiveGather(
        input=tensor[tf.newaxis], shape=(size, *tensor.shape), **_keys(context)
    )


def _keys(context):
    """Attributes that tell TensorFlow which operations belong together."""
    _check_compiled()
    size = context.num_replicas_in_sync
    devices = context.strategy.extended.worker_devices
    with _lock:
        group = _group_keys.setdefault(
            devices, FIRST_GROUP_KEY + len(_group_keys)
        )
        trace = _traces.setdefault(_outermost_graph(), _Trace())
        instance = trace.instance_key(context)
    return {
        "group_size": size,
        "group_key": group,
        "instance_key": instance,
        "communication_hint": "ring",
    }


class _Trace:
    """The keys of a graph: the n-th of one replica is the n-th of each."""

    def __init__(self):
        self._keys = []
        self._used = {}  # replica -> int

    def instance_key(self, context):
        global _last_instance_key
        replica = int(tf.get_static_value(context.replica_id_in_sync_group))
        n = self._used.get(replica, 0)
        self._used[replica] = n + 1
        if n == len(self._keys):
            # Never used again, as operations of one key have one shape.
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
