"""What each process of tests/distribution/torch_processes_test.py runs.

The first process trains alone before the processes join; then all of them
train together, and the first compares.
"""

import os
import pathlib
import re
import sys

os.environ.setdefault("KERAS_BACKEND", "torch")
# Keras imports it to save a model if it is there, which takes long.
sys.modules["tensorflow"] = None

import keras  # noqa: E402
import numpy as np  # noqa: E402
import torch  # noqa: E402

from keras_moe.backend.torch import collectives  # noqa: E402
from keras_moe.dispatch import Capacity  # noqa: E402
from keras_moe.dispatch import Dispatcher  # noqa: E402
from keras_moe.distribution import process_engine  # noqa: E402
from keras_moe.experts import GLUExperts  # noqa: E402
from keras_moe.experts import LayerExperts  # noqa: E402
from keras_moe.experts import LowRankExperts  # noqa: E402
from keras_moe.layers import MoE  # noqa: E402
from keras_moe.routers import ExpertChoiceRouter  # noqa: E402
from keras_moe.routers import TopKRouter  # noqa: E402

torch.set_num_threads(1)
RANK = int(os.environ.get("RANK", "0"))
EXPERTS, LENGTH, VOCABULARY, DIM, BATCH, EXAMPLES = 8, 5, 11, 6, 8, 20
EPOCHS = 7  # of two whole batches and a smaller one: 21 steps
TIMEOUT = float(os.environ.get("KERAS_MOE_TEST_TIMEOUT", "60"))
FOLDER = pathlib.Path(os.environ.get("KERAS_MOE_TEST_FOLDER", "."))


class Through(Dispatcher):
    """Hands over to the engine of the experts."""

    moves_rows = True

    def __init__(self, inner, engine):
        self.inner, self.engine = inner, engine
        self.capacity, self.weights_on = inner.capacity, inner.weights_on
        self.seed_generator = inner.seed_generator

    def __call__(self, *args, **kwargs):
        return self.engine.dispatch(self.inner, *args, **kwargs)


def through(model, engine):
    for layer in model.layers:
        if isinstance(layer, MoE):
            layer.dispatcher = Through(layer.dispatcher, engine)
    return model


def build(engine=None, **kwargs):
    keras.utils.set_random_seed(3)
    router = TopKRouter(
        EXPERTS, 2, score_activation="sigmoid", expert_bias=True
    )
    x = inputs = keras.Input((LENGTH,), dtype="int32")
    x = keras.layers.Embedding(VOCABULARY, DIM, mask_zero=True)(x)
    kwargs = {"losses": "default", **kwargs}
    x = MoE(
        router=router,
        experts=GLUExperts(EXPERTS, 7, use_bias=True),
        shared_experts=GLUExperts(1, 4),
        name="first",
        **kwargs,
    )(x)
    x = MoE(EXPERTS, 5, experts="mlp", name="second", **kwargs)(x)
    x = keras.layers.GlobalAveragePooling1D()(x)
    model = keras.Model(inputs, keras.layers.Dense(3)(x))
    return model if engine is None else through(model, engine)


def data(seed=0):
    random = np.random.default_rng(seed)
    x = random.integers(0, VOCABULARY, (EXAMPLES, LENGTH)).astype("int32")
    x[:, 0] = np.maximum(x[:, 0], 1)
    return x, random.normal(size=(EXAMPLES, 3)).astype("float32")


def compiled(model, **kwargs):
    # With a smaller epsilon, Adam makes steps of what gradients near zero are
    # rounded to.
    kwargs = {"learning_rate": 0.02, "epsilon": 1e-3, **kwargs}
    model.compile(keras.optimizers.Adam(**kwargs), "mse", metrics=["mae"])
    return model


def fit(model, engine=None, **kwargs):
    x, y = data()
    batch = BATCH
    if engine is not None:
        x, y = engine.split(x, y, batch_size=BATCH)
        batch = BATCH // engine.num_processes
    kwargs = {"epochs": EPOCHS, "verbose": 0, **kwargs}
    return model.fit(x, y, batch_size=batch, shuffle=False, **kwargs)


SETTINGS = {
    "plain": {},
    "clipped": {"global_clipnorm": 0.05},
    "clipped_each": {"clipnorm": 0.02, "weight_decay": 0.01},
    "accumulated": {
        "gradient_accumulation_steps": 2,
        "global_clipnorm": 0.05,
    },
}


