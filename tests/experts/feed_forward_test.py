"""What GLUExperts and MLPExperts can besides the plain formula."""

import keras
import numpy as np
from absl.testing import parameterized
from keras import ops

from keras_moe import experts
from tests.experts.bank_case import BankTestCase
from tests.token_loop import sigmoid

SIZES = (3, 0, 2)


def swiglu(alpha, limit, shift):
    """The clamped unit, written out."""

    def one_row(row, w, e):
        gate = row @ w["gate_kernel"][e] + w["gate_bias"][e]
        up = row @ w["up_kernel"][e] + w["up_bias"][e]
        if limit is not None:
            gate = np.where(gate > limit, limit, gate)
            up = np.maximum(np.minimum(up, limit), -limit)
        hidden = (up + shift) * gate * sigmoid(alpha * gate)
        return hidden @ w["down_kernel"][e] + w["down_bias"][e]

    return one_row


class FeedForwardTest(BankTestCase):
    def setUp(self):
        super().setUp()
        self.rows = np.random.default_rng(3).normal(size=(6, 4))

    @parameterized.named_parameters(
        ("gpt_oss", "quick_gelu", 1.702, 0.5, 1.0),
        ("deepseek_v4", "silu", 1.0, 0.5, 0.0),
        ("any_alpha", experts.Swish(0.7), 0.7, None, -0.5),
    )
    def test_clamped_glu(self, activation, alpha, limit, shift):
        layer = experts.GLUExperts(
            3,
            5,
            activation=activation,
            use_bias=True,
            bias_initializer="normal",
            kernel_initializer=keras.initializers.RandomNormal(stddev=0.7),
            limit=limit,
            up_shift=shift,
        )
        layer.build((None, 4))
        if limit is not None:  # the case is about bounds that are reached
            gates = self.rows @ ops.convert_to_numpy(layer.gate_kernel[0])
            ups = self.rows @ ops.convert_to_numpy(layer.up_kernel[0])
            self.assertGreater(gates.max(), limit)
            self.assertLess(gates.min(), -limit)
            self.assertGreater(np.abs(ups).max(), limit)
        self.check_bank(layer, self.rows, SIZES, swiglu(alpha, limit, shift))

    def test_relu_squared_and_output_dim(self):
        layer = experts.MLPExperts(
            3, 5, activation="relu_squared", use_bias=False, output_dim=7
        )

        def one_row(row, w, e):
            hidden = np.maximum(row @ w["up_kernel"][e], 0) ** 2
            return hidden @ w["down_kernel"][e]

        self.check_bank(layer, self.rows, SIZES, one_row)
        self.assertEqual(layer.compute_output_shape((None, 4)), (None, 7))

    @parameterized.parameters((True, False), (False, True))
    def test_one_bias(self, use_bias, use_output_bias):
        layer = experts.MLPExperts(
            3,
            5,
            activation="tanh",
            use_bias=use_bias,
            use_output_bias=use_output_bias,
            bias_initializer="normal",
        )

        def one_row(row, w, e):
            hidden = row @ w["up_kernel"][e]
            if use_bias:
                hidden = hidden + w["up_bias"][e]
            y = np.tanh(hidden) @ w["down_kernel"][e]
            return y if use_bias else y + w["down_bias"][e]

        self.check_bank(layer, self.rows, SIZES, one_row)
        self.assertLen(layer.trainable_variables, 3)
        again = experts.MLPExperts.from_config(layer.get_config())
        self.assertEqual(again.use_output_bias, use_output_bias)

    def test_output_dim_of_glu(self):
        layer = experts.GLUExperts(3, 5, output_dim=2, use_bias=True)
        out = layer(self.rows, ops.array(SIZES, "int32"))
        self.assertEqual(tuple(out.shape), (6, 2))
        self.assertEqual(tuple(layer.down_bias.shape), (3, 2))

    def test_no_rows_and_dtypes(self):
        def make(dtype):
            return experts.GLUExperts(
                3, 5, "quick_gelu", limit=1, up_shift=1, dtype=dtype
            )

        self.check_no_rows(make("float32"), (4,))
        self.check_dtypes(make, self.rows.astype("float32"), SIZES)

    @parameterized.parameters(
        ("quick_gelu",),
        ("relu_squared",),
        ("gelu_tanh",),
        (experts.Swish(0.3),),
    )
    def test_saving(self, activation):
        layer = experts.GLUExperts(
            3,
            5,
            activation=activation,
            limit=2,
            up_shift=0.5,
            output_dim=3,
            bank_regularizer="l2",
        )
        config = layer.get_config()
        if isinstance(activation, str):
            self.assertEqual(config["activation"], activation)
        again = experts.GLUExperts.from_config(config)
        x = ops.linspace(-2, 2, 9)
        self.assertAllClose(again.activation(x), layer.activation(x))
        self.check_saving(layer, self.rows.astype("float32"), (3, 0, 3))

    def test_bank_regularizer_sees_all_experts(self):
        def apart(bank):  # large where experts are alike
            flat = ops.reshape(bank, (bank.shape[0], -1))
            return ops.sum(ops.matmul(flat, ops.transpose(flat)))

        layer = experts.MLPExperts(
            3,
            5,
            bank_regularizer=apart,
            kernel_regularizer=keras.regularizers.L2(0.5),
            bias_regularizer="l1",
            bias_initializer="ones",
        )
        layer.build((None, 4))
        wanted = []
        for kernel in (layer.up_kernel, layer.down_kernel):
            kernel = ops.convert_to_numpy(kernel).astype("float64")
            total = np.sum(kernel.sum(axis=0) ** 2)
            wanted.append(total + 0.5 * np.sum(kernel**2))
        wanted += [0.01 * 3 * 5, 0.01 * 3 * 4]  # the biases
        losses = [float(ops.convert_to_numpy(loss)) for loss in layer.losses]
        self.assertAllClose(sorted(losses), sorted(wanted), rtol=1e-4)

    @parameterized.parameters(
        ({"limit": 0}, "`limit` must be positive or None.*limit=0"),
        ({"limit": "7"}, "limit='7'"),
        ({"output_dim": 0}, "`output_dim` must be a positive int or None"),
        ({"intermediate_dim": None}, "intermediate_dim=None"),
    )
    def test_errors(self, kwargs, message):
        with self.assertRaisesRegex(ValueError, message):
            experts.GLUExperts(
                **{"num_experts": 2, "intermediate_dim": 4, **kwargs}
            )

    def test_error_of_one_bias(self):
        with self.assertRaisesRegex(ValueError, "`use_output_bias` must be"):
            experts.MLPExperts(2, 4, use_output_bias="no")
