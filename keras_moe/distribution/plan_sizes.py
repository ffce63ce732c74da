"""What a plan needs to know of a model, whatever it was read from."""

from typing import Any
from typing import NamedTuple

import keras

BYTES = {
    **{"float64": 8, "int64": 8, "float32": 4, "int32": 4, "uint32": 4},
    **{"bfloat16": 2, "float16": 2, "int8": 1, "uint8": 1, "bool": 1},
}


class MoESize(NamedTuple):
    """One MoE layer, or several equal ones. Numbers, not bytes.

    Fields:
        name: str. Of the first of them.
        num_layers: int. How many are equal to this.
        num_experts: int.
        rows_per_token: float. `top_k`, or what the experts choose on average.
        input_dim, output_dim: int. Width of a row on its way out and back.
        width: int or `None`. Hidden width, which a model axis divides.
        bank: int. Numbers in the weights that have an axis of experts.
        trained: bool. Whether they are trained.
        products: int. Multiplications of a row with weights.
        kept_per_row: int. What the backward pass needs of a row on the device
            of its expert, besides the row.
        kept_fused: int. The same, and in the place of the row too, where rows
            are not sent: the fused kernels compute the rest again.
        positions: int. Tokens of an example.
    """

    name: str
    num_layers: int
    num_experts: int
    rows_per_token: float
    input_dim: int
    output_dim: int
    width: int | None
    bank: int
    trained: bool
    products: int
    kept_per_row: int
    kept_fused: int
    positions: int

    @property
    def divided(self):
        """Whether devices can keep a part of these experts each."""
        return self.bank > 0


class ModelSize(NamedTuple):
    """A whole model; all but the banks of its MoE layers is called dense.

    Fields:
        weights: int. Trained numbers of the dense part.
        state: int. Numbers that no gradient changes.
        products: int. Multiplications of an example with dense weights, and
            of its attention.
        kept: int. What the backward pass needs of an example.
        kept_blocks: int. The same if only each block's input is kept.
        positions: int. Tokens of an example.
        moe: tuple of `MoESize`.
        dtype: Its dtype policy, or `None` if it has none.
    """

    weights: int
    state: int
    products: int
    kept: int
    kept_blocks: int
    positions: int
    moe: tuple
    dtype: Any = None

    @property
    def parameters(self):
        return self.weights + sum(m.num_layers * m.bank for m in self.moe)

    @property
    def active_parameters(self):
        """With the whole of the embeddings, as they are usually counted."""
        return self.weights + round(
            sum(
                m.num_layers * m.bank * min(m.rows_per_token / m.num_experts, 1)
                for m in self.moe
            )
        )


def merged(layers):
    """The same `MoESize`s, with equal layers counted as one."""
    found = {}
    for layer in layers:
        key = layer._replace(name="", num_layers=0)
        known = found.get(key)
        found[key] = layer._replace(
            name=known.name if known else layer.name,
            num_layers=layer.num_layers + (known.num_layers if known else 0),
        )
    return tuple(found.values())


def bytes_of(dtype):
    return BYTES[keras.backend.standardize_dtype(dtype)]


def numbers_per_weight(optimizer):
    """`(of a matrix, of a bank)`: what an optimizer keeps of each weight.

    Measured on small variables. Factored states (Adafactor) are smaller in
    larger ones, and count as what is left of them there: nothing.
    """
    numbers = []
    for name, shape in (("kernel", (64, 64)), ("gate_kernel", (16, 16, 16))):
        one = type(optimizer).from_config(optimizer.get_config())
        one.build([keras.Variable(keras.ops.zeros(shape), name=name)])
        numbers.append(sum(tuple(v.shape) == shape for v in one.variables))
    return tuple(numbers)
