import keras
from keras import ops

from keras_moe.distribution.sending import send
from keras_moe.moe import foreign_parts as foreign
from keras_moe.moe import part_arguments as parts
from keras_moe.moe.causal import add_causal_layer
from keras_moe.moe.routed_layer import RoutedLayer
from keras_moe.moe.shared_experts import GATE_WIDTHS
from keras_moe.moe.shared_experts import check_shared_experts
from keras_moe.moe.shared_experts import join
from keras_moe.moe.shared_experts import shared_output
from keras_moe.moe.tokens import call_masked
from keras_moe.ops.masking import zero_masked


@keras.saving.register_keras_serializable("keras_moe")
class MoE(RoutedLayer):
    """A sparse mixture of experts that replaces a feed-forward block.

    ```
    routing = router(tokens)
    y[t]    = sum over k of expert_weights[t, k]
                            * experts[expert_indices[t, k]](tokens[t])
    y       = y + shared_experts(tokens)
    ```

    Only the chosen experts are computed: each token costs `top_k` experts, for
    any number of experts. Only in training, the balancing losses are added to
    the model's loss, and the routing is counted and shown in the logs of `fit`.
    A frozen layer (`trainable=False`) still counts and adds its losses, whose
    gradient reaches the layers before it.

    Masked tokens give zero. They go to no expert, take no capacity and do not
    count in losses and statistics.

    Args:
        num_experts: int. Number of experts. Required unless `router` or
            `experts` is an object.
        intermediate_dim: int. Width of each expert's hidden layer. Required if
            `experts` is a name.
        top_k: int. Experts per token, if `router` is a name. Defaults to the
            router's default, 2 for `"top_k"`.
        activation: Activation of the experts, if `experts` is a name. Defaults
            to the experts' default, `"silu"` for `"glu"`.
        router: A name of `keras_moe.routers.get` or a router layer. Defaults
            to `"top_k"`.
        experts: A name of `keras_moe.experts.get` or a layer with
            `num_experts` that is called as `experts(rows, group_sizes)`.
            Defaults to `"glu"`.
        shared_experts: A layer that all tokens go through, or `None`; a bank of
            `keras_moe.experts` is summed. Defaults to `None`.
        shared_experts_mode: `"add"` (DeepSeek), `"gate"` times a learned
            sigmoid a token (Qwen2-MoE), `"average"` (Cohere), or `"residual"`,
            both times a learned softmax a token (DeepSpeed). Defaults to
            `"add"`.
        losses: `"default"` (`LoadBalancingLoss(1e-2)`, `RouterZLoss(1e-3)`),
            `None`, a loss, or a list of losses. Defaults to `"default"`.
        capacity_factor, eval_capacity_factor, drop_policy: As for
            `keras_moe.layers.Capacity`: how many tokens an expert takes, in
            training and in inference, and which are kept. A dropped choice
            gives zero. Dropping depends on the rest of the batch. By default
            nothing is dropped.
        capacity: A `Capacity`, instead of these three. Defaults to `None`.
        weights_on: `"output"` multiplies the experts' outputs by the weights,
            `"input"` their inputs (Llama 4). Defaults to `"output"`.
        pre_experts: A layer before the routed experts only, such as a
            projection to fewer dimensions (latent experts). Defaults to `None`.
        post_experts: A layer on the sum of the experts' outputs, such as the
            projection back. Defaults to `None`.
        route_per: `"token"`, or `"example"` to send whole examples to
            `keras_moe.experts.LayerExperts`. The router then sees the mean over
            unmasked positions, the experts zeros at masked ones. Defaults to
            `"token"`.
        causal: bool. Whether no token may depend on later ones: parts that look
            ahead raise an error, and inference drops nothing unless
            `eval_capacity_factor` is given. Defaults to `False`.
        return_routing: bool. Whether a call returns `(outputs, routing)`.
        statistics: `"auto"` counts into a few entries of the logs, which sum
            up all layers of the model (`routing_max_violation`, ...);
            `"summary"` adds this layer's smallest and largest load,
            `"per_expert"` all; `None` counts nothing. Defaults to `"auto"`.
        dispatcher: A `keras_moe.dispatch.Dispatcher`, instead of the capacity
            and `weights_on`. Defaults to `None`.
        **kwargs: Arguments of the experts, if `experts` is a name (`dropout`,
            `use_bias`, `kernel_initializer`, ...), and of
            `keras.layers.Layer`.

    Call arguments:
        inputs: Tensor of shape `(batch, ..., dim)`, of rank 2 or more.
        mask: Boolean tensor of shape `(batch, ...)`, or of its first axes;
            `False` where masked.
        training: bool. Whether to add losses, count, apply noise and dropout.
        context: Additional input of some routers: ids (of tokens, of tasks) of
            shape `(batch, ...)` or of its first axes, or numbers with one more
            axis. Defaults to `None`.
        router_inputs: Tensor `(batch, ..., router_dim)` that the router sees
            instead of the inputs. Defaults to `None`.

    Output shape:
        Same as the input, with the width of the experts' outputs. With
        `route_per="example"`, the output shape of the experts.

    Raises:
        ValueError: If arguments are out of range or do not fit together.

    Example:

    >>> layer = keras_moe.layers.MoE(num_experts=8, intermediate_dim=32)
    >>> tuple(layer(keras.ops.ones((2, 5, 16))).shape)
    (2, 5, 16)

    With your own parts, and latent experts of half the width:

    >>> layer = keras_moe.layers.MoE(
    ...     router=keras_moe.routers.TopKRouter(8, top_k=1, jitter=0.01),
    ...     experts=keras_moe.experts.MLPExperts(8, 32, activation="gelu"),
    ...     pre_experts=keras.layers.Dense(8, use_bias=False),
    ...     post_experts=keras.layers.Dense(16, use_bias=False),
    ...     capacity_factor=1.25,
    ... )
    >>> tuple(layer(keras.ops.ones((2, 5, 16))).shape)
    (2, 5, 16)

    Reference:

    - [Shazeer et al., 2017](https://arxiv.org/abs/1701.06538), equation 1
    - [Dai et al., 2024](https://arxiv.org/abs/2401.06066), equation 9 (shared)
    - [Rajbhandari et al., 2022](https://arxiv.org/abs/2201.05596), section 4.1
    """

    def __init__(
        self,
        num_experts=None,
        intermediate_dim=None,
        top_k=None,
        activation=None,
        router="top_k",
        experts="glu",
        shared_experts=None,
        shared_experts_mode="add",
        losses="default",
        capacity_factor=None,
        eval_capacity_factor=None,
        drop_policy=None,
        capacity=None,
        weights_on=None,
        pre_experts=None,
        post_experts=None,
        route_per="token",
        causal=False,
        return_routing=False,
        statistics="auto",
        dispatcher=None,
        *,
        name=None,
        **kwargs,
    ):
        of_experts, kwargs = parts.split_arguments("MoE", kwargs, experts)
        router, experts = parts.router_and_experts(
            router,
            experts,
            num_experts,
            kwargs.get("dtype"),
            {"top_k": top_k},
            {
                "intermediate_dim": intermediate_dim,
                "activation": activation,
                **of_experts,
            },
        )
        sender = parts.as_dispatcher(
            dispatcher,
            capacity,
            capacity_factor,
            eval_capacity_factor,
            drop_policy,
            weights_on,
            causal,
        )
        super().__init__(
            router,
            losses,
            route_per,
            causal,
            return_routing,
            name=name or parts.default_name(),
            **kwargs,
        )
        self.experts = foreign.as_experts(experts, routed=True)
        self.dispatcher = sender
        self._own_dispatcher = dispatcher is not None
        if sender.seed_generator is not None:
            self.seed_generator = sender.seed_generator
        parts.check_kept_weights(self.capacity, self.router)
        if causal:
            add_causal_layer(self, self.router, self.capacity, route_per)
        self.shared_experts = parts.as_layer("shared_experts", shared_experts)
        self.shared_experts_mode = shared_experts_mode
        check_shared_experts(self.shared_experts, shared_experts_mode)
        self.pre_experts = parts.as_layer("pre_experts", pre_experts)
        self.post_experts = parts.as_layer("post_experts", post_experts)
        self.add_statistics(statistics, self.capacity.limits(training=True))

    @property
    def capacity(self):
        return self.dispatcher.capacity

    def build(self, inputs_shape, router_inputs_shape=None):
        self.build_routing(inputs_shape, router_inputs_shape)
        tokens, rows, outputs = self._row_shapes(inputs_shape)
        for layer, shape in (
            (self.pre_experts, tokens),
            (self.experts, rows),
            (self.shared_experts, tokens),
            (self.post_experts, outputs),
        ):
            if layer is not None and not layer.built:
                layer.build(shape)
        self.shared_gate_kernel = None
        if self.shared_experts_mode in GATE_WIDTHS:
            width = GATE_WIDTHS[self.shared_experts_mode]
            self.shared_gate_kernel = self.add_weight(
                name="shared_gate_kernel",
                shape=(inputs_shape[-1], width),
                initializer="glorot_uniform",
            )

    def _row_shapes(self, inputs_shape):
        """Shapes of tokens, of the experts' rows, and of their outputs."""
        kept = 1 if self.route_per == "example" else -1
        tokens = (None, *inputs_shape[kept:])
        rows = foreign.output_shape_of(self.pre_experts, tokens)
        return tokens, rows, foreign.output_shape_of(self.experts, rows)

    def call(
        self,
        inputs,
        mask=None,
        training=None,
        context=None,
        router_inputs=None,
    ):
        tokens = self.to_tokens(inputs, mask, context, router_inputs)
        routing = self.routing_of(tokens, training)
        shared = shared_output(
            self.shared_experts, tokens.rows, tokens.mask, training
        )
        outputs, group_sizes = self._routed(
            tokens, self.watched(routing, training), training, shared
        )
        if shared is not None:
            mode, kernel = self.shared_experts_mode, self.shared_gate_kernel
            outputs = join(outputs, shared(), mode, tokens.features, kernel)
        if training:
            self.count(routing, tokens, group_sizes)
        outputs = ops.reshape(
            outputs, (*tokens.positions, *ops.shape(outputs)[1:])
        )
        return (outputs, routing) if self.return_routing else outputs

    def _routed(self, tokens, routing, training, meanwhile):
        """`(outputs, group_sizes)` of the experts, `(T, ...)` and `(E,)`."""
        rows, mask = tokens.rows, tokens.mask
        if self.pre_experts is not None:
            rows = call_masked(self.pre_experts, rows, mask)
        sent = (rows, routing, self.experts, mask, training, self.router)
        outputs, group_sizes = send(
            self.dispatcher,
            *sent,
            num_sequences=tokens.positions[0],
            meanwhile=meanwhile,
        )
        foreign.check_width(self.experts, rows.shape, outputs.shape)
        if self.post_experts is not None:
            outputs = call_masked(self.post_experts, outputs, mask)
            outputs = zero_masked(outputs, mask)
        return ops.cast(outputs, self.compute_dtype), group_sizes

    def compute_output_shape(self, inputs_shape, router_inputs_shape=None):
        shape = self._row_shapes(inputs_shape)[-1]
        shape = foreign.output_shape_of(self.post_experts, shape)
        kept = 1 if self.route_per == "example" else -1
        return (*inputs_shape[:kept], *shape[1:])

    def get_config(self):
        config = super().get_config()
        config["shared_experts_mode"] = self.shared_experts_mode
        for name in (
            "experts",
            "shared_experts",
            "pre_experts",
            "post_experts",
        ):
            config[name] = parts.serialize_part(getattr(self, name))
        sender = keras.saving.serialize_keras_object(self.dispatcher)
        own = {"dispatcher": sender} if self._own_dispatcher else None
        return {**config, **(own or sender["config"])}
