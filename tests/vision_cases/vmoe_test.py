"""V-MoE of google-research/vmoe: whole models on recorded arrays."""

from unittest import mock

import numpy as np
from absl.testing import parameterized
from keras import ops

from keras_moe.conversion import upcycle
from keras_moe.layers import MoE
from keras_moe.losses import ImportanceLoss
from keras_moe.losses import LoadBalancingLoss
from keras_moe.losses import LoadLoss
from tests.routing_cases.cases import recorded_draws
from tests.test_case import TestCase
from tests.vision_cases import cases
from tests.vision_cases import vmoe

NAMED = cases.named(vmoe.matches)
MODES = [
    (f"{name}_{'training' if prefix else 'inference'}", case, prefix)
    for name, case in NAMED
    for prefix in ("", "train/")
    if f"{prefix}y" in case.arrays
]
LOSSES = {
    "importance_loss": ImportanceLoss(1.0, scores="softmax", per="sequence"),
    "gshard_loss": LoadBalancingLoss(1.0, per="sequence", assignments="first"),
    "load_loss": LoadLoss(1.0, per="sequence"),
}


def model_of(case, prefix):
    """The original has losses in inference too, without the one of loads.

    Ours are those of training: there, without noise, the rest is the same.
    """
    without = {} if prefix else {"load_loss_weight": 0.0}
    return vmoe.model_from_case(case, without)


def draws(case, prefix):
    """Each member of each block draws once; for inference, zeros."""
    moe, members = case.config["encoder"]["moe"], vmoe.members_of(case.meta)
    noise = case.under("train/noise_unit/") if prefix else {}
    normal = [noise[key] for key in sorted(noise, key=int)]
    if not noise and vmoe.router_of(case.meta).get("noise_std", 1.0):
        tokens = len(case.arrays["x"]) * np.prod(
            [
                size // patch
                for size, patch in zip(
                    case.arrays["x"].shape[1:3],
                    case.config["patch_size"],
                    strict=True,
                )
            ]
        )
        tokens += len(case.arrays["x"]) * (case.config["classifier"] == "token")
        zeros = np.zeros((tokens, moe["num_experts"] // members), "float32")
        normal = [zeros] * len(moe["layers"])
    # The recorded ones were given to every member alike.
    normal = [value for value in normal for _ in range(members)]
    return recorded_draws(normal=normal)


def by_member(case, name):
    """`(B, M, classes)` of an ensemble, whose rows stand image by image."""
    value, members = case.arrays[name], vmoe.members_of(case.meta)
    if members == 1:
        return value
    return value.reshape(-1, members, value.shape[-1])


class VMoEModelsTest(TestCase):
    in_graph = False

    @parameterized.named_parameters(MODES)
    def test_outputs_and_gradients(self, case, prefix):
        model = model_of(case, prefix)
        with draws(case, prefix):
            outputs, d_inputs, d_weights = self.outputs_and_gradients(
                model,
                case.arrays["x"],
                by_member(case, "cotangent"),
                losses=True,
                whole_paths=True,
                training=True,
            )
        self.assert_relative(outputs, by_member(case, f"{prefix}y"))
        self.assert_relative(d_inputs, case.arrays[f"{prefix}grad/x"])
        vmoe.assert_gradients(self, d_weights, prefix, case)

    @parameterized.named_parameters(MODES)
    def test_routing_and_losses(self, case, prefix):
        model = model_of(case, prefix)
        routed = []
        watched = MoE._routed

        def spy(layer, tokens, routing, *args):
            routed.append((layer, tokens, routing))
            return watched(layer, tokens, routing, *args)

        with mock.patch.object(MoE, "_routed", spy), draws(case, prefix):
            model(case.arrays["x"], training=True)
        total = ops.convert_to_numpy(sum(model.losses))
        auxiliary = case.arrays[f"{prefix}auxiliary_loss"]
        self.assert_relative(total, np.mean(auxiliary))
        blocks = sorted(case.config["encoder"]["moe"]["layers"])
        members = vmoe.members_of(case.meta)
        self.assertLen(routed, members * len(blocks))
        for i, block in enumerate(blocks):
            own = routed[i * members : (i + 1) * members]
            vmoe.assert_routing(self, case, f"{prefix}route/{block}/", own)
            for name, loss in LOSSES.items():
                recorded = case.arrays.get(f"{prefix}{name}/{block}")
                if recorded is None:
                    continue
                for m, (_, tokens, routing) in enumerate(own):
                    value = loss(routing, None, tokens.positions[0])
                    wanted = recorded if members == 1 else recorded[:, m]
                    self.assert_relative(value, wanted.mean())

    @parameterized.named_parameters(NAMED)
    def test_inference(self, case):
        model = vmoe.model_from_case(case)
        self.assert_relative(
            model(case.arrays["x"], training=False), by_member(case, "y")
        )
        self.assertEqual(model.losses, [])


class UpcycledTest(TestCase):
    @parameterized.named_parameters(
        cases.named(
            lambda meta, arrays: (
                vmoe.matches(meta, arrays) and "dense_config" in meta
            )
        )
    )
    def test_dense_model(self, case):
        """Experts are copies; with weights that sum to one, all is as before.

        The original does not normalize the weights of the chosen experts, so
        that its model differs from the dense one.
        """
        moe = case.config["encoder"]["moe"]
        blocks = sorted(moe["layers"])
        changed = tuple(f"Encoder/encoderblock_{i}/Moe/" for i in blocks)
        shared = {
            name: value
            for name, value in case.under("w/").items()
            if not name.startswith(changed)
        }
        weights = {**shared, **case.under("dense/w/")}
        dense = vmoe.model_from_case(
            case._replace(
                meta={**case.meta, "config": case.meta["dense_config"]},
                arrays={
                    "x": case.arrays["x"],
                    **{f"w/{name}": value for name, value in weights.items()},
                },
            )
        )
        wanted = case.arrays["dense/y"]
        self.assert_relative(dense(case.arrays["x"]), wanted)
        options = {"num_experts": moe["num_experts"], "layers": blocks}
        model = upcycle(dense, **options)
        self.assert_relative(
            ops.convert_to_numpy(model(case.arrays["x"])), wanted
        )
        with self.assertWarnsRegex(UserWarning, "do not sum to one"):
            top_k = vmoe.router_of(case.meta).get("num_selected_experts", 1)
            model = upcycle(dense, router="v_moe", top_k=top_k, **options)
        recorded = case.under("w/")
        compared = 0
        for variable in model.trainable_variables:
            name = vmoe.original_name(variable.path)
            if name.endswith("/Moe/Router/dense/kernel"):
                variable.assign(recorded[name])
            elif name.startswith(changed):
                # But for a finite difference that the recording was made with.
                self.assert_relative(variable.value, recorded[name], 1e-4)
                compared += 1
                variable.assign(recorded[name])
        self.assertEqual(compared, 4 * len(blocks))
        self.assert_relative(
            ops.convert_to_numpy(model(case.arrays["x"])), case.arrays["y"]
        )
