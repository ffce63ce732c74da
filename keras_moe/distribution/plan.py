from typing import NamedTuple

import keras
import numpy as np

from keras_moe.checks import as_keras_object
from keras_moe.checks import check_bool
from keras_moe.checks import check_int
from keras_moe.distribution.plan_config import size_of_config
from keras_moe.distribution.plan_cost import kept_bytes
from keras_moe.distribution.plan_cost import layer_plan
from keras_moe.distribution.plan_cost import products_per_example
from keras_moe.distribution.plan_cost import traffic
from keras_moe.distribution.plan_mesh import as_mesh
from keras_moe.distribution.plan_mesh import check_divisions
from keras_moe.distribution.plan_mesh import expected_imbalance
from keras_moe.distribution.plan_model import as_model
from keras_moe.distribution.plan_model import size_of_model
from keras_moe.distribution.plan_sizes import bytes_of
from keras_moe.distribution.plan_sizes import numbers_per_weight
from keras_moe.distribution.plan_table import table


class Plan(NamedTuple):
    """What a model costs on a mesh of devices; `str` makes a table of it.

    Bytes are those of one device, the busiest one where they differ.

    Fields, of `plan`:
        mesh: dict. Sizes of the axes `"data"`, `"expert"` and `"model"`.
        parameters: int. Trained weights of the whole model.
        active_parameters: int. Those that a token uses, and the whole of the
            embeddings.
        tokens: int. Tokens of each device in a step.
        weights, gradients, optimizer_state, activations: int. Bytes.
        all_to_all: int. Bytes that a device sends in a step to move rows to
            their experts and back.
        all_reduce: int. Bytes that it sends in a step to sum gradients (and
            the parts of rows, with a model axis).
        imbalance: float. Rows of the busiest device over the mean, in the layer
            where that is largest.
        flops_per_token: int. Of the forward pass: two for each multiplication.
        flops: int. Of a device in a step, on average.
        layers: tuple. A `LayerPlan` for each kind of MoE layer.
    """

    mesh: dict
    parameters: int
    active_parameters: int
    tokens: int
    weights: int
    gradients: int
    optimizer_state: int
    activations: int
    all_to_all: int
    all_reduce: int
    imbalance: float
    flops_per_token: int
    flops: int
    layers: tuple

    @property
    def memory(self):
        """Bytes of weights, gradients, optimizer state and activations."""
        held = self.weights + self.gradients + self.optimizer_state
        return held + self.activations

    def __str__(self):
        return table(self)


