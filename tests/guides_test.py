"""The guides run, in this process, and show what they say they show."""

import contextlib
import importlib.util
import io
import pathlib
import re
import unittest

import keras
import numpy as np
import pytest
from keras import ops

from keras_moe.distribution import plan
from tests.distribution import configurations
from tests.readme_test import run_blocks

GUIDES = pathlib.Path(__file__).parent.parent / "guides"


def load(name):
    path = GUIDES / f"{name}.py"
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module, path.read_text()


class GuidesTest(unittest.TestCase):
    def test_pages(self):
        pages = sorted(GUIDES.glob("*.md"))
        numbers = {page.stem: len(run_blocks(page)[0]) for page in pages}
        self.assertEqual(
            numbers,
            {"parts": 1, "planning": 4, "recommendation": 1, "support": 0},
        )

    def test_planning(self):
        page = GUIDES / "planning.md"
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            namespaces, _ = run_blocks(page)
        text = page.read_text("utf-8")
        self.assertIn(str(namespaces[0]["result"]), text)
        printed = printed.getvalue()
        for said in ("52.5 B", "65 GiB", "(64, 5) 4", "1.002"):
            self.assertIn(f"# {said}", text)
            self.assertIn(f"\n{said}", printed)
        self.assertIn("The nearest that do are 4 and 8.", printed)
        for name, config, mesh in (
            ("Mixtral 8x7B", configurations.MIXTRAL_8X7B, (256, 8)),
            ("DeepSeek-V3", configurations.DEEPSEEK_V3, (8, 256)),
            ("Kimi K2", configurations.KIMI_K2, (16, 128)),
        ):
            result = plan(
                *(config, dict(zip(("data", "expert"), mesh, strict=True))),
                *(2048, 4096, "mixed_bfloat16", "adamw"),
                recompute=True,
                shard_dense=True,
            )
            gigabytes = (
                f"{number / 2**30:.1f}"
                for number in (
                    *(result.weights, result.gradients),
                    *(result.optimizer_state, result.activations),
                    *(result.memory, result.all_to_all, result.all_reduce),
                )
            )
            row = (
                *(name, f"{result.parameters / 1e9:,.1f} B"),
                *(f"{mesh[0]} data, {mesh[1]} expert", *gigabytes),
            )
            self.assertIn(f"| {' | '.join(row)} |", text)

    def test_custom_router(self):
        module, text = load("custom_router")
        losses, indices, difference = module.main()
        self.assertLess(losses[-1], 0.3 * losses[0])
        # Different clusters go to different pairs of experts.
        pairs = {tuple(sorted(pair)) for pair in np.asarray(indices)}
        self.assertGreaterEqual(len(pairs), 2)
        self.assertLess(difference, 1e-6)
        # A router of one's own takes one class of under 40 lines.
        source = re.search(
            r"^class PrototypeRouter.*?(?=^# )", text, re.DOTALL | re.MULTILINE
        )
        self.assertLess(len(source.group().strip().splitlines()), 40)

    def test_recommendation(self):
        module, _ = load("recommendation")
        logs, gates, difference = module.main()
        # A model without the features would have 0.5.
        self.assertGreater(logs["click_auc"], 0.7)
        self.assertGreater(logs["buy_auc"], 0.75)
        self.assertEqual(set(gates), {"click", "buy"})
        for weights in gates.values():
            np.testing.assert_allclose(weights.sum(axis=1), 1.0, atol=1e-5)
        self.assertLess(difference, 1e-6)

    def test_vision(self):
        module, _ = load("vision")
        accuracy, experts, changes, difference, small, large = module.main()
        self.assertGreater(accuracy, 0.8)  # by chance: 0.1
        self.assertEqual(experts.shape, (384, 4, 4, 2))
        self.assertEqual(set(experts.ravel()), {0, 1, 2, 3})
        alone, limited = changes
        self.assertLess(alone, 1e-5)
        self.assertGreater(limited, 1e-2)
        self.assertLess(difference, 1e-6)
        # Of the positions the corners stay; all else is as it was.
        found, given = (
            {
                w.path: ops.convert_to_numpy(w)
                for w in model.weights
                if "seed" not in w.path
            }
            for model in (large, small)
        )
        self.assertEqual(set(found), set(given))
        for name, value in given.items():
            if "positions" in name:
                corners = value.reshape(4, 4, 32)[::3, ::3]
                resized = found[name].reshape(8, 8, 32)[::7, ::7]
                np.testing.assert_allclose(resized, corners, atol=1e-6)
            else:
                np.testing.assert_array_equal(found[name], value, name)

    def test_custom_loops(self):
        module, _ = load("custom_loops")
        weights, loads = module.main()
        self.assertEqual(set(weights), {"fit", "own loss", "own loop"})
        for name in ("own loss", "own loop"):
            for value, expected in zip(
                weights[name], weights["fit"], strict=True
            ):
                np.testing.assert_allclose(value, expected, atol=2e-6)
            np.testing.assert_allclose(loads[name], loads["fit"], atol=1e-6)
        # Without the balancing losses the weights would be others.
        model = module.make_model()
        model.get_layer("moe").routing_losses.clear()
        optimizer = keras.optimizers.SGD(0.1, momentum=0.9)
        module.train_fit(model, optimizer, module.make_data())
        kernel = [v.path for v in model.weights].index("moe/router/kernel")
        other = model.get_weights()[kernel] - weights["fit"][kernel]
        self.assertGreater(np.abs(other).max(), 2e-4)

    @pytest.mark.multi_device
    @pytest.mark.skipif(
        keras.config.backend() != "jax", reason="the guide is about JAX"
    )
    def test_distributed(self):
        module, _ = load("distributed")
        alone, model, loaded, logs, alone_logs, held = module.main()
        self.assertEqual(held, module.EXPERTS // 2)
        for other in (model, loaded):
            for value, expected in zip(
                other.get_weights(), alone.get_weights(), strict=True
            ):
                scale = max(np.abs(expected).max(), 1.0)
                np.testing.assert_allclose(value, expected, atol=2e-5 * scale)
        self.assertEqual(set(logs), set(alone_logs))
        for name, values in logs.items():
            np.testing.assert_allclose(values, alone_logs[name], rtol=1e-4)

    def test_routing_of_examples(self):
        module, _ = load("routing")
        moe, images, outputs, routing = module.per_example()
        self.assertEqual(tuple(routing.expert_indices.shape), (6, 2))
        indices = ops.convert_to_numpy(routing.expert_indices)
        weights = ops.convert_to_numpy(routing.expert_weights)
        by_expert = [
            ops.convert_to_numpy(layer(images)) for layer in moe.experts.layers
        ]
        expected = [
            sum(
                weight * by_expert[expert][image]
                for expert, weight in zip(
                    indices[image], weights[image], strict=True
                )
            )
            for image in range(6)
        ]
        outputs = ops.convert_to_numpy(outputs)
        np.testing.assert_allclose(outputs, expected, atol=1e-5)

    def test_routing_of_tasks(self):
        module, _ = load("routing")
        for chosen, allowed in zip(
            module.per_task(), module.ALLOWED, strict=True
        ):
            self.assertEqual(len(chosen), 6 * 2)
            self.assertLessEqual(set(chosen), set(np.flatnonzero(allowed)))

    def test_masks(self):
        module, _ = load("routing")
        self.assertEqual(module.masked(), 5)
