"""
Title: Drawing images with a diffusion transformer of experts
Author: The keras_moe authors
Date created: 2026/11/28
Last modified: 2026/11/28
Description: Train a DiT-MoE on small images, and sample images of each class.
Accelerator: None
"""

"""
## Introduction

This trains `keras_moe.models.DiffusionTask` around a small `DiTMoEBackbone`: a
diffusion transformer whose feed-forwards are experts. It then draws images of
each class, from noise and with guidance, and shows which patches go to which
expert while an image emerges.

On the 1,797 digits that come with scikit-learn it takes ten to twenty minutes
on two CPU cores, and downloads nothing. 99 % of the samples then look most like
a real digit of the class that was asked for:

    python examples/vision/diffusion_moe.py --dataset digits

Fashion-MNIST, which Keras downloads, or which lies in the folder `--data`, has
thirty times as many images, of three times as many patches, and wants a GPU:

    python examples/vision/diffusion_moe.py --data PATH
"""

"""
## Setup

Keras asks for the backend when it is imported, so the arguments come first.
"""

import argparse
import json
import os
import pathlib
import platform
import shlex
import sys
import tempfile
import time

BACKENDS = ("jax", "torch", "tensorflow")
DATASETS = ("fashion_mnist", "digits")

parser = argparse.ArgumentParser(
    description="Trains a diffusion transformer of experts, draws images of "
    "each class, and shows which patches go to which expert.",
    formatter_class=argparse.ArgumentDefaultsHelpFormatter,
)
parser.add_argument(
    "--backend",
    default=os.environ.get("KERAS_BACKEND") or "jax",
    help=", ".join(BACKENDS),
)
parser.add_argument(
    "--dataset", default="fashion_mnist", help=", ".join(DATASETS)
)
parser.add_argument(
    "--data", help="folder with the four .gz files of Fashion-MNIST"
)
parser.add_argument(
    "--epochs", type=int, help="at least 1; 20, or 110 of the digits"
)
parser.add_argument("--batch-size", type=int, default=64, help="at least 1")
parser.add_argument("--steps", type=int, default=50, help="of sampling")
parser.add_argument("--guidance", type=float, default=2.0, help="1 is none")
parser.add_argument("--seed", type=int, default=0, help="at least 0")
parser.add_argument(
    "--output", default="runs/diffusion", help="folder to write"
)
args = parser.parse_args()
for name, known in (("backend", BACKENDS), ("dataset", DATASETS)):
    value = getattr(args, name)
    if value not in known:
        parser.error(
            f"--{name} must be one of {', '.join(known)}. Received: {value!r}"
        )
if args.data and args.dataset == "digits":
    parser.error("--data is for --dataset fashion_mnist.")
if args.epochs is None:
    args.epochs = 110 if args.dataset == "digits" else 20
for name, least in (
    *(("epochs", 1), ("batch_size", 1), ("steps", 1), ("seed", 0)),
):
    value = getattr(args, name)
    if value < least:
        option = name.replace("_", "-")
        parser.error(f"--{option} must be at least {least}. Received: {value}")

os.environ["KERAS_BACKEND"] = args.backend
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")  # no chatter

try:
    import keras
    import numpy as np
    from diffusion_report import draw_routing
    from diffusion_report import draw_samples
    from diffusion_report import fashion_mnist
    from diffusion_report import nearest_labels

    import keras_moe

    if args.dataset == "digits":
        from sklearn.datasets import load_digits
except ModuleNotFoundError as error:
    sys.exit(
        f"{error}. To install what this needs, in the root of the repository:\n"
        f"    pip install -e . {args.backend} scikit-learn matplotlib"
    )

output = pathlib.Path(args.output)
try:
    output.mkdir(parents=True, exist_ok=True)
    tempfile.TemporaryFile(dir=output).close()
except OSError as error:
    sys.exit(f"Cannot write to --output {args.output!r}: {error}")

"""
## The data

Diffusion needs values around 0: the images go from -1 to 1.
"""

if args.dataset == "digits":
    digits = load_digits()
    images, labels = digits.images / 8 - 1, digits.target
    names = [str(digit) for digit in range(10)]
    sizes = {"patch_size": 2, "hidden_dim": 64}
else:
    images, labels = fashion_mnist(args.data)
    images = images / 127.5 - 1
    names = (
        "T-shirt,trousers,pullover,dress,coat,sandal,shirt,sneaker,bag,boot"
    ).split(",")
    sizes = {"patch_size": 4, "hidden_dim": 96}
