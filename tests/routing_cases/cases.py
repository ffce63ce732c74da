"""What the tests of the recorded routing cases share."""

import contextlib
import functools
import json
import pathlib
from typing import Any
from typing import NamedTuple
from unittest import mock

import keras
import numpy as np
from keras import ops

import keras_moe
from keras_moe.experts import Experts
from keras_moe.routers import Routing
from tests.test_case import TestCase

DATA = pathlib.Path(__file__).parents[1] / "data" / "routing"


class RecordedTest(TestCase):
    """Eager on TensorFlow: these routers have tests of their own in a graph."""

    in_graph = False


class Case(NamedTuple):
    name: str
    config: dict
    arrays: Any


@functools.cache
def _read():
    found = []
    for path in sorted(DATA.glob("*.json")):
        config = json.loads(path.read_text())["config"]
        with np.load(path.with_suffix(".npz")) as arrays:
            found.append(Case(path.stem, config, dict(arrays)))
    return found


def find(matches):
    """The recorded cases of a family."""
    return [
        Case(case.name, dict(case.config), dict(case.arrays))
        for case in _read()
        if matches(case.config, case.arrays)
    ]


def load(matches):
    """The recorded cases of a family; it is an error if there is none."""
    found = find(matches)
    if not found:
        raise ValueError(f"No recorded case in {DATA}")
    return found


def named(matches):
    return [(case.name, case) for case in load(matches)]


@contextlib.contextmanager
def recorded_draws(normal=(), uniform=(), again=False):
    """Keras' random functions return the recorded draws, in this order.

    A recorded normal is a standard one, a recorded uniform between 0 and 1.
    With `again` they may be drawn any number of times, otherwise once.
    """
    left = {"normal": list(normal), "uniform": list(uniform)}

    def draw(kind, shape, dtype):
        values = left[kind].pop(0)
        if again:
            left[kind].append(values)
        values = ops.convert_to_tensor(values, dtype or "float32")
        return ops.reshape(values, shape)

    def fake_normal(shape, mean=0.0, stddev=1.0, dtype=None, seed=None):
        return mean + stddev * draw("normal", shape, dtype)

    def fake_uniform(shape, minval=0.0, maxval=1.0, dtype=None, seed=None):
        return minval + (maxval - minval) * draw("uniform", shape, dtype)

    with (
        mock.patch.object(keras.random, "normal", fake_normal),
        mock.patch.object(keras.random, "uniform", fake_uniform),
    ):
        yield
    if not again and any(left.values()):
        raise AssertionError("Not all recorded draws were asked for.")


class LinearExperts(Experts):
    """The experts of most recorded cases: `row @ kernel[e] + bias[e]`."""

    def __init__(self, num_experts, width, **kwargs):
        super().__init__(num_experts, **kwargs)
        self.width = width

    def build(self, rows_shape):
        self.kernel = self.add_bank("kernel", (rows_shape[-1], self.width))
        self.bias = self.add_bank("bias", (self.width,), kind="bias")

    def call(self, rows, group_sizes, training=None):
        return self.grouped_dense(rows, group_sizes, self.kernel, self.bias)

    def compute_output_shape(self, rows_shape, group_sizes_shape=None):
        return (rows_shape[0], self.width)


def moe_with_linear_experts(router, kernel, bias, **kwargs):
    """A built `MoE`; `kernel` `(E, D, F)`, `bias` `(E, F)`."""
    experts = LinearExperts(kernel.shape[0], kernel.shape[2], name="experts")
    layer = keras_moe.layers.MoE(
        router=router, experts=experts, statistics=None, **kwargs
    )
    layer.build((None, None, kernel.shape[1]))
    experts.kernel.assign(kernel)
    experts.bias.assign(bias)
    return layer


def combine_matrix(layer, routing, num_sequences, mask=None, training=False):
    """The weights each token's experts have in the end, `(T, E)`."""
    num_tokens, top_k = routing.expert_indices.shape
    group_size = layer.capacity.group_size(num_tokens, num_sequences)
    _, _, plan = keras_moe.ops.dispatch(
        ops.zeros((num_tokens, 1)),
        routing,
        layer.num_experts,
        mask=mask,
        capacity=layer.capacity.rows_per_expert(
            group_size, layer.num_experts, top_k, training
        ),
        drop_policy=layer.capacity.drop_policy,
        group_size=group_size,
    )
    weights = routing.expert_weights
    if layer.capacity.normalize_kept_weights:
        weights = keras_moe.ops.normalize_kept_weights(plan, weights)
    weights = np.array(ops.convert_to_numpy(weights))
    if plan.kept is not None:
        weights[~ops.convert_to_numpy(plan.kept)] = 0.0
    indices = ops.convert_to_numpy(routing.expert_indices)
    matrix = np.zeros((num_tokens, layer.num_experts + 1), "float32")
    # A hash table may name an expert twice.
    np.add.at(matrix, (np.arange(num_tokens)[:, None], indices), weights)
    return matrix[:, :-1]


def dense_weights(routing, num_experts):
    """The weights of the chosen experts before any is dropped, `(T, E)`."""
    indices = ops.convert_to_numpy(routing.expert_indices)
    matrix = np.zeros((len(indices), num_experts + 1), "float32")
    np.put_along_axis(
        matrix, indices, ops.convert_to_numpy(routing.expert_weights), axis=1
    )
    return matrix[:, :-1]


class DividedByAllTokens:
    """A loss of this library on each group, divided by all of its tokens."""

    def __init__(self, loss, real, size, power):
        self.loss, self.real, self.size, self.power = loss, real, size, power

    def __call__(self, routing, mask=None):
        total = 0.0
        for g, real in enumerate(self.real):
            group = slice(g * self.size, (g + 1) * self.size)
            part = Routing(*(field[group] for field in routing))
            part_mask = None if mask is None else mask[group]
            share = (real / self.size) ** self.power
            total = total + share * self.loss(part, part_mask)
        return total / len(self.real)
