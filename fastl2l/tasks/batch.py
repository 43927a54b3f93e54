"""Problems side by side in one theta, so that one call of a kernel steps all of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from fastl2l.tasks.base import Problem, PureProblem, is_pure, parts_of


def batch(problems: Sequence[Problem]) -> Problem:
    """`problems` as one: theta is theirs, one after the other, and the loss the sum of theirs.

    Where they have parts, theta is the first part of all of them, then the second part of all, and so on: a part is in
    one piece, for the rule that steps it. Each takes the same way as by itself, up to rounding. Pure problems that
    differ in numbers alone (see `tasks.PureProblem`) are evaluated at once, by `torch.func.vmap`; others one after the
    other.

    Raises:
        ValueError: there is none; they have different parts, or different numbers of functions: then the reported loss,
            a mean over all functions, would not be the mean over the problems.
        TypeError, ValueError: the parts of one are not as `Problem` says.
    """
    functions = {problem.functions for problem in problems}
    if len(functions) != 1:
        got = f"{sorted(functions)} functions" if functions else "none"
        raise ValueError(f"problems: expected at least one, all of as many functions, got {got}")
    if len(problems) == 1:
        return problems[0]
    parts = list(dict.fromkeys(tuple(parts_of(problem)) for problem in problems))
    if len(parts) != 1:
        got = " and ".join(", ".join(names) for names in parts)
        raise ValueError(f"problems: expected all of the same parts in the same order, got {got}")
    pure = [problem for problem in problems if isinstance(problem, PureProblem) and is_pure(problem)]
    if len(pure) == len(problems) and all(alike(problem, pure[0]) for problem in pure[1:]):
        return _AtOnce(pure)
    return _OneByOne(problems)


def alike(one: PureProblem, other: PureProblem) -> bool:
    """Whether the two differ in nothing but numbers."""
    same = one.function == other.function and parts_of(one) == parts_of(other)
    return same and _layout(one) == _layout(other)


def _layout(problem: PureProblem) -> list[tuple[torch.Size, torch.dtype]]:
    tensors = [problem.theta0, *problem.constants, *problem.inputs(0, torch.device("cpu"))]
    return [(tensor.shape, tensor.dtype) for tensor in tensors]


@dataclass(frozen=True)
class _Sum:
    """The function of a batch: the sum of the problems' losses, from their Tensors stacked."""

    function: Callable[..., Tensor]
    problems: int
    sizes: tuple[int, ...]
    """Of one problem's parts."""

    def __call__(self, theta: Tensor, *stacked: Tensor) -> Tensor:
        parts = [part.view(self.problems, -1) for part in theta.split([self.problems * size for size in self.sizes])]
        losses: Tensor = torch.vmap(self.function)(_joined(parts, 1), *stacked)
        return losses.sum()


class _AtOnce(PureProblem):
    def __init__(self, problems: list[PureProblem]) -> None:
        self._problems, self._sizes = problems, _sizes(problems)
        self.task, self.functions = problems[0].task, sum(problem.functions for problem in problems)
        self.theta0, self.parts = _side_by_side(problems, [problem.theta0 for problem in problems]), _parts(problems)
        self.function = _Sum(problems[0].function, len(problems), tuple(parts_of(problems[0]).values()))
        self.constants = _stack([problem.constants for problem in problems])

    @cached_property
    def units(self) -> Tensor | None:  # type: ignore[override]
        return _units(self._problems)

    def inputs(self, step: int, device: torch.device) -> tuple[Tensor, ...]:
        return _stack([problem.inputs(step, device) for problem in self._problems])

    def losses(self, theta: Tensor, step: int) -> Tensor:
        return torch.cat([problem.losses(own, step) for problem, own in _apart(self._problems, self._sizes, theta)])


class _OneByOne(Problem):
    def __init__(self, problems: Sequence[Problem]) -> None:
        self._problems = problems
        self.task, self.functions = problems[0].task, sum(problem.functions for problem in problems)
        self.theta0, self.parts = _side_by_side(problems, [problem.theta0 for problem in problems]), _parts(problems)
        self._sizes = _sizes(problems)
        self.uneven = any(problem.uneven for problem in problems) or any(len(set(sizes)) > 1 for sizes in self._sizes)

    @cached_property
    def units(self) -> Tensor | None:  # type: ignore[override]
        return _units(self._problems)

    def loss(self, theta: Tensor, step: int) -> Tensor:
        return torch.stack(
            [problem.loss(own, step) for problem, own in _apart(self._problems, self._sizes, theta)]
        ).sum()

    def losses(self, theta: Tensor, step: int) -> Tensor:
        return torch.cat([problem.losses(own, step) for problem, own in _apart(self._problems, self._sizes, theta)])


def _apart(
    problems: Sequence[Problem], all_sizes: Sequence[tuple[int, ...]], theta: Tensor
) -> Iterator[tuple[Problem, Tensor]]:
    """Each problem and its own theta; sizes are those of `_sizes`."""
    parts = theta.split([sum(sizes) for sizes in all_sizes])
    pieces = [part.split(sizes) for part, sizes in zip(parts, all_sizes, strict=True)]
    yield from zip(problems, (_joined(of_problem, 0) for of_problem in zip(*pieces, strict=True)), strict=True)


def _sizes(problems: Sequence[Problem]) -> list[tuple[int, ...]]:
    """By part, the sizes of each problem's."""
    return list(zip(*(parts_of(problem).values() for problem in problems), strict=True))


def _parts(problems: Sequence[Problem]) -> dict[str, int] | None:
    """The parts of the batch, if there are any."""
    return dict(zip(problems[0].parts, map(sum, _sizes(problems)), strict=True)) if problems[0].parts else None


def _side_by_side(problems: Sequence[Problem], numbers: Sequence[Tensor]) -> Tensor:
    """Numbers of the coordinates of each, such as theta_0, in the batch's order."""
    pairs = zip(problems, numbers, strict=True)
    pieces = [own.split(list(parts_of(problem).values())) for problem, own in pairs]
    return torch.cat([piece for of_part in zip(*pieces, strict=True) for piece in of_part])


def _units(problems: Sequence[Problem]) -> Tensor | None:
    """Of the batch, if a problem has some."""
    if all(problem.units is None for problem in problems):
        return None
    found = [torch.ones_like(problem.theta0) if problem.units is None else problem.units for problem in problems]
    return _side_by_side(problems, found)


def _joined(tensors: Sequence[Tensor], dim: int) -> Tensor:
    """As torch.cat, which would copy a single one."""
    return tensors[0] if len(tensors) == 1 else torch.cat(list(tensors), dim)


def _stack(of_problems: Sequence[tuple[Tensor, ...]]) -> tuple[Tensor, ...]:
    return tuple(torch.stack(tensors) for tensors in zip(*of_problems, strict=True))
