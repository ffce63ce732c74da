"""Models and devices of the tests on a mesh of simulated devices (JAX)."""

import keras
import numpy as np
from keras import ops

from keras_moe.distribution import ExpertParallel
from keras_moe.experts import GLUExperts
from keras_moe.layers import MoE
from keras_moe.losses import LoadBalancingLoss
from keras_moe.losses import RouterZLoss
from keras_moe.routers import TopKRouter

EXPERTS, LENGTH, DIM, WIDTH = 8, 3, 8, 12
BATCH, STEPS = 16, 20


def devices(number):
    return keras.distribution.list_devices("cpu")[:number]


def expert_parallel(expert, data=1, **kwargs):
    number = expert * data * kwargs.get("num_model_shards", 1)
    return ExpertParallel(expert, data, devices=devices(number), **kwargs)


def data_parallel(number):
    return keras.distribution.DataParallel(devices=devices(number))


def model_parallel(axes, layouts):
    """A layout of the user's own, with the batch on the axis "b"."""
    mesh = keras.distribution.DeviceMesh((2, 2), axes, devices(4))
    layout_map = keras.distribution.LayoutMap(mesh)
    for path, layout in layouts.items():
        layout_map[path] = layout
    return keras.distribution.ModelParallel(
        layout_map=layout_map, batch_dim_name="b"
    )


def data(examples=BATCH):
    rng = np.random.default_rng(3)
    x = rng.normal(size=(examples, LENGTH, DIM)).astype("float32")
    y = rng.normal(size=(examples, LENGTH, DIM)).astype("float32")
    mask = rng.random((examples, LENGTH)) < 0.8
    # Whole devices may have no token.
    mask[:5] = False
    return x, mask, y


def everything():
    """The options that could go wrong together."""
    return MoE(
        router=TopKRouter(EXPERTS, 2, expert_bias=True, bias_update_rate=0.004),
        experts=GLUExperts(EXPERTS, WIDTH, use_bias=True),
        shared_experts=GLUExperts(2, WIDTH, name="shared"),
        losses=[LoadBalancingLoss(0.5), RouterZLoss(0.1)],
    )


def make_model(make_layer, optimizer=None):
    keras.utils.set_random_seed(0)
    x = keras.Input((LENGTH, DIM))
    mask = keras.Input((LENGTH,), dtype="bool")
    hidden = keras.layers.Dense(DIM)(x)
    hidden = hidden + make_layer()(hidden, mask=mask)
    model = keras.Model((x, mask), keras.layers.Dense(DIM)(hidden))
    optimizer = optimizer or keras.optimizers.Adam(
        0.01, global_clipnorm=0.5, gradient_accumulation_steps=2
    )
    model.compile(optimizer, "mse")
    return model


def fit(model, examples=BATCH * 2, batch=BATCH, epochs=STEPS // 2):
    x, mask, y = data(examples)
    history = model.fit(
        (x, mask), y, batch, epochs, verbose=0, shuffle=False
    ).history
    return {name: values[-1] for name, values in history.items()}


def trained(strategy, make_layer=everything, **kwargs):
    """`(model, logs)`."""
    if strategy is None:
        model = make_model(make_layer)
        return model, fit(model, **kwargs)
    with strategy.scope():
        model = make_model(make_layer)
        if isinstance(strategy, ExpertParallel):
            model = strategy.distribute(model)
        return model, fit(model, **kwargs)


def moe_of(model):
    return next(layer for layer in model.layers if isinstance(layer, MoE))


def numbers(model):
    """`(path, values)` of all variables but seeds, in their order."""
    return [
        (v.path, ops.convert_to_numpy(v))
        for v in (*model.variables, *model.optimizer.variables)
        if "seed" not in v.path
    ]
