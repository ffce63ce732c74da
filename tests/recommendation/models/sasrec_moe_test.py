import os

import keras
import numpy as np

from keras_moe import models
from tests.recommendation.models.small_data import array
from tests.test_case import TestCase


def make_model(**kwargs):
    arguments = {"num_blocks": 1, "num_experts": 3, **kwargs}
    return models.SASRecMoE(12, 5, embedding_dim=4, **arguments)


def make_ids():
    rng = np.random.default_rng(0)
    ids = rng.integers(1, 13, (6, 6))
    ids[0, :3] = ids[1, 4:] = ids[2, 5:] = 0  # padding on both sides
    return ids[:, :-1], ids[:, 1:]


class SASRecMoETest(TestCase):
    def test_causal_and_masked(self):
        model = make_model(num_blocks=2, num_heads=2)
        ids, _ = make_ids()
        logits = model.predict(ids, verbose=0)
        self.assertEqual(logits.shape, (6, 5, 13))
        self.assertTrue((logits[..., 0] == -1e9).all())
        for position in (2, 4):
            changed = ids.copy()
            changed[3:, position] = changed[3:, position] % 12 + 1
            found = model.predict(changed, verbose=0)
            np.testing.assert_allclose(
                found[:, :position], logits[:, :position], atol=1e-6
            )
            gap = np.abs(found - logits)[3:, position:, 1:].max(axis=(1, 2))
            self.assertGreater(gap.min(), 1e-4)
        # What is at padded places reaches nobody.
        items = model.get_layer("items")
        table = array(items.embeddings).copy()
        table[0] = 100.0
        items.embeddings.assign(table)
        found = model.predict(ids, verbose=0)
        np.testing.assert_allclose(
            found[ids > 0][:, 1:], logits[ids > 0][:, 1:], atol=1e-5
        )

    def test_loss(self):
        model = make_model(losses=None, statistics=None)
        ids, following = make_ids()
        model.compile("adam")
        logits = model.predict(ids, verbose=0).astype("float64")
        loss = model.evaluate(ids, following, batch_size=6, verbose=0)
        p = np.exp(logits) / np.exp(logits).sum(axis=-1, keepdims=True)
        chosen = np.take_along_axis(p, following[..., None], axis=-1)[..., 0]
        expected = -np.log(chosen[following > 0]).mean()
        np.testing.assert_allclose(loss, expected, rtol=1e-4)

    def test_loss_whatever_the_batches(self):
        model = make_model(statistics=None, dropout=0.0)
        ids, following = make_ids()
        following = following.copy()
        following[:3] = 0  # sequences without a label
        model.compile(keras.optimizers.SGD(0.0))
        logits = model.predict(ids, verbose=0).astype("float64")
        p = np.exp(logits) / np.exp(logits).sum(axis=-1, keepdims=True)
        chosen = np.take_along_axis(p, following[..., None], axis=-1)[..., 0]
        known = following > 0
        rng = np.random.default_rng(0)
        for weight in (
            None,
            rng.random(6),
            rng.random((6, 5)),
            (rng.random((6, 5)) < 0.5).astype("float32"),
        ):
            factors = np.ones((6, 5)) if weight is None else weight
            factors = factors.reshape(6, -1)
            losses = -np.log(np.where(known, chosen, 1)) * factors
            expected = losses.sum() / known.sum()
            for size in (1, 4, 6):
                loss = model.evaluate(
                    ids,
                    following,
                    sample_weight=weight,
                    batch_size=size,
                    verbose=0,
                )
                np.testing.assert_allclose(loss, expected, rtol=1e-4)
        logs = model.fit(
            ids,
            following,
            batch_size=4,
            validation_data=(ids, following, weight),
            validation_batch_size=4,
            shuffle=False,
            verbose=0,
        ).history
        np.testing.assert_allclose(logs["val_loss"], [expected], rtol=1e-4)
        # In training the balancing losses are added, in mean over examples.
        plain = -np.log(chosen[known]).mean()
        self.assertBetween(logs["loss"][0] - plain, 1e-3, 0.1)
        nothing = model.evaluate(ids, 0 * following, verbose=0)
        self.assertTrue(np.isnan(nothing))

    def test_fit_and_save(self):
        model = make_model(dropout=0.1)
        ids, following = make_ids()
        model.compile(keras.optimizers.Adam(0.05))
        logs = model.fit(ids, following, epochs=4, verbose=0).history
        self.assertLess(logs["loss"][-1], logs["loss"][0])
        self.assertTrue(any("routing_entropy" in name for name in logs))
        path = os.path.join(self.get_temp_dir(), "model.keras")
        model.save(path)
        loaded = keras.models.load_model(path)
        np.testing.assert_allclose(
            loaded.predict(ids, verbose=0),
            model.predict(ids, verbose=0),
            rtol=1e-5,
            atol=1e-5,
        )
        self.assertEqual(
            len(loaded.optimizer.variables), len(model.optimizer.variables)
        )
        self.assertEqual(loaded.get_config(), model.get_config())

    def test_recommend(self):
        model = make_model()
        ids, _ = make_ids()
        logits = model.predict(ids, verbose=0)
        last = [max(np.flatnonzero(row)) for row in ids]
        scores = logits[np.arange(6), last]
        found = model.recommend(ids, k=4)
        np.testing.assert_array_equal(found, np.argsort(-scores)[:, :4])
        others = model.recommend(ids, k=12, exclude_seen=True)
        for row, seen in zip(others, ids, strict=True):
            seen = set(seen) - {0}
            new = row[row > 0]
            self.assertEqual(set(new), set(range(1, 13)) - seen)
            self.assertTrue((row[len(new) :] == 0).all())

    def test_errors(self):
        for options, message in (
            ({"num_heads": 3}, "`num_heads` must divide"),
            ({"top_k": 4}, "`top_k` must be"),
            ({"router": keras.layers.Dense(3)}, "`router` must be a name"),
            ({"router": "expert_choice", "top_k": None}, "causal"),
        ):
            with self.assertRaisesRegex(ValueError, message):
                make_model(**options)
        model = make_model()
        ids, following = make_ids()
        for wrong, message in (
            (ids + 12, "whole numbers from 0 to 12"),
            (ids[:, 1:], r"shape \(batch, 5\)"),
            (0 * ids, "must have an item"),
        ):
            with self.assertRaisesRegex(ValueError, message):
                model.recommend(wrong)
        model.compile("adam")
        with self.assertRaisesRegex(ValueError, "whole numbers"):
            model.fit(ids, following - 1)
        with self.assertRaisesRegex(ValueError, "`k` must be"):
            model.recommend(ids, k=13)
