"""Grouped matmuls.

`grouped_mm` is PyTorch's own, used where its rules for dtype, alignment and
device allow. `expert_loop` is one product per group, written in place into the
result.
"""

import torch

from keras_moe.backend.torch import plain


def _clear_rows_of_no_group(out, ends):
    if out.device.type == "cpu":
        out[int(ends[-1]) :] = 0
        return out
    # Reading the count would make the device wait.
    row = torch.arange(out.shape[0], device=out.device)
    return out.masked_fill_((row >= ends[-1])[:, None], 0)


# Its shape rule for torch.compile knows bfloat16 only. The backward pass, which
# autograd calls, has to be kept from the compiler on its own.
@torch.compiler.disable
def _product(lhs, rhs, ends):
    return torch.nn.functional.grouped_mm(lhs, rhs, offs=ends)


def _differentiable(ctx, lhs, rhs, group_sizes, grad):
    d_lhs, d_rhs = plain.gradients(
        lambda lhs, rhs: plain.grouped_matmul(lhs, rhs, group_sizes),
        (lhs, rhs),
        ctx.needs_input_grad[:2],
        grad,
    )
    return d_lhs, d_rhs, None


class _GroupedMM(torch.autograd.Function):
    @staticmethod
    def forward(ctx, lhs, rhs, ends):
        ctx.save_for_backward(lhs, rhs, ends)
        out = _product(lhs, rhs, ends)
        return _clear_rows_of_no_group(out, ends)

    # Its own gradient leaves rows of no group uninitialized.
    @staticmethod
    def backward(ctx, grad):
        lhs, rhs, ends = ctx.saved_tensors
        if torch.is_grad_enabled():  # by `create_graph=True`
            sizes = torch.diff(ends, prepend=ends.new_zeros(1))
            return _differentiable(ctx, lhs, rhs, sizes, grad)
        grad = grad.contiguous()  # an expanded gradient is refused
        d_lhs = d_rhs = None
        if ctx.needs_input_grad[0]:
            d_lhs = _product(grad, rhs.transpose(1, 2), ends)
            d_lhs = _clear_rows_of_no_group(d_lhs, ends)
        if ctx.needs_input_grad[1]:
            d_rhs = _product(lhs.t(), grad, ends)
        return d_lhs, d_rhs, None


def refusal(rhs_shape, dtype):
    """Why `grouped_mm` takes no such operands on any device, or `None`."""
    if dtype not in ("float32", "bfloat16", "float16"):
        return f"dtype {dtype} is not supported"
    alignment = 16 // getattr(torch, dtype).itemsize
    if rhs_shape[1] % alignment or rhs_shape[2] % alignment:
        return "rows are not multiples of 16 bytes"
    return None


def grouped_mm(lhs, rhs, group_sizes):
    if plain.is_exporting():
        raise NotImplementedError("its shape rule knows bfloat16 only")
    return _grouped_mm(lhs, rhs, group_sizes)


@torch.compiler.disable
def _grouped_mm(lhs, rhs, group_sizes):
    reason = refusal(rhs.shape, str(lhs.dtype).removeprefix("torch."))
    if reason:
        raise NotImplementedError(reason)
    if lhs.shape[0] == 0:
        raise NotImplementedError("no rows")
    if lhs.device.type == "cuda":
        if lhs.dtype != torch.bfloat16:
            raise NotImplementedError(f"dtype {lhs.dtype} on CUDA")
        if torch.cuda.get_device_capability(lhs.device) < (8, 0):
            raise NotImplementedError("CUDA compute capability below 8.0")
    elif lhs.device.type != "cpu":
        raise NotImplementedError(f"device {lhs.device.type}")
    ends = torch.cumsum(group_sizes, 0, dtype=torch.int32)
    return _GroupedMM.apply(lhs.contiguous(), rhs.contiguous(), ends)


def _slices(sizes):
    start = 0
    for group, size in enumerate(sizes):
        if size:
            yield group, slice(start, start + size)
        start += size


def _matmul_rows(lhs, rhs, sizes):
    out = lhs.new_empty((lhs.shape[0], rhs.shape[2]))
    for group, rows in _slices(sizes):
        torch.mm(lhs[rows], rhs[group], out=out[rows])
    out[sum(sizes) :] = 0
    return out


class _ExpertLoop(torch.autograd.Function):
    @staticmethod
    def forward(ctx, lhs, rhs, sizes):
        ctx.save_for_backward(lhs, rhs)
        ctx.sizes = sizes
        return _matmul_rows(lhs, rhs, sizes)

    @staticmethod
    def backward(ctx, grad):
        lhs, rhs = ctx.saved_tensors
        if torch.is_grad_enabled():  # by `create_graph=True`
            sizes = torch.tensor(ctx.sizes, device=lhs.device)
            return _differentiable(ctx, lhs, rhs, sizes, grad)
        d_lhs = d_rhs = None
        if ctx.needs_input_grad[0]:
            d_lhs = _matmul_rows(grad, rhs.transpose(1, 2), ctx.sizes)
        if ctx.needs_input_grad[1]:
            d_rhs = torch.zeros_like(rhs)
            for group, rows in _slices(ctx.sizes):
                torch.mm(lhs[rows].t(), grad[rows], out=d_rhs[group])
        return d_lhs, d_rhs, None


def expert_loop(lhs, rhs, group_sizes):
    if plain.is_exporting():
        return plain.grouped_matmul(lhs, rhs, group_sizes)
    return _expert_loop(lhs, rhs, group_sizes)


@torch.compiler.disable  # the sizes of the slices are data
def _expert_loop(lhs, rhs, group_sizes):
    if lhs.device.type == "meta":
        raise NotImplementedError("meta tensors have no group sizes")
    return _ExpertLoop.apply(lhs, rhs, group_sizes.tolist())
