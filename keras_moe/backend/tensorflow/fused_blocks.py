"""Fused experts for XLA, where every shape is static.

The first rows of each expert, a little more than the average expert has, are
computed for all experts at once: batched products read the weights where they
are. What has to be sliced out for a product is copied before. The rows that
some experts have beyond go through a loop over blocks of rows, whose trip
count is data, and which adds to the results in place.

Whatever depends on data is read with `tf.gather`, which for a single index is
a slice. XLA wants the bounds of TensorFlow's slices at compile time, and would
compile anew for every batch to get them.
"""

import tensorflow as tf

from keras_moe.backend.tensorflow.fused_experts import with_own_gradient


def row_blocks(
    tokens, row_weights, choices, group_sizes, kernels, biases, hidden
):
    tokens, row_weights = map(tf.convert_to_tensor, (tokens, row_weights))
    if not tokens.shape[0]:  # none, or unknown
        num_tokens = tf.shape(tokens)[0]
        some = map(_at_least_one, (tokens, row_weights, choices))
        out = _row_blocks(*some, group_sizes, kernels, biases, hidden)
        return out[:num_tokens]
    return _row_blocks(
        tokens, row_weights, choices, group_sizes, kernels, biases, hidden
    )


def _row_blocks(
    tokens, row_weights, choices, group_sizes, kernels, biases, hidden
):
    blocks = _Blocks(tf.shape(tokens)[0], choices, group_sizes)

    def forward(tokens, row_weights, experts):
        first = blocks.first
        products = experts.products(first.take_tokens(tokens))
        y = tf.cast(experts.outputs(products), row_weights.dtype)
        out = blocks.sum_by_token(y, row_weights)

        def step(i, out):
            group, rows = blocks.locate(i)
            expert = _expert(experts, group)
            y = expert.outputs(expert.products(rows.take_tokens(tokens)))
            y = rows.clean(tf.cast(y, out.dtype))
            y = y * rows.take(row_weights)[:, None]
            return (_add(out, rows.tokens, y),)

        (out,) = blocks.loop(step, out)

        def backward(d_out):
            return gradients(tokens, row_weights, experts, products, d_out)

        return out, backward

    def gradients(tokens, row_weights, experts, products, d_out):
        def of_rows(rows, experts, products):
            return experts.gradients(
                rows.take_tokens(tokens),
                rows.take_tokens(d_out),
                rows.take(row_weights),
                products,
                rows.own,
            )

        d_x, d_row_weights, d_weights = of_rows(blocks.first, experts, products)

        def step(i, d_tokens, d_row_weights, *d_weights):
            group, rows = blocks.locate(i)
            expert = _expert(experts, group)
            # Computed again: no space is kept for rows that may not exist.
            products = expert.products(rows.take_tokens(tokens))
            d_x, d_row_weight, d_weight = of_rows(rows, expert, products)
            both = zip(d_weights, d_weight, strict=True)
            return (
                _add(d_tokens, rows.tokens, d_x),
                _add(d_row_weights, rows.rows, d_row_weight),
                *(_add(d, group[None], [x]) for d, x in both),
            )

        wide = row_weights.dtype
        d_tokens, d_row_weights, *d_weights = blocks.loop(
            step,
            blocks.sum_by_token(d_x),
            blocks.by_row(d_row_weights),
            *(tf.cast(d, wide) for d in d_weights),
        )
        dtypes = [w.dtype for w in experts.weights]
        return d_tokens, d_row_weights, list(map(tf.cast, d_weights, dtypes))

    return with_own_gradient(
        forward, tokens, row_weights, kernels, biases, hidden
    )


def _expert(experts, index):
    return experts.with_weights([tf.gather(w, index) for w in experts.weights])


def _add(x, indices, updates):
    return tf.tensor_scatter_nd_add(x, indices[:, None], updates)


def _at_least_one(x):
    """Adds a row of zeros if there are none: XLA cannot gather from nothing."""
    missing = tf.cast(tf.equal(tf.shape(x)[0], 0), tf.int32)
    return tf.pad(x, [[0, missing]] + [[0, 0]] * (x.shape.rank - 1))


