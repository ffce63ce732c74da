"""Bytes and products of one device, by formula.

All counts of bytes sent are those of ring algorithms: of `b` bytes on each of
`n` devices, an all-to-all or a reduce-scatter sends `b (n - 1) / n`, and an
all-reduce twice as much.
"""

from typing import NamedTuple


class LayerPlan(NamedTuple):
    """What one MoE layer, or several equal ones, cost a device.

    Fields:
        name: str. Of the first of them.
        num_layers: int. How many are equal to this.
        num_experts: int. Experts of the device.
        rows: int. Rows that it computes in a step, on average.
        imbalance: float. Rows of the busiest device over this average.
        weights: int. Bytes of each layer's experts on the device.
        all_to_all: int. Bytes that it sends in a step for each layer.
    """

    name: str
    num_layers: int
    num_experts: int
    rows: int
    imbalance: float
    weights: int
    all_to_all: int


class Traffic(NamedTuple):
    """Bytes that a device sends in a step."""

    all_to_all: int
    all_reduce: int


def layer_plan(layer, mesh, tokens, imbalance, variable, compute, passes):
    """A `LayerPlan`.

    Args:
        layer: A `MoESize`.
        mesh: dict.
        tokens: int. Tokens of the device.
        imbalance: float.
        variable, compute: int. Bytes of a number of weights, and of rows.
        passes: int. How often rows travel there and back in a step.
    """
    shards = mesh["expert"] if layer.divided else 1
    rows = round(tokens * layer.rows_per_token)
    both_ways = rows * (layer.input_dim + layer.output_dim) * compute
    return LayerPlan(
        layer.name,
        layer.num_layers,
        layer.num_experts // shards,
        rows,
        imbalance,
        layer.bank * variable // (shards * mesh["model"]),
        round(passes * both_ways * (shards - 1) / shards),
    )


def kept_bytes(layer, plan, mesh, compute):
    """What the backward pass needs of the rows of one layer.

    On the device of the experts, the rows and what comes of them, for the
    busiest device; at home, the rows that came back.
    """
    if not layer.divided or mesh["expert"] == mesh["model"] == 1:
        return round(plan.rows * layer.kept_fused * compute)
    inside = layer.input_dim + layer.kept_per_row / mesh["model"]
    return round(
        plan.rows * compute * (plan.imbalance * inside + layer.output_dim)
    )


def traffic(size, layers, mesh, variable, compute, training, shard_dense):
    """Of a whole step; `layers` are pairs of a `MoESize` and its plan."""
    replicas = mesh["data"] * mesh["expert"]
    dense = (replicas - 1) / replicas * size.weights
    if shard_dense:
        # Gathered for each pass over the layers, and gradients scattered.
        reduced = dense * (2 * compute + variable if training else compute)
    else:
        reduced = 2 * dense * variable * training
    exchanged = 0
    model, data = mesh["model"], mesh["data"]
    for layer, plan in layers:
        exchanged += layer.num_layers * plan.all_to_all
        if training and layer.trained:
            reduced += 2 * (data - 1) / data * plan.weights * layer.num_layers
        if layer.divided:
            # Each device of a model axis has a part of every row's sum.
            width = layer.output_dim + layer.input_dim * training
            each = 2 * (model - 1) / model * plan.rows * width * compute
            reduced += layer.num_layers * each
    return Traffic(round(exchanged), round(reduced))


def products_per_example(size, mesh):
    """Multiplications of the forward pass that one device does."""
    return size.products + sum(
        layer.num_layers
        * layer.positions
        * layer.rows_per_token
        * layer.products
        / (mesh["model"] if layer.divided else 1)
        for layer in size.moe
    )
