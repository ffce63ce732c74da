"""CLIP-MoE's image tower on recorded arrays."""

import numpy as np
from absl.testing import parameterized
from keras import ops

from tests.recommendation_cases.cases import run
from tests.test_case import TestCase
from tests.vision_cases import cases
from tests.vision_cases import clip_moe

NAMED = cases.named(clip_moe.matches)


def images_last(value):
    return value.transpose(0, 2, 3, 1).copy()


class CLIPMoETest(TestCase):
    in_graph = False

    @parameterized.named_parameters(NAMED)
    def test_case(self, case):
        model, recorded, layers = clip_moe.model_from_case(case)
        inputs = {"x": images_last(case.arrays["x"])}
        outputs, d_inputs, d_weights = run(
            model,
            inputs,
            {
                "y": case.arrays["cotangent"],
                "auxiliary_loss": np.ones((), "float32"),
            },
        )
        found = {**outputs, "grad/x": d_inputs["x"]}
        for name, value in recorded.gradients(d_weights).items():
            found[f"grad/w/{name}"] = value
        images = len(case.arrays["x"])
        compared = 0
        for name, value in case.arrays.items():
            if name not in found:
                continue
            if name == "grad/x":
                value = images_last(value)
            elif name.startswith("route/"):
                # The original goes token by token over all images.
                value = value.reshape(-1, images, value.shape[-1])
                value = value.transpose(1, 0, 2).reshape(found[name].shape)
            with self.subTest(name):
                scale = np.abs(value).max()
                self.assert_relative(found[name] / scale, value / scale)
            compared += 1
        gradients = [name for name in case.arrays if name.startswith("grad/")]
        self.assertEqual(compared, 2 + len(gradients) + 2 * len(layers))

    @parameterized.named_parameters(NAMED)
    def test_loss_of_one_layer(self, case):
        """Where the original has one layer of experts, its loss is ours."""
        model, _, layers = clip_moe.model_from_case(case)
        model({"x": images_last(case.arrays["x"])}, training=True)
        self.assertLen(model.losses, len(layers))
        if len(layers) == 1:
            self.assert_relative(
                ops.convert_to_numpy(model.losses[0]),
                case.arrays["auxiliary_loss"],
            )
