"""A smooth step function, exactly 0 and 1 outside an interval."""

from keras import ops


def smooth_step(x, gamma=1.0):
    """A step from 0 to 1: a cubic inside an interval, exact outside.

    ```
    0                                           if x <= -gamma / 2
    1                                           if x >= gamma / 2
    1/2 + 3 x / (2 gamma) - 2 x^3 / gamma^3     in between
    ```

    Unlike a sigmoid, it reaches 0 and 1, and its gradient is zero there.
    `smooth_step(-x)` is `1 - smooth_step(x)`.

    Args:
        x: Tensor.
        gamma: float. Width of the step, positive. Defaults to `1.0`.

    Returns:
        Tensor of the shape and dtype of `x`.

    Example:

    >>> s = keras_moe.ops.smooth_step(keras.ops.array([-1.0, 0.0, 0.5]))
    >>> keras.ops.convert_to_numpy(s).tolist()
    [0.0, 0.5, 1.0]

    Reference:

    - [Hazimeh et al., 2020](https://arxiv.org/abs/2002.07772), section 3
    """
    # The same cubic in a form that rounding keeps between 0 and 1.
    v = ops.clip(x / gamma + 0.5, 0.0, 1.0)
    return v * v * (3 - 2 * v)
