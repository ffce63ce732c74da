"""
Title: Articles of clothing with a Mixture of Experts
Author: The keras_moe authors
Date created: 2026/11/28
Last modified: 2026/11/28
Description: Train a V-MoE, a Soft MoE or their dense twin on Fashion-MNIST.
Accelerator: None
"""

"""
## Introduction

This trains one of three small vision transformers on the 60,000 images of
Fashion-MNIST: a V-MoE, where each patch of an image goes to 2 of 8 experts; a
Soft MoE, where 8 experts get mixtures of the patches; and the dense twin, that
computes as much for an image. It writes the model, a log, the figures and a
picture of what each expert takes:

    python examples/vision/fashion_mnist_moe.py --model soft_moe

Keras downloads the data, 30 MB; `--data` takes a folder that has it. `--resume`
goes on with a run that was killed. `--no-test` leaves the test images alone, as
you should while you choose settings: the images held out tell how good they
are. Those here were chosen so; figures are in `benchmarks/README.md`.
"""

"""
## Setup

Keras asks for the backend when it is imported, so the arguments come first.
"""

import sys

import image_options

args = image_options.parse(
    "Trains a vision transformer with experts, or its dense twin, on the "
    "articles of clothing of Fashion-MNIST.",
    "fashion_mnist",
    epochs=16,
    learning_rate=3e-3,
    hidden_dim=96,
    num_layers=2,
    patch_size=7,
    shift=1,
    validation=5000,
)

try:
    import image_data
    import keras
    from image_training import run
except ModuleNotFoundError as error:
    sys.exit(
        f"{error}. To install what this needs, in the root of the repository:\n"
        f"    pip install -e . {args.backend} matplotlib"
    )

CLASS_NAMES = [
    *("T-shirt", "trousers", "pullover", "dress", "coat", "sandal", "shirt"),
    *("sneaker", "bag", "boot"),
]


def load_data(part):
    if args.data is not None:
        return image_data.read(args.data, part)
    train, test = keras.datasets.fashion_mnist.load_data()
    images, labels = train if part == "train" else test
    return images[..., None], labels.astype("int32")


"""
## Training

All blocks have experts. The weights kept are those of the epoch that was
best on the images held out, and the test images are read once, at the end.
"""

run(args, load_data, list(range(args.num_layers)), CLASS_NAMES)
