"""Checks of torch_worker.py: what is refused, and what failures leave."""

import re

import keras

from keras_moe.backend.torch import collectives
from keras_moe.dispatch import Dispatcher
from keras_moe.distribution import ExpertParallel
from keras_moe.experts import GLUExperts
from keras_moe.experts import LayerExperts
from keras_moe.layers import MoE
from tests.distribution.torch_cases import BATCH
from tests.distribution.torch_cases import DIM
from tests.distribution.torch_cases import EXPERTS
from tests.distribution.torch_cases import FOLDER
from tests.distribution.torch_cases import LENGTH
from tests.distribution.torch_cases import RANK
from tests.distribution.torch_cases import inputs


def raises(error, pattern, function, *args, **kwargs):
    try:
        function(*args, **kwargs)
    except error as caught:
        assert re.search(pattern, str(caught)), str(caught)
    else:
        raise AssertionError(f"No error like {pattern!r}")


def check_refusals(strategy, references):
    size = strategy.num_processes
    raises(
        ValueError,
        "nearest for 7 experts: 1 and 7",
        lambda: build_bank(strategy, GLUExperts(7, 4)),
    )
    layers = LayerExperts(keras.layers.Dense(DIM), EXPERTS)
    model = build_bank(strategy, layers)
    raises(ValueError, "cannot be divided", strategy.distribute, model)
    raises(
        ValueError,
        "bank_regularizer",
        lambda: build_bank(
            strategy, GLUExperts(EXPERTS, 4, bank_regularizer="l2")
        ),
    )
    raises(
        ValueError,
        "must be the number of devices",
        ExpertParallel,
        size + 1,
    )
    raises(
        ValueError,
        "same num_expert_shards",
        ExpertParallel,
        1 if RANK else size,
    )
    model = build_bank(
        strategy, GLUExperts(EXPERTS, 4), dispatcher=OwnDispatcher()
    )
    raises(ValueError, "class `Dispatcher` alone", model, inputs(""))
    # Different numbers of experts.
    number = EXPERTS if RANK else 2 * EXPERTS
    model = build_bank(strategy, GLUExperts(number, 4))
    raises(ValueError, "same model", strategy.distribute, model)
    # Not distributed.
    model = build_bank(strategy, GLUExperts(EXPERTS, 4))
    model.compile("sgd", "mse")
    x = inputs("")
    raises(RuntimeError, "distribute", model.train_on_batch, x, x)
    raises(RuntimeError, "model.save", model.save, FOLDER / "x.keras")
    model = strategy.distribute(model)
    raises(ValueError, "Adafactor", model.compile, "adafactor", "mse")
    loss = keras.losses.MeanSquaredError(reduction="sum")
    raises(ValueError, "sum_over_batch_size", model.compile, "sgd", loss)
    model.compile("sgd", "mse")
    # Data.
    raises(ValueError, "same data", model.fit, x[RANK:], x[RANK:])
    raises(ValueError, "batch_size", strategy.split, x, batch_size=size + 1)
    raises(ValueError, "last batch", strategy.split, x[1:], batch_size=BATCH)
    raises(ValueError, "one file", model.save, FOLDER / "x.h5")
    raises(NotImplementedError, "exported", model.export, FOLDER / "x")


class OwnDispatcher(Dispatcher):
    pass


def build_bank(strategy, experts, **kwargs):
    with strategy.scope():
        x = keras.Input((LENGTH, DIM))
        return keras.Model(x, MoE(experts=experts, **kwargs)(x))


def check_interrupted_save(strategy, references):
    """A save that fails leaves the file of the one before whole."""
    model = strategy.distribute(build_bank(strategy, GLUExperts(EXPERTS, 4)))
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
