"""Arguments, saving, dtypes and training of `MultiGateMoE`."""

import os
import unittest

import keras
import numpy as np
from absl.testing import parameterized
from keras import ops

from keras_moe.layers import MultiGateMoE
from tests.recommendation.gates.multi_gate_moe_test import CASES
from tests.recommendation.gates.multi_gate_moe_test import inputs
from tests.recommendation.gates.multi_gate_moe_test import make
from tests.test_case import TestCase

MORE = {
    "dselect_k": {"gate_activation": "dselect_k", "gate_entropy_weight": 0.1},
    "normalized": {
        "expert_normalization": "batch",
        "gate_normalization": "batch",
        "gate_dropout": 0.1,
        "expert_dropout": 0.1,
        "seed": 4,
        "kernel_regularizer": "l2",
        "gate_regularizer": "l2",
    },
    "layers": {
        "expert_units": (16,),
        "experts": keras.layers.Dense(3, kernel_initializer="he_normal"),
    },
    "stem": {
        "num_task_experts": 1,
        "visibility": "all",
        "stop_cross_task_gradients": True,
    },
}
NAMED = list({**CASES, **MORE}.items())


class ConfigTest(TestCase):
    @parameterized.named_parameters(NAMED)
    def test_config(self, kwargs):
        layer = make(**kwargs)
        copy = MultiGateMoE.from_config(layer.get_config())
        self.assertEqual(copy.get_config(), layer.get_config())
        copy.build((None, 6))
        copy.set_weights(layer.get_weights())
        x = inputs(5, 6)
        self.assert_relative(copy(x), ops.convert_to_numpy(layer(x)))

    @parameterized.named_parameters(
        (name, CASES.get(name) or MORE[name])
        for name in ("home", "matrix", "dselect_k", "normalized", "layers")
    )
    def test_saving(self, kwargs):
        x = keras.Input((6,))
        layer = MultiGateMoE(2, **kwargs)
        model = keras.Model(x, keras.layers.Flatten()(layer(x)))
        path = os.path.join(self.get_temp_dir(), "model.keras")
        model.save(path)
        loaded = keras.saving.load_model(path)
        x = inputs(5, 6)
        self.assert_relative(loaded(x), ops.convert_to_numpy(model(x)))

    def test_saving_with_gate_inputs(self):
        x, g = keras.Input((3, 6)), keras.Input((5,))
        layer = MultiGateMoE(
            2, num_shared_experts=3, expert_slots=[0, 1, 2], return_gates=True
        )
        outputs, gates = layer(x, gate_inputs=g)
        self.assertEqual(outputs.shape, (None, 2, 16))
        self.assertEqual(gates.shape, (None, 2, 3))
        model = keras.Model([x, g], [outputs, gates])
        path = os.path.join(self.get_temp_dir(), "model.keras")
        model.save(path)
        loaded = keras.saving.load_model(path)
        batch = [inputs(4, 3, 6), inputs(4, 5)]
        for ours, theirs in zip(model(batch), loaded(batch), strict=True):
            self.assert_relative(theirs, ops.convert_to_numpy(ours))

    def test_layer_contract(self):
        self.run_layer_test(
            MultiGateMoE,
            init_kwargs={"num_tasks": 2, "num_task_experts": 1},
            input_shape=(4, 6),
            expected_output_shape=(4, 2, 16),
            expected_num_trainable_weights=4,
            expected_num_non_trainable_weights=0,
            expected_num_seed_generators=0,
            expected_num_losses=0,
            supports_masking=False,
        )

    @parameterized.parameters("mixed_bfloat16", "mixed_float16", "float64")
    def test_dtypes(self, policy):
        if policy == "float64" and keras.config.backend() == "jax":
            self.skipTest("JAX has float64 only if told so as it starts")
        kwargs = {"num_task_experts": 1, "output_shared": True, "seed": 1}
        kwargs.update(self_residual="weights", feature_gate_rank=2)
        layer = MultiGateMoE(2, [4], dtype=policy, return_gates=True, **kwargs)
        exact = MultiGateMoE(2, [4], return_gates=True, **kwargs)
        x = inputs(5, 6)
        outputs, gates = layer(x)
        exact(x)
        exact.set_weights(
            [np.asarray(w, "float32") for w in layer.get_weights()]
        )
        float64 = policy == "float64"
        self.assertDType(outputs, policy.removeprefix("mixed_"))
        self.assertDType(gates, "float64" if float64 else "float32")
        wanted, _ = exact(x)
        outputs = ops.convert_to_numpy(ops.cast(outputs, "float32"))
        self.assert_relative(
            outputs,
            ops.convert_to_numpy(wanted),
            1e-5 if float64 else 3e-2,
        )

    @unittest.skipIf(
        keras.config.backend() == "jax",
        "JAX has float64 only if told so as it starts",
    )
    def test_mixing_in_float64(self):
        layer = MultiGateMoE(2, [4], dtype="float64", return_gates=True)
        x = inputs(5, 6).astype("float64")
        outputs, gates = map(ops.convert_to_numpy, layer(x))
        experts = ops.convert_to_numpy(layer.experts(x))
        self.assertAllClose(outputs, gates @ experts, rtol=0, atol=1e-14)

    def test_fit(self):
        x = inputs(64, 6)
        y = np.stack([x.sum(-1), x[:, 0] - x[:, 1]], axis=1)[..., None]
        model = keras.Sequential(
            [
                MultiGateMoE(
                    2,
                    [8],
                    num_task_experts=2,
                    output_shared=True,
                    expert_normalization="batch",
                    gate_dropout=0.1,
                ),
                MultiGateMoE(2, [8], num_task_experts=2, num_shared_experts=2),
                keras.layers.Dense(1),
            ]
        )
        model.compile(keras.optimizers.Adam(0.02), "mse")
        losses = model.fit(x, y, epochs=8, verbose=0).history["loss"]
        self.assertLess(losses[-1], 0.7 * losses[0])
        self.assertEqual(model.predict(x[:5], verbose=0).shape, (5, 2, 1))

    def test_regularizers(self):
        layer = make(kernel_regularizer="l2", gate_regularizer="l2")
        layer(inputs(2, 6))
        wanted = [
            0.01 * np.square(ops.convert_to_numpy(kernel)).sum()
            for kernel in (
                layer.experts.layers[0].kernel,
                layer.task_gates.kernel,
            )
        ]
        losses = sorted(
            float(ops.convert_to_numpy(loss)) for loss in layer.losses
        )
        self.assertAllClose(losses, sorted(wanted), rtol=1e-4)

    @parameterized.parameters(
        ({"num_tasks": 0}, "`num_tasks` must be"),
        ({"num_tasks": True}, "`num_tasks` must be"),
        (
            {"expert_units": [4, 0]},
            r"`expert_units` must .*expert_units=\[4, 0",
        ),
        ({"expert_units": 2.5}, "`expert_units` must .*=2.5"),
        ({"num_shared_experts": -1}, "`num_shared_experts` must be"),
        (
            {"num_task_experts": [1]},
            r"list of 2 such. .*num_task_experts=\[1\]",
        ),
        ({"num_task_experts": -1}, "num_task_experts=-1"),
        ({"num_shared_experts": 0}, "at least one expert. .*num_shared_expe"),
        (
            {"num_shared_experts": 0, "num_task_experts": [1, 0]},
            r"must see an expert.*for the gates \[1\]",
        ),
        ({"visibility": "some"}, "`visibility` must be one of.*'some'"),
        ({"visibility": [[1, 0]]}, r"`visibility` must .*\(2, 3\). Received"),
        (
            {"visibility": [[1, 0, 2], [1, 1, 1]]},
            "a matrix of zeros and ones",
        ),
        (
            {"visibility": [[0, 0, 0], [1, 1, 1]]},
            r"no expert for the gates \[0\]",
        ),
        ({"shared_sees": "own"}, "`shared_sees` must be one of.*'own'"),
        ({"expert_slots": [0, 1]}, r"list of 3 ints .*expert_slots=\[0, 1\]"),
        ({"expert_slots": [0, 1, -1]}, "`expert_slots` must be"),
        ({"expert_slots": 3}, "`expert_slots` must be"),
        ({"expert_normalization": "group"}, "`expert_normalization` must"),
        ({"expert_normalization_place": "last"}, "_place` must be one of"),
        ({"expert_dropout": 1.0}, "`expert_dropout` must"),
        ({"feature_gate_rank": 0}, "`feature_gate_rank` must"),
        ({"gate_input": "raw"}, "`gate_input` must be one of.*'raw'"),
        ({"gate_units": [0]}, "`gate_units` must"),
        ({"gate_normalization": "layer"}, "`gate_normalization` must"),
        ({"gate_activation": "best"}, "`gate_activation` must .*=.best"),
        (
            {"gate_activation": "top_k", "gate_top_k": 4},
            "`gate_top_k` must be an int between 1 and .*gate_top_k=4",
        ),
        (
            {"gate_activation": "dselect_k", "gate_normalization": "batch"},
            "`gate_normalization` means nothing with gate_activation='dselect",
        ),
        (
            {"gate_activation": "dselect_k", "gate_temperature": 2.0},
            "`gate_temperature` means nothing .*gate_temperature=2.0",
        ),
        (
            {"stop_cross_task_gradients": True},
            "must see experts of other tasks.*'own_and_shared'",
        ),
        (
            {"expert_units": (), "expert_dropout": 0.5},
            r"`expert_dropout` means nothing with expert_units=\(\)",
        ),
        ({"gate_gamma": 0}, "`gate_gamma` must be positive"),
        ({"gate_entropy_weight": -1}, "`gate_entropy_weight` must"),
        ({"gate_unused_code_weight": -1}, "`gate_unused_code_weight` must"),
        ({"gate_temperature": 0.0}, "`gate_temperature` must be positive"),
        ({"gate_dropout": -0.1}, "`gate_dropout` must"),
        ({"self_residual": True}, "`self_residual` must be one of"),
        ({"normalization_epsilon": 0}, "`normalization_epsilon` must"),
        ({"experts": "dense"}, "`experts` must be a layer or a list"),
        (
            {"experts": [keras.layers.Dense(3)]},
            "must have 3 different layers",
        ),
        (
            {"experts": keras.layers.Dense(3), "expert_units": [4]},
            "`expert_units` means nothing with `experts`",
        ),
        (
            {"experts": keras.layers.Dense(3), "expert_dropout": 0.1},
            "`expert_dropout` means nothing with `experts`",
        ),
    )
    def test_errors(self, kwargs, message):
        kwargs = {"num_tasks": 2, "num_shared_experts": 3, **kwargs}
        with self.assertRaisesRegex(ValueError, message):
            MultiGateMoE(**kwargs)

    @parameterized.parameters(
        ((4, None), {}, r"static but for the batch. .*\(4, None\)"),
        ((4, 3, 5, 6), {}, r"inputs_shape=\(4, 3, 5, 6\)"),
        ((4, 2, 6), {}, "must have 3 slots"),
        (
            (4, 3, 6),
            {"num_task_experts": 1, "num_shared_experts": 0},
            "2 slots",
        ),
        ((4, 2, 6), {"expert_slots": [0, 1, 3]}, "must have 4 slots"),
        ((4, 6), {"gate_input": "slot_plus_shared"}, "must have slots"),
    )
    def test_errors_of_shapes(self, shape, kwargs, message):
        kwargs = {"num_shared_experts": 3, **kwargs}
        with self.assertRaisesRegex(ValueError, message):
            MultiGateMoE(2, **kwargs).build(shape)

    def test_errors_of_gate_inputs(self):
        layer = MultiGateMoE(2, gate_input="slot_plus_shared")
        with self.assertRaisesRegex(ValueError, "only be given with gate_inp"):
            layer.build((4, 3, 6), (4, 6))
        for shape in ((4,), (4, 3, 6), (4, None)):
            with self.assertRaisesRegex(ValueError, "with 2 gates"):
                MultiGateMoE(2).build((4, 6), shape)

    def test_shape_before_it_is_built(self):
        layer = MultiGateMoE(2, experts=keras.layers.Dense(3))
        self.assertEqual(layer.compute_output_shape((None, 6)), (None, 2, 3))

    def test_experts_of_different_widths(self):
        experts = [keras.layers.Dense(3), keras.layers.Dense(4)]
        layer = MultiGateMoE(1, num_shared_experts=2, experts=experts)
        with self.assertRaisesRegex(ValueError, "rows of the same width"):
            layer.build((4, 6))
