import numpy as np

from keras_moe.conversion.recycled_weights import Recipe
from keras_moe.conversion.recycled_weights import expert_weights
from keras_moe.conversion.recycled_weights import importance
from tests.test_case import TestCase

D, F, E = 5, 40, 3
COPIES = Recipe(None, "importance", 0.0, 0.0)


def dense(gated=False, seed=0):
    rng = np.random.default_rng(seed)
    names = ("gate", "up") if gated else ("up",)
    found = {f"{n}_kernel": rng.normal(2.0, 3.0, (D, F)) for n in names}
    found |= {f"{n}_bias": rng.normal(size=F) for n in names}
    found["down_kernel"] = rng.normal(-1.0, 0.5, (F, D))
    found["down_bias"] = rng.normal(size=D)
    return found


def make(weights, **recipe):
    rng = np.random.default_rng(1)
    return expert_weights(weights, E, COPIES._replace(**recipe), rng)


class RecycledWeightsTest(TestCase):
    def test_copies(self):
        weights = dense()
        for name, bank in make(weights).items():
            self.assertAllEqual(bank, np.stack([weights[name]] * E))
        self.assertTrue(COPIES.gives_copies())
        self.assertFalse(COPIES._replace(reinit=0.5).gives_copies())

    def test_noise(self):
        weights = dense()
        banks = make(weights, noise=0.1)
        for name, bank in banks.items():
            if name.endswith("bias"):
                self.assertAllEqual(bank, np.stack([weights[name]] * E))
                continue
            added = (bank - weights[name]) / weights[name].std()
            self.assertAllClose(added.std(), 0.1, rtol=0.1)
            self.assertLess(
                abs(np.corrcoef(added[0].ravel(), added[1].ravel())[0, 1]), 0.3
            )
        self.assertAllEqual(
            banks["up_kernel"], make(weights, noise=0.1)["up_kernel"]
        )

    def test_reinit(self):
        for gated in (False, True):
            weights = dense(gated)
            banks = make(weights, reinit=0.5)
            changed = (banks["up_kernel"] != weights["up_kernel"]).any(1)
            self.assertAllEqual(changed.sum(1), [F // 2] * E)
            self.assertFalse((changed[0] == changed[1]).all())
            for name in weights:
                if name == "down_bias":
                    self.assertAllEqual(banks[name], [weights[name]] * E)
                    continue
                last = name.startswith("down")
                for e in range(E):
                    axis = 0 if last or name.endswith("bias") else 1
                    new = np.moveaxis(banks[name][e], axis, 0)
                    old = np.moveaxis(weights[name], axis, 0)
                    kept = (new == old).reshape(F, -1)
                    self.assertAllEqual(kept.all(1), ~changed[e])
                    self.assertAllEqual(kept.any(1), ~changed[e])
            # Those drawn have the mean and deviation of those replaced.
            old = np.stack([weights["down_kernel"][c] for c in changed])
            new = np.stack(
                [
                    b[c]
                    for b, c in zip(banks["down_kernel"], changed, strict=True)
                ]
            )
            self.assertAllClose(new.mean(), old.mean(), atol=0.1)
            self.assertAllClose(new.std(), old.std(), atol=0.1)

    def test_all_are_drawn_anew(self):
        weights = dense()
        bank = make(weights, reinit=1.0)["up_kernel"]
        self.assertFalse((bank == weights["up_kernel"]).any())

    def test_sampled_units(self):
        weights = dense(gated=True)
        for sampling in ("uniform", "importance"):
            banks = make(weights, intermediate_dim=10, sampling=sampling)
            self.assertEqual(banks["up_kernel"].shape, (E, D, 10))
            taken = []
            for e in range(E):
                # Each unit is one of the dense ones, with all its weights.
                columns = weights["up_kernel"].T
                units = [
                    int(np.argmin(np.abs(columns - unit).sum(1)))
                    for unit in banks["up_kernel"][e].T
                ]
                taken.append(units)
                self.assertLen(set(units), 10)
                for name in ("gate_kernel", "up_kernel"):
                    self.assertAllEqual(banks[name][e], weights[name][:, units])
                for name in ("gate_bias", "up_bias"):
                    self.assertAllEqual(banks[name][e], weights[name][units])
                self.assertAllClose(
                    banks["down_kernel"][e], weights["down_kernel"][units] * 4
                )
                self.assertAllEqual(banks["down_bias"][e], weights["down_bias"])
            self.assertNotEqual(taken[0], taken[1])

    def test_importance(self):
        weights = dense(gated=True)
        w = weights
        wanted = [
            np.sqrt((w["gate_kernel"][:, f] ** 2).sum())
            * np.sqrt((w["up_kernel"][:, f] ** 2).sum())
            * np.sqrt((w["down_kernel"][f] ** 2).sum())
            for f in range(F)
        ]
        self.assertAllClose(importance(w), wanted, rtol=1e-4)
        # Units that do nothing are drawn last.
        weights["up_kernel"][:, 10:] = 0
        bank = make(weights, intermediate_dim=10)["up_kernel"]
        self.assertTrue(np.abs(bank).sum(1).all())
