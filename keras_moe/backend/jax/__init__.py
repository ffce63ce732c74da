"""JAX kernels."""

import jax
import jax.numpy as jnp
import keras
from jax import lax
from keras import ops

from keras_moe.backend.jax import fused_experts
from keras_moe.backend.jax import grouped_matmul
from keras_moe.backend.jax.blocks import block_sizes as block_sizes
from keras_moe.backend.jax.collectives import batch_sharding as batch_sharding
from keras_moe.backend.jax.collectives import device_index as device_index
from keras_moe.backend.jax.collectives import exchange_rows as exchange_rows
from keras_moe.backend.jax.collectives import per_device as per_device
from keras_moe.backend.jax.collectives import sum_over as sum_over
from keras_moe.backend.jax.grouped_matmul import best_first as best_first
from keras_moe.backend.jax.images import depthwise_conv as depthwise_conv
from keras_moe.backend.jax.images import window as window

GROUPED_MATMUL = {
    "row_blocks": grouped_matmul.row_blocks,
    "ragged_dot": grouped_matmul.ragged_dot,
}
FUSED_EXPERTS = {"row_blocks": fused_experts.row_blocks}
REMAT_SCOPE_TAKES_ARGUMENTS = False


def refusal(implementation, rhs_shape, dtype):
    return None  # what they cannot take depends on the mode alone


def top_k_indices(scores, k):
    distribution = keras.distribution.distribution()
    is_divided = (
        distribution is not None and distribution.device_mesh.devices.size > 1
    )
    if is_divided or not all(isinstance(size, int) for size in scores.shape):
        # Among devices, XLA gathers the scores of the whole batch for `top_k`,
        # but not to sort them. In a file that is to be exported, TensorFlow,
        # which is to load it, is usually too old for how JAX writes `top_k`
        # down.
        return jnp.argsort(scores, axis=-1, descending=True)[..., :k]
    return lax.top_k(scores, k)[1]


def take_chosen(x, indices):
    return ops.take_along_axis(x, indices, axis=-1)


def take(x, indices, axis=0):
    return ops.take(x, indices, axis=axis)


def stable_argsort(keys, num_keys):
    size = keys.shape[0]
    if not isinstance(size, int) or num_keys * size >= 2**31:
        return jnp.argsort(keys).astype("int32")
    # Sorting numbers that hold both takes a fifth of the time of sorting pairs.
    keys = keys.astype("int32") * size + jnp.arange(size, dtype="int32")
    return jnp.sort(keys) % max(size, 1)


def segment_sum(data, segment_ids, num_segments):
    return ops.segment_sum(data, segment_ids, num_segments)


def size_tensor(size):
    return jnp.asarray(size, "int32")


def with_gradient(forward, backward, inputs, constants):
    # Everything is an argument: rematerialization forbids closing over traced
    # arrays.
    @jax.custom_vjp
    def call(inputs, constants):
        return forward(*inputs, *constants)

    def call_forward(inputs, constants):
        return forward(*inputs, *constants), (inputs, constants)

    def call_backward(residuals, grad):
        inputs, constants = residuals
        return backward(grad, *inputs, *constants), None

    call.defvjp(call_forward, call_backward)
    return call(inputs, constants)


def has_no_values(tensor):
    return False  # a traced program is run with the values later


def jacobian(function, values):
    rows = jax.jacrev(function)(list(values))
    return [[row[t] for row in rows] for t in range(rows[0].shape[0])]


def is_symbolic(tensor):
    return isinstance(tensor, jax.core.Tracer)


def all_reduce_sum(tensor):
    return tensor  # one program sees the batch of all devices


def world_size():
    return 1


def sum_over_processes(tensor):
    return tensor


def slice_bounds(group_sizes):
    return None  # whatever is not compiled now will be somewhere else


def on_gradient(tensor, notice):
    def backward(grad, tensor):
        notice()
        return (grad,)

    return with_gradient(lambda x: jnp.asarray(x), backward, (tensor,), ())


def num_replicas(model):
    """No strategy splits a batch behind the back of a model here."""
    return 1
