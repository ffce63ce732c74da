"""A whole bank of feed-forward experts as one operation."""

from keras_moe import backend


def fused_experts(
    tokens, row_weights, choices, group_sizes, kernels, biases, join_hidden
):
    """Dispatch, feed-forward experts and combine in one operation.

    ```
    x      = tokens[choices[n] % T]
    h      = join_hidden(x @ kernels[0][g] + biases[0][g], ...)
    y[n]   = h @ kernels[-1][g] + biases[-1][g]
    out[t] = sum over the rows n of t of row_weights[n] * y[n]
    ```

    for each row `n` of a group `g`. The result is the same as of `dispatch`, a
    grouped matmul for each kernel, and `combine`. But rows are not copied, and
    only the products with all kernels but the last are kept for the gradient.

    Args:
        tokens: `(T, D)`.
        row_weights: `(N,)` float32 or float64.
        choices: `(N,)` int32, a permutation of `range(N)`, `N = T * K`.
        group_sizes: `(E,)` int32, with a sum of at most `N`. Rows after the
            last group are not used.
        kernels: tuple of tensors `(E, D, F)` and a last one `(E, F, O)`, of the
            dtype of the tokens.
        biases: tuple of the same length, of tensors `(E, F)` and `(E, O)`, or
            `None`.
        join_hidden: Function from the products with the hidden kernels to the
            hidden layer `(n, F)`, row by row, in `keras.ops`, without
            variables.

    Returns:
        `(T, O)`, summed in float32, in the dtype of the tokens. `None` if no
        implementation can run.
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
