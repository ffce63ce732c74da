"""
Title: Rating and liking films: two tasks on MovieLens
Author: The keras_moe authors
Date created: 2026/11/22
Last modified: 2026/11/22
Description: Predict the stars of a film, and whether someone likes it.
Accelerator: None
"""

"""
## Introduction

Two tasks of different kinds: how many stars somebody gives a film, a
regression, and whether it is four or more, a binary task. This trains a shared
bottom, MMoE and PLE on them and prints how they do side by side. It writes the
models, the figures, and a picture of which task uses which expert.

The data is not in this repository: its licence forbids to pass it on. Download
ml-100k or ml-1m from <https://grouplens.org/datasets/movielens/>, unpack it,
and name the folder:

    python examples/recommendation/movielens_multitask.py --data ml-100k
"""

"""
## Setup

Keras asks for the backend when it is imported, so the arguments come first.
"""

import sys
import time

import options

parser = options.make_parser(
    "Trains multi-gate mixtures of experts on two tasks of MovieLens.",
    output="runs/movielens",
    epochs=20,
)
parser.add_argument("--data", required=True, help="folder of ml-100k or ml-1m")
parser.add_argument(
    "--models", default="all", help="names of models with commas between them"
)
parser.add_argument("--seeds", type=int, default=1, help="runs of each model")
args = options.parse(parser, {"seeds": 1})

try:
    import keras
    import numpy as np
    import report
    from movielens_data import features_of
    from movielens_data import read_movielens

    import keras_moe
except ModuleNotFoundError as error:
    sys.exit(
        f"{error}. To install what this needs, in the root of the repository:\n"
        f"    pip install -e . {args.backend} matplotlib"
    )

TASKS = [
    keras_moe.models.TaskSpec("rating", "regression", tower_units=(16,)),
    keras_moe.models.TaskSpec("like", "binary", tower_units=(16,)),
]
EXPERTS = {"expert_units": (32,), "expert_dropout": 0.2}
SPLIT = {"num_shared_experts": 3, "num_task_experts": 2, **EXPERTS}
MODELS = {
    "SharedBottom": {"bottom_units": (128,)},
    "MMoE": {"num_experts": 6, **EXPERTS},
    "PLE": {"num_levels": 2, **SPLIT},
}
names = options.named_models(parser, args.models, MODELS)

"""
## The data

80 % of the ratings to train, 10 % to validate, 10 % to test, at random. The
stars are counted from their mean, so that a model need not learn it.
"""

try:
    ratings, users, items = read_movielens(args.data)
except (OSError, ValueError, KeyError) as error:
    sys.exit(f"Cannot read --data {args.data!r}: {error}")
order = np.random.default_rng(0).permutation(len(ratings["rating"]))
stops = [int(share * len(order)) for share in (0.8, 0.9)]
parts = dict(
    zip(("train", "validate", "test"), np.split(order, stops), strict=True)
)
mean = float(ratings["rating"][parts["train"]].mean())
columns, y, groups = {}, {}, {}
for part, rows in parts.items():
    groups[part] = ratings["user"][rows]
    columns[part] = features_of(
        users, items, groups[part], ratings["item"][rows]
    )
    stars = ratings["rating"][rows]
    y[part] = {
        "rating": stars - mean,
        "like": (stars >= 4).astype("float32"),
    }
print(
    f"{args.backend}: "
    + ", ".join(
        f"{len(rows)} ratings to {part}" for part, rows in parts.items()
    )
)

"""
## The features

Names that are not in the training part become unknown, a year that is not known
counts as missing. What a film's genres give is the mean of their vectors.
"""

features = keras_moe.layers.FeatureEmbedding(
    [
        *(
            keras_moe.layers.Categorical(name)
            for name in ("user_id", "item_id", "age", "sex", "occupation")
        ),
        keras_moe.layers.MultiCategorical("genres", separator="|"),
        keras_moe.layers.Numeric("year", missing_indicator=True),
    ],
    embedding_dim=16,
    embeddings_regularizer=keras.regularizers.L2(1e-5),
)
features.adapt(columns["train"])
x = {part: features.encode(columns[part]) for part in parts}

"""
## Training

The loss of the stars and that of the liking are of different size;
`task_weighting="uncertainty"` learns what each of them counts. Training ends
when neither the order within each user's films (GAUC) nor the stars get better.
"""


def train(name, seed):
    """Returns a trained model and its figures."""
    keras.utils.set_random_seed(seed)
    model = report.same_model(
        features, getattr(keras_moe.models, name), TASKS, **MODELS[name]
    )
    model.compile(keras.optimizers.Adam(2e-3), task_weighting="uncertainty")
    start = time.perf_counter()
    model.fit(
        x["train"],
        y["train"],
        batch_size=args.batch_size,
        epochs=args.epochs,
        validation_data=(x["validate"], y["validate"]),
        callbacks=[
            keras_moe.models.GroupAUC(
                x["validate"],
                {"like": y["validate"]["like"]},
                groups["validate"],
            ),
            keras_moe.callbacks.CombineLogs(
                {"val_like_gauc": 1.0, "val_rating_rmse": -1.0}
            ),
            keras.callbacks.EarlyStopping(
                "val_combined",
                mode="max",
                patience=2,
                restore_best_weights=True,
            ),
        ],
        verbose=0,
    )
    seconds = time.perf_counter() - start
    predictions = model.predict(x["test"], batch_size=4096, verbose=0)
    like, liked = predictions["like"], y["test"]["like"]
    stars = predictions["rating"][:, 0] - y["test"]["rating"]
    one_group = np.zeros_like(groups["test"])
    return model, {
        "like_auc": keras_moe.metrics.group_auc(liked, like, one_group),
        "like_gauc": keras_moe.metrics.group_auc(liked, like, groups["test"]),
        "rating_rmse": float(np.sqrt(np.mean(np.square(stars)))),
        "seconds": round(seconds, 1),
    }


runs, kept = {}, {}
for name in names:
    runs[name] = []
    for seed in range(args.seeds):
        model, figures = train(name, seed)
        runs[name].append(figures)
        kept.setdefault(name, model)

"""
## Saving and reporting
"""

panels = []
for name, model in kept.items():
    panels += report.gate_panels(name, model, x["test"])
parameters = {name: model.count_params() for name, model in kept.items()}
with report.whole_files(args.output) as folder:
    if panels:
        title = "Mean weight of each expert for each task, in %"
        report.draw_gates(folder / "gates.png", panels, title)
    differences = [
        report.save(model, folder / f"{name}.keras", x["test"])
        for name, model in kept.items()
    ]
    report.write_summary(
        folder / "summary.json",
        args,
        rows={part: len(rows) for part, rows in parts.items()},
        parameters=parameters,
        runs=runs,
        reloaded_max_difference=max(differences),
    )

print(f"\nTest figures, mean and standard deviation of {args.seeds} seeds")
report.print_table(
    ["model", "parameters", "like AUC", "like GAUC", "stars RMSE", "seconds"],
    [
        [
            name,
            f"{parameters[name]:,}",
            *(
                report.spread([run[key] for run in runs[name]])
                for key in ("like_auc", "like_gauc", "rating_rmse")
            ),
            f"{np.mean([run['seconds'] for run in runs[name]]):.0f}",
        ]
        for name in names
    ],
)
print(
    f"\nWritten to {args.output}: the models of the first seed (loaded again,"
)
print("they predict the same), summary.json, and gates.png if there are gates")
