"""Another number of experts in inference than in training."""

import functools

import keras
import numpy as np
import pytest
from absl.testing import parameterized
from keras import ops

from keras_moe.conversion import set_eval_top_k
from keras_moe.experts import MLPExperts
from keras_moe.layers import MoE
from keras_moe.routers import DenseRouter
from keras_moe.routers import DSelectKRouter
from keras_moe.routers import GShardRouter
from keras_moe.routers import HashRouter
from keras_moe.routers import HierarchicalRouter
from keras_moe.routers import MLPRouter
from keras_moe.routers import NoisyTopKRouter
from keras_moe.routers import RandomRouter
from keras_moe.routers import SinkhornRouter
from keras_moe.routers import SparseMixerRouter
from keras_moe.routers import TaskRouter
from keras_moe.routers import TopKRouter
from tests.test_case import TestCase

X = np.random.default_rng(0).normal(size=(12, 6)).astype("float32")


def moe(router=None, **kwargs):
    router = TopKRouter(4, 2) if router is None else router
    experts = MLPExperts(router.num_experts, 3)
    return MoE(router=router, experts=experts, statistics=None, **kwargs)


def model_of(eval_top_k=None):
    """A model in a model: the inner one, too, has compiled functions."""
    inner = keras.Sequential(
        [keras.Input((6,)), moe(TopKRouter(4, 2, eval_top_k=eval_top_k))]
    )
    inputs = keras.Input((6,))
    model = keras.Model(inputs, inputs + inner(inputs))
    model.compile("sgd", "mse")
    return model


