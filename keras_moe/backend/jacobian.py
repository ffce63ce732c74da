"""The gradients of several losses: what `keras.ops` does not have."""

import keras


def jacobian(function, values):
    """Gradients of each entry of a vector that depends on tensors.

    Args:
        function: `function(values) -> (T,)`.
        values: List of tensors.

    Returns:
        A list of `T` lists of gradients, each of the shape of its value, zeros
        where there is no dependence.
    """
    return _JACOBIANS[keras.config.backend()](function, values)


def _jax(function, values):
    import jax

    rows = jax.jacrev(function)(list(values))
    return [[row[t] for row in rows] for t in range(rows[0].shape[0])]


def _tensorflow(function, values):
    import tensorflow as tf

    with tf.GradientTape(persistent=True) as tape:
        losses = tf.unstack(function(values))
    rows = [
        tape.gradient(
            loss, values, unconnected_gradients=tf.UnconnectedGradients.ZERO
        )
        for loss in losses
    ]
    # The gradient of a gather is sparse.
    return [[tf.convert_to_tensor(g) for g in row] for row in rows]


def _torch(function, values):
    import torch

    losses = function(values)
    rows = []
    for loss in torch.unbind(losses):
        if loss.requires_grad:
            row = torch.autograd.grad(
                loss, values, retain_graph=True, materialize_grads=True
            )
        else:
            row = [torch.zeros_like(v) for v in values]
        rows.append(row)
    return rows


_JACOBIANS = {"jax": _jax, "tensorflow": _tensorflow, "torch": _torch}
