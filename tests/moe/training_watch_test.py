"""Training in which a layer's losses are lost is noticed, and said once."""

import warnings

import keras
import numpy as np
from absl.testing import parameterized
from keras import ops

from keras_moe.layers import MoE
from keras_moe.routers import RandomRouter
from tests.test_case import TestCase

X = np.ones((8, 3, 5), "float32")
UNTOLD, LOST = "without being told so", "without its balancing losses: no"


class Model(keras.Model):
    def __init__(self, **kwargs):
        super().__init__()
        self.before = keras.layers.Dense(5)
        self.moe = MoE(4, 3, **kwargs)

    def call(self, x, training=None):
        return x + self.moe(self.before(x), training=training)


class Untold(Model):
    def call(self, x):
        return x + self.moe(self.before(x))


class Lost(Model):
    def compute_loss(self, x, y, y_pred, sample_weight=None, training=True):
        return ops.mean(ops.square(y_pred - y))


class TrainingWatchTest(TestCase):
    @parameterized.parameters(
        (Model, {}, []),
        (Untold, {}, [UNTOLD]),
        (Lost, {}, [LOST]),
        # Nothing is lost where there is nothing to learn, or no loss.
        (Lost, {"router": RandomRouter(4)}, []),
        (Lost, {"losses": None}, []),
        (Untold, {"trainable": False}, []),
    )
    def test_fit(self, model_class, kwargs, messages):
        model = model_class(**kwargs)
        model.compile("sgd", "mse")
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always", UserWarning)
            model.evaluate(X, X, verbose=0)
            model.fit(X, X, batch_size=4, epochs=2, verbose=0)
            model.predict(X, verbose=0)
        found = [str(w.message) for w in caught if "MoE" in str(w.message)]
        self.assertLen(found, len(messages), found)
        for text, message in zip(found, messages, strict=True):
            self.assertIn(message, text)

    def test_gradients_in_inference_are_none_of_its_business(self):
        layer = MoE(4, 3)
        layer.build((None, 5))
        # A saliency map, say; any warning here would fail the test.
        self.outputs_and_gradients(layer, X[0])
