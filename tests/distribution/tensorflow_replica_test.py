"""TensorFlow's MirroredStrategy: training equals that of one device.

Two logical CPU devices (see conftest.py).
"""

import os

import keras
import numpy as np
import pytest
from absl.testing import parameterized
from keras import ops

from keras_moe import losses
from keras_moe import routers
from keras_moe.dispatch import Dispatcher
from keras_moe.distribution import ExpertParallel
from keras_moe.distribution.replica_engine import ReplicaEngine
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
EXPERTS, LENGTH, DIM = 4, 3, 5
BIAS = {"expert_bias": True, "bias_update_rate": 0.02}
CASES = {
    "sign": {
        "router": {**BIAS, "score_activation": "sigmoid"},
        "losses": "default",
    },
    "quantile": {
        "router": {**BIAS, "bias_update": "quantile", "bias_update_steps": 2},
        "capacity_factor": 0.6,
        "drop_policy": "priority",
    },
    "losses": {
        "losses": [
            losses.ImportanceLoss(),
            losses.MutualInformationLoss(),
            losses.DeviceBalanceLoss(2),
            losses.LoadBalancingLoss(per="sequence"),
        ],
    },
}


def build(case, **optimizer):
    keras.utils.set_random_seed(4)
    arguments = dict(CASES[case])
    router = routers.TopKRouter(EXPERTS, 2, **arguments.pop("router", {}))
    inputs = keras.Input((LENGTH, DIM))
    masks = keras.Input((LENGTH,))  # Keras averages a batch: no bools
    layer = MoE(
        router=router,
        intermediate_dim=6,
        name="moe",
        shared_experts=GLUExperts(1, 4),
        **arguments,
    )
    h = layer(inputs, mask=ops.greater(masks, 0))
    outputs = keras.layers.Dense(1)(1.0 * h)
    model = keras.Model([inputs, masks], outputs)
    model.compile(keras.optimizers.Adam(0.02, **optimizer), "mse")
    return model


def data(examples):
    rng = np.random.default_rng(5)
    x = rng.normal(size=(examples, LENGTH, DIM)).astype("float32")
    # Unevenly masked, which only the layer knows: Keras would divide the loss
    # of each replica by the number of its own unmasked positions.
    mask = rng.random((examples, LENGTH)) < 0.7
    mask[::8] = mask[16:20] = False
    return [x, mask.astype("float32")], x[..., :1]


def fit(model, steps, epochs, first=0, validates=False):
    """The logs of epochs of some steps."""
    x, y = data(8 * steps)
    return model.fit(
        *(x, y),
        batch_size=8,
        initial_epoch=first,
        epochs=epochs,
        shuffle=False,
        verbose=0,
        validation_data=data(8) if validates else None,
    ).history


def state(model):
    return [
        np.array(ops.convert_to_numpy(v))
        for v in (*model.variables, *model.optimizer.variables)
    ]


class FitTest(TestCase):
    def assert_same(self, one, other):
        """States, or logs, to 1e-5 of the largest entry of each."""
        self.assertEqual(len(one), len(other))
        names = one if isinstance(one, dict) else range(len(one))
        for name in names:
            scale = max(np.abs(other[name]).max(), 1e-9)
            np.testing.assert_allclose(
                one[name], other[name], rtol=0, atol=1e-5 * scale
            )

    def test_as_one_device(self):
        optimizer = {"global_clipnorm": 0.1, "gradient_accumulation_steps": 2}
        alone = build("sign", **optimizer)
        wanted = fit(alone, 10, 2, validates=True)
        strategy = ExpertParallel(2, strategy=two_replicas())
        with strategy.scope():
            model = strategy.distribute(build("sign", **optimizer))
        logs = fit(model, 10, 2, validates=True)
        self.assert_same(logs, wanted)
        self.assert_same(state(model), state(alone))
        file = os.path.join(self.get_temp_dir(), "model.keras")
        model.save(file)
        loaded = keras.saving.load_model(file)
        self.assert_same(state(loaded), state(alone))
        # Evaluation moves nothing.
        before = state(model)
        model.evaluate(*data(8), batch_size=8, verbose=0)
        counters = {id(v) for v in model.get_layer("moe").statistics.variables}
        for variable, value in zip(model.variables, before, strict=False):
            if id(variable) not in counters:
                self.assertAllEqual(variable.numpy(), value)

    @parameterized.parameters(
        ("losses", 1, {"clipvalue": 0.02, "weight_decay": 0.1}),
        ("quantile", 2, {"gradient_accumulation_steps": 2, "clipnorm": 0.1}),
    )
    def test_goes_on_from_the_file_of_one_device(self, case, shards, optimizer):
        file = os.path.join(self.get_temp_dir(), "model.keras")
        alone = build(case, **optimizer)
        fit(alone, 3, 1)
        alone.save(file)
        wanted = fit(alone, 3, 2, first=1)
        strategy = ExpertParallel(shards, strategy=two_replicas())
        model = strategy.load_model(file)
        if case == "quantile":
            self.assertGreater(wanted["routing_dropped_fraction"][0], 0.0)
            self.assert_same(fit(model, 3, 2, first=1), wanted)
        else:
            (x, mask), y = data(24)
            step = strategy.train_step(model)
            for i in (0, 8, 16):
                batch = slice(i, i + 8)
                logs = step([x[batch], mask[batch]], y[batch])
            self.assert_same({name: [logs[name]] for name in logs}, wanted)
            with self.assertRaisesRegex(ValueError, r"2 replicas, .*\[\(3, 3"):
                step([x[:3], mask[:3]], y[:3])
        self.assert_same(state(model), state(alone))


