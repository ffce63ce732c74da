"""What `digits_moe.py` prints and draws. There is nothing to run here."""

import matplotlib

matplotlib.use("Agg")  # draws into files, needs no display

import matplotlib.pyplot as plt
import numpy as np

COLORS = np.array(plt.get_cmap("tab10").colors)[[0, 1, 2, 3, 4, 5, 6, 8]]
CENTRED = {"horizontalalignment": "center", "verticalalignment": "center"}


def tells(experts, groups):
    """Bits that a patch's group tells about its expert: mutual information."""
    groups = np.broadcast_to(groups, experts.shape)
    joint = np.zeros((groups.max() + 1, experts.max() + 1))
    np.add.at(joint, (groups, experts), 1 / experts.size)
    apart = joint.sum(1, keepdims=True) * joint.sum(0)
    seen = joint > 0
    return float((joint[seen] * np.log2(joint[seen] / apart[seen])).sum())


def print_report(summary):
    """Prints the figures of `summary.json`."""
    moe, dense = summary["moe"], summary["dense_twin"]
    print(f"\n{'':24}{'MoE':>12}{'dense twin':>14}")
    for label, key, form in (
        ("test accuracy", "test_accuracy", "{:.1%}"),
        (f"errors in {summary['test_images']} images", "test_errors", "{}"),
        ("active parameters", "active_parameters", "{:,}"),
        ("total parameters", "total_parameters", "{:,}"),
        ("training time", "training_seconds", "{:.0f} s"),
        ("median epoch", "median_epoch_seconds", "{:.2f} s"),
    ):
        values = form.format(moe[key]), form.format(dense[key])
        print("{:24}{:>12}{:>14}".format(label, *values))
    times, epochs, parameters = (
        moe[key] / dense[key]
        for key in (
            "training_seconds",
            "median_epoch_seconds",
            "total_parameters",
        )
    )
    print(
        f"Training the MoE took {times:.1f} times as long as its dense twin "
        f"({epochs:.1f} times for\nthe median epoch), "
        f"with {parameters:.1f} times the parameters."
    )

    num_experts, layers = summary["num_experts"], summary["moe_layers"]
    print(f"\nLoad of each expert in % (even: {100 / num_experts:.1f})")
    print(" " * 19 + "".join(f"{expert:6}" for expert in range(num_experts)))
    unused = []
    for layer in layers:
        for when in ("training", "test"):
            load = layer[f"{when}_load"]
            row = "".join(f"{100 * share:6.1f}" for share in load)
            print(f"block {layer['block']}, {when:10}{row}")
            unused += [
                f"{expert} of block {layer['block']} in {when}"
                for expert, share in enumerate(load)
                if share == 0
            ]
    print(f"Experts without a token: {', '.join(unused) or 'none'}.")
    dropped = max(layer["training_dropped_fraction"] for layer in layers)
    print(f"Tokens dropped: {dropped:.1%}, as no capacity limit is set.")

    print(
        "\nWhat a patch's place in the image and its digit tell of its experts"
    )
    for layer in layers:
        print(
            f"block {layer['block']}: place {layer['place_bits']:.2f} bits, "
            f"digit {layer['digit_bits']:.2f} bits: {sorts_by(layer)}"
        )


def sorts_by(layer):
    by_place = layer["place_bits"] > layer["digit_bits"]
    return f"sorts mostly by {'place' if by_place else 'digit'}"