class _Rows:
    """Some of the rows, and places for rows that do not exist.

    Fields:
        rows: Index of each row.
        tokens: Index of its token.
        own: Whether it exists. What is taken for others is zero.
    """

    def __init__(self, rows, end, token_of_row):
        self.own = rows < end
        self.rows = tf.minimum(rows, tf.shape(token_of_row)[0] - 1)
        self.tokens = tf.gather(token_of_row, self.rows)

    def take(self, x):
        return self.clean(tf.gather(x, self.rows))

    def take_tokens(self, x):
        return self.clean(tf.gather(x, self.tokens))

    def clean(self, x):
        own = self.own
        if x.shape.rank > own.shape.rank:
            own = own[..., None]
        return tf.where(own, x, tf.zeros_like(x))


class _Blocks:
    """The first `height` rows of each group, and blocks of those beyond."""

    def __init__(self, num_tokens, choices, group_sizes):
        num_rows, num_groups = tf.shape(choices)[0], group_sizes.shape[0]
        self._num_tokens = num_tokens
        self._top_k = num_rows // num_tokens
        self._token_of_row = choices % num_tokens
        # Not `tf.math.invert_permutation`: it asks XLA for a constant, and
        # fails where that cannot tell.
        rows = tf.range(num_rows)
        self._row_of_choice = tf.scatter_nd(
            choices[:, None], rows, tf.shape(rows)
        )
        self._ends = tf.cumsum(group_sizes)
        self._starts = self._ends - group_sizes
        # Zero if there are more groups than rows: most weights stay unread.
        average = num_rows // num_groups
        spread = tf.sqrt(tf.cast(average, tf.float32))
        height = -(-(average + tf.cast(spread, tf.int32)) // 8) * 8
        self._height = height
        self.first = _Rows(
            self._starts[:, None] + tf.range(height),
            self._ends[:, None],
            self._token_of_row,
        )

        group = tf.cast(self._ends <= rows[:, None], tf.int32)  # (N, E)
        group = tf.reduce_sum(group, -1)
        in_group = rows - tf.gather(
            self._starts, tf.minimum(group, num_groups - 1)
        )
        self._is_first = (group < num_groups) & (in_group < height)
        self._place = tf.where(self._is_first, group * height + in_group, 0)

        self._size = tf.maximum(height // 4, 8)
        beyond = tf.maximum(group_sizes - height, 0)
        blocks_of_group = -(-beyond // self._size)
        self._last_block = tf.cumsum(blocks_of_group)
        self._first_block = self._last_block - blocks_of_group

    def locate(self, block):
        """The group of a block, and its rows."""
        group = tf.reduce_sum(tf.cast(self._last_block <= block, tf.int32))
        in_group = block - tf.gather(self._first_block, group)
        row = tf.gather(self._starts, group) + self._height
        rows = row + in_group * self._size + tf.range(self._size)
        end = tf.gather(self._ends, group)
        return group, _Rows(rows, end, self._token_of_row)

    def loop(self, step, *state):
        """Calls `state = step(i, *state)` for each block."""
        return tf.while_loop(
            lambda i, *state: i < self._last_block[-1],
            lambda i, *state: (i + 1, *step(i, *state)),
            (tf.constant(0), *state),
            parallel_iterations=1,
        )[1:]

    def by_row(self, x):
        """`(E, height)` -> `(N,)`, zero for all but the first rows."""
        x = tf.gather(_at_least_one(tf.reshape(x, (-1,))), self._place)
        return tf.where(self._is_first, x, tf.zeros_like(x))

    def sum_by_token(self, x, row_weights=None):
        """`(E, height, O)` -> `(T, O)`."""
        width = x.shape[-1]
        row = self._row_of_choice
        x = _at_least_one(tf.reshape(x, (-1, width)))
        x = tf.gather(x, tf.gather(self._place, row))
        is_first = tf.gather(self._is_first, row)[:, None]
        x = tf.where(is_first, x, tf.zeros_like(x))
        if row_weights is not None:
            x *= tf.gather(row_weights, row)[:, None]
        x = tf.reshape(x, (self._top_k, self._num_tokens, width))
        return tf.reduce_sum(x, 0)
