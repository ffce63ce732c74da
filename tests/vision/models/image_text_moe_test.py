import math

import keras
import numpy as np
from absl.testing import parameterized
from keras import ops

from keras_moe import losses
from keras_moe import routers
from keras_moe.models import ImageTextMoE
from tests.exported import export
from tests.test_case import TestCase
from tests.vision.models.tiny import IMAGES
from tests.vision.models.tiny import dtype_of
from tests.vision.models.tiny import randomize

SIZES = {
    "image_shape": (8, 8, 3),
    "patch_size": 4,
    "vocabulary_size": 11,
    "text_length": 6,
    "num_layers": 2,
    "num_heads": 2,
    "hidden_dim": 8,
    "mlp_dim": 12,
    "num_experts": 4,
    "data_format": "channels_last",
}
TEXTS = np.array(
    [
        [3, 1, 2, 0, 0, 0],
        [4, 1, 0, 0, 0, 0],
        [5, 6, 7, 8, 9, 10],
        [6, 6, 1, 2, 0, 0],
        [7, 3, 0, 0, 0, 0],
    ],
    "int32",
)
BOTH = {"images": IMAGES, "texts": TEXTS}


def image_text(**kwargs):
    return ImageTextMoE(**{**SIZES, **kwargs})


def numpy_of(outputs):
    return {k: ops.convert_to_numpy(v) for k, v in outputs.items()}


class TowerTest(TestCase):
    def test_encoders(self):
        """Each modality alone gives the same: neither reads the other."""
        model = randomize(image_text(projection_dim=5, dropout=0.1))
        outputs = numpy_of(model(BOTH))
        for name, encoder in (
            ("images", model.image_encoder()),
            ("texts", model.text_encoder()),
        ):
            self.assertEqual(encoder.output_shape, (None, 5))
            self.assert_relative(encoder(BOTH[name]), outputs[name])
            lengths = np.linalg.norm(outputs[name], axis=-1)
            self.assertAllClose(lengths, np.ones(5), atol=1e-5)
            self.assertGreater(np.abs(np.diff(outputs[name], axis=0)).min(), 0)
        logits = model.head.logits(outputs["images"], outputs["texts"])
        wanted = outputs["images"] @ outputs["texts"].T
        factor = math.exp(ops.convert_to_numpy(model.head.scale))
        self.assert_relative(logits, factor * wanted)

    def test_by_hand(self):
        """A model without attention: each token on its own, then the mean."""
        model = randomize(image_text())
        for i in range(2):
            block = model.get_layer(f"block_{i}")
            for variable in block.attention.variables:
                if "attention_output" in variable.path:
                    variable.assign(np.zeros(variable.shape))
        outputs = numpy_of(model(BOTH))
        x = model.get_layer("text_embedding")(TEXTS[:1])[:, :3]
        moe = model.get_layer("block_1").feed_forward
        dense = model.get_layer("block_0").feed_forward
        for block, layer in ((0, dense), (1, moe)):
            norm = model.get_layer(f"block_{block}").feed_forward_norm
            kwargs = {"context": np.ones((1, 3), "int32")} if block else {}
            x = x + layer(norm(x), **kwargs)
        mean = ops.mean(model.get_layer("norm")(x), axis=1)
        vector = ops.convert_to_numpy(model.get_layer("text_projection")(mean))
        self.assert_relative(
            outputs["texts"][:1], vector / np.linalg.norm(vector)
        )

    def test_same_on_all_backends(self):
        outputs = numpy_of(randomize(image_text())(BOTH))
        for name, wanted in (
            ("images", [0.22541079, -0.1848707, -0.04462913, -0.27379525]),
            ("texts", [-0.25712186, 0.17883186, 0.62465984, -0.21997814]),
        ):
            self.assert_relative(outputs[name][0, :4], wanted)

    def test_padding_is_not_read(self):
        model = randomize(image_text())
        wanted = numpy_of(model(BOTH))
        # What the embedding of padding holds is of no account.
        embeddings = model.get_layer("text_embedding").embeddings
        value = np.array(ops.convert_to_numpy(embeddings))
        value[0] = 100.0
        embeddings.assign(value)
        for name, outputs in numpy_of(model(BOTH)).items():
            self.assert_relative(outputs, wanted[name])
        unpadded = randomize(image_text(padding_id=None))
        unpadded.set_weights(model.get_weights())
        outputs = numpy_of(unpadded(BOTH))["texts"]
        changed = np.abs(outputs - wanted["texts"]).max(axis=1) > 1e-3
        self.assertEqual(changed.tolist(), [True, True, False, True, True])

    def test_rest_of_the_batch(self):
        model = randomize(image_text())
        outputs = numpy_of(model(BOTH))
        alone = numpy_of(model({k: v[2:3] for k, v in BOTH.items()}))
        for name in ("images", "texts"):
            self.assert_relative(alone[name][0], outputs[name][2])

    def test_router_of_modalities(self):
        router = routers.TaskRouter(
            4,
            num_tasks=2,
            top_k=1,
            allowed_experts=[
                [True, True, False, False],
                [False, False, True, True],
            ],
        )
        model = randomize(
            image_text(
                router=router,
                load_loss_weight=0.0,
                importance_loss_weight=0.0,
                image_global_weight=0.0,
            )
        )
        outputs = numpy_of(model(BOTH))
        encoder = model.text_encoder()
        self.assert_relative(encoder(TEXTS), outputs["texts"])
        # The experts of texts do not matter to images.
        bank = model.get_layer("block_1").feed_forward.experts.up_kernel
        value = np.array(ops.convert_to_numpy(bank))
        value[2:] += 1.0
        bank.assign(value)
        changed = numpy_of(model(BOTH))
        self.assert_relative(changed["images"], outputs["images"])
        self.assertGreater(
            np.abs(changed["texts"] - outputs["texts"]).max(), 1e-3
        )


