"""
Title: Two tasks on the census: multi-gate mixtures side by side
Author: The keras_moe authors
Date created: 2026/11/22
Last modified: 2026/11/22
Description: Predict income and marital status with ten models, side by side.
Accelerator: None
"""

"""
## Introduction

From 39 facts about a person, two tasks: whether they earn more than 50,000
dollars a year (6 % do), and whether they never married (43 %). This trains all
models on them that need no domains or chain of events, several times, and
prints their test AUC side by side. It writes the models, the figures, and a
picture of which task uses which expert.

The data is the Census-Income (KDD) set of the UCI Machine Learning Repository,
<https://archive.ics.uci.edu/ml/datasets/Census-Income+(KDD)>. Download its
`census-income.test.gz` (99,762 people) or `census-income.data.gz` (199,523),
and name the file, unpacked or not:

    python examples/recommendation/census_multitask.py \\
        --data census-income.test.gz
"""

"""
## Setup

Keras asks for the backend when it is imported, so the arguments come first.
"""

import sys
import time

import options

parser = options.make_parser(
    "Trains multi-gate mixtures of experts on two tasks of the census.",
    output="runs/census",
    epochs=30,
)
parser.add_argument("--data", required=True, help="the file of the UCI set")
parser.add_argument(
    "--models", default="all", help="names of models with commas between them"
)
parser.add_argument("--seeds", type=int, default=5, help="runs of each model")
parser.add_argument("--first-seed", type=int, default=0, help="of these")
parser.add_argument("--learning-rate", type=float, default=5e-3, help=" ")
parser.add_argument("--patience", type=int, default=3, help="epochs")
parser.add_argument(
    "--protocol",
    default="distinct",
    choices=("distinct", "public"),
    help="how the data is split, see below",
)
args = options.parse(
    parser, {"seeds": 1, "first_seed": 0, "learning_rate": 0, "patience": 0}
)

try:
    import keras
    import numpy as np
    import report
    from census_data import read_census
    from census_data import split

    import keras_moe
except ModuleNotFoundError as error:
    sys.exit(
        f"{error}. To install what this needs, in the root of the repository:\n"
        f"    pip install -e . {args.backend} matplotlib"
    )

"""
## The models

All have a tower of 8 units for each task. What they have in common, and what
they do not, is which experts there are and what a task may take of them
(`DLRMMoE` multiplies the vectors of the features first).
"""

TASKS = [
    # With ReLU, all eight units of a tower may end up dead: 94 % of the labels
    # of income push down from the start.
    keras_moe.models.TaskSpec(name, tower_units=(8,), tower_activation="silu")
    for name in ("income", "marital")
]
EXPERTS = {"num_shared_experts": 4, "num_task_experts": 4}
MODELS = {
    # About as many parameters as in the eight experts of OMoE and MMoE.
    "SharedBottom": {"bottom_units": (117,)},
    "OMoE": {"num_experts": 8},
    "MMoE": {"num_experts": 8},
    "CGC": EXPERTS,
    "PLE": {"num_levels": 2, **EXPERTS},
    "AdaTT": {"num_levels": 2, "num_task_experts": 4},
    "STEM": EXPERTS,
    "HoME": {},
    "SNR": {},
    "DLRMMoE": {"num_experts": 8, "expert_units": (16,), "bottom_units": (16,)},
}
names = options.named_models(parser, args.models, MODELS)

"""
## The data

Two ways to split it, 60 % to train, 20 % to validate, 20 % to test:

- `distinct`: the columns of the marital status and of the instance weight are
  dropped, no row is. 99,762 people have fewer different rows of the 39
  features left: those with the same row go to the same split, so that no row
  of the test was seen in training.
- `public`, as in public repositories with this set: rows are split at random,
  and the instance weight stays as a feature. Nearly equal people are then on
  both sides.

Vocabularies and ranges are learned from the training rows alone. The split is
the same for all seeds.
"""

try:
    columns, labels = read_census(args.data, args.protocol == "public")
except (OSError, ValueError) as error:
    sys.exit(f"Cannot read --data {args.data!r}: {error}")
parts, distinct = split(columns, args.protocol == "distinct")
print(
    f"{args.backend}, protocol {args.protocol}: {len(labels['income'])} people,"
    f" {distinct} different rows of {len(columns)} features;\n"
    + ", ".join(f"{len(rows)} to {part}" for part, rows in parts.items())
)


