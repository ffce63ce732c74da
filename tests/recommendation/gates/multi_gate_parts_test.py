"""Experts and gates of a `MultiGateMoE` that are given as objects."""

import os

import keras
import numpy as np
from absl.testing import parameterized
from keras import ops

from keras_moe.layers import LayerNetworks
from keras_moe.layers import MultiGateMoE
from keras_moe.layers import StackedMLP
from keras_moe.layers import TaskGates
from keras_moe.models import PLE
from tests.recommendation.gates.multi_gate_loop import loop
from tests.recommendation.gates.multi_gate_moe_test import inputs
from tests.test_case import TestCase

FILES = os.path.join(
    os.path.dirname(__file__), "..", "..", "data", "saved_multi_gate"
)
DATA = {
    "city": ["Rome", "Oslo", "Rome", "Bern"] * 8,
    "age": [31.0, 40.0, 25.0, 9.0] * 8,
    "shop": ["a", "b", "c", "a"] * 8,
}
UNITS = {"num_task_experts": [1, 2], "num_shared_experts": 1}
# Arguments of the parts, and the same as flat ones.
EXPERTS = {"activation": "silu", "normalization": "layer", "use_bias": False}
GATES = {"units": [3], "activation": "top_k", "top_k": 1, "use_bias": False}
FLAT = {
    **{f"expert_{name}": value for name, value in EXPERTS.items()},
    **{f"gate_{name}": value for name, value in GATES.items()},
}


def composed(**kwargs):
    return MultiGateMoE(
        2,
        experts=StackedMLP(4, [5, 4], **EXPERTS),
        gates=TaskGates(**GATES),
        **{**UNITS, **kwargs},
    )


