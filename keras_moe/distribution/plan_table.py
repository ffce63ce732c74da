"""A plan as text."""


def table(plan):
    axes = ", ".join(f"{n:,} {axis}" for axis, n in plan.mesh.items() if n > 1)
    devices = 1
    for number in plan.mesh.values():
        devices *= number
    parameters = _number(plan.parameters, " B")
    active = _number(plan.active_parameters, " B")
    rows = [
        ("devices", f"{devices:,}" + (f" = {axes}" if axes else "")),
        ("parameters", f"{parameters}, active {active}"),
        ("FLOPs a token, forward", _number(plan.flops_per_token)),
        ("", ""),
        ("of each device", ""),
        ("  weights", _bytes(plan.weights)),
        ("  gradients", _bytes(plan.gradients)),
        ("  optimizer state", _bytes(plan.optimizer_state)),
        ("  activations", _bytes(plan.activations)),
        ("  memory together", _bytes(plan.memory)),
        ("in each step", ""),
        ("  tokens", f"{plan.tokens:,}"),
        ("  FLOPs", _number(plan.flops)),
        ("  all-to-all, sent", _bytes(plan.all_to_all)),
        ("  all-reduce, sent", _bytes(plan.all_reduce)),
        ("  busiest device", f"{plan.imbalance:.2f} times the mean"),
    ]
    lines = [f"{left:<26}{right}".rstrip() for left, right in rows]
    if plan.layers:
        lines.append("")
        lines.append(
            f"{'MoE layers':<26}{'experts':>8}{'rows':>12}{'imbalance':>11}"
            f"{'weights':>12}{'all-to-all':>12}"
        )
    for layer in plan.layers:
        name = f"  {layer.num_layers} x {layer.name}"
        lines.append(
            f"{name:<26}{layer.num_experts:>8}{layer.rows:>12,}"
            f"{layer.imbalance:>11.2f}{_bytes(layer.weights):>12}"
            f"{_bytes(layer.all_to_all):>12}"
        )
    return "\n".join(lines)


def _bytes(number):
    for unit in ("B", "KiB", "MiB", "GiB"):
        if number < 1024:
            return f"{number:.1f} {unit}" if unit != "B" else f"{number} B"
        number /= 1024
    return f"{number:,.1f} TiB"


def _number(number, giga=" G"):
    for unit in ("", " K", " M", giga, " T"):
        if number < 1000:
            return f"{number:.4g}{unit}"
        number /= 1000
    return f"{number:.4g} P"
