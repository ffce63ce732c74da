"""What only the fused experts of PyTorch have to be right about."""

import warnings

import keras
import numpy as np
import pytest
from absl.testing import parameterized
from keras import ops

from tests.backend.fused_experts_test import expected
from tests.backend.fused_experts_test import operands
from tests.test_case import TestCase

if keras.config.backend() != "torch":
    pytest.skip("for PyTorch", allow_module_level=True)

import torch

from keras_moe.backend.torch import memory
from keras_moe.backend.torch.batches import lay_out
from keras_moe.backend.torch.fused_experts import expert_loop

GROUP = (20, 2, (17, 3, 12, 8))


def silu_gate(gate, up):
    return ops.silu(gate) * up


def inputs(arrays):
    floats = (
        arrays["tokens"],
        arrays["row_weights"],
        *arrays["kernels"],
        *(b for b in arrays["biases"] if b is not None),
    )
    return [torch.tensor(x, dtype=torch.float32) for x in floats]


def call(arrays, floats, hidden=silu_gate):
    tokens, row_weights, *banks = floats
    kernels, biases = banks[:3], banks[3:] or [None] * 3
    choices = torch.as_tensor(arrays["choices"])
    sizes = torch.as_tensor(arrays["sizes"])
    return expert_loop(
        tokens, row_weights, choices, sizes, kernels, biases, hidden
    )


