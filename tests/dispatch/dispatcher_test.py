"""Both ways of a `Dispatcher`, against a loop over tokens; its subclasses."""

import keras
import numpy as np
from absl.testing import parameterized
from keras import ops

from keras_moe.dispatch import Dispatcher
from keras_moe.experts import GLUExperts
from keras_moe.layers import Capacity
from keras_moe.layers import MoE
from keras_moe.routers import TopKRouter
from tests.test_case import TestCase

TOKENS, DIM, EXPERTS, TOP_K = 7, 5, 3, 2


@keras.saving.register_keras_serializable("tests")
class Moving(Dispatcher):
    """Sends rows as a subclass for several devices does, and counts it."""

    moves_rows = True
    exchanges = 0

    def exchange(self, rows, group_sizes, experts, **kwargs):
        type(self).exchanges += 1
        there_and_back = ops.flip(ops.flip(rows, 0), 0)
        return super().exchange(there_and_back, group_sizes, experts, **kwargs)


def parts(experts_class=GLUExperts):
    router = TopKRouter(EXPERTS, TOP_K, kernel_initializer="normal")
    experts = experts_class(EXPERTS, 4, use_bias=True, bias_initializer="ones")
    tokens = np.random.default_rng(0).normal(size=(TOKENS, DIM))
    tokens = ops.convert_to_tensor(tokens.astype("float32"))
    experts.build((None, DIM))
    return tokens, router(tokens), experts


def loop(tokens, routing, experts, kept=None, on_input=False):
    """The definition, token by token, of the experts' own rows."""
    tokens = ops.convert_to_numpy(tokens)
    indices = ops.convert_to_numpy(routing.expert_indices)
    weights = ops.convert_to_numpy(routing.expert_weights)
    outputs = np.zeros_like(tokens)
    for t, k in np.ndindex(indices.shape):
        if kept is not None and not kept[t, k]:
            continue
        row = tokens[t : t + 1] * (weights[t, k] if on_input else 1.0)
        sizes = np.eye(EXPERTS, dtype="int32")[indices[t, k]]
        out = experts(ops.convert_to_tensor(row), ops.convert_to_tensor(sizes))
        factor = 1.0 if on_input else weights[t, k]
        outputs[t] += factor * ops.convert_to_numpy(out)[0]
    return outputs


class DispatcherTest(TestCase):
    @parameterized.parameters(Dispatcher, Moving)
    def test_outputs_and_group_sizes(self, dispatcher_class):
        tokens, routing, experts = parts()
        outputs, sizes = dispatcher_class()(tokens, routing, experts)
        self.assertAllClose(outputs, loop(tokens, routing, experts), atol=1e-5)
        indices = ops.convert_to_numpy(routing.expert_indices).reshape(-1)
        self.assertAllEqual(sizes, np.bincount(indices, minlength=EXPERTS))

    @parameterized.parameters(Dispatcher, Moving)
    def test_capacity(self, dispatcher_class):
        tokens, routing, experts = parts()
        capacity = Capacity(size=2, drop_policy="token")
        outputs, sizes = dispatcher_class(capacity)(tokens, routing, experts)
        indices = ops.convert_to_numpy(routing.expert_indices)
        taken, kept = np.zeros(EXPERTS, int), np.zeros(indices.shape, bool)
        for t, k in np.ndindex(indices.shape):
            kept[t, k] = taken[indices[t, k]] < 2
            taken[indices[t, k]] += kept[t, k]
        self.assertAllEqual(sizes, taken)
        self.assertAllClose(
            outputs, loop(tokens, routing, experts, kept), atol=1e-5
        )

    def test_weights_on_the_input(self):
        tokens, routing, experts = parts()
        outputs, _ = Dispatcher(weights_on="input")(tokens, routing, experts)
        expected = loop(tokens, routing, experts, on_input=True)
        self.assertAllClose(outputs, expected, atol=1e-5)

    def test_the_class_says_that_rows_move(self):
        class Plain(Dispatcher):
            def exchange(self, *args, **kwargs):
                raise AssertionError("No row has to move.")

        tokens, routing, experts = parts()
        experts.mix = lambda *args, **kwargs: tokens
        self.assertIs(Plain()(tokens, routing, experts)[0], tokens)
        self.assertIsNot(Moving()(tokens, routing, experts)[0], tokens)

    def test_config(self):
        dispatcher = Dispatcher(Capacity(1.5, per="sequence"), "input")
        config = keras.saving.serialize_keras_object(dispatcher)
        again = keras.saving.deserialize_keras_object(config)
        self.assertEqual(again.get_config(), dispatcher.get_config())

    @parameterized.parameters(
        ({"capacity": 2.0}, "capacity=2.0"),
        ({"weights_on": "both"}, "weights_on='both'"),
    )
    def test_errors(self, kwargs, message):
        with self.assertRaisesRegex(ValueError, message):
            Dispatcher(**kwargs)


class InMoETest(TestCase):
    def test_a_layer_takes_one_and_saves_it(self):
        x = np.random.default_rng(1).normal(size=(2, 6, DIM)).astype("float32")
        layer = MoE(4, 3, dispatcher=Moving(Capacity(1.0)), name="moe")
        inputs = keras.Input((None, DIM))
        model = keras.Model(inputs, layer(inputs))
        before = Moving.exchanges
        outputs = model(x)
        self.assertGreater(Moving.exchanges, before)
        plain = MoE(4, 3, capacity_factor=1.0)
        plain.build(x.shape)
        plain.set_weights(layer.get_weights())
        self.assertAllClose(plain(x), outputs, atol=1e-5)
        path = f"{self.get_temp_dir()}/model.keras"
        model.save(path)
        loaded = keras.saving.load_model(path)
        self.assertIsInstance(loaded.get_layer("moe").dispatcher, Moving)
        self.assertAllClose(loaded(x), outputs, atol=1e-6)

    def test_errors(self):
        for kwargs, message in (
            ({"dispatcher": "all_to_all"}, "dispatcher='all_to_all'"),
            (
                {"dispatcher": Dispatcher(), "capacity_factor": 1.0},
                "`dispatcher` stands in the place of `capacity_factor`",
            ),
            (
                {"dispatcher": Dispatcher(), "weights_on": "input"},
                "`dispatcher` stands in the place of `weights_on`",
            ),
        ):
            with self.assertRaisesRegex(ValueError, message):
                MoE(4, 3, **kwargs)
