"""Ensembles of experts: `VMoEBackbone(ensemble_size=...)` (E3)."""

import re

import keras
import numpy as np
from absl.testing import parameterized
from keras import ops

from keras_moe import losses
from keras_moe import routers
from keras_moe.layers import EncoderBlock
from keras_moe.models import MoEImageClassifier
from keras_moe.models import VMoEImageClassifier
from tests.exported import export
from tests.test_case import TestCase
from tests.vision.models.tiny import IMAGES
from tests.vision.models.tiny import dtype_of
from tests.vision.models.tiny import randomize
from tests.vision.models.tiny import v_moe

SIZES = {"num_layers": 3, "num_experts": 6, "moe_layers": [1, 2]}


def ensemble(**kwargs):
    return v_moe(**{**SIZES, "ensemble_size": 2, **kwargs})


def alone(backbone, member, **kwargs):
    """A model without an ensemble, of the weights of one member."""
    model = v_moe(**{**SIZES, "num_experts": 3, **kwargs})
    weights = {v.path: v for v in backbone.variables}
    for variable in model.trainable_variables:
        own = weights[re.sub("/moe/", f"/moe_{member}/", variable.path)]
        variable.assign(own)
    return model


class EnsembleTest(TestCase):
    @parameterized.named_parameters(
        ("plain", {}),
        ("shared", {"num_shared_experts": 1, "group_size": "image"}),
        ("expert_choice", {"router": "expert_choice"}),
        ("own_router", {"router": routers.TopKRouter(3)}),
        ("groups", {"group_size": 14, "eval_capacity_factor": 1.0}),
    )
    def test_members(self, options):
        """Each is a model of its own experts, and they differ."""
        backbone = randomize(ensemble(**options))
        outputs = ops.convert_to_numpy(backbone(IMAGES))
        self.assertEqual(outputs.shape, (5, 2, 5, 8))
        self.assertEqual(backbone.output_shape, (None, 2, 5, 8))
        if options.get("group_size") == 14:
            options = {**options, "group_size": 7}
        for member in range(2):
            model = alone(backbone, member, **options)
            self.assert_relative(model(IMAGES), outputs[:, member])
        self.assertGreater(np.abs(outputs[:, 0] - outputs[:, 1]).max(), 1e-2)
        path = self.get_temp_dir() + "/model.keras"
        backbone.save(path)
        loaded = keras.saving.load_model(path)
        self.assert_relative(loaded(IMAGES), outputs)

    def test_losses_are_means(self):
        options = {
            "router": "top_k",
            "capacity_factor": None,
            "importance_loss_weight": 0.3,
            "losses": [losses.RouterZLoss(0.2)],
        }
        backbone = randomize(ensemble(**options))
        total = []
        for member in range(2):
            model = alone(backbone, member, **options)
            model(IMAGES, training=True)
            total.append(ops.convert_to_numpy(sum(model.losses)))
        self.assertNotAllClose(total[0], total[1])
        backbone(IMAGES, training=True)
        self.assert_relative(sum(backbone.losses), np.mean(total))

    def test_ids_of_tasks(self):
        router = routers.TaskRouter(3, num_tasks=2, top_k=1)
        options = {"router": router, "moe_layers": [2]}
        backbone = randomize(ensemble(**options))
        inputs = [IMAGES, np.array([0, 1, 1, 0, 1], "int32")]
        outputs = ops.convert_to_numpy(backbone(inputs))
        for member in range(2):
            model = alone(backbone, member, **options)
            self.assert_relative(model(inputs), outputs[:, member])

    @parameterized.parameters("token", "gap", "map")
    def test_classifier(self, pooling):
        backbone = randomize(ensemble())
        model = randomize(MoEImageClassifier(backbone, 3, pooling=pooling))
        randomize(backbone)
        outputs = ops.convert_to_numpy(model(IMAGES))
        self.assertEqual(model.output_shape, (None, 2, 3))
        for member in range(2):
            own = MoEImageClassifier(
                alone(backbone, member), 3, pooling=pooling
            )
            for layer in ("predictions", "pooling"):
                if layer == "predictions" or pooling == "map":
                    own.get_layer(layer).set_weights(
                        model.get_layer(layer).get_weights()
                    )
            self.assert_relative(own(IMAGES), outputs[:, member])

    def test_fit(self):
        backbone = ensemble(num_layers=2, moe_layers=[1], group_size=8)
        model = VMoEImageClassifier(backbone, 3, activation="softmax")
        model.compile(
            keras.optimizers.Adam(0.01),
            "sparse_categorical_crossentropy",
            metrics=["accuracy"],
            # The classifier's own test of fit is in a graph.
            run_eagerly=keras.config.backend() == "tensorflow",
            jit_compile=keras.config.backend() == "jax",
        )
        labels = np.repeat((np.arange(5) % 3)[:, None], 2, axis=1)
        history = model.fit(IMAGES, labels, epochs=6, verbose=0).history
        self.assertLess(history["loss"][-1], history["loss"][0])
        self.assertIn("routing_dropped_fraction", history)
        wanted = model.predict(IMAGES, verbose=0)
        self.assertEqual(wanted.shape, (5, 2, 3))
        path = self.get_temp_dir() + "/model.keras"
        model.save(path)
        loaded = keras.saving.load_model(path)
        self.assert_relative(loaded(IMAGES), wanted)

    def test_exported(self):
        backbone = ensemble(
            num_layers=1, moe_layers=[0], num_experts=2, top_k=1
        )
        model = randomize(MoEImageClassifier(backbone, 3))
        wanted = model.predict(IMAGES, verbose=0)
        outputs = export(self, model)(IMAGES[:3])
        if isinstance(outputs, (list, tuple)):
            (outputs,) = outputs
        if keras.config.backend() == "torch":
            outputs = outputs.detach()
        self.assert_relative(np.asarray(outputs), wanted[:3])

    def test_half_precision(self):
        backbone = ensemble(dtype="mixed_bfloat16")
        self.assertEqual(dtype_of(backbone(IMAGES)), "bfloat16")

    @parameterized.named_parameters(
        ("size", {"ensemble_size": 0}, "`ensemble_size` must be an int"),
        (
            "experts",
            {"ensemble_size": 4},
            "divide `num_experts`.*num_experts=6",
        ),
        ("choices", {"top_k": 4}, "`top_k` must be"),
        ("group", {"group_size": 7}, "divide `group_size`.*group_size=7"),
        ("blocks", {"moe_layers": []}, "`moe_layers` must name a block"),
        ("router", {"router": routers.TopKRouter(6)}, "must agree"),
        ("loss", {"losses": lambda *args: 0.0}, "`losses` must be"),
        ("weight", {"load_loss_weight": -1.0}, "`load_loss_weight` must be"),
    )
    def test_errors(self, arguments, words):
        with self.assertRaisesRegex(ValueError, words):
            ensemble(**arguments)

    def test_block_without_layers(self):
        for layers in ([], [None], None):
            with self.assertRaisesRegex(ValueError, "or a list of layers"):
                EncoderBlock(2, layers)
        block = EncoderBlock(
            2, [keras.layers.Dense(8), keras.layers.Dense(8)], name="block"
        )
        again = EncoderBlock.from_config(block.get_config())
        self.assertLen(again.members, 2)
        self.assertEqual(tuple(again(np.ones((4, 3, 8))).shape), (4, 3, 8))
