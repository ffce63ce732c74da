"""Writing a router of your own.

A router is a Keras layer from tokens to a `Routing`: which experts each token
goes to, and how much each of them counts. `MoE` does the rest: it sends only
the chosen rows to each expert, brings them back, adds the balancing losses,
honours masks and shows in the logs of `fit` how balanced the experts are.

Here we write one that the library does not have. Each expert has a prototype,
a point in the space of the tokens, and a token goes to the experts whose
prototypes are nearest. Run this file as it is, on any backend:

    KERAS_BACKEND=torch python guides/custom_router.py
"""

import os
import tempfile

import keras
import numpy as np
from keras import ops

import keras_moe

# ## The router
#
# `build` makes the weights, `call` returns a `Routing`. Four tensors are all
# there is to it:
#
# - `logits` `(T, E)`, raw scores: the z-loss wants them small;
# - `probs` `(T, E)`, scores of all experts: the balancing loss pushes them;
# - `expert_indices` `(T, K)`, the choice, best first. A choice that does not
#   exist has the index `num_experts` and the weight 0;
# - `expert_weights` `(T, K)`: gradients reach the router through them.
#
# `T` counts all positions of all examples: a router sees tokens in a row. The
# base class keeps it in float32 under every dtype policy, since decisions do
# not survive rounding.


@keras.saving.register_keras_serializable("guide")
class PrototypeRouter(keras_moe.routers.Router):
    distinct_choices = True  # no token goes to one expert twice

    def __init__(self, num_experts, top_k=2, **kwargs):
        super().__init__(num_experts, **kwargs)
        self.top_k = top_k

    def build(self, tokens_shape):
        self.prototypes = self.add_weight(
            name="prototypes",
            shape=(self.num_experts, tokens_shape[-1]),
            initializer="random_normal",
        )

    def call(self, tokens, mask=None, training=None):
        differences = ops.expand_dims(tokens, 1) - self.prototypes  # (T, E, D)
        logits = -ops.sum(ops.square(differences), axis=-1)  # (T, E)
        probs = ops.softmax(logits)
        indices = keras_moe.ops.top_k_indices(logits, self.top_k)  # (T, K)
        weights = ops.take_along_axis(probs, indices, axis=-1)
        weights = keras_moe.ops.normalize_weights(weights)
        return keras_moe.routers.Routing(logits, probs, indices, weights)

    def get_config(self):
        return {**super().get_config(), "top_k": self.top_k}


# `keras_moe.ops.top_k_indices` rather than `keras.ops.top_k`: it breaks ties in
# the same way on every backend, so the same weights choose the same experts.
#
# ## In a model


def make_model():
    inputs = keras.Input((None, 8))
    moe = keras_moe.layers.MoE(
        router=PrototypeRouter(num_experts=4, top_k=2),
        experts=keras_moe.experts.GLUExperts(4, intermediate_dim=16),
        losses=[keras_moe.losses.LoadBalancingLoss(weight=1e-2)],
        name="moe",
    )
    x = keras.layers.Dense(8)(inputs)
    x = x + moe(x)
    x = keras.layers.GlobalAveragePooling1D()(x)
    return keras.Model(inputs, keras.layers.Dense(1)(x)), moe


def main():
    keras.utils.set_random_seed(0)
    rng = np.random.default_rng(0)
    # Tokens in four clusters, each of which has a value of its own.
    centres, values = 3 * rng.normal(size=(4, 8)), np.array([1, -1, 2, -2])
    clusters = rng.integers(0, 4, size=(512, 6))
    tokens = centres[clusters] + 0.3 * rng.normal(size=(512, 6, 8))
    targets = values[clusters].mean(axis=1, keepdims=True)

    model, moe = make_model()
    model.compile(keras.optimizers.Adam(1e-2), "mse")
    history = model.fit(
        tokens.astype("float32"), targets, epochs=10, verbose=0
    ).history
    print("loss:", *(f"{loss:.3f}" for loss in history["loss"]))

    # ## Looking at what it does
    #
    # `statistics.result()` has the load of every expert in the last epoch, and
    # `route` tells where given tokens go. (The tokens of this model reach the
    # MoE through a Dense layer, so we ask a model that ends before it.)
    print("load of each expert:", moe.statistics.result()["expert_load"])
    before = keras.Model(model.input, moe.input)
    routing = moe.route(before(centres[None].astype("float32")))
    indices = ops.convert_to_numpy(routing.expert_indices)
    for cluster, chosen in enumerate(indices):
        print(f"cluster {cluster}: experts {chosen.tolist()}")

    # ## Saving
    #
    # `get_config` and the decorator are what a saved model needs of the class.
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "model.keras")
        model.save(path)
        again = keras.saving.load_model(path)
    x = tokens[:8].astype("float32")
    difference = np.abs(
        model.predict(x, verbose=0) - again.predict(x, verbose=0)
    )
    print(f"largest difference after loading: {difference.max():.1e}")
    return history["loss"], indices, difference.max()


# ## Where to go from here
#
# - Logits of `tokens @ kernel`? Subclass `keras_moe.routers.LinearRouter`: it
#   has the kernel, jitter and temperature. Only another way to the logits?
#   Subclass `TopKRouter` and override `build_logits` and `raw_logits`.
# - Something drawn in training? Take `keras.random` with a
#   `keras.random.SeedGenerator`, and draw only if `training`.
# - Token ids, task ids, the routing of an earlier layer? Set
#   `uses_context = True`, and `call` takes `context`.
# - What one token gets depends on others? Set `looks_ahead = True`: the router
#   is told where sequences end, and causal layers refuse it.

if __name__ == "__main__":
    main()
