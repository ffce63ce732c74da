import keras
import numpy as np
from keras import ops

from keras_moe.checks import as_keras_object
from keras_moe.checks import check_bool
from keras_moe.checks import check_int
from keras_moe.ops import activations


@keras.saving.register_keras_serializable("keras_moe")
class STARDense(keras.layers.Layer):
    """A dense layer whose weights each domain scales and shifts (STAR).

    ```
    y = activation(x @ (kernel * domain_kernel[d]) + bias + domain_bias[d])
    ```

    for an example of domain `d`. All domains train `kernel` and `bias`. By
    default `domain_kernel` starts at one and `domain_bias` at zero, so that all
    domains start alike. All domains are computed for all examples.

    Args:
        num_domains: int. Number of domains.
        units: int. Width of the output.
        activation: Any Keras activation. Defaults to `None`.
        use_bias: bool. Whether there are biases. Defaults to `True`.
        kernel_initializer, bias_initializer: Initializers of the shared
            weights. Default to `"glorot_uniform"` and `"zeros"`.
        domain_kernel_initializer, domain_bias_initializer: Initializers of the
            weights of each domain. Default to `"ones"` and `"zeros"`.
        **kwargs: Arguments of `keras.layers.Layer`.

    Call arguments:
        inputs: Tensor of shape `(batch, dim)`, or `(batch, num_domains, dim)`,
            the output of another `STARDense` without `domain`.
        domain: Integer tensor of shape `(batch,)`. The domain of each example,
            below `num_domains`. Defaults to `None`: the outputs of all domains
            are returned.

    Input shape:
        `(batch, dim)` or `(batch, num_domains, dim)`

    Output shape:
        `(batch, num_domains, units)`; with `domain` `(batch, units)`. An
        example whose domain is out of range gets zeros.

    Weights:
        `kernel` `(dim, units)`, `domain_kernel` `(num_domains, dim, units)`,
        `bias` `(units,)`, `domain_bias` `(num_domains, units)`.

    Raises:
        ValueError: If an argument is out of range, or does not fit the inputs.

    Example:

    >>> layer = keras_moe.layers.STARDense(num_domains=3, units=4)
    >>> domain = keras.ops.array([2, 0], "int32")
    >>> tuple(layer(keras.ops.ones((2, 5)), domain).shape)
    (2, 4)

    Reference:

    - [Sheng et al., 2021](https://arxiv.org/abs/2101.11427)
    """

    def __init__(
        self,
        num_domains,
        units,
        activation=None,
        use_bias=True,
        kernel_initializer="glorot_uniform",
        bias_initializer="zeros",
        domain_kernel_initializer="ones",
        domain_bias_initializer="zeros",
        **kwargs,
    ):
        super().__init__(**kwargs)
        check_int("num_domains", num_domains, 1)
        check_int("units", units, 1)
        self.num_domains = num_domains
        self.units = units
        self.activation = as_keras_object(
            "activation", activations.get, activation
        )
        check_bool("use_bias", use_bias)
        self.use_bias = use_bias
        self.kernel_initializer = as_keras_object(
            "kernel_initializer", keras.initializers.get, kernel_initializer
        )
        self.bias_initializer = as_keras_object(
            "bias_initializer", keras.initializers.get, bias_initializer
        )
        self.domain_kernel_initializer = as_keras_object(
            "domain_kernel_initializer",
            keras.initializers.get,
            domain_kernel_initializer,
        )
        self.domain_bias_initializer = as_keras_object(
            "domain_bias_initializer",
            keras.initializers.get,
            domain_bias_initializer,
        )

    def build(self, inputs_shape, domain_shape=None):
        shape = tuple(inputs_shape)
        if (
            len(shape) not in (2, 3)
            or shape[-1] is None
            or (len(shape) == 3 and shape[1] != self.num_domains)
        ):
            raise ValueError(
                "The input of STARDense must be of shape (batch, dim) or "
                f"(batch, {self.num_domains}, dim), with a static dim. "
                f"Received: inputs_shape={shape}"
            )
        if domain_shape is not None and len(domain_shape) != 1:
            raise ValueError(
                "`domain` must be of shape (batch,). "
                f"Received: domain_shape={tuple(domain_shape)}"
            )
        kernel_shape = (shape[-1], self.units)
        self.kernel = self.add_weight(
            name="kernel",
            shape=kernel_shape,
            initializer=self.kernel_initializer,
        )
        self.domain_kernel = self.add_weight(
            name="domain_kernel",
            shape=(self.num_domains, *kernel_shape),
            initializer=self.domain_kernel_initializer,
        )
        self.bias = self.domain_bias = None
        if self.use_bias:
            self.bias = self.add_weight(
                name="bias",
                shape=(self.units,),
                initializer=self.bias_initializer,
            )
            self.domain_bias = self.add_weight(
                name="domain_bias",
                shape=(self.num_domains, self.units),
                initializer=self.domain_bias_initializer,
            )

    def call(self, inputs, domain=None):
        x = ops.cast(inputs, self.compute_dtype)
        dims = "bd" if len(x.shape) == 2 else "bnd"
        kernel = self.kernel * self.domain_kernel  # (domains, D, units)
        y = ops.einsum(f"{dims},nde->bne", x, kernel)
        if self.use_bias:
            y = y + self.bias + self.domain_bias
        y = self.activation(y)
        return y if domain is None else of_domain(y, domain)

    def compute_output_shape(self, inputs_shape, domain_shape=None):
        if domain_shape is None:
            return (inputs_shape[0], self.num_domains, self.units)
        return (inputs_shape[0], self.units)

    def get_config(self):
        config = {
            **super().get_config(),
            "num_domains": self.num_domains,
            "units": self.units,
            "activation": activations.serialize(self.activation),
            "use_bias": self.use_bias,
        }
        for name in ("kernel", "bias", "domain_kernel", "domain_bias"):
            name = f"{name}_initializer"
            config[name] = keras.initializers.serialize(getattr(self, name))
        return config


def of_domain(x, domain):
    """Selects the domain of each example: `(B, domains, ...)` -> `(B, ...)`."""
    number = int(x.shape[1])  # a tensor while PyTorch traces
    # TensorFlow would make a tensor an extra input of an ONNX file.
    known = np.arange(number, dtype="int32")
    chosen = ops.equal(ops.cast(domain, "int32")[:, None], known)
    shape = (-1, number) + (1,) * (len(x.shape) - 2)
    chosen = ops.reshape(chosen, shape)
    # Not a product: the outputs of other domains may be infinite.
    return ops.sum(ops.where(chosen, x, ops.zeros_like(x)), axis=1)
