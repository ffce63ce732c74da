"""What each process of tests/distribution/torch_processes_test.py runs.

The first process trains alone before the processes join; then all of them
train together, and the first compares.
"""

import os
import sys

# Keras imports it to save a model if it is there, which takes long.
sys.modules["tensorflow"] = None

import keras  # noqa: E402
import numpy as np  # noqa: E402
import torch.distributed as dist  # noqa: E402

from keras_moe.backend.torch import collectives  # noqa: E402
from keras_moe.distribution import ExpertParallel  # noqa: E402
from keras_moe.distribution import initialize  # noqa: E402
from keras_moe.experts.feed_forward_experts import FeedForwardExperts  # noqa: E402
from keras_moe.layers import MoE  # noqa: E402
from keras_moe.stacked import expert_shards  # noqa: E402
from tests.distribution.torch_cases import BATCH  # noqa: E402
from tests.distribution.torch_cases import CASES  # noqa: E402
from tests.distribution.torch_cases import DIM  # noqa: E402
from tests.distribution.torch_cases import EPOCHS  # noqa: E402
from tests.distribution.torch_cases import EXPERTS  # noqa: E402
from tests.distribution.torch_cases import FOLDER  # noqa: E402
from tests.distribution.torch_cases import LENGTH  # noqa: E402
from tests.distribution.torch_cases import RANK  # noqa: E402
from tests.distribution.torch_cases import SETTINGS  # noqa: E402
from tests.distribution.torch_cases import TIMEOUT  # noqa: E402
from tests.distribution.torch_cases import alone  # noqa: E402
from tests.distribution.torch_cases import bare  # noqa: E402
from tests.distribution.torch_cases import build  # noqa: E402
from tests.distribution.torch_cases import compiled  # noqa: E402
from tests.distribution.torch_cases import data  # noqa: E402
from tests.distribution.torch_cases import fit  # noqa: E402
from tests.distribution.torch_cases import go_on_alone  # noqa: E402
from tests.distribution.torch_cases import gradients_of  # noqa: E402
from tests.distribution.torch_cases import inputs  # noqa: E402
from tests.distribution.torch_cases import same_files  # noqa: E402
from tests.distribution.torch_cases import state  # noqa: E402
from tests.distribution.torch_refusals import check_interrupted_save  # noqa: E402, F401
from tests.distribution.torch_refusals import check_refusals  # noqa: E402, F401


def check_training(strategy, references):
    for name, settings in SETTINGS.items():
        with strategy.scope():
            model = compiled(build(), **settings)
        model = strategy.distribute(model)
        history = fit(model, strategy)
        model.save(FOLDER / f"together_{name}.keras")
        load = model.get_layer("first").statistics.result()["expert_load"]
        np.testing.assert_allclose(load, references["load"][name], rtol=1e-5)
        if RANK == 0:
            same_files(f"alone_{name}.keras", f"together_{name}.keras")
            assert history.history.keys() == references[name].keys()
            for key, values in references[name].items():
                np.testing.assert_allclose(
                    history.history[key], values, rtol=1e-5, err_msg=key
                )


def check_gradients(strategy, references):
    for name, kwargs in CASES.items():
        with strategy.scope():
            model = bare(kwargs, recompute=name == "recomputed")
        loss, found = gradients_of(model, strategy, inputs(name))
        wanted_loss, wanted = references["gradients"][name]
        np.testing.assert_allclose(loss, wanted_loss, rtol=1e-5)
        assert len(found) == len(wanted) >= 6
        for variable, f, w in zip(
            model.trainable_variables, found, wanted, strict=True
        ):
            w = own_part(strategy, variable, w)
            np.testing.assert_allclose(
                f, w, rtol=1e-4, atol=1e-6, err_msg=f"{name} {variable.path}"
            )


def own_part(strategy, variable, value):
    """What the process holds of a variable."""
    if value.shape == tuple(variable.shape):
        return value
    assert value.shape[0] == strategy.num_expert_shards * variable.shape[0]
    size = variable.shape[0]
    shard = strategy.process_index % strategy.num_expert_shards
    return value[shard * size : (shard + 1) * size]


def check_half_precision(strategy, references):
    for policy in ("mixed_bfloat16", "mixed_float16"):
        with strategy.scope():
            model = bare(dict, policy=policy)
        loss, found = gradients_of(model, strategy, inputs(policy))
        wanted_loss, wanted = references["gradients"][policy]
        np.testing.assert_allclose(loss, wanted_loss, rtol=2e-2)
        for variable, f, w in zip(
            model.trainable_variables, found, wanted, strict=True
        ):
            w = own_part(strategy, variable, w)
            scale = max(np.abs(w).max(), 1e-4)
            np.testing.assert_allclose(f / scale, w / scale, atol=4e-2)


