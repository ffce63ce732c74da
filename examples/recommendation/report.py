"""What the examples here print, draw and save. There is nothing to run."""

import contextlib
import json
import os
import pathlib
import platform
import shlex
import sys
import tempfile

import keras
import matplotlib
import numpy as np

import keras_moe

matplotlib.use("Agg")  # draws into files, needs no display

import matplotlib.pyplot as plt


def spread(values, digits=4):
    """Mean and standard deviation of several runs, as text."""
    text = f"{np.mean(values):.{digits}f}"
    if len(values) > 1:
        text += f" ± {np.std(values, ddof=1):.{digits}f}"
    return text


def print_table(head, rows):
    """Prints rows of text under their heads; numbers to the right."""
    rows = [[str(cell) for cell in row] for row in [head, *rows]]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for i, row in enumerate(rows):
        first = row[0].ljust(widths[0])
        rest = (c.rjust(w) for c, w in zip(row[1:], widths[1:], strict=True))
        print("  ".join([first, *rest]).rstrip())
        if i == 0:
            print("-" * (sum(widths) + 2 * len(widths) - 2))


def same_model(features, model_class, tasks, **arguments):
    """A model with an embedding of its own, of features adapted once."""
    copy = keras_moe.layers.FeatureEmbedding.from_config(features.get_config())
    return model_class(tasks, copy, **arguments)


def mean_gates(model, x, batch_size=4096):
    """How much each task takes of each expert, on average.

    Returns:
        A list with a dict of arrays `(E,)` by task for each level of experts;
        empty for a model without gates.
    """
    tasks, levels = [task.name for task in model.tasks], []
    for level in range(model.num_gate_levels):
        gates = model.gate_weights(x, level, batch_size)
        # Keras gives them by the alphabet.
        units = [t for t in tasks if t in gates]
        units += [unit for unit in gates if unit not in units]
        levels.append({unit: gates[unit].mean(axis=0) for unit in units})
    return levels


def expert_names(model, level, means):
    """What to write under the experts of a level: whose they are."""
    num_experts = len(next(iter(means.values())))
    numbers = [str(i) for i in range(num_experts)]
    layers = [
        layer
        for layer in model.layers
        if isinstance(layer, keras_moe.layers.MultiGateMoE)
    ]
    # A matrix may give experts to groups of tasks, of which a layer knows
    # nothing.
    if not isinstance(layers[level].visibility, str):
        return numbers
    owners = layers[level].units.owners
    if len(set(owners)) == 1:
        return numbers
    units = [*(unit for unit in means if unit != "shared"), "shared"]
    return [
        f"{units[owner]} {int((owners[:i] == owner).sum())}"
        for i, owner in enumerate(owners)
    ]


def draw_gates(path, gates, title):
    """Draws which task uses which expert, a panel a level.

    Args:
        path: Where to write the PNG.
        gates: List of `(name, experts, means)`: the name of a panel, those of
            its experts and a dict of arrays `(E,)` by task.
        title: str.
    """
    heights = [len(means) + 1.6 for _, _, means in gates]
    figure, panels = plt.subplots(
        len(gates),
        1,
        figsize=(11, 0.36 * sum(heights) + 0.8),
        height_ratios=heights,
        squeeze=False,
        layout="constrained",
    )
    figure.suptitle(title, fontsize=13)
    for panel, (name, experts, means) in zip(panels[:, 0], gates, strict=True):
        shares = np.stack(list(means.values()))
        panel.imshow(shares, cmap="Blues", vmin=0, vmax=0.6, aspect="auto")
        for (row, column), share in np.ndenumerate(shares):
            panel.text(
                column,
                row,
                f"{100 * share:.0f}",
                color="white" if share > 0.33 else "black",
                horizontalalignment="center",
                verticalalignment="center",
                fontsize=8,
            )
        panel.set_yticks(range(len(means)), list(means), fontsize=9)
        panel.set_xticks(
            range(len(experts)),
            [expert.replace(" ", "\n") for expert in experts],
            fontsize=7,
        )
        panel.tick_params(length=0)
        panel.set_title(name, fontsize=10, loc="left")
    figure.savefig(path, dpi=110)
    plt.close(figure)


def gate_panels(name, model, x):
    """What `draw_gates` takes, for all levels of a model."""
    levels = mean_gates(model, x)
    return [
        (
            name if len(levels) == 1 else f"{name}, level {i + 1}",
            expert_names(model, i, means),
            means,
        )
        for i, means in enumerate(levels)
    ]


@contextlib.contextmanager
def whole_files(output):
    """A folder whose files are moved to `output` once they are whole."""
    output = pathlib.Path(output)
    output.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=output, prefix=".unfinished-") as name:
        folder = pathlib.Path(name)
        yield folder
        for file in folder.iterdir():
            os.replace(file, output / file.name)


def save(model, path, x):
    """Saves a model, loads it again, and checks that it predicts the same."""
    model.save(path)
    again = keras.models.load_model(path)
    before = model.predict(x, batch_size=4096, verbose=0)
    after = again.predict(x, batch_size=4096, verbose=0)
    difference = max(float(np.abs(before[t] - after[t]).max()) for t in before)
    if difference > 1e-6:
        sys.exit(f"The reloaded model predicts otherwise, by {difference:.1e}.")
    return difference


def write_summary(path, args, **figures):
    """Writes `summary.json`: the command, the figures and the versions."""
    backend = sys.modules[args.backend]
    modules = (backend, keras, keras_moe, np)
    summary = {
        "command": shlex.join(["python", *sys.argv]),
        **vars(args),
        **figures,
        "versions": {
            "python": platform.python_version(),
            **{module.__name__: module.__version__ for module in modules},
        },
    }
    path.write_text(json.dumps(summary, indent=2) + "\n")
