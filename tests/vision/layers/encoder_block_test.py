import math

import keras
import numpy as np
from absl.testing import parameterized
from keras import ops

from keras_moe.layers import Capacity
from keras_moe.layers import EncoderBlock
from keras_moe.layers import MoE
from keras_moe.layers import SoftMoE
from keras_moe.routers import TaskRouter
from tests.test_case import TestCase


class FirstTokens(keras.layers.Layer):
    """Adds up the tokens of a group, and remembers what it was called with."""

    def __init__(self):
        super().__init__()
        self.supports_masking = True

    def call(self, inputs, mask=None):
        self.seen = inputs, mask
        return ops.zeros_like(inputs) + ops.sum(inputs, axis=1, keepdims=True)


def moe(**kwargs):
    return MoE(
        4,
        8,
        **{"experts": "mlp", "losses": None, "statistics": None, **kwargs},
    )


class EncoderBlockTest(TestCase):
    def setUp(self):
        super().setUp()
        rng = np.random.default_rng(0)
        self.tokens = rng.normal(size=(3, 5, 8)).astype("float32")

    def before(self, block):
        """What the feed-forward layer adds to, and what it reads."""
        tokens = ops.convert_to_tensor(self.tokens)
        x = block.attention_norm(tokens)
        x = tokens + block.attention(x, x)
        return x, block.feed_forward_norm(x)

    @parameterized.parameters(4, 5, 7, 15, 20)
    def test_groups_ignore_images(self, size):
        block = EncoderBlock(2, FirstTokens(), group_size=size)
        outputs = ops.convert_to_numpy(block(self.tokens))
        x, read = map(ops.convert_to_numpy, self.before(block))
        flat = read.reshape(15, 8)
        sums = [
            flat[start : start + size].sum(0, keepdims=True)
            for start in range(0, 15, size)
        ]
        sums = np.concatenate([np.repeat(s, size, 0) for s in sums])[:15]
        self.assert_relative(outputs, x + sums.reshape(x.shape))
        seen, mask = block.feed_forward.seen
        self.assertEqual(tuple(seen.shape), (-(-15 // size), size, 8))
        self.assertEqual(mask is None, 15 % size == 0)
        if mask is not None:
            mask = ops.convert_to_numpy(mask).reshape(-1)
            self.assertEqual(
                mask.tolist(), [True] * 15 + [False] * (len(mask) - 15)
            )

    @parameterized.parameters(None, 4, 7)
    def test_masked_tokens(self, group_size):
        """They reach no expert, and with an attention mask nothing at all."""
        mask = np.array([[1, 1, 0, 1, 1], [1] * 5, [0, 0, 1, 1, 0]], "bool")
        reads = np.broadcast_to(mask[:, None], (3, 5, 5))
        block = EncoderBlock(
            2,
            moe(capacity_factor=1.0, drop_policy="priority"),
            group_size=group_size,
        )
        masks = {"token_mask": mask, "attention_mask": reads}
        outputs = ops.convert_to_numpy(block(self.tokens, **masks))
        others = np.where(mask[..., None], self.tokens, 7.0 - self.tokens)
        changed = ops.convert_to_numpy(block(others, **masks))
        self.assert_relative(changed[mask], outputs[mask])
        x = block.attention_norm(others)
        x = others + ops.convert_to_numpy(
            block.attention(x, x, attention_mask=reads)
        )
        self.assert_relative(changed[~mask], x[~mask])

    def test_contexts_of_tokens(self):
        router = TaskRouter(4, num_tasks=2, top_k=1)
        layer = MoE(
            router=router, intermediate_dim=8, experts="mlp", losses=None
        )
        block = EncoderBlock(2, layer, group_size=4, name="block")
        ids = np.arange(15).reshape(3, 5) % 2
        outputs = ops.convert_to_numpy(block(self.tokens, context=ids))
        for task in (0, 1):
            same = block(self.tokens, context=np.full((3,), task))
            own = ids == task
            self.assert_relative(outputs[own], ops.convert_to_numpy(same)[own])
            self.assertNotAllClose(
                outputs[~own], ops.convert_to_numpy(same)[~own]
            )

    def test_mask_and_route_per_image(self):
        block = EncoderBlock(2, moe(), route_per="image")
        with self.assertRaisesRegex(ValueError, "`token_mask` does not go"):
            block(self.tokens, token_mask=np.ones((3, 5), "bool"))

    def test_groups_share_a_capacity(self):
        """As the layer itself with the groups as sequences."""
        capacity = Capacity(0.5, per="sequence", drop_policy="priority")
        block = EncoderBlock(2, moe(capacity=capacity), group_size=3)
        outputs = block(self.tokens)
        x, read = self.before(block)
        alone = block.feed_forward(ops.reshape(read, (5, 3, 8)))
        self.assert_relative(
            outputs, ops.convert_to_numpy(x + ops.reshape(alone, (3, 5, 8)))
        )

    def test_groups_without_a_capacity(self):
        """In inference they are made only where they matter."""
        layer = moe(capacity=Capacity(0.5, math.inf, per="sequence"))
        block = EncoderBlock(2, layer, group_size=4)
        block.build(self.tokens.shape)
        shapes = []
        call = layer.call

        def spy(inputs, *args, **kwargs):
            shapes.append(tuple(inputs.shape))
            return call(inputs, *args, **kwargs)

        layer.call = spy
        for training in (False, True):
            block(self.tokens, training=training)
        self.assertEqual(shapes, [(3, 5, 8), (4, 4, 8)])

    def test_routed_by_image(self):
        block = EncoderBlock(2, moe(top_k=1), route_per="image")
        block.build(self.tokens.shape)
        rng = np.random.default_rng(1)
        for variable in block.trainable_variables:
            variable.assign(rng.normal(size=variable.shape))
        outputs = ops.convert_to_numpy(block(self.tokens))
        x, read = map(ops.convert_to_numpy, self.before(block))
        kernel = ops.convert_to_numpy(block.feed_forward.router.kernel)
        chosen = np.argmax(read.mean(1) @ kernel, 1)
        self.assertGreater(len(set(chosen)), 1)
        means = np.repeat(read.mean(1, keepdims=True), 5, 1)
        wanted = block.feed_forward(read, router_inputs=means)
        self.assert_relative(outputs, x + ops.convert_to_numpy(wanted))

    @parameterized.parameters(None, 4)
    def test_context_of_images(self, group_size):
        router = TaskRouter(4, num_tasks=2, top_k=1)
        layer = MoE(router=router, experts=moe().experts, statistics=None)
        block = EncoderBlock(2, layer, group_size=group_size)
        ids = np.array([0, 1, 1], "int32")
        outputs = block(self.tokens, context=ids)
        x, read = self.before(block)
        wanted = x + block.feed_forward(read, context=ids)
        self.assert_relative(outputs, ops.convert_to_numpy(wanted))

    def test_drop_path_and_dropout(self):
        block = EncoderBlock(
            2, keras.layers.Dense(8), dropout=0.1, drop_path=0.5
        )
        inputs = np.repeat(self.tokens, 20, 0)
        outputs = ops.convert_to_numpy(block(inputs, training=True))
        skipped = (outputs == inputs).all(axis=(1, 2))
        self.assertBetween(skipped.sum(), 5, 27)  # of 60, each with 1 in 4
        again = [ops.convert_to_numpy(block(inputs)) for _ in range(2)]
        self.assertAllEqual(*again)

    def test_saved_with_its_layer(self):
        for feed_forward in (
            moe(capacity_factor=1.0, return_routing=False),
            SoftMoE(4, 8),
        ):
            block = EncoderBlock(2, feed_forward, qk_norm=True, dropout=0.1)
            inputs = keras.Input((5, 8))
            model = keras.Model(inputs, block(inputs))
            path = self.get_temp_dir() + "/model.keras"
            model.save(path)
            loaded = keras.saving.load_model(path)
            self.assert_relative(
                loaded(self.tokens), ops.convert_to_numpy(model(self.tokens))
            )
            self.assertEqual(
                [v.path for v in loaded.weights],
                [v.path for v in model.weights],
            )

    def test_errors(self):
        dense = keras.layers.Dense(8)
        for arguments, words in (
            ({"num_heads": 0}, "`num_heads` must be an int"),
            ({"feed_forward": 3}, "`feed_forward` must be a layer"),
            ({"feed_forward": None}, "`feed_forward` must be a layer"),
            ({"group_size": 0}, "`group_size` must be an int"),
            ({"group_size": 3}, "must take a mask"),
            ({"route_per": "image"}, "must be a MoE"),
            ({"route_per": "example"}, "`route_per` must be one of"),
            ({"drop_path": 1.0}, "`drop_path` must be a number"),
            ({"dropout": -1}, "`dropout` must be a number"),
            ({"attention_dropout": "x"}, "`attention_dropout` must be"),
            ({"layer_norm_epsilon": 0}, "`layer_norm_epsilon` must be"),
            ({"qk_norm": 2}, "`qk_norm` must be True or False"),
        ):
            with self.assertRaisesRegex(ValueError, words):
                EncoderBlock(
                    **{"num_heads": 2, "feed_forward": dense, **arguments}
                )
        with self.assertRaisesRegex(ValueError, "must divide .* width of 8"):
            EncoderBlock(3, dense)(self.tokens)
