import keras
import numpy as np

from keras_moe import models
from tests.recommendation.models.small_data import array
from tests.recommendation.models.small_data import check_fit_and_save
from tests.recommendation.models.small_data import dense
from tests.recommendation.models.small_data import make_data
from tests.recommendation.models.small_data import make_features
from tests.recommendation.models.small_data import outputs_of
from tests.recommendation.models.small_data import scramble
from tests.recommendation.models.small_data import sigmoid
from tests.test_case import TestCase

# Where the vectors of the features are.
TAB, AGE, USER, VECTOR = slice(4), slice(4, 5), slice(5, 9), slice(9, 12)


def gate(layer, x, number=0, scale=2.0):
    w1, b1, w2, b2 = (array(v)[number] for v in layer.weights)
    return scale * sigmoid(np.maximum(x @ w1 + b1, 0) @ w2 + b2)


def tower(model, x, prior, task, reads_inputs=True):
    layer = model.get_layer("ppnet")
    known = np.concatenate([prior, x], axis=1) if reads_inputs else prior
    h = x
    for inner, factors in zip(layer.layers, layer.gates, strict=True):
        kernel, bias = (array(v)[task] for v in inner.weights)
        if layer.gate_place == "input":
            h = h * gate(factors, known, task)
        h = np.maximum(h @ kernel + bias, 0)
        if layer.gate_place == "output":
            h = h * gate(factors, known, task)
    return h


class PEPNetTest(TestCase):
    def test_matches_numpy(self):
        x, y = make_data()
        names = ["click", "buy"]
        model = models.PEPNet(
            names, make_features(), "tab", ["user", "age"], units=(5, 3)
        )
        scramble(model)
        e = outputs_of(model, x, "features")["features"]
        prior = np.concatenate([e[:, USER], e[:, AGE]], axis=1)
        known = np.concatenate([e[:, TAB], e], axis=1)
        e = e * gate(model.get_layer("epnet").gate, known)
        p = model.predict(x, verbose=0)
        for task, name in enumerate(names):
            h = tower(model, e, prior, task)
            expected = sigmoid(dense(model, f"{name}_logits", h))
            np.testing.assert_allclose(p[name], expected, atol=1e-5)
        check_fit_and_save(self, model, x, y)

    def test_options(self):
        x, _ = make_data()
        model = models.PEPNet(
            [models.TaskSpec("click", tower_units=(4,))],
            make_features(output="dict"),
            domain=(),
            prior_features="user",
            main_features=["vector", "age"],
            units=4,
            gate_units=2,
            gate_place="input",
            gate_reads="prior",
        )
        scramble(model)
        parts = model.get_layer("features")(x)
        parts = {name: array(part) for name, part in parts.items()}
        main = np.concatenate([parts["vector"], parts["age"]], axis=1)
        h = tower(model, main, parts["user"], 0, reads_inputs=False)
        found = outputs_of(model, x, "click_tower_0")["click_tower_0"]
        expected = dense(model, "click_tower_0", h, "relu")
        np.testing.assert_allclose(found, expected, atol=1e-5)
        self.assertNotIn("epnet", [layer.name for layer in model.layers])

    def test_domain_that_is_no_feature(self):
        features = make_features()
        shop = keras.Input((), dtype="int32", name="shop")
        model = models.PEPNet(
            ["click"],
            features,
            ["tab", "shop"],
            ["user"],
            num_domains=3,
            inputs={**features.inputs(), "shop": shop},
        )
        kernel = model.get_layer("epnet").gate.hidden.kernel
        self.assertEqual(kernel.shape[1], 4 + 3 + 12)

    def test_errors(self):
        for features, message in (
            (["shop"], r"no features \['shop'\]"),
            ([], "`prior_features` must be names"),
        ):
            with self.assertRaisesRegex(ValueError, message):
                models.PEPNet(["click"], make_features(), "tab", features)
        inputs = {"x": keras.Input((4,), name="x")}
        with self.assertRaisesRegex(ValueError, "the vector of each feature"):
            models.PEPNet(
                ["click"],
                lambda inputs: inputs["x"],
                "tab",
                ["user"],
                inputs=inputs,
            )
