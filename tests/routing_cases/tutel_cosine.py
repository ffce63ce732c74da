"""The cosine router of Tutel, through public arguments."""

from keras_moe.routers.cosine_router import CosineRouter


def matches(config, arrays):
    return {"w/sim_matrix", "w/temperature"} <= set(arrays)


def variables_of(router):
    """`(recorded name, variable, whether it is transposed)` of each weight."""
    yield "temperature", router.log_scale, False
    yield "sim_matrix", router.kernel, False
    yield "cosine_projector.weight", router.projection_kernel, True
    yield "cosine_projector.bias", router.projection_bias, False


def router_from_case(config, arrays):
    """A built `CosineRouter` with the weights of the case."""
    projection_dim, num_experts = arrays["w/sim_matrix"].shape
    router = CosineRouter(
        num_experts,
        top_k=min(config.get("k", 2), num_experts),
        projection_dim=projection_dim,
        initial_temperature=config.get("init_t", 0.5),
        name="router",
    )
    router.build((None, arrays["x"].shape[-1]))
    for name, variable, transposed in variables_of(router):
        value = arrays[f"w/{name}"]
        value = value.T if transposed else value
        variable.assign(value.reshape(variable.shape))
    return router
