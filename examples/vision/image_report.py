"""Which patches go to which expert, as a picture. There is nothing to run."""

import keras
import matplotlib

matplotlib.use("Agg")  # draws into files, needs no display

import matplotlib.pyplot as plt
import numpy as np
from digits_report import tells
from keras import ops

import keras_moe

COLORS = np.array(plt.get_cmap("tab10").colors)
CENTRED = {"horizontalalignment": "center", "verticalalignment": "center"}


def chosen_experts(backbone, index, images):
    """The expert that counts most for each patch, `(N, rows, columns)`.

    It is the first choice of a router, or the expert whose slots have the
    largest part in what a patch gets of a Soft MoE.

    Args:
        backbone: Without a class token.
        index: int. A block with experts.
        images: What the backbone takes.
    """
    name = f"block_{index - 1}" if index else "patch_embedding"
    before = keras.Model(backbone.input, backbone.get_layer(name).output)
    block = backbone.block(index)
    x = ops.convert_to_tensor(before.predict(images, verbose=0))
    y = block.attention_norm(x)
    x = block.feed_forward_norm(x + block.attention(y, y))
    routing = block.feed_forward.route(x)
    if isinstance(block.feed_forward, keras_moe.layers.SoftMoE):
        parts = ops.sum(routing.combine_weights, axis=-1)  # (N, tokens, E)
        experts = ops.argmax(parts, axis=-1)
    else:
        experts = routing.expert_indices[:, 0]
    grid = backbone.get_layer("patch_embedding").grid
    experts = ops.convert_to_numpy(experts).astype(int)
    return experts.reshape(len(images), *grid)


def draw_routing(path, model, images, scaled, labels, class_names):
    """Draws the experts of the patches of an image of each class.

    Below is what share of each expert's patches are of which class, over all
    images.

    Args:
        path: Where to write the PNG.
        model: A `keras_moe.models.MoEImageClassifier`.
        images: `(N, height, width, channels)` of uint8.
        scaled: Function from images to what the model takes.
        labels: `(N,)` ints.
        class_names: list of str.

    Returns:
        dict of the numbers of blocks to the bits that the place of a patch and
        the class of its image tell about its expert.
    """
    backbone = model.backbone
    blocks = {
        i: chosen_experts(backbone, i, scaled(images))
        for i in backbone.moe_blocks
    }
    classes, rows = len(class_names), len(blocks)
    figure = plt.figure(figsize=(13, 1.5 + 2.7 * rows + 1.3))
    grid = figure.add_gridspec(
        2 * rows + 1,
        classes,
        height_ratios=[1] * (rows + 1) + [1.6] * rows,
        left=0.07,
        right=0.99,
        top=0.93,
        bottom=0.05,
        hspace=0.15,
        wspace=0.08,
    )
    figure.suptitle(
        "The expert that counts most for each patch of images held out",
        fontsize=15,
    )
    for label, name in enumerate(class_names):
        found = np.flatnonzero(labels == label)
        if not len(found):
            continue
        image = images[found[0]] / 255
        tints = {"image": np.ones(3)}
        for i, experts in blocks.items():
            tint = 0.3 + 0.7 * COLORS[experts[found[0]] % len(COLORS)]
            repeats = np.array(image.shape[:2]) // tint.shape[:2]
            tints[f"block {i}"] = tint.repeat(repeats[0], 0).repeat(
                repeats[1], 1
            )
        grey = image.mean(-1, keepdims=True)
        for row, (title, tint) in enumerate(tints.items()):
            axes = figure.add_subplot(grid[row, label])
            shown = tint * (0.5 + 0.5 * grey)
            if title == "image":
                shown = np.broadcast_to(image, (*image.shape[:2], 3))
                axes.set_title(name, fontsize=11)
            axes.imshow(shown)
            axes.set(xticks=[], yticks=[])
            if label == 0:
                axes.set_ylabel(title, fontsize=12)
    bits = {}
    for row, (i, experts) in enumerate(blocks.items()):
        axes = figure.add_subplot(grid[rows + 1 + row, :])
        _draw_shares(axes, i, backbone, experts, labels, class_names)
        places = np.arange(experts[0].size).reshape(1, *experts[0].shape)
        bits[i] = (
            tells(experts, places),
            tells(experts, labels[:, None, None]),
        )
    figure.savefig(path, dpi=80)
    plt.close(figure)
    return bits


def _draw_shares(axes, index, backbone, experts, labels, class_names):
    number = backbone.block(index).feed_forward.router.num_experts
    counts = np.zeros((number, len(class_names)))
    np.add.at(counts, (experts, labels[:, None, None]), 1)
    totals = counts.sum(1, keepdims=True)
    shares = counts / np.maximum(totals, 1)
    axes.imshow(shares, cmap="Blues", vmin=0, vmax=0.5, aspect="auto")
    for (expert, label), share in np.ndenumerate(shares):
        color = "white" if share > 0.28 else "black"
        axes.text(
            *(label, expert, f"{100 * share:.0f}"),
            fontsize=8,
            color=color,
            **CENTRED,
        )
    axes.set_xticks([])
    axes.set_yticks(range(number))
    load = 100 * totals[:, 0] / max(totals.sum(), 1)
    axes.set_yticklabels([f"{e}: {load[e]:.0f} %" for e in range(number)])
    for expert, text in enumerate(axes.get_yticklabels()):
        text.set_color(COLORS[expert % len(COLORS)])
        text.set_fontsize(8)
    axes.set_ylabel(f"block {index}", fontsize=12)
