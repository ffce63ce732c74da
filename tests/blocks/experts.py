"""Experts of recorded blocks, and what stands around them."""

import keras
import numpy as np

from keras_moe import experts as experts_lib
from tests.blocks.activations import activation
from tests.blocks.refuse import refuse


class AddBias(keras.layers.Layer):
    """A user's own layer: JetMoE adds one bias behind all experts."""

    def build(self, shape):
        self.bias = self.add_weight(name="bias", shape=(shape[-1],))

    def call(self, x):
        return x + self.bias

    def compute_output_shape(self, shape):
        return shape


class ExpertsReader:
    """The part of `Reader` that makes banks of experts."""

    def _experts(self, spec, name="experts"):
        read = {
            "concat": self._glu_experts,
            "interleaved": self._glu_experts,
            "up_only": self._up_only_experts,
            "linear_pair": self._linear_pair_experts,
            "dbrx": self._dbrx_experts,
            "peer": self._peer_experts,
            "moa": self._moa_experts,
        }
        layout = spec.pop("layout")
        if layout not in read:
            refuse({"layout": layout})
        if spec.pop("apply", "output") == "input":
            self.moe["weights_on"] = "input"
        self._around(spec)
        bank = read[layout](spec, name, layout)
        refuse(spec)
        return bank

    def _around(self, spec):
        """What comes before and behind the experts."""
        before, behind = [], []
        if "pre_proj" in spec:
            self._dense(before, "pre_projection", spec.pop("pre_proj"))
        norm = spec.pop("pre_norm", None) or spec.pop("pre_norm_only", None)
        epsilon = spec.pop("pre_norm_eps", None)
        shift = 1.0 if spec.pop("pre_norm_centered", False) else 0.0
        if norm:
            before.append(
                keras.layers.RMSNormalization(epsilon=epsilon, name="pre_norm")
            )
            self.imports["pre/pre_norm/scale"] = lambda w: shift + w[norm]
        scale = spec.pop("out_scale", 1.0)
        if scale != 1.0:
            behind.append(keras.layers.Rescaling(scale))
        if "post_proj" in spec:
            self._dense(behind, "post_projection", spec.pop("post_proj"))
        if "out_bias" in spec:
            bias = spec.pop("out_bias")
            behind.append(AddBias(name="out_bias"))
            self.imports["post/out_bias/bias"] = lambda w: w[bias]
        if before:
            self.moe["pre_experts"] = keras.Sequential(before, name="pre")
        if behind:
            self.moe["post_experts"] = keras.Sequential(behind, name="post")

    def _dense(self, layers, name, weight):
        units = self.weights[weight].shape[0]
        layers.append(keras.layers.Dense(units, use_bias=False, name=name))
        side = name.split("_")[0]
        self.imports[f"{side}/{name}/kernel"] = lambda w: w[weight].T

    def _glu_experts(self, spec, name, layout):
        gate_up, down = spec.pop("gate_up"), spec.pop("down")
        biases = spec.pop("gate_up_bias", None), spec.pop("down_bias", None)
        transposed = spec.pop("transposed", False)
        # Beyond the rows of the second matrix there are copying experts.
        count = len(self.weights[down])

        def matrices(w, key):  # (E, in, out)
            w = w[key][:count]
            return w if transposed else np.swapaxes(w, 1, 2)

        def half(array, index):
            if layout == "interleaved":
                return array[..., index::2]
            return np.split(array, 2, axis=-1)[index]

        for index, part in enumerate(("gate", "up")):
            self.imports[f"{name}/{part}_kernel"] = lambda w, i=index: half(
                matrices(w, gate_up), i
            )
            if biases[0]:
                self.imports[f"{name}/{part}_bias"] = lambda w, i=index: half(
                    w[biases[0]][:count], i
                )
        self.imports[f"{name}/down_kernel"] = lambda w: matrices(w, down)
        if biases[1]:
            self.imports[f"{name}/down_bias"] = lambda w: w[biases[1]]
        if bool(biases[0]) != bool(biases[1]):
            refuse({"biases": biases})
        return experts_lib.GLUExperts(
            count,
            matrices(self.weights, down).shape[1],
            use_bias=bool(biases[0]),
            name=name,
            **activation(spec),
        )

    def _mlp_experts(self, name, act, up, down, bias=None):
        """`up` and `down` take weights to (E, D, F) and (E, F, D)."""
        self.imports[f"{name}/up_kernel"] = up
        self.imports[f"{name}/down_kernel"] = down
        if bias is not None:
            self.imports[f"{name}/up_bias"] = bias[0]
            self.imports[f"{name}/down_bias"] = bias[1]
        count, _, width = up(self.weights).shape
        return experts_lib.MLPExperts(
            count, width, use_bias=bias is not None, name=name, **act
        )

    def _up_only_experts(self, spec, name, layout):
        up, down = spec.pop("up"), spec.pop("down")
        return self._mlp_experts(
            name,
            activation(spec),
            lambda w: np.swapaxes(w[up], 1, 2),
            lambda w: np.swapaxes(w[down], 1, 2),
        )

    def _linear_pair_experts(self, spec, name, layout):
        names = spec.pop("fc1"), spec.pop("fc2")
        count = self.moe["router"].num_experts

        def stacked(w, pattern):
            return np.stack([w[pattern.format(e)] for e in range(count)])

        def bias(pattern):
            pattern = pattern.replace("weight", "bias")
            return lambda w: stacked(w, pattern)

        kernels = [
            lambda w, p=pattern: np.swapaxes(stacked(w, p), 1, 2)
            for pattern in names
        ]
        first_bias = names[0].replace("weight", "bias").format(0)
        has_bias = first_bias in self.weights
        return self._mlp_experts(
            name,
            activation(spec),
            *kernels,
            [bias(pattern) for pattern in names] if has_bias else None,
        )

    def _dbrx_experts(self, spec, name, layout):
        width = spec.pop("ffn")

        def banks(w, part):  # (E, F, D)
            matrix = w[f"experts.mlp.{part}"]
            return matrix.reshape(-1, width, matrix.shape[-1])

        for path, part in (("gate", "w1"), ("up", "v1")):
            self.imports[f"{name}/{path}_kernel"] = lambda w, part=part: (
                np.swapaxes(banks(w, part), 1, 2)
            )
        self.imports[f"{name}/down_kernel"] = lambda w: banks(w, "w2")
        return experts_lib.GLUExperts(
            len(banks(self.weights, "w2")),
            width,
            name=name,
            **activation(spec),
        )

    def _peer_experts(self, spec, name, layout):
        return self._mlp_experts(
            name,
            activation(spec),
            lambda w: w["down_embed.weight"][:, :, None],
            lambda w: w["up_embed.weight"][:, None, :],
        )

    def _moa_experts(self, spec, name, layout):
        return self._mlp_experts(
            name,
            {"activation": "linear"},
            lambda w: np.swapaxes(w["input_linear.weight"], 1, 2),
            lambda w: np.swapaxes(w["output_linear.weight"], 1, 2),
        )

    def _filled_up(self, bank):
        """The bank, and what the router's further experts stand for."""
        missing = self.moe["router"].num_experts - bank.num_experts
        if not missing:
            return bank
        # Zaya's last class is a skip, LongCat's last experts copy.
        zaya = self.spec["router"].get("kind") == "zaya"
        more = experts_lib.ZeroExperts if zaya else experts_lib.CopyExperts
        return self._mixed([bank, more(missing, name="more")], bank.name)

    def _mixed(self, banks, *prefixes):
        for path in [p for p in self.imports if p.startswith(prefixes)]:
            self.imports[f"mixed/{path}"] = self.imports.pop(path)
        return experts_lib.MixedExperts(banks, name="mixed")
