import inspect

import keras
from keras import ops

from keras_moe import experts as experts_lib
from keras_moe import losses as losses_lib
from keras_moe import routers as routers_lib
from keras_moe.experts import Experts
from keras_moe.layers.parts import agreed_num_experts
from keras_moe.layers.parts import default_name
from keras_moe.layers.parts import num_experts_of
from keras_moe.layers.parts import resolve_part
from keras_moe.layers.parts import serialize_part
from keras_moe.layers.routing_statistics import RoutingStatistics
from keras_moe.ops.capacity import expert_capacity
from keras_moe.ops.dispatch import DROP_POLICIES
from keras_moe.ops.dispatch import combine
from keras_moe.ops.dispatch import dispatch


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
    layer with `_` for `/`); see `statistics`. Nothing
    of that happens in inference.

    A frozen layer (`trainable=False`) still adds its losses, whose gradient
    reaches the layers before it, and still counts.

    Masked tokens give zero. They reach no expert, take no capacity and count
    in no loss and no statistic.

    The short form takes numbers and names; the long form takes objects, of
    which any part may be one's own layer.

    Args:
        num_experts: int. Number of experts. Required unless `router` or
            `experts` is an object.
        intermediate_dim: int. Width of each expert's hidden layer. Required if
            `experts` is a name.
        top_k: int. Experts per token, if `router` is a name. Defaults to what
            the router has by default, 2 for `"top_k"`.
        activation: Activation of the experts, if `experts` is a name. Defaults
            to what the experts have by default, `"silu"` for `"glu"`.
        router: `"top_k"`, `"switch"` or a router layer. Defaults to `"top_k"`.
        experts: `"glu"`, `"mlp"` or a layer with `num_experts` that is called
            as `experts(rows, group_sizes)`. Defaults to `"glu"`.
        shared_experts: A layer that all tokens go through, or `None`. With
            `keras_moe.experts` each token goes through every expert of the
            bank, and the results are summed. Defaults to `None`.
        shared_experts_gate: bool. Whether the shared experts' output is
            multiplied by `sigmoid(tokens @ shared_gate_kernel)`, one number a
            token (Qwen2-MoE). Defaults to `False`.
        losses: `"default"` for `LoadBalancingLoss(1e-2)` and
            `RouterZLoss(1e-3)`, `None` for none, a loss, or a list of losses.
            Defaults to `"default"`.
        capacity_factor: float, or `None`. Rows an expert takes at most, as a
            multiple of `tokens * top_k / num_experts`, where `tokens` are all
            tokens of the batch, padding included. What exceeds them is dropped
            and gives zero. `None` drops nothing. Defaults to `None`.
        eval_capacity_factor: float, or `None`. The same in inference, infinity
            to drop nothing. `None` is `capacity_factor`. Defaults to `None`.
        drop_policy: `"position"` drops later choices, among them later tokens,
            `"weight"` those with the smallest weight. Defaults to
            `"position"`.
        statistics: `"per_expert"` logs the load of every expert, `"summary"`
            the smallest and the largest, `"auto"` the former up to 8 experts,
            `None` counts nothing (and has no variables for it, so weights do
            not fit the other kinds). Defaults to `"auto"`.
        **kwargs: Arguments of `keras.layers.Layer`.

    Call arguments:
        inputs: Tensor of shape `(batch, ..., dim)`.
        mask: Boolean tensor of shape `(batch, ...)`, or of its first axes.
            `False` tokens are masked.
        training: bool. Whether to add losses, count, and apply noise and
            dropout.

    Input shape:
        `(batch, ..., dim)`, of rank 2 or more.

    Output shape:
        Same as the input.

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

    Reference:

    - [Shazeer et al., 2017](https://arxiv.org/abs/1701.06538), equation 1
    - [Fedus et al., 2021](https://arxiv.org/abs/2101.03961), section 2
    - [Dai et al., 2024](https://arxiv.org/abs/2401.06066), equation 9
      (shared experts)
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
        shared_experts_gate=False,
        losses="default",
        capacity_factor=None,
        eval_capacity_factor=None,
        drop_policy="position",
        statistics="auto",
        *,
        name=None,
        **kwargs,
    ):
        super().__init__(name=name or default_name(), **kwargs)
        num_experts = num_experts_of(num_experts, router, experts)
        self.router = resolve_part(
            routers_lib.get,
            "router",
            router,
            {
                "num_experts": num_experts,
                "name": "router",
                "dtype": self.dtype_policy,
            },
            {"top_k": top_k},
        )
        if isinstance(experts, str) and intermediate_dim is None:
            raise ValueError(
                "`intermediate_dim` must be given if `experts` is a name. "
                f"Received: intermediate_dim=None, experts={experts!r}"
            )
        self.experts = resolve_part(
            experts_lib.get,
            "experts",
            experts,
            {
                "num_experts": num_experts,
                "name": "experts",
                "dtype": self.dtype_policy,
            },
            {"intermediate_dim": intermediate_dim, "activation": activation},
        )
        self.num_experts = agreed_num_experts(
            num_experts, self.router, self.experts
        )
        if isinstance(shared_experts, dict):
            shared_experts = experts_lib.get(shared_experts)
        if not isinstance(shared_experts, (keras.layers.Layer, type(None))):
            raise ValueError(
                "`shared_experts` must be a layer or None. "
                f"Received: shared_experts={shared_experts!r}"
            )
        self.shared_experts = shared_experts
        if shared_experts_gate and shared_experts is None:
            raise ValueError(
                "`shared_experts_gate` needs `shared_experts`. "
                "Received: shared_experts_gate=True, shared_experts=None"
            )
        self.shared_experts_gate = shared_experts_gate
        self.routing_losses = losses_lib.get(losses)
        for name, factor in (
            ("capacity_factor", capacity_factor),
            ("eval_capacity_factor", eval_capacity_factor),
        ):
            if factor is not None and (
                not isinstance(factor, (int, float)) or not factor > 0
            ):
                raise ValueError(
                    f"`{name}` must be positive or None. "
                    f"Received: {name}={factor!r}"
                )
        self.capacity_factor = capacity_factor
        self.eval_capacity_factor = eval_capacity_factor
        if drop_policy not in DROP_POLICIES:
            raise ValueError(
                f"`drop_policy` must be one of {DROP_POLICIES}. "
                f"Received: drop_policy={drop_policy!r}"
            )
        self.drop_policy = drop_policy
        self._statistics_detail = statistics
        self.statistics = None
        if statistics is not None:
            self.statistics = RoutingStatistics(
                self.num_experts, statistics, name="statistics"
            )
        self.supports_masking = True

    def build(self, input_shape):
        if len(input_shape) < 2 or input_shape[-1] is None:
            raise ValueError(
                "The input of MoE must be of shape (batch, ..., dim) with a "
                f"static dim. Received: input_shape={tuple(input_shape)}"
            )
        dim = input_shape[-1]
        self.input_spec = keras.layers.InputSpec(min_ndim=2, axes={-1: dim})
        for layer in (self.router, self.experts, self.shared_experts):
            if layer is not None and not layer.built:
                layer.build((None, dim))
        if self.shared_experts_gate:
            self.shared_gate_kernel = self.add_weight(
                name="shared_gate_kernel",
                shape=(dim, 1),
                initializer="glorot_uniform",
            )
        if self.statistics is not None and not self.statistics.built:
            self.statistics.build()

    def call(self, inputs, mask=None, training=None):
        tokens, mask = self._tokens(inputs, mask)  # (T, D), (T,)
        routing = self.router(tokens, mask=mask, training=training)
        rows, group_sizes, plan = dispatch(
            tokens,
            routing,
            self.num_experts,
            mask,
            self._capacity(routing, training),
            self.drop_policy,
        )
        rows = self.exchange(rows, group_sizes, training)  # (N, D)
        if rows.shape[-1] != inputs.shape[-1]:
            raise ValueError(
                "`experts` must keep the width of their rows. Received rows "
                f"of width {inputs.shape[-1]}, returned {rows.shape[-1]}"
            )
        outputs = combine(rows, plan, routing.expert_weights)
        outputs = ops.cast(outputs, self.compute_dtype)
        if self.shared_experts is not None:
            outputs = outputs + self._shared_output(tokens, mask, training)
        if training:
            for loss in self.routing_losses:
                # In half precision TensorFlow cannot add it to the others.
                self.add_loss(ops.cast(loss(routing, mask), "float32"))
            if self.statistics is not None:
                self.statistics.record(routing, group_sizes, mask)
        return ops.reshape(outputs, ops.shape(inputs))

    def route(self, inputs, mask=None, training=False):
        """The routing decisions of the layer for the given inputs.

        Args:
            inputs: Tensor of shape `(batch, ..., dim)`.
            mask: Boolean tensor of shape `(batch, ...)`, or `None`.
            training: bool. Whether the router applies noise.

        Returns:
            A `keras_moe.routers.Routing` of the `T` tokens in the order of
            `reshape(inputs, (-1, dim))`. Nothing is counted, no loss is added.
        """
        if not self.built:
            self.build(inputs.shape)
        tokens, mask = self._tokens(ops.convert_to_tensor(inputs), mask)
        return self.router(tokens, mask=mask, training=training)

    def exchange(self, rows, group_sizes, training=None):
        """Takes rows to their experts and brings back what these make of them.

        The seam for expert parallelism: here rows will travel to the devices
        that own their experts. So far one device owns them all.
        """
        return self.experts(rows, group_sizes, training=training)

    def _tokens(self, inputs, mask):
        inputs = ops.cast(inputs, self.compute_dtype)
        tokens = ops.reshape(inputs, (-1, inputs.shape[-1]))
        if mask is None:
            return tokens, None
        positions = ops.shape(inputs)[:-1]
        mask = ops.cast(mask, "bool")
        if len(mask.shape) > len(positions):
            raise ValueError(
                "`mask` must have the shape of the inputs without their last "
                "axis, or of their first axes. Received: "
                f"mask.shape={tuple(mask.shape)}, "
                f"inputs.shape={tuple(inputs.shape)}"
            )
        missing = len(positions) - len(mask.shape)
        mask = ops.reshape(mask, tuple(ops.shape(mask)) + (1,) * missing)
        mask = ops.reshape(ops.broadcast_to(mask, positions), (-1,))
        # Whatever padding holds, NaN included, it must reach no gradient.
        keep = ops.expand_dims(mask, -1)
        return ops.where(keep, tokens, ops.zeros_like(tokens)), mask

    def _capacity(self, routing, training):
        factor = self.capacity_factor
        if not training and self.eval_capacity_factor is not None:
            factor = self.eval_capacity_factor
        num_tokens, top_k = ops.shape(routing.expert_indices)
        return expert_capacity(num_tokens, self.num_experts, top_k, factor)

    def _shared_output(self, tokens, mask, training):
        if isinstance(self.shared_experts, Experts):
            copies = self.shared_experts.num_experts
            num_tokens = ops.shape(tokens)[0]
            rows = self.shared_experts(
                ops.tile(tokens, (copies, 1)),
                ops.full((copies,), num_tokens, "int32"),
                training=training,
            )
            rows = ops.reshape(rows, (copies, num_tokens, tokens.shape[-1]))
            shared = ops.sum(rows, axis=0)
        else:
            takes_mask = inspect.signature(self.shared_experts.call).parameters
            masks = {"mask": mask} if "mask" in takes_mask else {}
            shared = self.shared_experts(tokens, **masks)
        if shared.shape[-1] != tokens.shape[-1]:
            raise ValueError(
                "`shared_experts` must keep the width of the tokens. Received "
                f"width {tokens.shape[-1]}, returned {shared.shape[-1]}"
            )
        shared = ops.cast(shared, self.compute_dtype)
        if self.shared_experts_gate:
            gate = ops.matmul(tokens, self.shared_gate_kernel)
            shared = ops.sigmoid(gate) * shared
        if mask is not None:
            keep = ops.expand_dims(mask, -1)
            shared = ops.where(keep, shared, ops.zeros_like(shared))
        return shared

    def compute_output_shape(self, input_shape):
        return tuple(input_shape)

    def get_config(self):
        return {
            **super().get_config(),
            "router": serialize_part(self.router),
            "experts": serialize_part(self.experts),
            "shared_experts": serialize_part(self.shared_experts),
            "shared_experts_gate": self.shared_experts_gate,
            "losses": [
                keras.saving.serialize_keras_object(loss)
                for loss in self.routing_losses
            ],
            "capacity_factor": self.capacity_factor,
            "eval_capacity_factor": self.eval_capacity_factor,
            "drop_policy": self.drop_policy,
            "statistics": self._statistics_detail,
        }
