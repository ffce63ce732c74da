import keras
import numpy as np
from absl.testing import parameterized
from keras import ops

from keras_moe.layers import DiTBlock
from keras_moe.layers import MoE
from tests.test_case import TestCase
from tests.vision.layers.encoder_block_test import moe
from tests.vision.models.tiny import randomize

RNG = np.random.default_rng(0)
TOKENS = RNG.normal(size=(3, 5, 8)).astype("float32")
CONDITION = RNG.normal(size=(3, 6)).astype("float32")


def built(block):
    block(TOKENS, CONDITION)
    return randomize(block)


def parts_of(block):
    """The six vectors `(B, 1, D)` of each image."""
    kernel, bias = map(ops.convert_to_numpy, block.modulation.get_weights())
    silu = CONDITION / (1 + np.exp(-CONDITION))
    return np.split((silu @ kernel + bias)[:, None], 6, axis=-1)


def norm(x):
    x = x - x.mean(-1, keepdims=True)
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-6)


class DiTBlockTest(TestCase):
    def test_definition(self):
        block = built(DiTBlock(2, keras.layers.Dense(8)))
        shift, scale, gate, shift_2, scale_2, gate_2 = parts_of(block)
        x = norm(TOKENS) * (1 + scale) + shift
        x = TOKENS + gate * ops.convert_to_numpy(block.attention(x, x))
        kernel, bias = block.feed_forward.get_weights()
        read = norm(x) * (1 + scale_2) + shift_2
        wanted = x + gate_2 * (read @ kernel + bias)
        self.assert_relative(block(TOKENS, CONDITION), wanted)

    def test_new_block_gives_what_it_gets(self):
        outputs = DiTBlock(2, moe())(TOKENS, CONDITION)
        self.assertAllEqual(ops.convert_to_numpy(outputs), TOKENS)

    @parameterized.parameters(
        ("modulated", 8, None),
        ("unmodulated", 8, None),
        ("unmodulated_and_condition", 14, None),
        ("unmodulated_and_condition", 14, 4),
    )
    def test_what_the_router_sees(self, router_inputs, width, group_size):
        layer = moe(capacity_factor=1.0) if group_size else moe()
        block = built(
            DiTBlock(
                2, layer, router_inputs=router_inputs, group_size=group_size
            )
        )
        self.assertEqual(tuple(layer.router.kernel.shape), (width, 4))
        seen, call = [], layer.call

        def spy(inputs, **kwargs):
            seen.append((inputs, kwargs.get("router_inputs", inputs)))
            return call(inputs, **kwargs)

        layer.call = spy
        block(TOKENS, CONDITION)
        ((read, given),) = [map(ops.convert_to_numpy, s) for s in seen]
        read, given = (x.reshape(-1, x.shape[-1])[:15] for x in (read, given))
        *_, shift, scale, _ = (np.repeat(p, 5, 1) for p in parts_of(block))
        shift, scale = shift.reshape(15, 8), scale.reshape(15, 8)
        if router_inputs == "modulated":
            self.assertAllEqual(given, read)
        else:
            plain = (read - shift) / (1 + scale)
            self.assert_relative(given[:, :8], plain, 1e-4)
            self.assert_relative(norm(plain), plain, 1e-3)
        if width > 8:
            self.assertAllEqual(given[:, 8:], np.repeat(CONDITION, 5, 0))

    def test_by_image(self):
        """The mean of what the router would see."""
        layer = moe(top_k=1)
        block = built(
            DiTBlock(2, layer, router_inputs="unmodulated", route_per="image")
        )
        chosen = []
        routing_of = layer.routing_of

        def spy(tokens, training):
            chosen.append(routing_of(tokens, training).expert_indices)
            self.assertEqual(tuple(tokens.router_inputs.shape), (15, 8))
            return routing_of(tokens, training)

        layer.routing_of = spy
        block(TOKENS, CONDITION)
        chosen = ops.convert_to_numpy(chosen[0]).reshape(3, 5)
        self.assertAllEqual(chosen, np.repeat(chosen[:, :1], 5, 1))

    def test_saved(self):
        block = DiTBlock(
            2,
            moe(),
            router_inputs="unmodulated_and_condition",
            qk_norm=True,
            dropout=0.1,
        )
        inputs = keras.Input((5, 8)), keras.Input((6,))
        model = randomize(keras.Model(inputs, block(*inputs)))
        path = self.get_temp_dir() + "/model.keras"
        model.save(path)
        loaded = keras.saving.load_model(path)
        wanted = ops.convert_to_numpy(model([TOKENS, CONDITION]))
        self.assert_relative(loaded([TOKENS, CONDITION]), wanted)

    def test_errors(self):
        dense = keras.layers.Dense(8)
        for arguments, words in (
            ({"router_inputs": "x"}, "`router_inputs` must be one of"),
            ({"router_inputs": "unmodulated"}, "must be a MoE. Received"),
            ({"feed_forward": None}, "`feed_forward` must be a layer"),
            ({"num_heads": 0}, "`num_heads` must be an int"),
        ):
            with self.assertRaisesRegex(ValueError, words):
                DiTBlock(**{"num_heads": 2, "feed_forward": dense, **arguments})
        block = DiTBlock(2, MoE(4, 8))
        with self.assertRaisesRegex(ValueError, r"must be of shape \(batch, C"):
            block(TOKENS, TOKENS)
