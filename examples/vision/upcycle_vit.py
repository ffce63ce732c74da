"""
Title: Upcycling a vision transformer
Author: The keras_moe authors
Date created: 2026/11/28
Last modified: 2026/11/28
Description: Make a mixture of experts of a trained dense model, and train on.
Accelerator: None
"""

"""
## Introduction

A trained dense model is a better start for a mixture of experts than random
weights: each expert begins as a copy of the feed-forward network that it stands
for (Komatsuzaki et al., 2022). Whether that is worth it is decided beside the
dense model itself, trained on for the same cost. This does both, with several
ways to make the experts, on the 1,797 handwritten digits that come with
scikit-learn:

    python examples/vision/upcycle_vit.py --backend torch

or on Fashion-MNIST, from a folder with its four files:

    python examples/vision/upcycle_vit.py --data path/to/fashion_mnist

It prints the accuracy of each way, and writes the figures, the upcycled model
and a picture of which patches go to which expert.
"""

"""
## Setup

Keras asks for the backend when it is imported, so the arguments come first.
"""

import argparse
import json
import math
import os
import pathlib
import sys
import tempfile

BACKENDS = ("jax", "torch", "tensorflow")

parser = argparse.ArgumentParser(
    description="Trains a small dense vision transformer, makes experts of its "
    "feed-forward networks, and compares with training the dense one on.",
    formatter_class=argparse.ArgumentDefaultsHelpFormatter,
)
parser.add_argument(
    "--backend",
    default=os.environ.get("KERAS_BACKEND") or "jax",
    help=", ".join(BACKENDS),
)
parser.add_argument(
    "--data",
    help="folder with the four files of Fashion-MNIST, or MNIST, packed or "
    "not; without it scikit-learn's digits are used",
)
parser.add_argument(
    "--limit", type=int, default=10_000, help="images to train with, at most"
)
parser.add_argument(
    "--epochs", type=int, default=10, help="of the dense model, at least 1"
)
parser.add_argument(
    "--more-epochs",
    type=int,
    default=6,
    help="of the upcycled ones, at least 1; the dense model gets as many more "
    "as cost the same",
)
parser.add_argument("--seeds", type=int, default=3, help="at least 1")
parser.add_argument("--batch-size", type=int, default=64, help="at least 1")
parser.add_argument("--output", default="runs/upcycle", help="folder to write")
args = parser.parse_args()
if args.backend not in BACKENDS:
    parser.error(
        f"--backend must be one of {', '.join(BACKENDS)}. "
        f"Received: {args.backend!r}"
    )
for name, least in (
    ("limit", 100),
    ("epochs", 1),
    ("more_epochs", 1),
    ("seeds", 1),
    ("batch_size", 1),
):
    value = getattr(args, name)
    if value < least:
        option = name.replace("_", "-")
        parser.error(f"--{option} must be at least {least}. Received: {value}")

os.environ["KERAS_BACKEND"] = args.backend
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")  # no chatter
if args.backend == "torch":
    # Operations this small gain little from a second thread, and threads that
    # wait for each other make a step ten times slower on a busy machine.
    os.environ.setdefault("OMP_NUM_THREADS", "1")

try:
    import image_data
    import keras
    import matplotlib
    import numpy as np
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    import keras_moe
except ModuleNotFoundError as error:
    sys.exit(
        f"{error}. To install what this needs, in the root of the repository:\n"
        f"    pip install -e . {args.backend} scikit-learn matplotlib"
    )

matplotlib.use("Agg")  # draws into files, needs no display
import matplotlib.pyplot as plt  # noqa: E402

output = pathlib.Path(args.output)
try:
    output.mkdir(parents=True, exist_ok=True)
    tempfile.TemporaryFile(dir=output).close()
except OSError as error:
    sys.exit(f"Cannot write to --output {args.output!r}: {error}")

"""
## The data

Grey images from -1 to 1. A tenth of those to train with is held out to look at
during training; nothing is chosen by the test images.
"""

if args.data:
    try:
        (x_train, y_train), (x_test, y_test) = (
            image_data.read(args.data, part) for part in ("train", "test")
        )
    except (OSError, ValueError) as error:
        sys.exit(f"--data: {error}")
    PATCH, DEPTH, DIM = 4, 4, 64
    x_train, x_test = x_train / 127.5 - 1, x_test / 127.5 - 1
