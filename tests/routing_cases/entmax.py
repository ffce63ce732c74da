"""Recorded maps of the package entmax, each as an `EntmaxRouter`."""

from keras_moe.routers.entmax_router import EntmaxRouter


def matches(config, arrays):
    maps = ("p/sparsemax", "p/entmax", "p/bisect_")
    return "logits" in arrays and any(k.startswith(maps) for k in arrays)


def alpha_of(name):
    """The `alpha` of a recorded map, `None` if the map is not an entmax.

    `"rows"` stands for one of its own for each row. Of a name like
    `sparsemax_k4` the end only says how the original computes it.
    """
    kind, _, option = name.partition("_")
    if kind in ("sparsemax", "entmax15"):
        return {"sparsemax": 2.0, "entmax15": 1.5}[kind]
    if kind == "bisect":
        return "rows" if option == "rowalpha" else float(option)
    return None


def router_from_case(config, arrays, alpha=1.5):
    """With the identity as kernel: its tokens are the recorded logits."""
    num_experts = arrays["logits"].shape[-1]
    router = EntmaxRouter(
        num_experts, alpha=alpha, kernel_initializer="identity"
    )
    router.build((None, num_experts))
    return router
