"""Expert choice against what V-MoE and flaxformer did."""

from unittest import mock

import keras
import numpy as np
from keras import ops

from keras_moe.losses.router_z_loss import RouterZLoss
from tests.routers.linear_mixture import LinearMixture
from tests.routers.linear_mixture import combine_matrix
from tests.routers.linear_mixture import router_gradient
from tests.routing_cases import expert_choice
from tests.routing_cases.cases import RecordedTest
from tests.routing_cases.cases import load


class ZLoss(keras.layers.Layer):
    def __init__(self, router, **kwargs):
        super().__init__(**kwargs)
        self.router = router
        self.supports_masking = True
        self.built = router.built

    def call(self, tokens, mask=None, training=None, num_sequences=1):
        routing = self.router(
            tokens, mask=mask, training=training, num_sequences=num_sequences
        )
        return RouterZLoss(1.0)(routing, mask)


class Recorded:
    """Draws what has been recorded."""

    def __init__(self, arrays):
        self.arrays = arrays

    def normal(self, shape, mean=0.0, stddev=1.0, dtype=None, seed=None):
        noise = self.arrays["noise_unit"].reshape([int(n) for n in shape])
        return ops.convert_to_tensor(mean + stddev * noise, dtype)

    def uniform(self, shape, minval=0.0, maxval=1.0, dtype=None, seed=None):
        # The factors themselves, between 1 - jitter and 1 + jitter.
        jitter = self.arrays["jitter"].reshape([int(n) for n in shape])
        return ops.convert_to_tensor(jitter, dtype)


class ExpertChoiceCasesTest(RecordedTest):
    def test_cases(self):
        found = load(expert_choice.matches)
        for name, config, arrays in found:
            with self.subTest(name):
                recorded = Recorded(arrays)
                normal, uniform = recorded.normal, recorded.uniform
                with (
                    mock.patch.object(keras.random, "normal", normal),
                    mock.patch.object(keras.random, "uniform", uniform),
                ):
                    self.check(config, arrays)

    def check(self, config, arrays):
        router = expert_choice.router_from_case(config, arrays)
        groups, size = config["G"], config["S"]
        tokens = arrays["x"].reshape(groups * size, -1)
        mask = expert_choice.mask_of(config, arrays)
        options = {
            "mask": mask,
            "training": expert_choice.is_training(config),
            "num_sequences": groups,
        }
        real = np.ones(len(tokens), bool) if mask is None else mask
        self.check_choice(router(tokens, **options), arrays, real)

        layer = LinearMixture(router, arrays["expert/W"], arrays["expert/b"])
        cotangent = arrays["cotangent"].reshape(groups * size, -1)
        y, dx, dw = self.outputs_and_gradients(
            layer, tokens, cotangent, **options
        )
        flat = {
            name: arrays[name].reshape(groups * size, -1)
            for name in ("y", "grad_y/x")
        }
        self.assert_relative(y, flat["y"])
        self.assert_relative(dx, flat["grad_y/x"])
        for name, own in (
            ("kernel", "kernel"),
            ("bias", "bias"),
            ("expert/W", "expert_kernel"),
            ("expert/b", "expert_bias"),
        ):
            if f"grad_y/{name}" in arrays:
                gradient = router_gradient(dw, own)
                self.assert_relative(gradient, arrays[f"grad_y/{name}"])
        for name in ("loss/auxiliary", "metric/auxiliary_loss"):
            # No balancing loss is needed, and there is none.
            self.assertEqual(np.max(np.abs(arrays.get(name, 0.0))), 0.0)
        if "loss/router_z" in arrays:
            self.check_z_loss(router, tokens, real, options, arrays)

    def check_choice(self, routing, arrays, real):
        combine = combine_matrix(routing, routing.probs.shape[-1])
        if "logits" in arrays:
            logits = arrays["logits"].reshape(len(real), -1)
            self.assert_relative(routing.logits, logits)
        if "combine" in arrays:
            recorded = arrays["combine"].sum(-1).reshape(len(real), -1)
            self.assert_relative(combine, recorded)
        chosen = ops.convert_to_numpy(routing.expert_indices)
        chosen = chosen < chosen.shape[1]
        if "dispatch" in arrays:
            kept = arrays["dispatch"].any(-1)
        else:
            kept = arrays["kept"]
        kept = kept.reshape(len(real), -1)
        # flaxformer gives unused places to padding, with weight 0, which the
        # paper does not mean and outputs do not show. Here they stay empty.
        self.assertAllEqual(chosen[real], kept[real])
        self.assertFalse(chosen[~real].any())

    def check_z_loss(self, router, tokens, real, options, arrays):
        # flaxformer counts log(E)^2 for each padded token, and divides by all
        # of them. Ours is the mean of the real ones.
        share = real.mean()
        value, dx, dw = self.outputs_and_gradients(
            ZLoss(router), tokens, **options
        )
        padded = (1 - share) * np.log(router.num_experts) ** 2
        self.assert_relative(share * value + padded, arrays["loss/router_z"])
        recorded = arrays["grad_z/x"].reshape(dx.shape)
        self.assert_relative(share * dx, recorded)
        for name in ("kernel", "bias"):
            if f"grad_z/{name}" in arrays:
                gradient = share * router_gradient(dw, name)
                self.assert_relative(gradient, arrays[f"grad_z/{name}"])
