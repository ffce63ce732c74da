"""Noise at each time step, and the way from noise to images, in NumPy."""

import numpy as np

from keras_moe.checks import check_int
from keras_moe.checks import check_one_of
from keras_moe.checks import is_int
from keras_moe.checks import is_number

SCHEDULES = ("linear", "cosine")


def noise_schedule(kind, num_steps):
    """`(signal, noise)`, `(num_steps,)` each, with `signal^2 + noise^2 = 1`.

    ```
    signal[t]^2 = product over s <= t of (1 - beta[s])
    beta[t]     = 1e-4 to 0.02 for 1000 steps                   "linear"
                = min(1 - f(t + 1) / f(t), 0.999)               "cosine"
    f(t)        = cos((t / num_steps + 0.008) / 1.008 * pi / 2)^2
    ```
    """
    check_one_of("schedule", kind, SCHEDULES)
    check_int("num_timesteps", num_steps, 1)
    if kind == "linear":
        # With fewer steps each does more.
        ends = np.array([1e-4, 0.02]) * (1000 / num_steps)
        betas = np.minimum(np.linspace(*ends, num_steps), 0.999)
    else:
        steps = np.arange(num_steps + 1) / num_steps
        f = np.cos((steps + 0.008) / 1.008 * np.pi / 2) ** 2
        betas = np.minimum(1 - f[1:] / f[:-1], 0.999)
    kept = np.cumprod(1 - betas)
    return np.sqrt(kept), np.sqrt(1 - kept)


def sampled_timesteps(num_steps, steps):
    """`steps` different time steps, from the last one to the first."""
    check_int("steps", steps, 1)
    if steps > num_steps:
        raise ValueError(
            "`steps` must be at most `num_timesteps`. Received: "
            f"steps={steps}, num_timesteps={num_steps}"
        )
    return np.linspace(num_steps - 1, 0, steps).round().astype(int)


def denoised(images, noise, level, next_level, clip_range=None):
    """One step of DDIM, without new noise.

    ```
    x0   = clip((images - level's noise * noise) / level's signal)
    next = next_level's signal * x0 + next_level's noise * noise
    ```

    where the noise is that of the clipped `x0`.

    Args:
        images: Array of noisy images.
        noise: Array, the noise that a model sees in them.
        level, next_level: `(signal, noise)`, two floats.
        clip_range: Two floats, or `None`.
    """
    signal, deviation = level
    clean = (images - deviation * noise) / signal
    if clip_range is not None:
        clean = np.clip(clean, *clip_range)
        noise = (images - signal * clean) / deviation
    signal, deviation = next_level
    return signal * clean + deviation * noise


def guided(predict, images, labels, none, guidance):
    """The noise in images, away from that of images of no class.

    ```
    e = e(no class) + guidance * (e(label) - e(no class))
    ```

    Args:
        predict: Function `(images, labels) -> noise`.
        images: `(N, ...)`.
        labels: `(N,)`.
        none: int. The label that stands for no class.
        guidance: float. 1 is `predict` as it is.
    """
    if guidance == 1:
        return predict(images, labels)
    both = np.concatenate([labels, np.full_like(labels, none)])
    noise = predict(np.concatenate([images, images]), both)
    of_class, of_none = np.split(noise, 2)
    return of_none + guidance * (of_class - of_none)


def as_labels(labels, num, none, guidance):
    """`(num,)` int32, from an int, several or `None`."""
    if labels is None:
        if guidance != 1:
            raise ValueError(
                "`guidance` is for images of a class. Received: "
                f"guidance={guidance}, labels=None"
            )
        labels = none
    found = np.asarray([labels] * num if is_int(labels) else labels)
    if (
        found.shape != (num,)
        or found.dtype.kind not in "iu"
        or found.min() < 0
        or found.max() > none
    ):
        raise ValueError(
            f"`labels` must be an int from 0 to {none}, or {num} of them, one "
            f"for each image. Received: labels={labels!r}"
        )
    return found.astype("int32")


def as_clip_range(clip_range):
    """A list of two floats, or `None`."""
    if clip_range is None:
        return None
    if (
        not isinstance(clip_range, (list, tuple))
        or len(clip_range) != 2
        or not all(is_number(value) for value in clip_range)
        or clip_range[0] >= clip_range[1]
    ):
        raise ValueError(
            "`clip_range` must be two numbers, the smaller one first. "
            f"Received: clip_range={clip_range!r}"
        )
    return list(clip_range)
