"""A whole bank of feed-forward experts, from tokens to tokens.

One loop over blocks of rows does everything: it fetches the tokens of a block,
multiplies them with the kernels of its expert, and adds the results to the
tokens they belong to. The rows are never gathered as a whole and the kernels
are read once a block. What the backward pass needs is little, since fresh
memory costs as much as products: the inputs, and what the hidden kernels gave.

Rows that are not a block's own get a token number beyond the last, so that
adding to the tokens drops them; additions follow the order of the rows.
"""

import functools
from typing import Any
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from keras_moe.backend.jax import blocks


class _Block(NamedTuple):
    group: Any  # ()
    first: Any  # (), its first row
    own: Any  # (R,) bool
    token: Any  # (R,) int32, T for rows that are not its own
    weight: Any  # (R,), zero for rows that are not its own

    def tokens_of(self, x):
        """`(T, D)` -> `(R, D)`; rows that are not its own get the last."""
        return x.at[self.token].get(mode="clip")

    def add_to_tokens(self, x, rows):
        return x.at[self.token].add(rows, mode="drop")


def _for_each_block(body, carry, token_of_row, row_weights, group_sizes, T):
    for size, num_blocks, locate in blocks.loops(
        group_sizes, row_weights.shape[0]
    ):

        def step(i, carry, size=size, locate=locate):
            group, first, own = locate(i)
            token = blocks.read_rows(token_of_row, first, size)
            weight = blocks.read_rows(row_weights, first, size)
            return body(
                carry,
                _Block(
                    group,
                    first,
                    own,
                    jnp.where(own, token, T),
                    blocks.keep_own(weight, own),
                ),
            )

        carry = lax.fori_loop(0, num_blocks, step, carry)
    return carry


def _add_bias(x, bias, group):
    return x if bias is None else x + blocks.of_group(bias, group)


def _forward(hidden, keep, tokens, row_weights, kernels, biases, plan):
    """The outputs and, with `keep`, the products of the hidden kernels."""
    choices, group_sizes = plan
    num_tokens, dtype = tokens.shape[0], tokens.dtype
    *hidden_kernels, last_kernel = kernels
    *hidden_biases, last_bias = biases
    out = jnp.zeros(
        (num_tokens, last_kernel.shape[2]), blocks.accumulation_dtype(dtype)
    )
    products = [
        jnp.zeros((row_weights.shape[0], kernel.shape[2]), dtype)
        for kernel in (hidden_kernels if keep else ())
    ]

    def body(carry, block):
        out, products = carry
        group = block.group
        x = block.tokens_of(tokens)
        p = [
            _add_bias(
                blocks.matmul(x, blocks.of_group(kernel, group)), bias, group
            ).astype(dtype)
            for kernel, bias in zip(hidden_kernels, hidden_biases, strict=True)
        ]
        products = [
            blocks.write_rows(kept, rows, block.first, block.own)
            for kept, rows in zip(products, p if keep else (), strict=True)
        ]
        y = blocks.matmul(hidden(*p), blocks.of_group(last_kernel, group))
        y = _add_bias(y, last_bias, group) * block.weight[:, None]
        return block.add_to_tokens(out, y.astype(out.dtype)), products

    out, products = _for_each_block(
        body,
        (out, products),
        choices % num_tokens,
        row_weights,
        group_sizes,
        num_tokens,
    )
    return out.astype(dtype), products


