"""The operators of schema.py in plain PyTorch, through fastl2l/reference.py: any device, slow."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastl2l import reference
from fastl2l.ops.checks import check_numbers, check_parameters, check_rule, check_tensor, check_window
from fastl2l.ops.layout import from_rows, split_state, tiles_of, to_rows


@torch.no_grad()
def step_(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    states: Sequence[Tensor],
    weights: Sequence[Tensor],
    rule: str,
    update_scale: float,
    grad_scale: float,
    finite: Tensor | None = None,
    given: Tensor | None = None,
    decay: float = 0.0,
    rate: Tensor | None = None,
    units: Tensor | None = None,
) -> None:
    """See schema.py. The update is that of the new h as it is before it is rounded to the state's dtype."""
    config = check_rule(weights, rule)
    check_parameters(config, params, grads, states, given, weights[0], contiguous=False)
    check_numbers(weights[0], update_scale, decay, rate, units, len(params))
    if finite is not None:
        find_nonfinite_(finite, grads, weights[0].dtype == torch.float32)
    dtype, sizes = weights[0].dtype, [param.numel() for param in params]
    states = split_state(states, sizes)
    tiles = [tiles_of(size) for size in sizes]
    all_given = [None] * len(params) if given is None else given.split(tiles)
    found = []  # all of it first: what fails on the way has changed nothing
    all_units = [None] * len(params) if units is None else units.unbind()
    for param, grad, state, rows, unit in zip(params, grads, states, all_given, all_units, strict=True):
        size = param.numel()
        update, new_rows = reference.step(
            grad.reshape(-1).to(dtype) * grad_scale,
            to_rows(state, size).to(dtype),
            weights,
            rule,
            update_scale if rate is None else update_scale * rate,
            None if rows is None else to_rows(rows, size),
        )
        update = update if unit is None else update * unit
        wide = torch.promote_types(param.dtype, dtype)
        kept = param.to(wide)
        if decay:
            kept = kept * (1 - (decay if rate is None else decay * rate.to(wide)))
        found.append(((kept + update.to(wide).view_as(param)).to(param.dtype), from_rows(new_rows).to(state.dtype)))
    for param, state, (new_param, new_state) in zip(params, states, found, strict=True):
        if config.output != "none":
            _write(param, new_param, finite)
        _write(state, new_state, finite)


def window_backward(
    state: Tensor,
    grads: Tensor,
    adjoints: Tensor,
    weights: Sequence[Tensor],
    rule: str,
    update_scale: float,
    dstate: Tensor | None,
    need_dstate: bool,
    need_dgrads: bool,
    given: Tensor | None = None,
    need_dgiven: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """See schema.py."""
    config = check_rule(weights, rule)
    check_window(config, state, grads, adjoints, dstate, given, weights[0], contiguous=False)
    check_numbers(weights[0], update_scale)
    steps, numel = grads.shape
    with torch.enable_grad(), reference.exact(state.device):
        weights = [weight.detach().requires_grad_() for weight in weights]
        first = to_rows(state.detach(), numel).requires_grad_()
        grads = grads.detach().requires_grad_()
        given = None if given is None else given.detach().requires_grad_()
        rows, loss = first, state.new_zeros(())
        for t in range(steps):
            extra = None if given is None else to_rows(given[t], numel)
            update, rows = reference.step(grads[t], rows, weights, rule, update_scale, extra)
            loss = loss + adjoints[t] @ update
        if dstate is not None:
            loss = loss + (to_rows(dstate, numel) * rows).sum()
        leaves = [*weights, first, grads] + ([] if given is None else [given])
        loss = loss if loss.requires_grad else rows.sum() * 0.0  # a rule without output, whose state nobody looks at
        found = torch.autograd.grad(loss, leaves, allow_unused=True, materialize_grads=True)
    count = len(weights)
    return (
        torch.cat([gradient.reshape(-1) for gradient in found[:count]]),
        from_rows(found[count]) if need_dstate else torch.empty_like(state[:0]),
        found[count + 1] if need_dgrads else torch.empty_like(grads[:0]),
        found[count + 2] if given is not None and need_dgiven else state.new_empty(0),
    )


def find_nonfinite_(finite: Tensor, tensors: Sequence[Tensor], in_float32: bool = False) -> None:
    """See schema.py."""
    check_tensor("finite", finite, finite, (1,), torch.bool)
    for tensor in tensors:
        finite &= (tensor.float() if in_float32 else tensor).isfinite().all()


def _write(target: Tensor, value: Tensor, finite: Tensor | None) -> None:
    """Without asking the host whether it is to be done."""
    target.copy_(value if finite is None else torch.where(finite.view(()), value, target))
