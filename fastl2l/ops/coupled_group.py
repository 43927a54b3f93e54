"""A step of all parameters of a group under a rule whose coordinates talk, in the place of the operator step_."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from fastl2l.ops import coupled
from fastl2l.ops.coordinates import Coordinates
from fastl2l.ops.dispatch import Backend
from fastl2l.ops.layout import layers_apart, tiles_of
from fastl2l.rules import Rule


def step_of(rule: Rule, backend: Backend) -> Callable[..., None]:
    """What steps parameters: the backend's step_, or for a coupled rule what takes the same arguments (schema.py)."""
    return _StepOf(rule, backend) if rule.config.coupled else backend.step_


class _StepOf:
    def __init__(self, rule: Rule, backend: Backend) -> None:
        self._rule, self._backend = rule, backend

    @torch.no_grad()
    def __call__(
        self,
        params: Sequence[Tensor],
        grads: Sequence[Tensor],
        states: Sequence[Tensor],
        weights: Sequence[Tensor],
        text: str,
        update_scale: float,
        grad_scale: float,
        finite: Tensor | None = None,
        given: None = None,
        decay: float = 0.0,
        rate: Tensor | None = None,
        units: Tensor | None = None,
    ) -> None:
        if finite is not None:
            self._backend.find_nonfinite_(finite, grads, self._rule.dtype == torch.float32)
            if not finite:
                return
        sizes = tuple(param.numel() for param in params)
        where, dtype = Coordinates(sizes), self._rule.dtype
        gradient = torch.cat([grad.reshape(-1).to(dtype) for grad in grads]) * grad_scale
        state = states[0] if len(states) == 1 else layers_apart(torch.cat(list(states)))
        update = coupled.step_(self._rule, gradient, state, where, update_scale, self._backend)
        if state is not states[0]:
            for own, part in zip(states, state.split([tiles_of(size) for size in sizes]), strict=True):
                own.copy_(part)
        factors = [rate] * len(sizes) if units is None else (units if rate is None else units * rate).unbind()
        for param, change, factor in zip(params, update.split(sizes), factors, strict=True):
            _add(param, change if factor is None else change * factor, decay if rate is None else decay * rate)


def _add(param: Tensor, change: Tensor, decay: float | Tensor) -> None:
    """Take the decay off a parameter, and add the change: both before it is rounded to its own dtype."""
    wide = torch.promote_types(param.dtype, change.dtype)
    kept = param.to(wide)
    if not isinstance(decay, float) or decay:
        kept = kept * (1 - decay)
    param.copy_(kept + change.to(wide).view_as(param))
