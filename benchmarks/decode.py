"""Few tokens at a time, as in generation: only chosen experts may be read.

    python -m benchmarks.decode --backend jax

Times inference of 1 to 64 tokens with few and with many experts, beside the
dense twin. With fewer choices than experts the time should hardly depend on
how many experts there are.
"""

from benchmarks import measure
from benchmarks import shapes

TOKENS = (1, 4, 16, 64)
NUM_EXPERTS = (8, 128)
DIM, INTERMEDIATE_DIM, TOP_K = 512, 1024, 2


def main():
    parser = measure.parser(__doc__.splitlines()[0])
    parser.add_argument("--xla", action="store_true", help="TensorFlow's XLA")
    arguments = parser.parse_args()
    measure.choose(arguments)
    figures = {}
    for tokens in TOKENS:
        figures[tokens] = compare(tokens, arguments)
        measure.write(arguments, figures)
    few, many = (f"{e} experts" for e in NUM_EXPERTS)
    print(f"\nD {DIM}, F {INTERMEDIATE_DIM}, k {TOP_K}\n")
    measure.print_table(
        ["tokens", "dense, ms", f"{few}, ms", f"{many}, ms", "many / few"],
        [
            [
                tokens,
                *(
                    f"{1e3 * figure[name]['median_s']:.3f}"
                    for name in ("dense", few, many)
                ),
                f"{figure[many]['median_s'] / figure[few]['median_s']:.2f}",
            ]
            for tokens, figure in figures.items()
        ],
    )


def compare(tokens, arguments):
    from benchmarks import blocks
    from benchmarks import steps

    functions = {}
    for num_experts in NUM_EXPERTS:
        shape = shapes.Shape(tokens, DIM, INTERMEDIATE_DIM, num_experts, TOP_K)
        x = blocks.inputs(shape)
        if not functions:
            functions["dense"] = steps.forward_step(
                blocks.DenseGLU(shape), x, arguments.xla
            )
        functions[f"{num_experts} experts"] = steps.forward_step(
            blocks.moe(shape), x, arguments.xla
        )
    times = measure.alternate(functions, arguments.seconds, least=50)
    return measure.summary(times, "dense")


if __name__ == "__main__":
    main()
