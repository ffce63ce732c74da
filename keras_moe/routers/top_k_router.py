import keras
from keras import ops

from keras_moe.ops.routing import Routing
from keras_moe.ops.scores import normalize_weights
from keras_moe.ops.scores import score
from keras_moe.ops.selection import top_k_indices
from keras_moe.routers.router import Router


@keras.saving.register_keras_serializable("keras_moe")
class TopKRouter(Router):
    """Sends each token to its `top_k` best experts.

    ```
    logits  = (tokens * jitter) @ kernel + bias     jitter only in training
    logits  = logits / temperature + noise          noise only in training
    probs   = score_activation(logits)
    indices = top_k(logits)                         ties to the lower index
    weights = probs[indices]                        or, after the selection,
                                                    activation(logits[indices])
    weights = weights / sum(weights)                if normalize_weights
    weights = weights * weight_scale
    ```

    Gradients reach the kernel through the weights; the choice itself has none.
    All of it is computed in float32.

    Args:
        num_experts: int. Number of experts to choose from.
        top_k: int. Experts per token. Defaults to `2`.
        score_activation: `"softmax"` over the experts, or `"sigmoid"` of each.
            Defaults to `"softmax"`.
        score_after_selection: bool. If `True`, the weights are the score
            activation of the `top_k` chosen logits alone, so that softmax
            weights sum to one. Defaults to `False`.
        normalize_weights: bool. Whether to divide the weights of a token by
            their sum. Defaults to `True` for `top_k > 1`; refused for
            `top_k=1`, where the weight would always be one and the router
            would get no gradient.
        normalize_epsilon: float. Added to that sum. Defaults to `1e-20`.
        weight_scale: float. Factor of the weights. Defaults to `1.0`.
        jitter: float. In training the router's inputs, not those of the
            experts, are multiplied by `uniform(1 - jitter, 1 + jitter)`, one
            draw an element. Defaults to `0.0`.
        noise_stddev: float. Standard deviation of the normal noise added to
            the logits in training. Defaults to `0.0`.
        temperature: float. Divides the logits. Defaults to `1.0`.
        use_bias: bool. Whether the logits have a bias. Defaults to `False`.
        kernel_initializer: Initializer of the `(D, E)` kernel. `None` is
            `VarianceScaling(0.1, "fan_in", "truncated_normal")`, the small
            initialization of the Switch Transformer. Defaults to `None`.
        bias_initializer: Initializer of the bias. Defaults to `"zeros"`.
        kernel_regularizer: Regularizer of the kernel. Defaults to `None`.
        seed: int, or `None`. Seed of jitter and noise. Defaults to `None`.
        **kwargs: Arguments of `keras_moe.routers.Router`.

    Call arguments:
        tokens: Tensor of shape `(T, D)`.
        mask: Boolean tensor of shape `(T,)`, or `None`. Each token is routed on
            its own, so it is ignored here; `MoE` leaves masked tokens out.
        training: bool. Whether to apply jitter and noise.

    Input shape:
        `(T, D)`

    Output:
        A `keras_moe.routers.Routing` with `K = top_k`. Its `probs` are the
        scores of all experts, with `score_after_selection` too.

    Raises:
        ValueError: If an argument is out of range, or `D` is not static.

    Example:

    >>> router = keras_moe.routers.TopKRouter(num_experts=4, top_k=2)
    >>> routing = router(keras.ops.ones((3, 8)))
    >>> tuple(routing.expert_indices.shape), tuple(routing.probs.shape)
    ((3, 2), (3, 4))

    Reference:

    - [Shazeer et al., 2017](https://arxiv.org/abs/1701.06538), section 2.1
    - [Fedus et al., 2021](https://arxiv.org/abs/2101.03961), section 2
      (jitter, float32, initialization)
    """

    def __init__(
        self,
        num_experts,
        top_k=2,
        score_activation="softmax",
        score_after_selection=False,
        normalize_weights=None,
        normalize_epsilon=1e-20,
        weight_scale=1.0,
        jitter=0.0,
        noise_stddev=0.0,
        temperature=1.0,
        use_bias=False,
        kernel_initializer=None,
        bias_initializer="zeros",
        kernel_regularizer=None,
        seed=None,
        **kwargs,
    ):
        super().__init__(num_experts, **kwargs)
        if not isinstance(top_k, int) or not 1 <= top_k <= num_experts:
            raise ValueError(
                "`top_k` must be an int between 1 and `num_experts`. "
                f"Received: top_k={top_k!r}, num_experts={num_experts}"
            )
        if score_activation not in ("softmax", "sigmoid"):
            raise ValueError(
                "`score_activation` must be 'softmax' or 'sigmoid'. "
                f"Received: score_activation={score_activation!r}"
            )
        if normalize_weights is None:
            normalize_weights = top_k > 1
        constant = score_after_selection and score_activation == "softmax"
        if top_k == 1 and (normalize_weights or constant):
            raise ValueError(
                "With `top_k=1`, weights normalized after the selection "
                "(`normalize_weights=True`, or `score_after_selection=True` "
                "with softmax) are always one, and the router would get no "
                f"gradient. Received: normalize_weights={normalize_weights}, "
                f"score_after_selection={score_after_selection}"
            )
        _check("normalize_epsilon", normalize_epsilon, normalize_epsilon >= 0)
        _check("jitter", jitter, 0 <= jitter < 1)
        _check("noise_stddev", noise_stddev, noise_stddev >= 0)
        _check("temperature", temperature, temperature > 0)
        self.top_k = top_k
        self.score_activation = score_activation
        self.score_after_selection = score_after_selection
        self.normalize_weights = normalize_weights
        self.normalize_epsilon = normalize_epsilon
        self.weight_scale = weight_scale
        self.jitter = jitter
        self.noise_stddev = noise_stddev
        self.temperature = temperature
        self.use_bias = use_bias
        if kernel_initializer is None:
            kernel_initializer = keras.initializers.VarianceScaling(
                0.1, "fan_in", "truncated_normal", seed=seed
            )
        self.kernel_initializer = keras.initializers.get(kernel_initializer)
        self.bias_initializer = keras.initializers.get(bias_initializer)
        self.kernel_regularizer = keras.regularizers.get(kernel_regularizer)
        self.seed = seed
        # A seed generator is state that every call advances: none without use.
        if jitter > 0 or noise_stddev > 0:
            self.seed_generator = keras.random.SeedGenerator(seed)

    def build(self, tokens_shape):
        if len(tokens_shape) != 2 or tokens_shape[-1] is None:
            raise ValueError(
                "The tokens of a router must be of shape (T, D) with a static "
                f"D. Received: tokens_shape={tuple(tokens_shape)}"
            )
        self.kernel = self.add_weight(
            name="kernel",
            shape=(tokens_shape[-1], self.num_experts),
            initializer=self.kernel_initializer,
            regularizer=self.kernel_regularizer,
        )
        self.bias = None
        if self.use_bias:
            self.bias = self.add_weight(
                name="bias",
                shape=(self.num_experts,),
                initializer=self.bias_initializer,
            )

    def call(self, tokens, mask=None, training=None):
        logits = self._logits(tokens, training)  # (T, E)
        probs = score(logits, self.score_activation)
        indices = top_k_indices(logits, self.top_k)  # (T, K)
        if self.score_after_selection:
            chosen = ops.take_along_axis(logits, indices, axis=-1)
            weights = score(chosen, self.score_activation)
        else:
            weights = ops.take_along_axis(probs, indices, axis=-1)
        if self.normalize_weights:
            weights = normalize_weights(weights, self.normalize_epsilon)
        return Routing(logits, probs, indices, weights * self.weight_scale)

    def _logits(self, tokens, training):
        if training and self.jitter > 0:
            tokens = tokens * keras.random.uniform(
                ops.shape(tokens),
                1 - self.jitter,
                1 + self.jitter,
                dtype=self.compute_dtype,
                seed=self.seed_generator,
            )
        # On torch `ops.matmul` would make float32 of float64.
        logits = ops.einsum("td,de->te", tokens, self.kernel)
        if self.bias is not None:
            logits = logits + self.bias
        logits = logits / self.temperature
        if training and self.noise_stddev > 0:
            logits = logits + keras.random.normal(
                ops.shape(logits),
                stddev=self.noise_stddev,
                dtype=self.compute_dtype,
                seed=self.seed_generator,
            )
        return logits

    def get_config(self):
        return {
            **super().get_config(),
            "top_k": self.top_k,
            "score_activation": self.score_activation,
            "score_after_selection": self.score_after_selection,
            "normalize_weights": self.normalize_weights,
            "normalize_epsilon": self.normalize_epsilon,
            "weight_scale": self.weight_scale,
            "jitter": self.jitter,
            "noise_stddev": self.noise_stddev,
            "temperature": self.temperature,
            "use_bias": self.use_bias,
            "kernel_initializer": keras.initializers.serialize(
                self.kernel_initializer
            ),
            "bias_initializer": keras.initializers.serialize(
                self.bias_initializer
            ),
            "kernel_regularizer": keras.regularizers.serialize(
                self.kernel_regularizer
            ),
            "seed": self.seed,
        }


_RANGES = {
    "normalize_epsilon": "at least 0",
    "jitter": "at least 0 and below 1",
    "noise_stddev": "at least 0",
    "temperature": "positive",
}


def _check(name, value, in_range):
    if not in_range:
        raise ValueError(
            f"`{name}` must be {_RANGES[name]}. Received: {name}={value}"
        )
