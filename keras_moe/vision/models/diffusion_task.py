import functools

import keras
import numpy as np
from keras import ops

from keras_moe.checks import check_int
from keras_moe.checks import check_number
from keras_moe.checks import check_seed
from keras_moe.moe.model_config import deserialized
from keras_moe.moe.model_config import made_again
from keras_moe.moe.part_arguments import default_name
from keras_moe.vision.models.denoising import as_clip_range
from keras_moe.vision.models.denoising import as_labels
from keras_moe.vision.models.denoising import denoised
from keras_moe.vision.models.denoising import guided
from keras_moe.vision.models.denoising import noise_schedule
from keras_moe.vision.models.denoising import sampled_timesteps
from keras_moe.vision.models.dit_moe_backbone import DiTMoEBackbone
from keras_moe.vision.models.image_backbone import BackboneTask
from keras_moe.vision.models.image_backbone import frozen_parts
from keras_moe.vision.models.vision_presets import DIT_MOE

EVALUATION_SEED = 0


@keras.saving.register_keras_serializable("keras_moe")
class DiffusionTask(BackboneTask, keras.Model):
    """Trains a backbone to see the noise in images, and draws images with it.

    ```
    noisy = signal[t] * images + noise[t] * e       e is normal, t random
    loss  = mean of (backbone(noisy, t, labels) - e)^2
    ```

    `fit` and `evaluate` take a dict of `images` and `labels`, and no targets.
    In training, time steps and noise are drawn anew for each image, and the
    backbone's losses are added, as are those of experts. An evaluation has the
    same time steps, evenly spaced over each batch, and the same noise every
    time, so that its losses compare.

    Called with `timesteps` in the dict, the model gives what the backbone does.

    Args:
        backbone: A `keras_moe.models.DiTMoEBackbone`.
        num_timesteps: int. Steps from an image to noise. Defaults to `1000`.
        schedule: `"linear"` (Ho et al., 2020) or `"cosine"` (Nichol and
            Dhariwal, 2021): how the noise grows. Defaults to `"linear"`.
        clip_range: Two floats, the smallest and the largest value in images:
            `sample` keeps to it at every step. Defaults to `None`, no limits,
            as for latents.
        seed: int, or `None`. Seed of the time steps and the noise in training.
        name, trainable: As for `keras.Model`.

    Input shape:
        A dict of `images`, in the shape of the backbone, and `labels`
        `(batch,)`; with `timesteps` `(batch,)`, as for the backbone.

    Output shape:
        A dict of `noise`, what was added, and `prediction`, what the backbone
        says, both of the shape of the images. With `timesteps`, the output of
        the backbone.

    Raises:
        ValueError: If an argument is out of range or of the wrong kind.

    Example:

    >>> backbone = keras_moe.models.DiTMoEBackbone(
    ...     image_shape=(8, 8, 1), patch_size=4, num_layers=1, num_heads=2,
    ...     hidden_dim=8, mlp_dim=16, num_classes=10, num_experts=4,
    ... )
    >>> model = keras_moe.models.DiffusionTask(backbone, clip_range=(-1, 1))
    >>> model.compile(optimizer="adam")
    >>> images, labels = np.zeros((4, 8, 8, 1)), np.array([0, 1, 2, 3])
    >>> history = model.fit({"images": images, "labels": labels}, verbose=0)
    >>> model.sample(2, labels=[3, 7], steps=5, guidance=2.0, seed=0).shape
    (2, 8, 8, 1)

    Reference:

    - [Ho et al., 2020](https://arxiv.org/abs/2006.11239), algorithm 1
    - [Song et al., 2020](https://arxiv.org/abs/2010.02502), equation 12 (DDIM)
    - [Ho and Salimans, 2022](https://arxiv.org/abs/2207.12598), equation 6
      (guidance)
    """

    backbone_class = DiTMoEBackbone
    presets = DIT_MOE

    def __init__(
        self,
        backbone,
        num_timesteps=1000,
        schedule="linear",
        clip_range=None,
        seed=None,
        *,
        name=None,
        trainable=True,
    ):
        self.check_backbone(backbone)
        check_seed("seed", seed)
        levels = noise_schedule(schedule, num_timesteps)
        # No autocast: it would round time steps to half precision.
        super().__init__(
            name=name or default_name("diffusion_task"),
            trainable=trainable,
            dtype=backbone.dtype_policy,
            autocast=False,
        )
        self.backbone = backbone
        self.num_timesteps = num_timesteps
        self.schedule = schedule
        self.clip_range = as_clip_range(clip_range)
        self.seed = seed
        self.seed_generator = keras.random.SeedGenerator(seed)
        # A function, since Keras would track the arrays.
        self._levels = lambda: levels
        self.built = True

    def compile(self, optimizer="adam", loss="mse", **kwargs):
        """As `keras.Model.compile`; the loss compares two noises.

        Raises:
            ValueError: If the backbone has `learn_sigma=True`: this loss does
                not train the variance.
        """
        if self.backbone.learn_sigma:
            raise ValueError(
                "The loss of `DiffusionTask` does not train the variance that "
                "the backbone would learn: make it with learn_sigma=False, as "
                "`DiTMoEBackbone.from_preset(name, learn_sigma=False)` does. "
                "Received: a backbone with learn_sigma=True"
            )
        super().compile(optimizer=optimizer, loss=loss, **kwargs)

    def noise_levels(self):
        """`(signal, noise)`, arrays of the shares of both at each time step."""
        return self._levels()

    def get_compile_config(self):
        return super().get_compile_config() if self.compiled else {}

    def compile_from_config(self, config):
        self.compile(**keras.saving.deserialize_keras_object(config))
        self.optimizer.build(self.trainable_variables)

    def call(self, inputs, training=None):
        _check_inputs(inputs)
        if "timesteps" in inputs:
            return self.backbone(inputs, training=training)
        images = ops.cast(inputs["images"], "float32")
        timesteps = self._timesteps(inputs["labels"], training)
        noise = keras.random.normal(
            ops.shape(images),
            dtype="float32",
            seed=self.seed_generator if training else EVALUATION_SEED,
        )
        signal, deviation = (
            ops.reshape(
                ops.take(level.astype("float32"), timesteps), (-1, 1, 1, 1)
            )
            for level in self.noise_levels()
        )
        prediction = self.backbone(
            {
                "images": signal * images + deviation * noise,
                "timesteps": ops.cast(timesteps, "float32"),
                "labels": inputs["labels"],
            },
            training=training,
        )
        prediction = self.noise_of(ops.cast(prediction, "float32"))
        return {"noise": noise, "prediction": prediction}

    def _timesteps(self, labels, training):
        if training:
            return keras.random.randint(
                ops.shape(labels),
                0,
                self.num_timesteps,
                dtype="int32",
                seed=self.seed_generator,
            )
        one = ops.ones_like(labels, dtype="float32")
        places = (ops.cumsum(one) - 0.5) / ops.sum(one)
        return ops.cast(places * self.num_timesteps, "int32")

    def noise_of(self, outputs):
        """The part of a backbone's outputs that is the noise."""
        if not self.backbone.learn_sigma:
            return outputs
        axis = 1 if self.backbone.data_format == "channels_first" else -1
        number = outputs.shape[axis] // 2
        return outputs[:, :number] if axis == 1 else outputs[..., :number]

    def compute_loss(
        self, x=None, y=None, y_pred=None, sample_weight=None, training=True
    ):
        if y is not None:
            raise ValueError(
                "`DiffusionTask` takes no targets: give `fit` and `evaluate` "
                "a dict of `images` and `labels`. Received: targets of "
                f"{type(y).__name__}"
            )
        return super().compute_loss(
            x,
            y_pred["noise"],
            y_pred["prediction"],
            sample_weight,
            training=training,
        )

    def compute_metrics(self, x, y, y_pred, sample_weight=None):
        return super().compute_metrics(
            x, y_pred["noise"], y_pred["prediction"], sample_weight
        )

    def sample(self, num, labels=None, steps=50, guidance=1.0, seed=None):
        """Draws images, from noise to image in a number of steps (DDIM).

        ```
        e = e(no class) + guidance * (e(label) - e(no class))
        ```

        The noise at the start comes from NumPy: one seed gives the same images
        on every backend, but for rounding.

        Args:
            num: int. Number of images.
            labels: int for all, or an int for each image. Defaults to `None`,
                no class.
            steps: int. Defaults to `50`.
            guidance: float. 1 is the backbone as it is, with one call a step;
                other values compute twice as many images. Only with `labels`.
                Defaults to `1.0`.
            seed: int, or `None`. Defaults to `None`, another noise each time.

        Returns:
            A NumPy array of images, float32.

        Raises:
            ValueError: If an argument is out of range or of the wrong kind.
        """
        check_int("num", num, 1)
        check_number("guidance", guidance)
        check_seed("seed", seed)
        none = self.backbone.num_classes
        labels = as_labels(labels, num, none, guidance)
        times = sampled_timesteps(self.num_timesteps, steps)
        levels = list(zip(*self.noise_levels(), strict=True))
        levels = [*(levels[t] for t in times), (1.0, 0.0)]
        shape = self.backbone.input["images"].shape[1:]
        images = np.random.default_rng(seed).normal(size=(num, *shape))
        for step, t in enumerate(times):
            noise = guided(
                functools.partial(self._noise_in, t),
                *(images, labels, none, guidance),
            )
            images = denoised(
                images, noise, *levels[step : step + 2], self.clip_range
            )
        return images.astype("float32")

    def _noise_in(self, t, images, labels):
        # Compiled by Keras as the backend does it.
        outputs = self.predict_on_batch(
            {
                "images": images.astype("float32"),
                "timesteps": np.full(len(labels), t, "float32"),
                "labels": labels,
            }
        )
        return self.noise_of(outputs.astype("float64"))

    def get_config(self):
        return {
            "name": self.name,
            "trainable": self.trainable,
            **frozen_parts(self),
            "backbone": keras.saving.serialize_keras_object(self.backbone),
            "num_timesteps": self.num_timesteps,
            "schedule": self.schedule,
            "clip_range": self.clip_range,
            "seed": self.seed,
        }

    @classmethod
    def from_config(cls, config, custom_objects=None):
        return made_again(cls, *deserialized(config, custom_objects))


def _check_inputs(inputs):
    if not isinstance(inputs, dict) or {"images", "labels"} - set(inputs):
        given = sorted(inputs) if isinstance(inputs, dict) else type(inputs)
        raise ValueError(
            "The inputs of `DiffusionTask` must be a dict with `images` and "
            f"`labels`. Received: {given}"
        )
