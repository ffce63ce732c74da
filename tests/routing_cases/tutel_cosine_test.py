import keras
import numpy as np
from keras import ops

from tests import token_loop
from tests.routing_cases import cases
from tests.routing_cases import tutel_cosine
from tests.routing_cases.cases import RecordedTest

WEIGHTS = (
    "temperature",
    "sim_matrix",
    "cosine_projector.weight",
    "cosine_projector.bias",
)


class Logits(keras.layers.Layer):
    """A router as a layer that puts out its logits."""

    def __init__(self, router):
        super().__init__()
        self.router = router
        self.built = True

    def call(self, tokens):
        return self.router(tokens).logits


def logits_of(arrays):
    """Cosine by cosine, from the formula in the case's description."""
    low = arrays["x"] @ arrays["w/cosine_projector.weight"].T
    low = low + arrays["w/cosine_projector.bias"]
    scale = np.exp(np.minimum(arrays["w/temperature"][0], np.log(100)))
    logits = np.zeros((len(low), arrays["w/sim_matrix"].shape[1]))
    for t, token in enumerate(low):
        for e, expert in enumerate(arrays["w/sim_matrix"].T):
            lengths = np.sqrt(token @ token) * np.sqrt(expert @ expert)
            logits[t, e] = scale * (token @ expert) / lengths
    return logits


class TutelCosineTest(RecordedTest):
    def run_case(self, config, arrays):
        router = tutel_cosine.router_from_case(config, arrays)
        outputs, d_tokens, d_weights = self.outputs_and_gradients(
            Logits(router), arrays["x"], arrays["cotangent"]
        )
        gradients = {"x": d_tokens}
        for name, variable, transposed in tutel_cosine.variables_of(router):
            gradient = d_weights[variable.name]
            gradients[name] = gradient.T if transposed else gradient
        gradients["temperature"] = gradients["temperature"].reshape(1)
        return router, outputs, gradients

    def assert_case(self, config, arrays, tolerance):
        router, outputs, gradients = self.run_case(config, arrays)
        scale = np.abs(arrays["logits"]).max()
        self.assert_relative(outputs / scale, arrays["logits"] / scale)
        for name, gradient in gradients.items():
            recorded = arrays[f"grad/{name}"]
            self.assertEqual(gradient.shape, recorded.shape)
            scale = max(np.abs(recorded).max(), 1e-3)
            self.assert_relative(gradient / scale, recorded / scale, tolerance)
        routing = router(arrays["x"])
        logits = arrays["logits"].astype("float64")
        for t, row in enumerate(ops.convert_to_numpy(routing.probs)):
            self.assert_relative(row, token_loop.softmax(logits[t]), 1e-4)
        best = np.argsort(-logits, axis=1, kind="stable")
        top_k = routing.expert_indices.shape[1]
        self.assertAllEqual(routing.expert_indices, best[:, :top_k])

    def test_recorded(self):
        for name, config, arrays in cases.load(tutel_cosine.matches):
            with self.subTest(name):
                self.assertContainsSubset(
                    {f"grad/{w}" for w in (*WEIGHTS, "x")}, arrays
                )
                # Sums over many tokens, rounded in another order.
                self.assert_case(config, arrays, 1e-4)

    def test_beyond_the_largest_scale(self):
        for _, config, arrays in cases.load(tutel_cosine.matches):
            arrays["w/temperature"] = np.array([6.0])
            names = ["x", *(f"w/{name}" for name in WEIGHTS)]
            parts = {k: arrays[k].astype("float64") for k in names}
            arrays["logits"] = logits_of(parts)
            self.assertGreater(np.abs(arrays["logits"]).max(), 50)
            gradients = token_loop.gradients(
                lambda parts, arrays=arrays: np.sum(
                    logits_of(parts) * arrays["cotangent"]
                ),
                parts,
            )
            for name, gradient in gradients.items():
                arrays[f"grad/{name.removeprefix('w/')}"] = gradient
            self.assertAllEqual(arrays["grad/temperature"], [0.0])
            self.assert_case(config, arrays, 1e-4)
