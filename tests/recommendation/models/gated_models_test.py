"""OMoE, MMoE, CGC, PLE and AdaTT."""

import keras
import numpy as np
from absl.testing import parameterized

from keras_moe import models
from tests.recommendation.models.model_checks import DIM
from tests.recommendation.models.model_checks import assert_predicts
from tests.recommendation.models.model_checks import batch
from tests.recommendation.models.model_checks import check_trains_and_saves
from tests.recommendation.models.model_checks import labels
from tests.recommendation.models.model_checks import specs
from tests.recommendation.models.model_checks import vectors
from tests.recommendation.models.numpy_trunks import experts
from tests.recommendation.models.numpy_trunks import gates
from tests.recommendation.models.numpy_trunks import level
from tests.recommendation.models.numpy_trunks import mix
from tests.recommendation.models.numpy_trunks import predictions
from tests.recommendation.models.numpy_trunks import randomize
from tests.recommendation.models.numpy_trunks import weights_of
from tests.test_case import TestCase

# Experts 0 of task a, 1 and 2 of b, 3 shared.
UNEQUAL = {"num_task_experts": [1, 2], "num_shared_experts": 1}
OWN_AND_SHARED = [[0, 3], [1, 2, 3]]
ALL = [0, 1, 2, 3]


class OneBatch(keras.utils.PyDataset):
    def __init__(self, x):
        super().__init__()
        self.x = x

    def __len__(self):
        return 1

    def __getitem__(self, index):
        return (self.x,)


def dense(inputs, units):
    return inputs * units + units


def omoe(model, x):
    layer = model.get_layer("experts")
    return level(layer, [x] * 3, [x], [[0, 1, 2]]) * 2


def mmoe(model, x):
    layer = model.get_layer("experts")
    return level(layer, [x] * 3, [x] * 2, [[0, 1, 2]] * 2)


def cgc(model, x):
    layer = model.get_layer("level_0")
    return level(layer, [x] * 4, [x] * 2, OWN_AND_SHARED)


def ple(model, x, shared_sees=ALL):
    first, second = model.get_layer("level_0"), model.get_layer("level_1")
    a, b, shared = level(
        first, [x] * 4, [x] * 3, [*OWN_AND_SHARED, shared_sees]
    )
    return level(second, [a, b, b, shared], [a, b], OWN_AND_SHARED)


def ple_of_shared(model, x):
    return ple(model, x, [3])


def adatt(model, x):
    a, b, shared = _adatt_level(
        model.get_layer("level_0"), [x] * 4, [x] * 3, [[0], [1, 2], [3]]
    )
    last = model.get_layer("level_1")
    return _adatt_level(last, [a, b, b, shared], [a, b], [[0], [1, 2]])


def adatt_sp(model, x):
    a, b = _adatt_level(
        model.get_layer("level_0"), [x] * 3, [x] * 2, [[0], [1, 2]], 3
    )
    last = model.get_layer("level_1")
    return _adatt_level(last, [a, b, b], [a, b], [[0], [1, 2]], 3)


def _adatt_level(layer, reads, gate_reads, own, total=4):
    w = weights_of(layer)
    outputs = experts(w, reads)
    sees = [list(range(total))] * len(own)
    mixed = mix(gates(w, gate_reads, sees), outputs, sees)
    residual = iter(w["residual/weight"])
    return [
        y + sum(next(residual) * outputs[e] for e in mine)
        for y, mine in zip(mixed, own, strict=True)
    ]


LEVELS = {**UNEQUAL, "expert_units": [[5], [3, 4]]}
TWO_LAYERS = dense(5, 3) + dense(3, 4)
# Name, model, arguments, NumPy, parameters without the 2 * (4 + 1) of logits.
CASES = (
    (
        *("omoe", models.OMoE, {"num_experts": 3, "expert_units": (4,)}, omoe),
        3 * dense(DIM, 4) + dense(DIM, 3),
    ),
    (
        *("mmoe", models.MMoE, {"num_experts": 3, "expert_units": (4,)}, mmoe),
        3 * dense(DIM, 4) + 2 * dense(DIM, 3),
    ),
    (
        *("cgc", models.CGC, {**UNEQUAL, "expert_units": (4,)}, cgc),
        4 * dense(DIM, 4) + dense(DIM, 2) + dense(DIM, 3),
    ),
    (
        *("ple", models.PLE, LEVELS, ple),
        4 * (dense(DIM, 5) + TWO_LAYERS)
        + dense(DIM, 2 + 3 + 4)
        + dense(5, 2 + 3),
    ),
    (
        *("ple_of_shared", models.PLE, {**LEVELS, "shared_sees": "shared"}),
        ple_of_shared,
        4 * (dense(DIM, 5) + TWO_LAYERS)
        + dense(DIM, 2 + 3 + 1)
        + dense(5, 2 + 3),
    ),
    (
        *("adatt", models.AdaTT, LEVELS, adatt),
        4 * (dense(DIM, 5) + TWO_LAYERS)
        + dense(DIM, 3 * 4)
        + dense(5, 2 * 4)
        + 4
        + 3,
    ),
    (
        *("adatt_sp", models.AdaTT, {**LEVELS, "num_shared_experts": 0}),
        adatt_sp,
        3 * (dense(DIM, 5) + TWO_LAYERS)
        + dense(DIM, 2 * 3)
        + dense(5, 2 * 3)
        + 3
        + 3,
    ),
)


