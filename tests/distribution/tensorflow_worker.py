"""One worker of a training: prints what came out.

`python -m tests.distribution.tensorflow_worker FILE RANK PORT PORT`, or with
FILE alone for `fit` in one process that computes the whole batch. FILE is where
the model is saved.
"""

import json
import os
import sys

RANK, *PORTS = [int(argument) for argument in sys.argv[2:]] or [0, 0]
WORKERS = len(PORTS)
if WORKERS > 1:
    os.environ["TF_CONFIG"] = json.dumps(
        {
            "cluster": {"worker": [f"localhost:{port}" for port in PORTS]},
            "task": {"type": "worker", "index": RANK},
        }
    )
os.environ["KERAS_BACKEND"] = "tensorflow"

import keras  # noqa: E402
import numpy as np  # noqa: E402

from keras_moe import routers  # noqa: E402
from keras_moe.distribution import ExpertParallel  # noqa: E402
from keras_moe.experts import GLUExperts  # noqa: E402
from keras_moe.layers import MoE  # noqa: E402

# Workers must connect before anything runs.
strategy = ExpertParallel()
assert (strategy.num_processes, strategy.process_index) == (WORKERS, RANK)
keras.utils.set_random_seed(0)
with strategy.scope():
    inputs = keras.Input((5,))
    layer = MoE(
        router=routers.TopKRouter(4, 2, expert_bias=True),
        intermediate_dim=6,
        shared_experts=GLUExperts(1, 4),
        capacity_factor=0.8,
        drop_policy="weight",
    )
    model = keras.Model(inputs, keras.layers.Dense(1)(layer(inputs)))
    model.compile(
        keras.optimizers.Adam(
            0.02, global_clipnorm=0.1, gradient_accumulation_steps=2
        ),
        "mse",
        metrics=["mae"],
    )
x = np.random.default_rng(0).normal(size=(160, 5)).astype("float32")
x, y = strategy.split(x, x[:, :1], batch_size=8)
if WORKERS == 1:
    history = model.fit(x, y, batch_size=8, shuffle=False, verbose=0).history
    logs = {name: values[0] for name, values in history.items()}
else:
    size = 8 // WORKERS
    step = strategy.train_step(model)
    for start in range(0, len(x), size):
        logs = step(x[start : start + size], y[start : start + size])
model.save(sys.argv[1])
print(json.dumps(logs))
