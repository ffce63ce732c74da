import inspect


def split_arguments(layer_class, kwargs, fixed, flat=()):
    """Splits `kwargs` into arguments of a layer and of `keras.Model`.

    Args:
        layer_class: Class of a layer.
        kwargs: Dict of arguments.
        fixed: Names of arguments of the layer that the model itself sets.
        flat: Names of arguments that the layer takes as `**kwargs`.

    Raises:
        ValueError: If neither the layer nor the model takes an argument.
    """
    parameters = inspect.signature(layer_class.__init__).parameters
    known = {*parameters, *flat} - {"self", "kwargs", "name", *fixed}
    wrong = sorted(set(kwargs) - known - {"name", "trainable"})
    if wrong:
        raise ValueError(
            "Besides its own arguments the model takes these of "
            f"{layer_class.__name__}: {sorted(known)}. Received: {wrong}"
        )
    options = {key: kwargs[key] for key in kwargs if key in known}
    return options, {key: kwargs[key] for key in kwargs if key not in known}
