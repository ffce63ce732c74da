import keras

from keras_moe.experts.experts import Experts


class PlainExperts(Experts):
    """Base of the banks that make no kernels: `num_experts` and no more."""

    def __init__(self, num_experts, *, name=None, dtype=None, trainable=True):
        super().__init__(
            num_experts, name=name, dtype=dtype, trainable=trainable
        )

    def get_config(self):
        return {
            **keras.layers.Layer.get_config(self),
            "num_experts": self.num_experts,
        }
