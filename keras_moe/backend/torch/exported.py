"""What `torch.export` can take: the experts' rows picked out one by one.

The fast kernels lay rows out in NumPy, or slice where the data say. A program
that is exported knows no data. It picks the rows of each expert out by their
number, which may be any, and computes those alone: the products are as few as
ever, but there are some ten small operations for each expert, with rows or
without. Everything is PyTorch's own, so that whoever loads the program does
without this library.
"""

import torch


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
        out = out.index_add(0, token, y)
    return out.to(tokens.dtype)


def _dense(x, kernel, bias):
    return x @ kernel if bias is None else torch.addmm(bias, x, kernel)


def _rows(x, group_sizes):
    """Yields the indices of the rows of each group."""
    ends = torch.cumsum(group_sizes, 0)
    number = torch.arange(x.shape[0], device=x.device)
    group = torch.searchsorted(ends, number, right=True)
    for index in range(len(group_sizes)):
        yield torch.nonzero(group == index)[:, 0]
