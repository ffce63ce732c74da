import keras
from keras import ops

from keras_moe.checks import check_int
from keras_moe.checks import check_positive
from keras_moe.checks import check_rate
from keras_moe.recommendation.layers.star_dense import of_domain


@keras.saving.register_keras_serializable("keras_moe")
class PartitionedNormalization(keras.layers.Layer):
    """Batch normalization with the statistics of each domain (STAR).

    ```
    z = (x - mean[d]) / sqrt(variance[d] + epsilon)
    y = gamma * domain_gamma[d] * z + beta + domain_beta[d]
    ```

    for an example of domain `d`. In training, `mean` and `variance` are the
    statistics of the batch's `n` examples of that domain. They also update the
    moving averages that inference uses, the variance times `n / (n - 1)`. A
    domain with fewer than two examples in the batch keeps its averages, and a
    single example is normalized by them.

    Args:
        num_domains: int. Number of domains.
        momentum: float. Momentum of the moving averages. Defaults to `0.99`.
        epsilon: float. Added to the variances. Defaults to `1e-3`.
        **kwargs: Arguments of `keras.layers.Layer`.

    Call arguments:
        inputs: Tensor of shape `(batch, dim)`.
        domain: Integer tensor of shape `(batch,)`. The domain of each example.
        training: bool. Whether to normalize by the batch.

    Input shape:
        `(batch, dim)`

    Output shape:
        The same as the input. An example whose domain is out of range gets
        zeros.

    Raises:
        ValueError: If an argument is out of range, or shapes do not fit.

    Example:

    >>> layer = keras_moe.layers.PartitionedNormalization(num_domains=2)
    >>> domain = keras.ops.array([1, 0, 1], "int32")
    >>> tuple(layer(keras.ops.ones((3, 4)), domain).shape)
    (3, 4)

    Reference:

    - [Sheng et al., 2021](https://arxiv.org/abs/2101.11427)
    """

    def __init__(self, num_domains, momentum=0.99, epsilon=1e-3, **kwargs):
        super().__init__(**kwargs)
        check_int("num_domains", num_domains, 1)
        check_rate("momentum", momentum)
        check_positive("epsilon", epsilon)
        self.num_domains = num_domains
        self.momentum = momentum
        self.epsilon = epsilon

    def build(self, inputs_shape, domain_shape):
        if (
            len(inputs_shape) != 2
            or inputs_shape[-1] is None
            or len(domain_shape) != 1
        ):
            raise ValueError(
                "`inputs` must be of shape (batch, dim) with a static dim, and "
                "`domain` of shape (batch,). Received: "
                f"inputs_shape={tuple(inputs_shape)}, "
                f"domain_shape={tuple(domain_shape)}"
            )
        dim = inputs_shape[-1]
        shape = (self.num_domains, dim)
        self.gamma = self._weight("gamma", (dim,), "ones")
        self.beta = self._weight("beta", (dim,), "zeros")
        self.domain_gamma = self._weight("domain_gamma", shape, "ones")
        self.domain_beta = self._weight("domain_beta", shape, "zeros")
        self.moving_mean = self._weight("moving_mean", shape, "zeros", False)
        self.moving_variance = self._weight(
            "moving_variance", shape, "ones", False
        )

    def _weight(self, name, shape, initializer, trainable=True):
        return self.add_weight(
            name=name,
            shape=shape,
            initializer=initializer,
            trainable=trainable,
            autocast=False,  # rounded averages would stop moving
        )

    def call(self, inputs, domain, training=None):
        x = ops.cast(inputs, self.variable_dtype)
        if training:
            mean, variance = self._of_batch(x, domain)
        else:
            mean, variance = self.moving_mean, self.moving_variance
        scale = self.gamma * self.domain_gamma
        scale = scale / ops.sqrt(variance + self.epsilon)  # (domains, D)
        offset = self.beta + self.domain_beta - mean * scale
        y = ops.expand_dims(x, 1) * scale + offset
        return ops.cast(of_domain(y, domain), self.compute_dtype)

    def _of_batch(self, x, domain):
        known = ops.arange(self.num_domains, dtype="int32")
        is_in = ops.equal(ops.cast(domain, "int32")[:, None], known)
        is_in = ops.expand_dims(is_in, -1)  # (B, domains, 1)
        number = ops.sum(ops.cast(is_in, x.dtype), axis=0)  # (domains, 1)

        def mean_of(values):
            values = ops.where(is_in, values, ops.zeros_like(values))
            return ops.sum(values, axis=0) / ops.maximum(number, 1.0)

        x = ops.expand_dims(x, 1)
        mean = mean_of(x)
        variance = mean_of(ops.square(x - mean))
        unbiased = variance * number / ops.maximum(number - 1, 1.0)
        several = number > 1
        used = []
        for average, of_batch, value in (
            (self.moving_mean, mean, mean),
            (self.moving_variance, variance, unbiased),
        ):
            old = ops.convert_to_tensor(average)
            used.append(ops.where(several, of_batch, old))
            moved = self.momentum * old + (1 - self.momentum) * value
            average.assign(ops.where(several, moved, old))
        return used

    def compute_output_shape(self, inputs_shape, domain_shape):
        return tuple(inputs_shape)

    def get_config(self):
        return {
            **super().get_config(),
            "num_domains": self.num_domains,
            "momentum": self.momentum,
            "epsilon": self.epsilon,
        }
