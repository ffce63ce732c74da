"""What `MoE` is called with besides its inputs, for routers and losses."""

import keras
import numpy as np
from keras import ops

import keras_moe
from keras_moe.experts import GLUExperts
from keras_moe.layers import MoE
from keras_moe.routers import ExpertChoiceRouter
from keras_moe.routers import HashRouter
from keras_moe.routers import MLPRouter
from tests import token_loop
from tests.moe.moe_test import SHAPE
from tests.moe.moe_test import inputs
from tests.moe.moe_test import make
from tests.moe.moe_test import weights_of
from tests.test_case import TestCase


class SideInputsTest(TestCase):
    def test_modalities_for_a_loss(self):
        loss = keras_moe.losses.EntropyLoss(1.0, modality=1)
        layer = make(losses=loss)
        x, modality = inputs(), np.arange(12).reshape(3, 4) % 2
        layer(x, context=modality, training=True)
        routing = layer.route(x, context=modality)
        probs = ops.convert_to_numpy(routing.probs)[modality.reshape(-1) == 1]
        wanted = -(probs * np.log(probs)).sum(axis=1).mean()
        self.assert_relative(layer.losses[0], wanted)

    def layer(self):
        table = [[0, 1], [2, 3], [3, 0]]
        return MoE(
            router=HashRouter(4, table=table),
            experts=GLUExperts(4, 3, name="experts"),
        )

    def test_token_ids(self):
        layer = self.layer()
        ids = np.arange(12).reshape(3, 4) % 3
        x = inputs()
        outputs = layer(x, context=ids)
        tokens, weights = x.reshape(-1, 5), weights_of(layer)
        wanted = np.zeros(tokens.shape)
        for t, i in enumerate(ids.reshape(-1)):
            for e in layer.router.get_config()["table"][i]:
                row = tokens[t].astype("float64")
                wanted[t] += token_loop.expert(row, weights, e, "silu") / 2
        self.assert_relative(outputs, wanted.reshape(SHAPE))
        # One id for each example.
        by_example = layer(x, context=np.array([2, 0, 1]))
        spread = layer(x, context=np.repeat([[2], [0], [1]], 4, axis=1))
        self.assertAllClose(by_example, spread)

    def test_functional_model(self):
        x, ids = keras.Input((4, 5)), keras.Input((4,), dtype="int32")
        model = keras.Model([x, ids], self.layer()(x, context=ids))
        model.compile("sgd", "mse")
        id_values = np.arange(12).reshape(3, 4) % 3
        history = model.fit(
            [inputs(), id_values], inputs(1), epochs=2, verbose=0
        )
        self.assertLess(history.history["loss"][1], history.history["loss"][0])

    def test_errors(self):
        with self.assertRaisesRegex(ValueError, "context"):
            self.layer()(inputs())
        with self.assertRaisesRegex(ValueError, "Received a context"):
            make()(inputs(), context=np.zeros((3, 4), "int32"))
        for context in (
            np.zeros((3, 4, 5), "int32"),
            np.zeros((3, 4, 5, 6), "float32"),
            np.zeros((3,), "float32"),
        ):
            with self.assertRaisesRegex(ValueError, r"context.shape=\(3"):
                self.layer()(inputs(), context=context)

    def test_a_routing_handed_on(self):
        def router():
            return MLPRouter(
                4, hidden_dims=(6,), residual="logits", name="router"
            )

        x = keras.Input((4, 5))
        first = MoE(
            router=router(), experts=GLUExperts(4, 3), return_routing=True
        )
        y, routing = first(x)
        state = ops.reshape(routing.state, (-1, 4, 4))
        second = MoE(router=router(), experts=GLUExperts(4, 3))
        z = second(y, context=state)
        second.router.context_kernel.assign(np.eye(4))
        model = keras.Model(x, [y, z])
        y_value, z_value = model(inputs())
        wanted_y, routing = first(inputs())
        self.assertAllClose(y_value, wanted_y, atol=1e-6)
        state = ops.reshape(routing.state, (3, 4, 4))
        self.assertAllClose(z_value, second(wanted_y, context=state), atol=1e-6)
        self.assertNotAllClose(z_value, second(wanted_y), atol=1e-6)

    def test_a_routing_of_unknown_size(self):
        for router in (
            ExpertChoiceRouter(4, per="sequence"),
            ExpertChoiceRouter(4, per=3),
            MLPRouter(4, hidden_dims=(3,), residual="logits"),
        ):
            layer = MoE(
                router=router,
                experts=GLUExperts(4, 3),
                return_routing=True,
                dtype="mixed_float16",
            )
            outputs, routing = layer(keras.Input((6, 5)))
            self.assertEqual(outputs.shape, (None, 6, 5))
            self.assertEqual(routing.probs.shape, (None, 4))
            self.assertEqual(routing.probs.dtype, "float32")

    def test_large_ids(self):
        layer = MoE(router=HashRouter(4, num_ids=10), experts=GLUExperts(4, 3))
        if keras.config.backend() == "jax":
            self.skipTest("JAX has no int64 unless it is told to")
        ids = np.array([2**32 + 1, 7, 2**33], "int64")
        layer.build((None, 5))
        table = ops.convert_to_numpy(layer.router.table)
        indices = layer.route(inputs()[:, 0], context=ids).expert_indices
        self.assertAllEqual(indices, table[ids % 10])
