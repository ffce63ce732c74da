"""Masked tokens, no tokens, one expert, zeros, half precision: all losses."""

import keras
import numpy as np
from absl.testing import parameterized
from keras import ops

from tests.losses.cases import CASES
from tests.losses.cases import MASK
from tests.losses.cases import SEQUENCES
from tests.losses.cases import E
from tests.losses.cases import K
from tests.losses.cases import LoadRouting
from tests.losses.cases import arrays
from tests.losses.cases import routing_of
from tests.losses.cases import tensors
from tests.losses.cases import with_per
from tests.losses.gradients import value_and_gradient
from tests.losses.gradients import values_and_gradients
from tests.test_case import TestCase


class DegenerateRoutingsTest(TestCase):
    @parameterized.parameters(*CASES)
    def test_what_masked_tokens_hold_reaches_nothing(self, name):
        loss = CASES[name][0]
        logits, indices = arrays()
        r = routing_of(logits, indices)
        fields = (r.logits, r.probs, r.expert_weights, r.load)
        flat = np.concatenate(fields, axis=1)
        ends = np.cumsum([x.shape[1] for x in fields])[:-1].tolist()
        indices = ops.array(np.where(MASK[:, None], indices, 0), "int32")

        def actual(flat):
            logits, probs, weights, load = ops.split(flat, ends, axis=1)
            routing = LoadRouting(logits, probs, indices, weights, load)
            return loss(routing, ops.array(MASK), SEQUENCES)

        nan = np.where(MASK[:, None], flat, np.nan)
        (value, gradient), (nan_value, nan_gradient) = values_and_gradients(
            actual, flat, nan
        )
        self.assertTrue(np.isfinite(gradient).all())
        self.assertEqual(nan_value, value)
        self.assertAllEqual(nan_gradient, gradient)
        self.assertAllEqual(gradient[~MASK], np.zeros_like(gradient[~MASK]))

    @parameterized.parameters(*CASES)
    def test_degenerate_batches(self, name):
        loss = CASES[name][0]
        if name in ("devices", "communication"):  # 1 device for 1 expert
            single = type(loss).from_config(
                {k: 1 for k in loss.get_config()} | {"per": "batch"}
            )
        else:
            single = loss
        for sizes in ((1, E, K), (0, E, K), (2, E, E), (3, 1, 1)):
            num_tokens = sizes[0]
            loss = single if sizes[1] == 1 else loss
            r = tensors(routing_of(*arrays(3, *sizes)))
            self.assertTrue(np.isfinite(float(loss(r))))
            masked = float(loss(r, ops.zeros((num_tokens,), "bool")))
            self.assertEqual(masked, 0.0)
            if num_tokens == 0:
                self.assertEqual(float(loss(r)), 0.0)
                if name != "z":  # no sequence of some length
                    per = with_per(loss, "sequence")
                    self.assertEqual(float(per(r, None, 0)), 0.0)
                    self.assertEqual(float(per(r, None, 4)), 0.0)

    @parameterized.parameters(*CASES)
    def test_scores_of_zero_have_finite_gradients(self, name):
        loss = CASES[name][0]
        indices = np.full((4, 2), E)  # no expert is chosen, as with ReLU scores

        def actual(probs):
            return loss(
                LoadRouting(
                    probs,
                    ops.relu(probs),
                    ops.array(indices, "int32"),
                    ops.relu(probs)[:, :2],
                    ops.relu(probs),
                )
            )

        value, gradient = value_and_gradient(actual, -np.ones((4, E)))
        self.assertTrue(np.isfinite(value))
        self.assertTrue(np.isfinite(gradient).all())

    @parameterized.parameters(*CASES)
    def test_float16_routings(self, name):
        loss = CASES[name][0]
        r = routing_of(*arrays(num_tokens=300))
        # Sums over 6000 tokens, which count half precision cannot.
        r = LoadRouting(*(np.tile(x, (20, 1)) for x in r))
        value = loss(tensors(r, "float16"))
        self.assertEqual(
            keras.backend.standardize_dtype(value.dtype), "float32"
        )
        self.assertAllClose(value, loss(tensors(r)), rtol=5e-3, atol=1e-3)
