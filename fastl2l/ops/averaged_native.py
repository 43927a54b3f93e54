"""Steps and windows of a rule whose coordinates talk by means alone, each by one call of the native CPU kernels."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastl2l.ops.coordinates import Coordinates
from fastl2l.ops.dispatch import Backend
from fastl2l.rules import Rule


def takes(rule: Rule, device: torch.device, where: Coordinates, backend: Backend) -> bool:
    """Whether these kernels are for such a rule, over which coordinates, and by the chosen backend."""
    return backend.name == "native" and device.type == "cpu" and rule.config.memory is None and not where.groups


def step_(
    rule: Rule, before: Tensor | None, layers: Tensor, gradient: Tensor, where: Coordinates, scale: float
) -> Tensor:  # fmt: skip
    """One step; returns the update [N].

    Args:
        rule: as its weights are now.
        before: None, or the state before the step, which is left as it is then.
        layers: the state, [layers, tiles, rows, 16], contiguous; it is written to.
        gradient: [N].
        where: which function each coordinate belongs to.
        scale: factor on the update.
    """
    return torch.ops.fastl2l.averaged_step_.default(
        before, layers, gradient.contiguous(), *_network(rule), scale, where.tensors, where.parts, where.functions
    )


def window_backward(rule: Rule, states: Tensor, gradients: Tensor, adjoints: Tensor, where: Coordinates) -> Tensor:
    """The gradient of ``sum(adjoints * updates)`` with respect to the rule's weights, flat.

    Args:
        rule: as its weights were in the window.
        states: before its first step and after each, [steps + 1, layers, tiles, rows, 16].
        gradients, adjoints: [steps, N].
        where: which function each coordinate of a tensor belongs to.
    """
    return torch.ops.fastl2l.averaged_window_backward.default(
        states, gradients, adjoints, *_network(rule), rule.config.output_scale, where.parts, where.functions
    )


def _network(rule: Rule) -> tuple[Any, ...]:
    weights = [weight.detach() for weight in rule.weights()]
    return weights, [layer.text for layer in rule.config.chain], rule.config.averages
