import keras
from keras import ops

from keras_moe import experts as experts_lib
from keras_moe import losses as losses_lib
from keras_moe import routers as routers_lib
from keras_moe.checks import check_one_of
from keras_moe.dispatch.send import mix_tokens
from keras_moe.dispatch.send import plan_sending
from keras_moe.dispatch.send import send_rows
from keras_moe.losses import RoutingLoss
from keras_moe.moe.part_arguments import agreed_num_experts
from keras_moe.moe.part_arguments import capacity_of
from keras_moe.moe.part_arguments import check_causal
from keras_moe.moe.part_arguments import check_intermediate_dim
from keras_moe.moe.part_arguments import check_kept_weights
from keras_moe.moe.part_arguments import check_layer
from keras_moe.moe.part_arguments import default_name
from keras_moe.moe.part_arguments import num_experts_of
from keras_moe.moe.part_arguments import resolve_part
from keras_moe.moe.part_arguments import serialize_part
from keras_moe.moe.routing_statistics import RoutingStatistics
from keras_moe.moe.shared_experts import add_shared_gate
from keras_moe.moe.shared_experts import check_shared_experts
from keras_moe.moe.shared_experts import join
from keras_moe.moe.tokens import call_masked
from keras_moe.moe.tokens import flatten_context
from keras_moe.moe.tokens import output_shape
from keras_moe.moe.tokens import output_spec
from keras_moe.moe.tokens import routed_positions
from keras_moe.moe.tokens import shape_behind
from keras_moe.moe.tokens import to_tokens
from keras_moe.moe.tokens import tokens_shape
from keras_moe.ops.masking import zero_masked