def alone(arguments):
    """What one process finds."""
    results = {"load": {}}
    if "killed" in arguments:
        return results
    trains = {"training", "moved"} & set(arguments)
    for name, settings in (SETTINGS if trains else {}).items():
        model = compiled(build(), **settings)
        history = fit(model)
        model.save(FOLDER / f"alone_{name}.keras")
        results[name] = history.history
        statistics = model.get_layer("first").statistics
        results["load"][name] = statistics.result()["expert_load"]
    model = compiled(build())
    x, y = (array[: 2 * BATCH] for array in data())
    results["evaluate"] = model.evaluate(
        x, y, batch_size=BATCH, return_dict=True, verbose=0
    )
    results["predict"] = model.predict(x, batch_size=BATCH, verbose=0)
    results["gradients"] = {
        name: gradients_of(bare(None, kwargs), None, inputs(name))
        for name, kwargs in CASES.items()
    }
    for policy in ("mixed_bfloat16", "mixed_float16"):
        model = bare(None, dict, policy=policy)
        results["gradients"][policy] = gradients_of(model, None, inputs(policy))
    if "moved" in arguments:
        # What two processes left, trained on by one.
        model = keras.saving.load_model(FOLDER / "killed.keras")
        fit(model, epochs=5, initial_epoch=3)
        model.save(FOLDER / "moved.keras")
    return results


def check_training(engine, references):
    for name, settings in SETTINGS.items():
        with engine.scope():
            model = compiled(build(engine), **settings)
        model = engine.distribute(model)
        history = fit(model, engine)
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


def same_files(first, second):
    """All variables of the models, and of their optimizers."""
    one, other = (
        keras.saving.load_model(FOLDER / name) for name in (first, second)
    )
    variables = [
        [*model.variables, *model.optimizer.variables] for model in (one, other)
    ]
    assert len(variables[0]) == len(variables[1]) > 60
    for a, b in zip(*variables, strict=True):
        a, b = (keras.ops.convert_to_numpy(v.value) for v in (a, b))
        np.testing.assert_allclose(
            a, b, rtol=1e-5, atol=1e-5 * max(np.abs(a).max(), 1e-6)
        )


def bare(engine, kwargs, policy="float32", recompute=False):
    """Two layers, whose input of zeros may be masked."""
    keras.utils.set_random_seed(5)
    x = inputs = keras.Input((LENGTH, DIM))
    mask = keras.layers.Lambda(lambda x: keras.ops.any(x != 0, axis=-1))(x)
    with keras.RematScope("full" if recompute else None):
        for name in ("one", "two"):
            x = MoE(
                **{"num_experts": EXPERTS, "intermediate_dim": 4, **kwargs()},
                dtype=policy,
                name=name,
            )(x, mask=mask)
    model = keras.Model(inputs, x)
    return model if engine is None else through(model, engine)


def gradients_of(model, engine, x):
    """The loss of one step, and what it subtracted from each variable."""
    optimizer = keras.optimizers.SGD(1.0)
    model.compile(optimizer, "mse", jit_compile=False)
    if engine is not None:
        model = engine.distribute(model)
    y = np.cos(np.arange(x.size).reshape(x.shape)).astype("float32")
    if engine is not None:
        x, y = engine.split(x, y, batch_size=len(x))
    before = [np.array(v.numpy()) for v in model.trainable_variables]
    loss = model.train_on_batch(x, y)
    return loss, [
        b - v.numpy()
        for b, v in zip(before, model.trainable_variables, strict=True)
    ]


