import keras

from keras_moe.routers.top_k_router import TopKRouter


def _top_k(num_experts, top_k=2, **kwargs):
    return TopKRouter(num_experts, top_k, **kwargs)


def _switch(num_experts, **kwargs):
    kwargs = {"top_k": 1, "jitter": 1e-2, **kwargs}
    return TopKRouter(num_experts, **kwargs)


_NAMED = {"top_k": _top_k, "switch": _switch}


def get(identifier, **kwargs):
    """A router from its name, its config or itself.

    Args:
        identifier: One of
            - `"top_k"`: `TopKRouter` with its defaults.
            - `"switch"`: the router of the Switch Transformer: `top_k` 1, the
              probability as weight, input jitter 0.01 (Fedus et al., 2021,
              sections 2.1 and 2.4).
            - a config dict of `keras.saving.serialize_keras_object`.
            - a router, which is returned as it is.
        **kwargs: For a name: arguments of the router, `num_experts` among
            them. They override what the name stands for.

    Returns:
        A router layer.

    Raises:
        ValueError: If the name is not known.

    Example:

    >>> keras_moe.routers.get("switch", num_experts=4).top_k
    1
    """
    if isinstance(identifier, str):
        if identifier not in _NAMED:
            raise ValueError(
                f"`router` must be one of {tuple(_NAMED)} or a router layer. "
                f"Received: router={identifier!r}"
            )
        return _NAMED[identifier](**kwargs)
    if isinstance(identifier, dict):
        return keras.saving.deserialize_keras_object(identifier)
    return identifier
