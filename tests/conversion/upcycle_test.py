import os
import subprocess
import sys
import warnings

import keras
import numpy as np
from absl.testing import parameterized
from keras import layers as kl
from keras import ops

import keras_moe
from keras_moe.conversion import upcycle
from keras_moe.conversion import upcycled_class
from keras_moe.conversion.sublayers import with_sublayers
from keras_moe.layers import EncoderBlock
from keras_moe.layers import MoE
from keras_moe.losses import LoadBalancingLoss
from keras_moe.models import CondConvBackbone
from keras_moe.models import ConvNeXtMoEBackbone
from keras_moe.models import MixerMoEBackbone
from keras_moe.models import MoEImageClassifier
from keras_moe.models import SoftMoEBackbone
from keras_moe.models import SwinMoEBackbone
from keras_moe.models import VMoEBackbone
from keras_moe.models import VMoEImageClassifier
from keras_moe.routers import NoisyTopKRouter
from keras_moe.vision.layers.attention import VisionMLP
from keras_moe.vision.models.image_backbone import ImageBackbone
from tests.test_case import TestCase
from tests.vision.models.tiny import IMAGES
from tests.vision.models.tiny import randomize
from tests.vision.models.tiny import soft_moe
from tests.vision.models.tiny import v_moe


@keras.saving.register_keras_serializable("tests")
class Stack(keras.Model):
    """A model that is no graph, with blocks in a list."""

    def __init__(self, depth, **kwargs):
        super().__init__(**kwargs)
        self.depth = depth
        self.blocks = [EncoderBlock(2, VisionMLP(12)) for _ in range(depth)]
        self.head = kl.Dense(3)

    def call(self, x):
        for block in self.blocks:
            x = block(x)
        return self.head(x)

    def get_config(self):
        return {**super().get_config(), "depth": self.depth}


TOKENS = np.random.default_rng(2).normal(size=(3, 5, 8)).astype("float32")


def dense_classifier(**kwargs):
    backbone = v_moe(moe_layers=[], num_layers=3, **kwargs)
    return randomize(VMoEImageClassifier(backbone, 4))


def encoder(num_blocks=3, width=8):
    """A graph with a feed-forward of another form in each block."""
    x = inputs = keras.Input((None, width), name="tokens")
    for i in range(num_blocks):
        y = kl.LayerNormalization()(x)
        if i % 3 == 0:
            y = kl.Dense(12, "gelu")(y)
            y = kl.Dense(width)(y)
        elif i % 3 == 1:
            y = kl.Dense(12, use_bias=False)(y)
            y = kl.Activation("silu")(y)
            y = kl.Dropout(0.2)(y)
            y = kl.Dense(width)(y)
        else:
            y = kl.Dense(12)(y)
            y = kl.ReLU()(y)
            y = kl.Dense(width, "tanh")(y)
        x = kl.Add()([x, y])
    head = kl.Dense(6, "relu")(x[:, 0])
    head = kl.Dense(2, name="head")(head)
    return randomize(keras.Model(inputs, [head, x]))


def moe_layers(model):
    return [part for part in with_sublayers(model) if isinstance(part, MoE)]


def numbers(outputs):
    outputs = outputs if isinstance(outputs, (list, tuple)) else [outputs]
    return [ops.convert_to_numpy(ops.cast(x, "float32")) for x in outputs]


