import keras
from keras import ops

from keras_moe.checks import as_keras_object
from keras_moe.checks import check_bool
from keras_moe.checks import check_int
from keras_moe.ops import activations
from keras_moe.ops.scores import softmax
from keras_moe.stacked.draws import own_draws
from keras_moe.stacked.per_expert import PerExpertInitializer


@keras.saving.register_keras_serializable("keras_moe")
class CrossNetMix(keras.layers.Layer):
    """Feature crosses by a mixture of low-rank experts (DCN-V2).

    ```
    for each layer l:                                          x = x0 at first
        gate      = softmax(x @ gate_kernel[l])
        expert[e] = act(act(x @ down[l, e]) @ middle[l, e]) @ up[l, e] + bias[l]
        x         = x + sum over e of gate[e] * x0 * expert[e]
    ```

    Every layer raises the degree of the feature crosses by one. Its cost is
    `num_experts` matrices of rank `projection_dim`.

    Args:
        projection_dim: int. Rank of each expert. Defaults to `32`.
        num_experts: int. Number of experts in each layer. Defaults to `4`.
        num_layers: int. Number of layers. Defaults to `1`.
        activation: Activation in the experts. Defaults to `"tanh"`.
        share_gates: bool. Whether all layers use the same gate, as in DeepCTR,
            instead of one each. Defaults to `False`.
        gate_use_bias: bool. Whether the gates have a bias. Defaults to
            `False`.
        kernel_initializer: Initializer of the kernels. Each matrix is drawn
            separately. Defaults to `"glorot_uniform"`.
        bias_initializer: Initializer of the biases. Defaults to `"zeros"`.
        **kwargs: Arguments of `keras.layers.Layer`.

    Call arguments:
        x0: Tensor of shape `(batch, dim)`. The features.
        x: Tensor of shape `(batch, dim)`. The output of the cross layer before,
            if several layers are stacked. Defaults to `None`, `x0`.

    Input shape:
        `(batch, dim)`

    Output shape:
        The same as the input.

    Weights:
        `down_kernel` `(layers, experts, dim, rank)`, `middle_kernel`
        `(layers, experts, rank, rank)`, `up_kernel`
        `(layers, experts, rank, dim)`, `bias` `(layers, dim)`, `gate_kernel`
        `(layers, dim, experts)` and `gate_bias` `(layers, experts)`. With
        `share_gates`, the last two have one layer.

    Raises:
        ValueError: If an argument is out of range, or shapes differ or are not
            of rank 2.

    Example:

    >>> cross = keras_moe.layers.CrossNetMix(8, num_experts=2, num_layers=3)
    >>> tuple(cross(keras.ops.ones((4, 10))).shape)
    (4, 10)

    Reference:

    - [Wang et al., 2020](https://arxiv.org/abs/2008.13535)
    """

    def __init__(
        self,
        projection_dim=32,
        num_experts=4,
        num_layers=1,
        activation="tanh",
        share_gates=False,
        gate_use_bias=False,
        kernel_initializer="glorot_uniform",
        bias_initializer="zeros",
        **kwargs,
    ):
        super().__init__(**kwargs)
        check_int("projection_dim", projection_dim, 1)
        check_int("num_experts", num_experts, 1)
        check_int("num_layers", num_layers, 1)
        self.projection_dim = projection_dim
        self.num_experts = num_experts
        self.num_layers = num_layers
        self.activation = as_keras_object(
            "activation", activations.get, activation
        )
        check_bool("share_gates", share_gates)
        self.share_gates = share_gates
        check_bool("gate_use_bias", gate_use_bias)
        self.gate_use_bias = gate_use_bias
        self.kernel_initializer = as_keras_object(
            "kernel_initializer", keras.initializers.get, kernel_initializer
        )
        self.bias_initializer = as_keras_object(
            "bias_initializer", keras.initializers.get, bias_initializer
        )

    def build(self, x0_shape, x_shape=None):
        dim = x0_shape[-1]
        other = x0_shape if x_shape is None else x_shape
        wrong = len(x0_shape) != 2 or len(other) != 2
        if wrong or dim is None or other[-1] != dim:
            raise ValueError(
                "`x0` and `x` must be of the same shape (batch, dim), with a "
                f"static dim. Received: x0_shape={tuple(x0_shape)}, "
                f"x_shape={tuple(other)}"
            )
        rank = self.projection_dim
        self.down_kernel = self._kernels("down_kernel", 0, (dim, rank))
        self.middle_kernel = self._kernels("middle_kernel", 1, (rank, rank))
        self.up_kernel = self._kernels("up_kernel", 2, (rank, dim))
        self.bias = self.add_weight(
            name="bias",
            shape=(self.num_layers, dim),
            initializer=self.bias_initializer,
        )
        gates = 1 if self.share_gates else self.num_layers
        self.gate_kernel = self.add_weight(
            name="gate_kernel",
            shape=(gates, dim, self.num_experts),
            initializer=PerExpertInitializer(
                own_draws(self.kernel_initializer, 3), 1
            ),
        )
        self.gate_bias = None
        if self.gate_use_bias:
            self.gate_bias = self.add_weight(
                name="gate_bias",
                shape=(gates, self.num_experts),
                initializer=self.bias_initializer,
            )

    def _kernels(self, name, number, shape):
        """One matrix for each layer and expert, each drawn separately."""
        by_expert = PerExpertInitializer(
            own_draws(self.kernel_initializer, number), 1
        )

        def draw(bank_shape, dtype):
            layers, experts = bank_shape[:2]
            flat = by_expert((layers * experts, *shape), dtype=dtype)
            return ops.reshape(flat, bank_shape)

        return self.add_weight(
            name=name,
            shape=(self.num_layers, self.num_experts, *shape),
            initializer=draw,
        )

    def call(self, x0, x=None):
        x0 = ops.cast(x0, self.compute_dtype)
        x = x0 if x is None else ops.cast(x, self.compute_dtype)
        for layer in range(self.num_layers):
            hidden = ops.einsum("bd,edr->ber", x, self.down_kernel[layer])
            hidden = self.activation(hidden)
            hidden = ops.einsum(
                "ber,ers->bes", hidden, self.middle_kernel[layer]
            )
            hidden = self.activation(hidden)
            # The gate goes first: what is summed is then one matrix product.
            gate = self._gate(x, layer)  # (B, E)
            hidden = hidden * ops.expand_dims(gate, -1)
            mixed = ops.einsum("ber,erd->bd", hidden, self.up_kernel[layer])
            # The gates sum to one, so the bias is added once.
            x = x + x0 * (mixed + self.bias[layer])
        return x

    def gates(self, x0, x=None):
        """The weights of the experts in the first layer.

        Args:
            x0, x: As for a call.

        Returns:
            Tensor of shape `(batch, num_experts)`.
        """
        if not self.built:
            self.build(x0.shape, None if x is None else x.shape)
        # Outside of a call, Keras does not cast the variables.
        x = ops.cast(x0 if x is None else x, self.variable_dtype)
        return self._gate(x, 0)

    def _gate(self, x, layer):
        layer = 0 if self.share_gates else layer
        logits = ops.einsum("bd,de->be", x, self.gate_kernel[layer])
        if self.gate_bias is not None:
            logits = logits + self.gate_bias[layer]
        return softmax(logits)

    def compute_output_shape(self, x0_shape, x_shape=None):
        return tuple(x0_shape)

    def get_config(self):
        return {
            **super().get_config(),
            "projection_dim": self.projection_dim,
            "num_experts": self.num_experts,
            "num_layers": self.num_layers,
            "activation": activations.serialize(self.activation),
            "share_gates": self.share_gates,
            "gate_use_bias": self.gate_use_bias,
            "kernel_initializer": keras.initializers.serialize(
                self.kernel_initializer
            ),
            "bias_initializer": keras.initializers.serialize(
                self.bias_initializer
            ),
        }
