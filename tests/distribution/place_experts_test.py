"""Placements of experts, against everything that is possible."""

import itertools

import numpy as np
from absl.testing import parameterized

from keras_moe.distribution import place_experts
from tests.test_case import TestCase

SIZES = (
    *((4, 2, 3), (4, 3, 2), (5, 3, 2), (6, 3, 2), (6, 2, 3), (6, 2, 4)),
    *((5, 4, 2), (6, 3, 3), (6, 4, 2)),
)


def best_possible(loads, num_devices, slots):
    """The smallest largest load, by trying every placement."""
    choices = list(itertools.combinations(range(len(loads)), slots))
    kept = np.zeros((len(choices), len(loads)))
    for row, experts in zip(kept, choices, strict=True):
        row[list(experts)] = 1
    best = np.inf
    for chosen in itertools.combinations_with_replacement(kept, num_devices):
        chosen = np.stack(chosen)
        copies = chosen.sum(axis=0)
        if copies.min() > 0:
            best = min(best, (chosen @ (loads / copies)).max())
    return best


def largest_in_order(loads, num_devices, slots):
    """Of the placement that does not look at the loads."""
    held = np.arange(num_devices * slots) % len(loads)
    share = loads / np.bincount(held)
    return share[held].reshape((num_devices, slots)).sum(axis=1).max()


class PlaceExpertsTest(TestCase):
    def check(self, result, loads, num_devices, slots):
        """What every result must be, by hand from the placement alone."""
        self.assertEqual(result.placement.shape, (num_devices, slots))
        copies = [0] * len(loads)
        for experts in result.placement.tolist():
            self.assertLen(set(experts), slots)
            self.assertEqual(experts, sorted(experts))
            for expert in experts:
                copies[expert] += 1
        self.assertEqual(result.copies.tolist(), copies)
        self.assertGreater(min(copies), 0)
        sums = [
            sum(loads[expert] / copies[expert] for expert in experts)
            for experts in result.placement
        ]
        self.assertAllClose(result.device_loads, sums)
        self.assertAllClose(
            result.imbalance, max(sums) * num_devices / sum(sums)
        )

    def test_against_everything_possible(self):
        rng = np.random.default_rng(0)
        ratios = []
        for case in range(54):
            experts, devices, slots = SIZES[case % len(SIZES)]
            loads = rng.gamma((0.5, 1, 3)[case % 3], size=experts)
            result = place_experts(loads, devices, slots)
            self.check(result, loads, devices, slots)
            largest = result.device_loads.max()
            ratios.append(largest / best_possible(loads, devices, slots))
            trivial = largest_in_order(loads, devices, slots)
            self.assertLess(largest, trivial * (1 + 1e-9))
        self.assertGreater(min(ratios), 1 - 1e-9)
        self.assertLess(max(ratios), 1.1)
        best = [ratio < 1 + 1e-9 for ratio in ratios]
        self.assertGreaterEqual(sum(best), 50)

    @parameterized.parameters((64, 5), (256, 1), (32, 8))
    def test_size_of_a_large_model(self, devices, slots):
        loads = np.random.default_rng(1).gamma(1, size=256)
        result = place_experts(loads, devices, slots)
        self.check(result, loads, devices, slots)
        trivial = largest_in_order(loads, devices, slots)
        self.assertLessEqual(result.device_loads.max(), trivial * (1 + 1e-9))
        if slots == 1:
            self.assertEqual(result.copies.tolist(), [1] * 256)
        elif devices == 32:
            # No slot is left: the busiest expert with the seven idlest.
            loads = np.sort(loads)
            least = loads[-1] + loads[:7].sum()
            self.assertAllClose(result.device_loads.max(), least)
        else:
            self.assertLess(result.imbalance, 1.005)
            # Which is not for nothing.
            self.assertGreater(trivial / result.device_loads.mean(), 1.5)

    def test_layers_are_placed_each_on_its_own(self):
        loads = np.array([[8, 1, 1, 1], [1, 1, 1, 8]])
        result = place_experts(loads, 2, 3)
        self.assertEqual(result.placement.shape, (2, 2, 3))
        self.assertEqual(result.copies.sum(axis=1).tolist(), [6, 6])
        for layer in range(2):
            alone = place_experts(loads[layer], 2, 3)
            for one, field in zip(alone, result, strict=True):
                self.assertAllClose(one, field[layer])
        self.assertEqual(result.copies[0, 0], 2)
        self.assertEqual(result.copies[1, 3], 2)

    def test_experts_of_a_group_stay_on_a_node(self):
        loads = np.random.default_rng(2).gamma(1, size=16)
        result = place_experts(loads, 4, 5, num_nodes=2, num_expert_groups=4)
        self.check(result, loads, 4, 5)
        nodes = result.placement.reshape((2, -1))
        groups = [{expert // 4 for expert in node} for node in nodes.tolist()]
        self.assertEqual([len(groups[0]), len(groups[1])], [2, 2])
        self.assertEqual(groups[0] | groups[1], {0, 1, 2, 3})
        # The nodes are balanced as well as four groups in pairs can be.
        of_group = loads.reshape((4, 4)).sum(axis=1)
        pairs = itertools.combinations(range(4), 2)
        best = min(
            max(pair, of_group.sum() - pair)
            for pair in (of_group[list(pair)].sum() for pair in pairs)
        )
        of_node = result.device_loads.reshape((2, 2)).sum(axis=1)
        self.assertAllClose(of_node.max(), best)

    def test_edges(self):
        nothing = place_experts(np.zeros(4), 2)
        self.assertEqual(nothing.imbalance, 1.0)
        self.assertEqual(nothing.placement.shape, (2, 2))
        everywhere = place_experts([3, 1, 2], 3, 3)
        self.assertEqual(everywhere.copies.tolist(), [3, 3, 3])
        self.assertAllClose(everywhere.imbalance, 1.0)
        one = place_experts([5.0], 1)
        self.assertEqual(one.placement.tolist(), [[0]])
        # Three experts of two devices: one slot is left, for the busiest.
        self.assertEqual(place_experts([9, 4, 5], 2).copies.tolist(), [2, 1, 1])

    @parameterized.parameters(
        (dict(loads=[[[1.0]]]), r"`loads` must be finite"),
        (dict(loads=[1.0, -1.0]), r"`loads` must be finite"),
        (dict(loads=[1.0, float("nan")]), r"`loads` must be finite"),
        (dict(loads="many"), r"`loads` must be finite.*loads='many'"),
        (dict(num_devices=0), r"`num_devices` must be an int of at least 1"),
        (dict(slots_per_device=1), r"2 slots on each device are enough"),
        (dict(slots_per_device=5), r"at most the number of experts\. "),
        (dict(num_nodes=3), r"`num_devices` must be a multiple of `num_nodes`"),
        (
            dict(num_nodes=2, num_expert_groups=1),
            r"`num_expert_groups` must be a multiple of `num_nodes`",
        ),
        (dict(num_expert_groups=3), r"must divide the number of experts"),
        (dict(num_nodes=2, slots_per_device=3), r"experts of a node"),
    )
    def test_errors(self, wrong, message):
        arguments = dict(loads=[1.0, 2.0, 3.0, 4.0], num_devices=2)
        with self.assertRaisesRegex(ValueError, message):
            place_experts(**{**arguments, **wrong})
