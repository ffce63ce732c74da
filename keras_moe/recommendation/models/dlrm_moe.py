import keras
import numpy as np
from keras import ops

from keras_moe import backend
from keras_moe.checks import as_units
from keras_moe.checks import check_int
from keras_moe.checks import check_one_of
from keras_moe.checks import check_several
from keras_moe.experts.mlp_experts import MLPExperts
from keras_moe.moe.moe import MoE
from keras_moe.ops.grouped_matmul import batch_matmul
from keras_moe.recommendation.features.feature_embedding import FeatureEmbedding
from keras_moe.recommendation.gates.multi_gate_moe import MultiGateMoE
from keras_moe.recommendation.layers.cross_net_mix import CrossNetMix
from keras_moe.recommendation.models.gated_levels import GatedLevels
from keras_moe.recommendation.models.gated_levels import split_level_arguments
from keras_moe.recommendation.models.layer_arguments import split_arguments
from keras_moe.recommendation.models.recommender import Recommender
from keras_moe.recommendation.tasks.task_spec import as_tasks

# What the model sets of the `MoE` layer.
_STRUCTURE = (
    *("num_experts", "intermediate_dim", "top_k", "activation", "experts"),
    *("route_per", "return_routing", "causal"),
)


@keras.saving.register_keras_serializable("keras_moe")
class DLRMMoE(Recommender):
    """A mixture of experts on the interactions of features (DLRM, DCN-V2).

    ```
    n = bottom network of the numeric features
    v = [n, vectors of the other features]
    i = [n, v[a] @ v[b] for all a > b]            interaction "dot"
    i = CrossNetMix(concatenate(v))               interaction "cross"
    p[t] = sigmoid(tower[t](sum over e of gate[t][e] * expert[e](i)))
    ```

    The experts replace the top network. By default all experts are computed,
    and each task has a gate (`keras_moe.layers.MultiGateMoE`). With `top_k`
    there is one router, and only the chosen experts are computed
    (`keras_moe.layers.MoE`), which pays off with many or wide experts.

    Args:
        tasks: Sequence of `keras_moe.models.TaskSpec`, or names of binary
            tasks.
        embedding: A `keras_moe.layers.FeatureEmbedding`, or another embedding,
            as in `keras_moe.models.MMoE`, that returns a dict of vectors.
        num_experts: int. Number of experts. Defaults to `8`.
        expert_units: Sequence of ints. Widths of the layers of each expert;
            with `top_k` exactly two, the last without activation. Defaults to
            `(64, 32)`.
        top_k: int, or `None`. How many experts compute each example. Defaults
            to `None`: all, weighted by the gate of each task.
        bottom_units: Sequence of ints. Widths of the layers of the network of
            the numeric features. `"dot"` adds a last layer as wide as the
            vectors. Defaults to `(64,)`.
        interaction: `"dot"`, for vectors of one width, or `"cross"`, a
            `keras_moe.layers.CrossNetMix`. Defaults to `"dot"`.
        cross_options: Dict of arguments of `keras_moe.layers.CrossNetMix`.
            Defaults to `None`, its defaults.
        numeric_features: Name, or sequence of names, of the features that the
            bottom network reads. Defaults to `None`: all features of a
            `FeatureEmbedding` that have no table (`Numeric` and `Embedded`),
            and no feature of another embedding.
        heads: As in `keras_moe.models.MMoE`.
        inputs: As in `keras_moe.models.MMoE`.
        **kwargs: Further arguments of `keras_moe.layers.MultiGateMoE`, or with
            `top_k` of `keras_moe.layers.MoE`, and `name` and `trainable` of the
            model.

    Raises:
        ValueError: If arguments are out of range or do not fit together.

    Example:

    >>> data = {"city": ["Rome", "Oslo"], "shop": ["a", "b"], "age": [3.0, 4.0]}
    >>> features = keras_moe.layers.FeatureEmbedding.from_data(data)
    >>> model = keras_moe.models.DLRMMoE(["click"], features, top_k=2)
    >>> tuple(model(features.encode(data))["click"].shape)
    (2, 1)

    Reference:

    - [Naumov et al., 2019](https://arxiv.org/abs/1906.00091) (DLRM)
    - [Wang et al., 2020](https://arxiv.org/abs/2008.13535) (DCN-V2)
    """

    def __init__(
        self,
        tasks,
        embedding,
        num_experts=8,
        expert_units=(64, 32),
        top_k=None,
        bottom_units=(64,),
        interaction="dot",
        cross_options=None,
        numeric_features=None,
        heads="towers",
        inputs=None,
        **kwargs,
    ):
        tasks = as_tasks(tasks)
        check_int("num_experts", num_experts, 1)
        check_one_of("interaction", interaction, ("dot", "cross"))
        if not isinstance(cross_options, (dict, type(None))):
            raise ValueError(
                "`cross_options` must be a dict or None. "
                f"Received: cross_options={cross_options!r}"
            )
        if cross_options and interaction != "cross":
            raise ValueError(
                "`cross_options` are for interaction='cross'. Received: "
                f"cross_options={cross_options!r}, interaction={interaction!r}"
            )
        expert_units = as_units("expert_units", expert_units)
        bottom_units = as_units("bottom_units", bottom_units, 0)
        make = _all_experts if top_k is None else _chosen_experts
        top, options, kwargs = make(
            tasks, num_experts, expert_units, top_k, kwargs
        )
        trunk = DLRMTrunk(
            Interaction(
                interaction,
                _numeric(embedding, numeric_features),
                bottom_units,
                cross_options or {},
            ),
            top,
        )
        super().__init__(
            tasks,
            embedding,
            trunk,
            heads,
            inputs,
            arguments={
                "num_experts": num_experts,
                "expert_units": expert_units,
                "top_k": top_k,
                "bottom_units": bottom_units,
                "interaction": interaction,
                "cross_options": cross_options,
                "numeric_features": numeric_features,
                **options,
            },
            **kwargs,
        )