class GatedModelsTest(TestCase):
    @parameterized.parameters(*CASES)
    def test_by_hand(self, name, model_class, kwargs, trunk, count):
        model = model_class(specs("a", "b"), vectors(), **kwargs)
        self.assertEqual(model.count_params(), count + 2 * (4 + 1), name)
        randomize(model)
        x = batch()
        expected = predictions(model, trunk(model, x["x"].astype("float64")))
        assert_predicts(model, x, expected)

    @parameterized.parameters(
        (models.OMoE, {"num_experts": 3, "gate_dropout": 0.5}, "towers"),
        (models.CGC, {"num_task_experts": 2, "seed": 1}, "esmm"),
        (models.PLE, {"expert_normalization": "batch"}, "aitm"),
        (models.AdaTT, {"num_shared_experts": 1, "gate_units": [3]}, "towers"),
    )
    def test_train_and_save(self, model_class, kwargs, heads):
        tasks = [
            models.TaskSpec("a", tower_units=(4,)),
            models.TaskSpec("b", tower_units=(4,), sample_space="a"),
        ]
        model = model_class(
            tasks, vectors(), expert_units=(4,), heads=heads, **kwargs
        )
        check_trains_and_saves(self, model, batch())

    def test_compiled_step(self):
        if keras.config.backend() == "torch":
            self.skipTest("`torch.compile` takes a minute")
        x, steps = batch(), []
        for jit in (True, False):
            keras.utils.set_random_seed(0)
            model = models.PLE(specs("a", "b"), vectors(), expert_units=(4,))
            model.compile(keras.optimizers.SGD(0.1), jit_compile=jit)
            loss = model.train_on_batch(x, labels(model))[0]
            weights = map(keras.ops.convert_to_numpy, model.weights)
            steps.append([loss, *weights])
        for compiled, plain in zip(*steps, strict=True):
            np.testing.assert_allclose(compiled, plain, rtol=1e-4, atol=1e-6)

    def test_gate_weights(self):
        x = batch()
        model = models.PLE(specs("a", "b"), vectors(), **LEVELS)
        randomize(model)
        w = weights_of(model.get_layer("level_0"))
        seen = [*OWN_AND_SHARED, ALL]
        self.assertEqual(model.num_gate_levels, 2)
        found = model.gate_weights(x, level=0)
        self.assertEqual(list(found), ["a", "b", "shared"])
        streamed = model.gate_weights(OneBatch(x), level=0)
        for name, weights in streamed.items():
            np.testing.assert_allclose(weights, found[name], rtol=1e-5)
        for shares, name, sees in zip(
            gates(w, [x["x"]] * 3, seen), found, seen, strict=True
        ):
            expected = np.zeros((8, 4))
            expected[:, sees] = shares
            np.testing.assert_allclose(found[name], expected, atol=1e-5)
        last = model.gate_weights(x)
        self.assertEqual(list(last), ["a", "b"])
        np.testing.assert_array_equal(last["a"][:, 1:3], 0)
        one = models.OMoE(specs("a", "b"), vectors(), num_experts=3)
        found = one.gate_weights(x)
        np.testing.assert_array_equal(found["a"], found["b"])
        np.testing.assert_allclose(found["a"].sum(axis=1), 1, rtol=1e-5)
        with self.assertRaisesRegex(ValueError, "level=2"):
            model.gate_weights(x, level=2)

    def test_one_task(self):
        for model_class in (models.OMoE, models.CGC, models.PLE, models.AdaTT):
            model = model_class(specs("a"), vectors(), expert_units=(4,))
            self.assertEqual(model.outputs[0].shape, (None, 1))

    def test_levels_draw_their_own_numbers(self):
        model = models.PLE(
            specs("a"),
            vectors(),
            num_levels=3,
            expert_units=(DIM,),
            kernel_initializer=keras.initializers.HeNormal(seed=1),
        )
        kernels = [
            weights_of(model.get_layer(f"level_{i}"))["experts/dense_0/kernel"]
            for i in range(3)
        ]
        flat = np.round(np.reshape(kernels, (-1, DIM * DIM)), 6)
        self.assertLen(np.unique(flat, axis=0), 3 * 8)

    @parameterized.parameters(
        ({"num_levels": 0}, "`num_levels` must be an int"),
        ({"num_task_experts": [1]}, "a list of 2 such"),
        ({"num_shared_experts": -1}, "`num_shared_experts` must be an int"),
        ({"expert_units": [[3], [4], [5]]}, "each of the 2 levels"),
        ({"num_expert": 4}, r"Received: \['num_expert'\]"),
        ({"output_shared": True}, r"Received: \['output_shared'\]"),
        ({"heads": "tower"}, "`heads` must be one of"),
    )
    def test_errors(self, kwargs, message):
        with self.assertRaisesRegex(ValueError, message):
            models.PLE(specs("a", "b"), vectors(), **kwargs)

    @parameterized.parameters(models.MMoE, models.OMoE)
    def test_number_of_experts(self, model_class):
        with self.assertRaisesRegex(ValueError, "`num_experts` must be an int"):
            model_class(["a"], vectors(), num_experts=0)

    def test_no_task_is_called_shared(self):
        with self.assertRaisesRegex(ValueError, "the name 'shared'"):
            models.PLE(["a", "shared"], vectors())
