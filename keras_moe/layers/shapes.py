"""Shapes on the way through a layer that joins routers and experts."""

from keras_moe.experts import Experts


def tokens_shape(layer, input_shape):
    """What is sent to the experts, without the copies."""
    if layer.route_per == "example":
        return (None, *input_shape[1:])
    return (None, input_shape[-1])


def shape_behind(part, shape):
    """Output shape of a part, which experts of one's own need not tell."""
    tells = isinstance(part, Experts) or not hasattr(part, "num_experts")
    if part is None or not tells:
        return shape
    return tuple(part.compute_output_shape(shape))


def output_shape(layer, input_shape):
    shape = tokens_shape(layer, input_shape)
    for part in (layer.pre_experts, layer.experts, layer.post_experts):
        shape = shape_behind(part, shape)
    kept = 1 if layer.route_per == "example" else -1
    return (*input_shape[:kept], *shape[1:])


def check_width(layer, rows, input_shape):
    """Raises unless the experts returned what they were taken to return."""
    shape = shape_behind(layer.pre_experts, tokens_shape(layer, input_shape))
    expected = shape_behind(layer.experts, shape)[-1]
    if rows.shape[-1] != expected:
        raise ValueError(
            "`experts` that are not a `keras_moe.experts.Experts` must keep "
            f"the width of their rows. Received rows of width {expected}, "
            f"returned {rows.shape[-1]}"
        )
