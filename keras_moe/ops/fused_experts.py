"""Fused kernels for a whole bank of experts."""

from keras_moe import backend


def fused_experts(
    tokens, row_weights, choices, group_sizes, kernels, biases, join_hidden
):
    """A whole bank of feed-forward experts, from tokens to tokens.

    ```
    x      = tokens[choices[n] % T]
    h      = join_hidden(x @ kernels[0][g] + biases[0][g], ...)
    y[n]   = h @ kernels[-1][g] + biases[-1][g]
    out[t] = sum over the rows n of t of row_weights[n] * y[n]
    ```

    for each row `n` of a group `g`. It is what `dispatch`, a grouped matmul for
    each kernel, and `combine` give. But no row is copied, and what is kept for
    the gradient are the products with all kernels but the last.

    Args:
        tokens: `(T, D)`.
        row_weights: `(N,)` float32 or float64.
        choices: `(N,)` int32, a permutation of `range(N)`, `N = T * K`.
        group_sizes: `(E,)` int32, with a sum of at most `N`. Rows after the
            last group count for nothing.
        kernels: tuple of tensors `(E, D, F)` and a last one `(E, F, O)`, of the
            dtype of the tokens.
        biases: tuple as long, of tensors `(E, F)` and `(E, O)`, or `None`.
        join_hidden: Makes the hidden layer `(n, F)` of its products with the
            kernels, each row by itself, in `keras.ops`, without variables.

    Returns:
        `(T, O)`, in the dtype of the tokens; summed in float32. `None` where
        no implementation can run.
    """
    for candidate in backend.FUSED_EXPERTS.values():
        try:
            return candidate(
                tokens,
                row_weights,
                choices,
                group_sizes,
                kernels,
                biases,
                join_hidden,
            )
        except NotImplementedError:
            continue
    return None
