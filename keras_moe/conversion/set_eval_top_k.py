import keras

from keras_moe.conversion.sublayers import with_sublayers
from keras_moe.moe.causal import check_causal_layers
from keras_moe.routers.eval_top_k import EvalTopK
from keras_moe.routers.router import Router


def set_eval_top_k(model, top_k):
    """Sets the number of experts per token in inference.

    Every router in the model that has an `eval_top_k` gets it: `TopKRouter` and
    its subclasses, `SinkhornRouter`, `SparseMixerRouter`, and
    `HierarchicalRouter`, in each of its groups. Other routers stay as they are.
    Training still uses the `top_k` of the router. The number is saved with the
    model.

    Compiled steps of `predict`, `evaluate` and `fit` are compiled again, in
    `model` and the models inside it. If a model is part of another, pass the
    outer one. Functions that you compiled yourself keep the old number until
    they are traced again.

    Args:
        model: A `keras.Model`, or a layer such as `keras_moe.layers.MoE`.
        top_k: int, or `None` for the `top_k` of training. Experts per token,
            not counting experts that are always on.

    Raises:
        ValueError: If `model` is not a layer, has no such router, one of its
            routers cannot choose that many experts, or a causal layer with one
            of these routers would no longer be causal: with several experts
            per token its drop policy must be `"token"`. Nothing is changed
            then.

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
    layers = with_sublayers(model)
    routers = [layer for layer in layers if isinstance(layer, EvalTopK)]
    if not routers:
        _refuse(model, layers)
    for router in routers:
        router.check_eval_top_k(top_k)
        check_causal_layers(router, router.max_choices(top_k))
    for router in routers:
        router.replace_eval_top_k(top_k)
    for layer in layers:
        if isinstance(layer, keras.Model):
            _recompile(layer)


def _refuse(model, layers):
    """Says which routers there are, and why they have no `eval_top_k`."""
    found = [layer for layer in layers if isinstance(layer, Router)]
    names = [f"{x.name} ({type(x).__name__})" for x in found or layers]
    for i, router in enumerate(found):
        if router.why_no_eval_top_k:
            names[i] += f": {router.why_no_eval_top_k}"
    raise ValueError(
        "`model` must contain a router with `eval_top_k`, as TopKRouter. "
        f"Received: model={model.name!r} with "
        f"{'the routers' if found else 'no router among'} {', '.join(names)}"
    )


def _recompile(model):
    """Resets the compiled steps of Keras, which the next call traces again."""
    if model.train_function is not None:
        model.make_train_function(force=True)
    if model.test_function is not None:
        model.make_test_function(force=True)
    if model.predict_function is not None:
        model.make_predict_function(force=True)
