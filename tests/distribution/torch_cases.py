"""Models, data and reference results of torch_worker.py."""

import os
import pathlib
import pickle
import sys

os.environ.setdefault("KERAS_BACKEND", "torch")
# Keras imports it to save a model if it is there, which takes long.
sys.modules["tensorflow"] = None

import keras  # noqa: E402
import numpy as np  # noqa: E402
import torch  # noqa: E402

from keras_moe.dispatch import Capacity  # noqa: E402
from keras_moe.distribution import ExpertParallel  # noqa: E402
from keras_moe.experts import GLUExperts  # noqa: E402
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


def build(**kwargs):
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
    return keras.Model(inputs, keras.layers.Dense(3)(x))


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


def fit(model, strategy=None, **kwargs):
    x, y = data()
    batch = BATCH
    if strategy is not None:
        x, y = strategy.split(x, y, batch_size=BATCH)
        batch = BATCH // strategy.num_processes
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


def alone():
    """What one process finds, from a file if it has been asked before."""
    path = FOLDER / "references.pickle"
    if path.exists():
        return pickle.loads(path.read_bytes())
    results = {"load": {}, "gradients": {}}
    for name, settings in SETTINGS.items():
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
    for name, kwargs in CASES.items():
        found = gradients_of(bare(kwargs), None, inputs(name))
        results["gradients"][name] = found
    for policy in ("mixed_bfloat16", "mixed_float16"):
        model = bare(dict, policy=policy)
        results["gradients"][policy] = gradients_of(model, None, inputs(policy))
    path.write_bytes(pickle.dumps(results))
    return results


def go_on_alone():
    """One process reads what two have left, and trains on for two epochs."""
    strategy = ExpertParallel()
    model = compiled(build())
    strategy.load_sharded(model, FOLDER / "sharded")
    compare(model, keras.saving.load_model(FOLDER / "sharded.keras"))
    model = keras.saving.load_model(FOLDER / "killed.keras")
    fit(model, epochs=5, initial_epoch=3)
    model.save(FOLDER / "moved.keras")


def same_files(first, second):
    """Compares models, with their optimizers."""
    first, second = FOLDER / first, FOLDER / second
    compare(keras.saving.load_model(first), keras.saving.load_model(second))


def compare(one, other):
    one, other = state(one), state(other)
    assert len(one) == len(other) > 60
    for a, b in zip(one, other, strict=True):
        a, b = (keras.ops.convert_to_numpy(v.value) for v in (a, b))
        np.testing.assert_allclose(
            a, b, rtol=1e-5, atol=1e-5 * max(np.abs(a).max(), 1e-6)
        )


def state(model):
    """The variables of a model and of its optimizer."""
    return [*model.weights, *model.optimizer.variables]


def bare(kwargs, policy="float32", recompute=False):
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
    return keras.Model(inputs, x)


def gradients_of(model, strategy, x, optimizer=None):
    """The loss of one step, and what it subtracted from each variable."""
    optimizer = optimizer or keras.optimizers.SGD(1.0)
    model.compile(optimizer, "mse", jit_compile=False)
    if strategy is not None:
        model = strategy.distribute(model)
    y = np.cos(np.arange(x.size).reshape(x.shape)).astype("float32")
    if strategy is not None:
        x, y = strategy.split(x, y, batch_size=len(x))
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
