import keras
from keras import ops

from keras_moe import backend
from keras_moe import losses as losses_lib
from keras_moe.checks import check_bool
from keras_moe.checks import check_one_of
from keras_moe.moe import tokens as tokens_lib
from keras_moe.moe.foreign_parts import as_loss
from keras_moe.moe.foreign_parts import as_router
from keras_moe.moe.foreign_parts import check_routing
from keras_moe.moe.foreign_parts import serialize_loss
from keras_moe.moe.part_arguments import serialize_part
from keras_moe.moe.routing_statistics import RoutingStatistics
from keras_moe.moe.training_watch import TrainingWatch


class RoutedLayer(keras.layers.Layer):
    """Base of layers with a router: tokens, routing, losses and statistics.

    A subclass calls `add_statistics` once it has its other parts. It reads its
    inputs with `to_tokens`, gets their routing from `routing_of`, and reports
    the result to `count`.

    Args:
        router: A router layer.
        losses, route_per, causal, return_routing: As for
            `keras_moe.layers.MoE`.
        **kwargs: Arguments of `keras.layers.Layer`.
    """

    def __init__(
        self, router, losses, route_per, causal, return_routing, **kwargs
    ):
        # No autocast: it would round a context to half precision.
        super().__init__(autocast=False, **kwargs)
        check_one_of("route_per", route_per, ("token", "example"))
        check_bool("causal", causal)
        check_bool("return_routing", return_routing)
        self.router = as_router(router)
        self.num_experts = router.num_experts
        self.routing_losses = [as_loss(x) for x in losses_lib.get(losses)]
        for loss in self.routing_losses:
            loss.check_router(self.router)
        self.route_per = route_per
        self.causal = causal
        self.return_routing = return_routing
        self._watch = TrainingWatch()
        self.supports_masking = True

    def add_statistics(self, detail, may_drop):
        """Makes the statistics, the last part in the order of variables.

        Args:
            detail: The argument `statistics` of `keras_moe.layers.MoE`.
            may_drop: bool. Whether choices may be dropped in training.
        """
        self.statistics = None
        if detail is not None:
            self.statistics = RoutingStatistics(
                self.num_experts,
                detail,
                may_drop,
                label=self.name,
                name="statistics",
            )

    def build_routing(self, inputs_shape, router_inputs_shape=None):
        """Builds the router and the statistics, and checks the input's rank."""
        rank = 2 if self.route_per == "token" else 3
        if len(inputs_shape) < rank or inputs_shape[-1] is None:
            raise ValueError(
                f"The input of {type(self).__name__} must be of shape (batch, "
                f"..., dim) with a static dim, and of rank {rank} or more with "
                f"`route_per={self.route_per!r}`. "
                f"Received: inputs_shape={tuple(inputs_shape)}"
            )
        self.input_spec = keras.layers.InputSpec(
            min_ndim=rank, axes={-1: inputs_shape[-1]}
        )
        if not self.router.built:
            seen = router_inputs_shape or inputs_shape
            self.router.build((None, seen[-1]))
        if self.statistics is not None and not self.statistics.built:
            self.statistics.build()

    def to_tokens(self, inputs, mask, context, router_inputs):
        """The `Tokens` of what the layer was called with."""
        return tokens_lib.to_tokens(
            ops.cast(inputs, self.compute_dtype),
            mask,
            self.route_per,
            context,
            router_inputs,
        )

    def routing_of(self, tokens, training):
        """The `Routing` of `Tokens`."""
        takers = (self.router, *self.routing_losses)
        if tokens.context is not None and not any(
            part.uses_context for part in takers
        ):
            raise ValueError(
                "`context` is for routers and losses that use it. Received a "
                f"context and router={self.router!r}"
            )
        kwargs = {}
        if self.router.uses_context:
            kwargs["context"] = tokens.context
        if self.router.looks_ahead:
            kwargs["num_sequences"] = tokens.positions[0]
        seen = tokens.router_inputs
        routing = self.router(
            seen, mask=tokens.mask, training=training, **kwargs
        )
        check_routing(routing, seen.shape[0], self.router)
        return routing

    def watched(self, routing, training):
        """The routing, followed where losses could be lost (`TrainingWatch`).

        A frozen layer, such as a teacher, loses nothing.
        """
        if not self.trainable:
            return routing
        return self._watch.routing(routing, training)

    @property
    def metrics(self):
        """The metrics of the parts, without the metric of the statistics.

        Keras asks both the statistics layer and this layer: the metric would be
        listed twice.
        """
        self._watch.begin()
        own = self.statistics and self.statistics.metric
        return [metric for metric in super().metrics if metric is not own]

    def count(self, routing, tokens, group_sizes):
        """Adds the losses of a training step, and counts the routing."""
        values = [
            # In half precision TensorFlow cannot add it to the others.
            ops.cast(
                loss(routing, tokens.mask, tokens.positions[0], tokens.context),
                "float32",
            )
            for loss in self.routing_losses
        ]
        for value in self._watch.losses(values):
            self.add_loss(value)
        if self.statistics is not None:
            self.statistics.record(routing, group_sizes, tokens.mask)

    def route(
        self,
        inputs,
        mask=None,
        training=False,
        context=None,
        router_inputs=None,
    ):
        """The routing decisions of the layer for the given inputs.

        Args:
            inputs, mask, context, router_inputs: As for a call.
            training: bool. Whether the router acts as in training: it applies
                noise and updates its balancing state.

        Returns:
            A `keras_moe.routers.Routing` of the `T` tokens in the order of
            `reshape(inputs, (-1, dim))`. Nothing is counted, and no loss of
            this layer is added.
        """
        inputs = ops.convert_to_tensor(inputs)
        shapes = [inputs.shape]
        if router_inputs is not None:
            router_inputs = ops.convert_to_tensor(router_inputs)
            shapes.append(router_inputs.shape)
        if not self.built:
            self.build(*shapes)
        tokens = self.to_tokens(inputs, mask, context, router_inputs)
        return self.routing_of(tokens, training)

    def compute_output_spec(
        self,
        inputs,
        mask=None,
        training=None,
        context=None,
        router_inputs=None,
    ):
        if self.router.needs_context and context is None:
            raise ValueError(
                f"The router of {type(self).__name__} needs a `context`. "
                f"Received: context=None, router={self.router!r}"
            )
        outputs = keras.KerasTensor(
            self.compute_output_shape(inputs.shape), dtype=self.compute_dtype
        )
        if not self.return_routing:
            return outputs
        seen = inputs if router_inputs is None else router_inputs
        return outputs, tokens_lib.routing_spec(
            self.router, seen.shape, self.route_per, training, context
        )

    def rematerialized_call(self, layer_call, *args, **kwargs):
        """The function that `keras.RematScope` calls instead of `call`."""
        recomputed = super().rematerialized_call(layer_call, *args, **kwargs)
        if recomputed is layer_call:
            return layer_call  # the scope is about other layers
        counted = self.statistics.variables if self.statistics else []
        counted = {id(variable) for variable in counted}
        changing = [
            variable.path
            for variable in self.non_trainable_variables
            if id(variable) not in counted
        ]
        if changing or not backend.REMAT_SCOPE_TAKES_ARGUMENTS:
            raise ValueError(
                f"`keras.RematScope` cannot recompute {type(self).__name__} "
                f"{self.name!r}: Keras hands it `training` as a tensor (JAX, "
                "TensorFlow), or a second run would meet state that the first "
                "has changed. Name the other layers (`mode='list_of_layers'`), "
                "take `mode='activations'`, or, without such state, put "
                "`keras.remat` around a function that calls the model's "
                f"`stateless_call`. Received: changing state={changing}"
            )
        return recomputed

    def compute_mask(self, inputs, previous_mask):
        return previous_mask if self.route_per == "token" else None

    def get_config(self):
        return {
            **super().get_config(),
            "router": serialize_part(self.router),
            "losses": [serialize_loss(loss) for loss in self.routing_losses],
            "route_per": self.route_per,
            "causal": self.causal,
            "return_routing": self.return_routing,
            "statistics": self.statistics and self.statistics.detail,
        }