def plan(
    model,
    mesh,
    batch,
    sequence_length=None,
    dtype=None,
    optimizer="adam",
    expert_loads=None,
    recompute=False,
    shard_dense=False,
    input_shape=None,
    seed=0,
):
    """Computes what a model would cost each device, without running it.

    Tokens are divided over the axes `"data"` and `"expert"` of the mesh. The
    weights of the experts are divided over `"expert"`, and their hidden width
    over `"model"`; all else is on every device. Nothing is allocated: a model
    of thousands of devices is planned in seconds on one.

    How the numbers are made:

    - Weights, gradients and optimizer state are exact. Buffers of libraries,
      fragments and copies in another dtype come on top.
    - Activations are the inputs of products, activations and normalizations,
      and the logits. Attention is taken to keep no scores (flash attention).
    - Bytes sent are those of ring algorithms, without padding of buffers.
    - The imbalance is what chance makes of a router that prefers no expert
      (or prefers them as `expert_loads` says): it is never better than this.
    - FLOPs are those of products with weights, and of attention to the whole
      sequence. The backward pass counts twice, recomputation once more. A layer
      that a model calls twice counts once.

    Args:
        model: A Keras model or layer with `keras_moe` layers in it; a function
            without arguments that makes one, of which only the shapes are
            made; or a dict, the configuration of a language model as in
            `config.json` of Hugging Face, for gated experts and RMS norms
            (Mixtral, Qwen-MoE, DeepSeek-V3, Kimi K2). What a model has beside
            the layers of such a dict (prediction of further tokens) is not
            counted. Experts are divided if each of their weights has an axis of
            experts, as in `GLUExperts`; others (`LayerExperts`) are on every
            device.
        mesh: dict, with sizes of `"data"`, `"expert"` and `"model"`, each 1 if
            it is not there; or a `keras.distribution.DeviceMesh`.
        batch: int. Examples that all devices compute at once.
        sequence_length: int. Tokens of an example. Required for a dict, and for
            a model whose inputs leave it open. Defaults to the model's.
        dtype: A dtype policy or its name. Defaults to the model's own, or
            Keras' global policy.
        optimizer: A Keras optimizer or its name, or `None` for inference.
            Defaults to `"adam"`.
        expert_loads: `(E,)`. How often each expert is chosen, in any unit.
            Defaults to equal loads.
        recompute: bool. Whether only the inputs of each block (the outputs of
            each layer of a functional Keras model) are kept for the backward
            pass, and all else is computed again. Defaults to `False`.
        shard_dense: bool. Whether weights that are no experts', with gradients
            and optimizer state, are divided over all devices and gathered when
            used (ZeRO-3, FSDP). Defaults to `False`.
        input_shape: tuple. Shape of an example, for a model that is not built.
            Defaults to `None`.
        seed: int. Seed of the draws for the imbalance. Defaults to `0`.

    Returns:
        A `Plan`.

    Raises:
        ValueError: If the mesh does not divide the batch, the experts or their
            width; the message has the nearest that it does. If a configuration
            lacks entries or contradicts itself, or an argument is wrong.

    Example:

    >>> mixtral = {
    ...     "hidden_size": 4096, "intermediate_size": 14336,
    ...     "num_hidden_layers": 32, "num_attention_heads": 32,
    ...     "num_key_value_heads": 8, "num_local_experts": 8,
    ...     "num_experts_per_tok": 2, "vocab_size": 32000,
    ... }
    >>> result = keras_moe.distribution.plan(
    ...     mixtral, {"data": 4, "expert": 8}, batch=64, sequence_length=4096,
    ...     dtype="mixed_bfloat16", optimizer="adamw",
    ... )
    >>> round(result.parameters / 1e9, 1), round(result.weights / 2**30, 1)
    (46.7, 27.0)

    Reference:

    - [Rajbhandari et al., 2020](https://arxiv.org/abs/1910.02054) (memory)
    - [Korthikanti et al., 2022](https://arxiv.org/abs/2205.05198), section 4
      (activations)
    - [Lepikhin et al., 2020](https://arxiv.org/abs/2006.16668) (all-to-all)
    """
    mesh = as_mesh(mesh)
    check_bool("recompute", recompute)
    check_bool("shard_dense", shard_dense)
    size = _size(model, sequence_length, input_shape)
    check_divisions(mesh, batch, size.moe)
    policy = as_keras_object(
        "dtype",
        keras.dtype_policies.get,
        dtype or size.dtype or keras.config.dtype_policy(),
    )
    variable = bytes_of(policy.variable_dtype)
    compute = bytes_of(policy.compute_dtype)
    training = optimizer is not None
    per_weight = (0, 0)
    if training:
        get = keras.optimizers.get
        optimizer = as_keras_object("optimizer", get, optimizer)
        per_weight = numbers_per_weight(optimizer)
    replicas = mesh["data"] * mesh["expert"]
    examples = batch // replicas
    layers = []
    for layer in size.moe:
        loads = _as_loads(expert_loads, layer)
        tokens = examples * layer.positions
        imbalance = expected_imbalance(layer, mesh, tokens, loads, seed)
        passes = 2 + recompute if training else 1
        costs = layer_plan(
            layer, mesh, tokens, imbalance, variable, compute, passes
        )
        layers.append((layer, costs))
    dense = size.weights * variable / (replicas if shard_dense else 1)
    experts = sum(m.num_layers * p.weights for m, p in layers)
    trained = sum(m.num_layers * p.weights for m, p in layers if m.trained)
    if training and not recompute:
        activations = examples * size.kept * compute + sum(
            m.num_layers * kept_bytes(m, p, mesh, compute) for m, p in layers
        )
    else:
        # One layer at a time has all of its own.
        activations = examples * size.kept_blocks * compute * training + max(
            (kept_bytes(m, p, mesh, compute) for m, p in layers), default=0
        )
    sent = traffic(size, layers, mesh, variable, compute, training, shard_dense)
    everywhere = {**mesh, "model": 1}
    return Plan(
        mesh=mesh,
        parameters=size.parameters,
        active_parameters=size.active_parameters,
        tokens=examples * size.positions,
        weights=round(dense + experts + size.state * variable),
        gradients=round(dense + trained) * training,
        optimizer_state=round(dense * per_weight[0] + trained * per_weight[1]),
        activations=round(activations),
        all_to_all=sent.all_to_all,
        all_reduce=sent.all_reduce,
        imbalance=max((p.imbalance for _, p in layers), default=1.0),
        flops_per_token=round(
            2 * products_per_example(size, everywhere) / size.positions
        ),
        flops=round(
            2
            * examples
            * products_per_example(size, mesh)
            * (3 + recompute if training else 1)
        ),
        layers=tuple(p for _, p in layers),
    )


def _size(model, sequence_length, input_shape):
    if sequence_length is not None:
        check_int("sequence_length", sequence_length, 1)
    if isinstance(model, dict):
        if sequence_length is None:
            raise ValueError(
                "`sequence_length` is needed for a configuration. Received: "
                "sequence_length=None"
            )
        return size_of_config(model, sequence_length)
    if not isinstance(model, keras.layers.Layer) and not callable(model):
        raise ValueError(
            "`model` must be a Keras model, a function that makes one, or the "
            f"dict of a configuration. Received: model={model!r}"
        )
    return size_of_model(as_model(model, input_shape), sequence_length)


def _as_loads(loads, layer):
    if loads is None:
        return None
    loads = np.asarray(loads, "float64")
    if (
        loads.shape != (layer.num_experts,)
        or not loads.min() >= 0 < loads.sum()
    ):
        raise ValueError(
            "`expert_loads` must be one number of at least 0 for each expert "
            f"of {layer.name!r}, not all 0. Received: an array of shape "
            f"{loads.shape} for {layer.num_experts} experts"
        )
    return loads