def inputs(case):
    x = np.random.default_rng(1).normal(size=(BATCH, LENGTH, DIM))
    if case == "no_tokens":  # in the last process
        x[BATCH // 2 :] = 0.0
    return x.astype("float32")


def only_first_experts():
    # Equal scores: all tokens go to the experts 0 and 1.
    return {
        "router": TopKRouter(EXPERTS, 2, kernel_initializer="zeros"),
    }


def expert_choice():
    return {
        "router": ExpertChoiceRouter(EXPERTS, 1.5, per="sequence"),
    }


def regularized():
    return {
        "kernel_regularizer": "l2",
        "kernel_constraint": keras.constraints.MaxNorm(0.9),
        "weights_on": "input",
    }


def dropping(policy):
    return lambda: {
        "capacity": Capacity(
            0.6, drop_policy=policy, normalize_kept_weights=True
        )
    }


CASES = {
    "no_tokens": dict,
    "empty_experts": only_first_experts,
    "expert_choice": expert_choice,
    "regularized": regularized,
    "low_rank": lambda: {
        "experts": LowRankExperts(EXPERTS, 4, rank=2),
        "intermediate_dim": None,
    },
    "recomputed": dict,
    "position": dropping("position"),
    "priority": dropping("priority"),
    "weight": dropping("weight"),
}


def check_gradients(engine, references):
    for name, kwargs in CASES.items():
        with engine.scope():
            model = bare(engine, kwargs, recompute=name == "recomputed")
        loss, found = gradients_of(model, engine, inputs(name))
        wanted_loss, wanted = references["gradients"][name]
        np.testing.assert_allclose(loss, wanted_loss, rtol=1e-5)
        assert len(found) == len(wanted) >= 6
        for variable, f, w in zip(
            model.trainable_variables, found, wanted, strict=True
        ):
            w = own_part(engine, variable, w)
            np.testing.assert_allclose(
                f, w, rtol=1e-4, atol=1e-6, err_msg=f"{name} {variable.path}"
            )


def own_part(engine, variable, value):
    """What the process holds of a variable."""
    if value.shape == tuple(variable.shape):
        return value
    assert value.shape[0] == engine.num_expert_shards * variable.shape[0]
    size = variable.shape[0]
    shard = engine.process_index % engine.num_expert_shards
    return value[shard * size : (shard + 1) * size]


def check_half_precision(engine, references):
    for policy in ("mixed_bfloat16", "mixed_float16"):
        with engine.scope():
            model = bare(engine, dict, policy=policy)
        loss, found = gradients_of(model, engine, inputs(policy))
        wanted_loss, wanted = references["gradients"][policy]
        np.testing.assert_allclose(loss, wanted_loss, rtol=2e-2)
        for variable, f, w in zip(
            model.trainable_variables, found, wanted, strict=True
        ):
            w = own_part(engine, variable, w)
            scale = max(np.abs(w).max(), 1e-4)
            np.testing.assert_allclose(f / scale, w / scale, atol=4e-2)


def check_unused_result(engine, references):
    """The gradients of one process do not need its experts' results."""

    class Skipping(keras.layers.Layer):
        def call(self, x, y):
            return x if RANK == 0 else y

    keras.utils.set_random_seed(5)
    with engine.scope():
        x = inputs_ = keras.Input((LENGTH, DIM))
        x = keras.layers.Dense(DIM)(x)
        for _ in range(2):
            x = Skipping()(x, MoE(EXPERTS, 4)(x))
        model = through(keras.Model(inputs_, x), engine)
    loss, found = gradients_of(model, engine, inputs(""))
    assert np.isfinite(loss).all()
    assert all(np.isfinite(f).all() for f in found)


def check_memory(engine, references):
    """Each process has its share of the experts and of their moments."""
    shards = engine.num_expert_shards
    with engine.scope():
        model = compiled(bare(engine, dict))
    model = engine.distribute(model)
    x = inputs("")
    model.fit(*engine.split(x, x, batch_size=BATCH), verbose=0)
    experts = 2 * EXPERTS * 3 * DIM * 4  # two layers, three kernels
    rest = 2 * DIM * EXPERTS + 2 * (EXPERTS + 3)
    routers = 2 * DIM * EXPERTS
    of_model = sum(v.value.numel() for v in model.variables)
    assert of_model == experts // shards + rest, of_model
    moments = sum(v.value.numel() for v in model.optimizer.variables) - 2
    assert moments == 2 * (experts // shards + routers), moments


def check_inference(engine, references):
    """Evaluation and prediction are those of one process."""
    with engine.scope():
        model = engine.distribute(compiled(build(engine)))
    before = [np.array(v.numpy()) for v in model.variables]
    x, y = data()
    x, y = x[: 2 * BATCH], y[: 2 * BATCH]
    parts = engine.split(x, y, batch_size=BATCH)
    size = BATCH // engine.num_processes
    logs = model.evaluate(*parts, batch_size=size, return_dict=True, verbose=0)
    for key, value in references["evaluate"].items():
        np.testing.assert_allclose(logs[key], value, rtol=1e-5)
    np.testing.assert_allclose(
        model.predict(parts[0], batch_size=size, verbose=0),
        engine.split(references["predict"], batch_size=BATCH),
        rtol=1e-4,
        atol=1e-6,
    )
    for variable, value in zip(model.variables, before, strict=True):
        np.testing.assert_array_equal(variable.numpy(), value)


def raises(error, pattern, function, *args, **kwargs):
    try:
        function(*args, **kwargs)
    except error as caught:
        assert re.search(pattern, str(caught)), str(caught)
    else:
        raise AssertionError(f"No error like {pattern!r}")


def check_refusals(engine, references):
    size = engine.num_processes
    raises(
        ValueError,
        "nearest for 7 experts: 1 and 7",
        lambda: build_bank(engine, GLUExperts(7, 4)),
    )
    layers = LayerExperts(keras.layers.Dense(DIM), EXPERTS)
    model = build_bank(engine, layers)
    raises(ValueError, "cannot be divided", model, inputs(""))
    raises(
        ValueError,
        "bank_regularizer",
        lambda: build_bank(
            engine, GLUExperts(EXPERTS, 4, bank_regularizer="l2")
        ),
    )
    raises(
        ValueError,
        "must divide the number of processes",
        process_engine.ProcessEngine,
        size + 1,
    )
    raises(
        ValueError,
        "same num_expert_shards",
        process_engine.ProcessEngine,
        1 if RANK else size,
    )
    # Different numbers of experts.
    number = EXPERTS if RANK else 2 * EXPERTS
    model = build_bank(engine, GLUExperts(number, 4))
    raises(ValueError, "same model", engine.distribute, model)
    # Not distributed.
    model = build_bank(engine, GLUExperts(EXPERTS, 4))
    model.compile("sgd", "mse")
    x = inputs("")
    raises(RuntimeError, "distribute", model.train_on_batch, x, x)
    raises(RuntimeError, "model.save", model.save, FOLDER / "x.keras")
    model = engine.distribute(model)
    raises(ValueError, "Adafactor", model.compile, "adafactor", "mse")
    loss = keras.losses.MeanSquaredError(reduction="sum")
    raises(ValueError, "sum_over_batch_size", model.compile, "sgd", loss)
    model.compile("sgd", "mse")
    # Data.
    raises(ValueError, "same data", model.fit, x[RANK:], x[RANK:])
    raises(ValueError, "batch_size", engine.split, x, batch_size=size + 1)
    raises(ValueError, "last batch", engine.split, x[1:], batch_size=BATCH)
    raises(ValueError, "one file", model.save, FOLDER / "x.h5")
    raises(NotImplementedError, "exported", model.export, FOLDER / "x")


def build_bank(engine, experts):
    with engine.scope():
        x = keras.Input((LENGTH, DIM))
        model = keras.Model(x, MoE(experts=experts)(x))
    return through(model, engine)


def check_interrupted_save(engine, references):
    """A save that fails leaves the file of the one before whole."""
    model = engine.distribute(build_bank(engine, GLUExperts(EXPERTS, 4)))
    path = FOLDER / "interrupted.keras"
    model.save(path)
    before = path.read_bytes()

    def fail(self, store):
        raise OSError("No space left on device")

    original = GLUExperts.save_own_variables
    GLUExperts.save_own_variables = fail
    try:
        raises(
            RuntimeError if RANK else OSError,
            "No space left",
            model.save,
            path,
        )
    finally:
        GLUExperts.save_own_variables = original
    collectives.wait()
    assert path.read_bytes() == before
    names = [p.name for p in FOLDER.iterdir() if p.name.startswith(".")]
    assert not names, names


def check_batch_normalization(engine, references):
    """Moving averages are those of all parts of the batch."""
    x = inputs("")
    part = engine.split(x, batch_size=BATCH)
    with engine.scope():
        model = keras.Sequential(
            [
                keras.Input((LENGTH, DIM)),
                keras.layers.BatchNormalization(momentum=0.5),
                keras.layers.Dropout(0.5),
                MoE(EXPERTS, 4),
            ]
        )
        through(model, engine).compile("sgd", "mse")
    model = engine.distribute(model)
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
    assert len(set(everyone)) == engine.num_processes


def check_moved(engine, references):
    """Training goes on with another number of processes."""
    model = engine.load_model(FOLDER / "moved.keras")
    through(model, engine)
    fit(model, engine, epochs=EPOCHS, initial_epoch=5)
    model.save(FOLDER / "arrived.keras")
    if RANK == 0:
        same_files("alone_accumulated.keras", "arrived.keras")


def check_killed(engine, references):
    """Fills checkpoints until a process dies."""

    class Die(keras.callbacks.Callback):
        def on_epoch_begin(self, epoch, logs=None):
            self.epoch = epoch

        def on_train_batch_end(self, batch, logs=None):
            if RANK and (self.epoch, batch) == (3, 1):
                os._exit(7)

    with engine.scope():
        model = compiled(build(engine), **SETTINGS["accumulated"])
    model = engine.distribute(model)
    checkpoint = keras.callbacks.ModelCheckpoint(FOLDER / "killed.keras")
    fit(model, engine, callbacks=[checkpoint, Die()])


CHECKS = {
    name.removeprefix("check_"): check
    for name, check in list(globals().items())
    if name.startswith("check_")
}


def main(arguments):
    references = alone(arguments) if RANK == 0 else None
    process_engine.initialize(timeout=TIMEOUT, seed=3)
    references = collectives.broadcast_object(references)
    for check in arguments:
        name, _, shards = check.partition(":")
        engine = process_engine.ProcessEngine(
            int(shards) if shards else None, timeout=TIMEOUT
        )
        CHECKS[name](engine, references)
        collectives.wait()
        if RANK == 0:
            print("passed", check, flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