def _backward(hidden, residuals, d_out):
    tokens, row_weights, kernels, biases, plan, products = residuals
    choices, group_sizes = plan
    num_tokens, dtype = tokens.shape[0], tokens.dtype
    sum_dtype = blocks.accumulation_dtype(dtype)

    def body(carry, block):
        d_tokens, d_weights, d_kernels, d_biases = carry
        group, own, size = block.group, block.own, block.own.shape[0]
        weight = block.weight[:, None]
        *hidden_kernels, last_kernel = (
            blocks.of_group(kernel, group) for kernel in kernels
        )
        x = blocks.keep_own(block.tokens_of(tokens), own)
        d_y = blocks.keep_own(block.tokens_of(d_out), own)
        p = [blocks.read_rows(rows, block.first, size) for rows in products]
        h, d_hidden = jax.vjp(hidden, *p)

        # `d_y` is yet to be multiplied by the weight: so the gradient of the
        # weight needs no output of the expert.
        d_h = blocks.matmul(d_y, last_kernel, rhs_axis=1)
        d_weight = jnp.sum(h.astype(sum_dtype) * d_h, axis=1)
        if biases[-1] is not None:
            d_weight += jnp.sum(_add_bias(0, biases[-1], group) * d_y, axis=1)
        d_weights = blocks.write_rows(
            d_weights, d_weight.astype(d_weights.dtype), block.first, own
        )

        d_p = [
            blocks.keep_own(rows, own)
            for rows in d_hidden((weight * d_h).astype(dtype))
        ]
        weighted_h = blocks.keep_own((weight * h).astype(dtype), own)
        pairs = [(x, rows) for rows in d_p] + [(weighted_h, d_y)]
        d_kernels = [
            blocks.add_to_group(d, blocks.matmul(a, b, lhs_axis=0), group)
            for d, (a, b) in zip(d_kernels, pairs, strict=True)
        ]
        # In the accumulation dtype, which the weight is not less than.
        rows = [*d_p, weight * d_y]
        d_biases = [
            d
            if d is None
            else blocks.add_to_group(
                d, jnp.sum(r, axis=0, dtype=sum_dtype), group
            )
            for d, r in zip(d_biases, rows, strict=True)
        ]
        d_x = sum(
            blocks.matmul(rows, kernel, rhs_axis=1)
            for rows, kernel in zip(d_p, hidden_kernels, strict=True)
        )
        d_tokens = block.add_to_tokens(d_tokens, d_x)
        return d_tokens, d_weights, d_kernels, d_biases

    def zeros(x):
        return jnp.zeros(x.shape, sum_dtype)

    carry = (
        zeros(tokens),
        jnp.zeros_like(row_weights),
        [zeros(kernel) for kernel in kernels],
        [None if bias is None else zeros(bias) for bias in biases],
    )
    gradients = _for_each_block(
        body,
        carry,
        choices % num_tokens,
        row_weights,
        group_sizes,
        num_tokens,
    )
    d_tokens, d_weights, d_kernels, d_biases = jax.tree.map(
        lambda d, x: d.astype(x.dtype),
        gradients,
        (tokens, row_weights, list(kernels), list(biases)),
    )
    return d_tokens, d_weights, tuple(d_kernels), tuple(d_biases), None


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _row_blocks(hidden, *inputs):
    return _forward(hidden, False, *inputs)[0]


def _row_blocks_forward(hidden, *inputs):
    out, products = _forward(hidden, True, *inputs)
    return out, (*inputs, products)


_row_blocks.defvjp(_row_blocks_forward, _backward)
# Outside of a jit the loops would otherwise be traced anew at each call, as
# they are if `hidden` is another function each time.
_row_blocks_compiled = jax.jit(_row_blocks, static_argnums=0)


def row_blocks(
    tokens, row_weights, choices, group_sizes, kernels, biases, hidden
):
    num_tokens, num_rows = tokens.shape[0], row_weights.shape[0]
    if blocks.platform_of(tokens) != "cpu":
        # Elsewhere additions to the same token happen in any order, and the
        # many small steps are (a guess, not measured) slower than few large.
        raise NotImplementedError("`row_blocks` of experts is for CPU.")
    if not isinstance(num_rows, int):  # to be exported
        row_weights, choices = map(blocks.pad, (row_weights, choices))
    elif num_rows == 0:  # no block of at least one row exists
        return jnp.zeros((num_tokens, kernels[-1].shape[2]), tokens.dtype)
    return _row_blocks_compiled(
        hidden,
        tokens,
        row_weights,
        tuple(kernels),
        tuple(biases),
        (choices, group_sizes),
    )