class LossesTest(TestCase):
    def test_entropies(self):
        """Against loops over the real tokens of each modality."""
        weights = {
            "image_local_weight": 0.3,
            "text_local_weight": 0.5,
            "image_global_weight": 0.7,
            "text_global_weight": 0.9,
        }
        model = randomize(
            image_text(
                router="top_k",
                capacity_factor=None,
                importance_loss_weight=0.0,
                min_text_experts=3.5,
                **weights,
            )
        )
        moe = model.get_layer("block_1").feed_forward
        routings = []
        route = moe.routing_of

        def spy(tokens, training):
            routings.append((route(tokens, training), tokens))
            return routings[-1][0]

        moe.routing_of = spy
        model(BOTH, training=True)
        routing, tokens = routings[-1]
        probs = ops.convert_to_numpy(routing.probs).astype("float64")
        ids = ops.convert_to_numpy(tokens.context)
        mask = ops.convert_to_numpy(tokens.mask)
        expected_mask = np.concatenate(
            [np.ones((5, 4), bool), TEXTS != 0], axis=1
        )
        self.assertAllEqual(mask, expected_mask.reshape(-1))
        wanted = 0.0
        for modality, kind in enumerate(("image", "text")):
            own = probs[mask & (ids == modality)]
            local = np.mean([entropy(p) for p in own])
            general = entropy(own.mean(0))
            wanted += weights[f"{kind}_local_weight"] * local
            if kind == "text":
                general = -max(0.0, math.log(3.5) - general)
            wanted -= weights[f"{kind}_global_weight"] * general
        added = [ops.convert_to_numpy(value) for value in model.losses]
        contrastive = ops.convert_to_numpy(model.head.losses[-1])
        self.assertLen(added, 5)
        self.assert_relative(sum(added) - contrastive, wanted)
        model(BOTH)
        self.assertLen(model.losses, 1)

    def test_defaults(self):
        model = image_text(losses=losses.RouterZLoss(0.1))
        moe = model.get_layer("block_1").feed_forward
        found = [
            (
                type(x).__name__,
                getattr(x, "kind", None),
                getattr(x, "modality", None),
            )
            for x in moe.routing_losses
        ]
        self.assertEqual(
            found,
            [
                ("ImportanceLoss", None, None),
                ("LoadLoss", None, None),
                ("EntropyLoss", "marginal", 0),
                ("EntropyLoss", "token", 1),
                ("EntropyLoss", "marginal", 1),
                ("RouterZLoss", None, None),
            ],
        )
        self.assertEqual(moe.router.top_k, 1)
        self.assertEqual(moe.capacity.drop_policy, "priority")
        self.assertIsNone(moe.routing_losses[2].threshold)
        router = image_text(router="expert_choice", capacity_factor=1.0)
        router(BOTH)


