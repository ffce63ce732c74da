"""M3oE: experts of all, of domains and of tasks."""

import keras
import numpy as np

from keras_moe import layers
from keras_moe import models
from tests.recommendation.models.model_checks import assert_predicts
from tests.recommendation.models.model_checks import check_trains_and_saves
from tests.recommendation.models.model_checks import specs
from tests.recommendation.models.numpy_trunks import network
from tests.recommendation.models.numpy_trunks import predictions
from tests.recommendation.models.numpy_trunks import randomize
from tests.recommendation.models.numpy_trunks import sigmoid
from tests.recommendation.models.numpy_trunks import softmax
from tests.recommendation.models.numpy_trunks import weights_of
from tests.test_case import TestCase

SIZES = {"num_experts": 2, "star_units": (5, 4), "expert_units": (3,)}
# Of the vocabulary [new, top]: missing is domain 0, unknown 1.
TABS = np.array([0, 1, -1, -2, 1, 0, 0, 1], "int32")
DOMAINS = TABS + 2
DOMAINS[TABS == -1], DOMAINS[TABS == -2] = 0, 1


def embedding():
    return layers.FeatureEmbedding(
        [
            layers.Categorical("tab", ["new", "top"], embedding_dim=2),
            layers.Embedded("x", 6),
        ]
    )


def batch():
    x = np.random.default_rng(1).normal(size=(8, 6)).astype("float32")
    return {"tab": TABS, "x": x}


def balanced(w, f, number):
    """The experts' outputs `f`, and the share of its own of `number`."""
    balance = sigmoid(w["balance_logit"])
    others = [f[m] for m in range(len(f)) if m != number]
    mixed = balance * f[number] + (1 - balance) * sum(others) / len(others)
    return sigmoid(w["weight_logit"]) * mixed


def by_hand(model, x):
    part = {
        layer.name: weights_of(layer) for layer in model.layers if layer.weights
    }
    table = part["features"]["table_tab/embeddings"]
    v = np.concatenate([table[DOMAINS], x["x"]], axis=-1)
    tasks, trunks = len(model.tasks), []
    for b, d in enumerate(DOMAINS):
        row, star = v[b : b + 1], part["star"]
        h = row @ (star["kernel"] * star["domain_kernel"][d])
        h = h + star["bias"] + star["domain_bias"][d]
        h = network(part["star_mlp"], 0, h) + network(part["skip_mlp"], 0, row)
        shared = [
            network(part["experts"], e, h, prefix="experts/") for e in (0, 1)
        ]
        of_domains = [network(part["domain_experts"], n, h) for n in range(4)]
        of_tasks = [network(part["task_experts"], n, h) for n in range(tasks)]
        trunks.append([])
        for t in range(tasks):
            kernel = part["experts"]["gates/kernel"].reshape(4, tasks, 2, -1)
            bias = part["experts"]["gates/bias"].reshape(4, tasks, 2)
            share = softmax(h @ kernel[d, t].T + bias[d, t])[0]
            z = share[0] * shared[0] + share[1] * shared[1]
            z = z + balanced(part["domain_balance"], of_domains, d)
            trunks[-1].append(z + balanced(part["task_balance"], of_tasks, t))
    return [np.concatenate(rows) for rows in zip(*trunks, strict=True)]


class M3oETest(TestCase):
    def test_by_hand(self):
        model = models.M3oE(specs("a", "b"), embedding(), "tab", **SIZES)
        count = 4 * 2 + 5 * (8 * 5 + 5) + 5 * 4 + 3 * 4 + 8 * 4 + 3 * 4
        count += (2 + 4 + 2) * (4 * 3 + 3 * 3) + 4 * 2 * 2 * 5 + 4 + 2 * 4
        self.assertEqual(model.count_params(), count)
        randomize(model)
        x = batch()
        assert_predicts(model, x, predictions(model, by_hand(model, x)))
        found = model.gate_weights(x)
        self.assertEqual(found["b"].shape, (8, 2))
        np.testing.assert_allclose(found["b"].sum(axis=-1), 1, rtol=1e-5)

    def test_train_and_save(self):
        model = models.M3oE(
            specs("a"), embedding(), "tab", dropout=0.1, seed=1, **SIZES
        )
        check_trains_and_saves(self, model, batch())

    def test_domain_of_another_input(self):
        inputs = {
            "x": keras.Input((3,), name="x"),
            "place": keras.Input((), dtype="int32", name="place"),
        }
        arguments = {"inputs": inputs, "domain": "place", **SIZES}
        model = models.M3oE(
            ["a"], lambda given: given["x"], num_domains=3, **arguments
        )
        self.assertEqual(model.get_layer("star").num_domains, 3)
        with self.assertRaisesRegex(ValueError, "`num_domains` must be an int"):
            models.M3oE(["a"], lambda given: given["x"], **arguments)
        with self.assertRaisesRegex(ValueError, "`star_units` must be"):
            models.M3oE(["a"], embedding(), "tab", star_units=(3,))
        with self.assertRaisesRegex(ValueError, "domain='city'"):
            models.M3oE(["a"], embedding(), "city")
