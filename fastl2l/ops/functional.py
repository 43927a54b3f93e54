"""One step of a rule as a function that autograd understands: for anyone's own loss, and for exact meta-gradients."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastl2l import reference
from fastl2l.ops.dispatch import Backend, select
from fastl2l.ops.layout import state_shape, to_rows
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
    def backward(ctx: Any, dupdate: Tensor, dstate: Tensor) -> tuple[Tensor | None, ...]:
        gradient, state, *weights = ctx.saved_tensors
        config = ctx.config
        if torch.is_grad_enabled():  # create_graph=True
            needed = [tensor for tensor, need in zip(ctx.saved_tensors, ctx.needs_input_grad[2:], strict=True) if need]
            found = iter(_backward_with_graph(config, gradient, state, weights, dupdate, dstate, needed))
            return (None, None, *(next(found) if need else None for need in ctx.needs_input_grad[2:]))
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


def _backward_with_graph(
    config: LSTMConfig,
    gradient: Tensor,
    state: Tensor,
    weights: list[Tensor],
    dupdate: Tensor,
    dstate: Tensor,
    needed: list[Tensor],
) -> tuple[Tensor, ...]:
    """Gradients that can be differentiated again, which the kernels' cannot: by reference.py."""
    numel, constants = gradient.numel(), (config.preprocess, config.preprocess_constant, config.output_scale)
    outputs = reference.step(gradient, to_rows(state, numel), weights, *constants)
    return torch.autograd.grad(
        outputs, needed, (dupdate, to_rows(dstate, numel)), create_graph=True, materialize_grads=True
    )


def update(rule: LSTMRule, gradient: Tensor, state: Tensor, *, backend: str = "auto") -> tuple[Tensor, Tensor]:
    """One step of `rule`, differentiable in gradient, state and the rule's weights.

    Derivatives are the kernels', unless they are to be differentiated again (``create_graph=True``): then they are
    those of ``reference.py``.

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
