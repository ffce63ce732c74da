import math

import keras
from keras import ops

from keras_moe.checks import as_keras_object
from keras_moe.checks import check_bool
from keras_moe.checks import check_int
from keras_moe.checks import check_positive
from keras_moe.checks import check_seed
from keras_moe.ops.masking import zero_masked
from keras_moe.ops.noise import expected_load
from keras_moe.routers.noisy_top_k_router import NoisyRouting
from keras_moe.routers.normalizations import unit_vectors
from keras_moe.routers.top_k_router import TopKRouter
from keras_moe.stacked.draws import own_draws


@keras.saving.register_keras_serializable("keras_moe")
class CosineRouter(TopKRouter):
    """Scores experts by their angle to the token in a small space.

    ```
    low    = tokens @ projection_kernel + projection_bias          (T, P)
    scale  = exp(min(log_scale, log(max_scale)))
    logits = scale * cos(low, kernel)
    ```

    and from there on as in `TopKRouter`. An expert's embedding is a column of
    the `(P, E)` kernel. Neither its length nor the token's counts: the logits
    lie between `-scale` and `scale`, and training does not pull the tokens
    together towards the embeddings, as it does with dot products. The scale,
    one over a temperature, is learned.

    With `noise_stddev` alone, the router also tells the load that the noise
    leads to, which `keras_moe.losses.LoadLoss` balances (Swin-MoE).

    A length below 1e-12 counts as 1e-12. Such a vector has no direction, and
    its cosine has no gradient.

    Args:
        num_experts: int. Number of experts to choose from.
        top_k: int. Experts per token. Defaults to `2`.
        projection_dim: int. `P`. Defaults to `256`.
        initial_temperature: float. `log_scale` starts at
            `log(1 / initial_temperature)`. Defaults to `0.5`.
        max_scale: float. Largest scale; beyond it `log_scale` has no gradient.
            Defaults to `100.0`.
        use_projection_bias: bool. Whether the projection has a bias. Defaults
            to `True`.
        projection_initializer: Initializer of the projection. Defaults to
            `"glorot_uniform"`.
        kernel_initializer: Initializer of the embeddings. `None` is a normal
            of deviation 0.01. Defaults to `None`.
        **kwargs: Arguments of `keras_moe.routers.TopKRouter`. `temperature`
            divides what comes out above, and `use_bias` adds a bias to it.

    Call arguments:
        tokens: Tensor of shape `(T, D)`.
        mask: Boolean tensor of shape `(T,)`, or `None`; as in `TopKRouter`.
        training: bool. Whether to apply jitter, noise and expert dropout.

    Input shape:
        `(T, D)`

    Output:
        A `keras_moe.routers.Routing`, as `TopKRouter` returns it, or a
        `NoisyRouting` if the router tells a load.

    Raises:
        ValueError: If an argument is out of range, or `D` is not static.

    Example:

    >>> router = keras_moe.routers.CosineRouter(num_experts=4, projection_dim=3)
    >>> routing = router(keras.ops.ones((5, 8)))
    >>> bool(keras.ops.max(keras.ops.abs(routing.logits)) <= 2.0001)
    True

    Reference:

    - [Chi et al., 2022](https://arxiv.org/abs/2204.09179), section 3
    """

    def __init__(
        self,
        num_experts,
        top_k=2,
        projection_dim=256,
        initial_temperature=0.5,
        max_scale=100.0,
        use_projection_bias=True,
        projection_initializer="glorot_uniform",
        kernel_initializer=None,
        **kwargs,
    ):
        check_int("projection_dim", projection_dim, minimum=1)
        check_positive("initial_temperature", initial_temperature)
        check_positive("max_scale", max_scale)
        check_bool("use_projection_bias", use_projection_bias)
        check_seed("seed", kwargs.get("seed"))
        if kernel_initializer is None:
            kernel_initializer = keras.initializers.RandomNormal(
                stddev=0.01, seed=kwargs.get("seed")
            )
        super().__init__(
            num_experts, top_k, kernel_initializer=kernel_initializer, **kwargs
        )
        self.projection_dim = projection_dim
        self.initial_temperature = initial_temperature
        self.max_scale = max_scale
        self.use_projection_bias = use_projection_bias
        self.projection_initializer = as_keras_object(
            "projection_initializer",
            keras.initializers.get,
            projection_initializer,
        )
        plain = not (self.gumbel_noise or self.num_always_on or self.bias_kind)
        if self.noise_stddev > 0 and plain:
            self.routing_class = NoisyRouting

    def build_logits(self, dim):
        self.projection_kernel = self.add_weight(
            name="projection_kernel",
            shape=(dim, self.projection_dim),
            initializer=own_draws(self.projection_initializer, 1),
        )
        self.projection_bias = None
        if self.use_projection_bias:
            self.projection_bias = self.add_weight(
                name="projection_bias",
                shape=(self.projection_dim,),
                initializer="zeros",
            )
        super().build_logits(self.projection_dim)
        self.log_scale = self.add_weight(
            name="log_scale",
            shape=(),
            initializer=keras.initializers.Constant(
                -math.log(self.initial_temperature)
            ),
        )

    def call(self, tokens, mask=None, training=None):
        # A NaN in a masked token would reach the gradient of the projection.
        tokens = zero_masked(tokens, mask)
        if self.routing_class is not NoisyRouting:
            return super().call(tokens, mask=mask, training=training)
        logits = self.logits(tokens, training)  # (T, E)
        noisy = self.noisy_logits(logits, training)
        load = expected_load(
            logits,
            noisy,
            self.noise_stddev if training else 0.0,
            self.num_choices(training),
            "shared",
        )
        return NoisyRouting(*self.route(logits, noisy, mask, training), load)

    def raw_logits(self, tokens):
        low = ops.einsum("td,dp->tp", tokens, self.projection_kernel)
        if self.projection_bias is not None:
            low = low + self.projection_bias
        cosines = ops.einsum(
            "tp,pe->te", unit_vectors(low), unit_vectors(self.kernel, axis=0)
        )
        largest = math.log(self.max_scale)
        scale = ops.exp(ops.minimum(self.log_scale, largest))
        return scale * cosines

    def get_config(self):
        return {
            **super().get_config(),
            "projection_dim": self.projection_dim,
            "initial_temperature": self.initial_temperature,
            "max_scale": self.max_scale,
            "use_projection_bias": self.use_projection_bias,
            "projection_initializer": keras.initializers.serialize(
                self.projection_initializer
            ),
        }
