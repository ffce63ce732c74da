import numpy as np
from keras import ops

from tests import token_loop
from tests.routers.logits_checks import RoutingMatrix
from tests.routing_cases import cases
from tests.routing_cases import moepp
from tests.routing_cases.cases import RecordedTest


def expert(e, row, arrays):
    """The experts of the case: linear, constant, copying, zero ones."""
    w = {
        k.removeprefix(f"w/moe.experts.experts.{e}."): v.astype("float64")
        for k, v in arrays.items()
        if k.startswith(f"w/moe.experts.experts.{e}.")
    }
    if "lin.weight" in w:
        return w["lin.weight"] @ row + w["lin.bias"]
    if "constant" in w:
        shares = token_loop.softmax(w["wg.weight"] @ row)
        return shares[0] * row + shares[1] * w["constant"]
    num_experts = arrays["combine"].shape[1]
    return row if e == num_experts - 2 else 0.0 * row


def gate(arrays):
    return {
        k.removeprefix(moepp.GATE): v.astype("float64")
        for k, v in arrays.items()
        if k.startswith(moepp.GATE)
    }


def route(config, tokens, context, w):
    """`(logits, combine)` from the case's description, token by token."""
    logits, combine = [], np.zeros((len(tokens), config["E"]))
    for t, token in enumerate(tokens):
        if "wg.weight" in w:
            z = w["wg.weight"] @ token
        else:
            z = w["wg.2.weight"] @ np.tanh(w["wg.0.weight"] @ token)
        if context is not None:
            z = z + w["gate_map.weight"] @ context[t]
        logits.append(z)
        if config.get("moe_use_logits_norm"):
            z = z / np.std(z, ddof=1) * config.get("moe_gate_norm_std", 1.0)
        best = np.argsort(-z, kind="stable")[: config["k"]]
        if config.get("moe_use_mixtral_gating"):
            combine[t, best] = token_loop.softmax(z[best])
            continue
        probs = token_loop.softmax(z)
        probs[-1] = 0.0
        combine[t, best] = probs[best] / probs[best].sum()
    return np.array(logits), combine


class MoEPlusPlusTest(RecordedTest):
    def parts(self, arrays):
        tokens = arrays["x"].reshape(-1, arrays["x"].shape[-1])
        context = arrays.get("gate_residual_in")
        if context is not None:
            context = context.reshape(len(tokens), -1)
        return tokens, context

    def assert_case(self, config, arrays):
        tokens, context = self.parts(arrays)
        router = moepp.router_from_case(config, arrays)
        routing = router(tokens, context=context)
        self.assert_relative(routing.state, arrays["logits"])
        combine = cases.dense_weights(routing, config["E"])
        self.assert_relative(combine, arrays["combine"])
        # The zero expert is among the choices, whatever its weight.
        logits = arrays["logits"].astype("float64")
        best = np.argsort(-logits, axis=1, kind="stable")
        self.assertAllEqual(routing.expert_indices, best[:, : config["k"]])
        self.assertGreater(np.sum(best[:, : config["k"]] == config["E"] - 1), 0)
        if config.get("moe_use_logits_norm"):
            deviation = np.std(logits, axis=1, ddof=1, keepdims=True)
            logits = logits / deviation * config.get("moe_gate_norm_std", 1.0)
        self.assert_relative(routing.logits, logits)
        probs = [token_loop.softmax(row) for row in logits]
        self.assert_relative(routing.probs, np.array(probs))
        return combine

    def test_recorded(self):
        for name, config, arrays in cases.load(moepp.matches):
            with self.subTest(name):
                combine = self.assert_case(config, arrays)
                tokens, _ = self.parts(arrays)
                rows = tokens.astype("float64")
                if not (
                    config.get("moe_use_mixtral_gating")
                    or config.get("moe_feature_no_mul_topk")
                ):
                    rows = 2 * rows  # before all experts, the copying one too
                outputs = [
                    sum(
                        combine[t, e] * expert(e, row, arrays)
                        for e in range(config["E"])
                    )
                    for t, row in enumerate(rows)
                ]
                self.assert_relative(
                    np.reshape(outputs, arrays["y"].shape), arrays["y"]
                )

    def test_gradients_and_residual(self):
        """The loop gives what is recorded, and then what is not."""
        for name, config, arrays in cases.load(moepp.matches):
            with self.subTest(name):
                tokens, context = self.parts(arrays)
                tokens = tokens.astype("float64")
                logits, combine = route(config, tokens, context, gate(arrays))
                self.assert_relative(logits, arrays["logits"])
                self.assert_relative(combine, arrays["combine"])
                self.check_with_residual(config, arrays, tokens)

    def check_with_residual(self, config, arrays, tokens):
        rng = np.random.default_rng(0)
        size = (len(tokens), config["E"])
        arrays = dict(arrays, gate_residual_in=rng.normal(size=size))
        arrays[f"{moepp.GATE}gate_map.weight"] = rng.normal(
            size=(config["E"], config["E"])
        )
        context = arrays["gate_residual_in"]
        arrays["logits"], arrays["combine"] = route(
            config, tokens, context, gate(arrays)
        )
        self.assert_case(config, arrays)
        self.check_gradients(config, arrays, tokens, context)

    def check_gradients(self, config, arrays, tokens, context):
        rng = np.random.default_rng(1)
        cotangent = rng.normal(size=(len(tokens), config["E"]))
        router = moepp.router_from_case(config, arrays)
        layer = RoutingMatrix(router)
        layer.build((None, tokens.shape[1]))
        zeros = np.zeros((len(tokens), 2 * config["E"]))
        _, d_tokens, d_weights = self.outputs_and_gradients(
            layer,
            ops.convert_to_tensor(tokens, "float32"),
            np.concatenate([zeros, cotangent], axis=1),
            context=context.astype("float32"),
        )
        w = gate(arrays)
        parts = {"tokens": tokens, "map": w["gate_map.weight"]}

        def objective(parts):
            weights = dict(w, **{"gate_map.weight": parts["map"]})
            _, combine = route(config, parts["tokens"], context, weights)
            return np.sum(combine * cotangent)

        wanted = token_loop.gradients(objective, parts)
        self.assert_relative(d_tokens, wanted["tokens"], 1e-4)
        (d_map,) = (v for k, v in d_weights.items() if "context_kernel" in k)
        self.assert_relative(d_map, wanted["map"].T, 1e-4)
