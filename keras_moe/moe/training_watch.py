"""Warns once if training loses the losses of a layer."""

import warnings

from keras_moe import backend


class TrainingWatch:
    """Follows the gradients of one layer until its losses have one.

    Two mistakes silently disable the balancing losses: `training=True` does not
    reach the layer, or a training step leaves out the model's added losses.
    After the first gradient through the layer's losses, this class does
    nothing.
    """

    def __init__(self):
        self._in_a_loop = False
        self._is_told = False
        self._weights_learn = False
        self._losses_learn = False

    def begin(self):
        """Notes that Keras lists metrics, as in `fit` and `evaluate`."""
        self._in_a_loop = True
        self._report()

    def routing(self, routing, training):
        """The routing, with its weights followed while needed."""
        if self._losses_learn:
            return routing
        self._report()
        notice = self._notice_untold
        if training:
            self._is_told, notice = True, self._notice_weights
        elif self._is_told or not self._in_a_loop:
            return routing
        weights = backend.on_gradient(routing.expert_weights, notice)
        if weights is None:
            return routing
        return routing._replace(expert_weights=weights)

    def losses(self, values):
        """The losses of a training step, followed while needed."""
        if self._losses_learn:
            return values
        followed = [backend.on_gradient(v, self._notice_losses) for v in values]
        if all(value is None for value in followed):
            self._notice_losses()  # no losses, or no way to follow them
        return [
            value if other is None else other
            for value, other in zip(values, followed, strict=True)
        ]

    def _notice_weights(self):
        self._weights_learn = True

    def _notice_losses(self):
        self._losses_learn = True

    def _notice_untold(self):
        if not self._is_told:
            self._is_told = True
            warnings.warn(
                "A MoE layer is trained without being told so, and thus "
                "without its balancing losses, noise and statistics. Let the "
                "model's `call` take `training` and hand it on to the layers "
                "(on JAX, Keras does not do that in a subclassed model), and "
                "pass `training=True` in a training step of your own.",
                stacklevel=2,
            )

    def _report(self):
        if self._weights_learn and not self._losses_learn:
            self._losses_learn = True
            warnings.warn(
                "A MoE layer is trained without its balancing losses: no "
                "gradient came through them. A `compute_loss` or a training "
                "step of your own must add `sum(model.losses)`; with JAX's "
                "`stateless_call` pass `return_losses=True`.",
                stacklevel=2,
            )
