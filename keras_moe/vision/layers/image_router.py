"""Weighs experts for whole images."""

from keras import ops

from keras_moe import routers
from keras_moe.checks import check_int


def as_image_router(router, num_experts, dtype):
    """The router of images, from a router, its name, its config or `None`.

    Args:
        router, num_experts: Arguments of the layer.
        dtype: The layer's dtype policy, for a router made here.
    """
    if num_experts is not None:
        check_int("num_experts", num_experts, 1)
    kwargs = {"name": "router", "dtype": dtype}
    if router is None or isinstance(router, str):
        kwargs["num_experts"] = 4 if num_experts is None else num_experts
    if router is None:
        return routers.DenseRouter(
            score_activation="sigmoid", use_bias=True, **kwargs
        )
    if isinstance(router, str):
        router = routers.get(router, **kwargs)
    else:
        router = routers.get(router)
    if not isinstance(router, routers.Router) or not _decides_alone(router):
        raise ValueError(
            "`router` must be a router of keras_moe.routers that decides for "
            f"each image by itself. Received: router={router!r}"
        )
    if num_experts not in (None, router.num_experts):
        raise ValueError(
            "`num_experts` must be the number of the router. Received: "
            f"num_experts={num_experts}, "
            f"router.num_experts={router.num_experts}"
        )
    return router


def _decides_alone(router):
    return not router.looks_ahead and not router.needs_context


def image_weights(router, images, training):
    """The weight of every expert for each image, `(B, E)`.

    Args:
        router: A built router, which reads the mean over each image.
        images: `(B, height, width, C)`.
        training: bool.
    """
    # The sum over an image may leave the range of float16.
    images = ops.cast(images, router.compute_dtype)
    routing = router(ops.mean(images, axis=(1, 2)), training=training)
    weights = routing.expert_weights
    chosen = ops.one_hot(
        routing.expert_indices, router.num_experts, dtype=weights.dtype
    )  # (B, K, E)
    return ops.einsum("bk,bke->be", weights, chosen)


def check_weights_shape(shape, num_experts):
    if len(shape) != 2 or shape[-1] != num_experts:
        raise ValueError(
            "`routing_weights` must be of shape (batch, num_experts). "
            f"Received: shape={tuple(shape)}, num_experts={num_experts}"
        )
