import keras
import numpy as np
from absl.testing import parameterized
from keras import ops

from keras_moe import experts
from tests.experts.bank_case import BankTestCase
from tests.token_loop import ACTIVATIONS

SIZES = (3, 0, 2)


def one_row(rank, alpha, gated, activation, limit=None):
    """The network with the kernels of an expert written out in full."""
    scale = 1.0 if alpha is None else alpha / rank

    def dense(x, name, w, e):
        correction = w[f"{name}_lora_a"][e] @ w[f"{name}_lora_b"][e]
        kernel = w[f"{name}_kernel"] + scale * correction
        return x @ kernel + w.get(f"{name}_bias", 0.0)

    def call(row, w, e):
        act = ACTIVATIONS[activation]
        up = dense(row, "up", w, e)
        if gated:
            gate = dense(row, "gate", w, e)
            if limit is not None:
                gate, up = np.minimum(gate, limit), np.clip(up, -limit, limit)
            hidden = act(gate) * up
        else:
            hidden = act(up)
        return dense(hidden, "down", w, e)

    return call


class LowRankExpertsTest(BankTestCase):
    def setUp(self):
        super().setUp()
        self.rows = np.random.default_rng(6).normal(size=(6, 4))

    @parameterized.parameters(
        (True, False, None, "silu"),
        (True, True, 0.5, "silu"),
        (False, True, 3, "tanh"),
    )
    def test_against_full_kernels(self, gated, use_bias, alpha, activation):
        layer = experts.LowRankExperts(
            3,
            5,
            rank=2,
            alpha=alpha,
            gated=gated,
            use_bias=use_bias,
            activation=activation,
            bias_initializer="normal",
            lora_b_initializer="he_uniform",
        )
        formula = one_row(2, alpha, gated, activation)
        self.check_bank(layer, self.rows, SIZES, formula)

    def test_limit_and_output_dim(self):
        layer = experts.LowRankExperts(
            3, 5, rank=1, limit=0.3, lora_b_initializer="ones", output_dim=3
        )
        formula = one_row(1, None, True, "silu", limit=0.3)
        self.check_bank(layer, self.rows, SIZES, formula)

    def test_names_and_shapes(self):
        layer = experts.LowRankExperts(
            3, 5, rank=2, use_bias=True, output_dim=7, name="experts"
        )
        layer.build((None, 4))
        wanted = {}
        for name, d, f in (("gate", 4, 5), ("up", 4, 5), ("down", 5, 7)):
            wanted[f"experts/{name}_kernel"] = (d, f)
            wanted[f"experts/{name}_bias"] = (f,)
            wanted[f"experts/{name}_lora_a"] = (3, d, 2)
            wanted[f"experts/{name}_lora_b"] = (3, 2, f)
        shapes = {v.path: tuple(v.shape) for v in layer.weights}
        self.assertEqual(shapes, wanted)

    def test_starts_as_the_shared_network(self):
        layer = experts.LowRankExperts(2, 5, freeze_shared=True)
        rows = np.concatenate([self.rows[:3], self.rows[:3]])
        out = ops.convert_to_numpy(layer(rows, ops.array([3, 3], "int32")))
        self.assertAllClose(out[:3], out[3:], atol=1e-6)
        dense = experts.GLUExperts(1, 5)
        dense.build((None, 4))
        for name in ("gate", "up", "down"):
            kernel = getattr(layer, f"{name}_kernel")
            getattr(dense, f"{name}_kernel").assign(kernel[None])
        shared = dense(rows, ops.array([6], "int32"))
        self.assertAllClose(out, shared, rtol=1e-5)
        names = {v.name for v in layer.trainable_variables}
        self.assertEqual(
            names,
            {f"{n}_lora_{m}" for n in ("gate", "up", "down") for m in "ab"},
        )

    def test_a_seed_gives_no_two_matrices_alike(self):
        initializer = keras.initializers.RandomNormal(seed=1)
        layer = experts.LowRankExperts(
            2,
            4,
            rank=4,
            kernel_initializer=initializer,
            lora_a_initializer=initializer,
            lora_b_initializer=initializer,
        )
        layer.build((None, 4))
        matrices = [
            matrix
            for v in layer.weights
            for matrix in ops.convert_to_numpy(v).reshape(-1, 4, 4)
        ]
        self.assertLen(matrices, 3 * (1 + 2 + 2))
        for i in range(len(matrices)):
            for j in range(i):
                difference = np.abs(matrices[i] - matrices[j]).max()
                self.assertGreater(difference, 1e-3)

    def test_regularizers(self):
        layer = experts.LowRankExperts(
            2, 5, kernel_regularizer="l2", bank_regularizer="l1"
        )
        layer.build((None, 4))
        regularized = [v for v in layer.weights if v.regularizer is not None]
        self.assertLen(regularized, 9)
        losses = [float(ops.convert_to_numpy(loss)) for loss in layer.losses]
        wanted = []
        for v in layer.weights:
            value = ops.convert_to_numpy(v)
            wanted.append(
                0.01 * (np.abs(value) if "lora" in v.name else value**2).sum()
            )
        self.assertAllClose(sorted(losses), sorted(wanted), rtol=1e-4)

    def test_no_rows_dtypes_and_saving(self):
        def make(dtype="float32", **kwargs):
            return experts.LowRankExperts(
                3,
                5,
                rank=2,
                lora_b_initializer="he_normal",
                dtype=dtype,
                **kwargs,
            )

        rows = self.rows.astype("float32")
        self.check_no_rows(make(use_bias=True), (4,))
        self.check_dtypes(make, rows, SIZES)
        self.check_saving(
            make(alpha=3, gated=False, freeze_shared=True, use_bias=True),
            rows,
            (3, 0, 3),
        )

    @parameterized.parameters(
        ({"rank": 0}, "`rank` must be a positive int. Received: rank=0"),
        ({"alpha": 0}, "`alpha` must be positive or None. Received: alpha=0"),
        ({"gated": False, "limit": 2}, "need `gated=True`.*limit=2"),
        ({"gated": False, "up_shift": 1.0}, "up_shift=1.0"),
        ({"num_experts": 0}, "num_experts=0"),
    )
    def test_errors(self, kwargs, message):
        with self.assertRaisesRegex(ValueError, message):
            experts.LowRankExperts(
                **{"num_experts": 2, "intermediate_dim": 4, **kwargs}
            )
