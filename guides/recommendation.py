"""A recommendation model from features to a saved file.

What people click and what they then buy are two tasks for one model. Here we
make up an online shop and walk through what such a model takes: features as
they are in the data, tasks (one of them without labels for most examples), a
trunk of experts, a weighting of the tasks, training with `fit`, a look at the
gates, and saving. Run this file as it is, on any backend:

    KERAS_BACKEND=torch python guides/recommendation.py
"""

import os
import tempfile

import keras
import numpy as np

import keras_moe

# ## The data
#
# A dict of columns, or a pandas frame: strings, numbers, lists of any length.
# Some of it is missing. A label that is not known is NaN: only who clicked
# could buy.

CITIES = np.array(["Rome", "Oslo", "Lima", "Kyiv", None], object)
TAGS = np.array(["new", "sale", "gift", "eco", "local"])


def make_shop(num_examples, seed):
    rng = np.random.default_rng(seed)
    city = rng.integers(0, len(CITIES), num_examples)
    age = rng.uniform(18, 80, num_examples)
    price = rng.lognormal(3, 1, num_examples)
    has_tag = rng.random((num_examples, len(TAGS))) < 0.3
    # The young click on what is new, and the rich cities buy.
    clicks = has_tag @ [1.5, 1, -1, 0, 0] - (age - 50) / 15
    buys = np.array([1, 2, -1, -2, 0])[city] - np.log(price) + 3
    click = rng.random(num_examples) < 1 / (1 + np.exp(-clicks))
    buy = rng.random(num_examples) < 1 / (1 + np.exp(-buys))
    age[rng.random(num_examples) < 0.1] = np.nan
    columns = {
        "city": CITIES[city],
        "age": age,
        "price": price,
        "tags": [list(TAGS[row]) for row in has_tag],
    }
    labels = {
        "click": click.astype("float32"),
        "buy": np.where(click, buy, np.nan).astype("float32"),
    }
    return columns, labels


# ## The features
#
# Each gives a vector: `Categorical` and `MultiCategorical` from a table of
# learned vectors, `Numeric` its own value. `adapt` learns vocabularies and
# means from the training data (a frame, a dict, or a stream of either), and
# `encode` makes numbers of any data then. Missing and unknown values have
# vectors of their own. `FeatureEmbedding.from_data(columns)` would have guessed
# such a list from the columns.


def make_features(columns):
    features = keras_moe.layers.FeatureEmbedding(
        [
            keras_moe.layers.Categorical("city"),
            keras_moe.layers.Bucketized("age", num_buckets=6),
            keras_moe.layers.Numeric("price", log=True),
            keras_moe.layers.MultiCategorical("tags"),
        ],
        embedding_dim=8,
    )
    features.adapt(columns)
    return features


# ## The model
#
# A task has a name, a type and a tower. `sample_space="click"` says that `buy`
# is about what was clicked: its label counts only there. MMoE has experts that
# all tasks share, and a gate for each task that mixes them. `SharedBottom`,
# `OMoE`, `CGC`, `PLE`, `AdaTT`, `STEM` and `HoME` take the same arguments but
# for the number of their experts.


def make_model(features):
    tasks = [
        keras_moe.models.TaskSpec("click", tower_units=(8,)),
        keras_moe.models.TaskSpec(
            "buy", tower_units=(8,), sample_space="click"
        ),
    ]
    model = keras_moe.models.MMoE(tasks, features, num_experts=4)
    # The losses are those of the tasks' types, the metrics are AUCs, and what
    # each task counts is learned. `"static"`, the default, is the sum.
    model.compile(keras.optimizers.Adam(1e-2), task_weighting="uncertainty")
    return model


def main():
    keras.utils.set_random_seed(0)
    columns, labels = make_shop(4000, seed=0)
    columns_test, labels_test = make_shop(2000, seed=1)
    features = make_features(columns)
    model = make_model(features)
    x, x_test = features.encode(columns), features.encode(columns_test)

    # ## Training
    #
    # One number of several logs says when to stop.
    history = model.fit(
        x,
        labels,
        batch_size=256,
        epochs=8,
        validation_split=0.2,
        callbacks=[
            keras_moe.callbacks.CombineLogs(["val_click_auc", "val_buy_auc"]),
            keras.callbacks.EarlyStopping(
                "val_combined",
                mode="max",
                patience=2,
                restore_best_weights=True,
            ),
        ],
        verbose=0,
    ).history
    print("mean of the AUCs:", *(f"{v:.3f}" for v in history["val_combined"]))
    logs = model.evaluate(x_test, labels_test, verbose=0, return_dict=True)
    print(f"test: click {logs['click_auc']:.3f}, buy {logs['buy_auc']:.3f}")

    # ## Which task uses which expert
    gates = model.gate_weights(x_test)
    for task, weights in gates.items():  # (examples, experts)
        print(f"{task}:", *(f"{w:.2f}" for w in weights.mean(axis=0)))

    # ## Saving
    #
    # What the features learned is in the file: the loaded model encodes new
    # data by itself, with a city that no one has seen.
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "model.keras")
        model.save(path)
        again = keras.saving.load_model(path)
    encode = again.get_layer("features").encode
    new = {"city": ["Cairo"], "age": [None], "price": [9.9], "tags": [["new"]]}
    chances = again.predict(encode(new), verbose=0)
    print("somebody new:", {t: f"{p[0, 0]:.3f}" for t, p in chances.items()})
    before = model.predict(x_test, verbose=0)
    after = again.predict(encode(columns_test), verbose=0)
    difference = max(np.abs(before[t] - after[t]).max() for t in before)
    print(f"largest difference after loading: {difference:.1e}")
    return logs, gates, difference


# ## Where to go from here
#
# - More data than fits into memory? `adapt` takes a stream, and `fit` a
#   `tf.data.Dataset` or a `keras.utils.PyDataset` of what `encode` gives.
# - Other experts, gates or trunks? `keras_moe.layers.MultiGateMoE` is what the
#   models are made of, and `keras_moe.models.MultiTaskModel` makes a model with
#   tasks of any functional graph.
# - Probability of click and purchase together? `heads="esmm"`.
# - `examples/recommendation` compares the models on real data.

if __name__ == "__main__":
    main()
