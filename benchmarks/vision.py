"""Accuracy against cost of the vision examples, from what they wrote.

    python -m benchmarks.vision runs/fashion_mnist/*/summary.json
    python -m benchmarks.vision --plot vision.png runs/.../summary.json ...

Runs that differ in nothing but the seed are one row: mean and spread. The first
command prints a table, the second also draws it.
"""

import argparse
import json
import pathlib
import statistics

_NO_SETTINGS = {
    *("command", "seed", "output", "data", "resume", "no_test", "history"),
    *("versions", "mean", "deviation", "epochs_trained", "best_epoch"),
    *("validation_accuracy", "test_accuracy", "training_seconds"),
    "processor_seconds",
}
NAMES = {"vmoe": "V-MoE", "soft_moe": "Soft MoE", "dense": "dense"}


def main():
    parser = argparse.ArgumentParser(
        description="Accuracy against cost of the vision examples."
    )
    parser.add_argument("summaries", nargs="+", type=pathlib.Path)
    parser.add_argument("--plot", help="PNG to draw")
    args = parser.parse_args()
    rows = grouped([json.loads(path.read_text()) for path in args.summaries])
    print(table(rows))
    if args.plot:
        plot(rows, args.plot)


def grouped(summaries):
    """Rows of runs that differ in the seed, in order of cost and model.

    Returns:
        list of dicts: `model`, `multiplications`, `parameters`, `epochs`, and
        for each seed `validation`, `test` (or none) and `seconds`, lists.
    """
    groups = {}
    for summary in summaries:
        key = json.dumps(
            {k: v for k, v in summary.items() if k not in _NO_SETTINGS},
            sort_keys=True,
        )
        groups.setdefault(key, []).append(summary)
    rows = []
    for runs in groups.values():
        seeds = [run["seed"] for run in runs]
        if len(set(seeds)) < len(seeds):
            raise ValueError(f"Each seed must be there once. Received: {seeds}")
        first = runs[0]
        rows.append(
            {
                **{
                    key: first[key]
                    for key in (
                        *("model", "multiplications", "parameters", "epochs"),
                        *("patch_size", "hidden_dim", "num_layers"),
                    )
                },
                "validation": [run["validation_accuracy"] for run in runs],
                "test": [
                    run["test_accuracy"]
                    for run in runs
                    if run["test_accuracy"] is not None
                ],
                "seconds": [run["processor_seconds"] for run in runs],
            }
        )
    order = list(NAMES)
    return sorted(
        rows,
        key=lambda row: (
            *(row["patch_size"], row["hidden_dim"], row["num_layers"]),
            order.index(row["model"]),
        ),
    )


def table(rows):
    """The rows in Markdown."""
    lines = [
        "| | seeds | million multiplications | parameters | validation, % | "
        "test, % | seconds of a core |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        cells = (
            NAMES[row["model"]],
            len(row["validation"]),
            f"{row['multiplications'] / 1e6:.2f}",
            f"{row['parameters']:,}",
            _mean(row["validation"], 100),
            _mean(row["test"], 100),
            f"{statistics.mean(row['seconds']):.0f}",
        )
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(lines)


def _mean(values, scale):
    """Mean and, of several, the standard deviation."""
    if not values:
        return ""
    values = [scale * value for value in values]
    text = f"{statistics.mean(values):.2f}"
    if len(values) > 1:
        text += f" ± {statistics.stdev(values):.2f}"
    return text


def plot(rows, path):
    """Draws accuracy against multiplications: a line for each model.

    It is the test accuracy, or that of the validation where no run has one.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    kind = "test" if all(row["test"] for row in rows) else "validation"
    figure, axes = plt.subplots(figsize=(7, 4.5))
    for model, name in NAMES.items():
        points = sorted(
            (row["multiplications"] / 1e6, [100 * v for v in row[kind]])
            for row in rows
            if row["model"] == model
        )
        if points:
            cost = [x for x, _ in points]
            means = [statistics.mean(values) for _, values in points]
            line = axes.plot(cost, means, "o-", label=name)[0]
            for x, values in points:
                axes.plot(
                    [x] * len(values), values, "_", color=line.get_color()
                )
    axes.set_xlabel("million multiplications for an image")
    axes.set_ylabel(f"{kind} accuracy, %")
    axes.legend()
    figure.savefig(path, dpi=90, bbox_inches="tight")
    plt.close(figure)


if __name__ == "__main__":
    main()