else:
    digits = load_digits()
    x_train, x_test, y_train, y_test = train_test_split(
        digits.images[..., None] / 8 - 1,
        digits.target,
        test_size=0.2,
        stratify=digits.target,
        random_state=0,
    )
    PATCH, DEPTH, DIM = 2, 4, 48
x_train, x_test = (x.astype("float32") for x in (x_train, x_test))
x_train, y_train = x_train[: args.limit], y_train[: args.limit]
x_train, x_valid, y_train, y_valid = train_test_split(
    x_train, y_train, test_size=0.1, stratify=y_train, random_state=0
)
if not args.data:
    # Three times as many by moving them one pixel left and right.
    padded = np.pad(
        x_train, ((0, 0), (0, 0), (1, 1), (0, 0)), constant_values=-1
    )
    x_train = np.concatenate([padded[:, :, i : i + 8] for i in range(3)])
    y_train = np.tile(y_train, 3)
IMAGE = x_train.shape[1:]
GRID = IMAGE[0] // PATCH

"""
## The models

The dense model is a `VMoEBackbone` without a block of experts. `upcycle` makes
experts of the feed-forward networks of its last two blocks, in three ways:

- copies, so that the new model begins exactly where the dense one is;
- copies of which each has half of its hidden units drawn anew, so that they
  differ from the start (Drop-Upcycling);
- experts of half the width with hidden units drawn from the dense network, of
  which two cost a token as much as the dense network (checkpoint recycling).
"""