class PartsTest(TestCase):
    def test_the_same_as_flat_arguments(self):
        layer = composed(self_residual="gates", seed=1)
        flat = MultiGateMoE(
            2, [5, 4], **UNITS, **FLAT, self_residual="gates", seed=1
        )
        x = inputs(5, 6)
        layer.build(x.shape)
        flat.build(x.shape)
        flat.set_weights(layer.get_weights())
        self.assert_relative(layer(x), ops.convert_to_numpy(flat(x)))
        self.assertFalse(layer.residual.use_bias)

    def test_saving(self):
        layer = composed(output_shared=True)
        x = keras.Input((3, 6))
        model = keras.Model(x, layer(x))
        path = os.path.join(self.get_temp_dir(), "model.keras")
        model.save(path)
        loaded = keras.saving.load_model(path)
        x = inputs(5, 3, 6)
        self.assert_relative(loaded(x), ops.convert_to_numpy(model(x)))
        self.assertEqual(
            [v.path for v in loaded.variables],
            [v.path for v in model.variables],
        )

    @parameterized.parameters("seq", "seq2", "home")
    def test_files_of_an_older_version(self, name):
        """Trained and saved when all arguments were flat ones."""
        path = os.path.join(FILES, name)
        model = keras.saving.load_model(f"{path}.keras")
        recorded = dict(np.load(f"{path}.npz"))
        if name == "home":
            x = model.get_layer("features").encode(DATA)
            found = model.predict(x, verbose=0)
            for task in ("click", "buy"):
                self.assert_relative(found[task], recorded[task])
        else:
            found = model.predict(recorded["x"], verbose=0)
            self.assert_relative(found, recorded["p"])
        # The optimizer's state belongs to the variables in their order.
        trained = [v.shape for v in model.trainable_variables]
        state = [v.shape for v in model.optimizer.variables[2:]]
        self.assertEqual(state, [x for x in trained for _ in range(2)])
        first = ops.convert_to_numpy(model.optimizer.variables[2])
        self.assertGreater(np.abs(first).max(), 0)

    def test_each_layer_has_parts_of_its_own(self):
        gates = TaskGates()
        MultiGateMoE(2, gates=gates)
        with self.assertRaisesRegex(
            ValueError, "`gates` must belong to one layer"
        ):
            MultiGateMoE(2, gates=gates)

    def test_networks_of_layers(self):
        experts = LayerNetworks(keras.layers.Dense(4, "relu"), 4)
        layer = MultiGateMoE(2, experts=experts, **UNITS, return_gates=True)
        x = inputs(5, 6)
        outputs, gates = map(ops.convert_to_numpy, layer(x))
        hidden = np.stack(
            [ops.convert_to_numpy(part(x)) for part in experts.layers], axis=1
        )
        self.assert_relative(outputs, gates @ hidden)
        copy = LayerNetworks.from_config(experts.get_config())
        copy.build(x.shape)
        copy.set_weights(experts.get_weights())
        self.assert_relative(copy(x), hidden)

    def test_gates_alone(self):
        gates = TaskGates(visible=[[1, 1, 0], [1, 1, 1]], temperature=2.0)
        layer = MultiGateMoE(
            2,
            [4],
            3,
            visibility=[[1, 1, 0], [1, 1, 1]],
            gate_temperature=2.0,
        )
        x = inputs(5, 6)
        layer.build(x.shape)
        gates.build(x.shape)
        gates.set_weights(layer.task_gates.get_weights())
        self.assert_relative(gates(x), loop(layer, x)[1])
        copy = TaskGates.from_config(gates.get_config())
        self.assertEqual(copy.visible.tolist(), gates.visible.tolist())

    def test_levels_of_a_model(self):
        x = {"x": keras.Input((4,), name="x")}
        model = PLE(
            ["a", "b"],
            lambda given: given["x"],
            num_task_experts=1,
            num_shared_experts=1,
            experts=StackedMLP(3, [4]),
            gates=TaskGates(activation="sigmoid", seed=1),
            inputs=x,
        )
        first, second = model.get_layer("level_0"), model.get_layer("level_1")
        self.assertIsNot(first.task_gates, second.task_gates)
        self.assertIsNot(first.experts, second.experts)
        self.assertEqual(second.task_gates.activation.__name__, "sigmoid")

    @parameterized.parameters(
        ({"gates": "softmax"}, "`gates` must be .*gates='softmax'"),
        (
            {"gate_top_k": 1},
            "`gate_top_k` means nothing with `gates`. .*gate_top_k=1",
        ),
        ({"expert_units": 3}, r"`expert_units` means nothing .*\(3,\)"),
        ({"num_shared_experts": 2}, "must be 5 networks.*num_networks=4"),
        ({"return_gates": 1}, "`return_gates` must be True or False"),
        ({"output_shared": "yes"}, "`output_shared` must be True or False"),
    )
    def test_errors(self, kwargs, message):
        with self.assertRaisesRegex(ValueError, message):
            MultiGateMoE(
                **{
                    "num_tasks": 2,
                    "experts": StackedMLP(4, [3]),
                    "gates": TaskGates(),
                    **UNITS,
                    **kwargs,
                }
            )

    @parameterized.parameters(
        ({"top_k": True}, "`top_k` must be an int"),
        ({"use_bias": "no"}, "`use_bias` must be True or False"),
        ({"dropout": float("nan")}, "`dropout` must be a number"),
        ({"visible": [[1, 0], [0, 0]]}, r"`visible` must .*\[\[1, 0\], \[0"),
        ({"visible": [[1, 2]]}, "`visible` must be a matrix"),
        ({"activation": "best"}, "`activation` must be .*='best'"),
        (
            {"activation": "top_k", "visible": [[1, 0]]},
            "`top_k` must be an int between 1 and .*top_k=2",
        ),
    )
    def test_errors_of_gates(self, kwargs, message):
        with self.assertRaisesRegex(ValueError, message):
            TaskGates(**kwargs)

    def test_gates_that_see_nothing(self):
        with self.assertRaisesRegex(ValueError, "need `visible`"):
            TaskGates().build((None, 3))
