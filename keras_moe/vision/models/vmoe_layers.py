"""The `MoE` layers of a backbone, from its arguments."""

import math

from keras_moe import experts as experts_lib
from keras_moe import losses as losses_lib
from keras_moe import routers
from keras_moe.checks import check_at_least
from keras_moe.checks import check_int
from keras_moe.dispatch.capacity import Capacity
from keras_moe.losses.importance_loss import ImportanceLoss
from keras_moe.losses.load_balancing_loss import LoadBalancingLoss
from keras_moe.losses.load_loss import LoadLoss
from keras_moe.losses.routing_loss import RoutingLoss
from keras_moe.moe.moe import MoE
from keras_moe.routers.expert_choice_router import ExpertChoiceRouter
from keras_moe.vision.models.moe_blocks import own_copy
from keras_moe.vision.models.moe_blocks import per_block

# What `keras_moe.models.VMoEBackbone` has by default.
DEFAULTS = {
    "router": "v_moe",
    "top_k": None,
    "router_noise": None,
    "normalize_weights": None,
    "capacity_factor": 1.05,
    "eval_capacity_factor": math.inf,
    "capacity_multiple_of": 4,
    "drop_policy": "position",
    "group_size": None,
    "route_per": "token",
    "importance_loss_weight": 5e-3,
    "load_loss_weight": 5e-3,
    "load_balancing_loss_weight": 0.0,
    "losses": None,
    "num_shared_experts": 0,
    "expert_dropout": 0.0,
}
# What backbones have no arguments for.
_FIXED = {
    "capacity_rule": "ceil",
    "loss_ddof": 0,
    "use_output_bias": True,
    "ensemble_size": 1,
    "experts": "mlp",
    "shared_mlp_dim": None,
    "assignments": "first",
}


def split_moe_arguments(kwargs, **defaults):
    """`(arguments of experts, other arguments)`, the first all there.

    Args:
        kwargs: dict. Arguments of a backbone.
        **defaults: Where it differs from `DEFAULTS`.
    """
    moe = {**DEFAULTS, **defaults}
    moe |= {name: value for name, value in kwargs.items() if name in moe}
    return moe, {name: v for name, v in kwargs.items() if name not in moe}


def check_no_context(layers):
    """Raises if a router needs what the backbone has no input for."""
    for layer in layers.values():
        if layer.router.needs_context:
            raise ValueError(
                "`router` must not need a context, for which this backbone has "
                f"no input. Received: router={layer.router!r}"
            )


def block_arguments(a):
    """What the blocks around these layers are told of groups of tokens."""
    check_int("num_shared_experts", a["num_shared_experts"], 0)
    group_size, members = a["group_size"], a.get("ensemble_size", 1)
    check_int("ensemble_size", members, 1)
    if group_size not in (None, "image"):
        check_int("group_size", group_size, 1)
        if group_size % members:
            raise ValueError(
                "`ensemble_size` must divide `group_size`. Received: "
                f"ensemble_size={members}, group_size={group_size}"
            )
        group_size //= members
    return {
        "group_size": None if group_size == "image" else group_size,
        "route_per": a["route_per"],
    }


def moe_of_blocks(a, where):
    """The `MoE` of each block.

    Args:
        a: dict. The arguments of the backbone; any of `mlp_dim` and of those of
            experts may be a list with one for each block.
        where: list of ints. The blocks with experts.

    Returns:
        dict of block numbers to layers, or with an ensemble to the list of the
        layers of its members.
    """
    several = {
        name: per_block(name, a[name], len(where))
        for name in (
            *("num_experts", "router", "top_k", "router_noise", "mlp_dim"),
            *("capacity_factor", "eval_capacity_factor"),
        )
    }
    a = {**_FIXED, **a}
    return {
        block: _members({**a, **{k: v[i] for k, v in several.items()}})
        for i, block in enumerate(where)
    }


