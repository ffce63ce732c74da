"""HoME: groups of tasks, and above them tasks."""

import numpy as np
from absl.testing import parameterized

from keras_moe import models
from tests.recommendation.models.model_checks import DIM
from tests.recommendation.models.model_checks import assert_predicts
from tests.recommendation.models.model_checks import batch
from tests.recommendation.models.model_checks import check_trains_and_saves
from tests.recommendation.models.model_checks import specs
from tests.recommendation.models.model_checks import vectors
from tests.recommendation.models.numpy_trunks import experts
from tests.recommendation.models.numpy_trunks import gates
from tests.recommendation.models.numpy_trunks import mix
from tests.recommendation.models.numpy_trunks import predictions
from tests.recommendation.models.numpy_trunks import randomize
from tests.recommendation.models.numpy_trunks import silu
from tests.recommendation.models.numpy_trunks import weights_of
from tests.test_case import TestCase

STRUCTURE = {
    "groups": [["a", "c"], ["b"]],
    "num_shared_experts": 1,
    "num_group_experts": [1, 2],
    "num_task_experts": [1, 2, 0],
    "expert_units": (4,),
    "feature_gate_rank": 2,
}
# Experts 0 of the first group, 1 and 2 of the second, 3 shared.
GROUPS_SEE = [[0, 3], [1, 2, 3], [0, 1, 2, 3]]
GROUPS_OWN = [[0], [1, 2], [3]]
# Experts 0 of a, 1 and 2 of b, 3 of a and c, 4 and 5 of b's group, 6 shared.
TASKS_SEE = [[0, 3, 6], [1, 2, 4, 5, 6], [3, 6]]
TASKS_OWN = [[0], [1, 2], []]


def level(layer, reads, gate_reads, sees, own):
    w = weights_of(layer)
    outputs = experts(w, reads, silu)
    mixed = mix(gates(w, gate_reads, sees), outputs, sees)
    selves = mix(gates(w, gate_reads, own, "residual"), outputs, own)
    return [y + more for y, more in zip(mixed, selves, strict=True)]


def home(model, x):
    first, second, shared = level(
        model.get_layer("group_level"),
        *([x] * 4, [x] * 3, GROUPS_SEE, GROUPS_OWN),
    )
    reads = [
        *(first, second, second),
        *(first, second, second, shared),
    ]
    gate_reads = [
        np.concatenate([group, shared], axis=-1)
        for group in (first, second, first)
    ]
    task_level = model.get_layer("task_level")
    return level(task_level, reads, gate_reads, TASKS_SEE, TASKS_OWN)


class HoMETest(TestCase):
    def test_by_hand(self):
        model = models.HoME(specs("a", "b", "c"), vectors(), **STRUCTURE)
        norms = 4 * 4  # Scale, offset, mean and variance of an expert.
        groups = 4 * (2 * 2 * DIM + DIM * 4 + 4 + norms)
        groups += (DIM + 1) * (2 + 3 + 4) + (DIM + 1) * 4
        tasks = 7 * (2 * 2 * 4 + 4 * 4 + 4 + norms)
        tasks += (8 + 1) * (3 + 5 + 2) + (8 + 1) * 3
        self.assertEqual(model.count_params(), groups + tasks + 3 * 5)
        randomize(model)
        x = batch()
        expected = predictions(model, home(model, x["x"].astype("float64")))
        assert_predicts(model, x, expected)
        found = model.gate_weights(x, level=0)
        self.assertEqual(list(found), ["group_0", "group_1", "shared"])
        found = model.gate_weights(x)
        for name, sees in zip("abc", TASKS_SEE, strict=True):
            seen = np.flatnonzero(found[name].any(axis=0)).tolist()
            self.assertEqual(seen, sees)

    def test_train_and_save(self):
        model = models.HoME(
            specs("a", "b", "c"),
            vectors(),
            **{**STRUCTURE, "expert_units": [[5], [4]]},
            heads="aitm",
            expert_activation="relu",
        )
        check_trains_and_saves(self, model, batch())

    def test_groups_of_one_and_none_shared(self):
        model = models.HoME(
            specs("a", "b"),
            vectors(),
            num_shared_experts=0,
            expert_normalization=None,
            feature_gate_rank=None,
        )
        gates = model.gate_weights(batch())
        self.assertEqual({g.shape for g in gates.values()}, {(8, 8)})
        np.testing.assert_array_equal(gates["a"][:, [2, 3, 6, 7]], 0)
        one = models.HoME(specs("a"), vectors())
        self.assertEqual(one.predict_on_batch(batch())["a"].shape, (8, 1))

    @parameterized.parameters(
        ({"groups": [["a"], ["b"]]}, "each task occurs once"),
        ({"groups": [["a", "b"], ["b", "c"]]}, "each task occurs once"),
        ({"groups": ["a", "b", "c"]}, "each task occurs once"),
        ({"num_group_experts": [1]}, "`num_group_experts` must be"),
        ({"num_task_experts": -1}, "`num_task_experts` must be"),
        ({"visibility": "all"}, r"Received: \['visibility'\]"),
    )
    def test_errors(self, kwargs, message):
        kwargs = {**STRUCTURE, **kwargs}
        with self.assertRaisesRegex(ValueError, message):
            models.HoME(specs("a", "b", "c"), vectors(), **kwargs)
