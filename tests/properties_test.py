"""What holds for any number of tokens, experts and choices."""

import keras
import numpy as np
from absl.testing import parameterized
from hypothesis import given
from hypothesis import settings
from hypothesis import strategies
from keras import ops

from keras_moe import routers
from keras_moe.experts import GLUExperts
from keras_moe.layers import Capacity
from keras_moe.layers import MoE
from keras_moe.ops.dispatch_plan import DROP_POLICIES
from tests.moe.sending import send_rows
from tests.test_case import TestCase

DIM = 3
# Few sizes: on JAX each new shape is compiled.
SIZES = {
    "num_tokens": strategies.sampled_from([1, 2, 9]),
    "num_experts": strategies.sampled_from([2, 5]),
    "top_k": strategies.sampled_from([1, 2]),
    "seed": strategies.integers(0, 1000),
}
# The same examples every time.
# Each example has sizes of its own. Where that means compiling, a few are to
# show that the backends agree; many are drawn on PyTorch.
NUM_EXAMPLES = 8 if keras.config.backend() == "torch" else 3
SETTINGS = settings(max_examples=NUM_EXAMPLES, deadline=None, derandomize=True)

# Routers that route each token on its own: whether their weights sum to one.
TOKEN_WISE = {
    "top_k": (lambda e, k: routers.TopKRouter(e, k), lambda k: k > 1),
    "sigmoid_in_groups": (
        lambda e, k: routers.TopKRouter(
            e,
            k,
            score_activation="sigmoid",
            expert_bias=True,
            num_expert_groups=1 if e % 2 else 2,
            group_score=1,
            top_k_groups=2,
        ),
        lambda k: k > 1,
    ),
    "noisy_top_k": (
        lambda e, k: routers.NoisyTopKRouter(e, k),
        lambda k: k > 1,
    ),
    "entmax": (lambda e, k: routers.EntmaxRouter(e), lambda k: True),
    "sparsemax": (lambda e, k: routers.EntmaxRouter(e, 2.0), lambda k: True),
    "top_p": (
        lambda e, k: routers.TopPRouter(e, 0.6, normalize_weights=True),
        lambda k: True,
    ),
    "relu": (lambda e, k: routers.ReLURouter(e, top_k=k), lambda k: False),
    "dense": (lambda e, k: routers.DenseRouter(e), lambda k: True),
    "cosine": (lambda e, k: routers.CosineRouter(e, k), lambda k: k > 1),
    "mlp": (
        lambda e, k: routers.MLPRouter(e, k, hidden_dims=(4,)),
        lambda k: k > 1,
    ),
    "d_select_k": (lambda e, k: routers.DSelectKRouter(e, k), lambda k: False),
    "sparse_mixer": (
        lambda e, k: routers.SparseMixerRouter(e, k),
        lambda k: False,
    ),
    "expert_choice": (lambda e, k: routers.ExpertChoiceRouter(e), None),
    "sinkhorn": (lambda e, k: routers.SinkhornRouter(e, k), None),
    "base": (lambda e, k: routers.BASERouter(e), None),
}
NAMED = [(name, name) for name in TOKEN_WISE]


def make(name, num_experts, top_k, seed, **kwargs):
    keras.utils.set_random_seed(seed)
    router = TOKEN_WISE[name][0](num_experts, top_k)
    layer = MoE(
        router=router,
        experts=GLUExperts(num_experts, 2),
        losses=None,
        statistics=None,
        **kwargs,
    )
    layer.build((None, DIM))
    for variable in router.trainable_variables:
        # Away from initializers of zeros, where everything is a tie.
        variable.assign(np.random.default_rng(seed).normal(size=variable.shape))
    return layer


def tokens_of(num_tokens, seed):
    rng = np.random.default_rng(seed + 1)
    return rng.normal(size=(num_tokens, DIM)).astype("float32")


def as_numpy(routing):
    return (
        ops.convert_to_numpy(routing.expert_indices),
        ops.convert_to_numpy(routing.expert_weights),
    )


