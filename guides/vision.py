"""A vision model with experts, from images to a saved preset.

A V-MoE is a vision transformer: it cuts an image into patches, and makes a
token of each. In some of its blocks a router sends each token to a few of many
experts. Here we build one for handwritten digits, train it briefly, look at
which patches go to which expert, see what the predictions depend on, save the
model, and make another one of it for larger images. Run this file as it is, on
any backend; it needs scikit-learn for the digits:

    KERAS_BACKEND=torch python guides/vision.py

`examples/vision/fashion_mnist_moe.py` and `cifar10_moe.py` train such models at
length.
"""

import os
import tempfile

import keras
import numpy as np
from keras import ops
from sklearn.datasets import load_digits

import keras_moe

# ## The data
#
# Images are `(batch, height, width, channels)`, or with the channels first if
# the model has `data_format="channels_first"`. The pixels of the digits are 0
# to 16; what a model takes should be around 0.


def make_data():
    digits = load_digits()
    images = (digits.images[..., None] / 8 - 1).astype("float32")
    order = np.random.default_rng(0).permutation(len(images))
    images, labels = images[order], digits.target[order]
    # Whole batches of 64: a smaller one would be compiled again.
    train, test = slice(1408), slice(1408, 1792)
    return (images[train], labels[train]), (images[test], labels[test])


def predict(model, images):
    return model.predict(images, batch_size=64, verbose=0)


# ## The model
#
# Patches of 2x2 pixels: 16 tokens. `moe_layers` says which blocks have experts:
# here the second of three, `"every_2"`, and the rest are dense. `mlp_dim` is
# the width of an expert and of a dense feed-forward. A published model would be
# `VMoEBackbone.from_preset("v_moe_s32_e8_last_2")`, with random weights.
#
# `moe_layers=[]` gives the same model without experts. Its twin of equal cost
# is then wider: a token goes through `top_k` experts.


def make_model():
    backbone = keras_moe.models.VMoEBackbone(
        image_shape=(8, 8, 1),
        patch_size=2,
        num_layers=3,
        num_heads=2,
        hidden_dim=32,
        mlp_dim=64,
        num_experts=4,
        top_k=2,
        moe_layers="every_2",
        use_class_token=False,
        data_format="channels_last",
    )
    return keras_moe.models.MoEImageClassifier(backbone, num_classes=10)


# ## Training
#
# With `fit` nothing else is needed: V-MoE's losses that balance the experts are
# part of the model's loss.


def train(model, images, labels):
    model.compile(
        keras.optimizers.Adam(3e-3),
        keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        metrics=["accuracy"],
    )
    model.fit(images, labels, batch_size=64, epochs=12, verbose=0)


def accuracy(model, images, labels):
    return (predict(model, images).argmax(-1) == labels).mean()


# ## Which patches go to which expert
#
# `MoE.route` tells, for any input of the layer. Here that is what comes out of
# the block before, after the attention and the norms of its own block.


def routing(backbone, images):
    before = keras.Model(backbone.input, backbone.get_layer("block_0").output)
    block = backbone.block(1)
    x = ops.convert_to_tensor(predict(before, images))
    y = block.attention_norm(x)
    x = block.feed_forward_norm(x + block.attention(y, y))
    experts = block.feed_forward.route(x).expert_indices  # (N * 16, top_k)
    return ops.convert_to_numpy(experts).reshape(len(images), 4, 4, 2)


# ## What a prediction depends on
#
# In training the capacity of V-MoE and its losses look at the whole batch. In
# inference each image is on its own, so nobody's prediction depends on who else
# is in the batch:
#
# - `VMoEBackbone` as it is, with any router that decides for each token alone:
#   no.
# - With `eval_capacity_factor`: yes, since experts that are full turn tokens
#   away. With `group_size="image"` it is only the tokens of the same image.
# - With `router="expert_choice"`, or another that `looks_ahead`: the same.
# - `SoftMoEBackbone`: no, since the slots mix the patches of one image.


def of_others(model, images):
    """How much the outputs for an image change with who comes before it."""
    batch = images[:64]
    other = np.concatenate([images[64:127], batch[-1:]])
    return np.abs(predict(model, batch)[-1] - predict(model, other)[-1]).max()


def with_capacity(model, factor):
    """The same model with a capacity in inference."""
    config = {**model.backbone.get_config(), "eval_capacity_factor": factor}
    backbone = keras_moe.models.VMoEBackbone.from_config(config)
    limited = keras_moe.models.MoEImageClassifier(backbone, num_classes=10)
    limited.set_weights(model.get_weights())
    return limited


def main():
    keras.utils.set_random_seed(0)
    (images, labels), (test_images, test_labels) = make_data()
    model = make_model()
    train(model, images, labels)
    right = accuracy(model, test_images, test_labels)
    print(f"{right:.1%} of {len(test_labels)} digits read correctly")

    experts = routing(model.backbone, test_images)
    print("first choice of each patch of a", test_labels[0])
    print(experts[0, :, :, 0])

    limited = with_capacity(model, 1.0)
    changes = [of_others(x, test_images) for x in (model, limited)]
    print(f"changed by the rest of the batch: {changes[0]:.1e}")
    print(f"... with a capacity in inference: {changes[1]:.1e}")

    # ## Saving
    #
    # A preset is a folder with the configuration and the weights, of a backbone
    # or a classifier. `model.save("model.keras")` works as well.
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "digits")
        model.save_to_preset(path)
        again = keras_moe.models.MoEImageClassifier.from_preset(path)
    x = test_images[:64]
    difference = np.abs(predict(model, x) - predict(again, x)).max()
    print(f"largest difference after loading: {difference:.1e}")

    # ## Larger images
    #
    # The positions are learned, one for each patch: for another size they are
    # resized, and all other weights fit as they are. Train on from there.
    small = model.backbone
    large = keras_moe.conversion.resize_positions(small, (16, 16, 1))
    print("tokens of the larger images:", large.output.shape[1])
    return right, experts, changes, difference, small, large


# ## When it pays on little data
#
# On Fashion-MNIST (55,000 images to train), with all feed-forwards routed to 2
# of 8 experts, and the same products a token, steps and settings as its twin,
# V-MoE-tiny was ahead of the dense twin by 1.2 points on the test images, and
# Soft MoE behind it by 0.5 (`benchmarks/README.md`; one seed, no proof).
# It costs time: small layers are where sparse ones are slowest.

if __name__ == "__main__":
    main()
