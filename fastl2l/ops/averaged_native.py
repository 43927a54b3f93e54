"""Steps and windows of a rule whose coordinates talk by means alone, each by one call of the native CPU kernels."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastl2l.ops.coordinates import Coordinates
from fastl2l.ops.dispatch import Backend
from fastl2l.rule_config import RuleConfig


def takes(config: RuleConfig, device: torch.device, where: Coordinates, backend: Backend) -> bool:
    """Whether these kernels are for such a rule, over these coordinates, and by the chosen backend."""
    return backend.name == "native" and device.type == "cpu" and config.memory is None and not where.groups


def step_(
    config: RuleConfig, weights: Sequence[Tensor], before: Tensor | None, layers: Tensor, gradient: Tensor,
    where: Coordinates, scale: float,
) -> Tensor:  # fmt: skip
    """One step; returns the update [N].

    Args:
        config, weights: the rule.
        before: None, or the state before the step, which is left as it is then.
        layers: the state, [layers, tiles, rows, 16], contiguous; it is written to.
        gradient: [N].
        where: which function each coordinate belongs to.
        scale: factor on the update.
    """
    return torch.ops.fastl2l.averaged_step_.default(
        before, layers, gradient.contiguous(), *_network(config, weights), scale, where.tensors, where.parts,
        where.functions,
    )  # fmt: skip


def window_backward(
    config: RuleConfig, weights: Sequence[Tensor], states: Tensor, gradients: Tensor, adjoints: Tensor,
    where: Coordinates,
) -> Tensor:  # fmt: skip
    """The gradient of ``sum(adjoints * updates)`` with respect to the rule's weights, flat.

    Args:
        config, weights: the rule.
        states: before its first step and after each, [steps + 1, layers, tiles, rows, 16].
        gradients, adjoints: [steps, N].
        where: which function each coordinate of a tensor belongs to.
    """
    return torch.ops.fastl2l.averaged_window_backward.default(
        states, gradients.contiguous(), adjoints.contiguous(), *_network(config, weights), config.output_scale,
        where.parts, where.functions,
    )  # fmt: skip


def _network(config: RuleConfig, weights: Sequence[Tensor]) -> tuple[Any, ...]:
    return weights, [layer.text for layer in config.chain], config.averages
