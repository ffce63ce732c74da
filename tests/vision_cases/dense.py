"""Dense encoders of timm and transformers, from Keras' layers and ours.

Blocks are `EncoderBlock`, but for those that scale their branches, have a gated
feed-forward or normalize queries and keys with a bias, which are graphs of
layers of Keras.
"""

import keras
import numpy as np
from keras import ops

from keras_moe.layers import AttentionPooling
from keras_moe.ops import activations
from tests.recommendation_cases.recorded import Recorded
from tests.vision_cases import encoder_parts as parts


def matches(meta, arrays):
    return meta.get("family") == "dense"


def kind_of(case):
    """The original's class, as `ViT`; `timm` for timm's."""
    name = case.meta["source"]["class"]
    if name == "VisionTransformer":
        return "timm"
    return name.replace("VisionModel", "").replace("Model", "")


# Names in a block, where they differ: ViT and DeiT, DINOv2, SigLIP and CLIP.
_VIT = {
    "block": "layers.{}.",
    "norm1": "layernorm_before",
    "attention": "attention",
    "norm2": "layernorm_after",
}
_DINO = {
    **_VIT,
    "block": "encoder.layer.{}.",
    "norm1": "norm1",
    "norm2": "norm2",
}
_CLIP = {
    "block": "encoder.layers.{}.",
    "norm1": "layer_norm1",
    "attention": "self_attn",
    "norm2": "layer_norm2",
}
_TIMM = {**_DINO, "block": "blocks.{}.", "attention": "attn"}
_NAMES = {"timm": _TIMM, "Siglip": _CLIP, "CLIP": _CLIP}
_ACTIVATIONS = {"Siglip": "gelu_tanh", "CLIP": "quick_gelu"}