def entropy(p):
    return float(-np.sum(p * np.log(p)))


class ModelTest(TestCase):
    def test_fit_and_save(self):
        model = image_text(drop_path=0.1, contrastive_loss="sigmoid")
        model.compile(
            keras.optimizers.Adam(0.01),
            jit_compile=keras.config.backend() == "jax",
        )
        before = model.evaluate(BOTH, verbose=0)
        history = model.fit(BOTH, epochs=12, verbose=0).history
        self.assertLess(model.evaluate(BOTH, verbose=0), before)
        self.assertIn("routing_dropped_fraction", history)
        wanted = model.predict(BOTH, batch_size=2, verbose=0)
        path = self.get_temp_dir() + "/model.keras"
        model.save(path)
        loaded = keras.saving.load_model(path)
        self.assertIs(type(loaded), ImageTextMoE)
        self.assertEqual(loaded.get_config(), model.get_config())
        folder = self.get_temp_dir() + "/preset"
        model.save_to_preset(folder)
        for again in (loaded, ImageTextMoE.from_preset(folder)):
            outputs = again.predict(BOTH, verbose=0)
            for name in wanted:
                self.assert_relative(outputs[name], wanted[name])
            self.assert_relative(again.text_encoder()(TEXTS), wanted["texts"])

    def test_exported(self):
        model = randomize(
            image_text(num_layers=1, moe_layers=[0], num_experts=2)
        )
        wanted = model.predict(BOTH, verbose=0)
        served = export(self, model)
        outputs = served({k: v[:3] for k, v in BOTH.items()})
        for name, value in wanted.items():
            output = outputs[name]
            if keras.config.backend() == "torch":
                output = output.detach()
            self.assert_relative(np.asarray(output), value[:3])

    def test_half_precision_and_channels_first(self):
        model = randomize(image_text())
        half = image_text(dtype="mixed_bfloat16")
        half.set_weights(model.get_weights())
        outputs = half(BOTH)
        self.assertEqual(dtype_of(outputs["images"]), "bfloat16")
        self.assertEqual(dtype_of(half.losses[-1]), "float32")
        first = image_text(image_shape=(3, 8, 8), data_format="channels_first")
        first.set_weights(model.get_weights())
        outputs = first({**BOTH, "images": IMAGES.transpose(0, 3, 1, 2)})
        self.assert_relative(
            outputs["images"], ops.convert_to_numpy(model(BOTH)["images"])
        )

    @parameterized.named_parameters(
        ("length", {"text_length": 0}, "`text_length` must be"),
        ("words", {"vocabulary_size": 0}, "`vocabulary_size` must be"),
        ("padding", {"padding_id": -1}, "`padding_id` must be"),
        ("width", {"projection_dim": 0}, "`projection_dim` must be"),
        ("heads", {"num_heads": 3}, "`num_heads` must divide `hidden_dim`"),
        ("blocks", {"moe_layers": [2]}, "`moe_layers` must be"),
        ("weight", {"text_local_weight": -1}, "`text_local_weight` must be"),
        ("global", {"image_global_weight": "1"}, "`image_global_weight` must"),
        ("few", {"min_text_experts": 1}, "`min_text_experts` must be a number"),
        ("loss", {"contrastive_loss": "x"}, "`loss` must be one of"),
        ("shape", {"image_shape": (8, 8)}, "`image_shape` must be three"),
        ("sizes", {"patch_size": 3}, "must divide"),
    )
    def test_errors(self, arguments, words):
        with self.assertRaisesRegex(ValueError, words):
            image_text(**arguments)