class DLRMTrunk:
    """The interaction of features, and the experts that read it."""

    uses_vectors = True

    def __init__(self, interaction, top):
        self.interaction = interaction
        self.top = top

    def __call__(self, x, inputs, vectors):
        return self.top(self.interaction(vectors))

    @property
    def gates(self):
        return getattr(self.top, "gates", [])


class Interaction:
    """Combines the vectors of the features into one `(B, width)`."""

    def __init__(self, kind, numeric, bottom_units, cross_options):
        self.kind = kind
        self.numeric = numeric
        self.bottom_units = bottom_units
        self.cross_options = cross_options

    def __call__(self, vectors):
        if not set(self.numeric) <= set(vectors):
            raise ValueError(
                "`numeric_features` must be names of features. Received: "
                f"numeric_features={self.numeric}, features={sorted(vectors)}"
            )
        parts = [v for name, v in vectors.items() if name not in self.numeric]
        if self.kind == "dot":
            _check_widths(vectors, self.numeric, len(parts))
        if self.numeric:
            numbers = [vectors[name] for name in self.numeric]
            width = parts[0].shape[-1] if self.kind == "dot" else None
            parts.insert(0, self._bottom(_joined(numbers), width))
        if self.kind == "cross":
            return CrossNetMix(**self.cross_options, name="cross")(
                _joined(parts)
            )
        products = DotProducts(name="dot")(ops.stack(parts, axis=1))
        return _joined([*parts[:1], products] if self.numeric else [products])

    def _bottom(self, x, width):
        units = [*self.bottom_units, *([] if width is None else [width])]
        for i, number in enumerate(units):
            name = f"bottom_{i}"
            x = keras.layers.Dense(number, "relu", name=name)(x)
        return x


@keras.saving.register_keras_serializable("keras_moe")
class DotProducts(keras.layers.Layer):
    """Products of all pairs of vectors: `(B, N, D)` -> `(B, N (N - 1) / 2)`.

    Their order is row by row, below the diagonal of the matrix of products.
    """

    def call(self, inputs):
        number = int(inputs.shape[1])  # a tensor while PyTorch traces
        products = batch_matmul(inputs, ops.transpose(inputs, (0, 2, 1)))
        products = ops.reshape(products, (-1, number * number))
        rows, columns = np.tril_indices(number, -1)
        places = (rows * number + columns).astype("int32")
        return backend.take(products, places, axis=1)

    def compute_output_shape(self, input_shape):
        number = input_shape[1]
        return (input_shape[0], number * (number - 1) // 2)


def _all_experts(tasks, num_experts, expert_units, top_k, kwargs):
    options, kwargs = split_level_arguments(kwargs)
    level = MultiGateMoE(
        len(tasks),
        expert_units,
        num_shared_experts=num_experts,
        return_gates=True,
        name="experts",
        **options,
    )
    return GatedLevels(tasks, [level]), options, kwargs


def _chosen_experts(tasks, num_experts, expert_units, top_k, kwargs):
    options, kwargs = split_arguments(MoE, kwargs, _STRUCTURE)
    if len(expert_units) != 2:
        raise ValueError(
            "With `top_k`, `expert_units` must be two widths. Received: "
            f"expert_units={expert_units!r}, top_k={top_k!r}"
        )
    hidden, width = expert_units
    experts = MLPExperts(num_experts, hidden, output_dim=width, name="experts")
    layer = MoE(top_k=top_k, experts=experts, name="moe", **options)
    return layer, options, kwargs


def _numeric(embedding, names):
    if isinstance(names, str):
        return [names]
    if names is not None:
        check_several("numeric_features", names)
        names = list(names)
        if not all(isinstance(name, str) for name in names):
            raise ValueError(
                "`numeric_features` must be names of features. "
                f"Received: numeric_features={names!r}"
            )
        return names
    if not isinstance(embedding, FeatureEmbedding):
        return []
    return [f.name for f in embedding.features if f.table is None]


def _check_widths(vectors, numeric, number):
    widths = {
        name: vector.shape[-1]
        for name, vector in vectors.items()
        if name not in numeric
    }
    if len(set(widths.values())) != 1 or number + bool(numeric) < 2:
        raise ValueError(
            "With interaction='dot' there must be vectors to multiply, at "
            "least one of them not numeric, and all of one width. Received "
            f"widths={widths}, numeric_features={numeric}"
        )


def _joined(tensors):
    if len(tensors) == 1:
        return tensors[0]
    return ops.concatenate(tensors, axis=-1)
