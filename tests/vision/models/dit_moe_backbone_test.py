import keras
import numpy as np
from absl.testing import parameterized
from keras import ops

from keras_moe import routers
from keras_moe.models import DiTMoEBackbone
from keras_moe.models import MoEImageClassifier
from tests.exported import export
from tests.test_case import TestCase
from tests.vision.models.image_classifier_test import counted
from tests.vision.models.image_classifier_test import presets_of
from tests.vision.models.tiny import IMAGES
from tests.vision.models.tiny import dit_moe
from tests.vision.models.tiny import dtype_of
from tests.vision.models.tiny import randomize

INPUTS = {
    "images": IMAGES,
    "timesteps": np.array([0, 999, 3, 500, 80], "float32"),
    "labels": np.array([0, 1, 2, 3, 0], "int32"),
}


def first(number):
    return {name: value[:number] for name, value in INPUTS.items()}


class DiTMoEBackboneTest(TestCase):
    @parameterized.named_parameters(
        ("dit_moe", {}),
        ("expert_choice", {"router": "expert_choice", "label_dropout": 0.0}),
        (
            "router_inputs",
            {
                "router_inputs": "unmodulated_and_condition",
                "moe_layers": "last_1",
                "learn_sigma": True,
            },
        ),
        (
            "capacity",
            {"capacity_factor": 1.0, "group_size": 3, "positions": "learned"},
        ),
        ("dense", {"moe_layers": [], "qk_norm": True, "drop_path": 0.1}),
    )
    def test_saved(self, options):
        backbone = randomize(dit_moe(**options))
        wanted = ops.convert_to_numpy(backbone(INPUTS))
        self.assertEqual(wanted.shape, (5, *backbone.output_shape[1:]))
        self.assertEqual(
            wanted.shape[-1], 6 if options.get("learn_sigma") else 3
        )
        path = self.get_temp_dir() + "/model.keras"
        backbone.save(path)
        loaded = keras.saving.load_model(path)
        self.assertEqual(loaded.get_config(), backbone.get_config())
        self.assert_relative(loaded(INPUTS), wanted)
        # An image does not depend on the rest of the batch.
        self.assert_relative(backbone(first(2)), wanted[:2])
        # It does depend on the time and the class.
        for name, value in (("timesteps", 7.0), ("labels", 2)):
            other = {**INPUTS, name: np.full_like(INPUTS[name], value)}
            difference = ops.convert_to_numpy(backbone(other)) - wanted
            self.assertGreater(np.abs(difference).max(axis=(1, 2, 3))[0], 1e-3)

    def test_starts_with_zeros(self):
        self.assertEqual(
            np.abs(ops.convert_to_numpy(dit_moe()(INPUTS))).max(), 0
        )

    def test_blocks(self):
        self.assertEqual(dit_moe(num_layers=3).moe_blocks, [0, 1, 2])
        self.assertEqual(
            dit_moe(num_layers=4, moe_layers="every_2").moe_blocks, [1, 3]
        )
        self.assertEqual(
            dit_moe(num_layers=3, moe_layers="last_2").moe_blocks, [1, 2]
        )
        backbone = dit_moe(
            num_experts=[2, 4],
            router=["dit_moe", routers.ExpertChoiceRouter(4, per="sequence")],
            top_k=[1, None],
            num_shared_experts=0,
        )
        first, second = (backbone.block(i).feed_forward for i in range(2))
        self.assertEqual((first.num_experts, second.num_experts), (2, 4))
        self.assertFalse(first.router.normalize_weights)
        self.assertIsNone(first.shared_experts)
        (loss,) = first.routing_losses
        self.assertEqual(
            (loss.weight, loss.per, loss.assignments), (0.01, "sequence", "all")
        )
        self.assertEqual(second.routing_losses, [])
        again = DiTMoEBackbone.from_config(
            keras.saving.serialize_keras_object(backbone)["config"]
        )
        self.assertEqual(again.block(1).feed_forward.router.per, "sequence")

    def test_expert_choice_in_the_batch(self):
        """Only where it is asked for, experts choose among all images."""
        backbone = randomize(dit_moe(router="expert_choice", group_size=None))
        wanted = ops.convert_to_numpy(backbone(INPUTS))[:2]
        difference = ops.convert_to_numpy(backbone(first(2))) - wanted
        self.assertGreater(np.abs(difference).max(), 1e-3)

    def test_training(self):
        backbone = randomize(dit_moe(label_dropout=0.999))
        outputs = ops.convert_to_numpy(backbone(INPUTS, training=True))
        none = {**INPUTS, "labels": np.full(5, 3, "int32")}
        self.assert_relative(outputs, ops.convert_to_numpy(backbone(none)))
        backbone(INPUTS, training=True)
        self.assertLen(backbone.losses, 2)

    def test_channels_first(self):
        backbone = randomize(dit_moe(learn_sigma=True))
        other = dit_moe(
            image_shape=(3, 8, 8),
            data_format="channels_first",
            learn_sigma=True,
        )
        other.set_weights(backbone.get_weights())
        wanted = ops.convert_to_numpy(backbone(INPUTS)).transpose(0, 3, 1, 2)
        images = IMAGES.transpose(0, 3, 1, 2)
        self.assert_relative(other({**INPUTS, "images": images}), wanted)

    def test_half_precision(self):
        single = randomize(dit_moe())
        half = dit_moe(dtype="mixed_bfloat16")
        half.set_weights(single.get_weights())
        outputs = half(INPUTS)
        self.assertEqual(dtype_of(outputs), "bfloat16")
        outputs = ops.convert_to_numpy(ops.cast(outputs, "float32"))
        wanted = ops.convert_to_numpy(single(INPUTS))
        error = np.median(np.abs(outputs - wanted))
        self.assertLess(error, 0.05 * np.abs(wanted).max())

    def test_exported(self):
        model = randomize(dit_moe(num_layers=1))
        wanted = model.predict(INPUTS, verbose=0)
        served = export(self, model)
        for number in (5, 2):
            outputs = served(first(number))
            if isinstance(outputs, (list, tuple)):
                (outputs,) = outputs
            if keras.config.backend() == "torch":
                outputs = outputs.detach()
            self.assert_relative(np.asarray(outputs), wanted[:number], 1e-4)

    @parameterized.named_parameters(
        ("sizes", {"image_shape": (8, 10, 3)}, r"must divide .* \(8, 10\)"),
        ("classes", {"num_classes": 0}, "`num_classes` must be an int"),
        ("heads", {"num_heads": 3}, "`num_heads` must divide `hidden_dim`"),
        ("beyond", {"moe_layers": [2]}, "Received: moe_layers=.2."),
        ("sigma", {"learn_sigma": 1}, "`learn_sigma` must be True or False"),
        ("router", {"router": "unheard"}, "`router` must be one of"),
        ("seen", {"router_inputs": "x"}, "`router_inputs` must be one of"),
        ("group", {"group_size": 0}, "`group_size` must be an int"),
        ("shared", {"num_shared_experts": -1}, "`num_shared_experts` must be"),
        ("width", {"shared_mlp_dim": 0}, "`shared_mlp_dim` must be an int"),
        ("labels", {"label_dropout": 1}, "`label_dropout` must be a number"),
        ("loss", {"load_balancing_loss_weight": -1}, "`weight` must be"),
    )
    def test_errors(self, arguments, words):
        with self.assertRaisesRegex(ValueError, words):
            dit_moe(**arguments)

    def test_wrong_labels(self):
        wrong = {**INPUTS, "labels": np.array([0, 1, 2, 3, 4])}
        with self.assertRaisesRegex(ValueError, "Received: 4, num_classes=3"):
            dit_moe()(wrong)

    def test_it_is_no_classifiers_backbone(self):
        with self.assertRaisesRegex(ValueError, "must be a ImageBackbone"):
            MoEImageClassifier(dit_moe(), 3)