class NotingExperts(GLUExperts):
    """Notes the rows of each expert of the last call."""

    def mix(self, tokens, row_weights, choices, group_sizes, training=None):
        self.noted = group_sizes
        return super().mix(tokens, row_weights, choices, group_sizes, training)


class DispatchTest(TestCase):
    def run_each(self, engine, router, experts, parts, wrap=lambda f: f):
        """Outputs, gradients of the tokens, and rows of each replica."""
        import tensorflow as tf

        def mixed(x):
            mask = ops.any(x != 0, axis=-1)
            return engine.dispatch(
                Dispatcher(), x, router(x), experts, mask, router=router
            )

        def run(x):
            with tf.GradientTape() as tape:
                tape.watch(x)
                outputs, sizes = wrap(mixed)(x)
                total = tf.reduce_sum(outputs**2)
            gradient, *kernels = tape.gradient(
                total, [x, *(v.value for v in experts.trainable_variables)]
            )
            return outputs, gradient, sizes, experts.noted, kernels

        strategy = engine.strategy
        each = strategy.experimental_distribute_values_from_function(
            lambda context: tf.constant(parts[context.replica_id_in_sync_group])
        )
        results = tf.function(lambda x: strategy.run(run, (x,)))(each)
        local = [
            strategy.experimental_local_results(x)
            for x in tf.nest.flatten(results)
        ]
        return [
            tf.nest.pack_sequence_as(results, [np.array(x[i]) for x in local])
            for i in range(2)
        ]

    def test_each_replica_computes_its_experts(self):
        # The second replica has one token, which is masked.
        x = np.random.default_rng(0).normal(size=(9, DIM)).astype("float32")
        x[1] = x[8] = 0.0
        alone, both = (ReplicaEngine(n, two_replicas()) for n in (1, 2))
        with both.scope():
            router = routers.TopKRouter(EXPERTS, 2)
            experts = NotingExperts(EXPERTS, 6)
            router.build((None, DIM))
            experts.build((None, DIM))
        parts = x[:8], x[8:]
        wanted = self.run_each(alone, router, experts, parts)
        results = self.run_each(both, router, experts, parts)
        again = self.run_each(both, router, experts, parts, keras.remat)
        for one, other in zip(results, again, strict=True):
            for i in range(3):
                self.assertAllClose(one[i], other[i], atol=1e-6)
            for kernel, recomputed in zip(one[4], other[4], strict=True):
                self.assertAllClose(kernel, recomputed, atol=1e-6)
        rows = wanted[0][2] + wanted[1][2]
        self.assertEqual(rows.sum(), 14)
        for i, (result, other) in enumerate(zip(results, wanted, strict=True)):
            # Outputs, gradients and rows are those of the replica's tokens.
            for one, expected in zip(result[:3], other[:3], strict=True):
                self.assertAllClose(one, expected, atol=1e-5)
            own = np.arange(EXPERTS) // 2 == i
            self.assertAllEqual(result[3], np.where(own, rows, 0))
        for k, kernel in enumerate(wanted[0][4]):
            self.assertAllClose(
                results[0][4][k] + results[1][4][k],
                kernel + wanted[1][4][k],
                atol=1e-5,
            )


class ErrorsTest(TestCase):
    def test_divisions(self):
        strategy = two_replicas()
        with self.assertRaisesRegex(ValueError, "num_expert_shards=3, 2 repl"):
            ReplicaEngine(3, strategy)
        with self.assertRaisesRegex(ValueError, "for 2 devices"):
            ExpertParallel(2, 2, strategy=strategy)
        expert_parallel = ExpertParallel(2, strategy=strategy)
        with self.assertRaisesRegex(
            ValueError, r"5 experts: 1 and 5\. .*shards=2"
        ):
            with expert_parallel.scope():
                layer = MoE(5, intermediate_dim=4)
                inputs = keras.Input((3,))
                model = keras.Model(inputs, layer(inputs))
            model.predict(np.ones((4, 3)), verbose=0)

    def test_models(self):
        engine = ReplicaEngine(2, two_replicas())

        def model(**kwargs):
            model = keras.Sequential([keras.Input((2,)), keras.layers.Dense(1)])
            model.compile(loss="mse", **kwargs)
            return model

        with self.assertRaisesRegex(ValueError, "inside `scope"):
            engine.distribute(model())
        with engine.scope():
            with self.assertRaisesRegex(ValueError, "must be compiled"):
                engine.train_step(keras.Sequential([keras.Input((2,))]))
            for name in ("run_eagerly", "jit_compile"):
                with self.assertRaisesRegex(ValueError, f"{name}=True"):
                    engine.distribute(model(**{name: True}))
            schedule = keras.optimizers.schedules.CosineDecay(0.1, 10)
            adam = keras.optimizers.Adam(
                schedule, gradient_accumulation_steps=2
            )
            with self.assertRaisesRegex(ValueError, "rate schedule"):
                engine.distribute(model(optimizer=adam))

    def test_eager_replicas(self):
        layer = MoE(2, intermediate_dim=4)
        with self.assertRaisesRegex(NotImplementedError, "run_eagerly=False"):
            two_replicas().run(lambda: layer(ops.ones((2, 3)), training=True))
