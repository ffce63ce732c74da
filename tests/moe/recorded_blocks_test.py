"""Blocks of HF transformers, reproduced through the public layer.

Two go beyond the library, and are done here with parts of their own: Doge's
router mixes the logits of different tokens, which its source keeps for
compatibility alone; ViTPose has no router at all, but
heads for its datasets, half of whose channels are shared.
"""

import keras
import numpy as np
from absl.testing import parameterized
from keras import ops

import keras_moe
from tests import blocks
from tests.blocks.activations import exact_gelu
from tests.routing_cases.cases import RecordedTest
from tests.routing_cases.cases import combine_matrix

OWN_PARTS = ("doge", "vitpose_backbone")
NAMED = [(case, case) for case in blocks.cases() if case not in OWN_PARTS]


def read(case):
    """`(spec, arrays, weights, context)`."""
    spec, arrays = blocks.load(case)
    return (
        spec,
        arrays,
        blocks.weights_of(arrays),
        blocks.context_of(spec, arrays),
    )


class RecordedBlocksTest(RecordedTest):
    @parameterized.named_parameters(NAMED)
    def test_outputs_and_gradients(self, case):
        spec, arrays, weights, context = read(case)
        layer = blocks.moe_from_spec(spec, weights, losses=None)
        kwargs = {} if context is None else {"context": context}
        outputs, d_inputs, d_weights = self.outputs_and_gradients(
            layer, arrays["x"], arrays["cotangent"], **kwargs
        )
        if "y_intended" in arrays:
            # What transformers makes of nllb is a bug; its gradients are, too.
            self.assert_relative(outputs, arrays["y_intended"])
            return
        self.assert_relative(outputs, arrays["y"])
        self.assert_relative(d_inputs, arrays["grad/x"])
        recorded = {
            k[len("grad/w/") :]: v
            for k, v in arrays.items()
            if k.startswith("grad/w/")
        }
        # No gradient is recorded for what the example leaves unused.
        recorded = {
            name: recorded.get(name, np.zeros(weight.shape))
            for name, weight in weights.items()
        }
        imports = blocks.imports(spec, weights)
        for path, gradient in d_weights.items():
            self.assert_relative(gradient, imports[path](recorded))

    @parameterized.named_parameters(NAMED)
    def test_routing(self, case):
        spec, arrays, weights, context = read(case)
        layer = blocks.moe_from_spec(spec, weights)
        routing = layer.route(arrays["x"], context=context)
        wanted = arrays["combine"]
        actual = combine_matrix(layer, routing, len(arrays["x"]))
        # Further experts: shared ones, or one that stands for none.
        self.assert_relative(actual[:, : wanted.shape[1]], wanted)
        if "shared_gammas" in arrays:
            self.assert_relative(
                actual[:, wanted.shape[1] :], arrays["shared_gammas"]
            )
        if "router_logits" in arrays:
            recorded = arrays["router_logits"]
            recorded = recorded.reshape(-1, recorded.shape[-1])
            logits = ops.convert_to_numpy(routing.logits)
            logits = logits[:, : recorded.shape[1]]
            self.assert_relative(logits, recorded)

    def test_load_balancing_loss(self):
        compared = 0
        for case in blocks.cases():
            spec, arrays, weights, context = read(case)
            kind = spec["router"].get("kind", "topk")
            if "aux/load_balancing" not in arrays or case in OWN_PARTS:
                continue
            layer = blocks.moe_from_spec(spec, weights)
            routing = layer.route(arrays["x"], context=context)
            # As transformers has it: k at balance, always the softmax and the
            # largest of the logits. Switch: one choice, 1, the mean over
            # the sequences.
            options = {"assignments": "logits", "scores": "softmax"}
            options["normalize_by_top_k"] = False
            if kind == "switch":
                options = {"assignments": "first", "per": "sequence"}
            if kind == "nllb":
                options["assignments"] = "all"
            loss = keras_moe.losses.LoadBalancingLoss(weight=1.0, **options)
            for mask, name in (
                (None, "aux/load_balancing"),
                ("aux/attention_mask", "aux/load_balancing_masked"),
            ):
                if name not in arrays:
                    continue
                if mask is not None:
                    mask = arrays[mask].reshape(-1) > 0
                    mask = ops.convert_to_tensor(mask)
                value = loss(routing, mask, num_sequences=len(arrays["x"]))
                self.assert_relative(value, arrays[name])
                compared += 1
            if "aux/z_loss" in arrays:
                z_loss = keras_moe.losses.RouterZLoss(weight=1.0)
                self.assert_relative(z_loss(routing), arrays["aux/z_loss"])
        self.assertGreaterEqual(compared, 25)

    def test_load_balancing_loss_of_two_layers(self):
        # transformers pools the tokens of all layers before the product, so
        # here they are one batch.
        compared = 0
        for case in blocks.cases():
            _, arrays = blocks.load(case)
            if "aux/load_balancing_2layers" not in arrays:
                continue
            top_k = (
                arrays["topk_index"].shape[1] if "topk_index" in arrays else 2
            )
            first = arrays["router_logits"]
            logits = ops.array(
                np.concatenate([first, arrays["aux/logits_layer2"]])
            )
            indices = ops.top_k(logits, top_k)[1]
            routing = keras_moe.routers.Routing(
                logits, ops.softmax(logits), indices, indices
            )
            loss = keras_moe.losses.LoadBalancingLoss(
                1.0, normalize_by_top_k=False
            )
            self.assert_relative(
                loss(routing), arrays["aux/load_balancing_2layers"]
            )
            mask = np.tile(arrays["aux/attention_mask"].reshape(-1) > 0, 2)
            self.assert_relative(
                loss(routing, ops.array(mask)),
                arrays["aux/load_balancing_2layers_masked"],
            )
            compared += 1
        self.assertGreaterEqual(compared, 10)


