"""Sizes of a Keras model, read from its layers."""

import math
import threading

import keras

from keras_moe.dispatch.dispatcher import Dispatcher
from keras_moe.distribution.plan_sizes import ModelSize
from keras_moe.distribution.plan_sizes import MoESize
from keras_moe.distribution.plan_sizes import merged
from keras_moe.experts.experts import Experts
from keras_moe.experts.feed_forward_experts import FeedForwardExperts
from keras_moe.routers.router import Router
from keras_moe.routers.soft_router import SoftRouter

ATTENTION = (
    *(keras.layers.MultiHeadAttention, keras.layers.GroupQueryAttention),
)
KEEP_NOTHING = (
    *(keras.layers.InputLayer, keras.layers.Flatten, keras.layers.Reshape),
)


def without_values(make):
    """What `make()` returns, with variables that have shapes and no values.

    Keras initializes such variables later, in its state of the thread. The
    thread here ends before.
    """
    made = []

    def run():
        try:
            with keras.StatelessScope(initialize_variables=False):
                made.append((make(), None))
        except BaseException as error:
            made.append((None, error))

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    result, error = made[0]
    if error is not None:
        raise error
    return result


def as_model(model, input_shape):
    """A built model; it is made, or built from its config, without values."""
    if not isinstance(model, keras.layers.Layer):
        made = without_values(model)
        if not isinstance(made, keras.layers.Layer):
            raise ValueError(
                "`model` must return a model if it is a function. Received: "
                f"model={model!r}, which returns {made!r}"
            )
        model = made
    if model.built:
        return model
    if input_shape is None:
        raise ValueError(
            "`input_shape` is needed for a model that is not built. Received: "
            f"model={model!r}"
        )

    def build():
        copy = type(model).from_config(model.get_config())
        copy.build((None, *input_shape))
        return copy

    return without_values(build)


def size_of_model(model, sequence_length):
    """A `ModelSize`, of an example of `sequence_length` tokens.

    With `None`, as many as the MoE layers have, or one.
    """
    reader = _Reader(sequence_length)
    reader.read(model, None)
    banks = {id(v) for v in reader.banks}
    dense = [v for v in model.variables if id(v) not in banks]
    trained = {id(v) for v in model.trainable_variables}
    weights = sum(math.prod(v.shape) for v in dense if id(v) in trained)
    moe = merged(reader.moe)
    positions = max((m.positions for m in moe), default=1)
    return ModelSize(
        weights=weights,
        state=sum(math.prod(v.shape) for v in dense) - weights,
        products=reader.products,
        kept=reader.kept,
        kept_blocks=reader.kept_blocks,
        positions=sequence_length or positions,
        moe=moe,
        dtype=reader.dtype or model.dtype_policy,
    )


