"""
Title: Small photographs with a Mixture of Experts
Author: The keras_moe authors
Date created: 2026/11/28
Last modified: 2026/11/28
Description: Train a V-MoE, a Soft MoE or their dense twin on CIFAR-10.
Accelerator: None
"""

"""
## Introduction

This does on the 60,000 photographs of CIFAR-10 what `fashion_mnist_moe.py` does
on articles of clothing, with the same options:

    python examples/vision/cifar10_moe.py --model soft_moe

Keras downloads the data, 170 MB. `--data` takes a folder with the batches in
Python's format, or a `.npz`.
"""

"""
## Setup

Keras asks for the backend when it is imported, so the arguments come first.
"""

import sys

import image_options

args = image_options.parse(
    "Trains a vision transformer with experts, or its dense twin, on the "
    "photographs of CIFAR-10.",
    "cifar10",
    epochs=30,
    learning_rate=2e-3,
    hidden_dim=96,
    num_layers=6,
    patch_size=4,
    shift=4,
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
    *("airplane", "car", "bird", "cat", "deer", "dog", "frog", "horse"),
    *("ship", "truck"),
]


def load_data(part):
    if args.data is not None:
        return image_data.read(args.data, part)
    train, test = keras.datasets.cifar10.load_data()
    images, labels = train if part == "train" else test
    if keras.config.image_data_format() == "channels_first":
        images = images.transpose(0, 2, 3, 1)
    return images, labels[:, 0].astype("int32")


"""
## Training

All blocks have experts.
"""

run(args, load_data, list(range(args.num_layers)), CLASS_NAMES)
