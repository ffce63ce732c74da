"""A step of `fit` of a transformer beside its dense twin.

    python -m benchmarks.fit --backend jax

Every second block has a `MoE` in the place of its feed-forward layer. Reported
are the step, the optimizer's part in it (it updates E/k times more weights,
which no kernel can change), the first step, which compiles, and the peak
memory, for which each model runs in a process of its own.
"""

import json
import subprocess
import sys
import time

from benchmarks import measure
from benchmarks import shapes

LENGTH, VOCABULARY, BLOCKS, HEADS = 256, 256, 4, 8
KINDS = ("dense", "moe")


def main():
    parser = measure.parser(__doc__.splitlines()[0])
    parser.add_argument("--shape", default="A", choices=shapes.KNOWN)
    parser.add_argument(
        "--jit",
        choices=("auto", "true", "false"),
        default="auto",
        help="jit_compile of `compile`",
    )
    parser.add_argument(
        "--memory-of", choices=KINDS, help="only that model's memory"
    )
    arguments = parser.parse_args()
    measure.choose(arguments)
    if arguments.memory_of:
        print(json.dumps(memory(arguments)))
        return
    shape = shapes.KNOWN[arguments.shape]
    print(f"\n{arguments.shape}: {shape}, {BLOCKS} blocks\n", flush=True)
    figures = times(shape, arguments)
    figures["memory"] = {kind: memory_apart(kind) for kind in KINDS}
    measure.write(arguments, figures)
    report(figures)


