"""What can be exported: the experts' rows picked out one by one.

The fast kernels lay rows out in NumPy, or slice where the data say. A program
that is exported knows no data. It picks the rows of each expert out by their
number, which may be any, and computes those alone: the products are as few as
ever, but there are some ten small operations for each expert, with rows or
without. Everything is PyTorch's own, so that whoever loads the program does
without this library.
"""

import torch


def is_exporting():
    """Whether by `torch.export` or, as Keras does for ONNX, by tracing."""
    return torch.compiler.is_exporting() or torch.jit.is_tracing()


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
    token_of_row = choices % tokens.shape[0]
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
