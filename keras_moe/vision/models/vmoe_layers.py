"""The `MoE` layers of transformers, from the arguments of a backbone."""

import keras

from keras_moe import experts as experts_lib
from keras_moe import losses as losses_lib
from keras_moe import routers
from keras_moe.checks import check_at_least
from keras_moe.dispatch.capacity import Capacity
from keras_moe.losses.importance_loss import ImportanceLoss
from keras_moe.losses.load_balancing_loss import LoadBalancingLoss
from keras_moe.losses.load_loss import LoadLoss
from keras_moe.moe.moe import MoE
from keras_moe.moe.part_arguments import serialize_part
from keras_moe.routers.expert_choice_router import ExpertChoiceRouter
from keras_moe.vision.models.moe_blocks import per_block


def moe_of_blocks(a, where):
    """The `MoE` of each block.

    Args:
        a: dict. The arguments of a `VMoEBackbone`, and as far as they are not
            V-MoE's: `experts`, a name of `keras_moe.experts.get`,
            `shared_mlp_dim`, the width of shared experts, and `assignments` of
            the `LoadBalancingLoss`.
        where: list of ints. The blocks with experts.

    Returns:
        dict of block numbers to layers.
    """
    several = {
        name: per_block(name, a[name], len(where))
        for name in (
            *("num_experts", "router", "top_k", "router_noise"),
            *("capacity_factor", "eval_capacity_factor"),
        )
    }
    return {
        block: _moe({**a, **{k: v[i] for k, v in several.items()}})
        for i, block in enumerate(where)
    }


def _moe(a):
    per = "batch" if a["group_size"] is None else "sequence"
    router = _router(a, per)
    shared = None
    if a["num_shared_experts"]:
        shared = _experts(
            {**a, "mlp_dim": a.get("shared_mlp_dim", a["mlp_dim"])},
            a["num_shared_experts"],
            "shared_experts",
        )
    capacity = None
    if not isinstance(router, ExpertChoiceRouter):
        capacity = Capacity(
            a["capacity_factor"],
            a["eval_capacity_factor"],
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
        name="moe",
    )


def _router(a, per):
    router = a["router"]
    if not isinstance(router, str):
        # Each block has its own.
        if isinstance(router, keras.layers.Layer):
            router = serialize_part(router)
        return routers.get(router)
    options = {
        "num_experts": a["num_experts"],
        "top_k": a["top_k"],
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
    return experts_lib.get(
        a.get("experts", "mlp"),
        num_experts=number,
        intermediate_dim=a["mlp_dim"],
        activation=a["activation"],
        dropout=a["expert_dropout"],
        dtype=a["dtype"],
        name=name,
    )


def _losses(a, router, per):
    if isinstance(router, ExpertChoiceRouter):
        return
    if a["importance_loss_weight"]:
        yield ImportanceLoss(
            a["importance_loss_weight"], scores="softmax", per=per
        )
    if a["load_loss_weight"] and hasattr(router.routing_class, "load"):
        yield LoadLoss(a["load_loss_weight"], per=per)
    if a["load_balancing_loss_weight"]:
        yield LoadBalancingLoss(
            a["load_balancing_loss_weight"],
            per=per,
            assignments=a.get("assignments", "first"),
        )
