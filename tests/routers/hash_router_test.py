import json
import os
import pathlib

import keras
import numpy as np
from absl.testing import parameterized
from keras import ops

from keras_moe.routers.hash_router import HashRouter
from keras_moe.routers.hash_table import balanced_table
from tests import token_loop
from tests.routers.linear_mixture import LinearMixture
from tests.routers.linear_mixture import RouterChecks
from tests.routers.linear_mixture import combine_matrix
from tests.routers.linear_mixture import numpy_mixture
from tests.routers.linear_mixture import router_gradient
from tests.routers.linear_mixture import to_numpy
from tests.test_case import TestCase

BLOCKS = pathlib.Path(__file__).parent.parent / "data" / "blocks"
# Row 2 names an expert twice.
TABLE = np.array([[0, 1], [3, 2], [1, 1], [2, 0], [1, 3]])
IDS = np.array([0, 4, 2, 1, 3, 2, 0, 5, 12, 1, 2, 4], "int32")
SCORES = {
    "softmax": token_loop.softmax,
    "sigmoid": token_loop.sigmoid,
    "sqrt_softplus": lambda z: np.sqrt(np.log1p(np.exp(z))),
}


def route(tokens, kernel, score, normalize, scale=1.0):
    """`(logits, probs, indices, weights)`, one token after the other."""
    indices = np.array([TABLE[i % 5] for i in IDS])
    logits = tokens @ kernel
    probs = np.array([SCORES[score](z) for z in logits])
    weights = np.zeros(indices.shape)
    for t in range(len(tokens)):
        weights[t] = [probs[t, e] for e in indices[t]]
        if normalize:
            weights[t] /= weights[t].sum()
    return logits, probs, indices, weights * scale