def check_loss_scaling(strategy, references):
    """An infinite gradient of one process stops the step of all."""
    with strategy.scope():
        model = bare(dict)
    inner = keras.optimizers.SGD(1.0)
    optimizer = keras.optimizers.LossScaleOptimizer(inner, initial_scale=4.0)
    loss, found = gradients_of(model, strategy, inputs(""), optimizer)
    _, wanted = references["gradients"]["recomputed"]
    for variable, f, w in zip(
        model.trainable_variables, found, wanted, strict=True
    ):
        w = own_part(strategy, variable, w)
        np.testing.assert_allclose(f, w, rtol=1e-4, atol=1e-6)
    before = [np.array(v.numpy()) for v in model.trainable_variables]
    x = strategy.split(inputs(""), batch_size=BATCH)
    y = np.full_like(x, np.inf if RANK else 0.0)
    model.train_on_batch(x, y)
    for variable, value in zip(model.trainable_variables, before, strict=True):
        np.testing.assert_array_equal(variable.numpy(), value)
    assert optimizer.dynamic_scale.numpy() == 2.0


def check_unused_result(strategy, references):
    """The gradients of one process do not need its experts' results."""

    class Skipping(keras.layers.Layer):
        def call(self, x, y):
            return x if RANK == 0 else y

    keras.utils.set_random_seed(5)
    with strategy.scope():
        x = inputs_ = keras.Input((LENGTH, DIM))
        x = keras.layers.Dense(DIM)(x)
        for _ in range(2):
            x = Skipping()(x, MoE(EXPERTS, 4)(x))
        model = keras.Model(inputs_, x)
    loss, found = gradients_of(model, strategy, inputs(""))
    assert np.isfinite(loss).all()
    assert all(np.isfinite(f).all() for f in found)


def check_traffic(strategy, references):
    """Rows travel once each way, and are computed where they arrive."""
    with strategy.scope():
        model = bare(dict)
    sent, computed = [], []
    exchange = collectives.exchange_rows
    mix = FeedForwardExperts.mix

    def counting(rows, link, send, receive, group, *args):
        own = dist.get_group_rank(group, RANK)
        sent.append(sum(send) - send[own])
        return exchange(rows, link, send, receive, group, *args)

    def counting_mix(self, tokens, *args, **kwargs):
        computed.append(tokens.shape[0])
        return mix(self, tokens, *args, **kwargs)

    x = strategy.split(inputs(""), batch_size=BATCH)
    collectives.exchange_rows = counting
    FeedForwardExperts.mix = counting_mix
    try:
        model(x)
    finally:
        collectives.exchange_rows = exchange
        FeedForwardExperts.mix = mix
    routing = model.get_layer("one").route(x, mask=np.any(x != 0, -1))
    owner = routing.expert_indices.numpy() // (
        EXPERTS // strategy.num_expert_shards
    )
    everyone = collectives.gather_objects(owner.ravel().tolist())
    own = strategy.process_index
    away = sum(number != own for number in everyone[own])
    mine = sum(numbers.count(own) for numbers in everyone)
    back = mine - everyone[own].count(own)
    assert sent[:2] == [away, back], (sent, away, back)
    assert computed[0] == mine, (computed, mine)
    # No other rows: half of the choices of random tokens at two processes.
    assert len(sent) == 4 and len(computed) == 2


def check_overlap(strategy, references):
    """Shared experts and their gradients come while rows travel."""
    events = []
    start, wait = collectives._Trip.start, collectives._Trip.wait

    def spying_start(trip, rows, back=False):
        events.append("start")
        return start(trip, rows, back)

    def spying_wait(trip):
        events.append("wait")
        wait(trip)

    class Shared(keras.layers.Layer):
        def call(self, x):
            events.append("shared")
            x = x * 1.0
            if x.requires_grad:
                x.register_hook(lambda gradient: events.append("shared"))
            return x

    with strategy.scope():
        x = keras.Input((LENGTH, DIM))
        y = keras.layers.Dense(DIM)(x)
        y = MoE(EXPERTS, 4, shared_experts=Shared())(y)
        model = keras.Model(x, y)
    collectives._Trip.start, collectives._Trip.wait = spying_start, spying_wait
    try:
        events.clear()
        gradients_of(model, strategy, inputs(""))
    finally:
        collectives._Trip.start, collectives._Trip.wait = start, wait
    events = events[events.index("start") :]  # not while Keras infers shapes
    late, early = ["start", "wait"], ["start", "shared", "wait"]
    assert events == [*early, *late, *late, *early], events