NUM_EXPERTS = 8
TOP_K = 2
MLP_DIM = 4 * DIM
RECIPES = {
    "copies": {},
    "half drawn anew": {"reinit": 0.5},
    "half as wide": {"intermediate_dim": MLP_DIM // 2},
}


def dense_model():
    backbone = keras_moe.models.VMoEBackbone(
        image_shape=IMAGE,
        patch_size=PATCH,
        num_layers=DEPTH,
        num_heads=4,
        hidden_dim=DIM,
        mlp_dim=MLP_DIM,
        moe_layers=[],
        dropout=0.1,
        use_class_token=False,
        data_format="channels_last",
    )
    return keras_moe.models.VMoEImageClassifier(backbone, num_classes=10)


def moe_blocks(model):
    return [model.backbone.block(i) for i in model.backbone.moe_blocks]


def cost(model):
    """Multiplications for a token, without those of single numbers.

    Every weight of a matrix is one, of experts those that a token goes to; and
    each token looks at all tokens, for the scores and for their sum.
    """
    total = 2 * DEPTH * GRID**2 * DIM
    for weight in model.trainable_weights:
        if weight.path.endswith("kernel"):
            share = TOP_K / NUM_EXPERTS if "/experts/" in weight.path else 1
            total += math.prod(weight.shape) * share
    return total


def train(model, epochs, learning_rate):
    """Trains for a number of epochs that need not be whole."""
    size = len(x_train)
    left = math.ceil(epochs * size)
    passes = [size] * (left // size) + [left % size] * (left % size > 0)
    steps = sum(math.ceil(number / args.batch_size) for number in passes)
    warmup = steps // 10 + 1
    model.compile(
        keras.optimizers.AdamW(
            keras.optimizers.schedules.CosineDecay(
                0.0,
                max(steps - warmup, 1),
                warmup_target=learning_rate,
                warmup_steps=warmup,
            ),
            weight_decay=0.05,
        ),
        keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        metrics=["accuracy"],
    )
    rng = np.random.default_rng(0)
    for number in passes:
        order = rng.permutation(size)[:number]
        model.fit(
            x_train[order],
            y_train[order],
            batch_size=args.batch_size,
            shuffle=False,
            verbose=0,
        )
    return accuracy(model)


def predict(model, x=x_test):
    return model.predict(x, batch_size=1000, verbose=0)


def accuracy(model):
    return {
        "validation": float(
            (predict(model, x_valid).argmax(-1) == y_valid).mean()
        ),
        "test": float((predict(model).argmax(-1) == y_test).mean()),
    }


"""
## Training

The optimizer is not carried over, so all that trains on starts with a new one
and the same learning rates. The dense model gets as many epochs as cost the
same, the last one in part.
"""

results = {}
kept = None
for seed in range(args.seeds):
    keras.utils.set_random_seed(seed)
    dense = dense_model()
    found = {"dense": train(dense, args.epochs, 2e-3)}
    before = predict(dense)
    for name, recipe in RECIPES.items():
        keras.utils.set_random_seed(seed)
        model = keras_moe.conversion.upcycle(
            dense,
            NUM_EXPERTS,
            layers="last_2",
            top_k=TOP_K,
            seed=seed,
            **recipe,
        )
        relative_cost = cost(model) / cost(dense)
        at_first = float(np.abs(predict(model) - before).max())
        if not recipe and at_first > 1e-4:
            sys.exit(f"The copies differ from the dense model by {at_first:g}.")
        found[f"upcycled, {name}"] = {
            **train(model, args.more_epochs, 1e-3),
            "relative_cost": relative_cost,
            "difference_at_first": at_first,
        }
        if kept is None:
            kept = model
    costs = {
        value["relative_cost"]
        for value in found.values()
        if "relative_cost" in value
    }
    for relative_cost in sorted(costs):
        keras.utils.set_random_seed(seed)
        more = keras.models.clone_model(dense)
        more.set_weights(dense.get_weights())
        epochs = args.more_epochs * relative_cost
        name = f"dense, {epochs:.1f} epochs more"
        if name not in found:
            found[name] = {**train(more, epochs, 1e-3), "epochs": epochs}
    for name, value in found.items():
        results.setdefault(name, []).append(value)
        print(
            f"seed {seed}: {name:28} test accuracy {value['test']:.2%}",
            flush=True,
        )

"""
## Reporting

The accuracy of each way, over the seeds: the mean, and from the lowest to the
highest.
"""

print(
    f"\n{len(x_train)} images to train, {len(x_test)} to test, "
    f"{args.seeds} seeds\n{'':30}{'cost':>6}{'test accuracy':>15}"
)
for name, values in results.items():
    tests = [value["test"] for value in values]
    relative = values[0].get("relative_cost")
    print(
        f"{name:30}{f'{relative:.2f}' if relative else '':>6}"
        f"{np.mean(tests):>15.2%}   ({min(tests):.2%} to {max(tests):.2%})"
    )
print("cost: of a step, relative to the dense model's")

"""
## Which patches go to which expert
"""


def draw_routing(path, model):
    """Ten test images, and below each the first expert of every patch."""
    blocks = moe_blocks(model)
    shown = x_test[[np.flatnonzero(y_test == i)[0] for i in range(10)]]
    routed = []
    x = model.backbone.get_layer("patch_embedding")(shown)
    for i in range(DEPTH):
        block = model.backbone.block(i)
        if block in blocks:
            y = block.attention_norm(x)
            y = block.feed_forward_norm(x + block.attention(y, y))
            experts = block.feed_forward.route(y).expert_indices[:, 0]
            experts = keras.ops.convert_to_numpy(experts)
            routed.append(experts.reshape(10, GRID, GRID))
        x = block(x)
    figure, axes = plt.subplots(
        1 + len(blocks), 10, figsize=(12, 1.4 + 1.3 * len(blocks))
    )
    for column in range(10):
        axes[0, column].imshow(-shown[column, ..., 0], cmap="gray")
        for row, experts in enumerate(routed, 1):
            axes[row, column].imshow(
                experts[column], cmap="tab10", vmin=0, vmax=9
            )
    for row, name in enumerate(["image", *(block.name for block in blocks)]):
        axes[row, 0].set_ylabel(name)
    for axis in axes.ravel():
        axis.set(xticks=[], yticks=[])
    figure.suptitle("First expert of each patch, a color for each expert")
    figure.savefig(path, dpi=100, bbox_inches="tight")
    plt.close(figure)
    return [
        np.bincount(x.ravel(), minlength=NUM_EXPERTS).tolist() for x in routed
    ]


with tempfile.TemporaryDirectory(dir=output, prefix=".unfinished-") as folder:
    folder = pathlib.Path(folder)
    kept.save(folder / "upcycled.keras")
    loaded = keras.models.load_model(folder / "upcycled.keras")
    difference = float(np.abs(predict(loaded) - predict(kept)).max())
    if difference > 1e-5:
        sys.exit(f"The reloaded model predicts otherwise, by {difference:.1e}.")
    summary = {
        **vars(args),
        "train_images": len(x_train),
        "test_images": len(x_test),
        "num_experts": NUM_EXPERTS,
        "top_k": TOP_K,
        "results": results,
        "first_experts": draw_routing(folder / "routing.png", kept),
        "reloaded_max_difference": difference,
    }
    (folder / "summary.json").write_text(json.dumps(summary, indent=2) + "\n")
    for file in folder.iterdir():
        os.replace(file, output / file.name)
print(f"\nWritten to {output}: summary.json, routing.png, upcycled.keras")
