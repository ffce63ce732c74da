import keras
from keras import ops

from keras_moe.checks import as_keras_object
from keras_moe.checks import check_at_least
from keras_moe.checks import check_bool
from keras_moe.checks import check_positive
from keras_moe.checks import check_rate
from keras_moe.checks import check_seed
from keras_moe.routers.normalizations import rms_normalized
from keras_moe.routers.router import Router


class LinearRouter(Router):
    """Base class of routers that score with one matrix.

    ```
    tokens = input_scale * tokens / rms(tokens)     if normalize_inputs
    logits = (tokens * jitter) @ kernel + bias      jitter only in training
    logits = logits / temperature
    ```

    A subclass calls `self.logits(tokens, training)`, `(T, E)`. If it needs
    random numbers, it draws them with `self.seed_generator`, after a call of
    `self.add_seed_generator()`. A subclass that makes its logits in another way
    overrides `build_logits(dim)` and `raw_logits(tokens)`.

    Args:
        num_experts: int. Number of experts to choose from.
        jitter: float. In training the router's inputs (the experts' are not)
            are multiplied by `uniform(1 - jitter, 1 + jitter)`, with a draw for
            each element. Defaults to `0.0`.
        temperature: float. Divides the logits. Defaults to `1.0`.
        use_bias: bool. Whether the logits have a bias. Defaults to `False`.
        normalize_inputs: bool. Whether the router (not the experts) sees its
            inputs divided by their root mean square, times a learned scale.
            Defaults to `False`.
        normalize_inputs_epsilon: float. Added to the mean square. Defaults to
            `1e-6`.
        kernel_initializer: Initializer of the `(D, E)` kernel. `None` is
            `VarianceScaling(0.1, "fan_in", "truncated_normal")`, the small
            initialization of the Switch Transformer. Defaults to `None`.
        bias_initializer: Initializer of the bias. Defaults to `"zeros"`.
        kernel_regularizer: Regularizer of the kernel. Defaults to `None`.
        seed: int, or `None`. Seed of what the router draws. Defaults to
            `None`.
        **kwargs: Arguments of `keras_moe.routers.Router`.

    Raises:
        ValueError: If an argument is out of range.
    """

    def __init__(
        self,
        num_experts,
        jitter=0.0,
        temperature=1.0,
        use_bias=False,
        normalize_inputs=False,
        normalize_inputs_epsilon=1e-6,
        kernel_initializer=None,
        bias_initializer="zeros",
        kernel_regularizer=None,
        seed=None,
        **kwargs,
    ):
        super().__init__(num_experts, **kwargs)
        check_rate("jitter", jitter)
        check_positive("temperature", temperature)
        check_bool("use_bias", use_bias)
        check_bool("normalize_inputs", normalize_inputs)
        check_at_least("normalize_inputs_epsilon", normalize_inputs_epsilon, 0)
        check_seed("seed", seed)
        self.jitter = jitter
        self.temperature = temperature
        self.use_bias = use_bias
        self.normalize_inputs = normalize_inputs
        self.normalize_inputs_epsilon = normalize_inputs_epsilon
        if kernel_initializer is None:
            kernel_initializer = keras.initializers.VarianceScaling(
                0.1, "fan_in", "truncated_normal", seed=seed
            )
        self.kernel_initializer = as_keras_object(
            "kernel_initializer", keras.initializers.get, kernel_initializer
        )
        self.bias_initializer = as_keras_object(
            "bias_initializer", keras.initializers.get, bias_initializer
        )
        self.kernel_regularizer = as_keras_object(
            "kernel_regularizer", keras.regularizers.get, kernel_regularizer
        )
        self.seed = seed
        if jitter > 0:
            self.add_seed_generator()

    def add_seed_generator(self):
        """Makes `self.seed_generator`.

        Every call advances it, so a router that draws nothing has none.
        """
        if not hasattr(self, "seed_generator"):
            self.seed_generator = keras.random.SeedGenerator(self.seed)

    def build(self, tokens_shape):
        if len(tokens_shape) != 2 or tokens_shape[-1] is None:
            raise ValueError(
                "The tokens of a router must be of shape (T, D) with a static "
                f"D. Received: tokens_shape={tuple(tokens_shape)}"
            )
        if self.normalize_inputs:
            self.input_scale = self.add_weight(
                name="input_scale",
                shape=(tokens_shape[-1],),
                initializer="ones",
            )
        self.build_logits(tokens_shape[-1])
        self.bias = None
        if self.use_bias:
            self.bias = self.add_weight(
                name="bias",
                shape=(self.num_experts,),
                initializer=self.bias_initializer,
            )

    def build_logits(self, dim):
        self.kernel = self.add_weight(
            name="kernel",
            shape=(dim, self.num_experts),
            initializer=self.kernel_initializer,
            regularizer=self.kernel_regularizer,
        )

    def logits(self, tokens, training):
        """Logits of the tokens `(T, D)`, with jitter in training, `(T, E)`."""
        logits = self.raw_logits(self.prepare(tokens, training))
        if self.bias is not None:
            logits = logits + self.bias
        return self.scale_logits(logits)

    def prepare(self, tokens, training):
        """What the router sees of the tokens."""
        if self.normalize_inputs:
            tokens = rms_normalized(tokens, self.normalize_inputs_epsilon)
            tokens = tokens * self.input_scale
        if training and self.jitter > 0:
            tokens = tokens * keras.random.uniform(
                ops.shape(tokens),
                1 - self.jitter,
                1 + self.jitter,
                dtype=self.compute_dtype,
                seed=self.seed_generator,
            )
        return tokens

    def raw_logits(self, tokens):
        # On torch `ops.matmul` would make float32 of float64.
        return ops.einsum("td,de->te", tokens, self.kernel)

    def scale_logits(self, logits):
        return logits if self.temperature == 1 else logits / self.temperature

    def get_config(self):
        return {
            **super().get_config(),
            "jitter": self.jitter,
            "temperature": self.temperature,
            "use_bias": self.use_bias,
            "normalize_inputs": self.normalize_inputs,
            "normalize_inputs_epsilon": self.normalize_inputs_epsilon,
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