class _Reader:
    """Adds up what the layers of a model need, each looked at once."""

    def __init__(self, sequence_length):
        self.sequence_length = sequence_length
        self.moe, self.banks = [], []
        self.products = self.kept = self.kept_blocks = 0
        self.seen = set()
        self.dtype = None

    def read(self, layer, positions):
        """A layer; `positions` if it is inside of one that knows them."""
        if id(layer) in self.seen:
            return
        self.seen.add(id(layer))
        if isinstance(layer, keras.Model) and positions is None:
            for part in getattr(layer, "operations", layer.layers):
                self.read(part, None)
            return
        shape = self._output_shape(layer)
        inside = positions is not None or shape is None
        if positions is None:
            positions = self._positions(shape)
        parts = _held(layer)
        if isinstance(layer, keras.layers.Layer):
            self._read_own(layer, positions)
        if not inside and not isinstance(layer, KEEP_NOTHING):
            self.kept += math.prod(shape[1:])
            self.kept_blocks += math.prod(shape[1:])
        elif not parts and isinstance(layer, keras.layers.Layer):
            self.kept += positions * _width(layer)
        if _is_moe(layer):
            self._read_moe(layer, positions)
            parts = [p for p in parts if p is not layer.experts]
        for part in parts:
            self.read(part, positions)

    def _read_own(self, layer, positions):
        if isinstance(layer, keras.layers.Embedding):
            return
        own = _own_variables(layer)
        dims = 3 if isinstance(layer, Experts) else 2  # of a kernel
        self.products += positions * _matrices(own, dims)
        activation = getattr(layer, "activation", None)
        if own and activation not in (
            *(None, keras.activations.linear, keras.activations.relu),
        ):
            self.kept += positions * _width(layer)
        config = layer.get_config() if isinstance(layer, ATTENTION) else {}
        if config:
            grouped = "num_query_heads" in config
            heads = config["num_query_heads" if grouped else "num_heads"]
            key_dim = config["head_dim" if grouped else "key_dim"]
            value_dim = config.get("value_dim") or key_dim
            self.products += positions**2 * heads * (key_dim + value_dim)
            self.kept += positions * heads * value_dim

    def _read_moe(self, layer, positions):
        experts, router = layer.experts, layer.router
        num_experts = experts.num_experts
        rows = router.max_rows(positions, 1)
        if isinstance(router, SoftRouter):
            rows = num_experts * router.slots_per_expert
        per_token = router.choices_per_token or num_experts
        if rows is not None:
            per_token = rows / positions
        own = _own_variables(experts)
        by_expert = [v for v in own if tuple(v.shape[:1]) == (num_experts,)]
        kernels = [v for v in by_expert if len(v.shape) > 2]
        others = [v for v in own if all(v is not one for one in by_expert)]
        # Without a dispatcher (`SoftMoE`), nothing is sent, and experts that
        # share weights are not divided. Seeds are no weights.
        shared = any(v.dtype != "uint32" for v in others)
        dispatcher = getattr(layer, "dispatcher", None)
        sent = isinstance(dispatcher, Dispatcher) and not shared
        divided = by_expert if sent else []
        self.banks += divided
        self.dtype = self.dtype or experts.dtype_policy
        # What has no axis of experts, every row is multiplied with; but
        # separate layers have a row each.
        products = sum(math.prod(v.shape[1:]) for v in kernels)
        if own:
            products += _matrices(others)
        else:
            products += _matrices(experts.variables) // num_experts
        input_dim = kernels[0].shape[1] if kernels else 0
        output_dim = kernels[-1].shape[-1] if kernels else 0
        width = None
        kept = sum(v.shape[-1] for v in kernels)
        fused = input_dim + kept
        if isinstance(experts, FeedForwardExperts):
            width = experts.intermediate_dim
            fused = kept - output_dim
            kept = fused + width
        self.kept += positions * num_experts  # the router's probabilities
        self.moe.append(
            MoESize(
                name=layer.name,
                num_layers=1,
                num_experts=num_experts,
                rows_per_token=per_token,
                input_dim=input_dim,
                output_dim=output_dim,
                width=width,
                bank=sum(math.prod(v.shape) for v in divided),
                trained=experts.trainable,
                products=products,
                kept_per_row=kept,
                kept_fused=fused,
                positions=positions,
            )
        )

    def _output_shape(self, layer):
        """Without `None` but for the batch, or `None` if it is not known."""
        try:
            outputs = keras.tree.flatten(layer.output)
        except (AttributeError, ValueError):
            return None
        return (None, *(self._size(n) for n in outputs[0].shape[1:]))

    def _size(self, size):
        if size is None and self.sequence_length is None:
            raise ValueError(
                "`sequence_length` is needed for a model whose inputs have no "
                "fixed length. Received: sequence_length=None"
            )
        return self.sequence_length if size is None else size

    def _positions(self, shape):
        if shape is None:
            return self.sequence_length or 1
        return math.prod(shape[1:-1])


def _is_moe(layer):
    # Not `vars`: PyTorch's modules keep their parts elsewhere.
    return isinstance(getattr(layer, "experts", None), Experts) and isinstance(
        getattr(layer, "router", None), Router
    )


def _held(layer):
    """The layers that the attributes of a layer hold, each once."""
    found, left = [], list(vars(layer).values())
    while left:
        value = left.pop(0)
        if isinstance(value, keras.layers.Layer):
            if all(value is not one for one in found):
                found.append(value)
        elif isinstance(value, dict):
            left += value.values()
        elif isinstance(value, (list, tuple, set)):
            left += value
    return found


def _own_variables(layer):
    of_parts = {id(v) for part in _held(layer) for v in part.variables}
    return [v for v in layer.variables if id(v) not in of_parts]


def _matrices(variables, dims=2):
    return sum(
        math.prod(v.shape)
        for v in variables
        # The bias of several heads is two-dimensional.
        if len(v.shape) >= dims and v.name != "bias"
    )


def _width(layer):
    """Numbers that a layer with weights gives at a position."""
    own = _own_variables(layer)
    if isinstance(layer, FeedForwardExperts):
        hidden = (len(layer.hidden_layers) + 1) * layer.intermediate_dim
        return layer.num_experts * hidden + layer.down_kernel.shape[-1]
    if isinstance(layer, keras.layers.EinsumDense):
        inputs, outputs = layer.equation.replace(" ", "").split("->")
        letters = inputs.split(",")[1]
        return math.prod(
            size
            for letter, size in zip(letters, layer.kernel.shape, strict=True)
            if letter in outputs
        )
    return max((v.shape[-1] for v in own if len(v.shape)), default=0)
