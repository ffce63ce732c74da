import keras
import numpy as np
from absl.testing import parameterized
from keras import ops

from keras_moe import experts
from keras_moe.ops import grouped_matmul_implementations
from tests import token_loop
from tests.test_case import TestCase

SIZES = (4, 0, 3)


def make(kind, **kwargs):
    kwargs = {"intermediate_dim": 6, **kwargs}
    return experts.get(kind, num_experts=3, name="experts", **kwargs)


def weights_of(layer):
    return {
        f"experts/{v.name}": ops.convert_to_numpy(v).astype("float64")
        for v in layer.weights
    }


class ExpertsTest(TestCase):
    def setUp(self):
        super().setUp()
        rng = np.random.default_rng(2)
        self.rows = rng.normal(size=(9, 4)).astype("float32")
        self.sizes = ops.array(SIZES, "int32")

    @parameterized.product(
        kind=("mlp", "glu"),
        use_bias=(False, True),
        implementation=(None, *grouped_matmul_implementations()),
    )
    def test_against_one_row_at_a_time(self, kind, use_bias, implementation):
        layer = make(
            kind,
            intermediate_dim=8,
            use_bias=use_bias,
            activation="tanh",
            bias_initializer="normal",
            implementation=implementation,
        )
        out = ops.convert_to_numpy(layer(self.rows, self.sizes))
        weights = weights_of(layer)
        for i, e in enumerate(np.repeat(np.arange(3), SIZES)):
            row = self.rows[i].astype("float64")
            wanted = token_loop.expert(row, weights, e, "tanh")
            self.assert_relative(out[i], wanted)

    def test_names_and_shapes(self):
        layer = make("glu", use_bias=True)
        layer.build((None, 4))
        self.assertEqual(
            {v.path: tuple(v.shape) for v in layer.weights},
            {
                "experts/gate_kernel": (3, 4, 6),
                "experts/gate_bias": (3, 6),
                "experts/up_kernel": (3, 4, 6),
                "experts/up_bias": (3, 6),
                "experts/down_kernel": (3, 6, 4),
                "experts/down_bias": (3, 4),
            },
        )
        layer = make("mlp")
        layer.build((None, 4))
        self.assertEqual(
            [v.name for v in layer.weights],
            ["up_kernel", "up_bias", "down_kernel", "down_bias"],
        )

    def test_each_expert_is_initialized_as_its_own_matrix(self):
        layer = experts.GLUExperts(16, intermediate_dim=300)
        layer.build((None, 200))
        # glorot_uniform: variance 2 / (fan_in + fan_out).
        for kernel in (layer.gate_kernel, layer.up_kernel, layer.down_kernel):
            kernel = ops.convert_to_numpy(kernel)
            deviations = kernel.std(axis=(1, 2))
            self.assertAllClose(
                deviations, np.full(16, np.sqrt(2 / 500)), rtol=0.01
            )
            flat = kernel.reshape(16, -1)
            correlation = np.corrcoef(flat) - np.eye(16)
            self.assertLess(np.abs(correlation).max(), 0.03)

    @parameterized.parameters(
        keras.initializers.HeNormal, keras.initializers.Orthogonal
    )
    def test_a_seeded_initializer(self, initializer):
        def kernels():
            layer = make("glu", kernel_initializer=initializer(seed=5))
            layer.build((None, 6))
            # All banks hold 6 x 6 matrices here.
            kernels = [ops.convert_to_numpy(v) for v in layer.weights]
            return np.concatenate(kernels)

        matrices = kernels()
        self.assertAllEqual(matrices, kernels())  # reproducible
        for i in range(len(matrices)):
            for j in range(i):  # and no two experts or banks alike
                difference = np.abs(matrices[i] - matrices[j]).max()
                self.assertGreater(difference, 0.1)

    def test_regularizers_and_constraints_see_one_expert(self):
        layer = make(
            "glu",
            kernel_regularizer=keras.regularizers.OrthogonalRegularizer(0.5),
            kernel_constraint=keras.constraints.UnitNorm(axis=0),
        )
        layer.build((None, 4))
        kernel = ops.convert_to_numpy(layer.up_kernel)
        regularizer = keras.regularizers.OrthogonalRegularizer(0.5)
        self.assertAllClose(
            layer.up_kernel.regularizer(layer.up_kernel),
            sum(float(regularizer(ops.array(matrix))) for matrix in kernel),
            rtol=1e-5,
        )
        self.assertLen(layer.losses, 3)
        constrained = layer.up_kernel.constraint(layer.up_kernel)
        self.assertAllClose(
            np.linalg.norm(ops.convert_to_numpy(constrained), axis=1),
            np.ones((3, 6)),
            rtol=1e-5,
        )

    def test_dropout(self):
        layer = make("mlp", dropout=0.5, seed=1)
        inference = ops.convert_to_numpy(layer(self.rows, self.sizes))
        training = layer(self.rows, self.sizes, training=True)
        difference = np.abs(ops.convert_to_numpy(training) - inference)
        self.assertGreater(difference.max(), 1e-3)
        self.assertAllEqual(layer(self.rows, self.sizes), inference)
        self.assertFalse(hasattr(make("mlp"), "seed_generator"))

    def test_config(self):
        for kind in ("mlp", "glu"):
            layer = make(
                kind,
                dropout=0.1,
                seed=2,
                activation="gelu",
                kernel_regularizer="l2",
                kernel_constraint="max_norm",
                kernel_initializer="he_normal",
                implementation="reference",
            )
            self.run_class_serialization_test(layer)

    @parameterized.parameters(
        ({"num_experts": 0, "intermediate_dim": 4}, "num_experts=0"),
        ({"num_experts": 2, "intermediate_dim": 0}, "intermediate_dim=0"),
        ({"num_experts": 2, "intermediate_dim": 4, "dropout": 1.0}, "dropout"),
        (
            {"num_experts": 2, "intermediate_dim": 4, "activation": "sillu"},
            "sillu",
        ),
        (
            {"num_experts": 2, "intermediate_dim": 4, "implementation": "gpu"},
            "implementation='gpu'",
        ),
    )
    def test_errors(self, kwargs, message):
        with self.assertRaisesRegex(ValueError, message):
            experts.GLUExperts(**kwargs)

    def test_wrong_rank_and_name(self):
        with self.assertRaisesRegex(ValueError, r"rows_shape=\(1, 2, 3\)"):
            make("mlp").build((1, 2, 3))
        with self.assertRaisesRegex(ValueError, "experts='gru'"):
            make("gru")
