"""Fused experts for eager and graph mode: a loop over experts with rows.

What an iteration makes of an expert's rows is small enough to stay in cache.
The rows are gathered at once, since that is faster than group by group, and
once more for the backward pass rather than kept. The products are kept, in the
arrays that they were written to. A SavedModel, which holds the gradients too,
cannot hold arrays, and gets them in one piece.
"""

import tensorflow as tf

from keras_moe.backend.tensorflow.fused_experts import with_own_gradient
from keras_moe.backend.tensorflow.groups import Groups
from keras_moe.backend.tensorflow.groups import compiles_with_xla


def expert_loop(
    tokens, row_weights, choices, group_sizes, kernels, biases, hidden
):
    if compiles_with_xla():
        raise NotImplementedError("XLA needs static shapes")
    num_rows = tf.size(choices)
    groups = Groups(group_sizes, num_rows)
    num_tokens = tf.shape(tokens)[0]
    # Without tokens this would be a division by zero.
    top_k = num_rows // tf.maximum(num_tokens, 1)
    token_of_row = choices % tf.maximum(num_tokens, 1)
    row_of_choice = tf.math.invert_permutation(choices)

    def sum_by_token(array):
        rows = tf.gather(groups.concat(array), row_of_choice)
        rows = tf.reshape(rows, (top_k, num_tokens, rows.shape[-1]))
        return tf.reduce_sum(rows, 0)

    def forward(tokens, row_weights, experts):
        x = tf.gather(tokens, token_of_row)

        def step(i, outputs, *saved):
            group, rows = groups.locate(i)
            expert = _expert(experts, group)
            products = expert.products(x[rows])
            y = tf.cast(expert.outputs(products), row_weights.dtype)
            both = zip(saved, products, strict=True)
            return (
                outputs.write(i, y * row_weights[rows, None]),
                *(array.write(i, product) for array, product in both),
            )

        *inner, last = (kernel.shape[-1] for kernel in experts.kernels)
        outputs, *saved = groups.loop(
            step,
            groups.array_of_rows(row_weights.dtype, last),
            *(groups.array_of_rows(tokens.dtype, width) for width in inner),
        )

        graph, in_one_piece = _graph(), None
        if graph is not None:
            # Never computed if they are not needed.
            in_one_piece = [groups.concat(array) for array in saved]

        def backward(d_out):
            if _graph() is graph:
                kept = [lambda i, rows, array=a: array.read(i) for a in saved]
            else:
                kept = [lambda i, rows, p=p: p[rows] for p in in_one_piece]
            return gradients(tokens, row_weights, experts, kept, d_out)

        return sum_by_token(outputs), backward

    def gradients(tokens, row_weights, experts, kept, d_out):
        x = tf.gather(tokens, token_of_row)
        d_y = tf.gather(d_out, token_of_row)

        def step(i, d_rows, d_row_weights, *d_weights):
            group, rows = groups.locate(i)
            d_x, d_row_weight, d_weight = _expert(experts, group).gradients(
                x[rows],
                d_y[rows],
                row_weights[rows],
                [products(i, rows) for products in kept],
            )
            both = zip(d_weights, d_weight, strict=True)
            return (
                d_rows.write(i, d_x),
                d_row_weights.write(i, d_row_weight),
                *(array.write(group, d) for array, d in both),
            )

        d_rows, d_row_weights, *d_weights = groups.loop(
            step,
            groups.array_of_rows(row_weights.dtype, tokens.shape[-1]),
            groups.array_of_rows(row_weights.dtype),
            *(
                groups.array_of_groups(w.dtype, w.shape[1:])
                for w in experts.weights
            ),
        )
        return (
            sum_by_token(d_rows),
            groups.concat(d_row_weights),
            [array.stack() for array in d_weights],
        )

    return with_own_gradient(
        forward, tokens, row_weights, kernels, biases, hidden
    )


def _expert(experts, index):
    # Slices of the first axis, unlike a gather, do not copy.
    return experts.with_weights([w[index] for w in experts.weights])


def _graph():
    """The function that is traced, or `None`."""
    return None if tf.executing_eagerly() else tf.compat.v1.get_default_graph()
