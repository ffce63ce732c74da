import math

import keras
from keras import ops

from keras_moe.checks import as_keras_object
from keras_moe.checks import check_at_least
from keras_moe.checks import check_bool
from keras_moe.checks import check_int
from keras_moe.checks import check_number
from keras_moe.checks import check_positive
from keras_moe.checks import check_seed
from keras_moe.stacked.per_expert import PerExpertInitializer


@keras.saving.register_keras_serializable("keras_moe")
class SubNetworkRouting(keras.layers.Layer):
    """Connections between sub-networks that learn to be on or off (SNR).

    ```
    s       = sigmoid((log(u) - log(1 - u) + log_alpha) / temperature)
    code    = clip(s * (high - low) + low, 0, 1)                 in training
    code    = clip(sigmoid(log_alpha) * (high - low) + low, 0, 1)  otherwise
    y[:, o] = sum over i of code[o, i] * x[:, i] @ kernel[o, i]  SNR-Trans
    y[:, o] = sum over i of code[o, i] * x[:, i]                 SNR-Aver
    ```

    where `u` is drawn uniformly for each connection and call, the same for all
    examples. Since `low` is below 0 and `high` above 1, codes can be exactly 0
    or 1: connections vanish. In training the layer adds the loss
    `l0_weight * (expected number of connections that are not 0)`.

    Args:
        num_outputs: int. Number of sub-networks that read the output.
        units: int, or `None`. Output width of SNR-Trans. `None` is SNR-Aver,
            which has no kernels. Defaults to `None`.
        temperature: float. With a lower one, codes are closer to 0 and 1.
            Defaults to `0.9`.
        low, high: floats. The interval to which the sigmoid is stretched.
            Default to `-0.1` and `1.1`.
        l0_weight: float. Weight of the loss. Defaults to `0.0`.
        stochastic: bool. Whether codes are random in training. If not, they are
            the same as in inference. Defaults to `True`.
        alpha_initializer: Initializer of `log_alpha`. Defaults to `"zeros"`:
            connections are as likely on as off.
        kernel_initializer: Initializer of each kernel. Defaults to
            `"glorot_uniform"`.
        seed: int, or `None`. Seed of the codes. Defaults to `None`.
        **kwargs: Arguments of `keras.layers.Layer`.

    Call arguments:
        inputs: Tensor of shape `(batch, num_inputs, dim)`. The outputs of the
            sub-networks of the level before.
        training: bool. Whether to draw random codes.

    Input shape:
        `(batch, num_inputs, dim)`

    Output shape:
        `(batch, num_outputs, units)`, or `dim` without `units`.

    Weights:
        `log_alpha` `(num_outputs, num_inputs)` and, with `units`, `kernel`
        `(num_outputs, num_inputs, dim, units)`.

    Raises:
        ValueError: If an argument is out of range, or the input is not of
            rank 3.

    Example:

    >>> layer = keras_moe.layers.SubNetworkRouting(num_outputs=2, units=4)
    >>> tuple(layer(keras.ops.ones((5, 3, 6))).shape)
    (5, 2, 4)

    Reference:

    - [Ma et al., 2019](https://doi.org/10.1609/aaai.v33i01.3301216)
    - [Louizos et al., 2017](https://arxiv.org/abs/1712.01312) (the codes)
    """

    def __init__(
        self,
        num_outputs,
        units=None,
        temperature=0.9,
        low=-0.1,
        high=1.1,
        l0_weight=0.0,
        stochastic=True,
        alpha_initializer="zeros",
        kernel_initializer="glorot_uniform",
        seed=None,
        **kwargs,
    ):
        super().__init__(**kwargs)
        check_int("num_outputs", num_outputs, 1)
        if units is not None:
            check_int("units", units, 1)
        check_positive("temperature", temperature)
        check_number("low", low)
        check_number("high", high)
        if not low < 0 or not high > 1:
            raise ValueError(
                "`low` must be below 0 and `high` above 1. "
                f"Received: low={low}, high={high}"
            )
        check_at_least("l0_weight", l0_weight, 0)
        self.num_outputs = num_outputs
        self.units = units
        self.temperature = temperature
        self.low = low
        self.high = high
        self.l0_weight = l0_weight
        check_bool("stochastic", stochastic)
        check_seed("seed", seed)
        self.stochastic = stochastic
        self.alpha_initializer = as_keras_object(
            "alpha_initializer", keras.initializers.get, alpha_initializer
        )
        self.kernel_initializer = as_keras_object(
            "kernel_initializer", keras.initializers.get, kernel_initializer
        )
        self.seed = seed
        self.seed_generator = None
        if stochastic:
            self.seed_generator = keras.random.SeedGenerator(seed)

    def build(self, input_shape):
        shape = tuple(input_shape)
        if len(shape) != 3 or None in shape[1:]:
            raise ValueError(
                "The input of SubNetworkRouting must be of shape (batch, "
                "num_inputs, dim), static but for the batch. "
                f"Received: input_shape={shape}"
            )
        _, num_inputs, dim = shape
        self.log_alpha = self.add_weight(
            name="log_alpha",
            shape=(self.num_outputs, num_inputs),
            initializer=self.alpha_initializer,
            autocast=False,
        )
        self.kernel = None
        if self.units is None:
            return
        by_pair = PerExpertInitializer(self.kernel_initializer, 1)

        def draw(shape, dtype):
            flat = (shape[0] * shape[1], *shape[2:])
            return ops.reshape(by_pair(flat, dtype=dtype), shape)

        self.kernel = self.add_weight(
            name="kernel",
            shape=(self.num_outputs, num_inputs, dim, self.units),
            initializer=draw,
        )

    def call(self, inputs, training=None):
        inputs = ops.cast(inputs, self.compute_dtype)
        codes = ops.cast(self.codes(training), self.compute_dtype)
        if training and self.l0_weight > 0:
            self.add_loss(self.l0_weight * ops.sum(self._not_zero()))
        if self.kernel is None:
            return ops.einsum("oi,bid->bod", codes, inputs)
        kernel = codes[:, :, None, None] * self.kernel
        return ops.einsum("bid,oidu->bou", inputs, kernel)

    def codes(self, training=False):
        """The codes of the connections, from 0 for off to 1 for on.

        Args:
            training: bool. Whether to draw random codes. Defaults to `False`.

        Returns:
            Tensor of shape `(num_outputs, num_inputs)`.

        Raises:
            ValueError: If the layer is not built.
        """
        if not self.built:
            raise ValueError(
                f"{self.name!r} has no codes before it is built: their number "
                "depends on the input."
            )
        logits = ops.convert_to_tensor(self.log_alpha)
        if training and self.stochastic:
            u = keras.random.uniform(
                logits.shape, 1e-6, 1 - 1e-6, seed=self.seed_generator
            )
            noise = ops.cast(ops.log(u) - ops.log(1 - u), logits.dtype)
            logits = (logits + noise) / self.temperature
        s = ops.sigmoid(logits) * (self.high - self.low) + self.low
        return ops.clip(s, 0.0, 1.0)

    def _not_zero(self):
        """The probability of each drawn code that it is above 0."""
        shift = self.temperature * math.log(-self.low / self.high)
        return ops.sigmoid(ops.convert_to_tensor(self.log_alpha) - shift)

    def compute_output_shape(self, input_shape):
        return (
            input_shape[0],
            self.num_outputs,
            self.units or input_shape[-1],
        )

    def get_config(self):
        return {
            **super().get_config(),
            "num_outputs": self.num_outputs,
            "units": self.units,
            "temperature": self.temperature,
            "low": self.low,
            "high": self.high,
            "l0_weight": self.l0_weight,
            "stochastic": self.stochastic,
            "alpha_initializer": keras.initializers.serialize(
                self.alpha_initializer
            ),
            "kernel_initializer": keras.initializers.serialize(
                self.kernel_initializer
            ),
            "seed": self.seed,
        }
