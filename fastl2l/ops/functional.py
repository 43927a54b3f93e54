"""One step of a rule as a function that autograd understands: for anyone's own loss, and for exact meta-gradients."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from fastl2l.ops.dispatch import Backend, select
from fastl2l.ops.layout import state_shape
from fastl2l.rules import LSTMConfig, LSTMRule


class _Update(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, backend: Backend, config: LSTMConfig, gradient: Tensor, state: Tensor, *weights: Tensor
    ) -> tuple[Tensor, Tensor]:
        rule = (list(weights), config.preprocess, config.preprocess_constant, config.output_scale)
        update, new_state = torch.zeros_like(gradient), state.clone()
        backend.step_([update], [gradient], [new_state], *rule, 1.0)
        ctx.backend, ctx.config = backend, config
        ctx.save_for_backward(gradient, state, *weights)
        return update, new_state

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dupdate: Tensor, dstate: Tensor) -> tuple[Tensor | None, ...]:
        gradient, state, *weights = ctx.saved_tensors
        config = ctx.config
        dweights, dstate_first, dgrads = ctx.backend.window_backward(
            state,
            gradient.unsqueeze(0),
            dupdate.contiguous().unsqueeze(0),
            weights,
            config.preprocess,
            config.preprocess_constant,
            config.output_scale,
            dstate.contiguous(),
            ctx.needs_input_grad[3],
            ctx.needs_input_grad[2],
        )
        split = dweights.split([weight.numel() for weight in weights])
        return (
            None,
            None,
            dgrads[0] if ctx.needs_input_grad[2] else None,
            dstate_first if ctx.needs_input_grad[3] else None,
            *(part.view_as(weight) for part, weight in zip(split, weights, strict=True)),
        )


def update(rule: LSTMRule, gradient: Tensor, state: Tensor, *, backend: str = "auto") -> tuple[Tensor, Tensor]:
    """One step of `rule`, differentiable once in gradient, state and the rule's weights.

    Args:
        rule: the rule.
        gradient: [N], in the rule's dtype.
        state: [tiles, rows, 16], from ``ops.layout.new_state`` or the step before.
        backend: see :class:`fastl2l.FusedLSTMOptimizer`.

    Returns:
        The update [N], to be added to the parameters, and the new state.

    Raises:
        ValueError: a shape or dtype is not as above.
    """
    if gradient.dim() != 1 or gradient.dtype != rule.dtype:
        raise ValueError(f"gradient: expected [N] of {rule.dtype}, got {list(gradient.shape)} of {gradient.dtype}")
    expected = state_shape(rule, gradient.numel())
    if tuple(state.shape) != expected or state.dtype != rule.dtype:
        raise ValueError(f"state: expected {list(expected)} of {rule.dtype}, got {list(state.shape)} of {state.dtype}")
    chosen = select(backend, gradient.device)
    new: tuple[Tensor, Tensor] = _Update.apply(
        chosen, rule.config, gradient.contiguous(), state.contiguous(), *rule.weights()
    )
    return new
