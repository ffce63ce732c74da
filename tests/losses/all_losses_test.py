"""What all losses on routings have in common, and their values."""

from typing import Any
from typing import NamedTuple

import keras
import numpy as np
from absl.testing import parameterized
from keras import ops

from keras_moe import losses
from keras_moe.routers import Routing
from tests import token_loop
from tests.losses import loops
from tests.losses.gradients import value_and_gradient
from tests.losses.gradients import values_and_gradients
from tests.test_case import TestCase

T, E, K, SEQUENCES = 12, 6, 2, 3


class LoadRouting(NamedTuple):
    logits: Any
    probs: Any
    expert_indices: Any
    expert_weights: Any
    load: Any


def arrays(seed=0, num_tokens=T, num_experts=E, top_k=K, sigmoid=False):
    """Nobody chooses the last expert, and some choices do not exist."""
    rng = np.random.default_rng(seed)
    logits = rng.normal(size=(num_tokens, num_experts))
    indices = np.zeros((num_tokens, top_k), int)
    for t in range(num_tokens):
        order = rng.permutation(max(num_experts - 1, 1))
        order = np.append(order, [num_experts] * top_k)[:top_k]
        indices[t] = order
    if top_k > 1:
        indices[1::5, 1] = num_experts
    return logits, indices


def routing_of(logits, indices, sigmoid=False):
    """In NumPy."""
    act = token_loop.sigmoid if sigmoid else token_loop.softmax
    probs = np.array([act(z) for z in logits]).reshape(logits.shape)
    weights = np.zeros(indices.shape)
    for t, k in np.ndindex(indices.shape):
        if indices[t, k] < logits.shape[1]:
            weights[t, k] = probs[t, indices[t, k]]
    load = np.array([token_loop.sigmoid(2 * z - 1) for z in logits])
    return LoadRouting(
        logits, probs, indices, weights, load.reshape(logits.shape)
    )


def tensor_routing_of(logits, indices, sigmoid=False):
    """The same with tensors, differentiable in the logits."""
    probs = (ops.sigmoid if sigmoid else ops.softmax)(logits)
    exists = indices < logits.shape[1]
    one_hot = np.zeros((*indices.shape, logits.shape[1]), "float32")
    for t, k in np.argwhere(exists):
        one_hot[t, k, indices[t, k]] = 1
    weights = ops.einsum("te,tke->tk", probs, ops.array(one_hot))
    load = ops.sigmoid(2 * logits - 1)
    return LoadRouting(
        logits, probs, ops.array(indices.astype("int32")), weights, load
    )


def tensors(r, dtype="float32"):
    return LoadRouting(
        *(
            ops.array(x.astype("int32" if x.dtype.kind == "i" else dtype))
            for x in r
        )
    )


def loop(function, **kwargs):
    return lambda r, tokens: function(r, tokens, **kwargs)


L = losses
BALANCE = L.LoadBalancingLoss
# Name -> loss of weight 1, its loop.
CASES = {
    "balance": (BALANCE(1.0), loop(loops.load_balancing)),
    "balance_first": (
        BALANCE(1.0, assignments="first"),
        loop(loops.load_balancing, assignments="first"),
    ),
    "balance_hf": (
        BALANCE(
            1.0,
            normalize_by_top_k=False,
            assignments="logits",
            scores="softmax",
        ),
        loop(
            loops.load_balancing,
            normalize=False,
            assignments="logits",
            scores="softmax",
        ),
    ),
    "balance_raw": (
        BALANCE(1.0, scores="raw"),
        loop(loops.load_balancing, scores="raw"),
    ),
    "importance": (L.ImportanceLoss(1.0), loop(loops.importance)),
    "importance_softmax": (
        L.ImportanceLoss(1.0, scores="softmax", ddof=1),
        loop(loops.importance, scores="softmax", ddof=1),
    ),
    "load": (L.LoadLoss(1.0, ddof=1), loop(loops.load, ddof=1)),
    "entropy": (L.EntropyLoss(1.0), loop(loops.token_entropy)),
    "marginal": (
        L.EntropyLoss(1.0, kind="marginal"),
        lambda r, tokens: -loops.marginal_entropy(r, tokens),
    ),
    "threshold": (
        L.EntropyLoss(1.0, kind="marginal", threshold=1.75),
        lambda r, tokens: max(0.0, 1.75 - loops.marginal_entropy(r, tokens)),
    ),
    "information": (
        L.MutualInformationLoss(1.0),
        lambda r, tokens: (
            loops.token_entropy(r, tokens) - loops.marginal_entropy(r, tokens)
        ),
    ),
    "devices": (
        L.DeviceBalanceLoss(3, 1.0),
        loop(loops.device_balance, num_devices=3),
    ),
    "communication": (
        L.CommunicationBalanceLoss(3, 2, 1.0),
        loop(loops.communication_balance, num_devices=3, max_devices=2),
    ),
    "z": (
        L.RouterZLoss(1.0),
        lambda r, tokens: token_loop.router_z_loss(r.logits[tokens]),
    ),
}
GROUPED = [name for name in CASES if name != "z"]
# The second sequence of four tokens is masked altogether.
MASK = np.array([1, 1, 0, 1, 0, 0, 0, 0, 1, 0, 1, 1], bool)


