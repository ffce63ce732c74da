"""How the cost of a layer grows with tokens, choices and experts.

    python -m benchmarks.scaling --backend torch --json scaling.json
    python -m benchmarks.scaling --plot scaling.png scaling.json ...

Forward with gradients, in training. Tokens and choices vary at the sizes of
shape A; experts vary at the row counts of shape A, 512 rows for each, so that
tokens grow along. The second command, without a backend, draws the figures of
one or more runs of the first.
"""

import json
import pathlib
import sys

from benchmarks import measure
from benchmarks import shapes

A = shapes.KNOWN["A"]
ROWS_PER_EXPERT = A.tokens * A.top_k // A.num_experts
CURVES = {
    "tokens": [A._replace(tokens=n) for n in (512, 1024, 2048, 4096, 8192)],
    "choices per token": [
        A._replace(num_experts=32, top_k=k, tokens=1024) for k in (1, 2, 4, 8)
    ],
    "experts": [
        A._replace(num_experts=e, tokens=ROWS_PER_EXPERT * e // A.top_k)
        for e in (8, 16, 32, 64)
    ],
}
AXES = {
    "tokens": lambda shape: shape.tokens,
    "choices per token": lambda shape: shape.top_k,
    "experts": lambda shape: shape.num_experts,
}


def main():
    if "--plot" in sys.argv:
        target, *sources = sys.argv[sys.argv.index("--plot") + 1 :]
        return plot(target, sources)
    parser = measure.parser(__doc__.splitlines()[0])
    parser.add_argument("--xla", action="store_true", help="TensorFlow's XLA")
    arguments = parser.parse_args()
    measure.choose(arguments)
    figures = {}
    for curve, points in CURVES.items():
        figures[curve] = []
        print(f"\n{curve}\n")
        rows = []
        for shape in points:
            seconds = time_of(shape, arguments)
            per_choice = seconds / (shape.tokens * shape.top_k)
            at = AXES[curve](shape)
            figures[curve].append(
                {"at": at, "median_s": seconds, **shape._asdict()}
            )
            rows.append([at, f"{1e3 * seconds:.1f}", f"{1e6 * per_choice:.2f}"])
        measure.print_table([curve, "ms", "us per token and choice"], rows)
        measure.write(arguments, figures)


def time_of(shape, arguments):
    import statistics

    from benchmarks import blocks
    from benchmarks import steps

    step = steps.gradient_step(
        blocks.moe(shape), blocks.inputs(shape), arguments.xla
    )
    runs = measure.alternate({"moe": step}, arguments.seconds)
    return statistics.median(runs["moe"])


def plot(target, sources):
    """One panel a curve, one line a run."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    runs = [json.loads(pathlib.Path(path).read_text()) for path in sources]
    figure, panels = pyplot.subplots(1, len(CURVES), figsize=(11, 3.4))
    for panel, curve in zip(panels, CURVES, strict=True):
        for run in runs:
            points = run["figures"][curve]
            x = [point["at"] for point in points]
            y = [
                1e6 * p["median_s"] / (p["tokens"] * p["top_k"]) for p in points
            ]
            label = run["arguments"]["backend"]
            if run["arguments"].get("xla"):
                label += ", XLA"
            panel.plot(x, y, marker="o", label=label)
        panel.set(xscale="log", xlabel=curve, ylim=(0, None))
        panel.set_xticks(x, [str(at) for at in x])
        panel.minorticks_off()
        panel.spines[["top", "right"]].set_visible(False)
        panel.grid(axis="y", alpha=0.3)
    panels[0].set_ylabel("µs per token and choice")
    panels[0].legend(frameon=False)
    figure.tight_layout()
    figure.savefig(target, dpi=120)


if __name__ == "__main__":
    main()
