"""One step of a rule as a function that autograd understands: for anyone's own loss, and for exact meta-gradients."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastl2l import reference
from fastl2l.ops.again import backward_with_graph
from fastl2l.ops.dispatch import Backend, select
from fastl2l.ops.layout import TILE, state_shape, to_rows
from fastl2l.rules import Rule


class _Update(torch.autograd.Function):
    """Arguments: backend, the rule's text, its update scale, gradient, state, given rows or None, weights."""

    @staticmethod
    def forward(
        ctx: Any, backend: Backend, rule: str, scale: float, gradient: Tensor, state: Tensor, given: Tensor | None,
        *weights: Tensor,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        update, new_state = torch.zeros_like(gradient), state.clone()
        backend.step_([update], [gradient], [new_state], list(weights), rule, scale, 1.0, None, given)
        ctx.backend, ctx.rule, ctx.scale = backend, rule, scale
        ctx.save_for_backward(gradient, state, given, *weights)
        return update, new_state

    @staticmethod
    def backward(ctx: Any, dupdate: Tensor, dstate: Tensor) -> tuple[Tensor | None, ...]:
        gradient, state, given, *weights = ctx.saved_tensors
        needs = ctx.needs_input_grad[3:]
        if torch.is_grad_enabled():  # create_graph=True
            return (None, None, None, *_with_graph(ctx, (dupdate, dstate), needs))
        dweights, dstate_first, dgrads, dgiven = ctx.backend.window_backward(
            state,
            gradient.unsqueeze(0),
            dupdate.contiguous().unsqueeze(0),
            weights,
            ctx.rule,
            ctx.scale,
            dstate.contiguous(),
            needs[1],
            needs[0],
            None if given is None else given.unsqueeze(0),
            needs[2],
        )
        split = dweights.split([weight.numel() for weight in weights])
        found = (
            dgrads[0] if needs[0] else None,
            dstate_first,
            dgiven[0] if needs[2] else None,
            *(part.view_as(weight) for part, weight in zip(split, weights, strict=True)),
        )
        return (None, None, None, *(one if need else None for one, need in zip(found, needs, strict=True)))


def _with_graph(ctx: Any, adjoints: tuple[Tensor, Tensor], needs: tuple[bool, ...]) -> list[Tensor | None]:
    """By reference.py."""
    numel = ctx.saved_tensors[0].numel()

    def step(gradient: Tensor, state: Tensor, given: Tensor | None, *weights: Tensor) -> tuple[Tensor, Tensor]:
        rows = None if given is None else to_rows(given, numel)
        return reference.step(gradient, to_rows(state, numel), weights, ctx.rule, ctx.scale, rows)

    dupdate, dstate = adjoints
    with reference.exact(dupdate.device):
        return backward_with_graph(step, ctx.saved_tensors, (dupdate, to_rows(dstate, numel)), needs)


def update(
    rule: Rule, gradient: Tensor, state: Tensor, given: Tensor | None = None, *, backend: str = "auto"
) -> tuple[Tensor, Tensor]:
    """One step of `rule`, differentiable in gradient, state, given rows and the rule's weights.

    Derivatives are the kernels', unless they are to be differentiated again (``create_graph=True``): then they are
    those of ``reference.py``.

    Args:
        rule: the rule.
        gradient: [N], in the rule's dtype.
        state: [tiles, rows, 16], from ``ops.layout.new_state`` or the step before.
        given: [tiles, rows, 16], for a rule that has given rows.
        backend: see :class:`fastl2l.FusedLSTMOptimizer`.

    Returns:
        The update [N], to be added to the parameters (zeros if the rule's output is none), and the new state.

    Raises:
        ValueError: a shape or dtype is not as above, or the rule's coordinates talk (see ``ops.coupled.step``).
    """
    if rule.config.coupled:
        raise ValueError(f"rule: expected one that goes coordinate by coordinate, got {rule!r}; see ops.coupled.step")
    if gradient.dim() != 1 or gradient.dtype != rule.dtype:
        raise ValueError(f"gradient: expected [N] of {rule.dtype}, got {list(gradient.shape)} of {gradient.dtype}")
    expected = state_shape(rule, gradient.numel())
    _check("state", state, expected, rule.dtype)
    if (given is None) != (rule.config.given == 0):
        raise ValueError(f"given: expected {rule.config.given} rows, got {'none' if given is None else 'some'}")
    if given is not None:
        _check("given", given, (expected[0], rule.config.given, TILE), rule.dtype)
        given = given.contiguous()
    chosen = select(backend, gradient.device)
    new: tuple[Tensor, Tensor] = _Update.apply(
        chosen, rule.text, rule.config.output_scale, gradient.contiguous(), state.contiguous(), given, *rule.weights()
    )
    return new


def _check(name: str, tensor: Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    if tuple(tensor.shape) != shape or tensor.dtype != dtype:
        raise ValueError(f"{name}: expected {list(shape)} of {dtype}, got {list(tensor.shape)} of {tensor.dtype}")
