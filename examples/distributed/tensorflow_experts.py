"""
Title: Experts divided among TensorFlow's replicas
Author: The keras_moe authors
Date created: 2026/11/27
Last modified: 2026/11/27
Description: Plain `fit` on all devices of a host, and a step for several hosts.
Accelerator: None
"""

"""
## Introduction

On one host, the replicas of a `MirroredStrategy` share out each batch and the
experts' computation (not their memory: each replica has all weights). All GPUs
take part, or two logical CPU devices where there is none:

    python examples/distributed/tensorflow_experts.py

Several workers, with one device each, find each other by `TF_CONFIG`. Keras'
`fit` fails there; a training step of the strategy does its work, and tokens
travel by an all-to-all. Two workers on this machine:

    workers='"worker": ["localhost:29411", "localhost:29412"]'
    for index in 0 1; do
        TF_CONFIG="{\"cluster\": {$workers},
            \"task\": {\"type\": \"worker\", \"index\": $index}}" \
            python examples/distributed/tensorflow_experts.py &
    done; wait

The numbers are those of one device with the whole batch, and so is the file
that is saved. Run again, it goes on from the file, also with another number of
devices. Not run where this was written:

    # one host with eight GPUs: four shares of the experts, each twice
    python examples/distributed/tensorflow_experts.py --expert-shards 4
    # two hosts with one GPU each: the first; the other has "index": 1
    TF_CONFIG='{"cluster": {"worker": ["10.0.0.1:29411", "10.0.0.2:29411"]},
        "task": {"type": "worker", "index": 0}}' \
        python examples/distributed/tensorflow_experts.py

A TPU needs another strategy, `ExpertParallel(1, strategy=tf.distribute.
TPUStrategy(resolver))`, also not run: XLA fixes all shapes beforehand, so rows
cannot travel there, and each core computes the experts of its own tokens.
"""

"""
## Setup

Workers must connect before TensorFlow computes anything, which the strategy
does.
"""

import argparse
import os
import pathlib
import sys
import tempfile

parser = argparse.ArgumentParser(
    description="Trains a classifier of digits on several devices.",
    formatter_class=argparse.ArgumentDefaultsHelpFormatter,
)
parser.add_argument("--epochs", type=int, default=5, help="at least 1")
parser.add_argument("--batch-size", type=int, default=64, help="of all")
parser.add_argument("--expert-shards", type=int, help="devices, if not given")
parser.add_argument("--output", default="runs/distributed", help="folder")
args = parser.parse_args()

os.environ["KERAS_BACKEND"] = "tensorflow"
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

try:
    import keras
    import tensorflow as tf
    from sklearn.datasets import load_digits

    import keras_moe
except ModuleNotFoundError as error:
    sys.exit(
        f"{error}. To install what this needs, in the root of the repository:\n"
        "    pip install -e . tensorflow scikit-learn"
    )

gpus = tf.config.list_physical_devices("GPU")
if not gpus and "TF_CONFIG" not in os.environ:
    tf.config.set_logical_device_configuration(
        tf.config.list_physical_devices("CPU")[0],
        [tf.config.LogicalDeviceConfiguration()] * 2,
    )
keras_moe.distribution.initialize()
strategy = keras_moe.distribution.ExpertParallel(args.expert_shards)
keras.utils.set_random_seed(0)
is_first = strategy.process_index == 0
output = pathlib.Path(args.output)
output.mkdir(parents=True, exist_ok=True)
file = output / "digits.keras"

"""
## The data

`split` gives each worker its part of each batch; where there is one process,
that is all.
"""

digits = load_digits()
images, labels = (digits.images / 8 - 1).astype("float32"), digits.target
size = args.batch_size
train = strategy.split(images[:1536], labels[:1536], batch_size=size)
test = images[1536:1792], labels[1536:1792]

"""
## The model

Built in the scope, its `MoE` layers follow the strategy.
"""


def build():
    x = inputs = keras.Input((8, 8))  # eight rows of pixels, the tokens
    x = keras.layers.Dense(32)(x)
    for _ in range(2):
        mixed = keras.layers.LayerNormalization()(x)
        x = x + keras_moe.layers.MoE(8, 64, top_k=2)(mixed)
        x = x + keras.layers.Conv1D(32, 3, padding="same")(x)
    x = keras.layers.Flatten()(x)
    model = keras.Model(inputs, keras.layers.Dense(10)(x))
    model.compile(
        keras.optimizers.Adam(2e-3, global_clipnorm=1.0),
        keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        metrics=["accuracy"],
    )
    return model


"""
## Training

With one process, all is as usual. With several, each step takes the worker's
part of a batch; all workers take part in every step and in saving, and the
first one's file counts.
"""


def train_workers(model):
    step = strategy.train_step(model)
    own = size // strategy.num_processes
    for epoch in range(args.epochs):
        model.reset_metrics()
        for start in range(0, len(train[0]), own):
            logs = step(*(part[start : start + own] for part in train))
        if is_first:
            shown = ", ".join(f"{name} {x:.4f}" for name, x in logs.items())
            print(f"epoch {epoch + 1}: {shown}")
    with tempfile.TemporaryDirectory() as folder:
        model.save(file if is_first else pathlib.Path(folder) / file.name)


if file.exists():
    model = strategy.load_model(file)
else:
    with strategy.scope():
        model = build()
    model = strategy.distribute(model)
if strategy.num_processes > 1:
    train_workers(model)
else:
    model.fit(
        *train,
        batch_size=size,
        shuffle=False,
        epochs=args.epochs,
        callbacks=[keras.callbacks.ModelCheckpoint(file)],
        verbose=2,
    )

"""
## The result

One device, as where it will be used.
"""

if is_first:
    shards = strategy.num_expert_shards
    print(f"Each device computes {8 // shards} of 8 experts a layer.")
    alone = keras.saving.load_model(file)
    logs = alone.evaluate(*test, return_dict=True, verbose=0)
    print(f"test accuracy {logs['accuracy']:.1%}, written to {file}")
