"""SNR: levels of experts with connections that are learned on or off."""

import keras
import numpy as np
from absl.testing import parameterized

from keras_moe import models
from tests.recommendation.models.model_checks import DIM
from tests.recommendation.models.model_checks import assert_predicts
from tests.recommendation.models.model_checks import batch
from tests.recommendation.models.model_checks import check_trains_and_saves
from tests.recommendation.models.model_checks import labels
from tests.recommendation.models.model_checks import specs
from tests.recommendation.models.model_checks import vectors
from tests.recommendation.models.numpy_trunks import network
from tests.recommendation.models.numpy_trunks import predictions
from tests.recommendation.models.numpy_trunks import randomize
from tests.recommendation.models.numpy_trunks import sigmoid
from tests.recommendation.models.numpy_trunks import weights_of
from tests.test_case import TestCase

STRUCTURE = {"num_experts": [3, 2], "expert_units": [[5], [3, 4]]}


def codes(w):
    return np.clip(sigmoid(w["log_alpha"]) * 1.2 - 0.1, 0, 1)


def by_hand(model, x, aver):
    reads = [x] * 3
    for i in range(2):
        w = weights_of(model.get_layer(f"experts_{i}"))
        outputs = [network(w, e, read) for e, read in enumerate(reads)]
        w = weights_of(model.get_layer(f"routing_{i}"))
        reads = [
            sum(
                code * (u if aver else u @ w["kernel"][j, e])
                for e, (code, u) in enumerate(zip(row, outputs, strict=True))
            )
            for j, row in enumerate(codes(w))
        ]
    return predictions(model, reads)


class SNRTest(TestCase):
    @parameterized.parameters(6, None)
    def test_by_hand(self, routing_units):
        tasks, aver = specs("a", "b"), routing_units is None
        model = models.SNR(
            tasks, vectors(), routing_units=routing_units, **STRUCTURE
        )
        read, written = (5, 4) if aver else (6, 6)
        count = 3 * (DIM * 5 + 5) + 2 * (read * 3 + 3 + 3 * 4 + 4)
        count += 2 * 3 + 2 * 2 + 2 * (written + 1)
        if not aver:
            count += 2 * 3 * 5 * 6 + 2 * 2 * 4 * 6
        self.assertEqual(model.count_params(), count)
        randomize(model)
        model.get_layer("routing_0").log_alpha.assign(
            [[-4.0, 0.3, 5.0], [0.1, -0.2, 1.0]]
        )
        x = batch()
        expected = by_hand(model, x["x"].astype("float64"), aver)
        assert_predicts(model, x, expected)
        found = model.connections()
        self.assertEqual([code.shape for code in found], [(2, 3), (2, 2)])
        np.testing.assert_array_equal(found[0][0, [0, 2]], [0, 1])

    def test_train_and_save(self):
        model = models.SNR(
            specs("a"), vectors(), l0_weight=1e-2, expert_dropout=0.2, seed=1
        )
        check_trains_and_saves(self, model, batch())

    def test_penalty(self):
        """With it and nothing to learn, connections turn off."""
        model = models.SNR(
            specs("a"),
            vectors(),
            num_levels=1,
            num_experts=3,
            l0_weight=1.0,
            stochastic=False,
        )
        model.compile(keras.optimizers.SGD(1.0))
        x, y = batch(), labels(model)
        on = model.evaluate(x, y, verbose=0, return_dict=True)["loss"]
        trained = model.train_on_batch(x, y, return_dict=True)["loss"]
        # The probability that a drawn code is above zero, at log_alpha = 0.
        penalty = 3 * sigmoid(-0.9 * np.log(0.1 / 1.1))
        self.assertAllClose(trained, on + penalty, rtol=1e-4)
        before = model.connections()[0]
        for _ in range(8):
            model.train_on_batch(x, y)
        self.assertLess(model.connections()[0].max(), before.min() - 0.1)

    @parameterized.parameters(
        ({"num_experts": [3]}, "`num_experts` must be"),
        ({"num_levels": 0}, "`num_levels` must be"),
        ({"l0_weight": -1}, "`l0_weight` must be"),
        ({"num_outputs": 2}, r"Received: \['num_outputs'\]"),
    )
    def test_errors(self, kwargs, message):
        with self.assertRaisesRegex(ValueError, message):
            models.SNR(specs("a"), vectors(), **kwargs)
        model = models.SNR(specs("a"), vectors())
        with self.assertRaisesRegex(ValueError, "SNR has no gates"):
            model.gate_weights(batch())
