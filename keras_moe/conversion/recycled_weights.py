"""Weights of experts from those of a dense feed-forward network, in NumPy."""

from typing import NamedTuple

import numpy as np

# The axis of the hidden units of each weight.
_HIDDEN_AXES = {
    "gate_kernel": 1,
    "gate_bias": 0,
    "up_kernel": 1,
    "up_bias": 0,
    "down_kernel": 0,
}


class Recipe(NamedTuple):
    """How experts are made of a dense network; `upcycle` says what it means."""

    intermediate_dim: int | None
    sampling: str
    reinit: float
    noise: float

    def gives_copies(self):
        return self.intermediate_dim is None and not (self.reinit or self.noise)


def expert_weights(dense, num_experts, recipe, rng):
    """The weights of a bank of experts.

    Args:
        dense: dict of names, as `"up_kernel"`, to arrays of one network.
        num_experts: int.
        recipe: A `Recipe`.
        rng: A NumPy generator.

    Returns:
        dict of the same names to arrays `(E, ...)`.
    """
    experts = [_expert(dense, recipe, rng) for _ in range(num_experts)]
    return {name: np.stack([e[name] for e in experts]) for name in dense}


def _expert(dense, recipe, rng):
    weights = {name: np.array(value) for name, value in dense.items()}
    if recipe.intermediate_dim is not None:
        weights = _sampled(weights, recipe, rng)
    if recipe.reinit:
        _reinitialize(weights, recipe.reinit, rng)
    if recipe.noise:
        for name, value in weights.items():
            if name.endswith("kernel"):
                scale = recipe.noise * value.std()
                value += scale * rng.standard_normal(value.shape)
    return weights


def _sampled(weights, recipe, rng):
    """Some of the hidden units; what they give is scaled up in return."""
    number = weights["down_kernel"].shape[0]
    shares = None
    if recipe.sampling == "importance":
        shares = importance(weights)
        shares = shares / shares.sum()
    units = np.sort(
        rng.choice(number, recipe.intermediate_dim, replace=False, p=shares)
    )
    found = dict(weights)
    for name, axis in _HIDDEN_AXES.items():
        if name in found:
            found[name] = np.take(found[name], units, axis)
    found["down_kernel"] = found["down_kernel"] * (number / len(units))
    return found


def importance(weights):
    """How much each hidden unit can matter: the product of its norms.

    A tiny part of the mean is added, so that units of zeros can be drawn.
    """
    norms = np.linalg.norm(weights["down_kernel"], axis=1)
    for name in ("gate_kernel", "up_kernel"):
        if name in weights:
            norms = norms * np.linalg.norm(weights[name], axis=0)
    return norms + 1e-6 * norms.mean() + 1e-30


def _reinitialize(weights, share, rng):
    """Draws a share of the hidden units anew, like those that they replace."""
    number = weights["down_kernel"].shape[0]
    units = rng.choice(number, round(share * number), replace=False)
    if not len(units):
        return
    for name, axis in _HIDDEN_AXES.items():
        if name in weights:
            at = (slice(None),) * axis + (units,)
            old = weights[name][at]
            weights[name][at] = rng.normal(old.mean(), old.std(), old.shape)
