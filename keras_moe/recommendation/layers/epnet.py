import keras
from keras import ops

from keras_moe.checks import check_int
from keras_moe.checks import check_positive
from keras_moe.recommendation.layers.gate_nu import GateNU


@keras.saving.register_keras_serializable("keras_moe")
class EPNet(keras.layers.Layer):
    """Scales each element of the embedding by domain (PEPNet).

    ```
    y = embedding * gate(concatenate([domain, stop_gradient(embedding)]))
    ```

    where `gate` is a `GateNU`. Because of the stopped gradient, the gate does
    not train the embedding, which all domains share.

    Args:
        hidden_units: int. Width of the gate's hidden layer. Defaults to `None`,
            the width of the embedding.
        scale: float. Largest factor. Defaults to `2.0`.
        **kwargs: Arguments of `keras.layers.Layer`.

    Call arguments:
        inputs: Tensor of shape `(batch, dim)`, the embedding.
        domain: Tensor of shape `(batch, domain dim)` that describes the domain.

    Input shape:
        `(batch, dim)`

    Output shape:
        The same as the input.

    Raises:
        ValueError: If an argument is out of range, or shapes are not of rank 2.

    Example:

    >>> layer = keras_moe.layers.EPNet()
    >>> embedding, domain = keras.ops.ones((2, 5)), keras.ops.ones((2, 3))
    >>> tuple(layer(embedding, domain).shape)
    (2, 5)

    Reference:

    - [Chang et al., 2023](https://arxiv.org/abs/2302.01115)
    """

    def __init__(self, hidden_units=None, scale=2.0, **kwargs):
        super().__init__(**kwargs)
        if hidden_units is not None:
            check_int("hidden_units", hidden_units, 1)
        check_positive("scale", scale)
        self.hidden_units = hidden_units
        self.scale = scale

    def build(self, inputs_shape, domain_shape):
        check_pair("EPNet", "domain", inputs_shape, domain_shape)
        dim = inputs_shape[-1]
        self.gate = GateNU(
            dim,
            self.hidden_units,
            self.scale,
            dtype=self.dtype_policy,
            name="gate",
        )
        self.gate.build((None, domain_shape[-1] + dim))

    def call(self, inputs, domain):
        return inputs * self.factors(inputs, domain)

    def factors(self, inputs, domain):
        """The factors of the embedding.

        Args:
            inputs, domain: As for a call.

        Returns:
            Tensor of shape `(batch, dim)`.
        """
        if not self.built:
            self.build(inputs.shape, domain.shape)
        inputs = ops.stop_gradient(ops.convert_to_tensor(inputs))
        return self.gate(ops.concatenate([domain, inputs], axis=-1))

    def compute_output_shape(self, inputs_shape, domain_shape):
        return tuple(inputs_shape)

    def get_config(self):
        return {
            **super().get_config(),
            "hidden_units": self.hidden_units,
            "scale": self.scale,
        }


def check_pair(layer, name, inputs_shape, other_shape):
    for shape in (inputs_shape, other_shape):
        if len(shape) != 2 or shape[-1] is None:
            raise ValueError(
                f"`inputs` and `{name}` of {layer} must be of shape (batch, "
                "dim), each with a static dim. Received: inputs_shape="
                f"{tuple(inputs_shape)}, {name}_shape={tuple(other_shape)}"
            )