def build(kind, shape, arguments):
    """A compiled model, and a batch for it."""
    import keras
    import numpy as np

    from benchmarks import blocks

    layers = keras.layers
    ids = keras.Input((LENGTH,), dtype="int32")
    x = layers.Embedding(VOCABULARY, shape.dim)(ids)
    for i in range(BLOCKS):
        attention = layers.MultiHeadAttention(HEADS, shape.dim // HEADS)
        y = layers.LayerNormalization()(x)
        x = x + attention(y, y, use_causal_mask=True)
        sparse = kind == "moe" and i % 2
        feed_forward = blocks.moe(shape) if sparse else blocks.DenseGLU(shape)
        x = x + feed_forward(layers.LayerNormalization()(x))
    logits = layers.Dense(VOCABULARY)(layers.LayerNormalization()(x))
    model = keras.Model(ids, logits)
    jit = {"auto": "auto", "true": True, "false": False}[arguments.jit]
    model.compile(
        "adam",
        keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        jit_compile=jit,
    )
    rng = np.random.default_rng(0)
    size = (shape.tokens // LENGTH, LENGTH)
    batch = [rng.integers(VOCABULARY, size=size) for _ in range(2)]
    return model, [array.astype("int32") for array in batch]


def times(shape, arguments):
    models, figures = {}, {"first_step_s": {}}
    for kind in KINDS:
        model, (x, y) = build(kind, shape, arguments)
        start = time.perf_counter()
        model.fit(x, y, batch_size=len(x), verbose=0)
        figures["first_step_s"][kind] = time.perf_counter() - start
        models[kind] = model
    # Each `fit` has costs of its own: several steps in each.
    steps = 4
    x, y = (array.repeat(steps, axis=0) for array in (x, y))
    functions = {
        kind: lambda model=model: model.fit(
            x, y, batch_size=len(x) // steps, shuffle=False, verbose=0
        )
        for kind, model in models.items()
    }
    runs = measure.alternate(functions, arguments.seconds)
    runs = {kind: [s / steps for s in r] for kind, r in runs.items()}
    figures["step"] = measure.summary(runs, "dense")
    functions = {kind: update(model) for kind, model in models.items()}
    runs = measure.alternate(functions, arguments.seconds / 2)
    figures["update"] = measure.summary(runs, "dense")
    figures["weights"] = {k: m.count_params() for k, m in models.items()}
    return figures


def update(model):
    """The optimizer's update alone, compiled as `fit` compiles it."""
    import keras
    from keras import ops

    gradients = [
        ops.full(v.shape, 1e-3, v.dtype) for v in model.trainable_variables
    ]
    optimizer = model.optimizer
    if keras.config.backend() == "jax":
        import jax

        apply = jax.jit(optimizer.stateless_apply, donate_argnums=(0, 2))
        state = [[v.value + 0 for v in optimizer.variables]]
        weights = [[v.value + 0 for v in model.trainable_variables]]

        def step():
            weights[0], state[0] = apply(state[0], gradients, weights[0])
            jax.block_until_ready(weights[0])

        return step
    if keras.config.backend() == "tensorflow":
        import tensorflow as tf

        variables = model.trainable_variables
        return tf.function(lambda: optimizer.apply(gradients, variables))
    import torch

    def step():
        with torch.no_grad():
            optimizer.apply(gradients, model.trainable_variables)

    return step


def memory_apart(kind):
    command = [sys.executable, "-m", "benchmarks.fit", *sys.argv[1:]]
    result = subprocess.run(
        [*command, "--memory-of", kind],
        capture_output=True,
        text=True,
        check=False,
    )
    if result.returncode:
        raise RuntimeError(result.stderr)
    return json.loads(result.stdout.splitlines()[-1])


def memory(arguments):
    """Peak of a step above weights, gradients and optimizer, in MB (Linux)."""
    import ctypes

    shape = shapes.KNOWN[arguments.shape]
    tiny = shape._replace(dim=64, intermediate_dim=64, tokens=2 * LENGTH)
    model, (x, y) = build(arguments.memory_of, tiny, arguments)
    model.fit(x, y, verbose=0)  # what the framework needs by itself
    before = _status("VmRSS")
    model, (x, y) = build(arguments.memory_of, shape, arguments)
    model.fit(x, y, batch_size=len(x), verbose=0)
    # Forget what compiling took, and start counting.
    ctypes.CDLL(None).malloc_trim(0)
    with open("/proc/self/clear_refs", "w") as reset:
        reset.write("5")
    model.fit(x, y, batch_size=len(x), epochs=3, verbose=0)
    peak = _status("VmHWM") - before
    gradients = _bytes(model.trainable_variables)
    state = _bytes(model.variables) + _bytes(model.optimizer.variables)
    return {
        "peak_mb": peak / 1e6,
        "weights_gradients_optimizer_mb": (state + gradients) / 1e6,
        "above_mb": (peak - state - gradients) / 1e6,
    }


def _bytes(variables):
    from keras import ops

    return sum(ops.convert_to_numpy(v).nbytes for v in variables)


def _status(entry):
    with open("/proc/self/status") as lines:
        for line in lines:
            if line.startswith(entry + ":"):
                return 1024 * int(line.split()[1])
    raise RuntimeError(f"/proc/self/status has no {entry}")


def report(figures):
    step, alone = figures["step"], figures["update"]
    rest = {k: step[k]["median_s"] - alone[k]["median_s"] for k in KINDS}

    def row(name, of, unit, digits):
        dense, moe = (of[kind] for kind in KINDS)
        return [
            name,
            f"{dense:.{digits}f} {unit}",
            f"{moe:.{digits}f} {unit}",
            f"{moe / dense:.2f}",
        ]

    def milliseconds(summary):
        return {kind: 1e3 * summary[kind]["median_s"] for kind in KINDS}

    measure.print_table(
        ["", *KINDS, "ratio"],
        [
            row("step of fit", milliseconds(step), "ms", 0),
            row("optimizer's update alone", milliseconds(alone), "ms", 0),
            row(
                "step without it",
                {k: 1e3 * s for k, s in rest.items()},
                "ms",
                0,
            ),
            row("first step", figures["first_step_s"], "s", 1),
            row(
                "weights",
                {k: n / 1e6 for k, n in figures["weights"].items()},
                "M",
                1,
            ),
            row(
                "peak memory above weights, gradients, optimizer",
                {k: m["above_mb"] for k, m in figures["memory"].items()},
                "MB",
                0,
            ),
        ],
    )


if __name__ == "__main__":
    main()
