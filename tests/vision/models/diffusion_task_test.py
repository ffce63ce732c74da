import keras
import numpy as np
from absl.testing import parameterized
from keras import ops

from keras_moe.models import DiffusionTask
from keras_moe.models import DiTMoEBackbone
from tests.routing_cases.cases import recorded_draws
from tests.test_case import TestCase
from tests.vision.models.tiny import IMAGES
from tests.vision.models.tiny import dit_moe
from tests.vision.models.tiny import dtype_of
from tests.vision.models.tiny import randomize
from tests.vision.models.tiny import v_moe

DATA = {"images": IMAGES, "labels": np.array([0, 1, 2, 3, 0], "int32")}
NOISE = np.random.default_rng(1).normal(size=IMAGES.shape).astype("float32")


# XLA on TensorFlow takes a minute to compile it.
JIT = keras.config.backend() == "jax"


def task(backbone=None, **kwargs):
    backbone = backbone or dit_moe(num_layers=1)
    model = DiffusionTask(randomize(backbone), num_timesteps=100, **kwargs)
    model.jit_compile = JIT
    return model


def kept(num_steps=100):
    """The share of the image that is left after each step."""
    betas = [1e-3 + t / 99 * (0.2 - 1e-3) for t in range(num_steps)]
    return np.cumprod(1 - np.array(betas))


