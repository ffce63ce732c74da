import keras
import numpy as np
from absl.testing import parameterized
from keras import ops

from keras_moe.layers import EncoderBlock
from keras_moe.layers import MixtureOfHeads
from keras_moe.losses import LoadBalancingLoss
from keras_moe.routers import DenseRouter
from keras_moe.routers import TopKRouter
from tests.test_case import TestCase

X = np.random.default_rng(0).normal(size=(2, 5, 6)).astype("float32")


def built(*args, **kwargs):
    layer = MixtureOfHeads(*args, **{"losses": None, **kwargs})
    layer.build(X.shape)
    rng = np.random.default_rng(1)
    for variable in layer.trainable_variables:
        variable.assign(rng.normal(size=variable.shape))
    return layer


def softmax(x):
    x = np.exp(x - x.max(-1, keepdims=True))
    return x / x.sum(-1, keepdims=True)


def gates_of(layer, x, top_k):
    """In loops: the weight of each head for a token."""
    probs = softmax(x @ ops.convert_to_numpy(layer.router.kernel))
    chosen = np.argsort(-probs)[:top_k]
    routed = np.zeros_like(probs)
    routed[chosen] = probs[chosen] / probs[chosen].sum() * top_k
    if not layer.num_shared_heads:
        return routed
    shared = np.ones(1)
    if layer.num_shared_heads > 1:
        shared = softmax(x @ ops.convert_to_numpy(layer.shared_kernel))
    a, b = 2 * softmax(x @ ops.convert_to_numpy(layer.mix_kernel))
    shared = layer.num_shared_heads * shared
    return np.concatenate([a * shared, b * routed])


def outputs_of(layer, top_k, mask=None):
    heads = layer.attention
    weights = [
        [ops.convert_to_numpy(w) for w in dense.get_weights()]
        for dense in (heads.query_dense, heads.key_dense, heads.value_dense)
    ]
    out, bias = heads.output_dense.get_weights()
    outputs = np.zeros_like(X) + bias
    for b, tokens in enumerate(X):
        q, k, v = (
            np.einsum("td,dhk->htk", tokens, kernel) + bias[:, None]
            for kernel, bias in weights
        )
        scores = np.einsum("htk,hsk->hts", q, k) / np.sqrt(layer.key_dim)
        if mask is not None:
            scores[:, :, ~mask[b]] = -np.inf
        attended = np.einsum("hts,hsk->htk", softmax(scores), v)
        for t, token in enumerate(tokens):
            gates = gates_of(layer, token, top_k)
            weighted = attended[:, t] * gates[:, None]
            outputs[b, t] += np.einsum("hk,hkd->d", weighted, out)
    return outputs


class MixtureOfHeadsTest(TestCase):
    @parameterized.parameters((4, 2, 0), (5, 2, 2), (5, 1, 1))
    def test_definition(self, num_heads, top_k, num_shared):
        layer = built(num_heads, 3, top_k, num_shared)
        self.assert_relative(layer(X), outputs_of(layer, top_k))

    def test_all_heads(self):
        layer = built(4, 3, router=DenseRouter(4))
        self.assert_relative(layer(X), outputs_of(layer, 4))

    def test_mask(self):
        layer = built(5, 2, 2, 1, losses=[LoadBalancingLoss(1.0)])
        mask = np.array([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]], "bool")
        found = ops.convert_to_numpy(layer(X, mask=mask, training=True))
        wanted = outputs_of(layer, 2, mask)
        self.assert_relative(found[mask], wanted[mask])
        (loss,) = map(ops.convert_to_numpy, layer.losses)
        # What a masked token is does not matter.
        other = np.where(mask[..., None], X, 9.0).astype("float32")
        again = ops.convert_to_numpy(layer(other, mask=mask, training=True))
        self.assert_relative(again[mask], found[mask])
        self.assert_relative(layer.losses[0], loss)
        # A whole example may be masked.
        mask[0] = False
        found = ops.convert_to_numpy(layer(X, mask=mask))
        self.assertTrue(np.isfinite(found).all())

    def test_losses_and_logs(self):
        """`top_k` at balance, in training only."""
        layer = MixtureOfHeads(
            4,
            3,
            top_k=2,
            losses=[LoadBalancingLoss(0.5, normalize_by_top_k=False)],
        )
        layer(X)
        self.assertEqual(layer.losses, [])
        layer(X, training=True)
        probs = ops.convert_to_numpy(layer.route(X).probs)
        chosen = np.argsort(-probs, axis=1)[:, :2]
        share = np.bincount(chosen.ravel(), minlength=4) / len(probs)
        wanted = 0.5 * 4 * (share * probs.mean(0)).sum()
        self.assert_relative(ops.convert_to_numpy(layer.losses[0]), wanted)
        load = layer.statistics.result()["expert_load"]
        self.assert_relative(np.asarray(load), share / 2)

    def test_in_fit(self):
        inputs = keras.Input((5, 6))
        block = EncoderBlock(
            None,
            keras.layers.Dense(6),
            token_mixer=MixtureOfHeads(4, 3, 2, 1, name="heads"),
        )
        model = keras.Model(inputs, block(inputs))
        model.compile("adam", "mse")
        history = model.fit(X, X, epochs=2, verbose=0).history
        self.assertIn("routing_max_violation", history)
        path = self.get_temp_dir() + "/model.keras"
        model.save(path)
        loaded = keras.saving.load_model(path)
        self.assert_relative(loaded(X), ops.convert_to_numpy(model(X)))
        self.assertEqual(
            [w.path for w in loaded.weights], [w.path for w in model.weights]
        )

    def test_half_precision(self):
        layer = built(4, 3, 2, 1, dtype="mixed_bfloat16")
        outputs = layer(X)
        self.assertEqual(
            keras.backend.standardize_dtype(outputs.dtype), "bfloat16"
        )
        outputs = ops.convert_to_numpy(ops.cast(outputs, "float32"))
        wanted = outputs_of(layer, 2)
        self.assertLess(
            np.median(np.abs(outputs - wanted)), 0.05 * np.abs(wanted).max()
        )

    @parameterized.named_parameters(
        ("heads", {"num_heads": 0}, "`num_heads` must be an int"),
        ("key_dim", {"key_dim": 0}, "`key_dim` must be an int"),
        ("shared", {"num_shared_heads": 4}, "and below `num_heads`"),
        ("top_k", {"top_k": 5}, "`top_k` must be"),
        ("router", {"router": TopKRouter(3)}, "`num_heads - num_shared_heads`"),
        ("name", {"router": "x"}, "`router` must be one of"),
        ("bias", {"use_bias": 1}, "`use_bias` must be True or False"),
        ("losses", {"losses": "x"}, "`losses` must be made of"),
    )
    def test_errors(self, arguments, words):
        with self.assertRaisesRegex(ValueError, words):
            MixtureOfHeads(**{"num_heads": 4, "key_dim": 3, **arguments})

    def test_wrong_shape(self):
        with self.assertRaisesRegex(ValueError, r"of shape \(batch, tokens, D"):
            MixtureOfHeads(4, 3)(X[0])
