"""Problems side by side in one theta, so that one call of a kernel steps all of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fastl2l.tasks.base import Problem, PureProblem, is_pure


def batch(problems: Sequence[Problem]) -> Problem:
    """`problems` as one: theta is theirs, one after the other, and the loss the sum of theirs.

    Each takes the same way as by itself, up to rounding. Pure problems that differ in numbers alone (see
    `tasks.PureProblem`) are evaluated at once, by `torch.func.vmap`; others one after the other.

    Raises:
        ValueError: there is none, or they hold different numbers of functions: then the reported loss, a mean over all
            functions, would not be the mean over the problems.
    """
    functions = {problem.functions for problem in problems}
    if len(functions) != 1:
        got = f"{sorted(functions)} functions" if functions else "none"
        raise ValueError(f"problems: expected at least one, all of as many functions, got {got}")
    if len(problems) == 1:
        return problems[0]
    pure = [problem for problem in problems if isinstance(problem, PureProblem) and is_pure(problem)]
    if len(pure) == len(problems) and all(alike(problem, pure[0]) for problem in pure[1:]):
        return _AtOnce(pure)
    return _OneByOne(problems)


def alike(one: PureProblem, other: PureProblem) -> bool:
    """Whether the two differ in nothing but numbers."""
    return one.function == other.function and _layout(one) == _layout(other)


def _layout(problem: PureProblem) -> list[tuple[torch.Size, torch.dtype]]:
    tensors = [problem.theta0, *problem.constants, *problem.inputs(0, torch.device("cpu"))]
    return [(tensor.shape, tensor.dtype) for tensor in tensors]


@dataclass(frozen=True)
class _Sum:
    """The function of a batch: the sum of the problems' losses, from their Tensors stacked."""

    function: Callable[..., Tensor]
    problems: int

    def __call__(self, theta: Tensor, *stacked: Tensor) -> Tensor:
        losses: Tensor = torch.vmap(self.function)(theta.view(self.problems, -1), *stacked)
        return losses.sum()


class _AtOnce(PureProblem):
    def __init__(self, problems: list[PureProblem]) -> None:
        self._problems = problems
        self.task, self.functions = problems[0].task, sum(problem.functions for problem in problems)
        self.theta0 = torch.cat([problem.theta0 for problem in problems])
        self.function = _Sum(problems[0].function, len(problems))
        self.constants = _stack([problem.constants for problem in problems])

    def inputs(self, step: int, device: torch.device) -> tuple[Tensor, ...]:
        return _stack([problem.inputs(step, device) for problem in self._problems])


class _OneByOne(Problem):
    def __init__(self, problems: Sequence[Problem]) -> None:
        self._problems = problems
        self.task, self.functions = problems[0].task, sum(problem.functions for problem in problems)
        self.theta0 = torch.cat([problem.theta0 for problem in problems])
        self._sizes = [problem.theta0.numel() for problem in problems]

    def loss(self, theta: Tensor, step: int) -> Tensor:
        pairs = zip(self._problems, theta.split(self._sizes), strict=True)
        return torch.stack([problem.loss(part, step) for problem, part in pairs]).sum()


def _stack(of_problems: Sequence[tuple[Tensor, ...]]) -> tuple[Tensor, ...]:
    return tuple(torch.stack(tensors) for tensors in zip(*of_problems, strict=True))
