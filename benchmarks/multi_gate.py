"""An MMoE with stacked experts beside the same model as a list of layers.

    python -m benchmarks.multi_gate --backend jax

A table of 40 columns, 8 experts, 2 tasks: see `benchmarks/census.py`. Reported
are a step of `fit`; forward with gradients of what differs, experts, gates and
towers, alone; and, in fresh processes that take turns, making the model, and
its first step, which compiles. The last also for 64 experts and 20 tasks.
"""

import json
import statistics
import subprocess
import sys
import time

from benchmarks import measure

BASELINE = "list of Dense"
SIZES = {"small": (2, 8), "large": (20, 64)}  # tasks and experts
STEPS = 20


def main():
    parser = measure.parser(__doc__.splitlines()[0])
    parser.add_argument("--xla", action="store_true", help="TensorFlow's XLA")
    parser.add_argument(
        "--processes", type=int, default=3, help="fresh ones for each model"
    )
    parser.add_argument(
        "--start-of", nargs=2, help="only the start of that model and size"
    )
    arguments = parser.parse_args()
    measure.choose(arguments)
    if arguments.start_of:
        print(json.dumps(start(*arguments.start_of, arguments)))
        return
    figures = {"step": steps(arguments), "trunk": trunks(arguments)}
    for size in SIZES:
        figures[f"start, {size}"] = starts(size, arguments)
        measure.write(arguments, figures)
    report(figures)


def jit_compile(arguments):
    return True if arguments.xla else "auto"


def steps(arguments):
    """Seconds of a step of `fit`."""
    from benchmarks import census

    functions = {}
    for kind in census.KINDS:
        model = census.model(kind, jit=jit_compile(arguments))
        functions[kind] = fitting(model, arguments.backend)
    times = measure.alternate(functions, arguments.seconds)
    times = {kind: [t / STEPS for t in runs] for kind, runs in times.items()}
    return measure.summary(times, BASELINE)


def fitting(model, backend):
    """A function that fits `STEPS` times to one batch."""
    from benchmarks import census

    x, y = census.batch(len(model.tasks))
    # What makes batches is no part of a step.
    if backend == "tensorflow":
        import tensorflow as tf

        data = tf.data.Dataset.from_tensors((x, y)).repeat(STEPS)
        return lambda: model.fit(data, verbose=0)

    def batches():
        while True:
            yield x, y

    return lambda: model.fit(batches(), steps_per_epoch=STEPS, verbose=0)


def trunks(arguments):
    """Seconds of forward with gradients of experts, gates and towers."""
    import numpy as np

    from benchmarks import census
    from benchmarks import steps as functions

    dim = 8 * len(census.VOCABULARIES) + census.NUMBERS
    x = np.random.default_rng(0).normal(size=(census.BATCH, dim))
    times = measure.alternate(
        {
            kind: functions.gradient_step(
                census.trunk(kind, dim), x, arguments.xla
            )
            for kind in census.KINDS
        },
        arguments.seconds,
    )
    return measure.summary(times, BASELINE)


def start(kind, size, arguments):
    """Seconds to make a model, and of its first step."""
    import keras
    import numpy as np

    from benchmarks import census

    # What the framework does once is no part of it. The shapes are no layer's
    # of the models, since initializers compile too.
    warm = keras.Sequential([keras.layers.Dense(3)])
    warm.compile("adam", "mse", jit_compile=jit_compile(arguments))
    warm.fit(np.ones((4, 5)), np.ones((4, 3)), verbose=0)
    num_tasks, num_experts = SIZES[size]
    x, y = census.batch(num_tasks)
    begin, worked = time.perf_counter(), time.process_time()
    model = census.model(kind, num_tasks, num_experts, jit_compile(arguments))
    built = time.perf_counter()
    model.fit(x, y, batch_size=census.BATCH, verbose=0)
    done = time.perf_counter()
    return {
        "build": built - begin,
        "first step": done - built,
        # Of all threads, for both.
        "processor": time.process_time() - worked,
    }


def starts(size, arguments):
    """Medians of those, by kind of model, in processes that take turns."""
    from benchmarks import census

    runs = {kind: [] for kind in census.KINDS}
    for _ in range(arguments.processes):
        for kind, times in runs.items():
            times.append(_in_a_process(kind, size))
    result = {
        kind: {
            part: statistics.median(run[part] for run in times)
            for part in times[0]
        }
        for kind, times in runs.items()
    }
    return result


def _in_a_process(kind, size):
    command = [sys.executable, "-m", "benchmarks.multi_gate", *sys.argv[1:]]
    result = subprocess.run(
        [*command, "--start-of", kind, size],
        capture_output=True,
        text=True,
        check=False,
    )
    if result.returncode:
        raise RuntimeError(result.stderr)
    return json.loads(result.stdout.splitlines()[-1])


def report(figures):
    rows = []
    for part, title in (
        ("step", "step of fit, ms"),
        ("trunk", "experts, gates and towers alone, ms"),
    ):
        pair = [1e3 * f["median_s"] for f in figures[part].values()]
        rows.append(_row(title, *pair, digits=2))
    for size, (num_tasks, num_experts) in SIZES.items():
        for part in ("build", "first step", "processor"):
            pair = [f[part] for f in figures[f"start, {size}"].values()]
            title = f"{part}, {num_experts} experts, {num_tasks} tasks, s"
            rows.append(_row(title, *pair, digits=1))
    measure.print_table(["", *figures["step"], "times faster"], rows)


def _row(title, baseline, own, digits):
    return [
        title,
        f"{baseline:.{digits}f}",
        f"{own:.{digits}f}",
        f"{baseline / own:.2f}",
    ]


if __name__ == "__main__":
    main()
