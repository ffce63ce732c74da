import keras
from keras import ops

from keras_moe.checks import as_keras_object
from keras_moe.checks import as_units
from keras_moe.checks import check_at_least
from keras_moe.checks import check_bool
from keras_moe.checks import check_int
from keras_moe.checks import check_one_of
from keras_moe.checks import check_positive
from keras_moe.routers.choice_arguments import check_zero_weight_experts
from keras_moe.routers.normalizations import rms_normalized
from keras_moe.routers.normalizations import standardized
from keras_moe.routers.stateful_router import StatefulRouter
from keras_moe.routers.token_choice import without_last_experts
from keras_moe.stacked.draws import own_draws

RESIDUALS = (None, "projection", "logits")


@keras.saving.register_keras_serializable("keras_moe")
class MLPRouter(StatefulRouter):
    """Scores experts with a small network, which may go on from layer to layer.

    ```
    x      = tokens @ projection_kernel + projection_bias   if projection_dim
    x      = x + context_scale * context                    "projection"
    x      = projection_scale * x / rms(x)                  if asked for
    x      = activation(x @ hidden_kernel_0 + hidden_bias_0)   and so on
    logits = x @ kernel + bias
    logits = logits + context @ context_kernel              "logits"
    logits = logits / std(logits) * standardize_logits      if asked for
    ```

    and from there on as in `TopKRouter`. The `context` of a layer is the
    `state` of the one before it: the projection with its residual, or the
    logits before they are standardized. Thus a router knows where the token
    has been. `MoE(return_routing=True)` returns it in `routing.state`, a row
    for each token; the method `state` computes it alone, without jitter.

    The router of Zaya is

    ```python
    MLPRouter(
        num_experts + 1, top_k=1, projection_dim=256, hidden_dims=(256, 256),
        normalize_projection=True, residual="projection", expert_bias=True,
        zero_weight_experts=1,
    )
    ```

    and the router of MoE++, whose last expert gives zero, is

    ```python
    MLPRouter(
        num_experts, hidden_dims=(8 * num_experts,), activation="tanh",
        use_hidden_bias=False, residual="logits", zero_weight_experts=1,
    )
    ```

    Args:
        num_experts: int. Number of experts to choose from.
        top_k: int. Experts per token. Defaults to `2`.
        hidden_dims: int, or a sequence of ints. Widths of the hidden layers.
            Without any, the logits are linear. Defaults to `(256,)`.
        activation: Activation of the hidden layers. Defaults to `"gelu"`.
        use_hidden_bias: bool. Whether the projection and the hidden layers
            have biases. Defaults to `True`.
        projection_dim: int, or `None`. Width of a linear layer before the
            hidden ones. Defaults to `None`.
        normalize_projection: bool. Whether the result of that layer is divided
            by its root mean square, times a learned scale. Defaults to
            `False`.
        normalize_projection_epsilon: float. Added to the mean square. Defaults
            to `1e-6`.
        residual: What the context is and where it is added: `"projection"`, at
            first as it is, or `"logits"`, through a `(E, E)` kernel that starts
            at zero. `None` for a router without. Defaults to `None`.
        standardize_logits: float, or `None`. Standard deviation, with the
            divisor `E - 1`, that the logits of each token are scaled to. Equal
            logits stay as they are. Defaults to `None`.
        zero_weight_experts: int. That many experts, the last ones, are chosen
            like the others but get weight 0. With `normalize_weights` the
            weights of the other choices of a token sum to one. Defaults to `0`.
        hidden_initializer: Initializer of the projection and the hidden
            kernels. Defaults to `"glorot_uniform"`.
        **kwargs: Arguments of `keras_moe.routers.TopKRouter`;
            `kernel_initializer` initializes the last kernel.

    Call arguments:
        tokens: Tensor of shape `(T, D)`.
        mask: Boolean tensor of shape `(T,)`, or `None`. What masked tokens
            hold, and their context, reaches nothing.
        training: bool. Whether to apply jitter, noise and expert dropout.
        context: With `residual`, tensor of shape `(T, projection_dim)` or
            `(T, E)`, the `state` of the layer before. `None`, in the first
            layer, counts as zeros.

    Input shape:
        `(T, D)`

    Output:
        A `StatefulRouting`: a `Routing` with a field `state`. Its logits are
        the standardized ones.

    Raises:
        ValueError: If an argument is out of range, or `D` is not static.

    Example:

    >>> first, second = (
    ...     keras_moe.routers.MLPRouter(4, hidden_dims=(8,), residual="logits")
    ...     for _ in range(2)
    ... )
    >>> x = keras.ops.ones((3, 6))
    >>> routing = second(x, context=first(x).state)
    >>> tuple(routing.state.shape)
    (3, 4)

    Reference:

    - [Jin et al., 2024](https://arxiv.org/abs/2410.07348), "pathway-aware
      router" (MoE++)
    - [Anthony et al., 2025](https://arxiv.org/abs/2511.17127), "model
      architecture" (Zaya)
    """

    def __init__(
        self,
        num_experts,
        top_k=2,
        hidden_dims=(256,),
        activation="gelu",
        use_hidden_bias=True,
        projection_dim=None,
        normalize_projection=False,
        normalize_projection_epsilon=1e-6,
        residual=None,
        standardize_logits=None,
        zero_weight_experts=0,
        hidden_initializer="glorot_uniform",
        **kwargs,
    ):
        check_one_of("residual", residual, RESIDUALS)
        state_dim = {"projection": projection_dim, "logits": num_experts}
        super().__init__(num_experts, top_k, state_dim.get(residual), **kwargs)
        hidden_dims = as_units("hidden_dims", hidden_dims, minimum=0)
        check_bool("use_hidden_bias", use_hidden_bias)
        check_bool("normalize_projection", normalize_projection)
        if projection_dim is not None:
            check_int("projection_dim", projection_dim, minimum=1)
        elif normalize_projection or residual == "projection":
            raise ValueError(
                "`projection_dim` must be given for `normalize_projection` and "
                "`residual='projection'`. Received: projection_dim=None, "
                f"normalize_projection={normalize_projection}, "
                f"residual={residual!r}"
            )
        check_at_least(
            "normalize_projection_epsilon", normalize_projection_epsilon, 0
        )
        if standardize_logits is not None:
            check_positive("standardize_logits", standardize_logits)
            if num_experts < 2:
                raise ValueError(
                    "`standardize_logits` must be None with one expert. "
                    f"Received: standardize_logits={standardize_logits}, "
                    f"num_experts={num_experts}"
                )
        check_zero_weight_experts(
            zero_weight_experts,
            num_experts,
            self.score_after_selection,
            self.num_always_on,
        )
        self.hidden_dims = hidden_dims
        self.activation = as_keras_object(
            "activation", keras.activations.get, activation
        )
        self.use_hidden_bias = use_hidden_bias
        self.projection_dim = projection_dim
        self.normalize_projection = normalize_projection
        self.normalize_projection_epsilon = normalize_projection_epsilon
        self.residual = residual
        self.standardize_logits = standardize_logits
        self.zero_weight_experts = zero_weight_experts
        self.hidden_initializer = as_keras_object(
            "hidden_initializer", keras.initializers.get, hidden_initializer
        )

    def build_logits(self, dim):
        if self.projection_dim is not None:
            self._add_dense("projection", "", dim, self.projection_dim, 1)
            dim = self.projection_dim
            if self.residual == "projection":
                self.context_scale = self.add_weight(
                    name="context_scale", shape=(dim,), initializer="ones"
                )
            if self.normalize_projection:
                self.projection_scale = self.add_weight(
                    name="projection_scale", shape=(dim,), initializer="ones"
                )
        for i, width in enumerate(self.hidden_dims):
            self._add_dense("hidden", f"_{i}", dim, width, 2 + i)
            dim = width
        super().build_logits(dim)
        if self.residual == "logits":
            self.context_kernel = self.add_weight(
                name="context_kernel",
                shape=(self.num_experts, self.num_experts),
                initializer="zeros",
            )

    def _add_dense(self, name, number, dim, width, stream):
        # From one seed all kernels would begin with the same numbers.
        kernel = self.add_weight(
            name=f"{name}_kernel{number}",
            shape=(dim, width),
            initializer=own_draws(self.hidden_initializer, stream),
        )
        setattr(self, f"{name}_kernel{number}", kernel)
        bias = None
        if self.use_hidden_bias:
            bias = self.add_weight(
                name=f"{name}_bias{number}",
                shape=(width,),
                initializer="zeros",
            )
        setattr(self, f"{name}_bias{number}", bias)

    def _dense(self, name, number, x):
        x = ops.einsum("td,df->tf", x, getattr(self, f"{name}_kernel{number}"))
        bias = getattr(self, f"{name}_bias{number}")
        return x if bias is None else x + bias

    def logits_and_state(self, tokens, training, context):
        x = self.prepare(tokens, training)
        if self.projection_dim is not None:
            x = self._dense("projection", "", x)
            if self.residual == "projection":
                x = x + self.context_scale * context
        state = x
        if self.normalize_projection:
            x = rms_normalized(x, self.normalize_projection_epsilon)
            x = x * self.projection_scale
        for i in range(len(self.hidden_dims)):
            x = self.activation(self._dense("hidden", f"_{i}", x))
        logits = self.raw_logits(x)
        if self.bias is not None:
            logits = logits + self.bias
        if self.residual == "logits":
            logits = logits + ops.einsum(
                "te,ef->tf", context, self.context_kernel
            )
        if self.residual != "projection":
            state = logits
        if self.standardize_logits is not None:
            logits = self.standardize_logits * standardized(logits)
        return self.scale_logits(logits), state

    def weigh(self, logits, probs, indices):
        if self.zero_weight_experts == 0:
            return super().weigh(logits, probs, indices)
        probs, counts = without_last_experts(
            probs, indices, self.zero_weight_experts
        )
        weights = super().weigh(logits, probs, indices)
        return ops.where(counts, weights, ops.zeros_like(weights))

    def get_config(self):
        return {
            **super().get_config(),
            "hidden_dims": self.hidden_dims,
            "activation": keras.activations.serialize(self.activation),
            "use_hidden_bias": self.use_hidden_bias,
            "projection_dim": self.projection_dim,
            "normalize_projection": self.normalize_projection,
            "normalize_projection_epsilon": self.normalize_projection_epsilon,
            "residual": self.residual,
            "standardize_logits": self.standardize_logits,
            "zero_weight_experts": self.zero_weight_experts,
            "hidden_initializer": keras.initializers.serialize(
                self.hidden_initializer
            ),
        }
