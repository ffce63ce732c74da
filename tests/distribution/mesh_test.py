"""Experts and batch over simulated devices that one program drives (JAX)."""

import math
import os
import re
import tempfile

import keras
import numpy as np
import pytest
from absl.testing import parameterized
from keras import ops

from keras_moe.distribution import ExpertParallel
from keras_moe.experts import GLUExperts
from keras_moe.experts import LayerExperts
from keras_moe.experts import MLPExperts
from keras_moe.layers import MoE
from keras_moe.layers import SoftMoE
from keras_moe.routers import ExpertChoiceRouter
from keras_moe.routers import TopKRouter
from tests.distribution.mesh_cases import BATCH
from tests.distribution.mesh_cases import DIM
from tests.distribution.mesh_cases import EXPERTS
from tests.distribution.mesh_cases import LENGTH
from tests.distribution.mesh_cases import STEPS
from tests.distribution.mesh_cases import WIDTH
from tests.distribution.mesh_cases import data
from tests.distribution.mesh_cases import data_parallel
from tests.distribution.mesh_cases import devices
from tests.distribution.mesh_cases import everything
from tests.distribution.mesh_cases import expert_parallel
from tests.distribution.mesh_cases import fit
from tests.distribution.mesh_cases import make_model
from tests.distribution.mesh_cases import model_parallel
from tests.distribution.mesh_cases import moe_of
from tests.distribution.mesh_cases import numbers
from tests.distribution.mesh_cases import trained
from tests.test_case import TestCase

pytestmark = [
    pytest.mark.multi_device,
    pytest.mark.skipif(
        keras.config.backend() != "jax",
        reason="one program for all devices is JAX's way",
    ),
]
# A layout of the user's own, of experts and of a dense layer.
LAYOUTS = {
    ".*glu_experts.*_kernel": ("m", None, None),
    ".*glu_experts.*_bias": ("m", None),
    "dense.*/kernel": (None, "m"),
}