def with_per(loss, per):
    return type(loss).from_config({**loss.get_config(), "per": per})


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
    def test_what_masked_tokens_hold_reaches_nothing(self, name):
        loss = CASES[name][0]
        logits, indices = arrays()
        r = routing_of(logits, indices)
        fields = (r.logits, r.probs, r.expert_weights, r.load)
        flat = np.concatenate(fields, axis=1)
        ends = np.cumsum([x.shape[1] for x in fields])[:-1].tolist()
        indices = ops.array(np.where(MASK[:, None], indices, 0), "int32")

        def actual(flat):
            logits, probs, weights, load = ops.split(flat, ends, axis=1)
            routing = LoadRouting(logits, probs, indices, weights, load)
            return loss(routing, ops.array(MASK), SEQUENCES)

        nan = np.where(MASK[:, None], flat, np.nan)
        (value, gradient), (nan_value, nan_gradient) = values_and_gradients(
            actual, flat, nan
        )
        self.assertTrue(np.isfinite(gradient).all())
        self.assertEqual(nan_value, value)
        self.assertAllEqual(nan_gradient, gradient)
        self.assertAllEqual(gradient[~MASK], np.zeros_like(gradient[~MASK]))

    @parameterized.parameters(*CASES)
    def test_degenerate_batches(self, name):
        loss = CASES[name][0]
        if name in ("devices", "communication"):  # 1 device for 1 expert
            single = type(loss).from_config(
                {k: 1 for k in loss.get_config()} | {"per": "batch"}
            )
        else:
            single = loss
        for sizes in ((1, E, K), (0, E, K), (2, E, E), (3, 1, 1)):
            num_tokens = sizes[0]
            loss = single if sizes[1] == 1 else loss
            r = tensors(routing_of(*arrays(3, *sizes)))
            self.assertTrue(np.isfinite(float(loss(r))))
            masked = float(loss(r, ops.zeros((num_tokens,), "bool")))
            self.assertEqual(masked, 0.0)
            if num_tokens == 0:
                self.assertEqual(float(loss(r)), 0.0)
                if name != "z":  # no sequence of some length
                    per = with_per(loss, "sequence")
                    self.assertEqual(float(per(r, None, 0)), 0.0)
                    self.assertEqual(float(per(r, None, 4)), 0.0)

    @parameterized.parameters(*CASES)
    def test_scores_of_zero_have_finite_gradients(self, name):
        loss = CASES[name][0]
        indices = np.full((4, 2), E)  # nobody is chosen, as ReLU scores do

        def actual(probs):
            return loss(
                LoadRouting(
                    probs,
                    ops.relu(probs),
                    ops.array(indices, "int32"),
                    ops.relu(probs)[:, :2],
                    ops.relu(probs),
                )
            )

        value, gradient = value_and_gradient(actual, -np.ones((4, E)))
        self.assertTrue(np.isfinite(value))
        self.assertTrue(np.isfinite(gradient).all())

    @parameterized.parameters(*CASES)
    def test_float16_routings(self, name):
        loss = CASES[name][0]
        r = routing_of(*arrays(num_tokens=300))
        # Sums over 6000 tokens, which count half precision cannot.
        r = LoadRouting(*(np.tile(x, (20, 1)) for x in r))
        value = loss(tensors(r, "float16"))
        self.assertEqual(
            keras.backend.standardize_dtype(value.dtype), "float32"
        )
        self.assertAllClose(value, loss(tensors(r)), rtol=5e-3, atol=1e-3)

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

    def test_errors(self):
        for call, message in (
            (lambda: BALANCE(per="token"), "`per` must .* per='token'"),
            (lambda: BALANCE(per=0), "`per` must .* per=0"),
            (lambda: BALANCE(assignments="top"), "'logits'.*'top'"),
            (lambda: BALANCE(scores="weights"), "'softmax'.*'weights'"),
            (lambda: L.ImportanceLoss(scores="sum"), "'weights'.*'sum'"),
            (lambda: L.ImportanceLoss(ddof=2), "`ddof` must .* ddof=2"),
            (lambda: L.LoadLoss(ddof=-1), "`ddof` must .* ddof=-1"),
            (lambda: L.LoadLoss(per="global"), "per='global'"),
            (lambda: L.EntropyLoss(kind="joint"), "'marginal'.*'joint'"),
            (lambda: L.EntropyLoss(threshold=1.0), "kind='token'"),
            (
                lambda: L.EntropyLoss(kind="marginal", threshold=0),
                "threshold=0",
            ),
            (lambda: L.EntropyLoss(modality="text"), "modality='text'"),
            (lambda: L.DeviceBalanceLoss(0), "num_devices=0"),
            (lambda: L.CommunicationBalanceLoss(2, 3), "max_devices=3"),
            (lambda: L.MutualInformationLoss(-1), "weight=-1"),
        ):
            with self.assertRaisesRegex(ValueError, message):
                call()
        r = tensors(routing_of(*arrays()))
        with self.assertRaisesRegex(ValueError, "num_devices=4, num_experts=6"):
            L.DeviceBalanceLoss(4)(r)
        with self.assertRaisesRegex(ValueError, "num_devices=4, num_experts=6"):
            L.CommunicationBalanceLoss(4, 1)(r)
        with self.assertRaisesRegex(ValueError, "per=2, num_sequences=3"):
            L.EntropyLoss(per=2)(r, None, 3)
        with self.assertRaisesRegex(ValueError, "NoisyTopKRouter.*=Routing"):
            L.LoadLoss()(Routing(*r[:4]))
        for context, shape in ((None, "None"), (ops.zeros((T, 2)), "12, 2")):
            with self.assertRaisesRegex(ValueError, f"modality=1.*{shape}"):
                L.EntropyLoss(modality=1)(r, None, 1, context)
