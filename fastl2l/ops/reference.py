"""The operators of schema.py in plain PyTorch, through fastl2l/reference.py: any device, slow."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastl2l import reference
from fastl2l.ops.layout import from_rows, split_state, to_rows


@torch.no_grad()
def step_(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    states: Sequence[Tensor],
    weights: Sequence[Tensor],
    preprocess: str,
    preprocess_constant: float,
    update_scale: float,
    grad_scale: float,
    finite: Tensor | None = None,
) -> None:
    """See schema.py."""
    for index, (param, grad) in enumerate(zip(params, grads, strict=True)):
        if grad.layout != param.layout or grad.dtype != param.dtype:
            raise RuntimeError(f"grads[{index}]: expected {param.dtype}, dense, got {grad.dtype}, {grad.layout}")
    if finite is not None:
        find_nonfinite_(finite, grads)
    states = split_state(states, [param.numel() for param in params])
    for param, grad, state in zip(params, grads, states, strict=True):
        update, rows = reference.step(
            grad.reshape(-1).to(state.dtype) * grad_scale,
            to_rows(state, param.numel()),
            weights,
            preprocess,
            preprocess_constant,
            update_scale,
        )
        wide = torch.promote_types(param.dtype, state.dtype)
        _write(param, (param.to(wide) + update.to(wide).view_as(param)).to(param.dtype), finite)
        _write(state, from_rows(rows), finite)


def window_backward(
    state: Tensor,
    grads: Tensor,
    adjoints: Tensor,
    weights: Sequence[Tensor],
    preprocess: str,
    preprocess_constant: float,
    update_scale: float,
    dstate: Tensor | None,
    need_dstate: bool,
    need_dgrads: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """See schema.py."""
    numel = grads.shape[1]
    with torch.enable_grad():
        weights = [weight.detach().requires_grad_() for weight in weights]
        first = to_rows(state.detach(), numel).requires_grad_()
        grads = grads.detach().requires_grad_()
        rows, loss = first, state.new_zeros(())
        for gradient, adjoint in zip(grads, adjoints, strict=True):
            update, rows = reference.step(gradient, rows, weights, preprocess, preprocess_constant, update_scale)
            loss = loss + adjoint @ update
        if dstate is not None:
            loss = loss + (to_rows(dstate, numel) * rows).sum()
        *dweights, dfirst, dgrads = torch.autograd.grad(loss, [*weights, first, grads])
    return (
        torch.cat([gradient.reshape(-1) for gradient in dweights]),
        from_rows(dfirst) if need_dstate else torch.empty_like(state[:0]),
        dgrads if need_dgrads else dgrads[:0],
    )


def find_nonfinite_(finite: Tensor, tensors: Sequence[Tensor]) -> None:
    """See schema.py."""
    for tensor in tensors:
        finite &= tensor.isfinite().all()


def _write(target: Tensor, value: Tensor, finite: Tensor | None) -> None:
    """Without asking the host whether it is to be done."""
    target.copy_(value if finite is None else torch.where(finite.view(()), value, target))
