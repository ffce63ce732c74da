"""When a layer hands its tokens to a fused kernel, and when it sends rows."""

import keras
import numpy as np
from absl.testing import parameterized
from keras import ops

from keras_moe import backend
from keras_moe.experts import GLUExperts
from keras_moe.experts import LowRankExperts
from keras_moe.experts import MixedExperts
from keras_moe.experts import MLPExperts
from keras_moe.experts import Swish
from keras_moe.layers import MoE
from keras_moe.routers import ExpertChoiceRouter
from keras_moe.routers import TopPRouter
from tests.moe.sending import Sending
from tests.test_case import TestCase

X = np.random.default_rng(0).normal(size=(6, 5)).astype("float32")


class Doubled(GLUExperts):
    def call(self, rows, group_sizes, training=None):
        return 2 * super().call(rows, group_sizes, training)


class Halved(GLUExperts):
    """Joins its hidden layer in a way of its own, which kernels can take."""

    def join_hidden(self, gate, up):
        return 0.5 * super().join_hidden(gate, up)


def pair(experts, **kwargs):
    """A layer that may mix, and one that sends rows, with the same weights."""
    layers = []
    for layer_class in (MoE, Sending):
        own = {k: make() for k, make in kwargs.items()}
        layer = layer_class(experts=experts(), **own)
        layer.build((None, 5))
        layers.append(layer)
    for a, b in zip(layers[0].weights, layers[1].weights, strict=True):
        b.assign(ops.convert_to_tensor(a))
    return layers


class MixTest(TestCase):
    def setUp(self):
        super().setUp()
        self.calls = 0
        for name, kernel in backend.FUSED_EXPERTS.items():
            self.addCleanup(backend.FUSED_EXPERTS.__setitem__, name, kernel)
            backend.FUSED_EXPERTS[name] = self.counting(kernel)

    def counting(self, kernel):
        def call(*args):
            out = kernel(*args)
            self.calls += 1
            return out

        return call

    @parameterized.named_parameters(
        ("glu", lambda: GLUExperts(4, 3)),
        ("mlp", lambda: MLPExperts(4, 3)),
        ("limit", lambda: GLUExperts(4, 3, limit=0.1, up_shift=1.0)),
        ("swish", lambda: GLUExperts(4, 3, activation=Swish(2.0))),
        ("own_join", lambda: Halved(4, 3)),
        ("bias", lambda: GLUExperts(4, 3, use_bias=True)),
        ("other_width", lambda: GLUExperts(4, 3, output_dim=7)),
        (
            "expert_of_their_own_number",
            lambda: MLPExperts(4, 3, activation="tanh"),
            {"router": lambda: TopPRouter(4, top_p=0.5)},
        ),
        (
            "capacity",
            lambda: GLUExperts(4, 3),
            {"capacity_factor": lambda: 0.5},
        ),
    )
    def test_mixed_as_sent(self, experts, more=None):
        mixing, sending = pair(experts, **(more or {}))
        mixed = self.outputs_and_gradients(mixing, X, training=True)
        self.assertGreater(self.calls, 0)
        self.calls = 0
        sent = self.outputs_and_gradients(sending, X, training=True)
        self.assertEqual(self.calls, 0)
        for a, b in zip(mixed[:2], sent[:2], strict=True):
            self.assert_relative(a, b)
        gradients = zip(mixed[2].values(), sent[2].values(), strict=True)
        for a, b in gradients:
            self.assert_relative(a, b)

    @parameterized.named_parameters(
        ("own_call", lambda: Doubled(4, 3)),
        ("low_rank", lambda: LowRankExperts(4, 3)),
        ("weights_in_the_activation", lambda: GLUExperts(4, 3, Scale())),
        ("own_activation", lambda: GLUExperts(4, 3, activation=shifted)),
        ("named", lambda: GLUExperts(4, 3, implementation="reference")),
        ("several_kinds", lambda: MixedExperts([GLUExperts(4, 3)])),
        ("dtype", lambda: GLUExperts(4, 3, dtype="bfloat16")),
        (
            "regularized",
            lambda: GLUExperts(4, 3, activity_regularizer="l2"),
        ),
        (
            "expert_choice",
            lambda: GLUExperts(4, 3),
            {"router": lambda: ExpertChoiceRouter(4)},
        ),
        (
            "weights_on_input",
            lambda: GLUExperts(4, 3),
            {"weights_on": lambda: "input"},
        ),
    )
    def test_sent_where_rows_are_needed(self, experts, more=None):
        layer, sending = pair(experts, **(more or {}))
        self.assertAllClose(layer(X), sending(X), atol=1e-6)
        self.assertEqual(self.calls, 0)

    def test_dropout_needs_rows_in_training_alone(self):
        layer, _ = pair(lambda: GLUExperts(4, 3, dropout=0.5))
        layer(X, training=True)
        self.assertEqual(self.calls, 0)
        layer(X)
        self.assertEqual(self.calls, 1)


class Scale(keras.layers.Layer):
    def build(self, shape):
        self.scale = self.add_weight(shape=(), initializer="ones")

    def call(self, x):
        return self.scale * x


@keras.saving.register_keras_serializable("tests")
def shifted(x):
    return ops.relu(x + 1.0)
