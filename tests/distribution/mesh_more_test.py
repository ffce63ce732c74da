"""What could go wrong silently on a mesh of simulated devices (JAX)."""

import functools

import keras
import numpy as np
import pytest
from absl.testing import parameterized
from keras import ops

from keras_moe.distribution import device_bank
from keras_moe.experts import GLUExperts
from keras_moe.experts import LayerExperts
from keras_moe.experts import LowRankExperts
from keras_moe.experts import MLPExperts
from keras_moe.layers import Capacity
from keras_moe.layers import MoE
from keras_moe.losses import LoadBalancingLoss
from keras_moe.routers import TopKRouter
from tests.distribution.mesh_cases import DIM
from tests.distribution.mesh_cases import EXPERTS
from tests.distribution.mesh_cases import LENGTH
from tests.distribution.mesh_cases import WIDTH
from tests.distribution.mesh_cases import data
from tests.distribution.mesh_cases import data_parallel
from tests.distribution.mesh_cases import expert_parallel
from tests.distribution.mesh_cases import model_parallel
from tests.test_case import TestCase

pytestmark = [
    pytest.mark.multi_device,
    pytest.mark.skipif(
        keras.config.backend() != "jax",
        reason="one program for all devices is JAX's way",
    ),
]


def inputs(examples=16):
    return data(examples)[0]


def step(layer, x, transform=lambda function: function):
    """Outputs, losses, gradients and new state of a compiled step."""
    import jax

    before = [v.value for v in layer.non_trainable_variables]

    @transform
    def call(trainable, x):
        return layer.stateless_call(
            trainable, before, x, training=True, return_losses=True
        )

    def loss(trainable, x):
        outputs, state, losses = call(trainable, x)
        factors = np.cos(np.arange(outputs.size)).reshape(outputs.shape)
        total = jax.numpy.sum(outputs * factors) + sum(losses)
        return total, (outputs, losses, state)

    weights = [v.value for v in layer.trainable_variables]
    results, gradients = jax.jit(
        jax.value_and_grad(loss, (0, 1), has_aux=True)
    )(weights, x)
    return [np.asarray(x) for x in jax.tree.leaves((results, gradients))]


@keras.saving.register_keras_serializable("tests")
class NormalizedExperts(MLPExperts):
    """Units that depend on the others of their expert."""

    def join_hidden(self, up):
        return ops.softmax(up)