class UpcycleTest(TestCase):
    def assert_same(self, model, other, inputs, tolerance=1e-5):
        pairs = zip(numbers(model(inputs)), numbers(other(inputs)), strict=True)
        for actual, expected in pairs:
            self.assert_relative(actual, expected, tolerance)

    def test_backbone(self):
        dense = randomize(v_moe(moe_layers=[], num_layers=3, dropout=0.1))
        before = [np.array(w) for w in dense.get_weights()]
        model = upcycle(dense, 4)
        self.assertIsInstance(model, VMoEBackbone)
        self.assertEqual(model.moe_blocks, [1, 2])
        self.assertEqual(dense.moe_blocks, [])
        self.assert_same(model, dense, IMAGES)
        for old, new in zip(before, dense.get_weights(), strict=True):
            self.assertAllEqual(old, new)
        # Nothing of the dense blocks is left, and all else has its name.
        names = {w.path for w in model.trainable_weights}
        block = dense.block(1)
        for name in ("up_kernel", "up_bias", "down_kernel", "down_bias"):
            self.assertIn(f"block_1/moe/experts/{name}", names)
        new = {name for name in names if "/moe/" in name}
        self.assertEqual(
            names - new,
            {w.path for w in dense.weights}
            - {
                w.path
                for i in (1, 2)
                for w in dense.block(i).feed_forward.weights
            },
        )
        self.assertLen(new, 2 * 5)
        moe = model.block(1).feed_forward
        kernel = ops.convert_to_numpy(block.feed_forward.dense_1.kernel)
        for e in range(4):
            self.assertAllEqual(
                ops.convert_to_numpy(moe.experts.up_kernel)[e], kernel
            )
        self.assertEqual(moe.experts.dropout, 0.1)
        self.assertEqual(moe.post_experts.rate, 0.1)

    def test_more_blocks_of_a_model_with_experts(self):
        """Also of one that was upcycled before."""
        dense = randomize(v_moe(moe_layers=[1], num_layers=3))
        model = upcycle(dense, 2, layers="all")
        self.assertEqual(model.moe_blocks, [0, 1, 2])
        self.assert_same(model, dense, IMAGES)
        self.assertEqual(model.block(1).feed_forward.num_experts, 4)
        twice = upcycle(upcycle(dense, 2, layers=[2]), 3, layers=[0])
        self.assert_same(twice, dense, IMAGES)
        found = [twice.block(i).feed_forward.num_experts for i in range(3)]
        self.assertEqual(found, [3, 4, 2])
        path = os.path.join(self.get_temp_dir(), "model.keras")
        twice.save(path)
        self.assert_same(keras.saving.load_model(path), dense, IMAGES)

    def test_soft_moe_backbone(self):
        dense = randomize(soft_moe(num_layers=2))
        model = upcycle(dense, 4, layers=[0], top_k=3)
        self.assertIsInstance(model, SoftMoEBackbone)
        self.assertEqual(model.moe_blocks, [0, 1])
        self.assert_same(model, dense, IMAGES)

    @parameterized.parameters(
        (
            SwinMoEBackbone,
            {"depths": (2,), "num_heads": (2,), "window_size": 2},
        ),
        (ConvNeXtMoEBackbone, {"depths": (1, 1), "hidden_dims": (8, 8)}),
        (
            MixerMoEBackbone,
            {"num_layers": 2, "token_mlp_dim": 6, "mlp_dim": 12},
        ),
    )
    def test_other_backbones(self, make, arguments):
        """In mixers, the networks that mix tokens count too."""
        if make is not ConvNeXtMoEBackbone:
            arguments = {**arguments, "hidden_dim": 8}
        dense = randomize(
            make(
                image_shape=(8, 8, 3),
                patch_size=2,
                moe_layers=[],
                data_format="channels_last",
                **arguments,
            )
        )
        model = upcycle(dense, 2, layers="last_2")
        self.assertIsInstance(model, make)
        self.assertLen(moe_layers(model), 2)
        self.assert_same(model, dense, IMAGES)

    def test_classifier(self):
        dense = dense_classifier()
        dense.backbone.block(0).trainable = False
        model = upcycle(dense, [2, 3], layers=[0, 1], top_k=2)
        self.assertIs(type(model), VMoEImageClassifier)
        self.assert_same(model, dense, IMAGES)
        self.assertFalse(model.built and model.compiled)
        frozen = [w.path for w in model.weights if not w.trainable]
        for name in (
            "block_0/attention/query/kernel",
            "block_0/moe/experts/up_kernel",
        ):
            self.assertIn(name, frozen)
        self.assertNotIn("block_1/moe/experts/up_kernel", frozen)
        folder = self.get_temp_dir()
        model.save(os.path.join(folder, "model.keras"))
        loaded = keras.saving.load_model(os.path.join(folder, "model.keras"))
        self.assert_same(loaded, dense, IMAGES, 1e-5)
        self.assertEqual(
            frozen, [w.path for w in loaded.weights if not w.trainable]
        )
        model.save_to_preset(folder)
        for cls in (VMoEImageClassifier, MoEImageClassifier):
            self.assert_same(cls.from_preset(folder), dense, IMAGES)
        other = keras_moe.conversion.resize_positions(model, (12, 8, 3))
        self.assertEqual(other.backbone.moe_blocks, [0, 1])
        self.assertEqual(other.output_shape, (None, 4))

    def test_fine_tuning(self):
        """The copies part, and the loss falls."""
        backbone = v_moe(moe_layers=[], num_layers=1, dropout=0.1)
        dense = randomize(VMoEImageClassifier(backbone, 4))
        model = upcycle(dense, 4, layers="all")
        model.compile(
            keras.optimizers.Adam(1e-2),
            keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        )
        labels = np.arange(len(IMAGES)) % 4
        history = model.fit(IMAGES, labels, epochs=6, verbose=0).history
        self.assertLess(history["loss"][-1], history["loss"][0])
        self.assertIn("routing_entropy", history)
        (moe,) = moe_layers(model)
        kernel = ops.convert_to_numpy(moe.experts.up_kernel)
        self.assertGreater(np.abs(kernel[0] - kernel[1]).max(), 1e-4)
        path = os.path.join(self.get_temp_dir(), "model.keras")
        model.save(path)
        self.assert_same(keras.saving.load_model(path), model, IMAGES)

    @parameterized.parameters("all", "every_2", "last_1", [[2, 0]])
    def test_graph(self, layers):
        dense = encoder()
        model = upcycle(dense, 4, layers=layers)
        self.assert_same(model, dense, TOKENS)
        wanted = {"all": 3, "every_2": 1, "last_1": 1}.get(str(layers), 2)
        self.assertLen(moe_layers(model), wanted)
        names = [layer.name for layer in model.layers]
        left = sum(isinstance(layer, kl.Dense) for layer in model.layers)
        self.assertEqual(left, 2 + 2 * (3 - wanted))
        self.assertEqual(type(model), type(dense))
        self.assertIn("head", names)
        # Of any batch and number of tokens, as before.
        self.assertEqual(model.input_shape, (None, None, 8))

    def test_graph_in_training(self):
        dense = encoder(2)
        rates = [
            part.experts.dropout
            for part in moe_layers(upcycle(dense, 4, layers="all"))
        ]
        self.assertEqual(rates, [0.0, 0.2])
        activations = [
            part.experts.activation
            for part in moe_layers(upcycle(dense, 4, layers="all"))
        ]
        self.assertEqual(
            activations, [keras.activations.gelu, keras.activations.silu]
        )

    @parameterized.parameters(
        [kl.ReLU(6.0)],
        [kl.ReLU(negative_slope=0.2)],
        [kl.Activation("relu6")],
        [kl.Activation("softplus")],
    )
    def test_activations_with_a_limit(self, activation):
        """Also where two of them differ far from zero only."""
        inputs = keras.Input((3,))
        x = activation.from_config(activation.get_config())(kl.Dense(8)(inputs))
        dense = keras.Model(inputs, kl.Dense(3)(x))
        model = upcycle(dense, 2, layers="all")
        self.assert_same(model, dense, 50 * TOKENS[0, :, :3])

    def test_pairs_of_other_widths(self):
        """Only where there are no better ones, and never at the end."""
        x = inputs = keras.Input((6,))
        for width in (12, 8, 12, 3):
            x = kl.Dense(width, "relu" if width == 12 else None)(x)
        dense = randomize(keras.Model(inputs, x))
        model = upcycle(dense, 4, layers="all")
        self.assertLen(moe_layers(model), 1)
        inputs = np.random.default_rng(0).normal(size=(7, 6))
        self.assert_same(model, dense, inputs.astype("float32"))

    def test_sequential(self):
        dense = keras.Sequential(
            [
                keras.Input((5, 8)),
                kl.Dense(8),
                kl.LayerNormalization(),
                kl.Dense(12, "relu"),
                kl.Dropout(0.1),
                kl.Dense(8),
                kl.GlobalAveragePooling1D(),
                kl.Dense(2),
            ]
        )
        randomize(dense)
        model = upcycle(dense, 4, layers="last_1")
        self.assertIs(type(model), keras.Sequential)
        self.assertLen(model.layers, 5)
        self.assert_same(model, dense, TOKENS)
        path = os.path.join(self.get_temp_dir(), "model.keras")
        model.save(path)
        self.assert_same(keras.saving.load_model(path), dense, TOKENS)

    def test_layers_in_a_graph(self):
        """Blocks, a model in the model, and a layer used for two inputs."""
        a, b = keras.Input((5, 8)), keras.Input((5, 8))
        inner = encoder(1)
        block = EncoderBlock(2, VisionMLP(12), name="block")
        outputs = kl.Subtract()([block(inner(a)[1]), block(b)])
        dense = randomize(keras.Model([a, b], outputs))
        model = upcycle(dense, 4, layers="all")
        self.assertLen(moe_layers(model), 2)
        self.assertIs(type(model.get_layer("block")), EncoderBlock)
        inputs = [TOKENS, TOKENS[::-1].copy()]
        self.assert_same(model, dense, inputs)
        path = os.path.join(self.get_temp_dir(), "model.keras")
        model.save(path)
        self.assert_same(keras.saving.load_model(path), dense, inputs)

    def test_model_that_is_no_graph(self):
        dense = Stack(3)
        dense(TOKENS)
        randomize(dense)
        model = upcycle(dense, 4)
        self.assertIs(type(model), upcycled_class(Stack))
        self.assertIsInstance(model.blocks[0].feed_forward, VisionMLP)
        self.assertIsInstance(model.blocks[1].feed_forward, MoE)
        self.assert_same(model, dense, TOKENS)
        path = os.path.join(self.get_temp_dir(), "model.keras")
        model.save(path)
        self.assert_same(keras.saving.load_model(path), dense, TOKENS)

    def test_options(self):
        dense = encoder(1)
        loss = LoadBalancingLoss(0.5)
        router = NoisyTopKRouter(4, top_k=2, normalize_weights=True)
        model = upcycle(
            dense,
            4,
            layers="all",
            router=router,
            losses=[loss],
            capacity_factor=2.0,
            statistics=None,
        )
        (moe,) = moe_layers(model)
        self.assertIsInstance(moe.router, NoisyTopKRouter)
        self.assertIsNot(moe.router, router)
        self.assertEqual([x.weight for x in moe.routing_losses], [0.5])
        self.assertEqual(moe.capacity.capacity_factor, 2.0)
        self.assertIsNone(moe.statistics)

    def test_recipes(self):
        """What the weights are is tested beside `recycled_weights`."""
        dense = encoder(1)
        exact = numbers(dense(TOKENS))[1]
        spread = exact.std()
        for options, largest in (
            ({"noise": 0.01}, 0.2),
            ({"reinit": 0.25}, 2.0),
            ({"intermediate_dim": 9, "sampling": "uniform"}, 2.0),
        ):
            model = upcycle(dense, 4, layers="all", seed=1, **options)
            error = np.abs(numbers(model(TOKENS))[1] - exact).max() / spread
            self.assertBetween(error, 1e-4, largest)
            (moe,) = moe_layers(model)
            kernel = ops.convert_to_numpy(moe.experts.up_kernel)
            self.assertGreater(np.abs(kernel[0] - kernel[1]).max(), 1e-3)
            again = upcycle(dense, 4, layers="all", seed=1, **options)
            (moe,) = moe_layers(again)
            self.assertAllEqual(
                kernel, ops.convert_to_numpy(moe.experts.up_kernel)
            )
        self.assertEqual(kernel.shape, (4, 8, 9))

    def test_a_router_that_scales_is_warned_about(self):
        dense = encoder(1)
        for router in ("v_moe", "switch"):
            with self.assertWarnsRegex(UserWarning, "do not sum to one"):
                upcycle(dense, 4, layers="all", router=router)
        with warnings.catch_warnings():
            warnings.simplefilter("error", UserWarning)
            upcycle(dense, 4, layers="all", router="mixtral")

    def test_mixed_precision(self):
        dense = randomize(
            v_moe(moe_layers=[], num_layers=2, dtype="mixed_bfloat16")
        )
        model = upcycle(dense, 4)
        (first, _) = moe_layers(model)
        self.assertEqual(first.experts.compute_dtype, "bfloat16")
        self.assertEqual(first.router.compute_dtype, "float32")
        self.assertEqual(first.experts.up_kernel.dtype, "float32")
        self.assert_same(model, dense, IMAGES, 3e-2)

    def test_channels_first(self):
        images = IMAGES.transpose(0, 3, 1, 2).copy()
        sizes = {"image_shape": (3, 8, 8), "data_format": "channels_first"}
        dense = randomize(v_moe(moe_layers=[], **sizes))
        self.assert_same(upcycle(dense, 4), dense, images)

    def test_regularizers(self):
        x = inputs = keras.Input((8,))
        y = kl.Dense(12, "relu", kernel_regularizer="l2")(x)
        y = kl.Dense(8, kernel_regularizer="l2")(y)
        dense = keras.Model(inputs, x + y)
        (moe,) = moe_layers(upcycle(dense, 2, layers="all"))
        self.assertIsInstance(
            moe.experts.kernel_regularizer, keras.regularizers.L2
        )
        dense.layers[1].kernel_regularizer = None
        with self.assertRaisesRegex(ValueError, "different `kernel_regular"):
            upcycle(dense, 2, layers="all")

    def test_nothing_found(self):
        pooled = kl.GlobalAveragePooling1D()
        inputs = keras.Input((5, 8), name="tokens")
        x = kl.Dense(12, "relu", name="first")(inputs)
        x = kl.BatchNormalization(name="between")(x)
        x = kl.Dense(8, name="second")(x)
        x = kl.MultiHeadAttention(2, 4, name="attention")(x, x)
        x = kl.Dense(3, name="head")(kl.Dense(4, name="hidden")(pooled(x)))
        model = keras.Model(inputs, x)
        with self.assertRaises(ValueError) as caught:
            upcycle(model, 4)
        for words in (
            "dense feed-forward networks",
            "first: between (BatchNormalization) follows",
            "hidden: from width 8 to 3, a head",
            "attention (MultiHeadAttention)",
        ):
            self.assertIn(words, str(caught.exception))
        with self.assertRaisesRegex(ValueError, "block_1/moe .MoE.: has exp"):
            upcycle(v_moe(moe_layers=[0, 1]), 4)

    def test_errors(self):
        dense = encoder(2)
        for words, arguments in (
            (
                "`layers` must be .* n from 1 to 2.*layers='last_3'",
                {"layers": "last_3"},
            ),
            ("`layers` must be.*0 dense", {"layers": [2]}),
            ("`layers` must be", {"layers": [0, 0]}),
            ("`layers` must be", {"layers": []}),
            ("`num_experts` must be an int", {"num_experts": 0}),
            ("`num_experts` must be .* list of 2", {"num_experts": [2, 3, 4]}),
            ("`noise` must be", {"noise": -1.0}),
            ("`reinit` must be between 0 and 1.*reinit=1.5", {"reinit": 1.5}),
            (
                "`intermediate_dim` must be at most.*13",
                {"intermediate_dim": 13},
            ),
            ("`intermediate_dim` must be", {"intermediate_dim": 0}),
            ("`sampling` must be one of", {"sampling": "norm"}),
            ("`seed` must be", {"seed": 1.5}),
            ("but for experts.*Received: .'experts'", {"experts": "glu"}),
            (
                "does not know `capacity_facto`|refus|only if",
                {"capacity_facto": 1.0},
            ),
            (
                "by the tokens alone",
                {"router": keras_moe.routers.TaskRouter(4, 2)},
            ),
        ):
            with self.subTest(words), self.assertRaisesRegex(ValueError, words):
                upcycle(dense, **{"num_experts": 4, **arguments})
        with self.assertRaisesRegex(ValueError, "that is built"):
            upcycle(keras.Sequential([kl.Dense(4)]), 4)
        with self.assertRaisesRegex(ValueError, "`original` must be a class"):
            upcycled_class("VMoEBackbone")


