import keras
from keras import ops

from keras_moe.checks import as_keras_object
from keras_moe.checks import check_bool
from keras_moe.checks import check_int
from keras_moe.checks import check_one_of
from keras_moe.checks import check_positive
from keras_moe.checks import check_rate
from keras_moe.checks import check_seed
from keras_moe.ops import activations
from keras_moe.stacked.per_expert import PerExpertInitializer
from keras_moe.stacked.per_expert import PerExpertRegularizer

NORMALIZATIONS = (None, "batch", "layer")
PLACES = ("before_activation", "after_activation")


@keras.saving.register_keras_serializable("keras_moe")
class StackedDense(keras.layers.Layer):
    """Several dense layers side by side, computed as one.

    ```
    y[:, n] = dropout(activation(normalization(x[:, n] @ kernel[n] + bias[n])))
    ```

    It computes the same as a list of `num_networks` dense layers, with one
    variable for all kernels, so it compiles and trains faster. Each network is
    initialised, normalized and regularized separately.

    Args:
        num_networks: int. Number of dense layers.
        units: int. Output width of each layer.
        activation: Any Keras activation. Defaults to `None`.
        use_bias: bool. Whether the layers have a bias. Defaults to `True`.
        normalization: `None`, `"batch"` or `"layer"`. Normalizes each network's
            output, with a scale and an offset. Batch normalization runs
            over the examples, layer normalization over the `units`. Defaults
            to `None`.
        normalization_epsilon: float. Added to the variances. Defaults to
            `1e-3`.
        normalization_place: `"before_activation"` or `"after_activation"`.
            Defaults to `"before_activation"`.
        dropout: float. Rate of the dropout of the output, in training. Defaults
            to `0.0`.
        seed: int, or `None`. Seed of the dropout. Defaults to `None`.
        kernel_initializer: Initializer of each network's kernel. A seeded one
            draws differently for each network. Defaults to `"glorot_uniform"`.
        bias_initializer: Initializer of the biases. Defaults to `"zeros"`.
        kernel_regularizer: Regularizer of each network's kernel; the values are
            summed. Defaults to `None`.
        **kwargs: Arguments of `keras.layers.Layer`.

    Call arguments:
        inputs: Tensor of shape `(batch, dim)`, read by all networks, or
            `(batch, slots, dim)`. `slots` divides `num_networks`, and
            `num_networks / slots` consecutive networks read the same slot.
        training: bool. Whether to apply dropout, and to normalize by the batch.

    Input shape:
        `(batch, dim)` or `(batch, slots, dim)`

    Output shape:
        `(batch, num_networks, units)`

    Weights:
        `kernel` `(num_networks, dim, units)`, `bias` `(num_networks, units)`;
        with a normalization also its weights.

    Raises:
        ValueError: If an argument is out of range, or does not fit the inputs.

    Example:

    >>> layer = keras_moe.layers.StackedDense(4, units=3, activation="relu")
    >>> tuple(layer(keras.ops.ones((2, 5))).shape)
    (2, 4, 3)
    """

    def __init__(
        self,
        num_networks,
        units,
        activation=None,
        use_bias=True,
        normalization=None,
        normalization_epsilon=1e-3,
        normalization_place="before_activation",
        dropout=0.0,
        seed=None,
        kernel_initializer="glorot_uniform",
        bias_initializer="zeros",
        kernel_regularizer=None,
        **kwargs,
    ):
        super().__init__(**kwargs)
        check_int("num_networks", num_networks, 1)
        check_int("units", units, 1)
        check_options(
            normalization,
            normalization_epsilon,
            normalization_place,
            dropout,
            seed,
        )
        self.num_networks = num_networks
        self.units = units
        self.activation = as_keras_object(
            "activation", activations.get, activation
        )
        check_bool("use_bias", use_bias)
        self.use_bias = use_bias
        self.normalization = normalization
        self.normalization_epsilon = normalization_epsilon
        self.normalization_place = normalization_place
        self.dropout = dropout
        self.seed = seed
        self.kernel_initializer = as_keras_object(
            "kernel_initializer", keras.initializers.get, kernel_initializer
        )
        self.bias_initializer = as_keras_object(
            "bias_initializer", keras.initializers.get, bias_initializer
        )
        self.kernel_regularizer = as_keras_object(
            "kernel_regularizer", keras.regularizers.get, kernel_regularizer
        )
        self._normalize = self._make_normalization()
        self._drop = None
        if dropout > 0:
            self._drop = keras.layers.Dropout(
                dropout, seed=seed, dtype=self.dtype_policy
            )

    def _make_normalization(self):
        kwargs = {
            "epsilon": self.normalization_epsilon,
            "dtype": self.dtype_policy,
            "name": "normalization",
        }
        if self.normalization == "batch":
            return keras.layers.BatchNormalization(**kwargs)
        if self.normalization == "layer":
            # Its scale and offset would be shared by all networks.
            return keras.layers.LayerNormalization(
                center=False, scale=False, **kwargs
            )
        return None

    def build(self, input_shape):
        check_slots(self.name, input_shape, self.num_networks)
        dim = input_shape[-1]
        self.input_spec = keras.layers.InputSpec(
            ndim=len(input_shape), axes={-1: dim}
        )
        self.kernel = self.add_weight(
            name="kernel",
            shape=(self.num_networks, dim, self.units),
            initializer=PerExpertInitializer(self.kernel_initializer, 1),
            regularizer=self.kernel_regularizer
            and PerExpertRegularizer(self.kernel_regularizer),
        )
        self.bias = None
        shape = (self.num_networks, self.units)
        if self.use_bias:
            self.bias = self.add_weight(
                name="bias",
                shape=shape,
                initializer=PerExpertInitializer(self.bias_initializer, 2),
            )
        if self.normalization == "batch":
            self._normalize.build((None, self.num_networks * self.units))
        elif self.normalization == "layer":
            self._normalize.build((None, *shape))
            self.gamma = self.add_weight(
                name="gamma", shape=shape, initializer="ones"
            )
            self.beta = self.add_weight(
                name="beta", shape=shape, initializer="zeros"
            )

    def call(self, inputs, training=None):
        x = self._product(ops.cast(inputs, self.compute_dtype))
        if self.bias is not None:
            x = x + self.bias
        if self.normalization_place == "before_activation":
            x = self._normalized(x, training)
        x = self.activation(x)
        if self.normalization_place == "after_activation":
            x = self._normalized(x, training)
        return x if self._drop is None else self._drop(x, training=training)

    def _product(self, x):
        if len(x.shape) == 2:
            return ops.einsum("bd,nde->bne", x, self.kernel)
        slots, dim = x.shape[1:]
        if slots == self.num_networks:
            return ops.einsum("bnd,nde->bne", x, self.kernel)
        shape = (slots, self.num_networks // slots, dim, self.units)
        kernel = ops.reshape(self.kernel, shape)
        x = ops.einsum("bsd,snde->bsne", x, kernel)
        return ops.reshape(x, (-1, self.num_networks, self.units))

    def _normalized(self, x, training):
        if self.normalization == "batch":
            flat = ops.reshape(x, (-1, self.num_networks * self.units))
            flat = self._normalize(flat, training=training)
            return ops.reshape(flat, (-1, self.num_networks, self.units))
        if self.normalization == "layer":
            return self._normalize(x) * self.gamma + self.beta
        return x

    def compute_output_shape(self, input_shape):
        return (input_shape[0], self.num_networks, self.units)

    def get_config(self):
        return {
            **super().get_config(),
            "num_networks": self.num_networks,
            "units": self.units,
            "activation": activations.serialize(self.activation),
            "use_bias": self.use_bias,
            "normalization": self.normalization,
            "normalization_epsilon": self.normalization_epsilon,
            "normalization_place": self.normalization_place,
            "dropout": self.dropout,
            "seed": self.seed,
            "kernel_initializer": keras.initializers.serialize(
                self.kernel_initializer
            ),
            "bias_initializer": keras.initializers.serialize(
                self.bias_initializer
            ),
            "kernel_regularizer": keras.regularizers.serialize(
                self.kernel_regularizer
            ),
        }


def check_options(
    normalization, normalization_epsilon, normalization_place, dropout, seed
):
    check_one_of("normalization", normalization, NORMALIZATIONS)
    check_positive("normalization_epsilon", normalization_epsilon)
    check_one_of("normalization_place", normalization_place, PLACES)
    check_rate("dropout", dropout)
    check_seed("seed", seed)


def check_slots(name, input_shape, num_networks):
    shape = tuple(input_shape)
    if len(shape) not in (2, 3) or shape[-1] is None:
        raise ValueError(
            f"The input of `{name}` must be of shape (batch, dim) or "
            "(batch, slots, dim) with a static dim. "
            f"Received: input_shape={shape}"
        )
    if len(shape) == 3 and (not shape[1] or num_networks % shape[1]):
        raise ValueError(
            "The number of slots must be static, and a divisor of the "
            f"number of networks. Received: input_shape={shape}, "
            f"{num_networks} networks"
        )
