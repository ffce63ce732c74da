import math

import keras
from keras import ops

from keras_moe.checks import check_bool
from keras_moe.checks import check_number
from keras_moe.checks import check_one_of
from keras_moe.checks import check_positive

LOSSES = ("softmax", "sigmoid", None)


@keras.saving.register_keras_serializable("keras_moe")
class ContrastiveHead(keras.layers.Layer):
    """Compares every image of a batch with every text, and learns to pair them.

    ```
    images, texts = images / |images|, texts / |texts|
    logits[i, j]  = exp(scale) * images[i] . texts[j] + bias
    loss          = -mean over i of (log_softmax(logits[i, :])[i]
                                     + log_softmax(logits[:, i])[i]) / 2
                    or, with "sigmoid", -mean over i of the sum over j of
                    log_sigmoid(+logits[i, j] if i == j else -logits[i, j])
    ```

    Image `i` and text `i` belong together. The layer adds the loss to that of
    the model, in training and in evaluation, so that `fit` needs no labels.
    The loss, not the outputs, depends on the rest of the batch; where several
    devices train together, each compares its own part of it.

    Args:
        loss: `"softmax"` (CLIP, LIMoE), `"sigmoid"` (SigLIP), or `None` for a
            loss of your own, on the logits. Defaults to `"softmax"`.
        scale_init: float. The value of `exp(scale)` at the start. Defaults to
            `10.0`.
        use_bias: bool. Whether there is a learned `bias`. It has no effect on
            `"softmax"`. Defaults to `None`: only for `"sigmoid"`.
        bias_init: float. Its value at the start. Defaults to `-10.0`, with
            which most pairs are taken to be wrong.
        return_logits: bool. Whether the logits are a third output. Defaults to
            `False`.
        **kwargs: Arguments of `keras.layers.Layer`.

    Call arguments:
        images: Tensor of shape `(batch, D)`.
        texts: Tensor of shape `(batch, D)`.

    Output shape:
        `((batch, D), (batch, D))`, vectors of length one, and with
        `return_logits` `(batch, batch)`.

    Weights:
        `scale` `()`, the logarithm of the factor; `bias` `()`.

    Raises:
        ValueError: If an argument is out of range, or the shapes do not fit.

    Example:

    >>> head = keras_moe.layers.ContrastiveHead()
    >>> images, texts = head(keras.ops.eye(3, 8), keras.ops.eye(3, 8))
    >>> keras.ops.convert_to_numpy(head.logits(images, texts)[0]).round(3)
    array([10.,  0.,  0.], dtype=float32)

    Reference:

    - [Radford et al., 2021](https://arxiv.org/abs/2103.00020), section 2.3
    - [Zhai et al., 2023](https://arxiv.org/abs/2303.15343), section 3.2
      (`"sigmoid"`)
    """

    def __init__(
        self,
        loss="softmax",
        scale_init=10.0,
        use_bias=None,
        bias_init=-10.0,
        return_logits=False,
        **kwargs,
    ):
        super().__init__(**kwargs)
        check_one_of("loss", loss, LOSSES)
        check_positive("scale_init", scale_init)
        use_bias = loss == "sigmoid" if use_bias is None else use_bias
        check_bool("use_bias", use_bias)
        check_number("bias_init", bias_init)
        check_bool("return_logits", return_logits)
        self.loss = loss
        self.scale_init = scale_init
        self.use_bias = use_bias
        self.bias_init = bias_init
        self.return_logits = return_logits

    def build(self, images_shape, texts_shape):
        if images_shape[-1] != texts_shape[-1]:
            raise ValueError(
                "Vectors of images and texts must be of the same width. "
                f"Received: images {tuple(images_shape)}, texts "
                f"{tuple(texts_shape)}"
            )
        self.scale = self.add_weight(
            name="scale",
            shape=(),
            initializer=keras.initializers.Constant(math.log(self.scale_init)),
        )
        self.bias = None
        if self.use_bias:
            self.bias = self.add_weight(
                name="bias",
                shape=(),
                initializer=keras.initializers.Constant(self.bias_init),
            )

    def call(self, images, texts):
        images, texts = unit(images), unit(texts)
        if self.loss is None and not self.return_logits:
            return images, texts
        logits = self.logits(images, texts)
        if self.loss is not None:
            numbers = images.shape[0], texts.shape[0]
            if isinstance(numbers[0], int) and numbers[0] != numbers[1]:
                raise ValueError(
                    "Each image must have its text. Received: "
                    f"{numbers[0]} images and {numbers[1]} texts"
                )
            loss = {"softmax": _softmax, "sigmoid": _sigmoid}[self.loss]
            pairs = ops.sum(_exact(images) * _exact(texts), axis=-1)
            self.add_loss(loss(logits, self._scaled(pairs)))
        if self.return_logits:
            return images, texts, ops.cast(logits, self.compute_dtype)
        return images, texts

    def logits(self, images, texts):
        """How well each image and each text go together.

        Args:
            images: `(I, D)`, vectors that the layer has given.
            texts: `(J, D)`, such as those of the names of classes.

        Returns:
            `(I, J)`, in float32 at least.
        """
        images, texts = _exact(images), _exact(texts)
        return self._scaled(ops.einsum("id,jd->ij", images, texts))

    def _scaled(self, products):
        logits = products * ops.exp(ops.cast(self.scale, products.dtype))
        if self.bias is None:
            return logits
        return logits + ops.cast(self.bias, products.dtype)

    def compute_output_shape(self, images_shape, texts_shape):
        shapes = (tuple(images_shape), tuple(texts_shape))
        if self.return_logits:
            return (*shapes, (images_shape[0], texts_shape[0]))
        return shapes

    def get_config(self):
        return {
            **super().get_config(),
            "loss": self.loss,
            "scale_init": self.scale_init,
            "use_bias": self.use_bias,
            "bias_init": self.bias_init,
            "return_logits": self.return_logits,
        }


def _exact(x):
    """In float32 at least."""
    is_short = keras.backend.standardize_dtype(x.dtype) != "float64"
    return ops.cast(x, "float32") if is_short else x


def unit(x):
    """`x` over its length, in float32 at least."""
    exact = _exact(x)
    square = ops.sum(ops.square(exact), axis=-1, keepdims=True)
    return ops.cast(exact * ops.rsqrt(square + 1e-12), x.dtype)


def _softmax(logits, of_pairs):
    rows, columns = (ops.logsumexp(logits, axis=axis) for axis in (1, 0))
    return ops.mean((rows + columns) / 2 - of_pairs)


def _sigmoid(logits, of_pairs):
    # log_sigmoid(-x) is log_sigmoid(x) - x.
    return ops.mean(ops.sum(ops.softplus(logits), axis=1) - of_pairs)