data = {
    "images": images[..., None].astype("float32"),
    "labels": labels.astype("int32"),
}
order = np.random.default_rng(args.seed).permutation(len(labels))
data = {name: values[order] for name, values in data.items()}
held_out = {name: values[: len(order) // 10] for name, values in data.items()}
data = {name: values[len(order) // 10 :] for name, values in data.items()}

"""
## The model

Four blocks of eight experts, of which a patch has two, and one that all have.
"""

keras.utils.set_random_seed(args.seed)
backbone = keras_moe.models.DiTMoEBackbone(
    image_shape=data["images"].shape[1:],
    num_layers=4,
    num_heads=4,
    mlp_dim=2 * sizes["hidden_dim"],
    num_classes=10,
    num_experts=8,
    num_shared_experts=1,
    data_format="channels_last",
    **sizes,
)
model = keras_moe.models.DiffusionTask(
    backbone, schedule="cosine", clip_range=(-1.0, 1.0), seed=args.seed
)

"""
## Training

The learning rate ends at zero, so that the last weights are no worse than those
before them.
"""

steps = args.epochs * -(-len(data["labels"]) // args.batch_size)
warmup = steps // 20 + 1
learning_rate = keras.optimizers.schedules.CosineDecay(
    0.0, max(steps - warmup, 1), warmup_target=2e-3, warmup_steps=warmup
)
model.compile(keras.optimizers.AdamW(learning_rate, weight_decay=0.01))
total = backbone.count_params()
print(
    f"{args.backend}: {len(data['labels'])} images, {total:,} parameters, "
    f"{steps} steps"
)
start = time.perf_counter()
history = model.fit(
    data,
    batch_size=args.batch_size,
    epochs=args.epochs,
    verbose=1 if sys.stdout.isatty() else 2,
).history
seconds = time.perf_counter() - start
held_out_loss = model.evaluate(held_out, batch_size=256, verbose=0)

"""
## Sampling

Eight images of each class. How many of them are nearest to a real image of
their own class, by the distance of the pixels?
"""

wanted = np.repeat(np.arange(10), 8)
options = {"steps": args.steps, "guidance": args.guidance, "seed": args.seed}
samples = model.sample(len(wanted), wanted, **options)
nearest, distances = nearest_labels(samples, data)
recognised = float((nearest == wanted).mean())
print(f"\n{recognised:.0%} of the samples look most like one of their class")

"""
## What the routing does

The experts of each patch in held-out images that are more and more noisy.
"""


def routing_of(images, labels, timestep):
    """`(layers, N, patches)`: the first expert of each patch."""
    seen, layers = [], [backbone.block(i).feed_forward for i in range(4)]
    for layer in layers:
        call = layer.call

        def spy(inputs, *args, call=call, **kwargs):
            seen.append(inputs)
            return call(inputs, *args, **kwargs)

        layer.call = spy
    backbone(
        {
            "images": images,
            "timesteps": np.full(len(labels), timestep, "float32"),
            "labels": labels,
        }
    )
    for layer in layers:
        del layer.call
    return np.stack(
        [
            keras.ops.convert_to_numpy(
                layer.route(inputs).expert_indices
            ).reshape(len(labels), -1, 2)[..., 0]
            for layer, inputs in zip(layers, seen, strict=True)
        ]
    )


times = (0, 300, 600, 900)
shown = {name: values[:64] for name, values in held_out.items()}
rng = np.random.default_rng(args.seed)
noise = rng.normal(size=shown["images"].shape)
signal, deviation = model.noise_levels()
noisy = [
    (signal[t] * shown["images"] + deviation[t] * noise).astype("float32")
    for t in times
]
routing = [
    routing_of(x, shown["labels"], t) for x, t in zip(noisy, times, strict=True)
]

"""
## Saving, loading, reporting

All files are made in a folder of their own and moved once they are whole.
"""

summary = {
    "command": shlex.join(["python", *sys.argv]),
    **vars(args),
    "images": len(data["labels"]),
    "parameters": total,
    "training_seconds": round(seconds, 1),
    "loss": history["loss"],
    "held_out_loss": held_out_loss,
    "samples_nearest_to_their_class": recognised,
    "distance_to_nearest": float(distances.mean()),
    "experts_by_time": {
        str(t): [
            (np.bincount(layer.ravel(), minlength=8) / layer.size).tolist()
            for layer in experts
        ]
        for t, experts in zip(times, routing, strict=True)
    },
    "versions": {
        "python": platform.python_version(),
        args.backend: sys.modules[args.backend].__version__,
        **{x.__name__: x.__version__ for x in (keras, keras_moe, np)},
    },
}
with tempfile.TemporaryDirectory(dir=output, prefix=".unfinished-") as folder:
    folder = pathlib.Path(folder)
    model.save(folder / "diffusion.keras")
    reloaded = keras.models.load_model(folder / "diffusion.keras")
    again = reloaded.sample(len(wanted), wanted, **options)
    difference = float(np.abs(again - samples).max())
    if difference > 1e-3:
        sys.exit(f"The reloaded model draws otherwise, by {difference:.1e}.")
    summary["reloaded_max_difference"] = difference
    (folder / "summary.json").write_text(json.dumps(summary, indent=2) + "\n")
    draw_samples(folder / "samples.png", samples, names)
    draw_routing(folder / "routing.png", times, noisy, routing)
    for file in folder.iterdir():
        os.replace(file, output / file.name)

print(
    f"Loss on held-out images: {held_out_loss:.4f}\n"
    f"Written to {output}: summary.json, samples.png, routing.png, and "
    "diffusion.keras,\nwhich was loaded again and draws the same "
    f"(difference: {difference:g})"
)
