import keras

from keras_moe.experts.glu_experts import GLUExperts
from keras_moe.experts.mlp_experts import MLPExperts

_NAMED = {"glu": GLUExperts, "mlp": MLPExperts}


def get(identifier, **kwargs):
    """Experts from their name, their config or themselves.

    Args:
        identifier: `"glu"` for `GLUExperts`, `"mlp"` for `MLPExperts`, a config
            dict of `keras.saving.serialize_keras_object`, or a layer, which is
            returned as it is.
        **kwargs: For a name: arguments of the experts.

    Returns:
        A layer.

    Raises:
        ValueError: If the name is not known.

    Example:

    >>> keras_moe.experts.get("mlp", num_experts=4, intermediate_dim=8).use_bias
    True
    """
    if isinstance(identifier, str):
        if identifier not in _NAMED:
            raise ValueError(
                f"`experts` must be one of {tuple(_NAMED)} or a layer. "
                f"Received: experts={identifier!r}"
            )
        return _NAMED[identifier](**kwargs)
    if isinstance(identifier, dict):
        return keras.saving.deserialize_keras_object(identifier)
    return identifier
