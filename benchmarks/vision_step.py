"""A step of `fit` of vision transformers with experts beside their twin.

    python -m benchmarks.vision_step --backend jax

Blocks as in V-MoE-S/16: 512 wide, 197 tokens an image. Both have 8 experts, of
which a token meets 2, half as wide as the twin's feed-forward, so that a token
takes the same products. Soft MoE has as many slots as there are tokens. Adam's
update of the weights, of which there are E/k times more, is part of the step.
"""

from benchmarks import measure

KINDS = ("dense", "V-MoE", "Soft MoE")
SIZE = {
    "image_shape": (224, 224, 3),
    "patch_size": 16,
    "num_layers": 2,
    "num_heads": 8,
    "hidden_dim": 512,
}
WIDTH, EXPERTS, TOP_K = 2048, 8, 2
STEPS = 3  # in each `fit`, which has costs of its own


def main():
    parser = measure.parser(__doc__.splitlines()[0])
    parser.add_argument("--batch", type=int, default=8)
    arguments = parser.parse_args()
    measure.choose(arguments)
    figures = compare(arguments, SIZE)
    measure.write(arguments, figures)
    report(figures)


def compare(arguments, size):
    import keras
    import numpy as np

    from keras_moe.models import MoEImageClassifier

    rng = np.random.default_rng(0)
    number = arguments.batch * STEPS
    x = rng.normal(size=(number, *size["image_shape"])).astype("float32")
    y = rng.integers(10, size=number)
    functions = {}
    for kind in KINDS:
        model = MoEImageClassifier(_backbone(kind, size), 10)
        loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
        model.compile("adam", loss)
        functions[kind] = lambda model=model: model.fit(
            x, y, batch_size=arguments.batch, shuffle=False, verbose=0
        )
    runs = measure.alternate(functions, arguments.seconds)
    runs = {kind: [s / STEPS for s in r] for kind, r in runs.items()}
    return measure.summary(runs, "dense")


def _backbone(kind, size):
    from keras_moe import models

    width = WIDTH * size["hidden_dim"] // SIZE["hidden_dim"]
    common = {**size, "num_experts": EXPERTS, "data_format": "channels_last"}
    everywhere = list(range(size["num_layers"]))
    if kind == "Soft MoE":
        patches = (size["image_shape"][0] // size["patch_size"]) ** 2
        return models.SoftMoEBackbone(
            **common,
            mlp_dim=width,
            slots_per_expert=-(-patches // EXPERTS),
            moe_layers=everywhere,
        )
    return models.VMoEBackbone(
        **common,
        mlp_dim=width if kind == "dense" else width // TOP_K,
        top_k=TOP_K,
        moe_layers=[] if kind == "dense" else everywhere,
    )


def report(figures):
    measure.print_table(
        ["", "step", "ratio"],
        [
            [kind, f"{1e3 * row['median_s']:.0f} ms", f"{row['ratio']:.2f}"]
            for kind, row in figures.items()
        ],
    )


if __name__ == "__main__":
    main()
