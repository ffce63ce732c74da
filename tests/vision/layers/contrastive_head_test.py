import keras
import numpy as np
from absl.testing import parameterized
from keras import ops

from keras_moe.layers import ContrastiveHead
from keras_moe.layers import TextEmbedding
from tests.test_case import TestCase

RNG = np.random.default_rng(0)
IMAGES, TEXTS = RNG.normal(size=(2, 4, 6)).astype("float32")


def loss_of(kind, images, texts, scale, bias=0.0):
    """The loss, pair by pair."""
    number, total = len(images), 0.0
    logits = [
        [
            scale * i @ t / np.linalg.norm(i) / np.linalg.norm(t) + bias
            for t in texts
        ]
        for i in images
    ]
    logits = np.array(logits)
    for i in range(number):
        for row in (logits[i], logits[:, i]):
            if kind == "softmax":
                total += (np.log(np.exp(row).sum()) - row[i]) / 2
        for j in range(number):
            if kind == "sigmoid":
                sign = 1 if i == j else -1
                total += np.log1p(np.exp(-sign * logits[i, j]))
    return total / number


class ContrastiveHeadTest(TestCase):
    @parameterized.parameters(
        ("softmax", {"scale_init": 3.0}, 0.0),
        ("softmax", {"scale_init": 3.0, "use_bias": True}, -10.0),
        ("sigmoid", {"scale_init": 3.0, "bias_init": -1.5}, -1.5),
    )
    def test_loss(self, kind, options, bias):
        head = ContrastiveHead(kind, **options)
        images, texts = head(IMAGES, TEXTS)
        for actual, given in ((images, IMAGES), (texts, TEXTS)):
            length = np.linalg.norm(given, axis=-1, keepdims=True)
            self.assert_relative(actual, given / length)
        wanted = loss_of(kind, IMAGES, TEXTS, 3.0, bias)
        self.assertLen(head.losses, 1)
        self.assert_relative(head.losses[0], wanted)

    def test_gradients(self):
        """Against differences of the loop."""

        class Loss(keras.layers.Layer):
            def __init__(self):
                super().__init__()
                self.head = ContrastiveHead("sigmoid", 2.0, bias_init=-1.0)

            def call(self, pair):
                self.head(pair[0], pair[1])
                return ops.zeros((1,)) + self.head.losses[-1]

        layer = Loss()
        layer(np.stack([IMAGES, TEXTS]))
        _, d_pair, d_weights = self.outputs_and_gradients(
            layer, np.stack([IMAGES, TEXTS])
        )
        step = 1e-4

        def at(images, log_scale=0.0, bias=-1.0):
            scale = 2.0 * np.exp(log_scale)
            return loss_of("sigmoid", images, TEXTS, scale, bias)

        images = IMAGES.astype("float64")
        more, less = images.copy(), images.copy()
        more[1, 2] += step
        less[1, 2] -= step
        slope = (at(more) - at(less)) / (2 * step)
        self.assertAllClose(d_pair[0, 1, 2], slope, atol=1e-4)
        for name, values in (
            ("scale", ((step, -1.0), (-step, -1.0))),
            ("bias", ((0.0, -1 + step), (0.0, -1 - step))),
        ):
            slope = (at(images, *values[0]) - at(images, *values[1])) / step / 2
            found = [g for path, g in d_weights.items() if name in path]
            self.assertAllClose(found[0], slope, atol=1e-4)

    def test_logits(self):
        head = ContrastiveHead(None, use_bias=True, return_logits=True)
        images, texts, logits = head(IMAGES, TEXTS[:3])  # classes, say
        self.assertEqual(head.losses, [])
        self.assertEqual(tuple(logits.shape), (4, 3))
        wanted = ops.convert_to_numpy(images) @ ops.convert_to_numpy(texts).T
        self.assert_relative(logits, wanted * 10 - 10)
        self.assertEqual(
            head.compute_output_shape((None, 6), (None, 6)),
            ((None, 6), (None, 6), (None, None)),
        )

    def test_half_precision(self):
        head = ContrastiveHead(dtype="mixed_bfloat16")
        images, texts = head(IMAGES, TEXTS)
        self.assertDType(images, "bfloat16")
        self.assertDType(head.logits(images, texts), "float32")
        self.assertDType(head.losses[0], "float32")
        wanted = loss_of("softmax", IMAGES, TEXTS, 10.0)
        self.assert_relative(head.losses[0], wanted, 0.02)

    def test_zeros(self):
        head = ContrastiveHead()
        images, _ = head(np.zeros((2, 3), "float32"), np.ones((2, 3)))
        self.assertAllEqual(images, np.zeros((2, 3)))
        self.assert_relative(head.losses[0], np.log(2))

    def test_fit_without_labels(self):
        images, texts = keras.Input((6,)), keras.Input((5,))
        outputs = ContrastiveHead(dtype="float32")(
            keras.layers.Dense(4)(images), keras.layers.Dense(4)(texts)
        )
        model = keras.Model([images, texts], list(outputs))
        model.compile(keras.optimizers.Adam(0.05))
        data = [IMAGES, TEXTS[:, :5]]
        history = model.fit(data, epochs=20, verbose=0).history["loss"]
        self.assertLess(history[-1], history[0] / 2)
        self.assertLess(model.evaluate(data, verbose=0), history[0] / 2)
        predicted = model.predict(data, batch_size=3, verbose=0)
        path = self.get_temp_dir() + "/model.keras"
        model.save(path)
        loaded = keras.saving.load_model(path)
        self.assert_relative(loaded(data)[1], predicted[1])
        self.assertEqual(
            loaded.layers[-1].get_config(), model.layers[-1].get_config()
        )

    @parameterized.parameters(
        ({"loss": "hinge"}, "`loss` must be one of"),
        ({"scale_init": 0}, "`scale_init` must be positive"),
        ({"use_bias": 1}, "`use_bias` must be"),
        ({"bias_init": "1"}, "`bias_init` must be"),
        ({"return_logits": None}, "`return_logits` must be"),
    )
    def test_errors(self, arguments, words):
        with self.assertRaisesRegex(ValueError, words):
            ContrastiveHead(**arguments)

    def test_wrong_width(self):
        with self.assertRaisesRegex(ValueError, "must be of the same width"):
            ContrastiveHead()(IMAGES, TEXTS[:, :5])

    def test_no_pairs(self):
        with self.assertRaisesRegex(ValueError, "4 images and 3 texts"):
            ContrastiveHead()(IMAGES, TEXTS[:3])