def check_memory(strategy, references):
    """Each process has its share of the experts and of their moments."""
    shards = strategy.num_expert_shards
    with strategy.scope():
        model = compiled(bare(dict))
    model = strategy.distribute(model)
    x = inputs("")
    model.fit(*strategy.split(x, x, batch_size=BATCH), verbose=0)
    experts = 2 * EXPERTS * 3 * DIM * 4  # two layers, three kernels
    rest = 2 * DIM * EXPERTS + 2 * (EXPERTS + 3)
    divided = [v for v in model.variables if expert_shards.mark_of(v)]
    assert len(divided) == 6
    # Keras 3.16 averages all other gradients by itself.
    assert len(model._ddp_params_and_buffers_to_ignore) == 6
    routers = 2 * DIM * EXPERTS
    of_model = sum(v.value.numel() for v in model.variables)
    assert of_model == experts // shards + rest, of_model
    moments = sum(v.value.numel() for v in model.optimizer.variables) - 2
    assert moments == 2 * (experts // shards + routers), moments


def check_inference(strategy, references):
    """Evaluation and prediction are those of one process."""
    with strategy.scope():
        model = strategy.distribute(compiled(build()))
    before = [np.array(v.numpy()) for v in model.variables]
    x, y = data()
    x, y = x[: 2 * BATCH], y[: 2 * BATCH]
    parts = strategy.split(x, y, batch_size=BATCH)
    size = BATCH // strategy.num_processes
    logs = model.evaluate(*parts, batch_size=size, return_dict=True, verbose=0)
    for key, value in references["evaluate"].items():
        np.testing.assert_allclose(logs[key], value, rtol=1e-5)
    np.testing.assert_allclose(
        model.predict(parts[0], batch_size=size, verbose=0),
        strategy.split(references["predict"], batch_size=BATCH),
        rtol=1e-4,
        atol=1e-6,
    )
    for variable, value in zip(model.variables, before, strict=True):
        np.testing.assert_array_equal(variable.numpy(), value)


def check_batch_normalization(strategy, references):
    """Moving averages are those of all parts of the batch."""
    x = inputs("")
    part = strategy.split(x, batch_size=BATCH)
    with strategy.scope():
        model = keras.Sequential(
            [
                keras.Input((LENGTH, DIM)),
                keras.layers.BatchNormalization(momentum=0.5),
                keras.layers.Dropout(0.5),
                MoE(EXPERTS, 4),
            ]
        )
        model.compile("sgd", "mse")
    model = strategy.distribute(model)
    model.fit(part, part, verbose=0)
    np.testing.assert_allclose(
        model.layers[0].moving_mean.numpy(),
        x.mean(axis=(0, 1)) / 2,
        rtol=1e-4,
        atol=1e-6,
    )
    first = [
        int(v.numpy()[0]) for v in model.variables if "seed" in v.path
    ].pop()
    everyone = collectives.gather_objects(first)
    assert len(set(everyone)) == strategy.num_processes


def check_moved(strategy, references):
    """Training goes on with another number of processes."""
    model = strategy.load_model(FOLDER / "moved.keras")
    fit(model, strategy, epochs=EPOCHS, initial_epoch=5)
    model.save(FOLDER / "arrived.keras")
    if RANK == 0:
        same_files("alone_accumulated.keras", "arrived.keras")


def check_sharded(strategy, references):
    """Each process writes its part, and any number of processes read it."""
    with strategy.scope():
        model = compiled(build())
    model = strategy.distribute(model)
    fit(model, strategy, epochs=1)
    for _ in range(2):  # the second replaces the first
        strategy.save_sharded(model, FOLDER / "sharded")
    model.save(FOLDER / "sharded.keras")
    with strategy.scope():
        other = strategy.distribute(compiled(build()))
    for variable in other.trainable_variables:
        variable.assign(keras.ops.zeros_like(variable.value))
    strategy.load_sharded(other, FOLDER / "sharded")
    for a, b in zip(state(model), state(other), strict=True):
        np.testing.assert_array_equal(a.numpy(), b.numpy())


def check_killed(strategy, references):
    """Fills checkpoints until a process dies."""

    class Die(keras.callbacks.Callback):
        def on_epoch_begin(self, epoch, logs=None):
            self.epoch = epoch

        def on_train_batch_end(self, batch, logs=None):
            if RANK and (self.epoch, batch) == (3, 1):
                os._exit(7)

    with strategy.scope():
        model = compiled(build(), **SETTINGS["accumulated"])
    model = strategy.distribute(model)
    checkpoint = keras.callbacks.ModelCheckpoint(FOLDER / "killed.keras")
    fit(model, strategy, callbacks=[checkpoint, Die()])


CHECKS = {
    name.removeprefix("check_"): check
    for name, check in list(globals().items())
    if name.startswith("check_")
}


def main(arguments):
    references = alone() if RANK == 0 else None
    if "moved" in arguments and RANK == 0:
        go_on_alone()
    initialize(timeout=TIMEOUT, seed=3)
    references = collectives.broadcast_object(references)
    for check in arguments:
        name, _, shards = check.partition(":")
        strategy = ExpertParallel(
            int(shards) if shards else None, timeout=TIMEOUT
        )
        CHECKS[name](strategy, references)
        collectives.wait()
        if RANK == 0:
            print("passed", check, flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