class HashRouterTest(RouterChecks, TestCase):
    context = {"context": IDS}

    def make(self, **kwargs):
        initializer = keras.initializers.RandomNormal(stddev=1.0, seed=1)
        kwargs = {"kernel_initializer": initializer, **kwargs}
        return HashRouter(4, **{"table": TABLE, "weights": "learned", **kwargs})

    def test_uniform(self):
        router = self.make(weights="uniform", weight_scale=3.0)
        routing = to_numpy(router(self.tokens(), context=IDS))
        indices = [TABLE[i % 5] for i in IDS]
        self.assertAllEqual(routing.expert_indices, indices)
        self.assertAllClose(routing.expert_weights, np.full((12, 2), 1.5))
        self.assertAllEqual(routing.logits, np.zeros((12, 4)))
        self.assertAllClose(
            routing.probs[:4],
            [
                [0.5, 0.5, 0.0, 0.0],
                [0.0, 0.5, 0.0, 0.5],
                [0.0, 1.0, 0.0, 0.0],
                [0.0, 0.0, 0.5, 0.5],
            ],
        )
        # Two choices of one expert count with the sum of their weights.
        combine = ops.convert_to_numpy(combine_matrix(routing, 4))
        self.assertAllClose(combine[2], [0.0, 3.0, 0.0, 0.0])
        self.assertEqual(len(router.trainable_weights), 0)

    @parameterized.parameters(
        ("softmax", True), ("sigmoid", False), ("sqrt_softplus", True)
    )
    def test_learned_against_loop(self, score, normalize):
        router = self.make(
            score_activation=score,
            normalize_weights=normalize,
            weight_scale=1.5,
        )
        ids = IDS[:, None].astype("int64")
        routing = to_numpy(router(self.tokens(), context=ids))
        kernel = ops.convert_to_numpy(router.kernel).astype(float)
        tokens = self.tokens().astype(float)
        expected = route(tokens, kernel, score, normalize, 1.5)
        for actual, value in zip(routing, expected, strict=True):
            self.assert_relative(actual, value)

    def test_gradients_against_loop(self):
        rng = np.random.default_rng(2)
        router = self.make(score_activation="sqrt_softplus")
        weights = rng.normal(size=(4, 6, 3)), rng.normal(size=(4, 3))
        layer = LinearMixture(router, *weights)
        cotangent = rng.normal(size=(12, 3))
        layer(self.tokens(), context=IDS)
        y, dx, dw = self.outputs_and_gradients(
            layer, self.tokens(), cotangent, context=IDS
        )
        arrays = {
            "x": self.tokens(),
            "router": ops.convert_to_numpy(router.kernel),
        }

        def mixture(a):
            routing = route(a["x"], a["router"], "sqrt_softplus", True)
            combine = np.zeros((12, 4))
            for t in range(12):
                for e, weight in zip(routing[2][t], routing[3][t], strict=True):
                    combine[t, e] += weight
            return numpy_mixture(combine, a["x"], *weights)

        expected = token_loop.gradients(
            lambda a: (mixture(a) * cotangent).sum(), arrays
        )
        self.assert_relative(y, mixture(arrays))
        self.assert_relative(dx, expected["x"], 1e-4)
        self.assert_relative(router_gradient(dw), expected["router"], 1e-4)

    def test_recorded_deepseek_v4(self):
        with open(BLOCKS / "deepseek_v4__hash.json") as file:
            spec = json.load(file)["spec"]["router"]
        case = np.load(BLOCKS / "deepseek_v4__hash.npz")
        kernel = case["w/gate.weight"].T
        router = HashRouter(
            kernel.shape[1],
            table=case["tid2eid"],
            weights="learned",
            score_activation="sqrt_softplus",
            normalize_weights=spec["norm"] == "sum",
            normalize_epsilon=spec["norm_eps"],
            weight_scale=spec["scale"],
        )
        tokens = case["x"].reshape(-1, len(kernel))
        router.build(tokens.shape)
        router.kernel.assign(kernel)
        ids = case["input_ids"].reshape(-1).astype("int32")
        routing = router(tokens, context=ids)
        self.assert_relative(routing.logits, case["router_logits"])
        self.assertAllEqual(routing.expert_indices, case["topk_index"])
        self.assert_relative(routing.expert_weights, case["topk_weight"])
        combine = combine_matrix(routing, kernel.shape[1])
        self.assert_relative(combine, case["combine"])
        # Some id has an expert twice.
        self.assertTrue(
            any(len(set(row)) < len(row) for row in case["topk_index"])
        )

    @parameterized.parameters((20, 1), (23, 3), (3, 4), (1, 1))
    def test_random_table(self, num_ids, top_k):
        table = balanced_table(num_ids, 5, top_k, 7)
        self.assertEqual(table.shape, (num_ids, top_k))
        self.assertTrue(all(len(set(row)) == top_k for row in table))
        for column in table.T:
            loads = np.bincount(column, minlength=5)
            self.assertLessEqual(np.ptp(loads), 1)
        same, other = (balanced_table(num_ids, 5, top_k, s) for s in (7, 8))
        self.assertAllEqual(table, same)
        if num_ids > 5:
            self.assertTrue((table != other).any())

    def test_random_table_of_the_router(self):
        router = HashRouter(5, num_ids=23, top_k=3, seed=7)
        routing = router(np.ones((3, 6), "float32"), context=[4, 22, 23])
        expected = balanced_table(23, 5, 3, 7)
        self.assertAllEqual(router.table, expected)
        self.assertAllEqual(routing.expert_indices, expected[[4, 22, 0]])

    def test_the_table_is_saved(self):
        inputs = keras.Input((6,)), keras.Input((), dtype="int32")
        router = HashRouter(4, num_ids=5, top_k=2, name="router")
        routing = router(inputs[0], context=inputs[1])
        model = keras.Model(inputs, routing.expert_indices)
        router.table.assign(TABLE)
        path = os.path.join(self.get_temp_dir(), "model.keras")
        model.save(path)
        loaded = keras.saving.load_model(path)
        self.assertAllEqual(loaded.get_layer("router").table, TABLE)
        expected = [TABLE[i % 5] for i in IDS]
        self.assertAllEqual(loaded([self.tokens(), IDS]), expected)
        self.assertAllEqual(
            loaded.predict([self.tokens(), IDS], verbose=0), expected
        )

    def test_ids_out_of_range(self):
        router = self.make(weights="uniform")
        ids = np.array([7, -1, 2**31 - 1], "int32")
        mask = np.array([True, False, True])
        routing = router(self.tokens(3), mask=mask, context=ids)
        expected = TABLE[[2, 0, (2**31 - 1) % 5]]
        self.assertAllEqual(routing.expert_indices, expected)
        with self.assertRaisesRegex(ValueError, "negative ids.*-1"):
            router(self.tokens(3), context=ids)
        small = router(self.tokens(1), context=np.array([253], "uint8"))
        self.assertAllEqual(small.expert_indices, TABLE[[3]])

    def test_context_errors(self):
        router = self.make(weights="uniform")
        self.assertTrue(router.uses_context)
        for context, message in (
            (None, "context=None"),
            (IDS.astype("float32"), "context.dtype=float32"),
            (np.zeros((12, 2), "int32"), r"context.shape=\(12, 2\)"),
        ):
            with self.assertRaisesRegex(ValueError, message):
                router(self.tokens(), context=context)

    def test_config(self):
        router = self.make(
            score_activation="sigmoid",
            normalize_weights=False,
            normalize_epsilon=1e-6,
            weight_scale=2.0,
            seed=3,
        )
        self.run_class_serialization_test(router)
        self.run_class_serialization_test(HashRouter(4, num_ids=9, top_k=2))
        copy = HashRouter.from_config(router.get_config())
        copy.build((None, 6))
        self.assertAllEqual(copy.table, TABLE)

    @parameterized.parameters(
        ({}, "table=None, num_ids=None"),
        ({"num_ids": 0}, "num_ids=0"),
        ({"num_ids": 3, "top_k": 5}, "top_k=5, num_experts=4"),
        ({"table": [[0, 4]]}, "values from 0 to 4, num_experts=4"),
        ({"table": [[-1, 1]]}, "values from -1 to 1"),
        ({"table": [[0.0, 1.0]]}, "table.dtype=float"),
        ({"table": [[[0]]]}, r"table.shape=\(1, 1, 1\)"),
        ({"table": TABLE, "num_ids": 4}, r"num_ids=4, table.shape=\(5, 2\)"),
        ({"table": TABLE, "top_k": 1}, r"top_k=1, table.shape=\(5, 2\)"),
        ({"num_ids": 3, "weights": "equal"}, "weights='equal'"),
        ({"num_ids": 3, "score_activation": "relu"}, "activation='relu'"),
        ({"num_ids": 3, "normalize_epsilon": -1.0}, "normalize_epsilon=-1.0"),
        (
            {"num_ids": 3, "weights": "learned", "normalize_weights": True},
            "no gradient",
        ),
    )
    def test_errors(self, kwargs, message):
        with self.assertRaisesRegex(ValueError, message):
            HashRouter(4, **kwargs)
