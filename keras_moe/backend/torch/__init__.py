"""PyTorch: what `keras_moe.backend` lists, and the tables of its kernels."""

import torch

from keras_moe.backend.torch import plain
from keras_moe.backend.torch.fused_experts import expert_loop as fused_loop
from keras_moe.backend.torch.grouped_matmul import expert_loop
from keras_moe.backend.torch.grouped_matmul import grouped_mm
from keras_moe.backend.torch.grouped_matmul import refusal as _refusal
from keras_moe.backend.torch.images import depthwise_conv as depthwise_conv
from keras_moe.backend.torch.images import window as window

GROUPED_MATMUL = {"grouped_mm": grouped_mm, "expert_loop": expert_loop}
FUSED_EXPERTS = {"expert_loop": fused_loop}
REMAT_SCOPE_TAKES_ARGUMENTS = True


def best_first(lhs):
    return tuple(GROUPED_MATMUL)


def refusal(implementation, rhs_shape, dtype):
    if implementation == "grouped_mm":
        return _refusal(rhs_shape, dtype)
    return None


def top_k_indices(scores, k):
    # `torch.topk` promises nothing about ties.
    return _order(scores, descending=True)[..., :k].to(torch.int32)


def take_chosen(x, indices):
    # `take_along_dim`, which may broadcast, cannot be plain.
    return torch.gather(x, -1, indices.long())


def take(x, indices, axis=0):
    # ONNX knows no `ravel`, which `ops.take` calls.
    indices = torch.as_tensor(indices, device=x.device)
    return torch.index_select(x, axis, indices)


def stable_argsort(keys, num_keys):
    return _order(keys, descending=False).to(torch.int32)


def _order(x, descending):
    if torch.jit.is_tracing():  # ONNX's own way to sort is stable
        return torch.sort(x, dim=-1, descending=descending).indices
    return torch.sort(x, dim=-1, descending=descending, stable=True).indices


def segment_sum(data, segment_ids, num_segments):
    # `ops.segment_sum` cannot be exported.
    out = data.new_zeros(num_segments, *data.shape[1:])
    if plain.is_exporting():
        return plain.add_rows(out, segment_ids, data)
    return out.index_add(0, segment_ids, data)


def size_tensor(size):
    return torch.scalar_tensor(size, dtype=torch.int32)


class _WithGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx, forward, backward, constants, *inputs):
        ctx.save_for_backward(*inputs)
        ctx.backward, ctx.constants = backward, constants
        return forward(*inputs, *constants)

    @staticmethod
    def backward(ctx, grad):
        inputs = ctx.saved_tensors
        return None, None, None, *ctx.backward(grad, *inputs, *ctx.constants)


def with_gradient(forward, backward, inputs, constants):
    if plain.is_exporting():  # the program is for inference
        return forward(*inputs, *constants)
    return _WithGradient.apply(forward, backward, constants, *inputs)


def has_no_values(tensor):
    return tensor.device.type == "meta"


def jacobian(function, values):
    rows = []
    for loss in torch.unbind(function(values)):
        if loss.requires_grad:
            row = torch.autograd.grad(
                loss, values, retain_graph=True, materialize_grads=True
            )
        else:
            row = [torch.zeros_like(v) for v in values]
        rows.append(row)
    return rows


def is_symbolic(tensor):
    return has_no_values(tensor) or plain.is_exporting()


class _AllReduceSum(torch.autograd.Function):
    @staticmethod
    def forward(ctx, tensor):
        total = tensor.detach().clone()
        torch.distributed.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx, grad):
        return grad * torch.distributed.get_world_size()


def all_reduce_sum(tensor):
    if world_size() == 1 or has_no_values(tensor):
        return tensor
    return _AllReduceSum.apply(tensor)


def world_size():
    if not torch.distributed.is_available():
        return 1
    if not torch.distributed.is_initialized():
        return 1
    return torch.distributed.get_world_size()


def sum_over_processes(tensor):
    return all_reduce_sum(tensor.detach())


def slice_bounds(group_sizes):
    return None if is_symbolic(group_sizes) else _slice_bounds(group_sizes)


@torch.compiler.disable  # the sizes of the slices are data
def _slice_bounds(group_sizes):
    ends = torch.cumsum(group_sizes, 0).tolist()
    return list(zip([0, *ends[:-1]], ends, strict=True))


def on_gradient(tensor, notice):
    if not tensor.requires_grad or torch.compiler.is_compiling():
        return None
    tensor.register_hook(lambda grad: notice())
    return tensor


def num_replicas(model):
    """No strategy splits a batch behind the back of a model here."""
    return 1
