"""Values of the wrong kind, given to every argument of routers and losses.

The arguments are those in the signatures; what each takes is told by its
default, or here where the default does not tell.
"""

import inspect
import re

import keras
import numpy as np
from absl.testing import parameterized

from keras_moe import losses
from keras_moe import ops
from keras_moe import routers
from tests.test_case import TestCase

WRONG = {
    "number": (True, np.nan, np.inf, -np.inf, "1"),
    "bool": (300, 0, np.nan, "no"),
    "choice": ("unheard of", 300, True),
    "keras": ("unheard of", 300, True),
    "array": (300, "1"),
    "per": ("unheard of", 1.5, 0, True, np.nan),
    "expert_bias": ("unheard of", 300, 1),
}
# Of what kind arguments are whose default is None or missing.
KINDS = {
    **dict.fromkeys(
        (
            *("num_experts", "num_tasks", "num_groups", "experts_per_group"),
            *("num_devices", "max_devices", "weight", "top_k", "eval_top_k"),
            *("bias_update_rate", "logit_softcap", "max_experts", "capacity"),
            *("projection_dim", "standardize_logits", "num_ids", "seed"),
            *("threshold", "modality", "hidden_dims"),
        ),
        "number",
    ),
    **dict.fromkeys(
        (
            *("normalize_weights", "normalize_group_weights"),
            "score_after_selection",
        ),
        "bool",
    ),
    **dict.fromkeys(
        ("learned_scale", "residual", "score_activation"), "choice"
    ),
    **dict.fromkeys(("table", "allowed_experts"), "array"),
    "per": "per",
    "expert_bias": "expert_bias",
    "noise_stddev": "number",
}
# What a class or an argument needs besides.
NEEDED = {
    routers.HashRouter: {"num_ids": 4},
    routers.TaskRouter: {"num_tasks": 2},
    routers.HierarchicalRouter: {"num_groups": 2, "experts_per_group": 2},
    losses.DeviceBalanceLoss: {"num_devices": 2},
    losses.CommunicationBalanceLoss: {"num_devices": 2, "max_devices": 1},
    losses.RoutingLoss: {"weight": 1.0},
    "top_k_groups": {"num_expert_groups": 2},
    "group_score": {"num_expert_groups": 2},
    "threshold": {"kind": "marginal"},
}
# Checked by Keras, with other words.
OF_KERAS = ("name", "dtype", "reduction", "self", "args", "kwargs")


def classes():
    for module in (routers, losses):
        for value in vars(module).values():
            if inspect.isclass(value) and not issubclass(value, tuple):
                yield value


def kind_of(name, default):
    if re.search("(initializer|regularizer)$", name) or name == "activation":
        return "keras"
    if name in KINDS:
        return KINDS[name]
    if isinstance(default, bool):
        return "bool"
    if isinstance(default, (int, float)):
        return "number"
    if isinstance(default, str):
        return "choice"
    raise ValueError(f"KINDS does not say what {name}={default!r} takes.")


def cases():
    """`(name of the case, class, argument, kind)`, where it is first named."""
    for make in classes():
        parameters = inspect.signature(make.__init__).parameters
        for name, parameter in parameters.items():
            if name not in OF_KERAS:
                kind = kind_of(name, parameter.default)
                yield f"{make.__name__}_{name}", make, name, kind


class ArgumentsTest(TestCase):
    @parameterized.named_parameters(cases())
    def test_wrong_kind(self, make, name, kind):
        known = inspect.signature(make.__init__).parameters
        needed = dict(NEEDED.get(make, {}))
        if "num_experts" in known:
            needed["num_experts"] = 4
        for other, value in NEEDED.get(name, {}).items():
            if other in known:
                needed[other] = value
        make(**needed)
        for value in WRONG[kind]:
            message = f"(?s)^`{name}` must be .*Received: .*"
            if kind != "array":
                message += re.escape(f"{name}={value!r}")
            with self.assertRaisesRegex(ValueError, message):
                make(**{**needed, name: value})

    def test_all_are_tried(self):
        found = {(make, name) for _, make, name, _ in cases()}
        self.assertIn((routers.TopKRouter, "score_after_selection"), found)
        self.assertIn((routers.LinearRouter, "kernel_initializer"), found)
        self.assertIn((losses.LoadBalancingLoss, "per"), found)
        self.assertGreater(len(found), 120)

    def test_iterations_of_sinkhorn(self):
        for value in WRONG["number"]:
            received = re.escape(f"num_iterations={value!r}")
            with self.assertRaisesRegex(ValueError, received):
                ops.sinkhorn([[0.0]], num_iterations=value)

    def test_numbers_and_bools_of_numpy(self):
        loss = losses.RouterZLoss(weight=np.float32(0.5))
        self.assertEqual(loss.weight, 0.5)
        router = routers.GShardRouter(4, 3, threshold=np.array([0.5, 0.25]))
        self.assertEqual(router.threshold, [0.5, 0.25])
        router = routers.TopKRouter(4, use_bias=np.bool_(True))
        router.build((None, 3))
        self.assertEqual(tuple(router.bias.shape), (4,))

    def test_what_keras_takes_passes(self):
        for initializer in ("zeros", keras.initializers.Zeros()):
            router = routers.LinearRouter(4, kernel_initializer=initializer)
            self.assertIsInstance(
                router.kernel_initializer, keras.initializers.Zeros
            )
        config = router.get_config()["kernel_initializer"]
        again = routers.LinearRouter(4, kernel_initializer=config)
        self.assertIsInstance(
            again.kernel_initializer, keras.initializers.Zeros
        )
