"""Where a layer hands its tokens over: one device, or all that there are."""

import keras

from keras_moe.distribution import mesh


def send(dispatcher, tokens, routing, experts, *args, **kwargs):
    """`dispatcher(...)`, on all devices of the active distribution.

    A dispatcher that moves rows itself is called as it is.
    """
    distribution = keras.distribution.distribution()
    if distribution is None or dispatcher.moves_rows:
        return dispatcher(tokens, routing, experts, *args, **kwargs)
    return mesh.dispatch(
        distribution, dispatcher, tokens, routing, experts, *args, **kwargs
    )


def apply_to_tokens(layer, function, tokens):
    """`function(layer, tokens)`, on each device for its own tokens.

    For layers whose kernels the compiler cannot divide. Each row of the result
    must depend on its own token alone.
    """
    distribution = keras.distribution.distribution()
    if distribution is None:
        return function(layer, tokens)
    return mesh.apply(distribution, layer, function, tokens)
