"""Two towers of google-research/vmoe, for images and texts."""

import keras

from keras_moe import routers
from keras_moe.experts import MLPExperts
from keras_moe.layers import Capacity
from keras_moe.layers import ContrastiveHead
from keras_moe.layers import EncoderBlock
from keras_moe.layers import MoE
from keras_moe.layers import TextEmbedding
from keras_moe.losses import ImportanceLoss
from keras_moe.losses import LoadBalancingLoss
from keras_moe.losses import LoadLoss
from keras_moe.vision.layers.attention import VisionMLP
from tests.vision_cases import vmoe

TOWERS = ("img", "txt")


def matches(meta, arrays):
    config = meta.get("config", {})
    return {"image", "text"} <= set(config) and "text" in arrays


def tower(case, name):
    """The case of a tower, as if it stood alone."""
    config = case.config[{"img": "image", "txt": "text"}[name]]
    arrays = {
        f"w/{key}": value for key, value in case.under(f"w/{name}/").items()
    }
    arrays["x"] = case.arrays[{"img": "x", "txt": "text"}[name]]
    for kind in ("", "train/"):
        for part in ("route", "noise_unit"):
            for key, value in case.under(f"{kind}{part}/{name}/").items():
                arrays[f"{kind}{part}/{key}"] = value
    return case._replace(meta={**case.meta, "config": config}, arrays=arrays)


def moe_layer(case, load_loss):
    """The feed-forward of a block of the text tower."""
    moe, router = case.config["encoder"]["moe"], vmoe.router_of(case.meta)
    dispatcher, number = router["dispatcher"], moe["num_experts"]
    weights = vmoe.loss_arguments(router)
    if not load_loss:
        weights["load_loss_weight"] = 0.0
    losses = (
        ImportanceLoss(
            weights["importance_loss_weight"], scores="softmax", per="sequence"
        ),
        LoadLoss(weights["load_loss_weight"], per="sequence"),
        LoadBalancingLoss(
            weights["load_balancing_loss_weight"],
            per="sequence",
            assignments="first",
        ),
    )
    return MoE(
        router=routers.get(
            "v_moe",
            num_experts=number,
            top_k=router.get("num_selected_experts", 1),
            noise_stddev=router.get("noise_std", 1.0) / number,
            name="router",
        ),
        experts=MLPExperts(
            number,
            case.config["encoder"]["mlp_dim"],
            activation="gelu_tanh",
            name="experts",
        ),
        losses=[loss for loss in losses if loss.weight],
        capacity=Capacity(
            dispatcher["capacity_factor"],
            multiple_of=dispatcher.get("capacity_multiple_of", 4) or 1,
            drop_policy="priority"
            if dispatcher.get("batch_priority")
            else "position",
            per="sequence",
        ),
        name="moe",
    )


def text_tower(case, load_loss):
    """A model from ids to vectors, of the last token."""
    config, encoder = case.config, case.config["encoder"]
    moe = encoder.get("moe") or {"layers": []}
    ids = keras.Input(case.arrays["x"].shape[1:], dtype="int32", name="text")
    x = TextEmbedding(
        config["vocab_size"], config["hidden_size"], name="text_embedding"
    )(ids)
    for i in range(encoder["num_layers"]):
        has_experts = i in moe["layers"]
        x = EncoderBlock(
            encoder["num_heads"],
            moe_layer(case, load_loss)
            if has_experts
            else VisionMLP(encoder["mlp_dim"], name="mlp"),
            qk_norm=encoder.get("attention_qk_norm", False),
            group_size=moe["group_size"] if has_experts else None,
            name=f"text_block_{i}",
        )(x)
    x = keras.layers.LayerNormalization(epsilon=1e-6, name="text_norm")(x)
    x = keras.layers.Dense(config["num_classes"], name="text_predictions")(
        x[:, -1]
    )
    return keras.Model(ids, x, name="text_tower")


def model_from_case(case, load_loss=True):
    """From a dict of `x` and `text` to `y`, `zimg` and `ztxt`."""
    image_case = tower(case, "img")
    without = {} if load_loss else {"load_loss_weight": 0.0}
    image_model = vmoe.model_from_case(image_case, without)
    text_model = text_tower(tower(case, "txt"), load_loss)
    x = keras.Input(case.arrays["x"].shape[1:], name="x")
    text = keras.Input(
        case.arrays["text"].shape[1:], dtype="int32", name="text"
    )
    images, texts, y = ContrastiveHead(
        loss=None, use_bias=True, return_logits=True, name="head"
    )(image_model(x), text_model(text))
    model = keras.Model(
        {"x": x, "text": text}, {"y": y, "zimg": images, "ztxt": texts}
    )
    weights = case.under("w/")
    for variable in model.trainable_variables:
        value = weights.pop(original_name(variable.path))
        variable.assign(value.reshape(variable.shape))
    if weights:
        raise ValueError(f"The model has no {sorted(weights)}")
    return model


_OF_TEXTS = {
    "text_embedding/embeddings": "Embed_0/embedding",
    "text_embedding/positions": "Encoder/posembed_input/pos_embedding",
}


def original_name(path):
    if path.startswith("head/"):
        return {"scale": "s", "bias": "b"}[path.removeprefix("head/")]
    if path.startswith("text_"):
        own = path.removeprefix("text_")
        return "txt/" + (_OF_TEXTS.get(path) or vmoe.original_name(own))
    return f"img/{vmoe.original_name(path)}"
