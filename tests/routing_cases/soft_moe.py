"""Soft MoE as vmoe and soft-moe-pytorch have it, through public arguments."""

import contextlib
from unittest import mock

import keras
from keras import ops

from keras_moe.experts import Experts
from keras_moe.layers.soft_moe import SoftMoE
from keras_moe.routers.soft_router import SoftRouter


class LinearExperts(Experts):
    """The experts of the recorded cases: `row @ W[e] + b[e]`."""

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


def is_vmoe(config, arrays):
    return "slots_per_expert" in config and {"mu", "scale"} <= set(arrays)


def is_soft_moe_pytorch(config, arrays):
    return "slots_per_expert" in config and "slot_embeds" in arrays


def matches(config, arrays):
    return is_vmoe(config, arrays) or is_soft_moe_pytorch(config, arrays)


def variables_from_case(arrays):
    """The recorded weights by the paths of a layer's variables."""
    variables = {
        "experts/kernel": arrays["expert/W"],
        "experts/bias": arrays["expert/b"],
    }
    if "mu" in arrays:
        variables["router/slot_kernel"] = arrays["mu"]
        variables["router/scale"] = arrays["scale"]
    else:
        slots = arrays["slot_embeds"]  # (E, P, D)
        variables["router/slot_kernel"] = slots.transpose(2, 0, 1)
        variables["router/token_gain"] = arrays["norm_gamma"]
        variables["router/slot_gain"] = arrays["slot_norm_gamma"]
    return variables


def router_options(config, arrays):
    options = {
        "num_experts": config["E"],
        "slots_per_expert": config["slots_per_expert"],
    }
    if is_vmoe(config, arrays):
        noise = config.get("noise_std", 0.0)
        return {**options, "noise_stddev": noise if noise else 0.0}
    layer_norm = config.get("use_layernorm", False)
    return {
        **options,
        "normalization": "layer" if layer_norm else "rms",
        # It divides by the norm itself, or as LayerNorm of torch does.
        "epsilon": 1e-5 if layer_norm else 1e-12,
        "mix_normalized": True,
        "gumbel_scale": float("gumbel_uniform" in arrays),
    }


def router_from_case(config, arrays):
    """A built `SoftRouter` with the weights of the case."""
    return layer_from_case(config, arrays).router


def layer_from_case(config, arrays):
    """A built `SoftMoE` with the weights of the case."""
    layer = SoftMoE(
        router=SoftRouter(name="router", **router_options(config, arrays)),
        experts=LinearExperts(
            config["E"], arrays["expert/W"].shape[-1], name="experts"
        ),
        name="layer",
    )
    layer.build(arrays["x"].shape)
    values = variables_from_case(arrays)
    for variable in layer.trainable_variables:
        variable.assign(values.pop(variable.path.split("/", 1)[1]))
    if values:
        raise ValueError(f"The layer has no {sorted(values)}")
    return layer


@contextlib.contextmanager
def recorded_draws(arrays):
    """Draws what the case recorded, and nothing else."""

    def normal(shape, mean=0.0, stddev=1.0, **_):
        return mean + stddev * ops.array(_of(shape, arrays["noise_unit"]))

    def uniform(shape, minval=0.0, maxval=1.0, **_):
        unit = ops.array(_of(shape, arrays["gumbel_uniform"]))
        return minval + (maxval - minval) * unit

    with (
        mock.patch.object(keras.random, "normal", normal),
        mock.patch.object(keras.random, "uniform", uniform),
    ):
        yield


def _of(shape, draws):
    if tuple(shape) != draws.shape:
        raise ValueError(f"Recorded {draws.shape}, drawn {tuple(shape)}")
    return draws
