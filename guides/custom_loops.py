"""Training loops of your own.

`fit` trains a model with `MoE` like any other. A loop of your own has to do two
things that `fit` does, or the experts are trained without their balancing
losses:

- call the model with `training=True`: losses, noise and statistics are for
  training alone, and neither `model.train()` on PyTorch nor a gradient tape
  tells Keras that it is training;
- add `sum(model.losses)` to the loss. `MoE` adds two by default, so what sums
  one array does not do: `jnp.sum(losses)` takes no list, and
  `torch.sum(*model.losses)` takes the second loss for an axis.

On JAX the losses come out of `stateless_call` with `return_losses=True`. A
layer warns once where it sees that its losses are lost.

Here one model is trained in three ways, which end at the same weights. Run this
file as it is, on any backend:

    KERAS_BACKEND=torch python guides/custom_loops.py
"""

import keras
import numpy as np
from keras import ops

import keras_moe

mean_squared_error = keras.losses.MeanSquaredError()


def make_data(num_batches=12, batch_size=16):
    rng = np.random.default_rng(0)
    x = rng.normal(size=(num_batches, batch_size, 6, 8)).astype("float32")
    return list(zip(x, np.abs(x).mean(axis=(2, 3))[..., None], strict=True))


def make_model(model_class=keras.Model):
    keras.utils.set_random_seed(0)
    inputs = keras.Input((6, 8))
    x = inputs + keras_moe.layers.MoE(4, 16, name="moe")(inputs)
    x = keras.layers.GlobalAveragePooling1D()(x)
    return model_class(inputs, keras.layers.Dense(1)(x))


# ## PyTorch


def train_torch(model, optimizer, batches):
    import torch

    variables = model.trainable_variables
    for x, y in batches:
        model.zero_grad()
        predictions = model(x, training=True)
        loss = mean_squared_error(y, predictions) + sum(model.losses)
        loss.backward()
        with torch.no_grad():
            optimizer.apply([v.value.grad for v in variables], variables)


# An optimizer of PyTorch does as well:
# `torch.optim.SGD(model.parameters(), lr=0.1)`, and `optimizer.step()`.
#
# ## TensorFlow


def train_tensorflow(model, optimizer, batches):
    import tensorflow as tf

    @tf.function
    def step(x, y):
        with tf.GradientTape() as tape:
            predictions = model(x, training=True)
            loss = mean_squared_error(y, predictions) + sum(model.losses)
        gradients = tape.gradient(loss, model.trainable_variables)
        optimizer.apply(gradients, model.trainable_variables)

    for x, y in batches:
        step(x, y)


# ## JAX
#
# State goes into a step and comes out of it: the weights, what else changes in
# training (the routing's counts among it), and the optimizer's own.


def train_jax(model, optimizer, batches):
    import jax

    def compute_loss(weights, others, x, y):
        predictions, others, losses = model.stateless_call(
            weights, others, x, training=True, return_losses=True
        )
        return mean_squared_error(y, predictions) + sum(losses), others

    @jax.jit
    def step(weights, others, slots, x, y):
        gradient = jax.grad(compute_loss, has_aux=True)
        gradients, others = gradient(weights, others, x, y)
        weights, slots = optimizer.stateless_apply(slots, gradients, weights)
        return weights, others, slots

    optimizer.build(model.trainable_variables)
    variables = (
        model.trainable_variables,
        model.non_trainable_variables,
        optimizer.variables,
    )
    state = [[v.value for v in group] for group in variables]
    for x, y in batches:
        state = step(*state, x, y)
    # Back into the model, which can then be saved, or asked for statistics.
    for group, values in zip(variables, state, strict=True):
        for variable, value in zip(group, values, strict=True):
            variable.assign(value)


# ## A loss of your own, with `fit`
#
# Who overrides `compute_loss` has to add the losses too, or to call `super()`.


class ModelWithOwnLoss(keras.Model):
    def compute_loss(
        self, x=None, y=None, y_pred=None, sample_weight=None, training=True
    ):
        return ops.mean(ops.square(y_pred - y)) + sum(self.losses)


def train_fit(model, optimizer, batches, loss=mean_squared_error):
    model.compile(optimizer, loss)
    x, y = (np.concatenate(arrays) for arrays in zip(*batches, strict=True))
    model.fit(x, y, batch_size=len(batches[0][0]), shuffle=False, verbose=0)


def train_own_loss(model, optimizer, batches):
    train_fit(model, optimizer, batches, loss=None)


# ## All of them


def main():
    own_loop = {
        "torch": train_torch,
        "tensorflow": train_tensorflow,
        "jax": train_jax,
    }[keras.config.backend()]
    batches = make_data()
    models = {
        "fit": (train_fit, make_model()),
        "own loss": (train_own_loss, make_model(ModelWithOwnLoss)),
        "own loop": (own_loop, make_model()),
    }
    weights, loads = {}, {}
    for name, (train, model) in models.items():
        train(model, keras.optimizers.SGD(0.1, momentum=0.9), batches)
        weights[name] = model.get_weights()
        # What the router did. Without `fit` nobody resets it: where an epoch
        # begins, `model.get_layer("moe").statistics.reset()` does.
        statistics = model.get_layer("moe").statistics.result()
        loads[name] = statistics["expert_load"]
        print(f"{name}: load of each expert", loads[name].round(3))
    return weights, loads


if __name__ == "__main__":
    main()
