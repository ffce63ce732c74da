"""
Title: Experts divided among processes
Author: The keras_moe authors
Date created: 2026/11/27
Last modified: 2026/11/27
Description: Plain `fit` on PyTorch, where each process holds some experts.
Accelerator: None
"""

"""
## Introduction

`torchrun` starts a process for each device. Each trains on its own part of
every batch and holds its own share of the experts; tokens travel to their
experts and back. The numbers are those of one process with the whole batch, and
so is the file that is saved. Two processes, on any machine:

    torchrun --nproc-per-node 2 examples/distributed/torch_experts.py

Run again, it goes on from the file, also with another number of processes, or
in one without `torchrun`. Not run where this was written:

    # one host with eight GPUs: four shares of the experts, each held twice
    torchrun --nproc-per-node 8 examples/distributed/torch_experts.py \
        --expert-shards 4
    # two hosts with eight GPUs each
    torchrun --nnodes 2 --nproc-per-node 8 --rdzv-backend c10d \
        --rdzv-endpoint FIRST_HOST:29400 examples/distributed/torch_experts.py
"""

"""
## Setup

All processes join before anything is drawn, and draw the same.
"""

import argparse
import os
import pathlib
import sys

parser = argparse.ArgumentParser(
    description="Trains a classifier of digits by several processes.",
    formatter_class=argparse.ArgumentDefaultsHelpFormatter,
)
parser.add_argument("--epochs", type=int, default=5, help="at least 1")
parser.add_argument("--batch-size", type=int, default=64, help="of all")
parser.add_argument("--expert-shards", type=int, help="processes, if not given")
parser.add_argument("--output", default="runs/distributed", help="folder")
args = parser.parse_args()

os.environ["KERAS_BACKEND"] = "torch"
os.environ.setdefault("OMP_NUM_THREADS", "1")

try:
    import keras
    from sklearn.datasets import load_digits

    import keras_moe
except ModuleNotFoundError as error:
    sys.exit(
        f"{error}. To install what this needs, in the root of the repository:\n"
        "    pip install -e . torch scikit-learn"
    )

keras_moe.distribution.initialize(seed=0, timeout=120.0)
strategy = keras_moe.distribution.ExpertParallel(args.expert_shards)
output = pathlib.Path(args.output)
output.mkdir(parents=True, exist_ok=True)
file = output / "digits.keras"

"""
## The data

`split` gives each process its part of each batch, so that the batches are those
of one process. A data set that shuffles must do it alike in all processes.
"""

digits = load_digits()
images, labels = (digits.images / 8 - 1).astype("float32"), digits.target
size = args.batch_size
train = strategy.split(images[:1536], labels[:1536], batch_size=size)
test = strategy.split(images[1536:1792], labels[1536:1792], batch_size=size)

"""
## The model

Built in the scope, its experts are those of this process alone.
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

After `distribute`, all is as usual. The first process writes the file and
shows the progress; the others take part.
"""

if file.exists():
    model = strategy.load_model(file)
else:
    with strategy.scope():
        model = build()
    model = strategy.distribute(model)
history = model.fit(
    *train,
    batch_size=size // strategy.num_processes,
    shuffle=False,
    epochs=args.epochs,
    validation_data=test,
    callbacks=[keras.callbacks.ModelCheckpoint(file)],
)
if strategy.process_index == 0:
    experts = model.layers[3].experts
    held, all_of_them = experts.up_kernel.shape[0], experts.num_experts
    print(f"Each process holds {held} of {all_of_them} experts a layer.")
    accuracy = history.history["val_accuracy"][-1]
    print(f"test accuracy {accuracy:.1%}, written to {file}")
