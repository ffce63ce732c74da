"""What `MoE` counts, and how it stands in the logs of `fit`."""

import contextlib
import io
import os
import re

import keras
import numpy as np
from absl.testing import parameterized
from keras import ops

from keras_moe.layers import MoE
from tests.moe.moe_fit_test import data
from tests.moe.moe_fit_test import model_with
from tests.moe.moe_test import MASK
from tests.moe.moe_test import inputs
from tests.moe.moe_test import make
from tests.test_case import TestCase


class StatisticsTest(TestCase):
    def expected(self, layer, x, batch_size, mask=None):
        """Counts of the routing of all batches, dropped ones by hand."""
        load, dropped = np.zeros(layer.num_experts), 0
        entropy = []
        for i in range(0, len(x), batch_size):
            batch = x[i : i + batch_size]
            routing = layer.route(batch)
            indices = ops.convert_to_numpy(routing.expert_indices)
            probs = ops.convert_to_numpy(routing.probs)
            if mask is not None:
                keep = mask[i : i + batch_size].reshape(-1)
                indices, probs = indices[keep], probs[keep]
            counts = np.bincount(indices.reshape(-1), minlength=len(load))
            load += counts
            entropy.extend(-np.sum(probs * np.log(probs), axis=1))
            if layer.capacity.capacity_factor is not None:
                share = batch.shape[0] * batch.shape[1] * indices.shape[1]
                capacity = np.ceil(
                    share * layer.capacity.capacity_factor / len(load) - 1e-6
                )
                dropped += np.maximum(counts - capacity, 0).sum()
        return load, dropped / load.sum(), np.mean(entropy)

    @parameterized.parameters(None, 0.5)
    def test_logs_history_and_progress_bar(self, capacity_factor):
        layer = make(
            capacity_factor=capacity_factor,
            name="moe",
            top_k=1,
            statistics="per_expert",
        )
        model = model_with(layer)
        # With a learning rate of zero every epoch routes alike.
        model.compile(keras.optimizers.SGD(0.0), "mse")
        x, y = data()
        load, dropped, entropy = self.expected(layer, x, batch_size=8)
        screen = io.StringIO()
        with contextlib.redirect_stdout(screen):
            history = model.fit(
                x,
                y,
                batch_size=8,  # the last batch is smaller
                epochs=2,
                shuffle=False,
                validation_data=(x[:3], y[:3]),
            ).history
        for epoch in range(2):
            self.assertAllClose(
                [history[f"moe_load_{e}"][epoch] for e in range(4)],
                load / load.sum(),
                rtol=1e-5,
            )
            self.assertAllClose(
                history["moe_dropped_fraction"][epoch], dropped, rtol=1e-5
            )
            self.assertAllClose(
                history["moe_routing_entropy"][epoch], entropy, rtol=1e-5
            )
            self.assertEqual(
                history["moe_dead_experts"][epoch], np.sum(load == 0)
            )
        # What is counted is training alone.
        self.assertEqual(
            [k for k in history if k.startswith("val_")], ["val_loss"]
        )
        for name in ("dropped_fraction", "entropy", "dead_experts"):
            own = name if name != "entropy" else "routing_entropy"
            if name != "dropped_fraction" or capacity_factor:
                self.assertEqual(
                    history[f"routing_{name}"], history[f"moe_{own}"]
                )
        self.assertAllClose(
            history["routing_max_violation"],
            [load.max() / load.mean() - 1] * 2,
            rtol=1e-5,
        )
        # The line that stays on the screen has the numbers of the history.
        last = re.split(r"[\r\n]+", screen.getvalue().strip())[-1]
        shown = dict(re.findall(r"(moe_load_\d): ([-+.\de]+)", last))
        self.assertLen(shown, 4)
        for name, value in shown.items():
            self.assertAllClose(float(value), history[name][-1], atol=1e-4)
        # The last epoch can be read afterwards, validation or not.
        result = layer.statistics.result()
        self.assertAllClose(result["expert_load"], load / load.sum())
        self.assertAllClose(result["dropped_fraction"], dropped, rtol=1e-5)
        model.evaluate(x, y, verbose=0)
        model.predict(x, verbose=0)
        again = layer.statistics.result()
        self.assertAllEqual(again["expert_load"], result["expert_load"])

    def test_masked_tokens_do_not_count(self):
        layer = make(name="moe", capacity_factor=0.5)
        x = inputs()
        layer(x, mask=ops.array(MASK), training=True)
        load, dropped, entropy = self.expected(layer, x, 3, MASK)
        result = layer.statistics.result()
        self.assertAllClose(result["expert_load"] * load.sum(), load)
        self.assertAllClose(result["dropped_fraction"], dropped, rtol=1e-5)
        self.assertAllClose(result["routing_entropy"], entropy, rtol=1e-5)

    def test_dead_experts(self):
        layer = make(top_k=1)
        layer.router.kernel.assign(np.zeros((5, 4)))  # ties: expert 0
        layer(inputs(), training=True)
        result = layer.statistics.result()
        self.assertEqual(result["dead_experts"], 3)
        self.assertAllClose(result["expert_load"], [1, 0, 0, 0])
        self.assertAllClose(result["routing_entropy"], np.log(4), rtol=1e-6)

    def test_detail(self):
        x, y = data()
        for detail, num_experts, entries in (
            ("auto", 8, []),
            ("summary", 4, ["load_min", "load_max"]),
            ("per_expert", 9, ["load_0", "load_8"]),
            (None, 4, []),
        ):
            layer = MoE(num_experts, 4, statistics=detail, name="moe")
            model = model_with(layer)
            model.compile("sgd", "mse")
            history = model.fit(x, y, verbose=0).history
            for entry in entries:
                self.assertIn(f"moe_{entry}", history)
            if detail == "auto":
                self.assertEqual(
                    sorted(history),
                    [
                        "loss",
                        "routing_dead_experts",
                        "routing_entropy",
                        "routing_max_violation",
                    ],
                )
            if detail is None:
                self.assertEqual(list(history), ["loss"])
                self.assertEqual(layer.non_trainable_variables, [])

    def test_names_do_not_depend_on_what_was_made_before(self):
        def entries():
            layers = [MoE(2, 3, statistics="summary") for _ in range(2)]
            layers.append(MoE(2, 3, statistics="summary", name="last"))
            model = model_with(*layers)
            model.compile("sgd", "mse")
            return set(model.fit(*data(), verbose=0).history)

        first = entries()
        self.assertLessEqual(
            {"moe_load_min", "moe_1_load_min", "last_load_min"}, first
        )
        self.assertEqual(first, entries())

    def test_equal_names_in_different_layers(self):
        class Block(keras.layers.Layer):
            def __init__(self, **kwargs):
                super().__init__(**kwargs)
                self.moe = MoE(2, 3, statistics="per_expert", name="moe")

            def build(self, input_shape):
                self.moe.build(input_shape)

            def call(self, x):
                return self.moe(x)

        model = model_with(Block(name="one"), Block(name="two"))
        model.compile("sgd", "mse")
        history = model.fit(*data(), verbose=0).history
        for name in ("moe_load_0", "moe_1_load_0"):
            self.assertIn(name, history)
        # Once each, however deep the layers are.
        names = [metric.name for metric in model.metrics]
        self.assertEqual(names.count("moe_routing"), 2)

    def test_a_line_sums_up_all_layers(self):
        layers = [
            make(top_k=1, name=f"moe_{i}", capacity_factor=factor)
            for i, factor in enumerate((None, 0.5, 0.25))
        ]
        layers[1].router.kernel.assign(np.zeros((5, 4)))  # ties: expert 0
        model = model_with(*layers)
        other = model_with(make(name="moe"))
        for each in (other, model):
            each.compile(keras.optimizers.SGD(0.0), "mse")
            history = each.fit(*data(), verbose=0).history
        results = [layer.statistics.result() for layer in layers]
        violations = [4 * result["expert_load"].max() - 1 for result in results]
        self.assertAllClose(violations[1], 3.0, rtol=1e-5)
        dropped = [result["dropped_fraction"] for result in results[1:]]
        for name, value in {
            "max_violation": np.mean(violations),
            "max_violation_worst": 3.0,
            "dropped_fraction": np.mean(dropped),
            "dropped_fraction_worst": max(dropped),
            "entropy": np.mean([r["routing_entropy"] for r in results]),
            "dead_experts": sum(r["dead_experts"] for r in results),
        }.items():
            self.assertAllClose(
                history[f"routing_{name}"], [value], rtol=1e-5, msg=name
            )

    def test_metrics_are_listed_once_and_while_they_tell_something(self):
        model = model_with(MoE(2, 3, name="moe"))
        model.compile("sgd", "mse", metrics=["mae"])
        model.fit(*data(), verbose=0)
        self.assertEqual(
            model.metrics_names, ["loss", "compile_metrics", "moe_routing"]
        )
        values = model.evaluate(*data(), verbose=0)
        self.assertEqual(model.metrics_names, ["loss", "compile_metrics"])
        self.assertLen(values, 2)

    def test_loops_that_update_all_metrics(self):
        # Keras' guide on training steps of one's own does.
        layer = MoE(2, 3, name="moe")
        layer(inputs(), training=True)
        (metric,) = layer.statistics.metrics
        before = metric.result()
        metric.update_state(np.zeros(3), np.zeros(3))
        self.assertEqual(metric.result(), before)
        metric.reset_state()
        self.assertEqual(layer.statistics.metrics, [])

    def test_a_loaded_model_begins_a_new_epoch(self):
        model = model_with(MoE(2, 3, name="moe"))
        model.compile("sgd", "mse")
        model.fit(*data(), verbose=0)
        path = os.path.join(self.get_temp_dir(), "model.keras")
        model.save(path)
        counted = float(model.get_layer("moe").statistics.token_count)
        self.assertGreater(counted, 0.0)
        statistics = keras.saving.load_model(path).get_layer("moe").statistics
        self.assertEqual(float(statistics.token_count), counted)
        (metric,) = statistics.metrics
        metric.reset_state()  # as `fit` does with what is listed
        self.assertEqual(float(statistics.token_count), 0.0)
        self.assertEqual(statistics.metrics, [])
        self.assertAllClose(sum(statistics.result()["expert_load"]), 1.0)

    def test_a_second_call_in_inference_hides_nothing(self):
        # As a target network would be called.
        layer = MoE(2, 3, statistics="per_expert", name="moe")
        x = keras.Input((None, 5))
        y = layer(x, training=True) + layer(x, training=False)
        model = keras.Model(x, keras.layers.Dense(1)(y))
        model.compile("sgd", "mse")
        history = model.fit(*data(), verbose=0).history
        self.assertAllClose(
            history["moe_load_0"][0] + history["moe_load_1"][0], 1.0
        )

    def test_inference_changes_no_state(self):
        layer = make()
        layer(inputs(), training=True)
        before = [ops.convert_to_numpy(v).copy() for v in layer.variables]
        layer(inputs(1))
        layer(inputs(1), training=False)
        for old, new in zip(before, layer.variables, strict=True):
            self.assertAllEqual(old, new)
