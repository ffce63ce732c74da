"""Clipping and accumulation of gradients over the replicas of a strategy.

Keras clips the gradient of each replica before it adds them up, so that the
result depends on their number; and it cannot accumulate gradients here, as
TensorFlow's strategies refuse updates inside a condition.
"""

import tensorflow as tf
from keras import ops

from keras_moe.backend.tensorflow import collectives

CLIPS = ("clipnorm", "global_clipnorm", "clipvalue")


def update_together(optimizer):
    """Makes an optimizer clip and accumulate gradients of the whole batch.

    Its state is then what it would be on one device. What needs neither is
    left to Keras.

    Raises:
        ValueError: If it also scales losses, averages weights, or has a
            schedule that counts the calls between two steps.
    """
    inner = getattr(optimizer, "inner_optimizer", optimizer)
    steps = inner.gradient_accumulation_steps
    if not steps and all(getattr(inner, name) is None for name in CLIPS):
        return
    has_schedule = isinstance(inner.get_config()["learning_rate"], dict)
    if inner is not optimizer or (steps and (inner.use_ema or has_schedule)):
        raise ValueError(
            "On several TensorFlow replicas, gradients cannot be clipped or "
            "accumulated together with a LossScaleOptimizer, nor accumulated "
            "with `use_ema` or a learning rate schedule. "
            f"Received: optimizer={optimizer!r}"
        )
    if "apply" in vars(optimizer):
        return  # was made so before
    keras_apply = optimizer.apply

    def apply(grads, trainable_variables=None):
        context = collectives.replica_context()
        if context is None:
            return keras_apply(grads, trainable_variables)
        team = collectives.Team(context)
        sums = accumulators(optimizer) if steps else trainable_variables
        grads, variables, sums = zip(
            *(
                (team.sum(tf.convert_to_tensor(grad)), variable, total)
                for grad, variable, total in zip(
                    grads, trainable_variables, sums, strict=True
                )
                if grad is not None
            ),
            strict=True,
        )
        if steps:
            context.merge_call(accumulate, (grads, variables, sums))
        else:
            step(grads, variables)

    def step(grads, variables):
        # Keras adds up the replicas' gradients, which are equal. A part of a
        # clipped gradient is not clipped again.
        replicas = tf.distribute.get_strategy().num_replicas_in_sync
        grads = [grad / replicas for grad in clipped(optimizer, grads)]
        keras_apply(grads, variables)

    def accumulate(strategy, grads, variables, sums):
        update = strategy.extended.update
        for total, grad in zip(sums, grads, strict=True):
            update(total.value, lambda v, g: v.assign_add(g), (grad,))
        # For the step, Keras is not to accumulate, nor to count calls.
        optimizer.gradient_accumulation_steps = None
        calls = optimizer.iterations

        def last():
            calls.assign(calls // steps)
            strategy.run(lambda: step([v / steps for v in sums], variables))
            calls.assign(calls * steps)
            for total in sums:
                update(total.value, lambda v: v.assign(tf.zeros_like(v)))

        def other():
            calls.assign(calls + 1)

        try:
            tf.cond(ops.equal((calls + 1) % steps, 0), last, other)
        finally:
            optimizer.gradient_accumulation_steps = steps

    optimizer.apply = apply


def accumulators(optimizer):
    """Where Keras adds up the gradients, in the order of the variables."""
    return [v for v in optimizer.variables if "gradient_accumulator" in v.name]


def clipped(optimizer, grads):
    """As Keras clips them."""
    if optimizer.clipnorm:
        return [_of_norm(grad, optimizer.clipnorm) for grad in grads]
    if optimizer.global_clipnorm:
        norm = ops.sqrt(sum(ops.sum(ops.square(grad)) for grad in grads))
        limit = optimizer.global_clipnorm
        factor = limit / ops.maximum(norm, limit)
        return [grad * ops.cast(factor, grad.dtype) for grad in grads]
    if optimizer.clipvalue:
        limit = optimizer.clipvalue
        return [ops.clip(grad, -limit, limit) for grad in grads]
    return grads


def _of_norm(grad, limit):
    norm = ops.sqrt(ops.sum(ops.square(grad)))
    return grad * ops.cast(limit / ops.maximum(norm, limit), grad.dtype)
