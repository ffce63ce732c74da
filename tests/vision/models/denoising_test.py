"""Noise schedules and DDIM, against their definitions in loops."""

import math

import numpy as np
from absl.testing import parameterized

from keras_moe.vision.models import denoising
from tests.test_case import TestCase


class DenoisingTest(TestCase):
    @parameterized.parameters(("linear", 1000), ("linear", 40), ("cosine", 50))
    def test_schedules(self, kind, number):
        signal, noise = denoising.noise_schedule(kind, number)
        kept = 1.0
        for t in range(number):
            if kind == "linear":
                share = t / (number - 1)
                beta = (1e-4 + share * (0.02 - 1e-4)) * 1000 / number
            else:
                now, then = (
                    math.cos((s / number + 0.008) / 1.008 * math.pi / 2) ** 2
                    for s in (t, t + 1)
                )
                beta = 1 - then / now
            kept *= 1 - min(beta, 0.999)
            self.assertAlmostEqual(signal[t] ** 2, kept)
            self.assertAlmostEqual(noise[t] ** 2, 1 - kept)
        self.assertLess(signal[-1], 0.02)  # nothing is left of the image

    def test_timesteps(self):
        times = denoising.sampled_timesteps(1000, 5)
        self.assertEqual(times.tolist(), [999, 749, 500, 250, 0])
        self.assertEqual(denoising.sampled_timesteps(1000, 1).tolist(), [999])
        times = denoising.sampled_timesteps(7, 7)
        self.assertEqual(times.tolist(), [6, 5, 4, 3, 2, 1, 0])
        with self.assertRaisesRegex(ValueError, "steps=8, num_timesteps=7"):
            denoising.sampled_timesteps(7, 8)

    def test_the_noise_that_was_added_is_taken_out(self):
        rng = np.random.default_rng(0)
        image, noise = rng.normal(size=(2, 1, 4, 4, 1))
        levels = list(zip(*denoising.noise_schedule("cosine", 20), strict=True))
        levels = [*levels[::-3], (1.0, 0.0)]
        x = levels[0][0] * image + levels[0][1] * noise
        for level, following in zip(levels[:-1], levels[1:], strict=True):
            x = denoising.denoised(x, noise, level, following)
            wanted = following[0] * image + following[1] * noise
            np.testing.assert_allclose(x, wanted, atol=1e-6)
        np.testing.assert_allclose(x, image, atol=1e-6)

    def test_clipped(self):
        """By hand: the image is 2, which becomes 1, and so the noise 2.5."""
        x = denoising.denoised(
            np.array([0.6 * 2 + 0.8]), np.array([1.0]), (0.6, 0.8), (0.8, 0.6)
        )
        np.testing.assert_allclose(x, [0.8 * 2 + 0.6])
        x = denoising.denoised(
            np.array([0.6 * 2 + 0.8]),
            np.array([1.0]),
            (0.6, 0.8),
            (0.8, 0.6),
            (-1, 1),
        )
        np.testing.assert_allclose(x, [0.8 + 0.6 * (2.0 - 0.6) / 0.8])

    def test_guidance(self):
        called = []

        def predict(images, labels):
            called.append(labels.tolist())
            return images * (1.0 + labels)

        images, labels = np.array([1.0, 2.0]), np.array([0, 1])
        for guidance, wanted in ((1, [1, 4]), (0, [4, 8]), (3, [-5, -4])):
            found = denoising.guided(predict, images, labels, 3, guidance)
            np.testing.assert_allclose(found, wanted)
        self.assertEqual(called, [[0, 1], [0, 1, 3, 3], [0, 1, 3, 3]])
