"""The layers in a layer, and how one takes the place of another."""

import contextlib

import keras


def with_sublayers(layer):
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


def attributes_of(layer):
    """`(name, layer)` of each attribute that is a layer, without lists."""
    held = {}
    for name, value in vars(layer).items():
        # PyTorch keeps them in a dict, and not with the other attributes.
        held.update(value if isinstance(value, dict) else {name: value})
    return [
        (name, value)
        for name, value in held.items()
        if isinstance(value, keras.layers.Layer)
        and isinstance(name, str)
        and getattr(layer, name, None) is value
    ]


def replace(root, owner, attribute, new):
    """Puts a built layer in the place of another, in a model that is built.

    Keras has no public way to do this: a layer that is built takes no new
    layers and forgets no old ones. So this is the one function of the library
    that touches attributes of Keras that are not public.

    Args:
        root: The layer that holds `owner`, or itself.
        owner: The layer whose attribute is replaced.
        attribute: str.
        new: A built layer.
    """
    tracker = owner._tracker
    locked = tracker.locked
    tracker.unlock()
    tracker.untrack(getattr(owner, attribute))
    setattr(owner, attribute, new)
    if locked:
        tracker.lock()
    for layer in with_sublayers(root):
        if layer.built and (layer is owner or owner in with_sublayers(layer)):
            layer._post_build()  # the parameters of PyTorch are listed anew


@contextlib.contextmanager
def name_scope_of(layer):
    """Names the variables that are made inside as those of the layer.

    Args:
        layer: A built layer, or `None`.
    """
    with contextlib.ExitStack() as scopes:
        for name in layer.path.split("/") if layer is not None else ():
            scopes.enter_context(keras.name_scope(name))
        yield


def classes_of(layer):
    """The classes in a layer by their registered names.

    In `keras.saving.custom_object_scope` they are found even if they are not
    registered.
    """
    kinds = {type(part) for part in with_sublayers(layer)}
    return {keras.saving.get_registered_name(kind): kind for kind in kinds}
