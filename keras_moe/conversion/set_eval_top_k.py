import keras

from keras_moe.routers.eval_top_k import has_eval_top_k
from keras_moe.routers.eval_top_k import replace_eval_top_k
from keras_moe.routers.router import Router


def set_eval_top_k(model, top_k):
    """Sets the number of experts per token in inference.

    Every router in the model that has an `eval_top_k` gets it: `TopKRouter` and
    its subclasses, `SinkhornRouter`, `SparseMixerRouter`. Other routers stay as
    they are. Training still uses the `top_k` of the router.
    The number is saved with the model.

    Compiled steps of `predict`, `evaluate` and `fit` are compiled again, in
    `model` and the models inside it. If a model is part of another, pass the
    outer one. Functions that you compiled yourself keep the old number until
    they are traced again.

    Args:
        model: A `keras.Model`, or a layer such as `keras_moe.layers.MoE`.
        top_k: int, or `None` for the `top_k` of training. Experts per token,
            not counting experts that are always on.

    Raises:
        ValueError: If `model` is not a layer, has no such router, or one of its
            routers cannot choose that many experts. Nothing is changed then.

    Example:

    >>> model = keras.Sequential([
    ...     keras.Input((8,)), keras_moe.layers.MoE(4, 16, top_k=2)
    ... ])
    >>> keras_moe.conversion.set_eval_top_k(model, 1)
    >>> routing = model.layers[0].route(keras.ops.ones((3, 8)))
    >>> tuple(routing.expert_indices.shape)
    (3, 1)
    """
    if not isinstance(model, keras.layers.Layer):
        raise ValueError(
            f"`model` must be a model or a layer. Received: model={model!r}"
        )
    layers = _with_sublayers(model)
    routers = [layer for layer in layers if has_eval_top_k(layer)]
    if not routers:
        others = [layer for layer in layers if isinstance(layer, Router)]
        looked_at = ", ".join(
            f"{layer.name} ({type(layer).__name__})"
            for layer in others or layers
        )
        raise ValueError(
            "`model` must contain a router with `eval_top_k`, as TopKRouter. "
            f"Received: model={model.name!r} with "
            f"{'the routers' if others else 'no router among'} {looked_at}"
        )
    for router in routers:
        router.check_eval_top_k(top_k)
    for router in routers:
        replace_eval_top_k(router, top_k)
    for layer in layers:
        if isinstance(layer, keras.Model):
            _recompile(layer)


def _recompile(model):
    """Resets the compiled steps of Keras, which the next call traces again."""
    if model.train_function is not None:
        model.make_train_function(force=True)
    if model.test_function is not None:
        model.make_test_function(force=True)
    if model.predict_function is not None:
        model.make_predict_function(force=True)


def _with_sublayers(layer):
    """The layer and all layers that its attributes hold, each once."""
    found, seen, left = [], set(), [layer]
    while left:
        value = left.pop()
        if id(value) in seen:
            continue
        if isinstance(value, keras.layers.Layer):
            found.append(value)
            held = vars(value).values()
        elif isinstance(value, dict):
            held = value.values()
        elif isinstance(value, (list, tuple, set)):
            held = value
        else:
            continue
        seen.add(id(value))
        left.extend(reversed(list(held)))
    return found
