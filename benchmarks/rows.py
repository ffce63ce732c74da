"""Training from a stream: rows a second, an MoE beside a dense DLRM.

    python -m benchmarks.rows --backend torch --rows 100000

30 categorical features, four of them with a million ids, come batch by batch
from a `keras.utils.PyDataset`; no more than a batch is ever in memory. The
models are `keras_moe.models.DLRMMoE`s, one with 8 experts under a gate of each
of two tasks, one with a single dense network of the same number of weights.
Each run has a process of its own.

Gradients of tables are dense where the framework makes them so, and Adam moves
every row of a table in each step. What that takes is seen by its absence: in
runs with tables that are not trained, with values hashed to few ids, and with
SGD, which has no state.
"""

import json
import subprocess
import sys
import time

from benchmarks import measure

DIM, TASKS = 8, ("click", "buy")
VOCABULARIES = (
    *([1_000_000] * 4),
    *([100_000] * 4),
    *([10_000] * 6),
    *([1_000] * 8),
    *([50] * 8),
)
HASHED = 100_000
EXPERTS, UNITS, TOWER = 8, 64, 16
# Kind of model, and how it is trained.
RUNS = {
    "dense": ("dense", "adam"),
    "experts": ("experts", "adam"),
    "dense, tables fixed": ("dense", "fixed"),
    "experts, tables fixed": ("experts", "fixed"),
    "experts, hashed": ("experts", "hashed"),
    "experts, SGD": ("experts", "sgd"),
}


def main():
    parser = measure.parser(__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--batch", type=int, default=8192)
    parser.add_argument(
        "--side-rows",
        type=int,
        help="rows of all but the first two runs (default: a tenth)",
    )
    parser.add_argument("--only", choices=RUNS, help="that run, in here")
    arguments = parser.parse_args()
    measure.choose(arguments)
    if arguments.only:
        print(json.dumps(train(arguments.only, arguments)))
        return
    figures = {}
    for name in RUNS:
        figures[name] = _in_a_process(name)
        measure.write(arguments, figures)
    report(figures)


def rows_of(name, arguments):
    """As many rows as make whole batches, four at least."""
    rows = arguments.rows
    if name not in ("dense", "experts"):
        rows = arguments.side_rows or rows // 10
    return max(rows // arguments.batch, 4) * arguments.batch


def train(name, arguments):
    """Rows a second in a first epoch, and the peak memory of the process."""
    import keras

    from benchmarks import streams

    kind, how = RUNS[name]
    sizes = VOCABULARIES
    if how == "hashed":
        sizes = [min(size, HASHED) for size in sizes]
    rows = rows_of(name, arguments)
    data = streams.Rows(sizes, TASKS, rows, arguments.batch)
    net = model(kind, sizes)
    net.get_layer("features").trainable = how != "fixed"
    net.compile(
        "sgd" if how == "sgd" else keras.optimizers.Adam(1e-3), metrics=None
    )
    net.fit(data.first(2), verbose=0)  # compiles
    clock = streams.Clock()
    began = time.perf_counter()
    net.fit(data, verbose=0, shuffle=False, callbacks=[clock])
    done = time.perf_counter()
    # The first and last quarter of the batches: is the rate steady?
    ends = [began, *clock.ends]
    quarter = (len(ends) - 1) // 4
    seconds = ends[quarter] - ends[0], ends[-1] - ends[-1 - quarter]
    return {
        "rows": rows,
        "rows_per_s": rows / (done - began),
        "first_quarter": quarter * arguments.batch / seconds[0],
        "last_quarter": quarter * arguments.batch / seconds[1],
        "processor_s": clock.processor_seconds,
        "loss": clock.loss,
        "peak_mb": _peak(),
        "weights": net.count_params(),
        "weights_beside_tables": net.count_params()
        - net.get_layer("features").count_params(),
    }


def model(kind, sizes):
    import keras_moe

    features = keras_moe.layers.FeatureEmbedding(
        [
            keras_moe.layers.Categorical(f"c{i}", num_ids=size)
            for i, size in enumerate(sizes)
        ],
        embedding_dim=DIM,
    )
    tasks = [
        keras_moe.models.TaskSpec(name, tower_units=(TOWER,)) for name in TASKS
    ]
    products = len(sizes) * (len(sizes) - 1) // 2
    if kind == "experts":
        return keras_moe.models.DLRMMoE(
            tasks, features, EXPERTS, (UNITS,), bottom_units=()
        )
    # As wide as makes experts, gates and towers.
    weights = products * EXPERTS * (UNITS + len(TASKS))
    weights += len(TASKS) * UNITS * TOWER
    width = round(weights / (products + len(TASKS) * TOWER))
    # One expert is a dense network; a softmax over one would train no gate.
    return keras_moe.models.DLRMMoE(
        tasks,
        features,
        1,
        (width,),
        bottom_units=(),
        gate_activation="sigmoid",
    )


def _peak():
    """MB, or `None` where Linux does not say."""
    try:
        with open("/proc/self/status") as lines:
            for line in lines:
                if line.startswith("VmHWM:"):
                    return 1024 * int(line.split()[1]) / 1e6
    except OSError:
        return None


def _in_a_process(name):
    command = [sys.executable, "-m", "benchmarks.rows", *sys.argv[1:]]
    result = subprocess.run(
        [*command, "--only", name], capture_output=True, text=True, check=False
    )
    if result.returncode:
        raise RuntimeError(result.stderr)
    return json.loads(result.stdout.splitlines()[-1])


def report(figures):
    base = figures["dense"]["rows_per_s"]
    measure.print_table(
        [
            "",
            "rows a second",
            "to dense",
            "first / last quarter",
            "processor s a million rows",
            "peak memory, MB",
            "loss",
        ],
        [
            [
                name,
                f"{f['rows_per_s']:,.0f}",
                f"{f['rows_per_s'] / base:.2f}",
                f"{f['first_quarter']:,.0f} / {f['last_quarter']:,.0f}",
                f"{1e6 * f['processor_s'] / f['rows']:.0f}",
                "-" if f["peak_mb"] is None else f"{f['peak_mb']:,.0f}",
                f"{f['loss']:.4f}",
            ]
            for name, f in figures.items()
        ],
    )


if __name__ == "__main__":
    main()
