"""Gradients that are far too large now and then."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from fastl2l.tasks.base import SECOND_MINIBATCHES, Drawn, Problem, PureProblem, Task, generator, is_pure, number
from fastl2l.tasks.wrapped import check_coordinates, check_task, stream

LARGEST = 1e30
"""Factor, which float32 can hold, and its products with gradients."""


@dataclass(frozen=True)
class Spiked(Task):
    """The problems of `task`, with gradients that are `factor` times too large at random steps.

    Losses are what they are without, where they are finite. At each step it is so with probability `share`, of all
    functions of a problem at once; never of the second minibatches that no optimizer sees: what is trained here is to
    have ``second_minibatch=True``, or its own objective's gradient is too large as well.

    Raises:
        TypeError, ValueError: `task` is no task, or not one of floating coordinates; share is not a number from 0 to 1,
            or factor not a number > 0 and at most 1e30.
    """

    task: Task
    share: float = 0.1
    factor: float = 100.0

    def __post_init__(self) -> None:
        check_coordinates(check_task(self.task).sample(0))
        object.__setattr__(self, "share", number("share", self.share, "from 0 to 1", lambda x: 0 <= x <= 1))
        fits = number("factor", self.factor, "> 0 and at most 1e30", lambda x: 0 < x <= LARGEST)
        object.__setattr__(self, "factor", fits)

    @property
    def name(self) -> str:  # type: ignore[override]
        return f"spiked {self.task.name}"

    def spec(self) -> dict[str, Any]:
        return {"name": "spiked", "task": self.task.spec(), "share": self.share, "factor": self.factor}

    def validation(self) -> Task:
        return replace(self, task=self.task.validation())

    def sample(self, seed: int) -> Problem:
        problem = self.task.sample(seed)
        factors = _Factors(seed, stream("spikes", self), self.share, self.factor, problem.theta0.dtype)
        return _spiked(problem, factors)


class _Factors(Drawn[Tensor]):
    """What the gradient of each step is multiplied by."""

    def __init__(self, seed: int, name: str, share: float, factor: float, dtype: torch.dtype) -> None:
        super().__init__(64)
        self._seed, self._name, self._share, self._factor, self._dtype = seed, name, share, factor, dtype

    def draw(self, block: int, device: torch.device) -> Sequence[Tensor]:
        if block * self._steps >= SECOND_MINIBATCHES:
            return torch.ones(self._steps, dtype=self._dtype, device=device).unbind()
        hit = torch.from_numpy(generator(self._seed, self._name, block).random(self._steps) < self._share)
        return torch.where(hit, self._factor, 1.0).to(device, self._dtype).unbind()


def _spiked(problem: Problem, factors: _Factors) -> Problem:
    kind = _SpikedPure if isinstance(problem, PureProblem) and is_pure(problem) else _Spiked
    return kind(problem, factors)


class _Spiked(Problem):
    def __init__(self, problem: Problem, factors: _Factors) -> None:
        self.task, self.functions, self.theta0 = problem.task, problem.functions, problem.theta0
        self.parts, self.uneven = problem.parts, problem.uneven
        self._problem, self._factors = problem, factors

    @property
    def units(self) -> Tensor | None:  # type: ignore[override]
        return self._problem.units

    def loss(self, theta: Tensor, step: int) -> Tensor:
        return _steeper(self._problem.loss(theta, step), self._factors.at(step, theta.device))

    def whole_loss(self, theta: Tensor) -> Tensor:
        return self._problem.whole_loss(theta)

    def losses(self, theta: Tensor, step: int) -> Tensor:
        return _steeper(self._problem.losses(theta, step), self._factors.at(step, theta.device))

    def alone(self, number: int) -> Problem:
        return _spiked(self._problem.alone(number), self._factors)


class _SpikedPure(_Spiked, PureProblem):
    loss = PureProblem.loss  # by which it is known to be pure
    _problem: PureProblem

    @property
    def function(self) -> Callable[..., Tensor]:  # type: ignore[override]
        return _SteeperFunction(self._problem.function)

    @property
    def constants(self) -> tuple[Tensor, ...]:  # type: ignore[override]
        return self._problem.constants

    def inputs(self, step: int, device: torch.device) -> tuple[Tensor, ...]:
        return (*self._problem.inputs(step, device), self._factors.at(step, device))


@dataclass(frozen=True)
class _SteeperFunction:
    """The function of a pure problem, whose last input is the factor."""

    function: Callable[..., Tensor]

    def __call__(self, theta: Tensor, *tensors: Tensor) -> Tensor:
        *own, factor = tensors
        return _steeper(self.function(theta, *own), factor)


def _steeper(loss: Tensor, factor: Tensor) -> Tensor:
    """The same number, to the bit if it is finite, with all its derivatives times `factor`."""
    return loss.detach() + factor * (loss - loss.detach())