class Encoder:
    """A recorded encoder as graphs.

    Attributes:
        model: Images with channels last to `y`.
        watched: The same to a dict of all that is recorded.
        recorded: The `Recorded` that fills them.
        num_blocks: int.
        gated: bool. Whether the feed-forwards are gated.
    """

    def __init__(self, case, images="x"):
        self.kind, self.config = kind_of(case), case.config
        self.recorded = Recorded(case.arrays)
        self.names = _NAMES.get(
            self.kind, _DINO if self.kind.startswith("Dinov2") else _VIT
        )
        config = self.config
        self.epsilon = config.get(
            "layer_norm_eps", 1e-5 if self.kind == "CLIP" else 1e-6
        )
        self.heads = config.get("num_attention_heads") or config["num_heads"]
        self.num_blocks = config.get("num_hidden_layers") or config["depth"]
        _, channels, *size = case.arrays[images].shape
        self.gated = False
        inputs = keras.Input((*size, channels), name="x")
        outputs = {}
        x = self.embedded(inputs, size)
        for i in range(self.num_blocks):
            x, outputs[f"mlp/{i}/in"], outputs[f"mlp/{i}/out"] = self.block(
                x, self.names["block"].format(i)
            )
        outputs |= self.head(x)
        self.model = keras.Model(inputs, outputs["y"])
        self.watched = keras.Model({"x": inputs}, outputs)

    def embedded(self, images, size):
        recorded, config, kind = self.recorded, self.config, self.kind
        if kind == "timm":
            token = "cls_token" if config.get("class_token", True) else None
            at, places = "patch_embed.proj", "pos_embed"
            tokens = [token] if token else []
        else:
            short = kind in ("Siglip", "CLIP")
            at = "patch_embedding" if short else "patch_embeddings.projection"
            at = f"embeddings.{at}"
            places = "embeddings.position_embedding"
            places += ".weight" if short else "s"
            tokens = {
                "Siglip": [],
                "CLIP": ["class_embedding"],
                "DeiT": ["cls_token", "distillation_token"],
            }.get(kind, ["cls_token"])
            tokens = [f"embeddings.{name}" for name in tokens]
        after = kind == "timm" and config.get("no_embed_class", False)
        placed = 0 if after else len(tokens)
        where = self.positions(places, placed, size)
        if len(tokens) == 1 and not after:
            x = parts.patch_embedding(recorded, images, at, where, tokens[0])
        elif len(tokens) <= 1:
            x = parts.patch_embedding(recorded, images, at, where)
            for name in tokens:
                x = self.prepended(x, name)
        else:
            x = parts.patch_embedding(recorded, images, at, None)
            for name in reversed(tokens):
                x = self.prepended(x, name)
            if not isinstance(where, str):
                raise NotImplementedError("positions of several tokens resized")
            x = parts.learned(recorded, x, where, "add")
        registers = "embeddings.register_tokens"
        if recorded.has(registers):  # behind the class token
            first, rest = x[:, :1], x[:, 1:]
            rest = self.prepended(rest, registers)
            x = keras.layers.Concatenate(axis=1)([first, rest])
        if kind == "CLIP":
            x = self.norm(x, "pre_layrnorm")
        return x

    def prepended(self, x, name):
        value = self.recorded.weights[name]
        shape = (1, value.size // value.shape[-1], value.shape[-1])
        return parts.learned(self.recorded, x, name, "before", shape)

    def positions(self, name, num_tokens, size):
        """The name of the positions, or their values on a larger grid."""
        value = self.recorded.weights[name]
        value = value.reshape(1, -1, value.shape[-1])
        grid = [side // self.config["patch_size"] for side in size]
        if grid[0] * grid[1] + num_tokens == value.shape[1]:
            return name
        tokens, rest = value[:, :num_tokens], value[0, num_tokens:]
        side = round(len(rest) ** 0.5)
        antialias = self.kind == "timm"
        rows, columns = (bicubic(side, new, antialias) for new in grid)
        rest = rest.reshape(side, side, -1)
        rest = np.einsum("im,jn,mnd->ijd", rows, columns, rest)
        rest = rest.reshape(1, -1, rest.shape[-1])
        return np.concatenate([tokens, rest], axis=1).astype("float32")

    def norm(self, x, name):
        return parts.norm(self.recorded, x, name, self.epsilon)

    def block(self, x, at):
        recorded = self.recorded
        names = {
            key: at + self.names[key] for key in ("norm1", "attention", "norm2")
        }
        activation = activations.get(_ACTIVATIONS.get(self.kind, "gelu"))
        scales = {}
        for i in (1, 2):
            both = (f"{at}layer_scale{i}.lambda1", f"{at}ls{i}.gamma")
            found = [name for name in both if name in recorded.weights]
            scales[i] = found[0] if found else None
        gate = recorded.has(f"{at}mlp.gate_proj")
        centered = recorded.has(f"{names['attention']}.q_norm.bias")
        if not (gate or centered or scales[1] or scales[2]):
            names |= {"up": f"{at}mlp.fc1", "down": f"{at}mlp.fc2"}
            return parts.encoder_block(
                recorded, x, names, self.heads, self.epsilon, activation
            )
        y = self.norm(x, names["norm1"])
        y = parts.attention(
            recorded, y, names["attention"], self.heads, self.epsilon
        )
        x = keras.layers.Add()([x, self.scaled(y, scales[1])])
        read = self.norm(x, names["norm2"])
        if gate:
            self.gated = True
            hidden = ops.silu(recorded.dense(read, f"{at}mlp.gate_proj"))
            hidden = hidden * recorded.dense(read, f"{at}mlp.up_proj")
            given = recorded.dense(hidden, f"{at}mlp.down_proj")
        else:
            hidden = recorded.dense(read, f"{at}mlp.fc1")
            hidden = keras.layers.Activation(activation)(hidden)
            given = recorded.dense(hidden, f"{at}mlp.fc2")
        x = keras.layers.Add()([x, self.scaled(given, scales[2])])
        return x, read, given

    def scaled(self, x, name):
        if name is None:
            return x
        return parts.learned(self.recorded, x, name, "multiply")

    def head(self, x):
        recorded, kind = self.recorded, self.kind
        if kind == "timm":
            token = self.config.get("class_token", True)
            mean = self.config.get("global_pool", "token") == "avg"
            features = x if mean else self.norm(x, "norm")
            pooled = features[:, 0]
            if mean:
                pooled = ops.mean(features[:, int(token) :], axis=1)
                pooled = self.norm(pooled, "fc_norm")
            return {
                "features": features,
                "y": recorded.dense(pooled, "head"),
            }
        if kind == "CLIP":  # only the class token is normalized
            return {"y": x, "pooled": self.norm(x[:, 0], "post_layernorm")}
        y = self.norm(x, "post_layernorm" if kind == "Siglip" else "layernorm")
        if kind == "Siglip":
            return {"y": y, "pooled": self.attention_pooled(y)}
        pooled = y[:, 0]
        if not kind.startswith("Dinov2"):
            pooled = ops.tanh(recorded.dense(pooled, "pooler.dense"))
        return {"y": y, "pooled": pooled}

    def attention_pooled(self, y):
        recorded = self.recorded
        width = len(recorded.weights["head.mlp.fc1.weight"])
        layer = AttentionPooling(
            self.heads, width, layer_norm_epsilon=self.epsilon
        )
        pooled = layer(y)
        recorded.put(layer.probe, "head.probe")
        parts.fill_attention(recorded, layer.attention, "head.attention")
        parts.fill_norm(recorded, layer.norm, "head.layernorm")
        parts.fill_dense(recorded, layer.mlp.dense_1, "head.mlp.fc1")
        parts.fill_dense(recorded, layer.mlp.dense_2, "head.mlp.fc2")
        return pooled


def bicubic(old, new, antialias):
    """`(new, old)`: the share of each old place in each larger new one.

    As PyTorch resizes, with the centers of pixels at halves. Without
    `antialias` what would be outside is the border again, and the parameter is
    -0.75; with it that is left out, and it is -0.5.
    """
    a = -0.5 if antialias else -0.75
    centers = (np.arange(new)[:, None] + 0.5) * old / new - 0.5
    at = np.floor(centers).astype(int) + np.arange(-1, 3)
    t = np.abs(centers - at)
    near = ((a + 2) * t - (a + 3)) * t**2 + 1
    far = a * (((t - 5) * t + 8) * t - 4)
    weights = np.where(t <= 1, near, np.where(t < 2, far, 0.0))
    if antialias:
        weights = weights * ((at >= 0) & (at < old))
        weights = weights / weights.sum(1, keepdims=True)
    shares = np.zeros((new, old))
    rows = np.broadcast_to(np.arange(new)[:, None], at.shape)
    np.add.at(shares, (rows, np.clip(at, 0, old - 1)), weights)
    return shares
