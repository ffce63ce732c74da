"""Values of the wrong kind, given to the wing's layers and stacked networks."""

import inspect
import re

import numpy as np
from absl.testing import parameterized

from keras_moe import layers
from tests.test_case import TestCase

NEEDED = {
    layers.AITMTransfer: {},
    layers.BalancedExperts: {},
    layers.CrossNetMix: {},
    layers.CrossStitch: {},
    layers.EPNet: {},
    layers.GateNU: {"units": 3},
    layers.PartitionedNormalization: {"num_domains": 2},
    layers.PPNet: {"num_tasks": 2, "units": [3]},
    layers.STARDense: {"num_domains": 2, "units": 3},
    layers.StackedDense: {"num_networks": 2, "units": 3},
    layers.StackedMLP: {"num_networks": 2, "units": [], "output_units": 1},
    layers.SubNetworkRouting: {"num_outputs": 2},
    layers.TaskGates: {},
}
WRONG = {
    "number": (True, np.nan, np.inf, "1"),
    "bool": (300, np.nan, "no"),
    "choice": ("unheard of", 300, True),
}
# Arguments whose default does not tell that they take numbers or choices.
NUMBERS = (
    *("units", "num_networks", "num_domains", "num_tasks", "num_outputs"),
    *("output_units", "hidden_units", "gate_units", "num_gates", "seed"),
)
CHOICES = re.compile("initializer$|regularizer$|activation$|normalization$")


def kind_of(name, default):
    if name in NUMBERS:
        return "number"
    if isinstance(default, bool):
        return "bool"
    if isinstance(default, str) or CHOICES.search(name):
        return "choice"
    if isinstance(default, (int, float)):
        return "number"
    raise ValueError(f"What does {name}={default!r} take?")


def cases():
    for make in NEEDED:
        for name, parameter in inspect.signature(make).parameters.items():
            # Which pairs are visible is not a number, and Keras checks dtypes.
            if name not in ("kwargs", "visible", "dtype"):
                kind = kind_of(name, parameter.default)
                yield f"{make.__name__}_{name}", make, name, kind


class ArgumentsTest(TestCase):
    @parameterized.named_parameters(cases())
    def test_wrong_kind(self, make, name, kind):
        make(**NEEDED[make])
        for value in WRONG[kind]:
            message = f"(?s)`{name}` must be .*Received: .*"
            message += re.escape(f"{name}={value!r}")
            with self.assertRaisesRegex(ValueError, message):
                make(**{**NEEDED[make], name: value})
