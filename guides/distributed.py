"""Experts and batches over many devices, on simulated ones.

A model whose experts do not fit one device, or that trains too slowly on one,
stays as it is: a strategy around it divides the work. This guide runs anywhere,
on four devices that JAX simulates on a CPU. With real ones it is the same
without the two lines on the environment:

    python guides/distributed.py
"""

import os

os.environ.setdefault("KERAS_BACKEND", "jax")
os.environ.setdefault("JAX_NUM_CPU_DEVICES", "4")

import pathlib  # noqa: E402
import tempfile  # noqa: E402

import keras  # noqa: E402
import numpy as np  # noqa: E402

import keras_moe  # noqa: E402

# Joins the processes of several hosts; in one process it does nothing.
keras_moe.distribution.initialize()
DEVICES = keras.distribution.list_devices()[:4]
EXPERTS = 8


def make_model():
    inputs = keras.Input((16, 32))
    x = keras.layers.Dense(32)(inputs)
    x = x + keras_moe.layers.MoE(EXPERTS, intermediate_dim=64, top_k=2)(x)
    model = keras.Model(inputs, keras.layers.Dense(4)(x))
    model.compile(keras.optimizers.Adam(1e-2), "mse")
    return model


def make_data():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(64, 16, 32)).astype("float32")
    return x, np.tanh(2 * x[..., :4] * x[..., 4:8])


# ## Before paying
#
# `plan` computes what each device would hold and send, without making the
# model. guides/planning.md reads its table.


def what_it_costs():
    mesh = {"data": 2, "expert": 2}
    keras.utils.set_random_seed(0)
    result = keras_moe.distribution.plan(make_model(), mesh, batch=16)
    print(result)
    return result


# ## Training
#
# Two groups of two devices: each group owns all experts, each device four of
# the eight. All four devices share the batch, and everything else is whole on
# each of them. `batch_size` is the size of the whole batch, which the devices
# must divide.
#
# In the layer each device sorts its own tokens by expert, sends them to the
# owners, and gets the results back. Losses, the expert bias and the logs count
# the whole batch, so the numbers are those of one device.


def train(strategy=None):
    keras.utils.set_random_seed(1)
    if strategy is None:
        model = make_model()
        history = model.fit(*make_data(), 16, epochs=3, verbose=0)
        return model, history.history
    with strategy.scope():
        model = strategy.distribute(make_model())
        history = model.fit(*make_data(), 16, epochs=3, verbose=0)
    return model, history.history


# ## Checkpoints
#
# A file does not depend on the number of devices. Here four devices save, one
# loads, and the state of the optimizer is there too. What is too large for the
# memory of one host, `keras.callbacks.OrbaxCheckpoint` writes from each device.


def saved_and_loaded(model):
    path = pathlib.Path(tempfile.mkdtemp()) / "model.keras"
    model.save(path)
    return keras.saving.load_model(path)


# ## Data parallelism alone
#
# `keras.distribution.DataParallel` needs no strategy of ours: in a `MoE` layer
# each device computes its own tokens, with all experts. So does a layout of
# your own: `keras.distribution.ModelParallel` with a layout map that divides
# the banks, such as `{".*/experts/.*_kernel": ("model", None, None)}` (and
# `".*/experts/.*_bias": ("model", None)`, if there are biases), makes the
# devices of that axis the owners.
#
# ## Several hosts, GPUs, TPUs
#
# These were not run where this guide was written. The program is the same; with
# several processes, give `fit` a `tf.data.Dataset`, which Keras divides.
#
#     # one host with eight GPUs: nothing to set
#     python train.py
#     # two hosts
#     KERAS_DISTRIBUTION_JOB_ADDRESSES=10.0.0.1:1234,10.0.0.2:1234 \
#     KERAS_DISTRIBUTION_NUM_PROCESSES=2 \
#     KERAS_DISTRIBUTION_PROCESS_ID=0 python train.py  # 1 on the other
#     # a TPU pod: `keras.distribution.initialize()` in the program, and
#     gcloud compute tpus tpu-vm ssh NAME --worker=all \
#         --command "python train.py"
#
# ## The other backends
#
# The same strategy, one process for each device on PyTorch
# (examples/distributed/torch_experts.py), the replicas of a `tf.distribute`
# strategy on TensorFlow (examples/distributed/tensorflow_experts.py), where
# `strategy.train_step(model)` replaces `fit` if there are several workers:
#
#     torchrun --nproc-per-node 2 examples/distributed/torch_experts.py
#     python examples/distributed/tensorflow_experts.py


def main():
    what_it_costs()
    strategy = keras_moe.distribution.ExpertParallel(
        num_expert_shards=2, num_data_shards=2, devices=DEVICES
    )
    alone, alone_logs = train()
    model, logs = train(strategy)
    print(f"loss on one device {alone_logs['loss'][-1]:.6f}")
    print(f"loss on four devices {logs['loss'][-1]:.6f}")
    bank = next(v for v in model.variables if "experts/up_kernel" in v.path)
    held = bank.value.addressable_shards[0].data.shape[0]
    print(f"a device holds {held} of {bank.shape[0]} experts")
    loaded = saved_and_loaded(model)
    return alone, model, loaded, logs, alone_logs, held


if __name__ == "__main__":
    main()
