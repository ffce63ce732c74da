import numpy as np

from keras_moe import layers
from keras_moe import models
from tests.recommendation.models.small_data import array
from tests.recommendation.models.small_data import check_fit_and_save
from tests.recommendation.models.small_data import check_save
from tests.recommendation.models.small_data import dense
from tests.recommendation.models.small_data import make_data
from tests.recommendation.models.small_data import make_features
from tests.recommendation.models.small_data import outputs_of
from tests.recommendation.models.small_data import scramble
from tests.recommendation.models.small_data import sigmoid
from tests.recommendation.models.small_data import small_tasks
from tests.test_case import TestCase


def transferred(layer, before, own):
    """One step of the transfer, example by example."""
    info_kernel, info_bias = (array(v)[0] for v in layer.infos[0].weights)
    query, key, value = array(layer.attentions[0].kernel)
    rows = []
    for p, q in zip(before, own, strict=True):
        both = np.stack([q, np.maximum(p @ info_kernel + info_bias, 0)])
        logits = np.sum((both @ query) * (both @ key), axis=1)
        weights = np.exp(logits / np.sqrt(len(q)))
        rows.append(weights / weights.sum() @ (both @ value))
    return np.stack(rows)


class AITMTest(TestCase):
    def test_matches_numpy(self):
        x, y = make_data()
        model = models.AITM(
            small_tasks(), make_features(), bottom_units=(6,), name="aitm"
        )
        scramble(model)
        e = outputs_of(model, x, "features")["features"]
        bottom = dense(model, "bottom_0", e, "relu")
        click, buy = (
            dense(model, f"{name}_tower_0", bottom, "relu")
            for name in ("click", "buy")
        )
        buy = transferred(model.get_layer("transfer"), click, buy)
        expected = {
            "click": sigmoid(dense(model, "click_logits", click)),
            "buy": sigmoid(dense(model, "buy_logits", buy)),
        }
        p = model.predict(x, verbose=0)
        for name, value in expected.items():
            np.testing.assert_allclose(p[name], value, atol=1e-5)
        logs, loaded = check_fit_and_save(self, model, x, y)
        above = np.maximum(expected["buy"] - expected["click"], 0).mean()
        np.testing.assert_allclose(
            logs["loss"],
            logs["click_loss"] + logs["buy_loss"] + 0.6 * above,
            rtol=1e-4,
        )
        self.assertEqual(loaded.get_config()["bottom_units"], (6,))

    def test_without_bottom(self):
        x, _ = make_data()
        model = models.AITM(small_tasks(), make_features(), stop_gradient=True)
        self.assertTrue(model.get_layer("transfer").stop_gradient)
        found = outputs_of(model, x, "features", "buy_tower_0")
        np.testing.assert_allclose(
            found["buy_tower_0"],
            dense(model, "buy_tower_0", found["features"], "relu"),
            atol=1e-5,
        )

    def test_errors(self):
        regression = models.TaskSpec("stars", "regression")
        with self.assertRaisesRegex(ValueError, "all tasks must be binary"):
            models.AITM(["click", regression], make_features())
        models.AITM(
            ["click", regression], make_features(), calibration_weight=0.0
        )
        with self.assertRaisesRegex(ValueError, "`tasks` must be at least two"):
            models.AITM(["click"], make_features())
        with self.assertRaisesRegex(ValueError, "these of AITMTransfer"):
            models.AITM(["click", "buy"], make_features(), gates=1)


class AITMHeadsTest(TestCase):
    def test_on_other_trunks(self):
        x, y = make_data()
        transfer = layers.AITMTransfer(share_attention=True)
        heads = models.AITMHeads(transfer, calibration_weight=0.25)
        options = {"expert_units": (4,), "heads": heads}
        model = models.MMoE(small_tasks(), make_features(), 2, **options)
        _, loaded = check_fit_and_save(self, model, x, y)
        self.assertEqual(loaded.heads.calibration_weight, 0.25)
        self.assertTrue(loaded.heads.transfer.share_attention)
        options["heads"] = "aitm"
        model = models.PLE(small_tasks(), make_features(), 1, **options)
        check_save(self, model, x)

    def test_config(self):
        heads = models.AITMHeads()
        again = models.AITMHeads.from_config(heads.get_config())
        self.assertIsNone(again.transfer)
        with self.assertRaisesRegex(ValueError, "`calibration_weight` must"):
            models.AITMHeads(calibration_weight=-1.0)
