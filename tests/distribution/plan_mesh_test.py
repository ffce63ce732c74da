"""Plans of several devices, against what XLA compiles for them (JAX)."""

import math
import re

import keras
import numpy as np
import pytest
from absl.testing import parameterized

from keras_moe.distribution import ExpertParallel
from keras_moe.distribution import plan
from keras_moe.experts import GLUExperts
from keras_moe.layers import MoE
from keras_moe.routers import TopKRouter
from tests.test_case import TestCase

pytestmark = [
    pytest.mark.multi_device,
    pytest.mark.skipif(
        keras.config.backend() != "jax", reason="asks the compiler of JAX"
    ),
]
BATCH, LENGTH, DIM = 64, 64, 32
SENDS = "all-to-all|all-reduce|all-gather|reduce-scatter|collective-permute"
BYTES = {"f32": 4, "s32": 4, "u32": 4, "bf16": 2, "pred": 1}


def make_model():
    inputs = keras.Input((LENGTH, DIM))
    x = keras.layers.Dense(DIM, activation="relu")(inputs)
    x += MoE(
        router=TopKRouter(8, 2),
        experts=GLUExperts(8, 64),
        losses=None,
        statistics=None,
    )(x)
    model = keras.Model(inputs, keras.layers.Dense(8)(x))
    model.compile("adam", "mse")
    model.optimizer.build(model.trainable_variables)
    return model


def compiled_step(model):
    """A training step for the active distribution, and its batch."""
    import jax

    def step(weights, state, slots, x, y):
        def loss(weights):
            outputs, after = model.stateless_call(
                weights, state, x, training=True
            )
            return ((outputs - y) ** 2).mean(), after

        gradients, state = jax.grad(loss, has_aux=True)(weights)
        weights, slots = model.optimizer.stateless_apply(
            slots, gradients, weights
        )
        return weights, state, slots

    def placed(width):
        shape = (BATCH, LENGTH, width)
        values = np.random.default_rng(0).normal(size=shape).astype("float32")
        layout = keras.distribution.distribution().get_data_layout(shape)
        return jax.device_put(values, layout.backend_layout)

    variables = [
        [v.value for v in group]
        for group in (
            model.trainable_variables,
            model.non_trainable_variables,
            model.optimizer.variables,
        )
    ]
    batch = [placed(DIM), placed(8)]
    shardings = jax.tree.map(lambda value: value.sharding, tuple(variables))
    program = jax.jit(step, donate_argnums=(0, 1, 2), out_shardings=shardings)
    return program.lower(*variables, *batch).compile(), batch


def group_size(line):
    listed = re.search(r"replica_groups=\{\{([\d,]+)\}", line)
    if listed:
        return len(listed[1].split(","))
    mesh = re.search(r"replica_groups=mesh\[(.*?)\] \{(.*?)\}", line)
    sizes, axes = mesh.groups()
    sizes = dict(re.findall(r"'(\w+)'=(\d+)", sizes))
    return math.prod(int(sizes[axis]) for axis in re.findall(r"\w+", axes))


def sent(text):
    """Bytes that a device sends, by kind, outside of loops.

    Loops are the rounds for rows that had no room in the first: here none.
    """
    bodies = re.split(r"\n(?=(?:ENTRY )?%[\w.-]+ \()", text)
    computations = {
        re.match(r"(?:ENTRY )?%?([\w.-]+)", body)[1]: body for body in bodies
    }
    loops = re.findall(r"(?:body|condition)=%([\w.-]+)", text)
    while loops:
        body = computations.pop(loops.pop(), "")
        loops += re.findall(r"(?:to_apply|calls)=%([\w.-]+)", body)
    total = dict.fromkeys(SENDS.split("|"), 0)
    for line in "\n".join(computations.values()).splitlines():
        found = re.search(rf"= (.*?) ({SENDS})(-start)?\(", line)
        if not found:
            continue
        size = sum(
            BYTES[dtype] * math.prod(int(n) for n in shape.split(",") if n)
            for dtype, shape in re.findall(r"(\w+)\[([\d,]*)\]", found[1])
        )
        devices = group_size(line)
        # As in a ring.
        part = size * (devices - 1) / devices
        total[found[2]] += 2 * part if found[2] == "all-reduce" else part
    return total


class CompiledForDevicesTest(TestCase):
    @parameterized.parameters((1, 4), (2, 2))
    def test_memory_and_traffic(self, data, expert):
        devices = keras.distribution.list_devices("cpu")[: data * expert]
        strategy = ExpertParallel(expert, data, devices=devices)
        with strategy.scope():
            model = strategy.distribute(make_model())
            compiled, batch = compiled_step(model)
        result = plan(model, {"data": data, "expert": expert}, BATCH)
        mesh = keras.distribution.DeviceMesh(
            (data, expert), ("data", "expert"), devices
        )
        self.assertEqual(plan(model, mesh, BATCH), result)
        held = result.weights + result.optimizer_state
        held += sum(values.nbytes for values in batch) / (data * expert)
        arguments = compiled.memory_analysis().argument_size_in_bytes
        self.assertAllClose(held / arguments, 1.0, atol=0.01)
        traffic = sent(compiled.as_text())
        rows = result.layers[0].rows * DIM * 4
        self.assertEqual(result.all_to_all, 4 * rows * (expert - 1) // expert)
        ratio = traffic["all-to-all"] / result.all_to_all
        # Buffers have room for 1/16 more rows than an even division.
        self.assertGreater(ratio, 1.0)
        self.assertLess(ratio, 1.1)
        ratio = traffic["all-reduce"] / result.all_reduce
        self.assertAllClose(ratio, 1.0, atol=0.1)