def draw_routing(path, images, labels, layers, routing, title):
    """Draws one page: a half for each MoE layer, a row for each expert.

    Args:
        path: Where to write the PNG.
        images: `(N, 8, 8)`, from -1 for paper to 1 for ink.
        labels: `(N,)`, the digits that they show.
        layers: list of dict, `moe_layers` of the summary.
        routing: for each of these `(N, 4, 4, K)`, the experts of each patch,
            the best first.
        title: str.
    """
    figure = plt.figure(figsize=(13, 13.4), facecolor="white")
    figure.suptitle(title, fontsize=18, y=0.985)
    halves = figure.add_gridspec(
        1, len(layers), left=0.05, right=0.99, top=0.865, bottom=0.385
    )
    for half, layer, experts in zip(halves, layers, routing, strict=True):
        _draw_experts(figure, half, images, labels, layer, experts)
    figure.text(
        0.5,
        0.322,
        "First choice for each patch of ten of the digits, "
        "in the colors of the experts above",
        fontsize=14,
        **CENTRED,
    )
    names = ["image"] + [f"block {layer['block']}" for layer in layers]
    grid = figure.add_gridspec(
        len(names),
        10,
        left=0.05,
        right=0.99,
        top=0.305,
        bottom=0.01,
        wspace=0.08,
        hspace=0.08,
    )
    for digit in range(10):
        index = np.flatnonzero(labels == digit)[0]
        ink = (images[index, ..., None] + 1) / 2  # (8, 8, 1)
        tints = [np.ones(3)]
        for experts in routing:
            tint = 0.3 + 0.7 * COLORS[experts[index, ..., 0] % len(COLORS)]
            tints.append(tint.repeat(2, axis=0).repeat(2, axis=1))
        for row, (name, tint) in enumerate(zip(names, tints, strict=True)):
            axes = figure.add_subplot(grid[row, digit])
            axes.imshow(tint * (1 - 0.9 * ink))
            axes.set(xticks=[], yticks=[])
            if digit == 0:
                axes.set_ylabel(name, fontsize=13)
    figure.savefig(path, dpi=100)
    plt.close(figure)


def _draw_experts(figure, half, images, labels, layer, experts):
    num_experts = len(layer["test_load"])
    grid = half.subgridspec(
        num_experts, 4, width_ratios=(1.5, 5, 1, 1), wspace=0.07, hspace=0.1
    )
    load = 100 * np.array(layer["test_load"])
    bars = figure.add_subplot(grid[:, 0])
    bars.barh(range(num_experts), load, color=COLORS)
    bars.axvline(100 / num_experts, color="black", linestyle=":")
    bars.set_ylim(num_experts - 0.5, -0.5)
    bars.set_yticks(range(num_experts))
    bars.tick_params(axis="y", labelsize=13, length=0)
    bars.set_ylabel("expert", fontsize=13)
    bars.set_title("load, %\n(dotted: even)", fontsize=11)
    bars.spines[["top", "right"]].set_visible(False)

    shares = np.zeros((num_experts, 10))
    patches = images.reshape(-1, 4, 2, 4, 2).swapaxes(2, 3)
    for expert in range(num_experts):
        taken = (experts == expert).any(-1)  # (N, 4, 4)
        total = max(taken.sum(), 1)
        np.add.at(shares[expert], labels, taken.sum((1, 2)) / total)
        mean = (patches * taken[..., None, None]).sum((0, 1, 2)) / total
        for column, name, picture, style in (
            (
                2,
                "where in\nimage",
                taken.sum(0) / total,
                ("Blues", 0, 0.25),
            ),
            (3, "mean\npatch", mean, ("Greys", -1, 0.6)),
        ):
            axes = figure.add_subplot(grid[expert, column])
            cmap, vmin, vmax = style
            axes.imshow(picture, cmap=cmap, vmin=vmin, vmax=vmax)
            axes.set(xticks=[], yticks=[])
            if expert == 0:
                axes.set_title(name, fontsize=11)

    heat = figure.add_subplot(grid[:, 1])
    heat.imshow(shares, cmap="Blues", vmin=0, vmax=0.4, aspect="auto")
    for (expert, digit), share in np.ndenumerate(shares):
        color = "white" if share > 0.22 else "black"
        heat.text(digit, expert, f"{100 * share:.0f}", color=color, **CENTRED)
    heat.set_xticks(range(10))
    heat.tick_params(axis="x", labelsize=13)
    heat.set_yticks([])
    heat.set_title("digits its patches come from,\n% (even: 10)", fontsize=11)
    heat.text(
        0.5,
        1.115,
        f"Block {layer['block']}: {sorts_by(layer)}",
        transform=heat.transAxes,
        fontsize=15,
        **CENTRED,
    )
