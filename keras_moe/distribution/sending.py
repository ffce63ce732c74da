"""Where a layer hands its tokens over: one device, or all that there are."""

import keras

from keras_moe.distribution import mesh


def send(dispatcher, tokens, routing, experts, *args, meanwhile=None, **kwargs):
    """`dispatcher(...)`, on all devices that compute together.

    A dispatcher that moves rows itself is called as it is. `meanwhile` is
    called while rows travel where somebody must say when; compilers see for
    themselves what does not depend on them.
    """
    everything = (dispatcher, tokens, routing, experts, *args)
    if not dispatcher.moves_rows:
        if experts.engine is not None:
            if experts.engine.waits_for_rows:
                kwargs["meanwhile"] = meanwhile
            return experts.engine.dispatch(*everything, **kwargs)
        distribution = _active_mesh()
        if distribution is not None:
            return mesh.dispatch(distribution, *everything, **kwargs)
    return dispatcher(tokens, routing, experts, *args, **kwargs)


def apply_to_tokens(layer, function, tokens):
    """`function(layer, tokens)`, on each device for its own tokens.

    For layers whose kernels the compiler cannot divide. Each row of the result
    must depend on its own token alone.
    """
    distribution = _active_mesh()
    if distribution is None:
        return function(layer, tokens)
    return mesh.apply(distribution, layer, function, tokens)


def _active_mesh():
    """What Keras divides batches by, where one program drives all devices."""
    if keras.config.backend() != "jax":
        return None
    return keras.distribution.distribution()
