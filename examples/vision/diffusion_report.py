"""What `diffusion_moe.py` reads and draws. There is nothing to run here."""

import gzip
import pathlib
import sys

import keras
import matplotlib
import numpy as np

matplotlib.use("Agg")  # draws into files, needs no display

import matplotlib.pyplot as plt

FILES = ("train-images-idx3-ubyte.gz", "train-labels-idx1-ubyte.gz")


def fashion_mnist(folder):
    """The training images and labels, of a folder or of Keras' download."""
    if folder is None:
        (images, labels), _ = keras.datasets.fashion_mnist.load_data()
        return images, labels
    found = []
    for name, header in zip(FILES, (16, 8), strict=True):
        path = pathlib.Path(folder) / name
        if not path.is_file():
            sys.exit(f"--data must have {' and '.join(FILES)}: no {path}")
        with gzip.open(path) as file:
            found.append(np.frombuffer(file.read(), "uint8", offset=header))
    images, labels = found
    return images.reshape(-1, 28, 28), labels


def nearest_labels(samples, data):
    """Labels of the nearest real images, and how far these are."""
    flat = samples.reshape(len(samples), -1)
    real = data["images"].reshape(len(data["labels"]), -1)
    squares = (real**2).sum(1) - 2 * flat @ real.T
    nearest = squares.argmin(1)
    gaps = np.sqrt(((flat - real[nearest]) ** 2).mean(1))
    return data["labels"][nearest], gaps


def draw_samples(path, samples, names):
    """A row of samples for each class."""
    columns = len(samples) // len(names)
    figure, axes = plt.subplots(
        len(names), columns, figsize=(columns, len(names)), facecolor="white"
    )
    for place, sample in zip(axes.ravel(), samples, strict=True):
        place.imshow(sample[..., 0], cmap="gray_r", vmin=-1, vmax=1)
        place.set(xticks=[], yticks=[])
    for row, name in zip(axes[:, 0], names, strict=True):
        row.set_ylabel(name, rotation=0, ha="right", va="center", fontsize=13)
    figure.subplots_adjust(0.16, 0.01, 0.99, 0.99, 0.06, 0.06)
    figure.savefig(path, dpi=100)
    plt.close(figure)


def draw_routing(path, times, noisy, routing, number=6):
    """Images at several times, and the first expert of each of their patches.

    Args:
        path: Where to write the PNG.
        times: ints.
        noisy: for each of these `(N, H, W, 1)`.
        routing: for each of these `(layers, N, patches)`.
        number: int. Images to show.
    """
    layers, side = len(routing[0]), int(routing[0].shape[-1] ** 0.5)
    figure, axes = plt.subplots(
        len(times) * (layers + 1),
        number,
        figsize=(number + 1.6, len(times) * (layers + 1)),
        facecolor="white",
    )
    for t, (time, images, experts) in enumerate(
        zip(times, noisy, routing, strict=True)
    ):
        rows = axes[t * (layers + 1) : (t + 1) * (layers + 1)]
        for column in range(number):
            rows[0, column].imshow(images[column, ..., 0], cmap="gray_r")
            for row, layer in zip(rows[1:], experts, strict=True):
                row[column].imshow(
                    layer[column].reshape(side, side),
                    cmap="tab10",
                    vmin=0,
                    vmax=9,
                )
        labels = [f"time {time}", *(f"block {i}" for i in range(layers))]
        for row, label in zip(rows[:, 0], labels, strict=True):
            row.set_ylabel(
                label, rotation=0, ha="right", va="center", fontsize=12
            )
    for place in axes.ravel():
        place.set(xticks=[], yticks=[])
    figure.suptitle("A color for each expert: the first choice of a patch")
    figure.subplots_adjust(0.18, 0.01, 0.99, 0.96, 0.05, 0.05)
    figure.savefig(path, dpi=80)
    plt.close(figure)