class SetEvalTopKTest(TestCase):
    def test_predict_is_that_of_a_model_made_so(self):
        model = model_of()
        model.fit(X, np.sin(3 * X), batch_size=4, verbose=0)
        inner = model.layers[1]
        before = model.predict(X, verbose=0), inner.predict(X, verbose=0)
        model.evaluate(X, X, verbose=0)
        set_eval_top_k(model, 1)
        fresh = model_of(eval_top_k=1)
        fresh.set_weights(model.get_weights())
        expected = fresh.predict(X, verbose=0)
        self.assertGreater(np.abs(expected - before[0]).max(), 1e-3)
        self.assertAllClose(model.predict(X, verbose=0), expected)
        self.assertAllClose(inner.predict(X, verbose=0), expected - X)
        self.assertAllClose(
            model.evaluate(X, X, verbose=0), np.mean((expected - X) ** 2)
        )
        routing = inner.layers[0].route(X)
        self.assertEqual(tuple(routing.expert_indices.shape), (12, 1))
        # As in training, weights are normalized: one expert has weight 1.
        self.assertAllClose(routing.expert_weights, np.ones((12, 1)))
        path = f"{self.get_temp_dir()}/model.keras"
        model.save(path)
        loaded = keras.saving.load_model(path)
        self.assertAllClose(loaded.predict(X, verbose=0), expected)
        self.assertEqual(loaded.layers[1].layers[0].router.eval_top_k, 1)
        set_eval_top_k(model, None)
        self.assertAllClose(model.predict(X, verbose=0), before[0])
        self.assertAllClose(inner.predict(X, verbose=0), before[1])

    def test_training_goes_on_with_top_k(self):
        layer = moe()
        layer.build((None, 6))
        set_eval_top_k(layer, 3)
        for training, top_k in ((True, 2), (False, 3)):
            routing = layer.route(X, training=training)
            self.assertEqual(tuple(routing.expert_indices.shape), (12, top_k))
            self.assertAllClose(
                ops.sum(routing.expert_weights, axis=-1), np.ones(12)
            )
        self.assertEqual(layer.router.choices_per_token, 3)

    @pytest.mark.filterwarnings("ignore:A MoE layer is trained without")
    def test_part_that_stays_in_inference_while_the_whole_trains(self):
        class Model(keras.Model):
            def __init__(self):
                super().__init__()
                self.part = moe()
                self.last = keras.layers.Dense(6)

            def call(self, x):
                return self.last(self.part(x, training=False))

        model = Model()
        model.compile(keras.optimizers.SGD(0.0), "mse")
        target = np.zeros_like(X)
        model.fit(X, target, batch_size=12, verbose=0)
        set_eval_top_k(model, 1)
        loss = model.fit(X, target, batch_size=12, verbose=0).history["loss"]
        predicted = model.predict(X, verbose=0)
        self.assertAllClose(loss[0], np.mean(np.square(predicted)))

    @parameterized.named_parameters(
        ("top_k", lambda k: TopKRouter(4, 3, eval_top_k=k)),
        ("gshard", lambda k: GShardRouter(4, 3, eval_top_k=k)),
        ("noisy", lambda k: NoisyTopKRouter(4, 3, eval_top_k=k)),
        ("mlp", lambda k: MLPRouter(4, 3, hidden_dims=5, eval_top_k=k)),
        ("sinkhorn", lambda k: SinkhornRouter(4, 3, eval_top_k=k)),
        ("sparse_mixer", lambda k: SparseMixerRouter(4, 3, eval_top_k=k)),
        (
            "always_on",
            lambda k: TopKRouter(5, 3, num_always_on=1, eval_top_k=k),
        ),
    )
    def test_the_best_of_each_router(self, make):
        every, best = make(None), make(1)
        for router in (every, best):
            router.build((None, 6))
        best.set_weights(every.get_weights())
        chosen = ops.convert_to_numpy(every(X).expert_indices)
        fewer = ops.convert_to_numpy(best(X).expert_indices)
        self.assertAllEqual(fewer[:, 0], chosen[:, 0])
        self.assertEqual(fewer.shape[1], chosen.shape[1] - 2)
        more = best(X, training=True).expert_indices
        self.assertEqual(tuple(more.shape), chosen.shape)
        self.assertEqual(best.choices_per_token, chosen.shape[1])
        again = type(best).from_config(best.get_config())
        self.assertEqual(again.get_config(), best.get_config())
        if hasattr(best(X), "load"):
            self.assertAllEqual(ops.sum(best(X).load, axis=-1), np.ones(12))

    def test_gshard_draws_among_more_or_fewer_choices(self):
        for policy in ("random", "sampling"):
            for eval_top_k in (1, 2, 4):
                router = GShardRouter(
                    4,
                    3,
                    policy=policy,
                    threshold=[1e-9, 1e-9],
                    random_in_inference=True,
                    eval_top_k=eval_top_k,
                )
                indices = ops.convert_to_numpy(router(X).expert_indices)
                # The thresholds are so low that all are kept.
                self.assertEqual(indices.shape, (12, eval_top_k))
                for row in indices:
                    self.assertLen(set(row), eval_top_k)
                self.assertLess(indices.max(), 4)

    def test_assigned_directly(self):
        hierarchical = functools.partial(HierarchicalRouter, 2)
        for make in (
            *(TopKRouter, SinkhornRouter, SparseMixerRouter, hierarchical),
        ):
            for name in ("top_k", "eval_top_k"):
                with self.assertRaisesRegex(
                    AttributeError,
                    rf"(?s)set_eval_top_k\(model, top_k\).*{name}=3",
                ):
                    setattr(make(4), name, 3)

    def test_errors(self):
        for value, make in (
            (5, lambda k=None: TopKRouter(4, 2, eval_top_k=k)),
            (0, lambda k=None: SinkhornRouter(4, 2, eval_top_k=k)),
            (True, lambda k=None: SparseMixerRouter(4, 2, eval_top_k=k)),
            (4, lambda k=None: TopKRouter(4, 2, num_always_on=1, eval_top_k=k)),
            (5, lambda k=None: HierarchicalRouter(2, 4, 2, 3, eval_top_k=k)),
        ):
            message = f"`eval_top_k` must be an int .*eval_top_k={value}"
            with self.assertRaisesRegex(ValueError, message):
                set_eval_top_k(make(), value)
            with self.assertRaisesRegex(ValueError, message):
                make(value)
        grouped = TopKRouter(8, 2, num_expert_groups=4)
        with self.assertRaisesRegex(ValueError, "hold `eval_top_k` experts"):
            set_eval_top_k(grouped, 3)
        allowed = [[True, True, False], [False, True, True]]
        tasks = TaskRouter(3, 2, top_k=1, allowed_experts=allowed)
        set_eval_top_k(tasks, 2)
        with self.assertRaisesRegex(ValueError, "at least `eval_top_k`"):
            set_eval_top_k(tasks, 3)
        with self.assertRaisesRegex(ValueError, "at least `eval_top_k`"):
            TaskRouter(3, 2, 1, allowed_experts=allowed, eval_top_k=3)

    def test_nothing_changes_if_one_router_refuses(self):
        model = keras.Sequential(
            [keras.Input((6,)), moe(TopKRouter(8, 2)), moe(TopKRouter(4, 2))]
        )
        with self.assertRaisesRegex(ValueError, "eval_top_k=5"):
            set_eval_top_k(model, 5)
        found = [layer.router.eval_top_k for layer in model.layers]
        self.assertEqual(found, [None, None])
        set_eval_top_k(model, 4)
        found = [layer.router.eval_top_k for layer in model.layers]
        self.assertEqual(found, [4, 4])

    def test_hierarchical_takes_the_best_of_each_group(self):
        layer = moe(HierarchicalRouter(2, 3, 2, 2))
        layer.build((None, 6))
        before = layer.route(X)
        set_eval_top_k(layer, 1)
        routing = layer.route(X)
        self.assertEqual(layer.router.choices_per_token, 4)
        self.assertEqual(
            tuple(layer.route(X, training=True).expert_indices.shape), (12, 4)
        )
        probs = ops.convert_to_numpy(before.probs).reshape(12, 2, 3)
        chosen = ops.convert_to_numpy(routing.expert_indices)
        weights = ops.convert_to_numpy(routing.expert_weights)
        for token in range(12):
            groups = probs[token].sum(axis=-1)
            first = np.argmax(groups)  # the group with the larger weight
            best = [3 * i + np.argmax(probs[token, i]) for i in range(2)]
            self.assertEqual(
                chosen[token].tolist(), [best[first], best[1 - first]]
            )
            self.assertAllClose(
                weights[token], [groups[first], groups[1 - first]], atol=1e-6
            )

    def test_causal_layers_stay_causal(self):
        router = TopKRouter(4, 1)
        capacity = {"capacity_factor": 1.0, "causal": True}
        model = keras.Sequential(
            [
                keras.Input((6,)),
                moe(TopKRouter(4, 2)),
                moe(router, drop_policy="token", **capacity),
            ]
        )
        set_eval_top_k(model, 2)
        set_eval_top_k(model, None)
        # Another layer with the router, which is not in the model.
        other = moe(router, drop_policy="position", **capacity)
        message = "causal=True.*drop_policy='position'.*choices_per_token=2"
        for target in (model, other, router):
            with self.assertRaisesRegex(ValueError, message):
                set_eval_top_k(target, 2)
        found = [layer.router.eval_top_k for layer in model.layers]
        self.assertEqual(found, [None, None])
        set_eval_top_k(model, 1)
        self.assertEqual(router.eval_top_k, 1)

    def test_no_router(self):
        dense = keras.Sequential([keras.layers.Dense(2, name="last")])
        with self.assertRaisesRegex(ValueError, r"no router.*last \(Dense\)"):
            set_eval_top_k(dense, 1)
        for router, why in (
            (DenseRouter(4), "each token has all experts"),
            (HashRouter(4, num_ids=2), "its table .* no order of rank"),
            (RandomRouter(4), "it does not rank"),
            (DSelectKRouter(4), "its selectors learn"),
        ):
            name = type(router).__name__
            with self.assertRaisesRegex(
                ValueError, rf"routers.*\({name}\): {why}"
            ):
                set_eval_top_k(moe(router), 1)
        with self.assertRaisesRegex(ValueError, "model=None"):
            set_eval_top_k(None, 1)

    def test_in_containers_of_a_layer_of_ones_own(self):
        class Block(keras.layers.Layer):
            def __init__(self):
                super().__init__()
                self.moes = {"a": [moe()], "b": (moe(), moe())}

        block = Block()
        set_eval_top_k(block, 1)
        for layer in (*block.moes["a"], *block.moes["b"]):
            self.assertEqual(layer.router.eval_top_k, 1)
