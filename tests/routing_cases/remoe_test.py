import numpy as np
from keras import ops

from tests.routers.dense_weights import DenseWeights
from tests.routing_cases import remoe
from tests.routing_cases.cases import RecordedTest
from tests.routing_cases.cases import load


class ReMoECasesTest(RecordedTest):
    def test_choices_loss_and_sparsity(self):
        for name, config, arrays in load(remoe.matches):
            with self.subTest(name):
                router = remoe.router_from_case(config, arrays)
                start = float(ops.convert_to_numpy(router.l1_coefficient))
                routing = router(arrays["x"], training=True)
                self.assert_relative(routing.probs, arrays["probs"])
                chosen = np.zeros(arrays["routing_map"].shape, bool)
                for t, row in enumerate(
                    ops.convert_to_numpy(routing.expert_indices)
                ):
                    chosen[t, row[row < config["E"]]] = True
                self.assertAllEqual(chosen, arrays["routing_map"])
                self.assert_relative(
                    ops.convert_to_numpy(router.losses[0]) / start,
                    arrays["l1_over_coeff"],
                )
                self.assertAllClose(1 - chosen.mean(), arrays["sparsity"])
                below = arrays["sparsity"] < 1 - config["k"] / config["E"]
                self.assertAllClose(
                    ops.convert_to_numpy(router.l1_coefficient) / start,
                    1.2 if below else 1 / 1.2,
                    rtol=1e-5,
                )

    def test_gradients(self):
        for name, config, arrays in load(remoe.matches):
            for key, training in (
                ("grad_y_only", False),
                # Where the coefficient is 0, the loss is left out.
                ("grad_total", config["l1_coeff"] > 0),
            ):
                with self.subTest(f"{name} {key}"):
                    layer = DenseWeights(remoe.router_from_case(config, arrays))
                    layer.build((None, config["D"]))
                    _, d_x, d_weights = self.outputs_and_gradients(
                        layer,
                        arrays["x"],
                        arrays["cotangent"],
                        losses=True,
                        training=training,
                    )
                    self.assert_relative(d_x, arrays[f"{key}/x"])
                    (d_kernel,) = d_weights.values()
                    self.assert_relative(d_kernel, arrays[f"{key}/weight"].T)
