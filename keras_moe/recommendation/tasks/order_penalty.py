import keras
from keras import ops

from keras_moe.checks import check_at_least


@keras.saving.register_keras_serializable("keras_moe")
class OrderPenalty(keras.layers.Layer):
    """Penalizes an event that is more probable than the one before it.

    It returns the second of two probabilities unchanged, and in training adds
    the loss `weight * mean(max(p - p_before, 0))`.

    Args:
        weight: float. Factor of the loss. Defaults to `0.6`.
        **kwargs: Arguments of `keras.layers.Layer`.

    Call arguments:
        inputs: List of `p_before` and `p`, of equal shapes.

    Raises:
        ValueError: If `weight` is negative or not a number.

    Example:

    >>> layer = keras_moe.models.OrderPenalty(weight=1.0)
    >>> p = layer([np.array([0.5, 0.5]), np.array([0.25, 0.75])], training=True)
    >>> float(layer.losses[0])
    0.125

    Reference:

    - [Xi et al., 2021](https://arxiv.org/abs/2105.08489), equation 14
    """

    def __init__(self, weight=0.6, **kwargs):
        super().__init__(**{"dtype": "float32", **kwargs})
        check_at_least("weight", weight, 0)
        self.weight = weight
        self.built = True

    def call(self, inputs, training=None):
        p_before, p = inputs
        if training:
            above = ops.mean(ops.relu(p - p_before))
            self.add_loss(self.weight * ops.cast(above, "float32"))
        return p

    def compute_output_shape(self, input_shape):
        return input_shape[1]

    def get_config(self):
        return {**super().get_config(), "weight": self.weight}