class DiffusionTaskTest(TestCase):
    def test_what_the_backbone_reads(self):
        """In evaluation the time steps lie in the middle of five parts."""
        model = task()
        with recorded_draws(normal=[NOISE]):
            found = model(DATA)
        self.assertAllEqual(ops.convert_to_numpy(found["noise"]), NOISE)
        times = np.array([10, 30, 50, 70, 90])
        share = kept()[times].reshape(5, 1, 1, 1)
        noisy = np.sqrt(share) * IMAGES + np.sqrt(1 - share) * NOISE
        wanted = model.backbone(
            {
                "images": noisy.astype("float32"),
                "timesteps": times.astype("float32"),
                "labels": DATA["labels"],
            }
        )
        wanted = ops.convert_to_numpy(wanted)
        self.assert_relative(found["prediction"], wanted, 1e-4)

    def test_training_draws_anew(self):
        model = task()
        seen, call = [], model.backbone.call

        def spy(inputs, *args, **kwargs):
            seen.append(ops.convert_to_numpy(inputs["timesteps"]))
            return call(inputs, *args, **kwargs)

        model.backbone.call = spy
        many = {name: np.repeat(x, 40, 0) for name, x in DATA.items()}
        noises = [
            ops.convert_to_numpy(model(many, training=True)["noise"])
            for _ in range(2)
        ]
        self.assertGreater(np.abs(noises[0] - noises[1]).max(), 0.1)
        self.assertLess(np.abs(np.mean(noises)), 0.05)
        self.assertLess(np.abs(np.std(noises) - 1), 0.05)
        times = np.concatenate(seen)
        self.assertAllEqual(times, times.round())
        self.assertBetween(times.min(), 0, 3)
        self.assertBetween(times.max(), 96, 99)
        self.assertLess(np.abs(times.mean() - 49.5), 6)

    def test_fit_evaluate_and_save(self):
        model = DiffusionTask(dit_moe(), num_timesteps=100, seed=0)
        model.compile(
            keras.optimizers.Adam(0.01), metrics=["mae"], jit_compile=JIT
        )
        data = {name: np.repeat(x, 4, 0) for name, x in DATA.items()}
        before = model.evaluate(data, batch_size=10, verbose=0)
        # Zeros are predicted: the mean square of normal numbers.
        self.assertBetween(before[0], 0.9, 1.1)
        history = model.fit(
            data, batch_size=10, epochs=30, verbose=0, validation_data=(data,)
        ).history
        self.assertLess(history["val_loss"][-1], 0.95 * before[0])
        self.assertIn("routing_max_violation", history)
        after = model.evaluate(data, batch_size=10, verbose=0)
        self.assert_relative(after[0], history["val_loss"][-1])
        path = self.get_temp_dir() + "/model.keras"
        model.save(path)
        loaded = keras.saving.load_model(path)
        self.assertEqual(loaded.get_config(), model.get_config())
        again = loaded.evaluate(data, batch_size=10, verbose=0)
        self.assert_relative(again, after)
        self.assertEqual(int(loaded.optimizer.iterations), 60)
        images = model.sample(2, labels=1, steps=3, seed=0)
        self.assert_relative(loaded.sample(2, 1, 3, seed=0), images, 1e-4)
        self.assertGreater(
            np.abs(loaded.sample(2, 1, 3, seed=1) - images).max(), 0.1
        )

    def test_loss(self):
        """The mean square of what the noise is off, and the losses of experts
        in training."""
        model = task()
        model.compile(jit_compile=JIT)
        found = {
            name: ops.convert_to_numpy(value)
            for name, value in model(DATA).items()
        }
        wanted = ((found["noise"] - found["prediction"]) ** 2).mean()
        self.assert_relative(model.evaluate(DATA, verbose=0), wanted)
        y_pred = model(DATA, training=True)
        found = {k: ops.convert_to_numpy(v) for k, v in y_pred.items()}
        wanted = ((found["noise"] - found["prediction"]) ** 2).mean()
        (added,) = map(float, map(ops.convert_to_numpy, model.losses))
        self.assertGreater(added, 0.005)
        loss = model.compute_loss(x=DATA, y_pred=y_pred)
        self.assert_relative(ops.convert_to_numpy(loss), wanted + added)

    @parameterized.named_parameters(
        ("one_call", 1.0, None), ("guided", 3.0, (-1.0, 1.0))
    )
    def test_sample(self, guidance, clip_range):
        """Equation 12 of DDIM, and guidance, in a loop of their own."""
        model = task(clip_range=clip_range)
        labels = np.array([0, 2], "int32")
        found = model.sample(2, labels, 4, guidance, seed=5)
        x = np.random.default_rng(5).normal(size=(2, 8, 8, 3))
        shares, times = kept(), [99, 66, 33, 0]

        def noise_in(x, t, labels):
            noise = model.backbone(
                {
                    "images": x.astype("float32"),
                    "timesteps": np.full(2, t, "float32"),
                    "labels": labels,
                }
            )
            return ops.convert_to_numpy(noise).astype("float64")

        for t, following in zip(times, [*times[1:], None], strict=True):
            share = shares[t]
            then = 1.0 if following is None else shares[following]
            e = noise_in(x, t, labels)
            if guidance != 1:
                none = noise_in(x, t, np.full(2, 3, "int32"))
                e = none + guidance * (e - none)
            image = (x - np.sqrt(1 - share) * e) / np.sqrt(share)
            if clip_range:
                image = image.clip(-1, 1)
                e = (x - np.sqrt(share) * image) / np.sqrt(1 - share)
            x = np.sqrt(then) * image + np.sqrt(1 - then) * e
        self.assertEqual(found.dtype, np.float32)
        self.assert_relative(found, x, 1e-3)

    def test_labels_of_samples(self):
        model = task(clip_range=(-1, 1))
        for one, other in (
            (model.sample(2, 1, 2, seed=0), model.sample(2, [1, 1], 2, seed=0)),
            (model.sample(2, None, 2, seed=0), model.sample(2, 3, 2, seed=0)),
            (
                model.sample(2, 1, 2, guidance=0.0, seed=0),
                model.sample(2, 3, 2, seed=0),
            ),
        ):
            self.assert_relative(one, other, 1e-4)
        # Without a seed each time others.
        model = task()
        first = model.sample(2, steps=2)
        self.assertGreater(np.abs(first - model.sample(2, steps=2)).max(), 0)

    def test_learn_sigma(self):
        """The first half of the channels is the noise; it is not trained."""
        for shape, data_format in (
            ((8, 8, 3), "channels_last"),
            ((3, 8, 8), "channels_first"),
        ):
            backbone = dit_moe(
                num_layers=1,
                image_shape=shape,
                data_format=data_format,
                learn_sigma=True,
            )
            model = task(backbone)
            images = IMAGES.reshape(5, *shape)
            found = model({**DATA, "images": images})
            self.assertEqual(tuple(found["prediction"].shape), (5, *shape))
            self.assertEqual(model.sample(2, steps=2).shape, (2, *shape))
            outputs = np.arange(2 * 6 * 64).reshape(
                2, *((6, 8, 8) if shape[0] == 3 else (8, 8, 6))
            )
            noise = model.noise_of(outputs)
            wanted = outputs[:, :3] if shape[0] == 3 else outputs[..., :3]
            self.assertAllEqual(noise, wanted)
            with self.assertRaisesRegex(ValueError, "learn_sigma=False"):
                model.compile()

    def test_half_precision(self):
        model = task(dit_moe(num_layers=1, dtype="mixed_bfloat16"))
        found = model(DATA)
        self.assertEqual(dtype_of(found["noise"]), "float32")
        self.assertEqual(dtype_of(found["prediction"]), "float32")
        inputs = {**DATA, "timesteps": np.full(5, 99.0)}
        self.assertEqual(dtype_of(model(inputs)), "bfloat16")
        model.compile(jit_compile=JIT)
        loss = model.fit(DATA, verbose=0).history["loss"][0]
        self.assertTrue(np.isfinite(loss))
        self.assertEqual(model.sample(2, 1, 2, 2.0).dtype, np.float32)

    def test_presets(self):
        model = task(schedule="cosine")
        folder = self.get_temp_dir()
        model.save_to_preset(folder)
        loaded = DiffusionTask.from_preset(folder)
        loaded.jit_compile = JIT
        wanted = model.sample(2, 1, 2, seed=0)
        self.assert_relative(loaded.sample(2, 1, 2, seed=0), wanted, 1e-4)
        model.backbone.save_to_preset(folder)
        loaded = DiffusionTask.from_preset(
            folder, num_timesteps=100, schedule="cosine"
        )
        loaded.jit_compile = JIT
        self.assert_relative(loaded.sample(2, 1, 2, seed=0), wanted, 1e-4)
        backbone = DiTMoEBackbone.from_preset(
            "dit_moe_s2_e8", num_layers=1, hidden_dim=12, learn_sigma=False
        )
        self.assertEqual(backbone.output_shape, (None, 32, 32, 4))

    @parameterized.named_parameters(
        ("backbone", {"backbone": v_moe}, "must be a DiTMoEBackbone"),
        ("steps", {"num_timesteps": 0}, "`num_timesteps` must be an int"),
        ("schedule", {"schedule": "x"}, "`schedule` must be one of"),
        ("range", {"clip_range": (1, -1)}, "two numbers, the smaller one"),
        ("one", {"clip_range": 1}, "`clip_range` must be two numbers"),
        ("seed", {"seed": 1.5}, "`seed` must be an int"),
    )
    def test_errors(self, arguments, words):
        arguments = {"backbone": dit_moe, **arguments}
        backbone = arguments.pop("backbone")()
        with self.assertRaisesRegex(ValueError, words):
            DiffusionTask(backbone, **arguments)

    @parameterized.named_parameters(
        ("num", {"num": 0}, "`num` must be an int"),
        ("steps", {"steps": 101}, "steps=101, num_timesteps=100"),
        ("label", {"labels": 4}, "an int from 0 to 3, or 2 of them"),
        ("labels", {"labels": [0]}, "Received: labels=.0."),
        ("floats", {"labels": [0.0, 1.0]}, "`labels` must be an int"),
        ("guidance", {"guidance": 2.0}, "`guidance` is for images of a class"),
        ("nan", {"guidance": np.nan}, "`guidance` must be a finite number"),
        ("seed", {"seed": "x"}, "`seed` must be an int"),
    )
    def test_errors_of_samples(self, arguments, words):
        with self.assertRaisesRegex(ValueError, words):
            task().sample(**{"num": 2, **arguments})

    def test_wrong_data(self):
        model = task()
        model.compile()
        with self.assertRaisesRegex(ValueError, "takes no targets"):
            model.fit(DATA, DATA["labels"], verbose=0)
        for inputs in (IMAGES, {"images": IMAGES}):
            with self.assertRaisesRegex(ValueError, "`images` and `labels`"):
                model(inputs)