# Of table 2 of the paper, in units of its last digit, which it cuts off.
PUBLISHED = {
    "dit_moe_s2_e8": (199, 71, 10**6),
    "dit_moe_b2_e8": (795, 286, 10**6),
    "dit_moe_xl2_e8": (41, 15, 10**8),
    "dit_moe_g2_e16": (165, 31, 10**8),
}


class PublishedCountsTest(TestCase):
    def test_all_are_counted(self):
        self.assertEqual(set(PUBLISHED), set(DiTMoEBackbone.presets))

    @parameterized.parameters(*presets_of(DiTMoEBackbone.presets))
    def test_count(self, name):
        config = DiTMoEBackbone.presets[name]["config"]
        dim, layers = config["hidden_dim"], config["num_layers"]
        experts = config["num_experts"]
        # Three kernels each; the shared ones have the width of the tokens.
        expert, shared = 3 * dim * config["mlp_dim"], 2 * 3 * dim * dim
        attention, modulation = 4 * (dim + 1) * dim, 6 * (dim + 1) * dim
        block = experts * (expert + dim) + shared + attention + modulation
        ends = (
            (2 * 2 * 4 + 1) * dim  # patches
            + (256 + 1 + dim + 1) * dim  # time steps
            + 1001 * dim  # classes
            + 2 * (dim + 1) * dim  # modulation of the head
            + (dim + 1) * 2 * 2 * 8
        )
        total = counted(DiTMoEBackbone.from_preset, name)
        self.assertEqual(total, layers * block + ends)
        active = total - layers * (experts - 2) * expert
        *published, unit = PUBLISHED[name]
        for count, wanted in zip((total, active), published, strict=True):
            self.assertLess(abs(count / unit - wanted), 1.0)
