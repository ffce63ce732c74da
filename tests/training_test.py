"""Each family of routers trains on real images, and no expert dies.

The task is scikit-learn's handwritten digits: eight rows of eight pixels are
the tokens. With the losses recommended for it, gradients reach all weights of
the router, the loss falls, and in the last epoch every expert has tokens.

Each family trains on one of the three backends. Whether it dies is a matter of
the method; that the backends compute the same is tested elsewhere.
"""

import keras
import numpy as np
from absl.testing import parameterized
from keras import ops
from sklearn.datasets import load_digits

from keras_moe import losses
from keras_moe import routers
from keras_moe.experts import MLPExperts
from keras_moe.layers import Capacity
from keras_moe.layers import MoE
from keras_moe.layers import SoftMoE
from tests.test_case import TestCase

E = 4
# In these forty steps the published weights, 1e-2 and less, do not always
# revive an expert that had no token at first; ten times as much does.
BALANCE = losses.LoadBalancingLoss(1e-1)
NOTHING_NEEDED = None

# Name: router, recommended losses.
FAMILIES = {
    "top_k": (
        lambda: routers.TopKRouter(E),
        [BALANCE, losses.RouterZLoss(1e-3)],
    ),
    "sigmoid_with_bias": (
        lambda: routers.TopKRouter(
            E,
            score_activation="sigmoid",
            expert_bias=True,
            bias_update_rate=1e-2,
        ),
        losses.LoadBalancingLoss(1e-4, per="sequence"),
    ),
    "switch": (lambda: routers.get("switch", num_experts=E), BALANCE),
    "noisy_top_k": (
        lambda: routers.get("noisy_top_k", num_experts=E, top_k=2),
        ["importance", "load"],
    ),
    "v_moe": (
        lambda: routers.get("v_moe", num_experts=E),
        ["importance", "load"],
    ),
    "gshard": (lambda: routers.get("gshard", num_experts=E), BALANCE),
    "st_moe": (
        lambda: routers.get("st_moe", num_experts=E),
        [BALANCE, losses.RouterZLoss(1e-3)],
    ),
    "sampling": (lambda: routers.TopKRouter(E, gumbel_noise=1.0), BALANCE),
    "jacobs": (lambda: routers.get("jacobs", num_experts=E), NOTHING_NEEDED),
    "expert_choice": (
        lambda: routers.get("expert_choice", num_experts=E),
        NOTHING_NEEDED,
    ),
    "sinkhorn": (lambda: routers.SinkhornRouter(E), NOTHING_NEEDED),
    "base": (lambda: routers.BASERouter(E), NOTHING_NEEDED),
    "entmax": (lambda: routers.EntmaxRouter(E), BALANCE),
    "sparsemax": (lambda: routers.EntmaxRouter(E, 2.0), BALANCE),
    "top_p": (
        lambda: routers.TopPRouter(E, 0.7),
        [BALANCE, losses.EntropyLoss(1e-4)],
    ),
    "relu": (lambda: routers.ReLURouter(E), NOTHING_NEEDED),
    "cosine": (lambda: routers.CosineRouter(E, projection_dim=8), BALANCE),
    "mlp": (lambda: routers.MLPRouter(E, hidden_dims=(8,)), BALANCE),
    "d_select_k": (lambda: routers.DSelectKRouter(E, 2), NOTHING_NEEDED),
    "hierarchical": (lambda: routers.HierarchicalRouter(2, 2), BALANCE),
    "sparse_mixer": (lambda: routers.SparseMixerRouter(E), BALANCE),
    "task": (lambda: routers.TaskRouter(E, num_tasks=2), BALANCE),
    "hash": (
        lambda: routers.HashRouter(E, num_ids=8, top_k=2, weights="learned"),
        NOTHING_NEEDED,
    ),
}


def digits():
    images, labels = load_digits(return_X_y=True)
    return images[:512].reshape(-1, 8, 8).astype("float32") / 8, labels[:512]


def families_of_this_backend():
    backends = ("torch", "tensorflow", "jax")
    return list(FAMILIES)[backends.index(keras.config.backend()) :: 3]


class TrainingTest(TestCase):
    @parameterized.named_parameters(
        (name, name) for name in families_of_this_backend()
    )
    def test_router(self, name):
        make_router, recommended = FAMILIES[name]
        moe = MoE(
            router=make_router(),
            experts=MLPExperts(E, 16, activation="relu"),
            losses=recommended,
            capacity=Capacity(2.0, eval_capacity_factor=float("inf"))
            if name in ("switch", "gshard", "st_moe")
            else None,
        )
        images, labels = digits()
        inputs = keras.Input((8, 8))
        features = keras.layers.Dense(16)(inputs)
        xs, model_inputs, kwargs = [images], [inputs], {}
        if moe.router.uses_context:
            ids = keras.Input((8,), dtype="int32")
            # The row of the image, or whether it is an odd one.
            rows = np.arange(8) % getattr(moe.router, "num_tasks", 8)
            xs.append(np.tile(rows, (512, 1)))
            model_inputs.append(ids)
            kwargs["context"] = ids
        features = features + moe(
            keras.layers.LayerNormalization()(features), **kwargs
        )
        features = keras.layers.Flatten()(features)
        model = keras.Model(model_inputs, keras.layers.Dense(10)(features))
        self.check(model, xs, labels, moe.router)
        self.assertEqual(moe.statistics.result()["dead_experts"], 0)

    def test_soft(self):
        moe = SoftMoE(E, 16, slots_per_expert=2, activation="relu")
        inputs = keras.Input((8, 8))
        features = keras.layers.Dense(16)(inputs)
        features = features + moe(features)
        features = keras.layers.Flatten()(features)
        model = keras.Model(inputs, keras.layers.Dense(10)(features))
        images, labels = digits()
        self.check(model, [images], labels, moe.router)

    def check(self, model, xs, labels, router):
        model.compile(
            keras.optimizers.Adam(5e-3),
            keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        )
        before = [
            np.array(ops.convert_to_numpy(v)) for v in router.trainable_weights
        ]
        xs = xs if len(xs) > 1 else xs[0]
        history = model.fit(xs, labels, batch_size=64, epochs=5, verbose=0)
        values = history.history["loss"]
        self.assertLess(values[-1], 0.7 * values[0])
        for variable, old in zip(router.trainable_weights, before, strict=True):
            moved = np.abs(ops.convert_to_numpy(variable) - old).max()
            self.assertGreater(moved, 1e-4, variable.path)
