"""A step of all parameters of a group under a rule whose coordinates talk, in the place of the operator step_."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from fastl2l.memory_config import MemoryConfig
from fastl2l.ops import coupled
from fastl2l.ops.coordinates import Coordinates
from fastl2l.ops.dispatch import Backend
from fastl2l.ops.layout import layers_apart, tiles_of
from fastl2l.ops.remembering import Remembered
from fastl2l.rules import Rule

STEP = "step"
"""In what is kept of a parameter, how many steps it has had, 0-d."""
ROWS = "memory_rows"
"""What a rule with a memory knows of its coordinates besides."""
MEMORY = "memory"
"""Its part of the memory."""
Entries = Sequence[Mapping[str, Any]]


def step_of(
    rule: Rule, backend: Backend, entries: Entries, whole: Remembered | None, groups: tuple[ProcessGroup, ...] = ()
) -> Callable[..., None]:
    """What steps parameters: the backend's step_, or for a coupled rule what takes the same arguments (schema.py).

    Args:
        rule: the group's.
        backend: does the work.
        entries: what is kept of each parameter, by name.
        whole: of a rule with a memory, that of which these are parts, if they are parts of one.
        groups: of processes that have other coordinates of the parameters.
    """
    return _StepOf(rule, backend, entries, whole, groups) if rule.config.coupled else backend.step_


class _StepOf:
    def __init__(
        self, rule: Rule, backend: Backend, entries: Entries, whole: Remembered | None, groups: tuple[ProcessGroup, ...]
    ) -> None:
        self._rule, self._backend, self._entries, self._whole, self._groups = rule, backend, entries, whole, groups

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
        if rate is not None:  # what a memory is told of are the steps as they are
            update_scale, decay = update_scale * float(rate), decay * float(rate)
        sizes = tuple(param.numel() for param in params)
        if not sum(sizes) and not self._groups:  # others wait for what this process has of means: nothing
            return
        where, dtype = Coordinates(sizes, groups=self._groups), self._rule.dtype
        gradient = torch.cat([grad.reshape(-1).to(dtype) for grad in grads]) * grad_scale
        state = states[0] if len(states) == 1 else layers_apart(torch.cat(list(states)))
        now = self._with_memory(state) if self._rule.config.memory is not None else state
        update = coupled.step_(self._rule, gradient, now, where, update_scale, self._backend)
        if state is not states[0]:
            for own, part in zip(states, state.split([tiles_of(size) for size in sizes]), strict=True):
                own.copy_(part)
        if decay and isinstance(now, Remembered) and now.config.differences:
            now.last_update.sub_(torch.cat([param.reshape(-1) for param in params]), alpha=decay)
        if isinstance(now, Remembered) and self._whole is None:
            for entry, parts in zip(self._entries, of_each(now, sizes), strict=True):
                for name, part in parts.items():
                    entry[name].copy_(part)
        for number, (param, change) in enumerate(zip(params, update.split(sizes), strict=True)):
            _add(param, change if units is None else change * units[number], decay)

    def _with_memory(self, state: Tensor) -> Remembered:
        """All that is known of the parameters, whose layers' states are these."""
        config = self._rule.config.memory
        if self._whole is None:
            rows, memory = (torch.cat([entry[name] for entry in self._entries], -1) for name in (ROWS, MEMORY))
        else:
            rows, memory = self._whole.rows, self._whole.memory
        return Remembered(cast(MemoryConfig, config), state.transpose(0, 1), rows, memory, int(self._entries[0][STEP]))


def of_each(state: Remembered, sizes: Sequence[int]) -> list[dict[str, Tensor]]:
    """What is kept of tensors of these sizes, by name, as parts of what is kept of all: coordinates come last."""
    parts = zip(state.rows.split(list(sizes), -1), state.memory.split(list(sizes), -1), strict=True)
    return [{ROWS: rows, MEMORY: memory} for rows, memory in parts]


def _add(param: Tensor, change: Tensor, decay: float) -> None:
    """Take the decay off a parameter, and add the change: both before it is rounded to its own dtype."""
    wide = torch.promote_types(param.dtype, change.dtype)
    kept = param.to(wide) * (1 - decay) if decay else param.to(wide)
    param.copy_(kept + change.to(wide).view_as(param))