@keras.saving.register_keras_serializable("keras_moe")
class MoE(keras.layers.Layer):
    """A sparse mixture of experts in the place of a feed-forward block.

    ```
    routing = router(tokens)
    y[t]    = sum over k of expert_weights[t, k]
                            * experts[expert_indices[t, k]](tokens[t])
    y       = y + shared_experts(tokens)
    ```

    Only the chosen experts are computed: the cost is that of `top_k` experts
    per token, however many there are. In training the balancing losses are
    added to the model's loss, and what the router does is counted and shown in
    the logs of `fit` (`moe_load_0` ..., `moe_dropped_fraction`,
    `moe_routing_entropy`, `moe_dead_experts`, where `moe` is the path of the
    layer with `_` for `/`); see `statistics`. Nothing of that happens in
    inference. A frozen layer (`trainable=False`) still adds its losses, whose
    gradient reaches the layers before it, and still counts.

    Masked tokens give zero. They reach no expert, take no capacity and count
    in no loss and no statistic.

    Args:
        num_experts: int. Number of experts. Required unless `router` or
            `experts` is an object.
        intermediate_dim: int. Width of each expert's hidden layer. Required if
            `experts` is a name.
        top_k: int. Experts per token, if `router` is a name. Defaults to what
            the router has by default, 2 for `"top_k"`.
        activation: Activation of the experts, if `experts` is a name. Defaults
            to what the experts have by default, `"silu"` for `"glu"`.
        router: A name of `keras_moe.routers.get` or a router layer. Defaults
            to `"top_k"`.
        experts: A name of `keras_moe.experts.get` or a layer with
            `num_experts` that is called as `experts(rows, group_sizes)`.
            Defaults to `"glu"`.
        shared_experts: A layer that all tokens go through, or `None`. With
            `keras_moe.experts` each token goes through every expert of the
            bank, and the results are summed. Defaults to `None`.
        shared_experts_mode: How they join the routed output. Defaults to
            `"add"`.
            - `"add"`: `routed + shared` (DeepSeek).
            - `"gate"`: shared times a learned sigmoid a token (Qwen2-MoE).
            - `"average"`: `(routed + shared) / 2` (Cohere).
            - `"residual"`: both times a learned softmax a token (DeepSpeed).
        losses: `"default"` for `LoadBalancingLoss(1e-2)` and
            `RouterZLoss(1e-3)`, `None` for none, a loss, or a list of losses.
            Defaults to `"default"`.
        capacity_factor: float, or `None`. Rows an expert takes at most, as a
            multiple of `tokens * top_k / num_experts`, where `tokens` are all
            tokens of the batch, padding included. What exceeds them is dropped
            and gives zero. `None` drops nothing. Defaults to `None`.
        eval_capacity_factor: float, or `None`. The same in inference, infinity
            to drop nothing. `None` is `capacity_factor`. Defaults to `None`.
        drop_policy: Who stays, as in `Capacity`. Defaults to `"position"`.
        capacity: A `Capacity`, for all else there is to say about it; in the
            place of the three arguments above. Defaults to `None`.
        weights_on: `"output"` multiplies the experts' outputs by the weights,
            `"input"` their inputs (Llama 4). Defaults to `"output"`.
        pre_experts: A layer between the tokens and the experts, which neither
            the router nor the shared experts see: a projection to fewer
            dimensions (latent experts), a normalization. Defaults to `None`.
        post_experts: A layer behind the experts, on the sum of their outputs:
            the projection back, a scale. Defaults to `None`.
        route_per: `"token"`, or `"example"` to send whole examples to experts
            that need them whole (convolutions, recurrent layers, attention;
            `keras_moe.experts.LayerExperts`). The router then sees the mean
            over the positions that are not masked, the experts zeros at those
            that are. Defaults to `"token"`.
        causal: bool. Whether the layer stands in a model where a token may not
            depend on later ones. Then routers and drop policies that look ahead
            are refused. Defaults to `False`.
        return_routing: bool. Whether to return `(outputs, routing)`. Defaults
            to `False`.
        statistics: `"per_expert"` logs the load of every expert, `"summary"`
            the smallest and the largest, `"auto"` the former up to 8 experts,
            `None` nothing, without variables for it. Defaults to `"auto"`.
        **kwargs: Arguments of `keras.layers.Layer`.

    Call arguments:
        inputs: Tensor of shape `(batch, ..., dim)`.
        mask: Boolean tensor of shape `(batch, ...)`, or of its first axes.
            `False` tokens are masked.
        training: bool. Whether to add losses, count, and apply noise and
            dropout.
        context: What some routers take besides the tokens: ids (of tokens, of
            tasks) of shape `(batch, ...)` or of its first axes, or numbers with
            one more axis. Defaults to `None`.

    Input shape:
        `(batch, ..., dim)`, of rank 2 or more.

    Output shape:
        Same as the input, but for the last axis if the experts' outputs are
        wider or narrower. With `route_per="example"` that of the experts.

    Raises:
        ValueError: If arguments are out of range or do not fit together.

    Example:

    >>> layer = keras_moe.layers.MoE(
    ...     num_experts=8, intermediate_dim=32, top_k=2
    ... )
    >>> tuple(layer(keras.ops.ones((2, 5, 16))).shape)
    (2, 5, 16)

    >>> layer = keras_moe.layers.MoE(
    ...     router=keras_moe.routers.TopKRouter(8, top_k=1, jitter=0.01),
    ...     experts=keras_moe.experts.MLPExperts(8, 32, activation="gelu"),
    ...     capacity_factor=1.25,
    ... )
    >>> tuple(layer(keras.ops.ones((2, 5, 16))).shape)
    (2, 5, 16)

    Latent experts, which cost half as much to send rows to and to compute:

    >>> layer = keras_moe.layers.MoE(
    ...     num_experts=8,
    ...     intermediate_dim=32,
    ...     pre_experts=keras.layers.Dense(8, use_bias=False),
    ...     post_experts=keras.layers.Dense(16, use_bias=False),
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
        weights_on="output",
        pre_experts=None,
        post_experts=None,
        route_per="token",
        causal=False,
        return_routing=False,
        statistics="auto",
        *,
        name=None,
        **kwargs,
    ):
        super().__init__(name=name or default_name(), **kwargs)
        num_experts = num_experts_of(num_experts, router, experts)
        defaults = {"num_experts": num_experts, "dtype": self.dtype_policy}
        self.router = resolve_part(
            routers_lib.get,
            "router",
            router,
            {**defaults, "name": "router"},
            {"top_k": top_k},
        )
        check_intermediate_dim(intermediate_dim, experts)
        self.experts = resolve_part(
            experts_lib.get,
            "experts",
            experts,
            {**defaults, "name": "experts"},
            {"intermediate_dim": intermediate_dim, "activation": activation},
        )
        self.num_experts = agreed_num_experts(
            num_experts, self.router, self.experts
        )
        if isinstance(shared_experts, dict):
            shared_experts = experts_lib.get(shared_experts)
        check_shared_experts(shared_experts, shared_experts_mode)
        self.shared_experts = shared_experts
        self.shared_experts_mode = shared_experts_mode
        self.routing_losses = losses_lib.get(losses)
        self.capacity = capacity_of(
            capacity, capacity_factor, eval_capacity_factor, drop_policy
        )
        if self.capacity.drop_policy == "random":
            self.seed_generator = keras.random.SeedGenerator(self.capacity.seed)
        check_one_of("weights_on", weights_on, ("output", "input"))
        self.weights_on = weights_on
        self.pre_experts = check_layer("pre_experts", pre_experts)
        self.post_experts = check_layer("post_experts", post_experts)
        check_one_of("route_per", route_per, ("token", "example"))
        self.route_per = route_per
        check_causal(causal, self.router, self.capacity, route_per)
        check_kept_weights(self.capacity, self.router)
        self.causal = causal
        self.return_routing = return_routing
        self._statistics_detail = statistics
        self.statistics = None
        if statistics is not None:
            self.statistics = RoutingStatistics(
                self.num_experts, statistics, name="statistics"
            )
        self.supports_masking = True

    def build(self, input_shape):
        rank = 2 if self.route_per == "token" else 3
        if len(input_shape) < rank or input_shape[-1] is None:
            raise ValueError(
                "The input of MoE must be of shape (batch, ..., dim) with a "
                f"static dim, and of rank {rank} or more with "
                f"`route_per={self.route_per!r}`. "
                f"Received: input_shape={tuple(input_shape)}"
            )
        dim = input_shape[-1]
        self.input_spec = keras.layers.InputSpec(min_ndim=rank, axes={-1: dim})
        tokens = tokens_shape(self, input_shape)
        rows = shape_behind(self.pre_experts, tokens)
        outputs = shape_behind(self.experts, rows)
        for layer, shape in (
            (self.router, (None, dim)),
            (self.pre_experts, tokens),
            (self.experts, rows),
            (self.shared_experts, tokens),
            (self.post_experts, outputs),
        ):
            if layer is not None and not layer.built:
                layer.build(shape)
        self.shared_gate_kernel = add_shared_gate(self, dim)
        if self.statistics is not None and not self.statistics.built:
            self.statistics.build()

    def call(self, inputs, mask=None, training=None, context=None):
        inputs = ops.cast(inputs, self.compute_dtype)
        features, tokens, mask = to_tokens(inputs, mask, self.route_per)
        positions = routed_positions(inputs, self.route_per)
        context = flatten_context(context, positions)
        routing = self._route(features, mask, training, context, positions[0])
        sent = tokens
        if self.pre_experts is not None:
            sent = call_masked(self.pre_experts, tokens, mask)
        sending = plan_sending(self, routing, mask, training, positions[0])
        outputs = None
        # Unless a subclass, or an attribute, says how rows travel.
        if getattr(self.exchange, "__func__", None) is MoE.exchange:
            outputs = mix_tokens(self, sent, sending, training)
        if outputs is None:
            outputs = send_rows(self, sent, routing, sending, training)
        if self.post_experts is not None:
            outputs = call_masked(self.post_experts, outputs, mask)
            outputs = zero_masked(outputs, mask)
        outputs = ops.cast(outputs, self.compute_dtype)
        if self.shared_experts is not None:
            outputs = join(self, outputs, tokens, features, mask, training)
        if training:
            self._add_losses(routing, mask, positions[0], context)
            if self.statistics is not None:
                self.statistics.record(
                    routing, sending.group_sizes, mask, sending.limited
                )
        outputs = ops.reshape(outputs, (*positions, *ops.shape(outputs)[1:]))
        return (outputs, routing) if self.return_routing else outputs

    def route(self, inputs, mask=None, training=False, context=None):
        """The routing decisions of the layer for the given inputs.

        Args:
            inputs: Tensor of shape `(batch, ..., dim)`.
            mask: Boolean tensor of shape `(batch, ...)`, or `None`.
            training: bool. Whether the router does what it does in training:
                noise, and steps of what it keeps for balance.
            context: What the router takes besides, or `None`.

        Returns:
            A `keras_moe.routers.Routing` of the `T` tokens in the order of
            `reshape(inputs, (-1, dim))`. Nothing is counted, and no loss of
            this layer is added.
        """
        inputs = ops.convert_to_tensor(inputs)
        if not self.built:
            self.build(inputs.shape)
        inputs = ops.cast(inputs, self.compute_dtype)
        features, _, mask = to_tokens(inputs, mask, self.route_per)
        positions = routed_positions(inputs, self.route_per)
        context = flatten_context(context, positions)
        return self._route(features, mask, training, context, positions[0])

    def exchange(self, rows, group_sizes, training=None, max_group_size=None):
        """Takes rows to their experts and brings back what these make of them.

        The seam for expert parallelism: here rows will travel to the devices
        that own their experts. So far one device owns them all, and unless
        this method is overridden, experts that can (`mix`) take the tokens
        themselves.
        """
        kwargs = {}
        if getattr(self.experts, "uses_max_group_size", False):
            kwargs["max_group_size"] = max_group_size
        return self.experts(rows, group_sizes, training=training, **kwargs)

    def _route(self, features, mask, training, context, num_sequences):
        kwargs = {}
        if getattr(self.router, "uses_context", False):
            kwargs["context"] = context
        elif context is not None and not any(
            getattr(loss, "uses_context", False) for loss in self.routing_losses
        ):
            raise ValueError(
                "`context` is for routers and losses that use it. Received a "
                f"context and router={self.router!r}"
            )
        if getattr(self.router, "looks_ahead", False):
            kwargs["num_sequences"] = num_sequences
        return self.router(features, mask=mask, training=training, **kwargs)

    def _add_losses(self, routing, mask, num_sequences, context):
        for loss in self.routing_losses:
            more = ()
            if isinstance(loss, RoutingLoss):
                more = (num_sequences, context)
            # In half precision TensorFlow cannot add it to the others.
            self.add_loss(ops.cast(loss(routing, mask, *more), "float32"))

    def compute_output_spec(
        self, inputs, mask=None, training=None, context=None
    ):
        return output_spec(self, inputs, training, context)

    def compute_output_shape(self, input_shape):
        return output_shape(self, input_shape)

    def compute_mask(self, inputs, previous_mask):
        return previous_mask if self.route_per == "token" else None

    def get_config(self):
        return {
            **super().get_config(),
            "router": serialize_part(self.router),
            "experts": serialize_part(self.experts),
            "shared_experts": serialize_part(self.shared_experts),
            "shared_experts_mode": self.shared_experts_mode,
            "losses": [
                keras.saving.serialize_keras_object(loss)
                for loss in self.routing_losses
            ],
            "capacity": keras.saving.serialize_keras_object(self.capacity),
            "weights_on": self.weights_on,
            "pre_experts": serialize_part(self.pre_experts),
            "post_experts": serialize_part(self.post_experts),
            "route_per": self.route_per,
            "causal": self.causal,
            "return_routing": self.return_routing,
            "statistics": self._statistics_detail,
        }
