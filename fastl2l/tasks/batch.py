"""Problems side by side in one theta, so that one call of a kernel steps all of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fastl2l.tasks.base import Problem, PureProblem, is_pure


def batch(problems: Sequence[Problem]) -> Problem:
    """`problems` as one: theta is theirs, one after the other, and the loss the sum of theirs.

    Where they have parts, theta is part by part: the first part of all of them, then the next one's. Each takes the same way as by itself, up to rounding. Pure problems that differ in numbers alone (see
    `tasks.PureProblem`) are evaluated at once, by `torch.func.vmap`; others one after the other.

    Raises:
        ValueError: there is none, they hold different numbers of functions (then the reported loss, a mean over all
            functions, would not be the mean over the problems), or parts of different names.
    """
    functions = {problem.functions for problem in problems}
    if len(functions) != 1:
        got = f"{sorted(functions)} functions" if functions else "none"
        raise ValueError(f"problems: expected at least one, all of as many functions, got {got}")
    if len(names := {tuple(problem.parts) for problem in problems}) > 1:
        got = " and ".join(", ".join(one) or "none" for one in sorted(names))
        raise ValueError(f"problems: expected parts of the same names in the same order, got {got}")
    if len(problems) == 1:
        return problems[0]
    pure = [problem for problem in problems if isinstance(problem, PureProblem) and is_pure(problem)]
    if len(pure) == len(problems) and all(alike(problem, pure[0]) for problem in pure[1:]):
        return _AtOnce(pure)
    return _OneByOne(problems)


def alike(one: PureProblem, other: PureProblem) -> bool:
    """Whether the two differ in nothing but numbers."""
    return one.function == other.function and _layout(one) == _layout(other)


def _layout(problem: PureProblem) -> tuple[list[tuple[torch.Size, torch.dtype]], dict[str, int]]:
    tensors = [problem.theta0, *problem.constants, *problem.inputs(0, torch.device("cpu"))]
    return [(tensor.shape, tensor.dtype) for tensor in tensors], dict(problem.parts)


class _Lanes:
    """Where the problems' coordinates are in a batch's theta, which is part by part."""

    def __init__(self, problems: Sequence[Problem]) -> None:
        of_problems = [list(problem.parts.values()) or [problem.theta0.numel()] for problem in problems]
        self._sizes = list(zip(*of_problems, strict=True))  # [part][problem]
        self.parts = dict(zip(problems[0].parts, map(sum, self._sizes), strict=False))

    def join(self, thetas: Sequence[Tensor]) -> Tensor:
        """The batch's theta of the problems'."""
        of_problems = zip(thetas, zip(*self._sizes, strict=True), strict=True)
        parts = zip(*(theta.split(sizes) for theta, sizes in of_problems), strict=True)
        return torch.cat([theta for part in parts for theta in part])

    def split(self, theta: Tensor) -> list[Tensor]:
        """The inverse."""
        parts = theta.split([sum(sizes) for sizes in self._sizes])
        of_problems = zip(*(part.split(sizes) for part, sizes in zip(parts, self._sizes, strict=True)), strict=True)
        return [torch.cat(found) if len(found) > 1 else found[0] for found in of_problems]


@dataclass(frozen=True)
class _Sum:
    """The function of a batch: the sum of the problems' losses, from their Tensors stacked."""

    function: Callable[..., Tensor]
    problems: int
    sizes: tuple[int, ...]
    """Of the parts of the whole theta."""

    def __call__(self, theta: Tensor, *stacked: Tensor) -> Tensor:
        parts = [part.view(self.problems, -1) for part in theta.split(self.sizes)]
        losses: Tensor = torch.vmap(self.function)(torch.cat(parts, 1) if len(parts) > 1 else parts[0], *stacked)
        return losses.sum()


class _AtOnce(PureProblem):
    def __init__(self, problems: list[PureProblem]) -> None:
        self._problems = problems
        self.task, self.functions = problems[0].task, sum(problem.functions for problem in problems)
        lanes = _Lanes(problems)
        self.theta0, self.parts = lanes.join([problem.theta0 for problem in problems]), lanes.parts
        sizes = tuple(lanes.parts.values()) or (self.theta0.numel(),)
        self.function = _Sum(problems[0].function, len(problems), sizes)
        self.constants = _stack([problem.constants for problem in problems])

    def inputs(self, step: int, device: torch.device) -> tuple[Tensor, ...]:
        return _stack([problem.inputs(step, device) for problem in self._problems])


class _OneByOne(Problem):
    def __init__(self, problems: Sequence[Problem]) -> None:
        self._problems = problems
        self.task, self.functions = problems[0].task, sum(problem.functions for problem in problems)
        self._lanes = _Lanes(problems)
        self.theta0, self.parts = self._lanes.join([problem.theta0 for problem in problems]), self._lanes.parts

    def loss(self, theta: Tensor, step: int) -> Tensor:
        pairs = zip(self._problems, self._lanes.split(theta), strict=True)
        return torch.stack([problem.loss(part, step) for problem, part in pairs]).sum()


def _stack(of_problems: Sequence[tuple[Tensor, ...]]) -> tuple[Tensor, ...]:
    return tuple(torch.stack(tensors) for tensors in zip(*of_problems, strict=True))
