"""The expert bias of `TopKRouter`, which balances the load without a loss.

Algorithm 1 of Wang et al., 2024 (https://arxiv.org/abs/2408.15664).
"""

from keras import ops

from keras_moe import backend
from keras_moe.ops.routing import expert_counts

BIAS_KINDS = (False, True, "scores", "logits")


def add_expert_bias(router):
    router.expert_bias = _add_state(router, "expert_bias", router.num_experts)
    if router.bias_update_steps > 1:
        router.bias_counts = _add_state(
            router, "bias_counts", router.num_experts
        )
        router.bias_step = _add_state(router, "bias_step")


def _add_state(router, name, *shape):
    # Every replica computes the same, from the counts of all.
    return router.add_weight(
        name=name,
        shape=shape,
        initializer="zeros",
        trainable=False,
        aggregation="only_first_replica",
    )


def update_expert_bias(router, routing, mask=None):
    """Takes a step of the bias against the load of the batch.

    With `bias_update_steps` above 1 the load is added up over as many calls,
    and the step taken in the last of them.
    """
    counts = expert_counts(routing, router.num_experts, mask)
    counts = ops.stop_gradient(backend.all_reduce_sum(counts))
    counts = ops.cast(counts, router.compute_dtype)
    if router.bias_update_steps == 1:
        router.expert_bias.assign(router.expert_bias + _change(router, counts))
        return
    bias = ops.convert_to_tensor(router.expert_bias)
    counts = router.bias_counts + counts
    step = router.bias_step + 1
    due = step >= router.bias_update_steps
    for state, if_due, otherwise in (
        (router.expert_bias, bias + _change(router, counts), bias),
        (router.bias_counts, ops.zeros_like(counts), counts),
        (router.bias_step, ops.zeros_like(step), step),
    ):
        state.assign(ops.where(due, if_due, otherwise))


def _change(router, counts):
    """The sign rule, for the experts that are chosen."""
    counts = counts[: router.num_experts - router.num_always_on]
    change = router.bias_update_rate * ops.sign(ops.mean(counts) - counts)
    if router.bias_update_centered:
        change = change - ops.mean(change)
    return ops.pad(change, [[0, router.num_always_on]])