class TextEmbeddingTest(TestCase):
    def test_values(self):
        layer = TextEmbedding(7, 3)
        ids = np.array([[0, 6, 6], [1, 2, 0]])
        outputs = ops.convert_to_numpy(layer(ids))
        embeddings, positions = layer.get_weights()
        self.assert_relative(outputs, embeddings[ids] + positions)
        half = TextEmbedding(7, 3, dtype="mixed_bfloat16")
        self.assertDType(half(ids), "bfloat16")
        again = TextEmbedding.from_config(layer.get_config())
        self.assertEqual(tuple(again(ids).shape), (2, 3, 3))

    @parameterized.parameters(
        (lambda: TextEmbedding(0, 3), "`vocabulary_size` must be"),
        (lambda: TextEmbedding(3, 0), "`hidden_dim` must be"),
        (lambda: TextEmbedding(3, 3).build((None, None)), "static length"),
        (lambda: TextEmbedding(3, 3).build((2, 3, 4)), r"shape=\(2, 3, 4\)"),
    )
    def test_errors(self, make, words):
        with self.assertRaisesRegex(ValueError, words):
            make()

    def test_another_length(self):
        layer = TextEmbedding(3, 3)
        layer.build((None, 4))
        with self.assertRaisesRegex(ValueError, "length 5, built with 4"):
            layer(np.zeros((1, 5), "int32"))
