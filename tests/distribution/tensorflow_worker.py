"""One worker of a training with an own loop: prints what came out.

`python -m tests.distribution.tensorflow_worker RANK PORT PORT`, or without
arguments for one process that computes the whole batch.
"""

import json
import os
import sys

RANK, *PORTS = [int(argument) for argument in sys.argv[1:]] or [0, 0]
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
import tensorflow as tf  # noqa: E402

from keras_moe import routers  # noqa: E402
from keras_moe.dispatch import Dispatcher  # noqa: E402
from keras_moe.distribution.replica_engine import ReplicaEngine  # noqa: E402
from keras_moe.layers import MoE  # noqa: E402

# Workers must connect before anything runs.
engine = ReplicaEngine(WORKERS)


class EngineDispatcher(Dispatcher):
    def __call__(self, *args, **kwargs):
        return engine.dispatch(Dispatcher(), *args, **kwargs)


keras.utils.set_random_seed(0)
with engine.scope():
    inputs = keras.Input((5,))
    layer = MoE(
        router=routers.TopKRouter(4, 2, expert_bias=True),
        intermediate_dim=6,
        dispatcher=EngineDispatcher(),
    )
    model = keras.Model(inputs, keras.layers.Dense(1)(layer(inputs)))
    optimizer = keras.optimizers.Adam(0.02)
    optimizer.build(model.trainable_variables)


def step(x):
    with tf.GradientTape() as tape:
        error = model(x, training=True) - x[:, :1]
        loss = tf.reduce_mean(error**2) + sum(model.losses)
        loss = loss / engine.num_replicas
    variables = model.trainable_variables
    gradients = tape.gradient(loss, [v.value for v in variables])
    optimizer.apply(gradients, variables)
    return loss


run = tf.function(lambda x: engine.strategy.run(step, (x,)))
data = np.random.default_rng(0).normal(size=(20, 8, 5)).astype("float32")
for batch in data:
    loss = run(tf.constant(np.split(batch, WORKERS)[RANK]))
variables = (*model.variables, *optimizer.variables)
# The counts of a replica are its own.
own = {id(v) for v in layer.statistics.variables}
print(
    json.dumps(
        {
            "loss": float(engine.strategy.reduce("SUM", loss, axis=None)),
            "values": [
                np.array(v.numpy(), "float64").ravel().tolist()
                for v in variables
                if id(v) not in own
            ],
        }
    )
)
