"""
Title: Retrieval and ranking: candidates of two towers, re-ranked by PLE
Author: The keras_moe authors
Date created: 2026/11/22
Last modified: 2026/11/22
Description: The two stages of a recommender, on made-up data or MovieLens.
Accelerator: None
"""

"""
## Introduction

A recommender cannot run a large model on all items for each user. So a first
stage, the retrieval, picks candidates: two towers, whose vectors need only be
multiplied. A second stage, the ranking, orders these by a model of all features
of both. Here that is PLE with two tasks, whether a user sees a film and whether
they then like it. This prints what each stage finds of the films that a user
liked, among those that were held out:

    python examples/recommendation/two_stage.py

It takes about a minute on two CPU cores, and downloads nothing: people and
films are made up. With `--data` it reads a folder of MovieLens, ml-100k or
ml-1m, from <https://grouplens.org/datasets/movielens/>.
"""

"""
## Setup

Keras asks for the backend when it is imported, so the arguments come first.
"""

import sys

import options

parser = options.make_parser(
    "Retrieves candidates with two towers, and ranks them with PLE.",
    output="runs/two_stage",
    epochs=10,
)
parser.add_argument("--data", help="folder of ml-100k or ml-1m")
parser.add_argument("--users", type=int, default=1000, help="to make up")
parser.add_argument("--items", type=int, default=1500, help="to make up")
parser.add_argument("--candidates", type=int, default=100, help="a user")
parser.add_argument("--seed", type=int, default=0, help="at least 0")
args = options.parse(
    parser, {"users": 10, "items": 60, "candidates": 10, "seed": 0}
)

try:
    import keras
    import numpy as np
    import report
    from keras import ops
    from movielens_data import features_of
    from movielens_data import made_up
    from movielens_data import read_movielens

    import keras_moe
except ModuleNotFoundError as error:
    sys.exit(
        f"{error}. To install what this needs, in the root of the repository:\n"
        f"    pip install -e . {args.backend} matplotlib"
    )

"""
## The data

What each user saw is split in the order of time: the first 60 % train the
retrieval, the next 20 % the ranking, and the last 20 % are held out. What the
stages have to find are the films in it that the user gave four stars or more.

The ranking learns from films that the retrieval has not seen: of those it has,
it knows who likes them, and the ranking would trust it too much.
"""

keras.utils.set_random_seed(args.seed)
rng = np.random.default_rng(args.seed)
try:
    if args.data:
        ratings, users, items = read_movielens(args.data)
    else:
        ratings, users, items = made_up(args.users, args.items, seed=args.seed)
except (OSError, ValueError, KeyError) as error:
    sys.exit(f"Cannot read --data {args.data!r}: {error}")
num_users, num_items = len(users["user_id"]), len(items["item_id"])

user, item, liked = ratings["user"], ratings["item"], ratings["rating"] >= 4
order = np.lexsort((ratings["time"], user))
user, item, liked = user[order], item[order], liked[order]
seen_by = np.bincount(user, minlength=num_users)
place = np.arange(len(user)) - np.repeat(np.cumsum(seen_by) - seen_by, seen_by)
share = place / seen_by[user]
first, second, last = share < 0.6, (share >= 0.6) & (share < 0.8), share >= 0.8


def matrix(rows):
    """Whether a user is with a film in these rows."""
    pairs = np.zeros((num_users, num_items), bool)
    pairs[user[rows], item[rows]] = True
    return pairs


seen_first, seen = matrix(first), matrix(first | second)
wanted = matrix(last & liked) & ~seen
evaluated = np.flatnonzero(wanted.any(axis=1))
print(
    f"{args.backend}: {num_users} users, {num_items} films, "
    f"{first.sum()} and {second.sum()} ratings to train;\n"
    f"{len(evaluated)} users with films to find, "
    f"{wanted.sum() / len(evaluated):.1f} of {num_items} on average"
)
fewest = num_items - int(seen.sum(axis=1).max())
if args.candidates > fewest:
    sys.exit(
        f"--candidates must be at most {fewest}, the films that are new to a "
        f"user. Received: {args.candidates}"
    )

"""
## Retrieval

A vector for each user and each film. In a batch of liked films each user has to
know the own one from those of all others (in-batch softmax). Films that many
people like are met more often as a wrong answer; subtracting the logarithm of
how often makes up for it.
"""

DIM = 32


def tower(name, size, output):
    rows = keras.Input((), dtype="int32", name=name)
    x = keras.layers.Embedding(size, DIM)(rows)
    x = x + keras.layers.Dense(DIM)(keras.layers.Dense(DIM, "relu")(x))
    return keras.Model(rows, keras.layers.UnitNormalization()(x), name=output)


user_tower = tower("user", num_users, "user_tower")
item_tower = tower("item", num_items, "item_tower")
like_user, like_item = user[first & liked], item[first & liked]
often = np.bincount(like_item, minlength=num_items) / len(like_item)
inputs = {
    "user": user_tower.input,
    "item": item_tower.input,
    "log_often": keras.Input((), name="log_often"),
}
scores = ops.matmul(
    user_tower(inputs["user"]), ops.transpose(item_tower(inputs["item"]))
)
scores = 10.0 * scores - inputs["log_often"]  # (B, B): films in columns
retrieval = keras.Model(inputs, scores)


def in_batch_softmax(_, scores):
    return -ops.diagonal(ops.log_softmax(scores, axis=-1))


