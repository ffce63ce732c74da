import keras
from keras import ops

from keras_moe import backend
from keras_moe.checks import check_int
from keras_moe.experts import padded_rows
from keras_moe.experts.experts import PlainExperts
from keras_moe.stacked import layer_copies


@keras.saving.register_keras_serializable("keras_moe")
class LayerExperts(PlainExperts):
    """Experts that are copies of a layer or model, or a list of them.

    ```
    y[rows of e] = layers[e](rows of e)
    ```

    Rows are whatever the layers take: features `(N, D)`, whole sequences
    `(N, L, D)` for recurrent and attention layers, images `(N, H, W, C)` for
    convolutions. The layers run one after the other. For feed-forward experts
    `GLUExperts` and `MLPExperts` are faster.

    The cost depends on whether shapes may depend on data:

    - On torch, and on TensorFlow without XLA, each layer gets exactly its
      rows: `N` rows are computed. Eagerly, a layer without rows does not run.
      In a TensorFlow graph it runs on one row of zeros, which counts only in a
      loss that it adds with `add_loss`.
    - On JAX, and on TensorFlow with XLA, each layer gets `max_group_size` rows,
      padded with zeros: `num_experts * max_group_size` rows are computed. With
      a capacity these are about `capacity_factor * N`. Without one they are
      `num_experts * N`, as if every token went through every expert.

    The zeros change no result. They do not count in activity regularizers,
    which must add nothing for rows of zeros, like the regularizers of Keras.
    With static shapes, layers with state that training changes, like
    `BatchNormalization`, get a `mask` of the shape of the rows without their
    last axis, if they take one; in a `Sequential`, all layers before them must
    pass the mask on. Other
    layers with state, and layers that call `add_loss`, raise an error.

    An expert without rows has a gradient of zero, keeps its state and adds no
    activity loss. As usual in Keras, activity losses are divided by the number
    of rows that the layer got.

    Args:
        layer: A layer or model that takes one tensor and returns one with as
            many rows. `num_experts` copies are made from its config. They do
            not share its weights, and each seed in the config, initializers
            included, is different in each copy. Or a list of layers and
            models, which are used directly, with their weights; they must
            return the same shape.
        num_experts: int. Number of copies. With a list, its length or `None`.
            Defaults to `None`.
        name, dtype, trainable: As for `keras.layers.Layer`. The layers keep
            their own dtype policies; their output is cast to this dtype.

    Call arguments:
        rows: Tensor of shape `(N, ...)`, the rows of expert 0 first.
        group_sizes: int32 tensor of shape `(E,)`. Rows of each expert.
        training: bool. Passed on.
        max_group_size: int, or `None` for `N`. The largest number of rows
            in a group. Where shapes must be static, further rows are lost.

    Input shape:
        `(N, ...)`

    Output shape:
        `(N, ...)`, as the layers return it. Unused rows give zero.

    Raises:
        ValueError: If the arguments do not fit together, if the layers do not
            return one tensor each, with as many rows and of the same shape, or
            if shapes must be static and a layer cannot run with them.

    Example:

    >>> experts = keras_moe.experts.LayerExperts(
    ...     keras.layers.Conv1D(6, 3, padding="same"), num_experts=2
    ... )
    >>> rows = keras.ops.ones((5, 7, 4))
    >>> tuple(experts(rows, keras.ops.array([3, 2], "int32")).shape)
    (5, 7, 6)

    >>> experts = keras_moe.experts.LayerExperts(
    ...     [keras.layers.Dense(4), keras.layers.Identity()]
    ... )
    >>> experts.num_experts
    2

    Reference:

    - [Jacobs et al., 1991](https://doi.org/10.1162/neco.1991.3.1.79)
    """

    uses_max_group_size = True

    def __init__(
        self, layer, num_experts=None, *, name=None, dtype=None, trainable=True
    ):
        layers = layer if isinstance(layer, (list, tuple)) else [layer]
        for part in layers:
            if not isinstance(part, keras.layers.Layer):
                raise ValueError(
                    "`layer` must be a layer or a list of layers. "
                    f"Received: layer={layer!r}"
                )
        given = isinstance(layer, (list, tuple))
        if given and (
            not layers or len({id(part) for part in layers}) < len(layers)
        ):
            raise ValueError(
                "A list for `layer` must have at least one layer, all of them "
                f"different objects. Received: layer={layer!r}"
            )
        if num_experts is not None:
            check_int("num_experts", num_experts, 1)
        if given and num_experts not in (None, len(layers)):
            raise ValueError(
                "`num_experts` must be the length of the list `layer` or None. "
                f"Received: num_experts={num_experts}, a list of {len(layers)}"
            )
        super().__init__(
            len(layers) if given else num_experts,
            name=name,
            dtype=dtype,
            trainable=trainable,
        )
        template = None if given else layer_copies.template_of(layer)
        # A function, since Keras would wrap a dict attribute.
        self._template = lambda: template
        if given:
            self.layers = list(layers)
        else:
            self.layers = layer_copies.make_copies(
                layer, num_experts, self.name
            )

    def build(self, rows_shape):
        rows_shape = (None, *rows_shape[1:])
        shapes = []
        for layer in self.layers:
            layer_copies.build(layer, rows_shape, self.compute_dtype)
            shapes.append(self._output_shape(layer, rows_shape))
        if len(set(shapes)) > 1:
            raise ValueError(
                "The layers must give rows of the same shape. Received: "
                f"rows_shape={rows_shape}, output shapes={shapes}"
            )

    def call(self, rows, group_sizes, training=None, max_group_size=None):
        rows = ops.convert_to_tensor(rows)
        group_sizes = ops.convert_to_tensor(group_sizes, "int32")
        bounds = backend.slice_bounds(group_sizes)
        if bounds is None:
            return self._call_padded(
                rows, group_sizes, training, max_group_size
            )
        return self._call_sliced(rows, bounds, training)

    def _call_sliced(self, rows, bounds, training):
        parts, skipped = [], []
        for layer, (start, stop) in zip(self.layers, bounds, strict=True):
            if isinstance(stop, int) and start == stop:
                skipped += layer.trainable_variables
                continue
            if isinstance(stop, int):
                parts.append(
                    self._run(layer, rows[start:stop], training, {}, [], True)
                )
            else:
                parts.append(self._run_some(layer, rows[start:stop], training))
        num_left = ops.shape(rows)[0] - bounds[-1][1]
        if parts:
            tail = ops.shape(parts[0])[1:]
        else:
            tail = self._output_shape(self.layers[0], rows.shape)[1:]
        parts.append(ops.zeros((num_left, *tail), self.compute_dtype))
        out = ops.concatenate(parts)
        return _with_zero_gradients(out, [rows, *skipped]) if skipped else out

    def _run_some(self, layer, rows, training):
        """Runs on the rows, or on a row of zeros if there are none.

        Some TensorFlow operations fail or return wrong shapes without rows.
        """
        size = ops.shape(rows)[0]
        number = ops.maximum(size, 1)
        zeros = ops.zeros((number - size, *ops.shape(rows)[1:]), rows.dtype)
        real = ops.arange(number, dtype="int32") < size

        def call(layer, buffer, kwargs, kept, any_rows):
            return self._run(layer, buffer, training, kwargs, kept, any_rows)

        buffer = ops.concatenate([rows, zeros])
        return padded_rows.run(
            layer, buffer, real, training, call, static=False
        )[:size]

    def _call_padded(self, rows, group_sizes, training, size):
        num_rows = ops.shape(rows)[0]
        if size is None:
            size = num_rows
        if isinstance(size, int) and size == 0:
            size = 1
        buffers = padded_rows.to_buffers(rows, group_sizes, size)

        def call(layer, buffer, kwargs, kept, any_rows):
            return self._run(layer, buffer, training, kwargs, kept, any_rows)

        outs = [
            padded_rows.run(layer, buffer, real, training, call)
            for layer, (buffer, real) in zip(self.layers, buffers, strict=True)
        ]
        return padded_rows.from_buffers(outs, group_sizes, size, num_rows)

    def _run(self, layer, rows, training, kwargs, kept, any_rows):
        if layer_copies.takes(layer, "training"):
            kwargs = {**kwargs, "training": training}
        # Not variables that mixed precision casts: assigning would round them.
        kept = [v for v in kept if _dtype(v.value) == _dtype(v)]
        # Copies, since TensorFlow would read the changed variable later.
        before = [ops.copy(v.value) for v in kept]
        out = layer(rows, **kwargs)
        if any_rows is not True:
            for variable, value in zip(kept, before, strict=True):
                now = ops.copy(variable.value)
                variable.assign(ops.where(any_rows, now, value))
        return ops.cast(out, self.compute_dtype)

    def _output_shape(self, layer, rows_shape):
        return layer_copies.output_shape(
            layer, tuple(rows_shape), self.compute_dtype
        )

    def compute_output_shape(self, rows_shape, group_sizes_shape=None):
        shape = self._output_shape(self.layers[0], (None, *rows_shape[1:]))
        return (rows_shape[0], *shape[1:])

    def get_config(self):
        template = self._template()
        if template is None:
            template = [layer_copies.config_of(part) for part in self.layers]
        return {**super().get_config(), "layer": template}

    @classmethod
    def from_config(cls, config):
        layer = config["layer"]
        if isinstance(layer, dict):
            layer = keras.saving.deserialize_keras_object(layer)
        elif all(isinstance(part, dict) for part in layer):
            layer = [
                keras.saving.deserialize_keras_object(part) for part in layer
            ]
        return super().from_config({**config, "layer": layer})


def _dtype(x):
    return keras.backend.standardize_dtype(x.dtype)


def _with_zero_gradients(out, others):
    """`out`, with zero gradients for the others, where they had none."""

    def forward(out, *others):
        return ops.copy(out)

    def backward(d_out, out, *others):
        return (d_out, *(ops.zeros_like(other) for other in others))

    others = [ops.copy(other) for other in others]
    return backend.with_gradient(forward, backward, (out, *others), ())
