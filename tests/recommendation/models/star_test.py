import keras
import numpy as np

from keras_moe import layers
from keras_moe import models
from keras_moe.recommendation.models.domains import domain_of
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


def normalized(model, x, domain):
    layer = model.get_layer("normalization")
    gamma, beta, own_gamma, own_beta, mean, variance = map(array, layer.weights)
    z = (x - mean[domain]) / np.sqrt(variance[domain] + layer.epsilon)
    return gamma * own_gamma[domain] * z + beta + own_beta[domain]


def star_layers(model, x, domain):
    """The layers of STAR from a model's weights, example by example."""
    rows = []
    for h, d in zip(x, domain, strict=True):
        for layer in model.layers:
            if isinstance(layer, layers.STARDense):
                kernel, own_kernel, bias, own_bias = map(array, layer.weights)
                h = h @ (kernel * own_kernel[d]) + bias + own_bias[d]
                h = np.maximum(h, 0)
        rows.append(h)
    return np.stack(rows)


class STARTest(TestCase):
    def test_matches_numpy(self):
        x, y = make_data()
        names = ["click", "buy"]
        model = models.STAR(names, make_features(), "tab", units=(5, 4))
        scramble(model)
        embedded = outputs_of(model, x, "features")["features"]
        # Missing is domain 0, unknown 1.
        domain = np.select(
            [x["tab"] == -1, x["tab"] == -2], [0, 1], x["tab"] + 2
        )
        self.assertEqual(set(domain), {0, 1, 2, 3})
        h = star_layers(model, normalized(model, embedded, domain), domain)
        aside = dense(model, "auxiliary_0", embedded, "relu")
        p = model.predict(x, verbose=0)
        for name in names:
            logits = dense(model, f"{name}_logits", h)
            logits += dense(model, f"{name}_auxiliary", aside)
            np.testing.assert_allclose(p[name], sigmoid(logits), atol=1e-5)
        check_fit_and_save(self, model, x, y)

    def test_domain_that_is_no_feature(self):
        x, y = make_data()
        x["shop"] = np.arange(24, dtype="int32") % 3
        features = make_features()
        shop = keras.Input((1,), dtype="int32", name="shop")
        model = models.STAR(
            small_tasks(),
            features,
            "shop",
            num_domains=3,
            units=(4,),
            normalization=False,
            auxiliary_units=(),
            heads="aitm",
            inputs={**features.inputs(), "shop": shop},
        )
        scramble(model)
        found = outputs_of(model, x, "features", "click_tower_0")
        embedded = found["features"]
        h = star_layers(model, embedded, x["shop"])
        tower = dense(model, "click_tower_0", h, "relu")
        np.testing.assert_allclose(found["click_tower_0"], tower, atol=1e-5)
        check_save(self, model, x)
        # Another shop is none, on every backend.
        other = model.predict({**x, "shop": x["shop"] + 3}, verbose=0)
        self.assertTrue(np.isfinite(other["click"]).all())
        aside = np.concatenate([embedded, np.eye(3)[x["shop"]]], axis=1)
        logits = dense(model, "click_logits", tower)
        logits += dense(model, "click_auxiliary", aside)
        p = model.predict(x, verbose=0)["click"]
        np.testing.assert_allclose(p, sigmoid(logits), atol=1e-5)

    def test_without_auxiliary(self):
        model = models.STAR(
            ["click"], make_features(), "tab", auxiliary_units=None
        )
        names = {layer.name for layer in model.layers}
        self.assertNotIn("click_auxiliary", names)
        self.assertNotIn("click_joint_logits", names)

    def test_domain_of(self):
        features = make_features()
        inputs = features.inputs()
        ids, number = domain_of(inputs, features, "tab")
        self.assertEqual((tuple(ids.shape), number), ((None,), 4))
        for arguments, message in (
            (("age", 2), "`domain` must be the name of an integer input"),
            (("vector", 2), "`domain` must be the name of an integer input"),
            (("shop", 2), "`domain` must be the name of an input"),
            (("tab", 2), "Feature 'tab' has 2 ids"),
        ):
            with self.assertRaisesRegex(ValueError, message):
                domain_of(inputs, features, *arguments)
        with self.assertRaisesRegex(ValueError, "`num_domains` must be"):
            domain_of(inputs, lambda x: x, "tab")
