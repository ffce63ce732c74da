"""`MixtureOfHeads` in a diffusion transformer, against what MoH did."""

from unittest import mock

from absl.testing import parameterized
from keras import ops

from keras_moe.layers import MixtureOfHeads
from tests.vision_cases import dit_moe
from tests.vision_cases import dit_moe_test as diffusion
from tests.vision_cases import moh_dit


class MoHCasesTest(diffusion.DiffusionCase):
    def test_number_of_cases(self):
        self.assertGreaterEqual(len(list(diffusion.named(moh_dit.matches))), 2)

    @parameterized.named_parameters(diffusion.named(moh_dit.matches))
    def test_case(self, case, arrays, training):
        model, recorded = moh_dit.model_from_case(case, arrays)
        routed = [
            number
            for number, top_k in enumerate(case["config"]["routed_head"])
            if top_k
        ]
        # The original takes the mean over the blocks that have a loss.
        found = diffusion.outputs_and_gradients(
            model, recorded, arrays, training, 1 / len(routed)
        )
        losses = [
            found.pop(f"auxiliary_loss/{i}")
            for i in range(len(routed) if training else 0)
        ]
        for number, loss in zip(routed, losses, strict=False):
            found[f"auxiliary_loss/{number}"] = loss
        found["time_features"] = self.time_features(model, arrays)
        routings, gates = [], MixtureOfHeads._gates

        def spy(layer, features, routing):
            routings.append(ops.convert_to_numpy(routing.probs))
            return gates(layer, features, routing)

        with (
            mock.patch.object(MixtureOfHeads, "_gates", spy),
            diffusion.draws(arrays, training),
        ):
            model(dit_moe.inputs_of(arrays), training=training)
        for number in routed:
            found[f"route/{number}/probabilities"] = routings[number]
        self.assert_recorded(found, arrays, training)
