"""Steps and windows of the layers of a rule whose coordinates talk, each by one call of the native CPU kernels."""

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
    within = config.memory is not None and config.memory.asks_units_within
    return backend.name == "native" and device.type == "cpu" and not within and not where.groups


def step_(
    config: RuleConfig, weights: Sequence[Tensor], before: Tensor | None, layers: Tensor, gradient: Tensor,
    extra: Tensor | None, where: Coordinates, scale: float, *, need_units: bool = False,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """One step; returns the update [N], and the last layer's units [units, N] if they are needed.

    Args:
        config, weights: the rule.
        before: None, or the state before the step, which is left as it is then.
        layers: the state, [layers, tiles, rows, 16], contiguous; it is written to.
        gradient: [N].
        extra: what layers are given besides units, [rows, N].
        where: which function each coordinate belongs to.
        scale: factor on the update.
        need_units: whether they are.
    """
    return torch.ops.fastl2l.averaged_step_.default(
        before, layers, gradient.contiguous(), extra, *_network(config, weights), scale, where.tensors, where.parts,
        where.functions, need_units,
    )  # fmt: skip


def window_backward(
    config: RuleConfig, weights: Sequence[Tensor], states: Sequence[Tensor], gradients: Tensor, extra: Tensor | None,
    adjoints: Tensor, dunits: Tensor | None, dstate: Tensor | None, where: Coordinates, scale: float, *,
    need_dgradients: bool = False, need_dextra: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """The way back of a window of T steps: to the layers' weights, flat, to `gradients` and to `extra`.

    Args:
        config, weights: the rule.
        states: T + 1 of them, [layers, tiles, rows, 16], before its first step and after each.
        gradients: [T, N].
        extra: [T, rows, N].
        adjoints: [T, N], of the updates.
        dunits: [T, units, N], of the last layer's units.
        dstate: [layers, tiles, rows, 16], of the last state, which becomes that of the first; None is 0.
        where: which function each coordinate of a tensor belongs to.
        scale: factor on the updates.
        need_dgradients, need_dextra: whether what comes back to these is needed.
    """
    return torch.ops.fastl2l.averaged_window_backward.default(
        states, gradients.contiguous(), extra, adjoints.contiguous(), dunits, dstate, *_network(config, weights), scale,
        where.parts, where.functions, need_dgradients, need_dextra,
    )  # fmt: skip


def _network(config: RuleConfig, weights: Sequence[Tensor]) -> tuple[Any, ...]:
    return weights[: config.network_weights], [layer.text for layer in config.chain], config.averages
