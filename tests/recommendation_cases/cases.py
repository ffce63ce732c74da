"""The recorded cases, and how their gradients are taken."""

import json
import pathlib

import keras
import numpy as np
from keras import ops

DATA = pathlib.Path(__file__).parents[1] / "data" / "recommendation"


def named():
    """`(name, path)` of each case."""
    found = [(path.stem, path) for path in sorted(DATA.glob("*.json"))]
    if not found:
        raise ValueError(f"No recorded case in {DATA}")
    return found


def load(path):
    """The JSON and the arrays of a case."""
    with np.load(path.with_suffix(".npz")) as arrays:
        return json.loads(path.read_text()), dict(arrays)


def run(trunk, inputs, cotangents):
    """Outputs, and the gradients of `sum(outputs * cotangents)`.

    Those of the inputs are by their name, those of the weights by their path.
    """
    differentiate = {
        "jax": _run_jax,
        "tensorflow": _run_tensorflow,
        "torch": _run_torch,
    }[keras.config.backend()]
    tensors = {
        name: ops.convert_to_tensor(value) for name, value in inputs.items()
    }
    floats = {
        name: tensor
        for name, tensor in tensors.items()
        if inputs[name].dtype.kind == "f"
    }
    others = {k: v for k, v in tensors.items() if k not in floats}

    def objective(outputs):
        return sum(
            ops.sum(outputs[name] * ops.convert_to_tensor(cotangent))
            for name, cotangent in cotangents.items()
        )

    outputs, d_inputs, d_weights = differentiate(
        trunk, floats, others, objective
    )
    paths = [variable.path for variable in trunk.trainable_variables]
    return tuple(
        {name: ops.convert_to_numpy(value) for name, value in values.items()}
        for values in (
            outputs,
            d_inputs,
            dict(zip(paths, d_weights, strict=True)),
        )
    )


def _run_jax(trunk, floats, others, objective):
    import jax

    state = [v.value for v in trunk.non_trainable_variables]

    def loss(weights, floats):
        outputs, _ = trunk.stateless_call(weights, state, {**floats, **others})
        return objective(outputs), outputs

    weights = [v.value for v in trunk.trainable_variables]
    (d_weights, d_inputs), outputs = jax.jit(
        jax.grad(loss, argnums=(0, 1), has_aux=True)
    )(weights, floats)
    return outputs, d_inputs, d_weights


def _run_tensorflow(trunk, floats, others, objective):
    import tensorflow as tf

    weights = [v.value for v in trunk.trainable_variables]

    @tf.function
    def run(floats):
        with tf.GradientTape() as tape:
            tape.watch(floats)
            outputs = trunk({**floats, **others})
            loss = objective(outputs)
        gradients = tape.gradient(
            loss,
            [floats, weights],
            unconnected_gradients=tf.UnconnectedGradients.ZERO,
        )
        d_weights = [tf.convert_to_tensor(d) for d in gradients[1]]
        return outputs, gradients[0], d_weights

    return run(floats)


def _run_torch(trunk, floats, others, objective):
    import torch

    floats = {k: v.clone().requires_grad_() for k, v in floats.items()}
    weights = [v.value for v in trunk.trainable_variables]
    outputs = trunk({**floats, **others})
    gradients = torch.autograd.grad(
        objective(outputs),
        [*floats.values(), *weights],
        materialize_grads=True,
    )
    d_inputs = dict(zip(floats, gradients, strict=False))
    return outputs, d_inputs, gradients[len(floats) :]