def rows_of(data, part):
    return {name: values[parts[part]] for name, values in data.items()}


features = keras_moe.layers.FeatureEmbedding.from_data(
    rows_of(columns, "train"), embedding_dim=4
)
x = {part: features.encode(rows_of(columns, part)) for part in parts}
y = {part: rows_of(labels, part) for part in parts}

"""
## Training

It ends when the mean of both validation AUCs has not risen for some epochs, and
the model goes back to the best of them. The test rows are used once, for the
model that this gave.
"""


def exact_auc(label, prediction):
    """The AUC over all rows: grouped, with one group."""
    return keras_moe.metrics.group_auc(
        label, prediction, np.zeros(len(label), "int32")
    )


def train(name, seed):
    """Returns a trained model and its figures."""
    keras.utils.set_random_seed(seed)
    model = report.same_model(
        features, getattr(keras_moe.models, name), TASKS, **MODELS[name]
    )
    model.compile(keras.optimizers.Adam(args.learning_rate))
    start = time.perf_counter()
    history = model.fit(
        x["train"],
        y["train"],
        batch_size=args.batch_size,
        epochs=args.epochs,
        validation_data=(x["validate"], y["validate"]),
        validation_batch_size=4096,
        callbacks=[
            keras_moe.callbacks.CombineLogs(
                ["val_income_auc", "val_marital_auc"]
            ),
            keras.callbacks.EarlyStopping(
                "val_combined",
                mode="max",
                patience=args.patience,
                restore_best_weights=True,
            ),
        ],
        verbose=0,
    ).history
    seconds = time.perf_counter() - start
    predictions = model.predict(x["test"], batch_size=4096, verbose=0)
    best = int(np.argmax(history["val_combined"]))
    figures = {
        "seed": seed,
        "epochs": len(history["loss"]),
        "seconds": round(seconds, 1),
    }
    for task, label in y["test"].items():
        figures[f"validation_{task}"] = history[f"val_{task}_auc"][best]
        figures[f"test_{task}"] = exact_auc(label, predictions[task])
    return model, figures


runs, parameters, kept = {}, {}, {}
for name in names:
    runs[name] = []
    for seed in range(args.first_seed, args.first_seed + args.seeds):
        model, figures = train(name, seed)
        runs[name].append(figures)
        parameters[name] = model.count_params()
        kept.setdefault(name, model)
        print(
            f"{name}, seed {seed}: test AUC {figures['test_income']:.4f} "
            f"(income), {figures['test_marital']:.4f} (marital), "
            f"{figures['epochs']} epochs, {figures['seconds']:.0f} s",
            flush=True,
        )

"""
## Which task uses which expert

Of the models of the first seed: the mean weight of each expert in the gates,
over the test rows.
"""

panels = []
for name, model in kept.items():
    panels += report.gate_panels(name, model, x["test"])

with report.whole_files(args.output) as folder:
    if panels:
        title = "Mean weight of each expert for each task, in %"
        report.draw_gates(folder / "gates.png", panels, title)
    differences = {
        name: report.save(model, folder / f"{name}.keras", x["test"])
        for name, model in kept.items()
    }
    report.write_summary(
        folder / "summary.json",
        args,
        rows={part: len(rows) for part, rows in parts.items()},
        distinct_rows=distinct,
        parameters=parameters,
        runs=runs,
        gates={
            name: {t: np.round(g, 4).tolist() for t, g in means.items()}
            for name, _, means in panels
        },
        reloaded_max_difference=max(differences.values()),
    )

print(f"\nTest AUC, mean and standard deviation of {args.seeds} seeds")
report.print_table(
    ["model", "parameters", "income", "marital", "epochs", "seconds"],
    [
        [
            name,
            f"{parameters[name]:,}",
            report.spread([run["test_income"] for run in runs[name]]),
            report.spread([run["test_marital"] for run in runs[name]]),
            f"{np.mean([run['epochs'] for run in runs[name]]):.1f}",
            f"{np.mean([run['seconds'] for run in runs[name]]):.0f}",
        ]
        for name in names
    ],
)
print(
    f"\nWritten to {args.output}: the models of the first seed (loaded again,"
)
print("they predict the same), summary.json, and gates.png if there are gates")