class SavedTest(TestCase):
    def test_own_backbones_are_known(self):
        """Each can be loaded upcycled by a process that has upcycled none."""
        known = 0
        for cls in vars(keras_moe.models).values():
            if isinstance(cls, type) and issubclass(cls, ImageBackbone):
                if cls is not CondConvBackbone:  # it has no feed-forward
                    name = f"keras_moe>Upcycled{cls.__name__}"
                    found = keras.saving.get_registered_object(name)
                    self.assertIs(found, upcycled_class(cls))
                    known += 1
        self.assertGreaterEqual(known, 5)

    def test_fresh_process(self):
        folder = self.get_temp_dir()
        np.save(os.path.join(folder, "images.npy"), IMAGES)
        np.save(os.path.join(folder, "tokens.npy"), TOKENS)
        backbone = upcycle(
            randomize(v_moe(moe_layers=[], num_layers=3)), 4, noise=0.1
        )
        graph = upcycle(encoder(2), 4, intermediate_dim=7)
        backbone.save(os.path.join(folder, "backbone.keras"))
        graph.save(os.path.join(folder, "graph.keras"))
        backbone.save_to_preset(os.path.join(folder, "preset"))
        program = f"""
import keras, numpy as np, os
import keras_moe
os.chdir({folder!r})
images, tokens = np.load("images.npy"), np.load("tokens.npy")
def save(name, outputs):
    np.save(name, keras.ops.convert_to_numpy(outputs))
save("0", keras.saving.load_model("backbone.keras")(images))
save("1", keras_moe.models.VMoEBackbone.from_preset("preset")(images))
model = keras_moe.models.MoEImageClassifier.from_preset("preset", num_classes=3)
save("2", model.backbone(images))
save("3", keras.saving.load_model("graph.keras")(tokens)[1])
"""
        run_alone(program)
        wanted = [*numbers(backbone(IMAGES)) * 3, numbers(graph(TOKENS))[1]]
        for i, expected in enumerate(wanted):
            self.assert_relative(
                np.load(os.path.join(folder, f"{i}.npy")), expected
            )


def run_alone(program):
    """Runs Python in a process of its own, on the same backend."""
    root = os.path.dirname(os.path.dirname(keras_moe.__file__))
    paths = [root, *filter(None, [os.environ.get("PYTHONPATH")])]
    env = {
        **os.environ,
        "KERAS_BACKEND": keras.config.backend(),
        "PYTHONPATH": os.pathsep.join(paths),
    }
    done = subprocess.run(
        [sys.executable, "-c", program], env=env, capture_output=True, text=True
    )
    if done.returncode:
        raise AssertionError(done.stderr)
