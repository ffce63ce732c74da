"""One layer beside its dense twin: forward, and forward with gradients.

    python -m benchmarks.layer --backend torch
    python -m benchmarks.layer --backend tensorflow --xla --shapes A C

The dense twin is a gated feed-forward layer as wide as the experts of one token
together, in the same framework and compile mode, timed in turn with it. Forward
is inference; forward with gradients is a training call with the layer's default
losses and statistics, and the gradients of the input and all weights.
"""

from benchmarks import measure
from benchmarks import shapes


def main():
    parser = measure.parser(__doc__.splitlines()[0])
    parser.add_argument("--shapes", nargs="+", choices=shapes.KNOWN)
    parser.add_argument(
        "--peers",
        nargs="*",
        default=["all", "keras_hub", "transformers"],
        help="beside keras_moe: all (experts by einsum), keras_hub, "
        "transformers (torch), where they are installed",
    )
    parser.add_argument(
        "--skew", action="store_true", help="also skewed routing"
    )
    parser.add_argument("--xla", action="store_true", help="TensorFlow's XLA")
    arguments = parser.parse_args()
    measure.choose(arguments)
    known = shapes.CPU if arguments.device == "cpu" else shapes.GPU
    figures = {}
    for name in arguments.shapes or known:
        figures[name] = compare(shapes.KNOWN[name], arguments)
        report(name, shapes.KNOWN[name], figures[name])
        measure.write(arguments, figures)


def compare(shape, arguments):
    from benchmarks import blocks
    from benchmarks import steps

    x = blocks.inputs(shape)
    own = {"dense": (blocks.DenseGLU(shape), x)}
    own["keras_moe"] = blocks.moe(shape), x
    if arguments.skew:
        skewed = blocks.moe(shape, skewed=True)
        own["keras_moe, skewed"] = skewed, blocks.inputs(shape, skewed=True)
    # Apart from each other: what takes gigabytes leaves caches and memory in a
    # state that whoever comes next has to pay for.
    runs = [own]
    for name, layer in peers(shape, arguments).items():
        runs.append({"dense": own["dense"], name: (layer, x)})
    figures = {}
    for kind, make in (
        ("forward", steps.forward_step),
        ("gradients", steps.gradient_step),
    ):
        figures[kind] = {}
        for run in runs:
            functions = {
                name: make(layer, inputs, arguments.xla)
                for name, (layer, inputs) in run.items()
            }
            times = measure.alternate(functions, arguments.seconds)
            measured = measure.summary(times, "dense")
            figures[kind] = {**measured, **figures[kind]}
    return figures


def peers(shape, arguments):
    """The layers of others that were asked for and are installed."""
    from benchmarks import blocks

    layers = {}
    if "all" in arguments.peers:
        layers["all experts"] = blocks.AllExperts(shape)
    if "keras_hub" in arguments.peers:
        layers["keras-hub"] = blocks.keras_hub_block(shape)
    if "transformers" in arguments.peers and arguments.backend == "torch":
        for kind in ("eager", "grouped_mm"):
            layers[f"transformers, {kind}"] = blocks.transformers_block(
                shape, kind
            )
    return {name: layer for name, layer in layers.items() if layer}


def report(name, shape, figures):
    print(f"\n{name}: {shape}\n")
    rows = []
    for layer in figures["forward"]:
        forward, gradients = (
            figures[kind][layer] for kind in ("forward", "gradients")
        )
        rows.append(
            [
                layer,
                *(
                    f"{f['ratio']:.2f} ({f['ratio_of_best']:.2f})"
                    for f in (forward, gradients)
                ),
                *(f"{1e3 * f['median_s']:.2f}" for f in (forward, gradients)),
            ]
        )
    measure.print_table(
        [
            "layer",
            "forward: ratio to dense (of the best runs)",
            "with gradients",
            "ms",
            "ms",
        ],
        rows,
    )


if __name__ == "__main__":
    main()
