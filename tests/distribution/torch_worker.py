"""What each process of tests/distribution/torch_processes_test.py runs.

The first process trains alone before the processes join; then all of them
train together, and the first compares.
"""

import os
import pathlib
import sys

os.environ.setdefault("KERAS_BACKEND", "torch")
# Keras imports it to save a model if it is there, which takes long.
sys.modules["tensorflow"] = None

import keras  # noqa: E402
import numpy as np  # noqa: E402
import torch  # noqa: E402

from keras_moe.backend.torch import collectives  # noqa: E402
from keras_moe.dispatch import Dispatcher  # noqa: E402
from keras_moe.distribution import process_engine  # noqa: E402
from keras_moe.experts import GLUExperts  # noqa: E402
from keras_moe.layers import MoE  # noqa: E402
from keras_moe.routers import TopKRouter  # noqa: E402

torch.set_num_threads(1)
RANK = int(os.environ.get("RANK", "0"))
EXPERTS, LENGTH, VOCABULARY, DIM, BATCH, EXAMPLES = 8, 5, 11, 6, 8, 20
EPOCHS = 7  # of two whole batches and a smaller one: 21 steps
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
    kwargs = {"losses": None, **kwargs}
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
        "gradient_accumulation_steps": 3,
        "global_clipnorm": 0.05,
    },
}


def alone():
    """History and file of the training in one process, by setting."""
    results = {}
    for name, settings in SETTINGS.items():
        model = compiled(build(), **settings)
        history = fit(model)
        model.save(FOLDER / f"alone_{name}.keras")
        results[name] = history.history
    return results


def check_training(engine, references):
    for name, settings in SETTINGS.items():
        with engine.scope():
            model = compiled(build(engine), **settings)
        model = engine.distribute(model)
        history = fit(model, engine)
        model.save(FOLDER / f"together_{name}.keras")
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


CHECKS = {
    name.removeprefix("check_"): check
    for name, check in list(globals().items())
    if name.startswith("check_")
}


def main(arguments):
    references = alone() if RANK == 0 else None
    process_engine.initialize(timeout=60.0, seed=3)
    for name in arguments:
        name, _, shards = name.partition(":")
        engine = process_engine.ProcessEngine(
            int(shards) if shards else None, timeout=60.0
        )
        CHECKS[name](engine, references)
        collectives.wait()
        if RANK == 0:
            print("passed", name, shards, flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
