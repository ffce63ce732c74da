import numpy as np

from keras_moe import layers
from keras_moe import models
from tests.recommendation.models.small_data import array
from tests.recommendation.models.small_data import check_fit_and_save
from tests.recommendation.models.small_data import check_save
from tests.recommendation.models.small_data import dense
from tests.recommendation.models.small_data import make_data
from tests.recommendation.models.small_data import make_features
from tests.recommendation.models.small_data import outputs_of
from tests.recommendation.models.small_data import scramble
from tests.recommendation.models.small_data import sigmoid
from tests.recommendation.models.small_data import small_tasks
from tests.test_case import TestCase


def parts_of(model, x):
    """The bottom network's output, and the vectors of `tab` and `user`."""
    e = outputs_of(model, x, "features")["features"]
    h = np.concatenate([e[:, 4:5], e[:, 9:]], axis=1)
    for layer in model.layers:
        if layer.name.startswith("bottom_"):
            h = dense(model, layer.name, h, "relu")
    return h, e[:, :4], e[:, 5:9]


def dots(x, *others):
    vectors = [x, *others]
    products = [
        np.sum(vectors[a] * vectors[b], axis=1)
        for a in range(3)
        for b in range(a)
    ]
    return np.concatenate([x, np.stack(products, axis=1)], axis=1)


class DLRMMoETest(TestCase):
    def test_dot(self):
        x, y = make_data()
        model = models.DLRMMoE(
            small_tasks(()), make_features(), 3, (4,), bottom_units=(5,)
        )
        scramble(model)
        i = dots(*parts_of(model, x))
        level = model.get_layer("experts")
        (expert,) = level.experts.layers
        kernel, bias = map(array, expert.weights)
        experts = np.maximum(np.einsum("bd,edo->beo", i, kernel) + bias, 0)
        p, gates = model.predict(x, verbose=0), model.gate_weights(x)
        for name in ("click", "buy"):
            h = np.einsum("be,beo->bo", gates[name], experts)
            expected = sigmoid(dense(model, f"{name}_logits", h))
            np.testing.assert_allclose(p[name], expected, atol=1e-5)
        check_fit_and_save(self, model, x, y)

    def test_chosen_experts(self):
        x, y = make_data()
        model = models.DLRMMoE(
            small_tasks(()),
            make_features(),
            4,
            (6, 3),
            top_k=2,
            bottom_units=(),
            losses=None,
        )
        scramble(model)
        i = dots(*parts_of(model, x))
        moe = model.get_layer("moe")
        routing = moe.route(i)
        indices, weights = map(
            array, (routing.expert_indices, routing.expert_weights)
        )
        up, up_bias, down, down_bias = (
            array(getattr(moe.experts, name))
            for name in ("up_kernel", "up_bias", "down_kernel", "down_bias")
        )
        h = np.zeros((24, 3))
        for row in range(24):
            for e, weight in zip(indices[row], weights[row], strict=True):
                hidden = np.maximum(i[row] @ up[e] + up_bias[e], 0)
                h[row] += weight * (hidden @ down[e] + down_bias[e])
        p = model.predict(x, verbose=0)
        for name in ("click", "buy"):
            expected = sigmoid(dense(model, f"{name}_logits", h))
            np.testing.assert_allclose(p[name], expected, atol=1e-4)
        with self.assertRaisesRegex(ValueError, "no gates to read"):
            model.gate_weights(x)
        check_fit_and_save(self, model, x, y)

    def test_cross(self):
        x, _ = make_data()
        model = models.DLRMMoE(
            ["click"],
            make_features(output="dict"),
            2,
            (4,),
            bottom_units=(5,),
            interaction="cross",
            cross_options={"projection_dim": 3, "num_experts": 2},
            numeric_features=["vector"],
        )
        cross = model.get_layer("cross")
        # The bottom network's 5, and `tab`, `age` and `user`.
        self.assertEqual(tuple(cross.input.shape), (None, 5 + 4 + 1 + 4))
        self.assertEqual(cross.projection_dim, 3)
        check_save(self, model, x)

    def test_errors(self):
        mixed = layers.FeatureEmbedding(
            [
                layers.Categorical("a", num_ids=3, embedding_dim=2),
                layers.Categorical("b", num_ids=3, embedding_dim=3),
            ]
        )
        alone = layers.FeatureEmbedding([layers.Categorical("a", num_ids=3)])
        for features in (mixed, alone):
            with self.assertRaisesRegex(ValueError, "all of one width"):
                models.DLRMMoE(["click"], features)
        for options, message in (
            ({"interaction": "sum"}, "`interaction` must be one of"),
            ({"cross_options": {"num_experts": 2}}, "are for interaction="),
            ({"top_k": 2, "expert_units": (4,)}, "must be two widths"),
            ({"top_k": 2, "gate_units": (4,)}, "takes these of MoE"),
            ({"numeric_features": ["ages"]}, "must be names of features"),
        ):
            with self.assertRaisesRegex(ValueError, message):
                models.DLRMMoE(["click"], make_features(), **options)
