"""What is routed: tokens, whole examples, tasks, and what masks leave out.

By default `MoE` routes each position of each example on its own, by what it
holds. Here is what else there is. Run this file as it is, on any backend:

    KERAS_BACKEND=torch python guides/routing.py
"""

import keras
import numpy as np
from keras import ops

import keras_moe

# ## Whole examples
#
# Some experts need an example whole: convolutions, recurrent layers, attention.
# `LayerExperts` makes experts of any layer, and `route_per="example"` sends
# whole images to them. The router sees the mean over the positions.


def per_example():
    moe = keras_moe.layers.MoE(
        router=keras_moe.routers.TopKRouter(num_experts=4, top_k=2),
        experts=keras_moe.experts.LayerExperts(
            keras.layers.Conv2D(5, 3, padding="same"), num_experts=4
        ),
        route_per="example",
    )
    images = np.random.default_rng(0).normal(size=(6, 8, 8, 3))
    images = ops.convert_to_tensor(images.astype("float32"))
    outputs = moe(images)  # (6, 8, 8, 5)
    routing = moe.route(images)  # two experts for each of the six images
    experts = ops.convert_to_numpy(routing.expert_indices)
    print("experts of each image:", experts.tolist())
    return moe, images, outputs, routing


# ## Tasks, domains, languages, modalities
#
# `TaskRouter` routes by an id beside the token, the `context` of the call. Ids
# of the shape `(batch,)` hold for all positions of an example; `(batch,
# length)` says one for each. `allowed_experts` gives each task experts of its
# own: here 0 and 1 are for the first language, 2 and 3 for the second, and
# both share 4. A model takes the ids as one more input.

ALLOWED = [[True, True, False, False, True], [False, False, True, True, True]]


def per_task():
    sentence = keras.Input((None, 8), name="sentence")
    language = keras.Input((), dtype="int32", name="language")
    moe = keras_moe.layers.MoE(
        intermediate_dim=16,
        router=keras_moe.routers.TaskRouter(
            num_experts=5, num_tasks=2, top_k=2, allowed_experts=ALLOWED
        ),
        return_routing=True,
    )
    outputs, routing = moe(sentence, context=language)
    model = keras.Model([sentence, language], [outputs, routing.expert_indices])
    x = np.random.default_rng(0).normal(size=(2, 6, 8)).astype("float32")
    _, experts = model([x, np.array([0, 1])])
    experts = ops.convert_to_numpy(experts).reshape(2, -1)
    for name, chosen in enumerate(experts):
        print(f"experts of language {name}:", sorted(set(chosen.tolist())))
    return experts


# ## Masks
#
# Masked tokens reach no expert, take no capacity, count in no loss and no
# statistic, and give zero. A Keras mask, of `Embedding(mask_zero=True)` say,
# comes to the layer by itself. But a sum of tensors, `x + y`, loses it (in a
# functional model `keras.layers.Add` keeps it), so that a block hands it on.


class Block(keras.layers.Layer):
    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.attention = keras.layers.MultiHeadAttention(2, 4)
        self.moe = keras_moe.layers.MoE(4, 16)
        self.supports_masking = True

    def call(self, x, mask=None, training=None):
        x = x + self.attention(x, x, training=training)
        return x + self.moe(x, mask=mask, training=training)


def masked():
    tokens = keras.Input((None,), dtype="int32")
    x = keras.layers.Embedding(10, 8, mask_zero=True)(tokens)
    block = Block()
    model = keras.Model(tokens, block(x))
    model(np.array([[3, 1, 4, 0, 0], [5, 9, 0, 0, 0]]), training=True)
    counted = int(ops.convert_to_numpy(block.moe.statistics.token_count))
    print("tokens that were counted:", counted, "of 10")
    return counted


if __name__ == "__main__":
    per_example()
    per_task()
    masked()
