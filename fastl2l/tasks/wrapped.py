"""Problems made of others, by a change of their coordinates."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

import torch
from torch import Tensor

from fastl2l.tasks.base import Problem, PureProblem, Task, is_pure


class Change(Protocol):
    """What is made of a problem. Two that compare equal do the same."""

    def __call__(self, loss: Callable[[Tensor], Tensor], theta: Tensor, *own: Tensor) -> Tensor:
        """The new loss at theta [new N], from the old one and Tensors of this problem's own; vmap takes it."""
        ...


def wrap(
    problem: Problem,
    change: Change,
    theta0: Tensor,
    own: tuple[Tensor, ...],
    parts: Mapping[str, int] | None,
    units: Callable[[Tensor], Tensor] = lambda units: units,
) -> Problem:
    """`problem` under `change`, with a new start and new parts; it is pure where `problem` is.

    `units` makes those of the new coordinates from those of the old.
    """
    kind = _WrappedPure if isinstance(problem, PureProblem) and is_pure(problem) else _Wrapped
    return kind(problem, change, theta0, own, parts, units)


class _Wrapped(Problem):
    def __init__(
        self,
        problem: Problem,
        change: Change,
        theta0: Tensor,
        own: tuple[Tensor, ...],
        parts: Mapping[str, int] | None,
        units: Callable[[Tensor], Tensor],
    ) -> None:
        self.task, self.functions, self.theta0, self.parts = problem.task, problem.functions, theta0, parts
        self.uneven = problem.uneven
        self._problem, self._change, self._own, self._units = problem, change, own, units

    @cached_property
    def units(self) -> Tensor | None:  # type: ignore[override]
        return None if self._problem.units is None else self._units(self._problem.units)

    def loss(self, theta: Tensor, step: int) -> Tensor:
        return self._change(lambda inner: self._problem.loss(inner, step), theta, *self._own)

    @torch.no_grad()
    def whole_loss(self, theta: Tensor) -> Tensor:
        return self._change(self._problem.whole_loss, theta, *self._own)


class _WrappedPure(_Wrapped, PureProblem):
    loss = PureProblem.loss  # by which it is known to be pure
    _problem: PureProblem

    @cached_property
    def function(self) -> Callable[..., Tensor]:  # type: ignore[override]
        return _Changed(self._problem.function, self._change, len(self._own))

    @cached_property
    def constants(self) -> tuple[Tensor, ...]:  # type: ignore[override]
        return (*self._own, *self._problem.constants)

    def inputs(self, step: int, device: torch.device) -> tuple[Tensor, ...]:
        return self._problem.inputs(step, device)


@dataclass(frozen=True)
class _Changed:
    """The function of a wrapped problem."""

    function: Callable[..., Tensor]
    change: Change
    own: int

    def __call__(self, theta: Tensor, *tensors: Tensor) -> Tensor:
        own, rest = tensors[: self.own], tensors[self.own :]
        return self.change(lambda inner: self.function(inner, *rest), theta, *own)


def stream(name: str, task: Task) -> str:
    """The random numbers that `task` draws by `name`; numbered where tasks of its kind are within it.

    A problem has one seed at all levels: by one name, an inner mixture would choose as the outer one has chosen.
    """
    depth = _levels(task, type(task)) - 1
    return f"{name} {depth}" if depth else name


def _levels(task: Task, kind: type[Task]) -> int:
    inner = [*getattr(task, "tasks", ()), getattr(task, "task", None)]
    return isinstance(task, kind) + max((_levels(one, kind) for one in inner if isinstance(one, Task)), default=0)


def check_task(task: object) -> Task:
    """`task` if it is one, or a TypeError."""
    if not isinstance(task, Task):
        raise TypeError(f"task: expected a fastl2l.tasks.Task, got {type(task).__name__}")
    return task


def check_coordinates(problem: Problem) -> None:
    """Raise a TypeError unless the problem's coordinates are floating numbers."""
    if not isinstance(problem.theta0, Tensor) or not problem.theta0.is_floating_point():
        got = f"a Tensor of {problem.theta0.dtype}" if isinstance(problem.theta0, Tensor) else repr(problem.theta0)
        raise TypeError(f"task: expected one whose theta_0 is a floating Tensor, got {got} from {problem.task!r}")