class RouterPropertiesTest(TestCase):
    @parameterized.named_parameters(NAMED)
    def test_weights_and_counts(self, name):
        @SETTINGS
        @given(**SIZES)
        def check(num_tokens, num_experts, top_k, seed):
            layer = make(name, num_experts, top_k, seed)
            x = tokens_of(num_tokens, seed)
            indices, weights = as_numpy(layer.route(x))
            exists = indices < num_experts
            self.assertTrue((indices >= 0).all() and (weights >= 0).all())
            self.assertTrue((indices <= num_experts).all())
            self.assertAllEqual(weights[~exists], np.zeros((~exists).sum()))
            # No expert twice.
            for row in np.sort(indices, axis=1):
                chosen = row[row < num_experts]
                self.assertEqual(len(set(chosen)), len(chosen))
            sums_to_one = TOKEN_WISE[name][1]
            if sums_to_one is not None and sums_to_one(top_k):
                self.assertAllClose(
                    weights.sum(axis=1), np.ones(num_tokens), atol=1e-5
                )
            sizes = send_rows(layer).group_sizes
            layer(x)
            self.assertEqual(int(ops.sum(sizes[0])), exists.sum())

        check()

    @parameterized.named_parameters(NAMED)
    def test_masked_tokens_change_nothing(self, name):
        @SETTINGS
        @given(**SIZES)
        def check(num_tokens, num_experts, top_k, seed):
            layer = make(name, num_experts, top_k, seed)
            x = tokens_of(num_tokens, seed)
            padded = np.full((num_tokens + 3, DIM), np.nan, "float32")
            mask = np.zeros(num_tokens + 3, bool)
            where = np.random.default_rng(seed).permutation(num_tokens + 3)
            mask[where[:num_tokens]] = True
            padded[mask] = x
            outputs = layer(padded, mask=ops.array(mask))
            outputs = ops.convert_to_numpy(outputs)
            self.assertAllEqual(outputs[~mask], np.zeros((3, DIM)))
            if name == "expert_choice":
                # Its capacity is a share of the batch, padding included.
                return self.assertTrue(np.isfinite(outputs).all())
            self.assertAllClose(outputs[mask], layer(x), atol=1e-5)

        check()

    @parameterized.named_parameters(
        [(n, n) for n, (_, sums) in TOKEN_WISE.items() if sums is not None]
    )
    def test_permuting_tokens_permutes_outputs(self, name):
        @SETTINGS
        @given(**SIZES)
        def check(num_tokens, num_experts, top_k, seed):
            layer = make(name, num_experts, top_k, seed)
            x = tokens_of(num_tokens, seed)
            order = np.random.default_rng(seed).permutation(num_tokens)
            outputs = ops.convert_to_numpy(layer(x))
            self.assertAllClose(layer(x[order]), outputs[order], atol=1e-5)

        check()


class CapacityPropertiesTest(TestCase):
    @parameterized.parameters(*DROP_POLICIES)
    def test_capacity(self, policy):
        @SETTINGS
        @given(size=strategies.sampled_from([1, 2, 4]), **SIZES)
        def check(num_tokens, num_experts, top_k, seed, size):
            capacity = Capacity(size=size, drop_policy=policy, seed=seed)
            layer = make("top_k", num_experts, top_k, seed, capacity=capacity)
            x = tokens_of(num_tokens, seed)
            indices, weights = as_numpy(layer.route(x))
            sizes = send_rows(layer).group_sizes
            outputs = ops.convert_to_numpy(layer(x, training=True))
            counts = np.bincount(indices.reshape(-1), minlength=num_experts)
            # As many as there is room for, and never more.
            self.assertAllEqual(sizes[0], np.minimum(counts, size))
            # Who is dropped, by any policy, gives exactly zero.
            if top_k == 1:
                dropped = (outputs == 0).all(axis=1).sum()
                room = np.minimum(counts, size).sum()
                self.assertEqual(dropped, num_tokens - room)

        check()
