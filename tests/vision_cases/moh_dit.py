"""Diffusion transformers of SkyworkAI/MoH, of blocks with `MixtureOfHeads`."""

import keras

from keras_moe.layers import DiTBlock
from keras_moe.layers import MixtureOfHeads
from keras_moe.layers import PatchEmbedding
from keras_moe.losses import LoadBalancingLoss
from keras_moe.routers import DenseRouter
from keras_moe.vision.layers.attention import VisionMLP
from keras_moe.vision.layers.dit_ends import DiffusionEmbedding
from keras_moe.vision.layers.dit_ends import DiTHead
from tests.recommendation_cases.recorded import Recorded
from tests.vision_cases import dit_moe
from tests.vision_cases import torch_weights


def matches(case):
    return case.get("family") == "moh_dit"


def model_from_case(case, arrays):
    """A functional model with the inputs of a `DiTMoEBackbone`."""
    config, recorded = case["config"], Recorded(arrays)
    sizes = dit_moe.sizes(config, recorded)
    dim, channels = sizes["hidden_dim"], sizes["image_shape"][-1]
    inputs = {
        "images": keras.Input(sizes["image_shape"], name="images"),
        "timesteps": keras.Input((), name="timesteps"),
        "labels": keras.Input((), dtype="int32", name="labels"),
    }
    embedding = PatchEmbedding(
        dim,
        sizes["patch_size"],
        data_format="channels_last",
        name="patch_embedding",
    )
    x = embedding(inputs["images"])
    condition = DiffusionEmbedding(
        dim, sizes["num_classes"], sizes["label_dropout"], name="condition"
    )(inputs["timesteps"], inputs["labels"])
    blocks = []
    for number in range(config["depth"]):
        block = DiTBlock(
            feed_forward=VisionMLP(int(dim * config["mlp_ratio"])),
            token_mixer=heads_of(config, number),
        )
        x = block(x, condition)
        blocks.append(block)
    x = DiTHead(
        embedding.grid,
        embedding.patch_size,
        channels * (2 if sizes["learn_sigma"] else 1),
        "channels_last",
        name="head",
    )(x, condition)
    model = keras.Model(inputs, x)
    dit_moe.put_ends(recorded, model)
    for number, block in enumerate(blocks):
        name = f"blocks.{number}"
        dit_moe.put_block(recorded, block, name)
        put_heads(recorded, block.token_mixer, f"{name}.attn")
        for which in (1, 2):
            dense = getattr(block.feed_forward, f"dense_{which}")
            torch_weights.put_dense(recorded, dense, f"{name}.mlp.fc{which}")
    return model, recorded


def heads_of(config, block):
    """Without routed heads, all are shared: weighed, and none is chosen."""
    number, top_k = config["num_heads"][block], config["routed_head"][block]
    dense = {"router": DenseRouter(number), "losses": None}
    routed = {
        "top_k": top_k,
        "num_shared_heads": config["shared_head"][block],
        "losses": [LoadBalancingLoss(1.0, normalize_by_top_k=False)],
    }
    return MixtureOfHeads(
        number, config["head_dim"][block], **(routed if top_k else dense)
    )


def put_heads(recorded, layer, name):
    torch_weights.put_attention(recorded, layer.attention, name)
    kernels = {"wg": layer.router.kernel}
    if layer.num_shared_heads:
        kernels |= {"wg_0": layer.mix_kernel, "wg_1": layer.shared_kernel}
    elif not recorded.has(f"{name}.wg"):
        kernels = {"wg_1": layer.router.kernel}
    if layer.num_shared_heads == 1:
        del kernels["wg_1"]  # a softmax over one: it has no effect
    for key, kernel in kernels.items():
        torch_weights.put_kernel(recorded, kernel, f"{name}.{key}.weight")
