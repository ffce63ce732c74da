import numpy as np

from keras_moe import models
from tests.recommendation.models.small_data import check_fit_and_save
from tests.recommendation.models.small_data import make_data
from tests.recommendation.models.small_data import make_features
from tests.recommendation.models.small_data import outputs_of
from tests.recommendation.models.small_data import scramble
from tests.test_case import TestCase


class ESMMTest(TestCase):
    def test_products(self):
        x, y = make_data()
        y["pay"] = y["buy"]
        names = ["click", "buy", "pay"]
        model = models.ESMM(names, make_features(), num_experts=2)
        self.assertTrue(model.entire_space)
        self.assertEqual(
            [task.sample_space for task in model.tasks], [None, "click", "buy"]
        )
        scramble(model)
        conditional = [f"{name}_conditional" for name in names[1:]]
        found = outputs_of(model, x, "click", *conditional)
        p = model.predict(x, verbose=0)
        expected = found["click"]
        for name in names[1:]:
            expected = expected * found[f"{name}_conditional"]
            np.testing.assert_allclose(p[name], expected, rtol=1e-5)
        self.assertEqual(model.gate_weights(x)["pay"].shape, (24, 2))
        _, loaded = check_fit_and_save(self, model, x, y)
        self.assertTrue(loaded.entire_space)

    def test_errors(self):
        specs = [models.TaskSpec("click"), models.TaskSpec("buy")]
        with self.assertRaisesRegex(ValueError, "need a task with"):
            models.ESMM(specs, make_features())
