"""Scenario-Wise-Rec: STAR with its normalization, and M3oE."""

import keras
from keras import ops

from keras_moe.layers import BalancedExperts
from keras_moe.layers import PartitionedNormalization
from keras_moe.layers import STARDense
from keras_moe.recommendation.layers.star_dense import of_domain
from tests.recommendation_cases.recorded import EPSILON


def matches(config, recorded):
    return recorded.has("share_parm_w") or recorded.has("slot_weight")


def outputs(config, recorded):
    x, domain = recorded.inputs["x"], recorded.inputs["domain"]
    if recorded.has("slot_weight"):
        return {"y": _m3oe(recorded, x, domain)}
    return {"y": _star(recorded, x, domain)}


def _star(recorded, x, domain):
    logit = recorded.network(x, "auxnet", linear_last=True)
    # By the mean and the variance of the whole batch, in inference too.
    mean = ops.mean(x, axis=0, keepdims=True)
    variance = ops.mean(ops.square(x - mean), axis=0, keepdims=True)
    x = (x - mean) / ops.sqrt(variance + 1e-6)
    domains = recorded.count("domain_specific_dn_gamma.{}")
    layer = PartitionedNormalization(domains, epsilon=EPSILON)
    h = layer(x, domain)
    recorded.assign(layer.moving_variance, 1 - EPSILON)
    recorded.put(layer.gamma, "dn_share_gamma")
    recorded.put(layer.beta, "dn_share_bias")
    for d in range(domains):
        gamma, beta = (
            f"domain_specific_dn_{name}.{d}" for name in ("gamma", "bias")
        )
        recorded.put(layer.domain_gamma, gamma, d)
        recorded.put(layer.domain_beta, beta, d)
    for number in range(recorded.count("share_parm_w.{}")):
        h = _star_dense(recorded, h, number, domains)
    return ops.sigmoid(of_domain(h, domain) + logit)[:, 0]


def _star_dense(recorded, h, number, domains):
    units = recorded.weights[f"share_parm_w.{number}"].shape[1]
    layer = STARDense(domains, units)
    h = layer(h)
    recorded.put(layer.kernel, f"share_parm_w.{number}")
    recorded.put(layer.bias, f"share_parm_b.{number}")
    norm = keras.layers.BatchNormalization(epsilon=EPSILON)
    h = norm(ops.reshape(h, (-1, domains * units)))
    for d in range(domains):
        weight, bias = (f"domain_specific_{x}.{d}.{number}" for x in "wb")
        recorded.put(layer.domain_kernel, weight, d)
        recorded.put(layer.domain_bias, bias, d)
        part = slice(d * units, (d + 1) * units)
        recorded.fill_batch_norm(norm, f"domain_specific_bn.{d}.{number}", part)
    return ops.reshape(ops.relu(h), (-1, domains, units))


def _m3oe(recorded, x, domain):
    domains = recorded.count("slot_weight.{}")
    layer = STARDense(domains, recorded.weights["shared_weight"].shape[1])
    h = layer(x, domain)
    recorded.put(layer.kernel, "shared_weight")
    recorded.put(layer.bias, "shared_bias")
    for d in range(domains):
        recorded.put(layer.domain_kernel, f"slot_weight.{d}", d)
        recorded.put(layer.domain_bias, f"slot_bias.{d}", d)
    h = recorded.network(h, "star_mlp") + recorded.network(x, "skip_conn")
    experts = [f"expert.{e}" for e in range(recorded.count("expert.{}"))]
    mixed, _ = recorded.moe(
        h,
        domains,
        [[]] * domains + [experts],
        [f"gate.{d}" for d in range(domains)],
        gate_inputs=ops.stop_gradient(h),
    )
    own = recorded.networks(h, [f"domain_expert.{d}" for d in range(domains)])
    balanced = BalancedExperts()
    h = balanced(mixed, own)
    for variable, name in (
        (balanced.balance_logit, "_weight_bal_d.deep_weights"),
        (balanced.weight_logit, "_weight_exp_d.deep_weights"),
    ):
        recorded.put(
            variable, name, ..., lambda w: w[0], lambda d: d.reshape(1)
        )
    towers = [f"tower.{d}" for d in range(domains)]
    logits = recorded.networks(h, towers, linear_last=True)
    return ops.sigmoid(of_domain(logits, domain)[:, 0])
