"""TensorFlow kernels.

For eager and graph mode there are loops over experts (`expert_loop`), whose
groups have the shapes that the data give them. For XLA, where every shape is
static, there are blocks of rows (`row_blocks`).
"""

import tensorflow as tf
from keras import ops

from keras_moe.backend.tensorflow import collectives
from keras_moe.backend.tensorflow import fused_blocks
from keras_moe.backend.tensorflow import fused_loop
from keras_moe.backend.tensorflow import grouped_matmul
from keras_moe.backend.tensorflow.groups import compiles_with_xla
from keras_moe.backend.tensorflow.groups import refuse_xla
from keras_moe.backend.tensorflow.images import depthwise_conv as depthwise_conv
from keras_moe.backend.tensorflow.images import window as window
from keras_moe.backend.tensorflow.steps import train_step as train_step
from keras_moe.backend.tensorflow.updates import (
    update_together as update_together,
)

GROUPED_MATMUL = {
    "expert_loop": grouped_matmul.expert_loop,
    "row_blocks": grouped_matmul.row_blocks,
}
FUSED_EXPERTS = {
    "expert_loop": fused_loop.expert_loop,
    "row_blocks": fused_blocks.row_blocks,
}
REMAT_SCOPE_TAKES_ARGUMENTS = False


def best_first(lhs):
    return tuple(GROUPED_MATMUL)


def refusal(implementation, rhs_shape, dtype):
    return None  # what they cannot take depends on the mode alone


def top_k_indices(scores, k):
    return tf.math.top_k(scores, k).indices


def take_chosen(x, indices):
    return ops.take_along_axis(x, indices, axis=-1)


def take(x, indices, axis=0):
    return ops.take(x, indices, axis=axis)


def stable_argsort(keys, num_keys):
    return tf.argsort(keys, stable=True)


def segment_sum(data, segment_ids, num_segments):
    return ops.segment_sum(data, segment_ids, num_segments)


def size_tensor(size):
    return tf.convert_to_tensor(size, "int32")


def with_gradient(forward, backward, inputs, constants):
    @tf.custom_gradient
    def call(*inputs):
        def gradients(grad):
            return backward(grad, *inputs, *constants)

        return forward(*inputs, *constants), gradients

    return call(*inputs)


def has_no_values(tensor):
    return False  # a traced program is run with the values later


def jacobian(function, values):
    with tf.GradientTape(persistent=True) as tape:
        losses = tf.unstack(function(values))
    rows = [
        tape.gradient(
            loss, values, unconnected_gradients=tf.UnconnectedGradients.ZERO
        )
        for loss in losses
    ]
    # The gradient of a gather is sparse.
    return [[tf.convert_to_tensor(g) for g in row] for row in rows]


def is_symbolic(tensor):
    return not tf.executing_eagerly()


def all_reduce_sum(tensor):
    context = collectives.replica_context()
    if context is None:
        return tensor
    team = collectives.Team(context)

    def backward(grad, tensor):
        return (grad * context.num_replicas_in_sync,)

    return with_gradient(team.sum, backward, (tensor,), ())


def world_size():
    context = collectives.replica_context()
    return 1 if context is None else context.num_replicas_in_sync


def sum_over_processes(tensor):
    return tensor  # variables with `aggregation="sum"` do it


def slice_bounds(group_sizes):
    if compiles_with_xla():
        return None
    if tf.executing_eagerly():
        ends = tf.cumsum(group_sizes).numpy().tolist()
        return list(zip([0, *ends[:-1]], ends, strict=True))
    group_sizes = refuse_xla(group_sizes)
    ends = tf.cumsum(group_sizes)
    starts = ends - group_sizes
    return list(zip(tf.unstack(starts), tf.unstack(ends), strict=True))


def on_gradient(tensor, notice):
    forward_graph = _graph()

    def backward(grad, tensor):
        # A SavedModel also gets gradients. They are traced as it is saved, in
        # graphs of their own.
        if _graph() is forward_graph:
            notice()
        return (grad,)

    return with_gradient(tf.identity, backward, (tensor,), ())


def _graph():
    if tf.executing_eagerly():
        return None
    return tf.compat.v1.get_default_graph()


def as_strategy(strategy=None):
    """A `tf.distribute.Strategy`: the given, the present, or all devices."""
    if strategy is not None:
        return strategy
    if tf.distribute.has_strategy():
        return tf.distribute.get_strategy()
    workers = tf.distribute.cluster_resolver.TFConfigClusterResolver()
    if workers.cluster_spec().as_dict():
        return tf.distribute.MultiWorkerMirroredStrategy()
    devices = tf.config.list_logical_devices("GPU")
    devices = devices or tf.config.list_logical_devices("CPU")
    if len(devices) == 1:
        return tf.distribute.get_strategy()  # nothing to mirror
    return tf.distribute.MirroredStrategy([device.name for device in devices])


def num_replicas(model):
    """Of the strategy that the model was made under."""
    return model.distribute_strategy.num_replicas_in_sync
