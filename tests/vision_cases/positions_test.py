"""Positions resized as google-research/vmoe does it, on recorded arrays."""

import math

import numpy as np
from absl.testing import parameterized

from keras_moe.layers import PatchEmbedding
from tests.test_case import TestCase
from tests.vision_cases import cases


def matches(meta, arrays):
    names = {name.split("/")[-1] for name in arrays}
    return {"from", "target_before", "to"} <= names


PAIRS = [
    (f"{name}_{pair}", case.under(f"{pair}/"))
    for name, case in cases.named(matches)
    for pair in sorted({key.split("/")[0] for key in case.arrays})
]


def embedding(positions):
    """A layer with these positions, `(1, tokens, D)` of a square grid."""
    _, tokens, dim = positions.shape
    side = math.isqrt(tokens)
    layer = PatchEmbedding(
        dim,
        patch_size=2,
        use_class_token=side**2 != tokens,
        data_format="channels_last",
    )
    layer.build((None, 2 * side, 2 * side, 1))
    layer.positions.assign(positions)
    return layer


class PositionsTest(TestCase):
    @parameterized.named_parameters(PAIRS)
    def test_resized(self, arrays):
        layer = embedding(arrays["target_before"])
        layer.assign_positions_of(embedding(arrays["from"]))
        self.assert_relative(layer.positions, arrays["to"], 1e-6)
        self.assertFalse(np.array_equal(arrays["target_before"], arrays["to"]))
