import keras

from keras_moe.checks import as_keras_object
from keras_moe.checks import as_units
from keras_moe.checks import check_bool
from keras_moe.checks import check_int_up_to
from keras_moe.checks import check_one_of
from keras_moe.checks import check_positive
from keras_moe.checks import check_rate
from keras_moe.recommendation.gates import gate_activations
from keras_moe.recommendation.gates.gate_layer import GateLayer
from keras_moe.recommendation.gates.selector_gates import SELECTOR_ARGUMENTS
from keras_moe.recommendation.gates.selector_gates import SelectorGates
from keras_moe.recommendation.gates.selector_gates import check_replaced
from keras_moe.recommendation.gates.selector_gates import check_selectors
from keras_moe.recommendation.gates.visible_pairs import VisiblePairs
from keras_moe.stacked.draws import own_draws
from keras_moe.stacked.stacked_mlp import StackedMLP

_PLAIN = (
    *("units", "use_bias", "normalization", "normalization_epsilon"),
    *("temperature", "dropout", *SELECTOR_ARGUMENTS),
)


@keras.saving.register_keras_serializable("keras_moe")
class TaskGates(GateLayer):
    """Gates: how much each of several tasks takes from each expert.

    ```
    logits[g]  = (relu mlp[g](x) @ kernel[g] + bias[g]) / temperature
    weights[g] = activation(logits[g]) over the experts that g sees
    ```

    They are the `gates` of a `keras_moe.layers.MultiGateMoE`. The rows of
    `kernel` `(N, D)` are the `N` pairs of a gate and an expert that it sees,
    gate by gate. The weights of all other experts are 0. As in a router,
    everything is in float32, or in float64 under that policy.

    Args:
        units: int, or a list of ints. Widths of the hidden layers of each
            gate. Defaults to `()`, no hidden layers.
        use_bias: bool. Whether the last layer has a bias. Defaults to `True`.
        normalization: `None`, or `"batch"`. Normalizes the logits. Defaults to
            `None`.
        normalization_epsilon: float. Added to the variances. Defaults to
            `1e-3`.
        activation: `"softmax"`, `"sparsemax"`, `"entmax15"`, `"top_k"` (softmax
            over the `top_k` largest logits), `"dselect_k"` (see
            `keras_moe.routers.DSelectKRouter`; it replaces the last layer) or
            any Keras activation. Defaults to `"softmax"`.
        top_k: int. For `"top_k"` and `"dselect_k"`. Defaults to `2`.
        gamma, entropy_weight, unused_code_weight: floats. For `"dselect_k"`, as
            in `keras_moe.routers.DSelectKRouter`. Default to `1.0`, `0.0` and
            `1.0`.
        temperature: float. Divides the logits. Defaults to `1.0`.
        dropout: float. Rate at which weights are dropped in training. The
            others are scaled to keep the sum, or by `1 / (1 - rate)` with a
            Keras activation, whose outputs may be negative. Defaults to `0.0`.
        seed: int, or `None`. Seed of the dropout, and of the initial weights of
            `"dselect_k"`. Defaults to `None`.
        kernel_initializer, kernel_regularizer: Initializer and regularizer of
            the kernels. Default to `"glorot_uniform"` and `None`.
        visible: Matrix of zeros and ones `(gates, experts)`: which experts a
            gate sees. Defaults to `None`: the `MultiGateMoE` sets it.
        **kwargs: Arguments of `keras.layers.Layer`.

    Call arguments:
        inputs: Tensor of shape `(batch, dim)`, read by all gates, or
            `(batch, gates, dim)`.
        training: bool. Whether to apply dropout, and to normalize by the batch.

    Input shape:
        `(batch, dim)` or `(batch, gates, dim)`

    Output shape:
        `(batch, gates, experts)`

    Raises:
        ValueError: If an argument is out of range or does not fit the others;
            when built, if `visible` is not known.

    Example:

    >>> layer = keras_moe.layers.MultiGateMoE(
    ...     num_tasks=2,
    ...     experts=keras_moe.layers.StackedMLP(4, [16, 8]),
    ...     num_shared_experts=4,
    ...     gates=keras_moe.layers.TaskGates([8], activation="top_k", top_k=1),
    ... )
    >>> tuple(layer(keras.ops.ones((4, 6))).shape)
    (4, 2, 8)

    Reference:

    - [Ma et al., 2018](https://doi.org/10.1145/3219819.3220007), equation 6
    - [Hazimeh et al., 2021](https://arxiv.org/abs/2106.03760) (DSelect-k)
    """

    may_see_nothing = False  # whether a gate may see no expert

    def __init__(
        self,
        units=(),
        use_bias=True,
        normalization=None,
        normalization_epsilon=1e-3,
        activation="softmax",
        top_k=2,
        gamma=1.0,
        entropy_weight=0.0,
        unused_code_weight=1.0,
        temperature=1.0,
        dropout=0.0,
        seed=None,
        kernel_initializer="glorot_uniform",
        kernel_regularizer=None,
        visible=None,
        dtype=None,
        **kwargs,
    ):
        policy = keras.dtype_policies.get(dtype)
        float64 = policy.compute_dtype == "float64"
        super().__init__(dtype="float64" if float64 else "float32", **kwargs)
        check_bool("use_bias", use_bias)
        check_one_of("normalization", normalization, (None, "batch"))
        check_positive("normalization_epsilon", normalization_epsilon)
        check_selectors(top_k, gamma, entropy_weight, unused_code_weight, seed)
        check_positive("temperature", temperature)
        check_rate("dropout", dropout)
        self.units = as_units("units", units, minimum=0)
        self.use_bias = use_bias
        self.normalization = normalization
        self.normalization_epsilon = normalization_epsilon
        self.activation = gate_activations.get(activation)
        self.top_k = top_k
        self.gamma = gamma
        self.entropy_weight = entropy_weight
        self.unused_code_weight = unused_code_weight
        self.temperature = temperature
        self.dropout = dropout
        self.seed = seed
        self.kernel_initializer = as_keras_object(
            "kernel_initializer", keras.initializers.get, kernel_initializer
        )
        self.kernel_regularizer = as_keras_object(
            "kernel_regularizer", keras.regularizers.get, kernel_regularizer
        )
        if self.activation == "dselect_k":
            check_replaced(normalization, temperature)
        self.mlp = self.selectors = self._normalize = None
        self._seed_generator = None
        if dropout > 0:
            self._seed_generator = keras.random.SeedGenerator(seed)
        self.visible = None
        self._is_told = visible is None
        if visible is not None:
            self.set_visible(visible)

    def set_visible(self, visible):
        """Sets which experts a gate sees. This can be done once.

        Args:
            visible: Matrix of zeros and ones `(gates, experts)`.

        Raises:
            ValueError: If it is already set, or a gate sees no expert, or
                fewer than `top_k`.
        """
        if self.visible is not None:
            raise ValueError(
                "`gates` must belong to one layer and have no `visible` of "
                f"their own. Received: gates={self.name!r}"
            )
        pairs = VisiblePairs(visible, self.may_see_nothing)
        if self.activation in ("top_k", "dselect_k"):
            seen = min(pairs.per_gate)
            check_int_up_to(
                "top_k", self.top_k, "experts that each gate sees", seen
            )
        self._pairs = pairs
        self.visible = pairs.visible
        self.num_gates, self.num_experts = self.visible.shape
        self._make_layers()

    def _make_layers(self):
        policy = self.dtype_policy
        if self.units:
            self.mlp = StackedMLP(
                self.num_gates,
                self.units,
                kernel_initializer=own_draws(self.kernel_initializer, 1),
                kernel_regularizer=self.kernel_regularizer,
                dtype=policy,
                name="mlp",
            )
        if self.activation == "dselect_k":
            self.selectors = SelectorGates(
                self.visible,
                **{name: getattr(self, name) for name in SELECTOR_ARGUMENTS},
                dtype=policy,
                name="selectors",
            )
        if self.normalization == "batch":
            self._normalize = keras.layers.BatchNormalization(
                epsilon=self.normalization_epsilon,
                dtype=policy,
                name="normalization",
            )

    def get_build_config(self):
        # The layer around the gates sets `visible` and builds them.
        return None if self._is_told else super().get_build_config()

    def get_config(self):
        visible = None if self._is_told else self.visible.astype(int).tolist()
        return {
            **super().get_config(),
            **{name: getattr(self, name) for name in _PLAIN},
            "activation": gate_activations.serialize(self.activation),
            "kernel_initializer": keras.initializers.serialize(
                self.kernel_initializer
            ),
            "kernel_regularizer": keras.regularizers.serialize(
                self.kernel_regularizer
            ),
            "visible": visible,
        }
