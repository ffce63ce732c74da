"""The tables of `benchmarks/README.md`, from what the benchmarks wrote.

python -m benchmarks.tables benchmarks/results
"""

import json
import pathlib
import sys

from benchmarks import measure
from benchmarks import shapes


def write(folder):
    files = pathlib.Path(folder).glob("*.json")
    runs = {path.stem: json.loads(path.read_text()) for path in files}
    layers(_of(runs, "layer"))
    print()
    fits(_of(runs, "fit"))
    print()
    decoding(_of(runs, "decode"))


def _of(runs, benchmark):
    """`{name of the backend: run}` of one benchmark."""
    found = {}
    for name, run in sorted(runs.items()):
        if name.startswith(benchmark + "-"):
            backend = run["arguments"]["backend"]
            if run["arguments"].get("xla"):
                backend += ", XLA"
            found[backend] = run
    return found


def layers(runs):
    """Ratios to dense, forward / with gradients; then those of keras-hub."""
    rows = []
    for layer in ("keras_moe", "keras_moe, skewed", "keras-hub"):
        for backend, run in runs.items():
            cells = [_ratios(run["figures"], s, layer) for s in shapes.CPU]
            if any(cells):
                rows.append([layer, backend, *(c or "-" for c in cells)])
    measure.print_table(["layer", "backend", *shapes.CPU], rows)


def _ratios(figures, shape, layer):
    kinds = figures.get(shape, {})
    pair = [kinds.get(k, {}).get(layer) for k in ("forward", "gradients")]
    if None in pair:
        return None
    digits = 1 if layer == "keras-hub" else 2
    return " / ".join(f"{p['ratio']:.{digits}f}" for p in pair)


def fits(runs):
    """A step of `fit`, dense and MoE."""
    rows = []
    for backend, run in runs.items():
        f = run["figures"]
        step, update = f["step"], f["update"]
        rest = [
            step[k]["median_s"] - update[k]["median_s"]
            for k in ("dense", "moe")
        ]
        rows.append(
            [
                backend,
                *(_pair(part, "median_s", 1e3, 0) for part in (step, update)),
                f"{rest[1] / rest[0]:.2f}",
                _pair(f["first_step_s"], None, 1, 1),
                _pair(f["memory"], "above_mb", 1, 0),
            ]
        )
    measure.print_table(
        [
            "backend",
            "step, ms",
            "optimizer's part, ms",
            "ratio of the rest",
            "first step, s",
            "peak memory, MB",
        ],
        rows,
    )


def _pair(values, entry, factor, digits):
    pair = [
        values[k] if entry is None else values[k][entry]
        for k in ("dense", "moe")
    ]
    return " / ".join(f"{factor * value:.{digits}f}" for value in pair)


def decoding(runs):
    """Milliseconds for few tokens: dense, few experts, many experts."""
    rows = []
    for backend, run in runs.items():
        for tokens, figure in run["figures"].items():
            times = [f"{1e3 * f['median_s']:.2f}" for f in figure.values()]
            rows.append([backend, tokens, *times])
    measure.print_table(
        ["backend", "tokens", "dense", "8 experts", "128 experts"], rows
    )


if __name__ == "__main__":
    write(sys.argv[1])