class FusedTorchTest(TestCase):
    def test_only_what_is_needed_gets_a_gradient(self):
        arrays = operands(*GROUP, use_bias=True)
        d_out = torch.tensor(arrays["d_out"], dtype=torch.float32)
        _, d_tokens, d_weights, d_kernels, d_biases = expected(**arrays)
        wanted = d_tokens, d_weights, *d_kernels, *d_biases
        for i, exact in enumerate(wanted):
            floats = inputs(arrays)
            floats[i].requires_grad_()
            call(arrays, floats).backward(d_out)
            self.assert_relative(floats[i].grad.numpy(), exact, 1e-5)
            others = [x.grad for j, x in enumerate(floats) if j != i]
            self.assertEqual(others, [None] * len(others))

    def test_strided_inputs_and_expanded_gradient(self):
        arrays = operands(*GROUP)
        arrays["d_out"] = np.ones_like(arrays["d_out"])
        out, d_tokens, _, d_kernels, _ = expected(**arrays)
        floats = [
            x.mT.contiguous().mT if x.ndim > 1 else x for x in inputs(arrays)
        ]
        for x in floats:
            x.requires_grad_()
        actual = call(arrays, floats)
        actual.sum().backward()
        self.assert_relative(actual.detach().numpy(), out, 1e-5)
        for x, exact in zip(floats, (d_tokens, None, *d_kernels), strict=True):
            if exact is not None:
                self.assert_relative(x.grad.numpy(), exact, 1e-5)

    def test_without_gradients_the_same(self):
        arrays = operands(350, 2, (300, 1, 0, 390))
        floats = inputs(arrays)
        plain = call(arrays, floats)
        self.assertFalse(plain.requires_grad)
        floats[0].requires_grad_()
        np.testing.assert_array_equal(
            plain, call(arrays, floats).detach().numpy()
        )

    @parameterized.parameters(False, True)
    def test_gradients_of_gradients(self, penalty):
        """With an arriving gradient that is a constant, and with one that is
        not."""
        arrays = operands(*GROUP, use_bias=True)

        def value(*floats):
            out = call(arrays, floats)
            if penalty:
                (first,) = torch.autograd.grad(
                    out.sum(), floats[0], create_graph=True
                )
                return first.square().sum()
            return out.tanh().sum()

        floats = [x.double().requires_grad_() for x in inputs(arrays)]
        first = torch.autograd.grad(
            value(*floats), floats, create_graph=True, materialize_grads=True
        )
        rng = np.random.default_rng(1)
        step = [torch.tensor(rng.normal(size=x.shape)) for x in floats]
        # The derivative in one direction, by central differences: of the
        # value, and of its gradient.
        change = []
        for sign in (1, -1):
            moved = [
                (x + sign * 1e-5 * d).detach().requires_grad_()
                for x, d in zip(floats, step, strict=True)
            ]
            there = value(*moved)
            gradients = torch.autograd.grad(
                there, moved, materialize_grads=True
            )
            change.append((there.detach(), *gradients))
        wanted, *second = ((a - b) / 2e-5 for a, b in zip(*change, strict=True))
        slope = sum((g * d).sum() for g, d in zip(first, step, strict=True))
        self.assertAllClose(slope.detach(), wanted, rtol=1e-7)
        actual = torch.autograd.grad(slope, floats, materialize_grads=True)
        for ours, exact in zip(actual, second, strict=True):
            self.assert_relative(ours.numpy(), exact.numpy(), 1e-7)

    def test_hidden_without_slope(self):
        arrays = operands(*GROUP)
        floats = [x.requires_grad_() for x in inputs(arrays)]

        def step(gate, up):
            return ops.cast(gate > 0, gate.dtype)

        call(arrays, floats, step).sum().backward()
        self.assertEqual(floats[0].grad.abs().sum(), 0)
        self.assertGreater(floats[4].grad.abs().sum(), 0)
        call(arrays, floats, lambda gate, up: ops.relu(up)).sum().backward()
        self.assertEqual(floats[2].grad.abs().sum(), 0)
        self.assertGreater(floats[3].grad.abs().sum(), 0)

    def test_compiled(self):
        arrays = operands(*GROUP)
        floats = inputs(arrays)
        x = floats[0].requires_grad_()
        d_out = torch.tensor(arrays["d_out"], dtype=torch.float32)
        out, d_tokens, *_ = expected(**arrays)
        # NumPy is not to be compiled.
        for name in ("choices", "sizes"):
            arrays[name] = torch.tensor(arrays[name])
        compiled = torch.compile(
            lambda x: call(arrays, [x, *floats[1:]]) * 2, backend="aot_eager"
        )
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the compiler's, of its own doing
            actual = compiled(x)
        actual.backward(d_out / 2)
        self.assert_relative(actual.detach().numpy() / 2, out, 1e-5)
        self.assert_relative(x.grad.numpy(), d_tokens, 1e-5)

    def test_refuses_what_is_not_on_the_cpu(self):
        arrays = operands(*GROUP)
        floats = [x.to("meta") for x in inputs(arrays)]
        with self.assertRaisesRegex(NotImplementedError, "device meta"):
            call(arrays, floats)

    def test_batches_cover_all_rows(self):
        rng = np.random.default_rng(0)
        for most in (1, 3, 40, 500):
            sizes = rng.integers(0, most + 1, 37).astype("int32")
            num_rows = int(sizes.sum())
            choices = rng.permutation(num_rows).astype("int32")
            layout = lay_out(
                torch.tensor(choices), torch.tensor(sizes), num_rows
            )
            experts, stop = [], 0
            for batch in layout.batches:
                ours = list(range(37))[batch.experts]
                self.assertEqual(
                    (len(ours), batch.places.start), (batch.shape[0], stop)
                )
                stop += batch.shape[0] * batch.shape[1]
                self.assertEqual(batch.places.stop, stop)
                experts += np.repeat(ours, batch.shape[1]).tolist()
            self.assertEqual(len(layout.token_of_place), stop)
            # Each place has a token of the expert it belongs to.
            of_row = np.repeat(np.arange(37), sizes)
            np.testing.assert_array_equal(of_row[layout.row_of_place], experts)
            np.testing.assert_array_equal(
                layout.token_of_place[layout.place_of_row], choices
            )


class MemoryTest(TestCase):
    def test_is_used_again_once_it_is_free(self):
        memory.release()
        first = memory.empty((4, 8), torch.float32)
        place = first.data_ptr()
        view = first[1:].t()
        del first
        second = memory.empty((8, 4), torch.float32)
        self.assertNotEqual(second.data_ptr(), place)  # the view has it
        del view
        third = memory.empty((16, 4), torch.bfloat16)
        self.assertEqual(third.data_ptr(), place)
        self.assertEqual((third.dtype, third.shape), (torch.bfloat16, (16, 4)))

    def test_gradients_kept_by_others_stay_as_they_are(self):
        arrays = operands(*GROUP)
        floats = [x.requires_grad_() for x in inputs(arrays)]
        kernel = floats[2]
        call(arrays, floats).sum().backward()
        kept, copy = kernel.grad, kernel.grad.clone()
        kernel.grad = None
        for _ in range(3):
            (call(arrays, floats) * 2).sum().backward()
        self.assertAllClose(kept, copy)
        self.assertAllClose(kernel.grad, 6 * copy, rtol=1e-5)