retrieval.compile(keras.optimizers.Adam(5e-3), in_batch_softmax)
retrieval.fit(
    {
        "user": like_user,
        "item": like_item,
        "log_often": np.log(often[like_item]).astype("float32"),
    },
    np.zeros(len(like_user), "float32"),  # Keras wants labels.
    batch_size=min(256, args.batch_size),
    epochs=args.epochs,
    verbose=0,
)
user_vectors = user_tower.predict(np.arange(num_users), verbose=0)
item_vectors = item_tower.predict(np.arange(num_items), verbose=0)
similarity = user_vectors @ item_vectors.T


def retrieve(known):
    """The candidates of each user, without the films known already."""
    scores = np.where(known, -np.inf, similarity)
    return np.argsort(-scores, axis=1)[:, : args.candidates]


"""
## Ranking

Two tasks: `click`, whether the user sees the film, and `like`, whether they
like it then. A film not seen has no such label: `sample_space="click"`. Heads
"esmm" predict the probability of both, by which the candidates are ordered.

It learns from the candidates that it would have got after the first part, all
of them, and from nothing else: films that a user saw without their being
candidates would teach it that what is not similar is seen. The similarity of
both towers is a feature among others; the name of the user is none, as a few
films each are too little to learn it again.
"""

rows_user = np.repeat(np.arange(num_users), args.candidates)
rows_item = retrieve(seen_first).ravel()
labels = {
    "click": matrix(second)[rows_user, rows_item].astype("float32"),
    "like": matrix(second & liked)[rows_user, rows_item].astype("float32"),
}


def columns_of(user, item):
    columns = features_of(users, items, user, item)
    return {**columns, "similarity": similarity[user, item]}


columns = columns_of(rows_user, rows_item)
features = keras_moe.layers.FeatureEmbedding(
    [
        *(
            keras_moe.layers.Categorical(name)
            for name in ("item_id", "age", "sex", "occupation")
        ),
        keras_moe.layers.MultiCategorical("genres", separator="|"),
        keras_moe.layers.Numeric("year", missing_indicator=True),
        keras_moe.layers.Numeric("similarity"),
    ],
    embedding_dim=16,
    embeddings_regularizer=keras.regularizers.L2(1e-5),
)
features.adapt(columns)
ranker = keras_moe.models.PLE(
    [
        keras_moe.models.TaskSpec("click", tower_units=(16,)),
        keras_moe.models.TaskSpec(
            "like", tower_units=(16,), sample_space="click"
        ),
    ],
    features,
    num_shared_experts=3,
    num_task_experts=2,
    expert_units=(32,),
    heads="esmm",
)
ranker.compile(keras.optimizers.Adam(2e-3))
ranker.fit(
    features.encode(columns),
    labels,
    batch_size=args.batch_size,
    epochs=args.epochs,
    verbose=0,
)

"""
## What each stage finds

For the users with something to find. Recall: the share of the films to find
that are among the first 10. NDCG counts those further up for more. GAUC: how
often a candidate to find comes before one that is none.
"""

shown = retrieve(seen)[evaluated]
x = features.encode(
    columns_of(np.repeat(evaluated, shown.shape[1]), shown.ravel())
)
found = wanted[evaluated[:, None], shown]
predictions = ranker.predict(x, batch_size=8192, verbose=0)
orders = {
    "by chance": rng.random(shown.shape),
    "retrieval": similarity[evaluated[:, None], shown],
    "PLE, click": predictions["click"].reshape(shown.shape),
    "PLE, click and like": predictions["like"].reshape(shown.shape),
}
to_find = wanted[evaluated].sum(axis=1)


def quality(score, k=10):
    """Recall and NDCG of the first `k` candidates, and GAUC of all."""
    order = np.argsort(-score, axis=1)[:, :k]
    hits = np.take_along_axis(found, order, axis=1)
    worth = 1 / np.log2(np.arange(k) + 2)
    ideal = np.cumsum(worth)[np.minimum(to_find, k) - 1]
    group = np.repeat(np.arange(len(found)), found.shape[1])
    return {
        f"recall@{k}": float((hits.sum(axis=1) / to_find).mean()),
        f"ndcg@{k}": float((hits @ worth / ideal).mean()),
        "gauc": keras_moe.metrics.group_auc(
            found.ravel(), score.ravel(), group
        ),
    }


figures = {name: quality(score) for name, score in orders.items()}
bound = float((found.sum(axis=1) / to_find).mean())

with report.whole_files(args.output) as folder:
    report.draw_gates(
        folder / "gates.png",
        report.gate_panels("PLE", ranker, x),
        "Mean weight of each expert for each task, in %",
    )
    difference = report.save(ranker, folder / "ranker.keras", x)
    retrieval_files = (("user_tower", user_tower), ("item_tower", item_tower))
    for name, model in retrieval_files:
        model.save(folder / f"{name}.keras")
    report.write_summary(
        folder / "summary.json",
        args,
        orders=figures,
        recall_of_candidates=bound,
        reloaded_max_difference=difference,
    )

print(
    f"\nThe {args.candidates} candidates hold {bound:.1%} of the films to find."
    " Ordered"
)
report.print_table(
    ["", *figures["retrieval"]],
    [
        [name, *(f"{value:.4f}" for value in row.values())]
        for name, row in figures.items()
    ],
)
print(
    f"\nWritten to {args.output}: both towers, ranker.keras (loaded again, it"
)
print("predicts the same), summary.json and gates.png")
