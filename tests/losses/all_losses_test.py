"""The values and gradients of the losses on routings, and their arguments."""

import keras
import numpy as np
from absl.testing import parameterized
from keras import ops

from keras_moe import losses
from keras_moe import routers
from keras_moe.routers import Routing
from tests import token_loop
from tests.losses import loops
from tests.losses.cases import CASES
from tests.losses.cases import GROUPED
from tests.losses.cases import MASK
from tests.losses.cases import SEQUENCES
from tests.losses.cases import LoadRouting
from tests.losses.cases import T
from tests.losses.cases import arrays
from tests.losses.cases import routing_of
from tests.losses.cases import tensor_routing_of
from tests.losses.cases import tensors
from tests.losses.cases import with_per
from tests.losses.gradients import value_and_gradient
from tests.test_case import TestCase


class AllLossesTest(TestCase):
    def check(self, name, per="batch", masked=False, sigmoid=False):
        loss, function = CASES[name]
        groups = {"batch": 1, "sequence": SEQUENCES, SEQUENCES: 1, 1: 3}[per]
        if name != "z":
            loss = with_per(loss, per)
        logits, indices = arrays()
        mask = MASK if masked else np.ones(T, bool)

        def expected(parts):
            r = routing_of(parts["logits"], indices, sigmoid)
            return loops.over_groups(
                lambda tokens: function(r, tokens), T, mask, groups
            )

        def actual(logits):
            return loss(
                tensor_routing_of(logits, indices, sigmoid),
                ops.array(mask) if masked else None,
                SEQUENCES,
            )

        value, gradient = value_and_gradient(actual, logits)
        parts = {"logits": logits}
        self.assert_relative(value, expected(parts))
        wanted = token_loop.gradients(expected, parts)["logits"]
        self.assertGreater(np.abs(wanted).max(), 1e-4)
        scale = np.abs(wanted).max()
        np.testing.assert_allclose(gradient, wanted, rtol=0, atol=2e-5 * scale)

    @parameterized.parameters(*CASES)
    def test_against_loops(self, name):
        self.check(name, masked=True)

    @parameterized.parameters("balance", "importance", "marginal")
    def test_per_sequence_against_loops(self, name):
        self.check(name, per="sequence", masked=True)

    @parameterized.parameters("balance_raw", "entropy", "devices")
    def test_sigmoid_scores_against_loops(self, name):
        self.check(name, per=1, sigmoid=True)

    @parameterized.parameters(*GROUPED)
    def test_per_sequence_is_the_mean_over_sequences(self, name):
        loss = CASES[name][0]
        logits, indices = arrays(seed=1)
        r = routing_of(logits, indices)
        size = T // SEQUENCES
        single = [
            float(loss(tensors(LoadRouting(*(x[i : i + size] for x in r)))))
            for i in range(0, T, size)
        ]
        whole = with_per(loss, "sequence")(tensors(r), None, SEQUENCES)
        self.assertAllClose(float(whole), np.mean(single), rtol=1e-5)
        self.assertGreater(np.ptp(single), 1e-5)

    @parameterized.parameters(*CASES)
    def test_config(self, name):
        loss = CASES[name][0]
        if name != "z":
            loss = with_per(loss, 2)
        config = keras.saving.serialize_keras_object(loss)
        again = losses.get(config)[0]
        self.assertIs(type(again), type(loss))
        self.assertEqual(again.get_config(), loss.get_config())
        self.assertEqual(vars(again), vars(loss))

    def test_values_at_balance_and_collapse(self):
        # Each token is sure of its two experts, e and e + 3 of 6.
        indices = np.stack([np.arange(6), (np.arange(6) + 3) % 6], axis=1)
        probs = np.zeros((6, 6))
        np.put_along_axis(probs, indices, 0.5, 1)
        ones = np.ones((6, 2))
        balanced = tensors(
            LoadRouting(np.log(probs + 1e-30), probs, indices, ones, 2 * probs)
        )
        one_expert = np.zeros((6, 6))
        one_expert[:, 0] = 1
        zero = np.zeros((6, 1), int)
        collapsed = tensors(
            LoadRouting(
                np.log(one_expert + 1e-30),
                one_expert,
                zero,
                ones[:, :1],
                one_expert,
            )
        )
        for name, at_balance, at_collapse in (
            ("balance", 1, 6),
            ("balance_first", 1, 6),
            ("balance_hf", 2, 6),
            ("importance", 0, 5),
            ("importance_softmax", 0, 6),
            ("load", 0, 6),
            ("entropy", np.log(2), 0),
            ("marginal", -np.log(6), 0),
            ("threshold", 0, 1.75),
            ("information", np.log(2) - np.log(6), 0),
            ("devices", 1, 3),
            ("communication", 1, 1.5),  # to one of 3 devices, not to two
        ):
            loss = CASES[name][0]
            if name == "threshold":  # log(6) is more than enough
                self.assertGreater(np.log(6), loss.threshold)
            self.assertAllClose(loss(balanced), at_balance, atol=1e-5, msg=name)
            self.assertAllClose(
                loss(collapsed), at_collapse, atol=1e-5, msg=name
            )

    def test_weight_and_defaults(self):
        r = tensors(routing_of(*arrays()))
        for name, (loss, _) in CASES.items():
            heavy = type(loss).from_config({**loss.get_config(), "weight": 3})
            self.assertAllClose(heavy(r), 3 * loss(r), msg=name)
        for cls, weight in (
            (losses.LoadBalancingLoss, 1e-2),
            (losses.ImportanceLoss, 0.1),
            (losses.LoadLoss, 0.1),
            (losses.EntropyLoss, 1e-2),
            (losses.MutualInformationLoss, 1e-2),
        ):
            self.assertEqual(cls().weight, weight)
        self.assertEqual(losses.DeviceBalanceLoss(2).weight, 0.05)
        self.assertEqual(losses.CommunicationBalanceLoss(2, 1).weight, 0.02)

    def test_names(self):
        for name, cls in (
            ("importance", losses.ImportanceLoss),
            ("load", losses.LoadLoss),
            ("entropy", losses.EntropyLoss),
            ("mutual_information", losses.MutualInformationLoss),
        ):
            (loss,) = losses.get(name)
            self.assertIs(type(loss), cls)

    def test_load_loss_checks_the_router(self):
        loss = losses.LoadLoss()
        loss.check_router(routers.NoisyTopKRouter(4))
        loss.check_router(routers.Router(4))  # does not say what it returns
        for router in (
            routers.TopKRouter(4),
            routers.MLPRouter(4, hidden_dims=2),
            routers.HashRouter(4, num_ids=2),
        ):
            name = type(router).__name__
            with self.assertRaisesRegex(ValueError, f"`LoadLoss`.*{name}"):
                loss.check_router(router)

    def test_device_losses_check_the_router(self):
        for loss in (
            losses.DeviceBalanceLoss(3),
            losses.CommunicationBalanceLoss(3, 2),
        ):
            loss.check_router(routers.TopKRouter(6))
            for num_experts in (1, 2, 4):
                message = f"num_devices=3, num_experts={num_experts}"
                with self.assertRaisesRegex(ValueError, message):
                    loss.check_router(routers.DenseRouter(num_experts))

    def test_other_losses_take_any_router(self):
        router = routers.TopKRouter(3, 1)
        for name in ("default", "importance", "entropy", "mutual_information"):
            for loss in losses.get(name):
                self.assertIsNone(loss.check_router(router))

    def test_errors(self):
        for call, message in (
            (
                lambda: losses.LoadBalancingLoss(per="token"),
                "`per` must .* per='token'",
            ),
            (lambda: losses.LoadBalancingLoss(per=0), "`per` must .* per=0"),
            (
                lambda: losses.LoadBalancingLoss(assignments="top"),
                "'logits'.*'top'",
            ),
            (
                lambda: losses.LoadBalancingLoss(scores="weights"),
                "'softmax'.*'weights'",
            ),
            (lambda: losses.ImportanceLoss(scores="sum"), "'weights'.*'sum'"),
            (lambda: losses.ImportanceLoss(ddof=2), "`ddof` must .* ddof=2"),
            (lambda: losses.LoadLoss(ddof=-1), "`ddof` must .* ddof=-1"),
            (lambda: losses.LoadLoss(per="global"), "per='global'"),
            (lambda: losses.EntropyLoss(kind="joint"), "'marginal'.*'joint'"),
            (lambda: losses.EntropyLoss(threshold=1.0), "kind='token'"),
            (
                lambda: losses.EntropyLoss(kind="marginal", threshold=0),
                "threshold=0",
            ),
            (lambda: losses.EntropyLoss(modality="text"), "modality='text'"),
            (lambda: losses.DeviceBalanceLoss(0), "num_devices=0"),
            (lambda: losses.CommunicationBalanceLoss(2, 3), "max_devices=3"),
            (lambda: losses.MutualInformationLoss(-1), "weight=-1"),
        ):
            with self.assertRaisesRegex(ValueError, message):
                call()
        r = tensors(routing_of(*arrays()))
        with self.assertRaisesRegex(ValueError, "num_devices=4, num_experts=6"):
            losses.DeviceBalanceLoss(4)(r)
        with self.assertRaisesRegex(ValueError, "num_devices=4, num_experts=6"):
            losses.CommunicationBalanceLoss(4, 1)(r)
        with self.assertRaisesRegex(ValueError, "per=2, num_sequences=3"):
            losses.EntropyLoss(per=2)(r, None, 3)
        with self.assertRaisesRegex(ValueError, "NoisyTopKRouter.*=Routing"):
            losses.LoadLoss()(Routing(*r[:4]))
        for context, shape in ((None, "None"), (ops.zeros((T, 2)), "12, 2")):
            with self.assertRaisesRegex(ValueError, f"modality=1.*{shape}"):
                losses.EntropyLoss(modality=1)(r, None, 1, context)
