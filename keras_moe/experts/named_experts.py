import inspect

import keras

from keras_moe.experts.glu_experts import GLUExperts
from keras_moe.experts.mlp_experts import MLPExperts

_NAMED = {"glu": GLUExperts, "mlp": MLPExperts}


def get(identifier, **kwargs):
    """Returns the experts of a name or config, or the given experts.

    Args:
        identifier: `"glu"` for `GLUExperts`, `"mlp"` for `MLPExperts`, a config
            dict of `keras.saving.serialize_keras_object`, or a layer, which is
            returned unchanged.
        **kwargs: Arguments of the experts, if `identifier` is a name.

    Returns:
        A layer.

    Raises:
        ValueError: If the name is not known.

    Example:

    >>> keras_moe.experts.get("mlp", num_experts=4, intermediate_dim=8).use_bias
    True
    """
    if isinstance(identifier, str):
        return _NAMED[_as_name(identifier)](**kwargs)
    if isinstance(identifier, dict):
        return keras.saving.deserialize_keras_object(identifier)
    return identifier


def arguments_of(name):
    """The names of the arguments of the experts that `get(name)` makes."""
    make = _NAMED[_as_name(name)]
    return {
        argument
        for parent in make.__mro__
        if parent.__module__.startswith("keras_moe.")
        for argument in inspect.signature(parent.__init__).parameters
    } - {"self", "kwargs"}


def _as_name(name):
    if name not in _NAMED:
        raise ValueError(
            f"`experts` must be one of {tuple(_NAMED)} or a layer. "
            f"Received: experts={name!r}"
        )
    return name
