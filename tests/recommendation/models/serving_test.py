import os
import warnings

import keras
import numpy as np

from keras_moe import models
from tests.exported import export
from tests.exported import export_onnx
from tests.recommendation.models.small_data import make_data
from tests.recommendation.models.small_data import make_features
from tests.recommendation.models.small_data import scramble
from tests.recommendation.models.small_data import small_tasks
from tests.test_case import TestCase


class ServingTest(TestCase):
    def check(self, model, x, export=export):
        scramble(model)
        model(x)
        served = export(self, model)
        for size in (len(keras.tree.flatten(x)[0]), 1):
            part = keras.tree.map_structure(lambda v, n=size: v[:n], x)
            expected = model.predict(part, verbose=0)
            found = served(part)
            keras.tree.assert_same_structure(dict_of(found), dict_of(expected))
            for name, p in dict_of(found).items():
                np.testing.assert_allclose(
                    keras.ops.convert_to_numpy(p),
                    dict_of(expected)[name],
                    rtol=1e-5,
                    atol=1e-5,
                )

    def test_multi_gate_models(self):
        x, _ = make_data()
        self.check(models.MMoE(small_tasks(), make_features(), 3, (4,)), x)
        self.check(
            models.PLE(small_tasks(), make_features(), expert_units=(4,)), x
        )

    def test_quantized(self):
        x, _ = make_data()
        model = models.MMoE(small_tasks(), make_features(), 3, (4,))
        path = os.path.join(self.get_temp_dir(), "model.keras")
        model.save(path)
        loaded = keras.models.load_model(path)
        with warnings.catch_warnings():
            # Of each layer that Keras does not quantize.
            warnings.simplefilter("ignore")
            model.quantize("int8")
            loaded.quantize("int8")
        found = model.predict(x, verbose=0)
        again = loaded.predict(x, verbose=0)
        for name, p in found.items():
            np.testing.assert_array_equal(p, again[name])
        model(x)
        served = dict_of(export(self, model)(x))
        for name, p in served.items():
            np.testing.assert_allclose(
                keras.ops.convert_to_numpy(p), found[name], atol=1e-5
            )
        size = os.path.getsize(path)
        with self.assertRaisesRegex(ValueError, "'m_mo_e.*' is quantized"):
            model.save(path)
        self.assertEqual(os.path.getsize(path), size)
        with self.assertRaisesRegex(ValueError, "is quantized"):
            model.get_config()

    def test_models_with_sparse_experts(self):
        x, _ = make_data()
        self.check(
            models.DLRMMoE(
                small_tasks(()),
                make_features(),
                4,
                (6, 3),
                top_k=2,
                bottom_units=(),
            ),
            x,
        )
        ids = np.random.default_rng(0).integers(1, 13, (6, 5), dtype="int32")
        ids[0, :3] = ids[1, 4:] = 0  # padding on both sides
        self.check(models.SASRecMoE(12, 5, embedding_dim=4, num_experts=3), ids)

    def test_onnx(self):
        x, _ = make_data()
        tasks = small_tasks()
        self.check(models.PLE(tasks, make_features()), x, export_onnx)
        self.check(models.AdaTT(tasks, make_features()), x, export_onnx)
        # Keras cannot export its normalization of layers on PyTorch.
        if keras.config.backend() == "tensorflow":
            model = models.M3oE(tasks, make_features(), "tab", 4)
            self.check(model, x, export_onnx)

    def test_onnx_of_sparse_experts(self):
        if keras.config.backend() == "tensorflow":
            self.skipTest("tf2onnx cannot convert the loop over experts")
        x, _ = make_data()
        model = models.DLRMMoE(small_tasks(), make_features(), 4, top_k=2)
        self.check(model, x, export_onnx)


def dict_of(outputs):
    return outputs if isinstance(outputs, dict) else {"": outputs}
