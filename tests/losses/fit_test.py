"""Several losses at once, in compiled training steps and traced graphs."""

import keras
import numpy as np
from absl.testing import parameterized
from keras import ops
from keras.config import backend

from keras_moe import losses
from keras_moe.layers import MoE
from keras_moe.losses import LoadBalancingLoss
from tests.losses.cases import CASES
from tests.losses.cases import GROUPED
from tests.losses.cases import LoadRouting
from tests.losses.cases import arrays
from tests.losses.cases import routing_of
from tests.losses.cases import tensors
from tests.losses.cases import with_per
from tests.test_case import TestCase


def several():
    return [
        LoadBalancingLoss(1.0),
        LoadBalancingLoss(0.1, per="global", assignments="logits"),
        losses.ImportanceLoss(1.0),
        losses.RouterZLoss(),
        losses.EntropyLoss(per="sequence"),
        losses.EntropyLoss(kind="marginal", threshold=1.0),
        losses.MutualInformationLoss(),
        losses.DeviceBalanceLoss(2),
        losses.CommunicationBalanceLoss(2, 2),
    ]


class FitTest(TestCase):
    @parameterized.parameters(True, False)
    def test_fit(self, jit_compile):
        # On JAX without jit each operation would be compiled by itself, and
        # torch.compile is tried in layers/.
        if jit_compile == {"jax": False, "torch": True}.get(backend()):
            self.skipTest("only as this backend is used")
        layer = MoE(num_experts=4, intermediate_dim=6, losses=several())
        x = keras.Input((None, 5))
        model = keras.Model(x, layer(x))
        # With a learning rate of zero the losses can be computed afterwards.
        model.compile(keras.optimizers.SGD(0.0), "mse", jit_compile=jit_compile)
        data = np.random.default_rng(0).normal(size=(3, 4, 5))
        data = data.astype("float32")
        logs = model.fit(data, data, batch_size=3, epochs=1, verbose=0).history
        routing = layer.route(data)
        routing = type(routing)(*(ops.stop_gradient(x) for x in routing))
        own = sum(float(loss(routing, None, 3)) for loss in several())
        mse = np.mean((model.predict(data, verbose=0) - data) ** 2)
        self.assertAllClose(logs["loss"][0], mse + own, rtol=1e-4)
        for weight in model.get_weights():  # 0 * NaN would be NaN
            self.assertTrue(np.isfinite(weight).all())

    def test_inference_of_shapes_in_training(self):
        layer = MoE(num_experts=4, intermediate_dim=6, losses=several())
        x = keras.Input((None, 5))
        outputs = layer(x, training=True)  # traces the losses
        self.assertEqual(tuple(outputs.shape), (None, None, 5))

    @parameterized.parameters(False, True)
    def test_all_under_a_graph_of_any_length(self, xla):
        if backend() != "tensorflow":
            self.skipTest("about tf.function")
        import tensorflow as tf

        def run(logits, probs, indices, weights, load, num_sequences):
            r = LoadRouting(logits, probs, indices, weights, load)
            return [
                with_per(CASES[name][0], per)(r, None, num_sequences)
                for name in GROUPED
                for per in ("batch", "sequence")
            ]

        r = tensors(routing_of(*arrays()))
        specs = [tf.TensorSpec((None, x.shape[1]), x.dtype) for x in r]
        # XLA needs sizes that follow from shapes.
        sequences = 3 if xla else tf.constant(3)
        if xla:
            compiled = tf.function(
                lambda *r: run(*r, 3), input_signature=specs, jit_compile=True
            )
            values = compiled(*r)
        else:
            compiled = tf.function(
                run, input_signature=[*specs, tf.TensorSpec((), tf.int32)]
            )
            values = compiled(*r, sequences)
            empty = compiled(*(x[:0] for x in r), tf.constant(0))
            self.assertAllEqual(np.stack(empty), np.zeros(len(empty)))
        self.assertAllClose(np.stack(values), np.stack(run(*r, 3)), rtol=1e-5)

    def test_all_with_symbolic_sizes_of_jax(self):
        if backend() != "jax":
            self.skipTest("about jax.export")
        import jax

        r = tensors(routing_of(*arrays()))
        num_tokens, sequences = jax.export.symbolic_shape("4*b, b")
        shapes = LoadRouting(
            *(
                jax.ShapeDtypeStruct((num_tokens, x.shape[1]), x.dtype)
                for x in r
            )
        )
        for name in GROUPED:
            for per in ("batch", "sequence"):
                loss = with_per(CASES[name][0], per)
                out = jax.eval_shape(
                    lambda r, loss=loss: loss(r, None, sequences), shapes
                )
                self.assertEqual((out.shape, str(out.dtype)), ((), "float32"))
