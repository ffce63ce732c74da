"""Dense encoders of timm and transformers on recorded arrays, and upcycled.

Positions of a larger image are resized here, as the originals do it (bicubic):
`resize_positions` of the library does as V-MoE does (linear).
"""

import re

import numpy as np
from absl.testing import parameterized
from keras import ops

from keras_moe.conversion import upcycle
from keras_moe.conversion.sublayers import with_sublayers
from keras_moe.layers import MoE
from tests.recommendation_cases.cases import run
from tests.test_case import TestCase
from tests.vision_cases import cases
from tests.vision_cases.dense import Encoder
from tests.vision_cases.dense import matches

NAMED = cases.named(matches)
LARGER = [
    (f"{name}_{images}", case, images)
    for name, case in NAMED
    for images in case.arrays
    if re.fullmatch(r"x\d+", images)
]


def images_last(value):
    return value.transpose(0, 2, 3, 1).copy()


class DenseEncodersTest(TestCase):
    in_graph = False

    @parameterized.named_parameters(NAMED)
    def test_case(self, case):
        encoder = Encoder(case)
        outputs, d_inputs, d_weights = run(
            encoder.watched,
            {"x": images_last(case.arrays["x"])},
            {"y": case.arrays["cotangent"]},
        )
        gradients = encoder.recorded.gradients(d_weights)
        compared = []
        for name, value in case.arrays.items():
            if name in outputs:
                self.assert_relative(outputs[name], value)
                compared.append(name)
            elif name.startswith("grad/w/"):
                found = gradients[name.removeprefix("grad/w/")]
                scale = np.abs(value).max()
                self.assert_relative(found / scale, value / scale)
        scale = np.abs(case.arrays["grad/x"]).max()
        self.assert_relative(
            d_inputs["x"] / scale, images_last(case.arrays["grad/x"]) / scale
        )
        self.assertIn("y", compared)
        self.assertGreaterEqual(len(compared), 2 + 2 * encoder.num_blocks)

    @parameterized.named_parameters(LARGER)
    def test_larger_images(self, case, images):
        found = Encoder(case, images).model(images_last(case.arrays[images]))
        self.assert_relative(found, case.arrays[f"y{images[1:]}"])

    @parameterized.named_parameters(NAMED)
    def test_upcycled(self, case):
        encoder = Encoder(case)
        if encoder.gated:
            with self.assertRaisesRegex(ValueError, "none was found among"):
                upcycle(encoder.model, 4)
            return
        images = images_last(case.arrays["x"])
        model = upcycle(encoder.model, 4, layers="all")
        self.assert_relative(model(images), case.arrays["y"])
        found = [p for p in with_sublayers(model) if isinstance(p, MoE)]
        self.assertLen(found, encoder.num_blocks)
        for i, moe in enumerate(found):
            given = moe(ops.convert_to_tensor(case.arrays[f"mlp/{i}/in"]))
            self.assert_relative(given, case.arrays[f"mlp/{i}/out"])
