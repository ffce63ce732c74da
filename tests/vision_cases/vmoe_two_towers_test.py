"""Two towers of google-research/vmoe: whole models on recorded arrays."""

from unittest import mock

import numpy as np
from absl.testing import parameterized

from keras_moe.layers import MoE
from tests.recommendation_cases.cases import run
from tests.routing_cases.cases import recorded_draws
from tests.test_case import TestCase
from tests.vision_cases import cases
from tests.vision_cases import vmoe
from tests.vision_cases import vmoe_two_towers as two_towers
from tests.vision_cases.dit_moe_test import WithLosses

NAMED = cases.named(two_towers.matches)
MODES = [
    (f"{name}_{'training' if prefix else 'inference'}", case, prefix)
    for name, case in NAMED
    for prefix in ("", "train/")
    if f"{prefix}y" in case.arrays
]


def blocks_of(case):
    return sorted(
        (case.config["encoder"].get("moe") or {"layers": []})["layers"]
    )


def draws(case, prefix):
    """Every block draws once, images first; for inference, zeros."""
    normal = []
    for name in two_towers.TOWERS:
        tower = two_towers.tower(case, name)
        for block in blocks_of(tower):
            if prefix:
                normal.append(tower.arrays[f"train/noise_unit/{block}"])
            else:
                like = tower.arrays[f"route/{block}/combine"]
                normal.append(np.zeros_like(like))
    return recorded_draws(normal=normal)


def inputs_of(case):
    return {
        "x": case.arrays["x"],
        "text": case.arrays["text"].astype("int32"),
    }


class TwoTowersTest(TestCase):
    @parameterized.named_parameters(MODES)
    def test_outputs_and_gradients(self, case, prefix):
        """The original has losses in inference too, but for that of loads."""
        model = two_towers.model_from_case(case, load_loss=bool(prefix))
        with draws(case, prefix):
            outputs, d_inputs, d_weights = run(
                WithLosses(model, True),
                inputs_of(case),
                {
                    "y": case.arrays["cotangent"],
                    "auxiliary_loss": np.ones((), "float32"),
                },
            )
        for name in ("y", "zimg", "ztxt", "auxiliary_loss"):
            if prefix + name in case.arrays:
                wanted = case.arrays[prefix + name]
                self.assert_relative(outputs[name], wanted)
        self.assert_relative(d_inputs["x"], case.arrays[f"{prefix}grad/x"])
        found = {
            two_towers.original_name(path): gradient
            for path, gradient in d_weights.items()
        }
        recorded = case.under(f"{prefix}grad/w/")
        self.assertNotEmpty(recorded)
        for name, wanted in recorded.items():
            with self.subTest(name):
                scale = np.abs(wanted).max()
                actual = found[name].reshape(wanted.shape)
                self.assert_relative(actual / scale, wanted / scale)

    @parameterized.named_parameters(MODES)
    def test_routing(self, case, prefix):
        model = two_towers.model_from_case(case)
        routed = []
        watched = MoE._routed

        def spy(layer, tokens, routing, *args):
            routed.append((layer, tokens, routing))
            return watched(layer, tokens, routing, *args)

        with mock.patch.object(MoE, "_routed", spy), draws(case, prefix):
            model(inputs_of(case), training=True)
        for name in two_towers.TOWERS:
            tower = two_towers.tower(case, name)
            for block in blocks_of(tower):
                where = f"{prefix}route/{block}/"
                self.assertNotEmpty(tower.under(where))
                vmoe.assert_routing(self, tower, where, [routed.pop(0)])
        self.assertEqual(routed, [])

    @parameterized.named_parameters(NAMED)
    def test_inference(self, case):
        model = two_towers.model_from_case(case)
        outputs = model(inputs_of(case), training=False)
        self.assert_relative(outputs["y"], case.arrays["y"])
        self.assertEqual(model.losses, [])
