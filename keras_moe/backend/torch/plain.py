"""The kernels in plain PyTorch, to be exported or differentiated twice.

The fast kernels lay out rows in NumPy, or slice by data. An exported program
has no data yet. Here the rows of each expert are picked out by their
index, and those alone are computed: the number of products is the same, but
each expert costs some ten small operations, with rows or without. All
operations are PyTorch's own, so that whoever loads an exported program does
without this library, and autograd can differentiate them as often as asked.
"""

import torch


def is_exporting():
    """Whether by `torch.export` or, as Keras does for ONNX, by tracing."""
    return torch.compiler.is_exporting() or torch.jit.is_tracing()


def gradients(function, inputs, needed, d_out):
    """The gradients of a function's inputs, which autograd can differentiate.

    Called in the backward pass of an `autograd.Function` where the caller asked
    for `create_graph=True`: the gradients of a fast kernel would be constants.

    Args:
        function: `function(*inputs)`, in plain PyTorch.
        inputs: Tensors, or `None`, as `ctx.saved_tensors` returns them.
        needed: A bool for each of the inputs.
        d_out: Gradient of the output.

    Returns:
        A gradient for each of the inputs, `None` where it is not needed.
    """
    # Views, so that only what the function makes of an input counts, and not
    # where another input was made from the same tensors.
    inputs = [
        x.view_as(x) if needs else x
        for x, needs in zip(inputs, needed, strict=True)
    ]
    wanted = [x for x, needs in zip(inputs, needed, strict=True) if needs]
    out = function(*inputs)
    if not out.requires_grad:  # an activation without a slope, say
        return [
            torch.zeros_like(x) if needs else None
            for x, needs in zip(inputs, needed, strict=True)
        ]
    found = iter(
        torch.autograd.grad(
            out, wanted, d_out, create_graph=True, materialize_grads=True
        )
    )
    return [next(found) if needs else None for needs in needed]


def grouped_matmul(lhs, rhs, group_sizes):
    out = lhs.new_zeros(lhs.shape[0], rhs.shape[2])
    for rows, kernel in zip(_rows(lhs, group_sizes), rhs, strict=True):
        out = out.index_copy(0, rows, lhs[rows] @ kernel)
    return out


def fused_experts(
    tokens, row_weights, choices, group_sizes, kernels, biases, hidden
):
    dtype = torch.promote_types(tokens.dtype, torch.float32)
    out = tokens.new_zeros(tokens.shape[0], kernels[-1].shape[2], dtype=dtype)
    row_weights = row_weights.to(dtype)
    num_tokens = tokens.shape[0]
    if isinstance(num_tokens, int):  # not symbolic
        num_tokens = max(num_tokens, 1)
    token_of_row = choices % num_tokens
    for expert, rows in enumerate(_rows(choices, group_sizes)):
        token = token_of_row[rows]
        layers = [
            (kernel[expert], None if bias is None else bias[expert])
            for kernel, bias in zip(kernels, biases, strict=True)
        ]
        x = tokens[token]
        h = hidden(*(_dense(x, *layer) for layer in layers[:-1]))
        y = _dense(h, *layers[-1]).to(dtype) * row_weights[rows, None]
        out = add_rows(out, token, y)
    return out.to(tokens.dtype)


def add_rows(x, indices, rows):
    """`x.index_add(0, indices, rows)`.

    In ONNX that would forget the first of two rows with the same index.
    """
    indices = indices.long().reshape(-1, *(1,) * (rows.dim() - 1))
    return x.scatter_add(0, indices.expand_as(rows), rows)


def _dense(x, kernel, bias):
    return x @ kernel if bias is None else torch.addmm(bias, x, kernel)


def _rows(x, group_sizes):
    """Yields the indices of the rows of each group."""
    ends = torch.cumsum(group_sizes, 0)
    number = torch.arange(x.shape[0], device=x.device)
    for size, end in zip(group_sizes, ends, strict=True):
        inside = (number >= end - size) & (number < end)
        yield torch.nonzero(inside)[:, 0]
