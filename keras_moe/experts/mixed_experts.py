import inspect

import keras
from keras import ops

from keras_moe import backend
from keras_moe.checks import is_int
from keras_moe.experts.experts import PlainExperts
from keras_moe.experts.grouped_rows import bounds
from keras_moe.experts.grouped_rows import spread


@keras.saving.register_keras_serializable("keras_moe")
class MixedExperts(PlainExperts):
    """Banks of different kinds as one bank.

    With banks of `n0`, `n1`, ... experts, experts `0` to `n0 - 1` belong to the
    first bank, `n0` to `n0 + n1 - 1` to the second, and so on. Every bank gets
    all rows, its own first, and computes only its own. This costs two copies of
    the rows per bank.

    Args:
        banks: list of layers with `num_experts` that are called as
            `bank(rows, group_sizes)`: the other classes of
            `keras_moe.experts`, or your own.
        name, dtype, trainable: As for `keras.layers.Layer`.

    Call arguments:
        rows: Tensor of shape `(N, ...)`, the rows of expert 0 first.
        group_sizes: int32 tensor of shape `(E,)`. Rows of each expert.
        training: bool. Passed on to the banks.
        max_group_size: int, or `None`. Passed on to the banks that use it.

    Input shape:
        `(N, ...)`, as the banks take it.

    Output shape:
        `(N, ...)`, as the banks return it, the same for all. Unused rows give
        zero.

    Raises:
        ValueError: If `banks` are not layers with `num_experts`, or their
            output shapes differ.

    Example:

    Two full experts, one that copies and one that discards its tokens:

    >>> experts = keras_moe.experts.MixedExperts(
    ...     [
    ...         keras_moe.experts.GLUExperts(2, intermediate_dim=8),
    ...         keras_moe.experts.CopyExperts(1),
    ...         keras_moe.experts.ZeroExperts(1),
    ...     ]
    ... )
    >>> layer = keras_moe.layers.MoE(experts=experts, top_k=2)
    >>> tuple(layer(keras.ops.ones((2, 5, 4))).shape)
    (2, 5, 4)

    Reference:

    - [Jin et al., 2024](https://arxiv.org/abs/2410.07348), section 3.1
    """

    uses_max_group_size = True

    def __init__(self, banks, *, name=None, dtype=None, trainable=True):
        banks = list(banks) if isinstance(banks, (list, tuple)) else [banks]
        for bank in banks:
            if not isinstance(bank, keras.layers.Layer) or not is_int(
                getattr(bank, "num_experts", None)
            ):
                raise ValueError(
                    "`banks` must be a list of layers with an attribute "
                    f"`num_experts`. Received: {bank!r}"
                )
        if not banks or len({id(bank) for bank in banks}) < len(banks):
            raise ValueError(
                "`banks` must be a list of at least one layer, all of them "
                f"different objects. Received: banks={banks!r}"
            )
        super().__init__(
            sum(bank.num_experts for bank in banks),
            name=name,
            dtype=dtype,
            trainable=trainable,
        )
        self.banks = banks
        self._takes = [
            {
                argument
                for argument in ("training", "max_group_size")
                if argument in inspect.signature(bank.call).parameters
            }
            for bank in banks
        ]

    def build(self, rows_shape):
        shapes = []
        for bank in self.banks:
            if not bank.built:
                bank.build(rows_shape)
            shapes.append(tuple(bank.compute_output_shape(rows_shape)))
        if len(set(shapes)) > 1:
            raise ValueError(
                "`banks` must give rows of the same shape. Received: "
                f"rows_shape={tuple(rows_shape)}, output shapes={shapes}"
            )

    def call(self, rows, group_sizes, training=None, max_group_size=None):
        rows = ops.convert_to_tensor(rows)
        starts, ends = bounds(group_sizes)
        given = {"training": training, "max_group_size": max_group_size}
        row = ops.arange(ops.shape(rows)[0], dtype="int32")
        mixed, expert = None, 0
        for bank, takes in zip(self.banks, self._takes, strict=True):
            stop = expert + bank.num_experts
            first, end = starts[expert], ends[stop - 1]
            out = bank(
                _roll(rows, first),
                group_sizes[expert:stop],
                **{argument: given[argument] for argument in takes},
            )
            out = _roll(ops.cast(out, self.compute_dtype), -first)
            own = spread(ops.logical_and(row >= first, row < end), out)
            rest = ops.zeros_like(out) if mixed is None else mixed
            mixed, expert = ops.where(own, out, rest), stop
        return mixed

    def compute_output_shape(self, rows_shape, group_sizes_shape=None):
        return tuple(self.banks[0].compute_output_shape(rows_shape))

    def get_config(self):
        config = super().get_config()
        del config["num_experts"]
        banks = []
        for bank in self.banks:
            banks.append(keras.saving.serialize_keras_object(bank))
            # Built with this layer, so that paths keep its name.
            banks[-1].pop("build_config", None)
        return {**config, "banks": banks}

    @classmethod
    def from_config(cls, config):
        banks = [
            keras.saving.deserialize_keras_object(bank)
            for bank in config["banks"]
        ]
        return super().from_config({**config, "banks": banks})


def _roll(rows, by):
    """Shifts the rows: row `(i + by) mod N` becomes row `i`.

    The gradient shifts back, again with a gather.
    """

    def gather(rows, by):
        num_rows = ops.shape(rows)[0]
        row = ops.arange(num_rows, dtype="int32") + by
        return ops.take(rows, ops.mod(row, ops.maximum(num_rows, 1)), axis=0)

    def gradient(d_out, rows, by):
        return (gather(d_out, -by),)

    return backend.with_gradient(gather, gradient, (rows,), (by,))
