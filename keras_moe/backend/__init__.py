"""The only folder that names jax, tensorflow or torch.

The packages `jax`, `tensorflow` and `torch` define the same names. The package
of the active Keras backend is re-exported here:

- `GROUPED_MATMUL`: implementations of the grouped matmul by name. Each takes
  `(lhs, rhs, group_sizes)` and raises `NotImplementedError` when the arguments,
  the device or the execution mode are not for it.
- `REMAT_SCOPE_TAKES_ARGUMENTS`: bool. Whether `keras.RematScope` calls a layer
  with `training` as it is.
- `best_first(lhs)`: the names to try on the device of `lhs`, best first.
- `refusal(implementation, rhs_shape, dtype)`: why this grouped matmul never
  takes these operands, on any device, as a str, or `None`.
- `FUSED_EXPERTS`: implementations by name of a whole bank of feed-forward
  experts, which copy no rows and keep less for the backward pass. Each takes
  the arguments of `ops.fused_experts`. The dict may be empty.
- `top_k_indices(scores, k)`: indices of the `k` largest entries of the last
  axis in descending order, ties to the lower index.
- `take_chosen(x, indices)`: `take_along_axis` along the last axis; the other
  axes are the same in both.
- `take(x, indices, axis=0)`: as in `keras.ops`, for a vector of indices that
  are all in range.
- `stable_argsort(keys, num_keys)`: the order that sorts whole numbers from 0 to
  `num_keys - 1`, `(N,)` int32, stable.
- `segment_sum(data, segment_ids, num_segments)`: as in `keras.ops`, for ids
  that are all in range.
- `size_tensor(size)`: the size of an axis as an int32 scalar, also if it is
  symbolic.
- `with_gradient(forward, backward, inputs, constants)`: `forward(*inputs,
  *constants)` with the gradients `backward(d_out, *inputs, *constants)`, one
  for each of the inputs.
- `is_symbolic(tensor)`: whether the tensor has no value yet (it is traced).
- `has_no_values(tensor)`: whether the tensor has only a shape and a dtype
  (torch's meta device), so that results are discarded.
- `jacobian(function, values)`: the gradients of each entry of
  `function(values)`, `(T,)`, as `T` lists with a gradient for each of `values`,
  a list of tensors; zeros where there is no dependence.
- `all_reduce_sum(tensor)`: the sum over the `R` replicas that train together,
  the same on each. Its gradient is `R` times the gradient of the sum: each
  replica computes the same loss from it, and training averages gradients over
  replicas. `tensor` itself if there is one device, or one program for all.
- `world_size()`: `R`, the number of replicas whose tensors `all_reduce_sum`
  adds up, an int.
- `sum_over_processes(tensor)`: the sum over those replicas that have variables
  of their own, without a gradient; the tensor where variables are shared or
  added up when they are read.
- `on_gradient(tensor, notice)`: the tensor; `notice()` is called when a
  gradient is computed through it (in compiled steps: when they are traced).
  `None` if gradients cannot be observed.
- `slice_bounds(group_sizes)`: where the rows of each group start and stop, as
  a list of pairs for slices, ints if known. `None` if shapes must be static and
  slices cannot depend on data.
- `num_replicas(model)`: the number of replicas that share each batch and sum
  their gradients.
- `window(images, starts, spans, strides)`: `images[:, rows, columns]` of images
  `(B, height, width, C)`, where rows and columns are
  `start : start + span : stride`.
- `depthwise_conv(images, kernels, strides, dilation_rate)`: a convolution of
  each channel of each image `(B, height, width, C)` with a kernel of its own,
  `(B, kernel height, kernel width, filters)`, without padding. `None` if
  products for each position of the kernels are faster, or it cannot do it.

What crosses devices differs too much for names in common: `batch_sharding`,
`device_index`, `exchange_rows`, `per_device` and `sum_over` are JAX's alone
(jax/collectives.py); the engines of PyTorch and TensorFlow in `distribution`
take the `collectives` of their own package.

`reference.py` needs `keras.ops` alone and is always tried last.
"""

import keras

from keras_moe.backend import reference

if keras.config.backend() == "jax":
    from keras_moe.backend import jax as native
elif keras.config.backend() == "tensorflow":
    from keras_moe.backend import tensorflow as native
elif keras.config.backend() == "torch":
    from keras_moe.backend import torch as native
else:
    raise ImportError(
        "keras_moe runs on the Keras backends 'jax', 'tensorflow' and 'torch'. "
        f"Received: KERAS_BACKEND={keras.config.backend()!r}"
    )

GROUPED_MATMUL = {
    **native.GROUPED_MATMUL,
    "reference": reference.grouped_matmul,
}
FUSED_EXPERTS = native.FUSED_EXPERTS
REMAT_SCOPE_TAKES_ARGUMENTS = native.REMAT_SCOPE_TAKES_ARGUMENTS
# The names on all backends.
KNOWN_GROUPED_MATMULS = (
    "row_blocks",
    "expert_loop",
    "grouped_mm",
    "ragged_dot",
    "reference",
)


def best_first(lhs):
    return (*native.best_first(lhs), "reference")


take_chosen = native.take_chosen
take = native.take
top_k_indices = native.top_k_indices
segment_sum = native.segment_sum
size_tensor = native.size_tensor
stable_argsort = native.stable_argsort
with_gradient = native.with_gradient
refusal = native.refusal
has_no_values = native.has_no_values
jacobian = native.jacobian
is_symbolic = native.is_symbolic
all_reduce_sum = native.all_reduce_sum
world_size = native.world_size
sum_over_processes = native.sum_over_processes
slice_bounds = native.slice_bounds
on_gradient = native.on_gradient
num_replicas = native.num_replicas
window = native.window
depthwise_conv = native.depthwise_conv

if keras.config.backend() == "jax":
    batch_sharding = native.batch_sharding
    device_index = native.device_index
    exchange_rows = native.exchange_rows
    per_device = native.per_device
    sum_over = native.sum_over
