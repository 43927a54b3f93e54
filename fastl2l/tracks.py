"""The way of one part of theta under a rule of its own: what a `Trajectory` is made of."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastl2l.heap import Scratch
from fastl2l.ops import coupled, coupled_window
from fastl2l.ops.coordinates import Coordinates
from fastl2l.ops.dispatch import Backend, changed
from fastl2l.ops.functional import update
from fastl2l.ops.layout import new_state
from fastl2l.rules import Rule
from fastl2l.tasks.base import Problem, parts_of


@dataclass
class Track:
    """The way of one part of theta, under a rule that goes coordinate by coordinate."""

    rule: Rule
    part: slice
    units: Tensor | None
    """What updates are multiplied by, of a relative rule."""
    backend: Backend
    state: Any
    """As the operators have it: see ops/layout.py, and ops/coupled.py of rules whose coordinates talk."""

    def begin(self) -> None:
        """Be at the start of a trajectory."""
        self.state.zero_()

    def propose(self, gradient: Tensor, theta: Tensor, step: int) -> None:
        """Add the rule's update of this step, counted from 1, to `theta`, and bring the state forward."""
        scale = self.rule.config.output_scale * self.rule.config.share(step)
        mine = theta[self.part]
        if self.units is None:
            self._step(mine, gradient[self.part], scale)
            return
        change = torch.zeros_like(mine)
        self._step(change, gradient[self.part], scale)
        mine.addcmul_(change, self.units)

    def _step(self, mine: Tensor, gradient: Tensor, scale: float) -> None:
        self.backend.step_([mine], [gradient], [self.state], self._weights(), self.rule.text, scale, 1.0)
        changed(self.state)

    def update(self, gradient: Tensor, state: Any) -> tuple[Tensor, Any]:
        """The rule's own update and its state after it, for autograd."""
        return update(self.rule, gradient[self.part], state, backend=self.backend.name)

    def factors(self, steps: range) -> Tensor | None:
        """What the rule's own updates of these steps, from 1 on, are multiplied by: [N], [steps, 1 or N] or None."""
        shares = [self.rule.config.share(step) for step in steps]
        if all(share == 1 for share in shares):
            return self.units
        column = torch.tensor(shares, dtype=self.rule.dtype, device=self.rule.device).unsqueeze(1)
        return column if self.units is None else column * self.units

    def multiplied(self, updates: Tensor, steps: range) -> Tensor:
        """The rule's own updates [steps, N] as those of theta; or gradients of these as gradients of its own."""
        factors = self.factors(steps)
        return updates if factors is None else updates * factors

    def state_of_window(self, steps: int) -> Any:
        """The state, from which a window of so many steps is gone through for autograd."""
        return self.state

    def begin_window(self, steps: int, scratch: Scratch) -> None:
        """From here on are the steps of a window, which ends with its way back; what it keeps may be in `scratch`."""
        self._first_state = self.state.clone()

    def window_backward(self, grads: Tensor, adjoints: Tensor, steps: range) -> Tensor:
        """The gradient of the window that ends here with respect to the rule's weights; 0 for those that are frozen.

        Args:
            grads: what was seen of all of theta, [steps, N].
            adjoints: dL/dupdate, of all of theta.
            steps: from 1 on.
        """
        own = self.multiplied(adjoints[:, self.part], steps)
        dweights = self._window_backward(grads[:, self.part].contiguous(), own.contiguous())
        weights = self.rule.weights()
        for weight, part in zip(weights, dweights.split([weight.numel() for weight in weights]), strict=True):
            if not weight.requires_grad:
                part.zero_()
        return dweights

    def _window_backward(self, grads: Tensor, adjoints: Tensor) -> Tensor:
        scale, first_state = self.rule.config.output_scale, self._first_state
        del self._first_state
        return self.backend.window_backward(
            first_state, grads, adjoints, self._weights(), self.rule.text, scale, None, False, False
        )[0]

    def _weights(self) -> list[Tensor]:
        return [weight.detach() for weight in self.rule.weights()]


@dataclass
class CoupledTrack(Track):
    """The same, under a rule whose coordinates talk."""

    where: Coordinates

    def begin(self) -> None:
        super().begin()
        self._recording: coupled_window.Recording | None = None

    def state_of_window(self, steps: int) -> Any:
        return coupled.recorded(self.state, steps)

    def begin_window(self, steps: int, scratch: Scratch) -> None:
        self._recording = coupled_window.record(self.rule, self.state, steps, self.where, self.backend, scratch)

    def _step(self, mine: Tensor, gradient: Tensor, scale: float) -> None:
        if self._recording is None:
            mine.add_(coupled.step_(self.rule, gradient, self.state, self.where, scale, self.backend))
        else:
            mine.add_(self._recording.step(gradient), alpha=scale / self.rule.config.output_scale)

    def update(self, gradient: Tensor, state: Any) -> tuple[Tensor, Any]:
        return coupled.step(self.rule, gradient[self.part], state, self.where, backend=self.backend.name)

    def _window_backward(self, grads: Tensor, adjoints: Tensor) -> Tensor:
        recording, self._recording = self._recording, None
        if recording is None:
            raise RuntimeError("window_backward: expected begin_window() before it")
        self.state = recording.state
        return recording.backward(grads, adjoints)


def make_track(problem: Problem, name: str, rule: Rule, part: slice, backend: Backend) -> Track:
    """At the start of a trajectory.

    Args:
        problem: what theta is of.
        name: of the part; "" is all of theta.
        rule: that steps it.
        part: which coordinates it is.
        backend: that does the work.

    Raises:
        TypeError, ValueError: the problem's units are not as `Problem` says, or its functions are not of one size and
            the rule wants means over each of them, or a memory of them would be too large. The message names the task
            or the memory. Nothing has been allocated then.
    """
    units = _units(problem, part) if rule.config.relative else None
    numel = part.stop - part.start
    if not rule.config.coupled:
        return Track(rule, part, units, backend, new_state(rule, numel, problem.theta0.device))
    where = _coordinates(problem, name, numel)
    return CoupledTrack(rule, part, units, backend, coupled.begin(rule, where, problem.theta0.device), where)


def _coordinates(problem: Problem, name: str, numel: int) -> Coordinates:
    parts = (numel,) if name else tuple(parts_of(problem).values())
    if problem.uneven or any(part % problem.functions for part in parts):
        raise ValueError(
            f"task {problem.task!r}: expected {problem.functions} functions with as many coordinates each, for a rule "
            f"whose coordinates talk, got others, {', '.join(map(str, parts))} in all; take a batch in as many pieces"
        )
    return Coordinates((numel,), parts, problem.functions)


def _units(problem: Problem, part: slice) -> Tensor | None:
    """Of the coordinates of a part, for a relative rule; None if all are 1.

    Raises:
        TypeError, ValueError: `problem.units` is not as `Problem` says. The message names the task.
    """
    units, theta0, where = problem.units, problem.theta0, f"task {problem.task!r}: units"
    if units is None:
        return None
    if not isinstance(units, Tensor) or units.dtype != theta0.dtype or units.device != theta0.device:
        got = f"a Tensor of {units.dtype} on {units.device}" if isinstance(units, Tensor) else repr(units)
        raise TypeError(f"{where}: expected None or a Tensor of {theta0.dtype} on {theta0.device}, got {got}")
    if units.shape != theta0.shape or not (units.isfinite() & (units > 0)).all():
        got = "others" if units.shape == theta0.shape else f"shape {list(units.shape)}"
        raise ValueError(f"{where}: expected {theta0.numel()} finite numbers > 0, got {got}")
    return units.detach()[part]
