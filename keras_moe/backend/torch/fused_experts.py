"""A whole bank of feed-forward experts, from tokens to tokens, on CPUs.

All that lies between two products is done for a few experts at a time, while
their rows are in the cache.
"""

import torch

from keras_moe.backend.torch import memory
from keras_moe.backend.torch import plain
from keras_moe.backend.torch.batches import lay_out


def expert_loop(*inputs):
    if plain.is_exporting():
        return plain.fused_experts(*inputs)
    return _expert_loop(*inputs)


@torch.compiler.disable  # the sizes of the batches are data
def _expert_loop(
    tokens, row_weights, choices, group_sizes, kernels, biases, hidden
):
    if tokens.device.type != "cpu":
        raise NotImplementedError(f"device {tokens.device.type}")
    layout = lay_out(choices, group_sizes, tokens.shape[0])
    inputs = (tokens.contiguous(), row_weights, *kernels, *biases)
    keep = torch.is_grad_enabled() and any(
        x is not None and x.requires_grad for x in inputs
    )
    if not keep:
        memory.release()  # no training: a good time
    plan = layout, choices, group_sizes
    return _Experts.apply(plan, hidden, keep, *inputs)


class _Experts(torch.autograd.Function):
    @staticmethod
    def forward(ctx, plan, hidden, keep, tokens, row_weights, *banks):
        layout = plan[0]
        *layers, (last_kernel, last_bias) = _by_layer(banks)
        weights = layout.to_places(row_weights, tokens.dtype)
        rows = tokens.new_empty(len(weights) + 1, last_kernel.shape[2])
        num_kept = len(weights) if keep else layout.most_places
        inner = [
            tokens.new_empty(num_kept, kernel.shape[2]) for kernel, _ in layers
        ]
        gathered = tokens.new_empty(layout.most_places, tokens.shape[1])
        for batch in layout.batches:
            token = layout.token_of_place[batch.places]
            x = batch.stack(_take(tokens, token, gathered))
            here = batch.places if keep else slice(len(token))
            products = [p[here] for p in inner]
            for p, layer in zip(products, layers, strict=True):
                _dense(x, *map(batch.pick, layer), out=batch.stack(p))
            h = batch.stack(hidden(*products))
            y = rows[batch.places]
            last = batch.pick(last_kernel), batch.pick(last_bias)
            _dense(h, *last, out=batch.stack(y))
            y.mul_(weights[batch.places])
        if keep:
            ctx.save_for_backward(tokens, row_weights, *banks, *inner)
            ctx.plan, ctx.hidden = plan, hidden
        return layout.sum_by_token(rows)

    @staticmethod
    @torch.compiler.disable  # autograd calls it by itself
    def backward(ctx, d_out):
        layout = ctx.plan[0]
        tokens, row_weights, *saved = ctx.saved_tensors
        needs_tokens, needs_weights, *needs = ctx.needs_input_grad[3:]
        banks, inner = saved[: len(needs)], saved[len(needs) :]
        if torch.is_grad_enabled():  # by `create_graph=True`
            inputs = tokens, row_weights, *banks
            return None, None, None, *_differentiable(ctx, inputs, d_out)
        *layers, (last_kernel, last_bias) = _by_layer(banks)
        d_banks = [
            _unfilled_gradient(bank, layout.idle) if needed else None
            for bank, needed in zip(banks, needs, strict=True)
        ]
        *d_layers, d_last = _by_layer(d_banks)
        needs_inner = needs_tokens or any(
            d is not None for layer in d_layers for d in layer
        )
        dtype = torch.promote_types(tokens.dtype, torch.float32)
        weights = layout.to_places(row_weights, tokens.dtype)
        d_weights = torch.empty(len(weights), dtype=dtype)
        d_tokens = tokens.new_empty(len(weights) + 1, tokens.shape[1])
        d_out = d_out.contiguous()  # it may be expanded
        taken_out = d_out.new_empty(layout.most_places, d_out.shape[1])
        taken_in = tokens.new_empty(layout.most_places, tokens.shape[1])
        for batch in layout.batches:
            places = batch.places
            token = layout.token_of_place[places]
            with torch.enable_grad():
                products = [p[places].detach().requires_grad_() for p in inner]
                hidden = ctx.hidden(*products)
            h = hidden.detach()
            d_rows = _take(d_out, token, taken_out)  # without the weights yet
            d_h = _dense(batch.stack(d_rows), batch.pick(last_kernel).mT)
            d_h = d_h.flatten(0, 1)
            if needs_weights:
                # <row, d_row> for rows that have not been kept.
                d_weights[places] = _dots(h, d_h, dtype)
                if last_bias is not None:
                    bias = batch.pick(last_bias)[:, None]
                    dots = _dots(batch.stack(d_rows), bias, dtype)
                    d_weights[places] += dots.flatten()
            d_rows.mul_(weights[places])
            _fill_gradients(d_last, batch, h, d_rows)
            if not needs_inner:
                continue
            x = _take(tokens, token, taken_in)
            d_products = _slopes(hidden, products, d_h.mul_(weights[places]))
            d_x = batch.stack(d_tokens[places])
            for i, d in enumerate(map(batch.stack, d_products)):
                _fill_gradients(d_layers[i], batch, x, d)
                if needs_tokens:
                    kernel = batch.pick(layers[i][0]).mT
                    torch.baddbmm(d_x, d, kernel, beta=int(i > 0), out=d_x)
        return (
            *(None, None, None),
            layout.sum_by_token(d_tokens) if needs_tokens else None,
            layout.to_rows(d_weights, row_weights) if needs_weights else None,
            *d_banks,
        )


def _differentiable(ctx, inputs, d_out):
    """The gradients by plain operations, to be differentiated again."""
    _, choices, group_sizes = ctx.plan

    def experts(tokens, row_weights, *banks):
        half = len(banks) // 2
        return plain.fused_experts(
            tokens,
            row_weights,
            choices,
            group_sizes,
            banks[:half],
            banks[half:],
            ctx.hidden,
        )

    return plain.gradients(experts, inputs, ctx.needs_input_grad[3:], d_out)


def _by_layer(banks):
    """All kernels and then all biases -> `(kernel, bias)` of each layer."""
    half = len(banks) // 2
    return list(zip(banks[:half], banks[half:], strict=True))


def _take(rows, index, space):
    return torch.index_select(rows, 0, index, out=space[: len(index)])


def _dense(x, kernel, bias=None, out=None):
    """`(b, n, D), (b, D, F), (b, F) -> (b, n, F)`."""
    if bias is None:
        return torch.bmm(x, kernel, out=out)
    return torch.baddbmm(bias[:, None], x, kernel, out=out)


def _dots(a, b, dtype):
    return torch.linalg.vecdot(a.to(dtype), b.to(dtype))


def _slopes(hidden, products, d_hidden):
    if not hidden.requires_grad:  # a step has no slope
        return [torch.zeros_like(p) for p in products]
    return torch.autograd.grad(
        hidden, products, d_hidden, materialize_grads=True
    )


def _unfilled_gradient(bank, idle):
    gradient = memory.empty(bank.shape, bank.dtype)
    for expert in idle:
        gradient[expert] = 0
    return gradient


def _fill_gradients(d_layer, batch, x, d_y):
    d_kernel, d_bias = map(batch.pick, d_layer)
    x, d_y = batch.stack(x), batch.stack(d_y)
    if d_kernel is not None:
        torch.bmm(x.mT, d_y, out=d_kernel)
    if d_bias is not None:
        torch.sum(d_y, 1, out=d_bias)