class DogeRouter(keras_moe.routers.Router):
    """Product keys, with the logits of the tokens mixed as in the original."""

    def __init__(self, num_keys, top_k, **kwargs):
        super().__init__(num_keys**2, **kwargs)
        self.num_keys = num_keys
        self.top_k = top_k

    def build(self, tokens_shape):
        self.kernel = self.add_weight(
            name="kernel", shape=(tokens_shape[-1], 2 * self.num_keys)
        )

    def call(self, tokens, mask=None, training=None):
        scores = ops.reshape(tokens @ self.kernel, (2, -1, self.num_keys))
        logits = ops.expand_dims(scores[0], 2) + ops.expand_dims(scores[1], 1)
        logits = ops.reshape(logits, (-1, self.num_experts))
        indices = keras_moe.ops.top_k_indices(logits, self.top_k)
        chosen = ops.take_along_axis(logits, indices, axis=-1)
        probs = ops.softmax(logits)
        return keras_moe.routers.Routing(
            logits, probs, indices, ops.softmax(chosen)
        )


class OwnPartsTest(RecordedTest):
    def test_doge(self):
        spec, arrays = blocks.load("doge")
        weights = blocks.weights_of(arrays)
        router = DogeRouter(
            spec["router"]["num_keys"], spec["router"]["k"], name="router"
        )
        reader = blocks.Reader(
            {**spec, "router": {"weight": spec["router"]["weight"]}}, weights
        )
        layer = reader.layer_with(router, losses=None)
        imports = dict(reader.imports)
        imports["router/kernel"] = lambda w: w[spec["router"]["weight"]].T
        layer.build((None, arrays["x"].shape[-1]))
        blocks.assign(layer, imports, weights)
        outputs, d_inputs, d_weights = self.outputs_and_gradients(
            layer, arrays["x"], arrays["cotangent"]
        )
        self.assert_relative(outputs, arrays["y"])
        self.assert_relative(d_inputs, arrays["grad/x"])
        recorded = {
            k[len("grad/w/") :]: v
            for k, v in arrays.items()
            if k.startswith("grad/w/")
        }
        for path, gradient in d_weights.items():
            self.assert_relative(gradient, imports[path](recorded))

    def test_vitpose_backbone(self):
        _, arrays = blocks.load("vitpose_backbone")
        w = blocks.weights_of(arrays)
        num_experts, part = 4, w["experts.0.bias"].shape[0]
        inputs = keras.Input(arrays["x"].shape[1:])
        dataset = keras.Input((), dtype="int32")
        hidden = keras.layers.Dense(
            len(w["fc1.bias"]), activation=exact_gelu, name="fc1"
        )(inputs)
        shared = keras.layers.Dense(len(w["fc2.bias"]), name="fc2")(hidden)
        experts = keras_moe.experts.LayerExperts(
            keras.layers.Dense(part), num_experts
        )
        moe = keras_moe.layers.MoE(
            router=keras_moe.routers.HashRouter(
                num_experts, table=np.arange(num_experts)
            ),
            experts=experts,
            losses=None,
        )
        own = moe(hidden, context=dataset)
        model = keras.Model(
            [inputs, dataset], ops.concatenate([shared, own], axis=-1)
        )
        for name in ("fc1", "fc2"):
            model.get_layer(name).set_weights(
                [w[f"{name}.weight"].T, w[f"{name}.bias"]]
            )
        for e, layer in enumerate(experts.layers):
            layer.set_weights(
                [w[f"experts.{e}.weight"].T, w[f"experts.{e}.bias"]]
            )
        self.assert_relative(
            model([arrays["x"], arrays["indices"].astype("int32")]), arrays["y"]
        )
