"""What every backbone must do, whatever it is made of."""

import keras
import numpy as np
from keras import ops

from keras_moe.models import MoEImageClassifier
from tests.exported import export
from tests.vision.models.tiny import dtype_of
from tests.vision.models.tiny import randomize


class BackboneChecks:
    """A subclass has `make(**kwargs)`, of images of the shape `SHAPE`."""

    SHAPE = (16, 16, 3)

    def images(self, number=5):
        rng = np.random.default_rng(0)
        return rng.normal(size=(number, *self.SHAPE)).astype("float32")

    def check_saved(self, **options):
        """Saved, loaded, and the same for an image in another batch."""
        backbone, images = randomize(self.make(**options)), self.images()
        wanted = ops.convert_to_numpy(backbone(images))
        self.assertEqual(wanted.shape, (5, *backbone.output_shape[1:]))
        path = self.get_temp_dir() + "/model.keras"
        backbone.save(path)
        loaded = keras.saving.load_model(path)
        self.assertEqual(loaded.get_config(), backbone.get_config())
        self.assert_relative(loaded(images), wanted)
        others = images * np.array([2, -1, 1, 0, 3]).reshape(5, 1, 1, 1)
        outputs = ops.convert_to_numpy(backbone(others.astype("float32")))
        self.assert_relative(outputs[2], wanted[2])
        self.assertGreater(np.abs(outputs[0] - wanted[0]).max(), 1e-3)
        return backbone

    def check_channels_first(self, **options):
        backbone, images = randomize(self.make(**options)), self.images()
        shape = (self.SHAPE[2], *self.SHAPE[:2])
        first = self.make(
            image_shape=shape, data_format="channels_first", **options
        )
        first.set_weights(backbone.get_weights())
        wanted = ops.convert_to_numpy(backbone(images))
        if wanted.ndim == 4:
            wanted = wanted.transpose(0, 3, 1, 2)
        outputs = first(images.transpose(0, 3, 1, 2))
        self.assertEqual(tuple(outputs.shape[1:]), first.output_shape[1:])
        self.assert_relative(outputs, wanted)
        pooled = [
            MoEImageClassifier(model, 3, name="model")
            for model in (backbone, first)
        ]
        pooled[1].set_weights(randomize(pooled[0]).get_weights())
        self.assert_relative(
            pooled[1](images.transpose(0, 3, 1, 2)),
            ops.convert_to_numpy(pooled[0](images)),
        )

    def check_half_precision(self, **options):
        single = randomize(self.make(**options))
        half = self.make(dtype="mixed_bfloat16", **options)
        half.set_weights(single.get_weights())
        images = self.images()
        outputs = half(images)
        self.assertEqual(dtype_of(outputs), "bfloat16")
        wanted = ops.convert_to_numpy(single(images))
        difference = ops.convert_to_numpy(ops.cast(outputs, "float32")) - wanted
        scale = np.median(np.abs(wanted))
        self.assertLess(np.median(np.abs(difference)), 0.1 * scale)
        again = type(half).from_config(half.get_config())
        self.assertEqual(dtype_of(again(images)), "bfloat16")
        self.assertEqual(
            {v.dtype for v in half.trainable_variables}, {"float32"}
        )

    def check_fit(self, everywhere=False, epochs=6, **options):
        """On PyTorch alone where other tests compile the gradients."""
        if keras.config.backend() != "torch" and not everywhere:
            self.skipTest("compiled gradients are compared in other tests")
        model = MoEImageClassifier(self.make(**options), 3)
        model.compile(
            keras.optimizers.Adam(0.01),
            keras.losses.SparseCategoricalCrossentropy(from_logits=True),
            # XLA on TensorFlow takes a minute to compile it.
            jit_compile=keras.config.backend() == "jax",
        )
        images, labels = self.images(), np.arange(5) % 3
        logs = model.fit(images, labels, epochs=epochs, verbose=0).history
        self.assertLess(logs["loss"][-1], logs["loss"][0])
        path = self.get_temp_dir() + "/model.keras"
        model.save(path)
        loaded = keras.saving.load_model(path)
        wanted = model.predict(images, verbose=0)
        self.assert_relative(loaded(images), wanted)
        self.assert_relative(loaded(images[:2]), wanted[:2])
        return logs

    def check_exported(self, **options):
        """As a program of any batch size."""
        model = randomize(MoEImageClassifier(self.make(**options), 3))
        images = self.images()
        wanted = model.predict(images, verbose=0)
        served = export(self, model)
        for number in (5, 2):
            outputs = served(images[:number])
            if isinstance(outputs, (list, tuple)):
                (outputs,) = outputs
            if keras.config.backend() == "torch":
                outputs = outputs.detach()
            self.assert_relative(np.asarray(outputs), wanted[:number])

    def check_errors(self, arguments, words):
        with self.assertRaisesRegex(ValueError, words):
            self.make(**arguments)
