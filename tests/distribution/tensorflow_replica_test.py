"""TensorFlow's MirroredStrategy: training equals that of one device.

Two logical CPU devices (see conftest.py), ten steps of `fit`.
"""

import contextlib

import keras
import numpy as np
import pytest
from absl.testing import parameterized
from keras import ops

from keras_moe import losses
from keras_moe import routers
from keras_moe.dispatch import Dispatcher
from keras_moe.experts import GLUExperts
from keras_moe.layers import MoE
from tests.replicas import two_replicas
from tests.test_case import TestCase

pytestmark = [
    pytest.mark.multi_device,
    pytest.mark.skipif(
        keras.config.backend() != "tensorflow",
        reason="tf.distribute is TensorFlow's",
    ),
    # TensorFlow says that two devices on one machine do not need NCCL.
    pytest.mark.filterwarnings("ignore:.*NCCL"),
]
EXPERTS, EXAMPLES, LENGTH, DIM = 4, 80, 3, 5
BIAS = {"expert_bias": True, "bias_update_rate": 0.02}
CASES = {
    "defaults": {},
    "bias": {"router": {**BIAS, "score_activation": "sigmoid"}},
    "quantile": {"router": {**BIAS, "bias_update": "quantile"}},
    "losses": {
        "losses": [
            losses.ImportanceLoss(),
            losses.MutualInformationLoss(),
            losses.DeviceBalanceLoss(2),
            losses.LoadBalancingLoss(per="sequence"),
        ],
    },
}


def engine(shards=2):
    from keras_moe.distribution.replica_engine import ReplicaEngine

    return ReplicaEngine(shards, strategy=two_replicas())


class EngineDispatcher(Dispatcher):
    """Asks an engine, if there is one."""

    engine = None

    def __call__(self, *args, **kwargs):
        dispatcher = Dispatcher(self.capacity, self.weights_on)
        if self.engine is None:
            return dispatcher(*args, **kwargs)
        return self.engine.dispatch(dispatcher, *args, **kwargs)


def train(case, engine=None, optimizer=None, **kwargs):
    """The weights, the optimizer's and the logs."""
    keras.utils.set_random_seed(4)
    rng = np.random.default_rng(5)
    x = rng.normal(size=(EXAMPLES, LENGTH, DIM)).astype("float32")
    # Unevenly masked, which only the layer knows: Keras would divide the loss
    # of each replica by the number of its own unmasked positions.
    mask = rng.random((EXAMPLES, LENGTH)) < 0.7
    mask[::8] = mask[16:20] = False
    mask = mask.astype("float32")
    arguments = {**CASES[case], **kwargs}
    router = routers.TopKRouter(EXPERTS, 2, **arguments.pop("router", {}))
    dispatcher = EngineDispatcher()
    dispatcher.engine = engine
    scope = engine.scope() if engine else contextlib.nullcontext()
    with scope:
        inputs = keras.Input((LENGTH, DIM))
        masks = keras.Input((LENGTH,))  # Keras averages a batch: no bools
        layer = MoE(
            router=router,
            intermediate_dim=6,
            dispatcher=dispatcher,
            name="moe",
            shared_experts=GLUExperts(1, 4),
            **arguments,
        )
        h = layer(inputs, mask=ops.greater(masks, 0))
        outputs = keras.layers.Dense(1)(1.0 * h)
        model = keras.Model([inputs, masks], outputs)
        model.compile(keras.optimizers.Adam(0.02, **(optimizer or {})), "mse")
        if engine is not None:
            model = engine.distribute(model)
    history = model.fit(
        *([x, mask], x[..., :1]),
        batch_size=8,
        epochs=2,
        shuffle=False,
        verbose=0,
        validation_data=([x[:8], mask[:8]], x[:8, :, :1]),
    ).history
    return (
        [np.array(ops.convert_to_numpy(v)) for v in model.weights],
        [np.array(ops.convert_to_numpy(v)) for v in model.optimizer.variables],
        history,
    )


class ReplicasTest(TestCase):
    def check(self, *args, shards=(1, 2), **kwargs):
        alone = train(*args, **kwargs)
        for number in shards:
            weights, state, logs = train(*args, engine(number), **kwargs)
            for one, other in zip(weights, alone[0], strict=True):
                self.assertAllClose(one, other, atol=1e-5)
            for one, other in zip(state, alone[1], strict=True):
                self.assertAllClose(one, other, atol=1e-5)
            self.assertEqual(set(logs), set(alone[2]))
            for name, values in logs.items():
                self.assertAllClose(values, alone[2][name], atol=1e-5)

    @parameterized.parameters(*CASES)
    def test_as_one_device(self, case):
        self.check(case)
