import math

import keras
from keras import ops

from keras_moe.checks import as_keras_object
from keras_moe.checks import check_bool
from keras_moe.checks import check_one_of
from keras_moe.checks import check_positive
from keras_moe.ops import activations
from keras_moe.ops.scores import softmax
from keras_moe.stacked.stacked_dense import StackedDense


@keras.saving.register_keras_serializable("keras_moe")
class AITMTransfer(keras.layers.Layer):
    """Transfers information from each task to the next one in a chain (AITM).

    For tasks such as click, cart and purchase:

    ```
    z[0] = x[0]
    for t = 1, 2, ...:
        rows    = [x[t], activation(normalization(info[t](z[t - 1])))]
        weights = softmax over the rows of
                  sum(query(row) * key(row)) / sqrt(dim)
        z[t]    = sum over the rows of weights * value(row)
    ```

    The calibrator of the paper is not part of this layer: it is a loss for
    events that are more probable than the event before, see
    `keras_moe.models.AITM`.

    Args:
        share_attention: bool. Whether all steps use the same `query`, `key` and
            `value`. Defaults to `False`.
        attention_use_bias: bool. Whether `query`, `key` and `value` have a
            bias. Defaults to `False`.
        info_activation: Activation of `info`. Defaults to `"relu"`.
        info_normalization: `None` or `"batch"`. Normalization of `info`.
            Defaults to `None`.
        normalization_epsilon: float. Added to the variances. Defaults to
            `1e-3`.
        stop_gradient: bool. Whether to stop the gradients to `z[t - 1]`, so
            that a task trains only its own part. Defaults to `False`.
        **kwargs: Arguments of `keras.layers.Layer`.

    Call arguments:
        inputs: Tensor of shape `(batch, num_tasks, dim)`, first task first.
        training: bool. Whether to normalize by the batch.

    Input shape:
        `(batch, num_tasks, dim)`

    Output shape:
        The same as the input.

    Raises:
        ValueError: If an argument is out of range, or the input is not of
            rank 3 or has a single task.

    Example:

    >>> layer = keras_moe.layers.AITMTransfer()
    >>> tuple(layer(keras.ops.ones((2, 3, 4))).shape)
    (2, 3, 4)

    Reference:

    - [Xi et al., 2021](https://arxiv.org/abs/2105.08489)
    """

    def __init__(
        self,
        share_attention=False,
        attention_use_bias=False,
        info_activation="relu",
        info_normalization=None,
        normalization_epsilon=1e-3,
        stop_gradient=False,
        **kwargs,
    ):
        super().__init__(**kwargs)
        check_one_of("info_normalization", info_normalization, (None, "batch"))
        check_positive("normalization_epsilon", normalization_epsilon)
        check_bool("share_attention", share_attention)
        self.share_attention = share_attention
        check_bool("attention_use_bias", attention_use_bias)
        self.attention_use_bias = attention_use_bias
        self.info_activation = as_keras_object(
            "info_activation", activations.get, info_activation
        )
        self.info_normalization = info_normalization
        self.normalization_epsilon = normalization_epsilon
        check_bool("stop_gradient", stop_gradient)
        self.stop_gradient = stop_gradient

    def build(self, input_shape):
        shape = tuple(input_shape)
        if len(shape) != 3 or None in shape[1:] or shape[1] < 2:
            raise ValueError(
                "The input of AITMTransfer must be of shape (batch, num_tasks, "
                "dim), static but for the batch, with two tasks or more. "
                f"Received: input_shape={shape}"
            )
        _, num_tasks, dim = shape
        self.infos, self.attentions = [], []
        for step in range(num_tasks - 1):
            self.infos.append(
                StackedDense(
                    1,
                    dim,
                    self.info_activation,
                    normalization=self.info_normalization,
                    normalization_epsilon=self.normalization_epsilon,
                    dtype=self.dtype_policy,
                    name=f"info_{step}",
                )
            )
            self.infos[-1].build((None, dim))
        for step in range(1 if self.share_attention else num_tasks - 1):
            self.attentions.append(
                StackedDense(  # query, key and value of a row
                    3,
                    dim,
                    use_bias=self.attention_use_bias,
                    dtype=self.dtype_policy,
                    name=f"attention_{step}",
                )
            )
            self.attentions[-1].build((None, dim))

    def call(self, inputs, training=None):
        inputs = ops.cast(inputs, self.compute_dtype)
        dim = inputs.shape[-1]
        outputs = [inputs[:, :1]]
        for step, info in enumerate(self.infos):
            before = ops.squeeze(outputs[-1], axis=1)
            if self.stop_gradient:
                before = ops.stop_gradient(before)
            rows = ops.concatenate(
                [
                    inputs[:, step + 1 : step + 2],
                    info(before, training=training),
                ],
                axis=1,
            )
            attention = self.attentions[0 if self.share_attention else step]
            maps = attention(ops.reshape(rows, (-1, dim)))
            maps = ops.reshape(maps, (-1, 2, 3, dim))
            query, key, value = (maps[:, :, i] for i in range(3))
            logits = ops.sum(query * key, axis=-1) / math.sqrt(dim)
            outputs.append(
                ops.einsum("br,brd->bd", softmax(logits), value)[:, None]
            )
        return ops.concatenate(outputs, axis=1)

    def compute_output_shape(self, input_shape):
        return tuple(input_shape)

    def get_config(self):
        return {
            **super().get_config(),
            "share_attention": self.share_attention,
            "attention_use_bias": self.attention_use_bias,
            "info_activation": activations.serialize(self.info_activation),
            "info_normalization": self.info_normalization,
            "normalization_epsilon": self.normalization_epsilon,
            "stop_gradient": self.stop_gradient,
        }