class MeshMoreTest(TestCase):
    def assert_same_step(self, layer, x, strategy):
        """As on one device; returns what the device computed."""
        wanted = step_once_built(layer, x)
        with strategy.scope():
            found = step(layer, x)
        for value, expected in zip(found, wanted, strict=True):
            self.assert_relative(value, expected, 1e-5)
        return wanted

    def test_dropout_in_rounds(self):
        """A round draws the same numbers in both passes, other than others."""
        bank = GLUExperts(EXPERTS, WIDTH, dropout=0.5, seed=1)
        router = TopKRouter(EXPERTS, 1, kernel_initializer="zeros")
        layer = MoE(router=router, experts=bank, losses=None, statistics=None)
        x = np.ones((64, LENGTH, DIM), "float32")
        layer.build(x.shape)
        before = ops.convert_to_numpy(bank.seed_generator.state)
        with expert_parallel(4, slack=0.0).scope():
            _, outputs, *state, _, _, _, _, _ = found = step(layer, x)
        names = [v.path for v in layer.trainable_variables]
        (place,) = [i for i, n in enumerate(names) if "down_kernel" in n]
        gradient = found[place - len(names) - 1]
        # The outputs are linear in this kernel.
        value = ops.convert_to_numpy(bank.down_kernel)
        factors = np.cos(np.arange(outputs.size)).reshape(outputs.shape)
        self.assertGreater(np.abs(gradient).max(), 0.1)
        self.assertAlmostEqual(
            float(np.sum(gradient * value)), float(np.sum(outputs * factors)), 3
        )
        drawn = {row.tobytes() for row in outputs.reshape(-1, DIM)}
        self.assertGreater(len(drawn), 150)  # of 192 tokens, 4,096 masks
        self.assertNotAllClose(state[0], before)

    def test_state_and_losses_of_experts(self):
        """They are of the whole batch."""
        template = keras.Sequential(
            [
                keras.layers.Dense(DIM, activity_regularizer="l2"),
                keras.layers.BatchNormalization(),
            ]
        )
        layer = MoE(
            router=TopKRouter(EXPERTS, 2),
            experts=LayerExperts(template, EXPERTS),
            losses=None,
        )
        self.assert_same_step(layer, inputs(), data_parallel(4))

    def test_activity_regularizer(self):
        def make(**kwargs):
            return MoE(
                router=TopKRouter(EXPERTS, 2),
                experts=GLUExperts(EXPERTS, WIDTH, **kwargs),
                shared_experts=GLUExperts(1, WIDTH, **kwargs),
            )

        layer = make(activity_regularizer="l2")
        self.assert_same_step(layer, inputs(), data_parallel(4))
        with expert_parallel(2).scope():
            with self.assertRaisesRegex(ValueError, "activity_regularizer"):
                step(layer, inputs())

    def test_experts_with_shared_weights(self):
        bank = LowRankExperts(
            EXPERTS,
            WIDTH,
            rank=2,
            use_bias=True,
            lora_b_initializer="glorot_uniform",
        )
        layer = MoE(router=TopKRouter(EXPERTS, 2), experts=bank)
        with expert_parallel(4).scope():
            layer.build((None, LENGTH, DIM))
        shards = [
            v.value.addressable_shards[0].data.shape[0] * 4 == v.shape[0]
            for v in bank.variables
        ]
        self.assertEqual(shards, ["lora" in v.path for v in bank.variables])
        self.assert_same_step(layer, inputs(), expert_parallel(4))

    def test_path_that_was_a_routed_bank(self):
        def bank(number):
            return GLUExperts(number, WIDTH, name="bank")

        with expert_parallel(2).scope():
            router = TopKRouter(EXPERTS, 1)
            layer = MoE(router=router, experts=bank(EXPERTS), name="a")
            layer.build((None, LENGTH, DIM))
            self.assertFalse(is_whole(layer.experts.up_kernel))
            layer = MoE(EXPERTS, WIDTH, shared_experts=bank(1), name="a")
            layer.build((None, LENGTH, DIM))
            self.assertTrue(is_whole(layer.shared_experts.up_kernel))

    def test_made_on_another_mesh(self):
        with expert_parallel(4).scope():
            layer = MoE(EXPERTS, WIDTH)
            layer.build((None, LENGTH, DIM))
        self.assert_same_step(layer, inputs(), data_parallel(4))

    def test_layouts(self):
        """Whatever a layout divides, the numbers are the same, or an error."""
        layer = MoE(
            router=TopKRouter(EXPERTS, 2),
            experts=GLUExperts(EXPERTS, WIDTH, use_bias=True, name="bank"),
        )
        whole = step_once_built(layer, inputs())
        for axes, layouts in (
            (
                ("m", "b"),
                {
                    ".*bank/.*_kernel": ("m", None, None),
                    ".*bank/.*_bias": ("m", None),
                },
            ),
            (
                ("b", "m"),
                {
                    ".*bank/(gate|up)_kernel": (None, None, "m"),
                    ".*bank/down_kernel": (None, "m", None),
                },
            ),
        ):
            strategy = model_parallel(axes, layouts)
            layout = strategy.get_variable_layout(layer.experts.up_kernel)
            self.assertIn("m", layout.axes)
            with self.subTest(layouts=layouts):
                with strategy.scope():
                    found = step(layer, inputs())
                for value, expected in zip(found, whole, strict=True):
                    self.assert_relative(value, expected, 1e-5)
        strategy = model_parallel(
            ("b", "m"), {".*bank/.*_kernel": ("m", None, None)}
        )
        with strategy.scope():
            with self.assertRaisesRegex(ValueError, "gate_bias'.* whole"):
                step(layer, inputs())

    @parameterized.parameters("relu", "softmax", "join_hidden")
    def test_hidden_units_that_depend_on_each_other(self, kind):
        """Only units that do not are computed where they lie."""
        bank = (NormalizedExperts if kind == "join_hidden" else MLPExperts)(
            *(EXPERTS, WIDTH),
            activation="relu" if kind == "join_hidden" else kind,
            use_bias=False,
            name="bank",
        )
        layer = MoE(router=TopKRouter(EXPERTS, 2), experts=bank)
        whole = step_once_built(layer, inputs())
        layouts = {
            ".*bank/up_kernel": (None, None, "m"),
            ".*bank/down_kernel": (None, "m", None),
        }
        strategy = model_parallel(("b", "m"), layouts)
        divided = device_bank.DeviceBank(bank, strategy).hidden == "m"
        self.assertEqual(divided, kind == "relu")
        with strategy.scope():
            found = step(layer, inputs())
        for value, expected in zip(found, whole, strict=True):
            self.assert_relative(value, expected, 1e-5)

    def test_random_policy_that_does_not_limit(self):
        layer = MoE(
            router=TopKRouter(EXPERTS, 2),
            experts=GLUExperts(EXPERTS, WIDTH),
            capacity=Capacity(1.0, float("inf"), drop_policy="random"),
        )
        inside = keras.Input((LENGTH, DIM))
        model = keras.Model(inside, layer(inside))
        wanted = model.predict(inputs(), verbose=0)
        with expert_parallel(2, 2).scope():
            again = keras.models.clone_model(model)
            again.set_weights(model.get_weights())
            found = again.predict(inputs(), verbose=0)
        self.assert_relative(found, wanted)

    def test_one_choice_and_more_room_than_tokens(self):
        layer = MoE(
            router=TopKRouter(EXPERTS, 1),
            experts=GLUExperts(EXPERTS, WIDTH),
            losses=None,
            capacity=Capacity(size=10**6),
        )
        _, outputs, *rest = self.assert_same_step(
            layer, inputs(), expert_parallel(2, 2)
        )
        number = len(layer.trainable_variables)
        gradients = rest[-number - 1 : -1]
        paths = [v.path for v in layer.trainable_variables]
        self.assertIn("router", paths[0])
        self.assertGreater(np.abs(gradients[0]).max(), 1e-3)

    def test_recomputation(self):
        """Routes the same and counts once."""
        import jax

        layer = MoE(
            router=TopKRouter(EXPERTS, 2, expert_bias=True),
            experts=GLUExperts(EXPERTS, WIDTH),
        )
        x = inputs()
        wanted = step_once_built(layer, x)
        with expert_parallel(2, slack=0.0).scope():
            found = step(layer, x, transform=jax.checkpoint)
        for value, expected in zip(found, wanted, strict=True):
            self.assert_relative(value, expected, 1e-5)

    def test_losses_of_sequences_do_not_depend_on_the_batch(self):
        import jax

        layer = MoE(
            EXPERTS, WIDTH, losses=[LoadBalancingLoss(0.5, per="sequence")]
        )
        call = functools.partial(
            layer.stateless_call, training=True, return_losses=True
        )
        x = inputs()
        layer.build(x.shape)
        with expert_parallel(4).scope():
            state = [
                [v.value for v in layer.trainable_variables],
                [v.value for v in layer.non_trainable_variables],
            ]
            losses = []
            for part in (x, x[:4], x[4:]):
                (loss,) = jax.jit(call)(*state, part)[2]
                losses.append(float(loss))
        self.assertAlmostEqual(losses[0], losses[1] / 4 + losses[2] * 3 / 4, 5)

    def test_model_made_elsewhere(self):
        model = keras.Sequential(
            [keras.Input((LENGTH, DIM)), MoE(EXPERTS, WIDTH)]
        )
        strategy = expert_parallel(2)
        with strategy.scope():
            with self.assertRaisesRegex(ValueError, "made in the scope"):
                strategy.distribute(model)

    def test_processes_are_those_of_keras(self):
        """By their number Keras divides a dataset among them."""
        with expert_parallel(2).scope():
            engine = keras.distribution.distribution()
        of_keras = keras.distribution.ModelParallel.num_processes
        self.assertIs(type(engine).num_processes, of_keras)
        self.assertEqual(engine.num_model_replicas, 2)


def step_once_built(layer, x):
    layer.build(x.shape)
    return step(layer, x)


def is_whole(variable):
    return variable.value.addressable_shards[0].data.shape == variable.shape