class MeshTest(TestCase):
    def assert_same(self, model, other):
        """To 1e-5 of the largest entry, also of tiny moments of Adam."""
        pairs = zip(numbers(model), numbers(other), strict=True)
        for (path, value), (_, expected) in pairs:
            with self.subTest(path):
                tolerance = 1e-5 * max(np.abs(expected).max(), 1e-9)
                np.testing.assert_allclose(
                    value, expected, rtol=0, atol=tolerance
                )

    @classmethod
    def setUpClass(cls):
        super().setUpClass()
        cls.alone = None

    def single(self):
        if type(self).alone is None:
            type(self).alone = trained(None)
        return type(self).alone

    def test_twenty_steps(self):
        model, logs = self.single()
        bias = ops.convert_to_numpy(moe_of(model).router.expert_bias)
        self.assertGreater(np.abs(bias).max(), 0.01)
        for strategy in (
            expert_parallel(2, 4),
            expert_parallel(4, slack=0.0),
            expert_parallel(2, 1, num_model_shards=2),
            data_parallel(2),
            model_parallel(("b", "m"), LAYOUTS),
        ):
            with self.subTest(strategy=strategy):
                other, other_logs = trained(strategy)
                self.assert_same(other, model)
                self.assertEqual(set(other_logs), set(logs))
                for name, value in logs.items():
                    self.assertAlmostEqual(other_logs[name], value, 5)

    def test_memory(self):
        strategy = expert_parallel(4, slack=0.0)
        with strategy.scope():
            model = make_model(everything)
            model.optimizer.build(model.trainable_variables)
        found = 0
        for v in (*model.variables, *model.optimizer.variables):
            whole = v.value.addressable_shards[0].data.size == v.value.size
            routed = "glu_experts" in v.path
            self.assertEqual(whole, not routed, v.path)
            if routed:
                shard = v.value.addressable_shards[0].data.shape
                self.assertEqual(shard, (EXPERTS // 4, *v.shape[1:]))
                found += 1
        self.assertEqual(found, 6 * 4)  # Adam's moments, accumulated gradients

    def test_saved_on_other_numbers_of_devices(self):
        """The optimizer goes on too."""
        model, _ = self.single()
        path = os.path.join(tempfile.mkdtemp(), "model.keras")
        with expert_parallel(4).scope():
            other = make_model(everything)
            fit(other, epochs=STEPS // 4)
            other.save(path)
        with expert_parallel(2).scope():
            again = keras.saving.load_model(path)
            bank = moe_of(again).experts.gate_kernel
            shard = bank.value.addressable_shards[0].data.shape
            self.assertEqual(shard, (EXPERTS // 2, DIM, WIDTH))
            fit(again, epochs=STEPS // 4)
        self.assert_same(again, model)
        again.save(path)
        self.assert_same(keras.saving.load_model(path), model)

    def test_all_tokens_to_one_expert(self):
        """One owner gets more rows than a round has room for, others none."""
        layer = MoE(
            router=TopKRouter(EXPERTS, 1, expert_bias=True),
            experts=GLUExperts(EXPERTS, WIDTH),
            losses=None,
            statistics=None,
        )
        with expert_parallel(4, slack=0.0).scope():
            layer.build((None, LENGTH, DIM))
            layer.router.expert_bias.assign([0, 0, 0, 9, 0, 0, 0, 0])
        x = data()[0]
        dy = np.random.default_rng(1).normal(size=x.shape).astype("float32")
        wanted = self.outputs_and_gradients(layer, x, dy)
        with expert_parallel(4, slack=0.0).scope():
            found = self.outputs_and_gradients(layer, x, dy)
        self.assert_relative(found[0], wanted[0])
        self.assert_relative(found[1], wanted[1])
        for name, gradient in wanted[2].items():
            self.assert_relative(found[2][name], gradient)

    def test_traffic(self):
        """Rows travel; neither weights nor activations are gathered."""
        import jax

        owners, examples, dim, top_k = 4, 1024, 32, 2
        with expert_parallel(owners).scope():
            layer = MoE(EXPERTS, WIDTH, top_k=top_k)
            layer.build((None, LENGTH, dim))
            shape = (examples, LENGTH, dim)
            layout = keras.distribution.distribution().get_data_layout(shape)
            x = jax.ShapeDtypeStruct(
                shape, "float32", sharding=layout.backend_layout
            )

            def loss(trainable, x):
                state = [v.value for v in layer.non_trainable_variables]
                outputs, *_ = layer.stateless_call(
                    trainable, state, x, training=True
                )
                return jax.numpy.sum(outputs**2)

            step = jax.jit(jax.grad(loss, (0, 1)))
            weights = [v.value for v in layer.trainable_variables]
            text = step.lower(weights, x).compile().as_text()
        tokens = examples * LENGTH
        gathered = result_sizes(text, "all-gather")
        self.assertEqual(gathered, [])
        sent = result_sizes(text, "all-to-all")
        # The smaller ones are for rows that had no room.
        first = [size for size in sent if size == max(sent)]
        self.assertLen(first, 4)  # there and back, and their gradients
        even = tokens * top_k // owners * dim
        self.assertLessEqual(max(sent), 1.1 * even)

    def test_work(self):
        """Each device computes the rows of its own experts, and no others."""
        import jax

        counted = []

        @keras.saving.register_keras_serializable("tests")
        class Counting(GLUExperts):
            def call(self, rows, group_sizes, training=None):
                jax.debug.callback(
                    lambda sizes: counted.append(sizes.tolist()), group_sizes
                )
                return super().call(rows, group_sizes, training)

        x = data(32)[0]
        layer = None
        with expert_parallel(4, slack=9.0).scope():
            layer = MoE(router=TopKRouter(EXPERTS, 2), experts=Counting(8, 4))
            layer(x)
            jax.effects_barrier()
        self.assertLen(counted, 4)
        chosen = ops.convert_to_numpy(layer.route(x).expert_indices)
        wanted = np.bincount(chosen.ravel(), minlength=EXPERTS).tolist()
        found = sorted(counted)
        self.assertEqual(
            found, sorted(wanted[i : i + 2] for i in range(0, EXPERTS, 2))
        )

    @parameterized.named_parameters(
        ("capacity", lambda: MoE(EXPERTS, WIDTH, capacity_factor=0.7)),
        (
            "expert_choice",
            lambda: MoE(
                router=ExpertChoiceRouter(EXPERTS, 1.5),
                experts=GLUExperts(EXPERTS, WIDTH),
            ),
        ),
        (
            "weights_on_inputs",
            lambda: MoE(EXPERTS, WIDTH, weights_on="input", use_bias=True),
        ),
    )
    def test_step(self, make_layer):
        wanted, logs = trained(None, make_layer, examples=BATCH, epochs=1)
        other, other_logs = trained(
            expert_parallel(2, 2), make_layer, examples=BATCH, epochs=1
        )
        self.assert_same(other, wanted)
        self.assertAllClose(list(other_logs.values()), list(logs.values()))

    def test_tokens_that_do_not_divide(self):
        layer = MoE(EXPERTS, WIDTH)
        x = data(5)[0]
        layer.build(x.shape)
        wanted = ops.convert_to_numpy(layer(x))
        with data_parallel(4).scope():
            self.assert_relative(layer(x), wanted)

    @parameterized.parameters((1, 2, GLUExperts), (2, 4, MLPExperts))
    def test_hidden_width(self, owners, parts, kind):
        """Devices add up what they make of parts of an expert."""
        layer = MoE(
            router=TopKRouter(EXPERTS, 2),
            experts=kind(
                EXPERTS, WIDTH, use_bias=True, bias_initializer="ones"
            ),
            losses=None,
        )
        strategy = expert_parallel(owners, num_model_shards=parts)
        x, dy = data(5)[::2]
        with strategy.scope():
            layer.build(x.shape)
            shape = layer.experts.down_kernel.value.addressable_shards[0].data
        self.assertEqual(shape.shape, (EXPERTS // owners, WIDTH // parts, DIM))
        wanted = self.outputs_and_gradients(layer, x, dy)
        with strategy.scope():
            found = self.outputs_and_gradients(layer, x, dy)
        self.assert_relative(found[0], wanted[0])
        self.assert_relative(found[1], wanted[1])
        for name, gradient in wanted[2].items():
            self.assert_relative(found[2][name], gradient)

    def test_soft_moe(self):
        """Slots are of an example, so each device has whole ones."""
        layer = SoftMoE(4, WIDTH, slots_per_expert=2)
        x, dy = data(5)[::2]
        layer.build(x.shape)
        wanted = self.outputs_and_gradients(layer, x, dy)
        with data_parallel(4).scope():
            found = self.outputs_and_gradients(layer, x, dy)
        self.assert_relative(found[0], wanted[0])
        self.assert_relative(found[1], wanted[1])
        for name, gradient in wanted[2].items():
            self.assert_relative(found[2][name], gradient)

    def test_one_device(self):
        """Nothing is exchanged, and the fused kernel computes."""
        layer = MoE(EXPERTS, WIDTH)
        with expert_parallel(1).scope():
            layer.build((None, LENGTH, DIM))
            text = str(jax_program(layer, data()[0]))
        self.assertNotIn("shard_map", text)
        with expert_parallel(1, 2).scope():
            text = str(jax_program(layer, data()[0]))
        self.assertIn("shard_map", text)
        self.assertNotIn("all_to_all", text)

    def test_dropout_differs_between_devices(self):
        with expert_parallel(4).scope():
            bank = GLUExperts(EXPERTS, 64, dropout=0.5, seed=1)
            router = TopKRouter(EXPERTS, 1, kernel_initializer="zeros")
            layer = MoE(router=router, experts=bank, losses=None)
            x = np.ones((4, 1, DIM), "float32")  # one token for each device
            first = ops.convert_to_numpy(layer(x, training=True))
            second = ops.convert_to_numpy(layer(x, training=True))
        # All go to one owner, which draws for each row; and anew in each call.
        self.assertEqual(len({row.tobytes() for row in first}), 4)
        self.assertNotAllClose(first, second)

    def test_half_precision(self):
        keras.config.set_dtype_policy("mixed_bfloat16")
        try:
            wanted = trained(None, epochs=1)[1]
            found = trained(expert_parallel(4), epochs=1)[1]
        finally:
            keras.config.set_dtype_policy("float32")
        self.assertAllClose(found["loss"], wanted["loss"], rtol=2e-2)

    def test_evaluation_moves_no_state(self):
        with expert_parallel(4).scope():
            model = make_model(everything)
            before = [ops.convert_to_numpy(v) for v in model.variables]
            x, mask, y = data()
            model.evaluate((x, mask), y, BATCH, verbose=0)
            model.predict((x, mask), BATCH, verbose=0)
        for v, value in zip(model.variables, before, strict=True):
            self.assertAllEqual(ops.convert_to_numpy(v), value)

    def test_refused(self):
        with self.assertRaisesRegex(
            ValueError, r"8 experts: 2 and 4\. .*num_expert_shards=3"
        ):
            with expert_parallel(3).scope():
                MoE(EXPERTS, WIDTH).build((None, LENGTH, DIM))
        with self.assertRaisesRegex(ValueError, r"batch of 6 .*\[4, 8\]"):
            with expert_parallel(4).scope():
                fit(make_model(everything), examples=12, batch=6)
        with self.assertRaisesRegex(ValueError, "not divided .*LayerExperts"):
            with expert_parallel(4).scope():
                experts = [keras.layers.Dense(DIM) for _ in range(EXPERTS)]
                layer = MoE(
                    router=TopKRouter(EXPERTS, 2), experts=LayerExperts(experts)
                )
                layer(data()[0])
        with self.assertRaisesRegex(ValueError, "num_model_shards=5 for"):
            with expert_parallel(1, num_model_shards=5).scope():
                MoE(EXPERTS, WIDTH).build((None, LENGTH, DIM))
        with self.assertRaisesRegex(ValueError, "acts on each unit alone"):
            with expert_parallel(1, num_model_shards=2).scope():
                MoE(EXPERTS, WIDTH, activation="softmax")(data()[0])
        with self.assertRaisesRegex(ValueError, "num_model_shards=3, 4 dev"):
            ExpertParallel(num_model_shards=3, devices=devices(4))
        with self.assertRaisesRegex(ValueError, "takes the options .*timeout"):
            ExpertParallel(timeout=3.0)
        for arguments in ((3, 2), (0, 1), (True, 1), (None, 3)):
            with self.assertRaisesRegex(ValueError, "num_(expert|data)_shards"):
                ExpertParallel(*arguments, devices=devices(4))


def jax_program(layer, x):
    import jax

    values = [[v.value for v in layer.trainable_variables], []]
    values[1] = [v.value for v in layer.non_trainable_variables]
    return jax.make_jaxpr(layer.stateless_call)(*values, x)


def result_sizes(text, kind):
    """Elements of the results of the collectives in a compiled program."""
    sizes = []
    for line in re.findall(rf"= (.*) {kind}(?:-start)?\(", text):
        shapes = re.findall(r"f32\[([\d,]*)\]", line)
        sizes.append(
            sum(math.prod(int(n) for n in s.split(",") if n) for s in shapes)
        )
    return sizes