def _members(a):
    number = a["ensemble_size"]
    if number == 1:
        return _moe(a, "moe")
    check_int("num_experts", a["num_experts"], 1)
    if a["num_experts"] % number:
        raise ValueError(
            "`ensemble_size` must divide `num_experts`. Received: "
            f"ensemble_size={number}, num_experts={a['num_experts']}"
        )
    a = {**a, "num_experts": a["num_experts"] // number}
    # The loss is the mean over the members.
    for name in (
        *("importance_loss_weight", "load_loss_weight"),
        "load_balancing_loss_weight",
    ):
        check_at_least(name, a[name], 0)
        a[name] = a[name] / number
    a["losses"] = [
        _part_of(loss, number) for loss in losses_lib.get(a["losses"])
    ]
    return [_moe(a, f"moe_{i}") for i in range(number)]


def _part_of(loss, number):
    if not isinstance(loss, RoutingLoss):
        raise ValueError(
            "With an ensemble, `losses` must be of keras_moe.losses, so that "
            f"their weight can be divided. Received: {loss!r}"
        )
    config = {**loss.get_config(), "weight": loss.weight / number}
    return type(loss).from_config(config)


def _moe(a, name):
    per = "batch" if a["group_size"] is None else "sequence"
    router = _router(a, per)
    shared = None
    if a["num_shared_experts"]:
        shared = _experts(
            {**a, "mlp_dim": a["shared_mlp_dim"] or a["mlp_dim"]},
            a["num_shared_experts"],
            "shared_experts",
        )
    capacity = None
    if not isinstance(router, ExpertChoiceRouter):
        capacity = Capacity(
            a["capacity_factor"],
            a["eval_capacity_factor"],
            rule=a["capacity_rule"],
            multiple_of=a["capacity_multiple_of"],
            drop_policy=a["drop_policy"],
            per=per,
        )
    return MoE(
        router=router,
        experts=_experts(a, a["num_experts"], "experts"),
        shared_experts=shared,
        losses=[*_losses(a, router, per), *losses_lib.get(a["losses"])],
        capacity=capacity,
        dtype=a["dtype"],
        name=name,
    )


def _router(a, per):
    router = a["router"]
    if not isinstance(router, str):
        return routers.get(own_copy(router))
    options = {
        "num_experts": a["num_experts"],
        "top_k": a["top_k"],
        "normalize_weights": a.get("normalize_weights"),
        "dtype": a["dtype"],
    }
    if a["router_noise"] is not None:
        check_at_least("router_noise", a["router_noise"], 0)
        options["noise_stddev"] = a["router_noise"] / a["num_experts"]
    if router == "expert_choice":
        options |= {
            "capacity_factor": a["capacity_factor"],
            "capacity_multiple_of": a["capacity_multiple_of"],
            "per": per,
        }
    options = {k: v for k, v in options.items() if v is not None}
    return routers.get(router, name="router", **options)


def _experts(a, number, name):
    options = {}
    if a["experts"] == "mlp":
        options["use_output_bias"] = a["use_output_bias"]
    return experts_lib.get(
        a["experts"],
        num_experts=number,
        intermediate_dim=a["mlp_dim"],
        activation=a["activation"],
        dropout=a["expert_dropout"],
        dtype=a["dtype"],
        name=name,
        **options,
    )


def _losses(a, router, per):
    if isinstance(router, ExpertChoiceRouter):
        return
    if a["importance_loss_weight"]:
        yield ImportanceLoss(
            a["importance_loss_weight"],
            scores="softmax",
            ddof=a["loss_ddof"],
            per=per,
        )
    if a["load_loss_weight"] and hasattr(router.routing_class, "load"):
        yield LoadLoss(a["load_loss_weight"], ddof=a["loss_ddof"], per=per)
    if a["load_balancing_loss_weight"]:
        yield LoadBalancingLoss(
            a["load_balancing_loss_weight"],
            per=per,
            assignments=a["assignments"],
        )
