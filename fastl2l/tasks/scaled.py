"""Random scaling of coordinates (Lv et al. 2017, section 4.2)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastl2l.tasks.base import Problem, Task, generator, number
from fastl2l.tasks.wrapped import check_coordinates, check_task, stream, wrap


@dataclass(frozen=True)
class Scaled(Task):
    """The problems of `task` in other units: f(c * theta) from theta_0 / c, one c = exp(u), u ~ U[-r, r] a coordinate.

    c is drawn once a problem. A rule that is trained so meets gradients and distances of very different sizes, and
    learns to do without their absolute scale. The units of relative rules stay what they are without it.

    Raises:
        TypeError, ValueError: `task` is no task, or not one of floating coordinates; r is not a number from 0
            to 40.
    """

    task: Task
    r: float = 3.0

    def __post_init__(self) -> None:
        check_coordinates(check_task(self.task).sample(0))
        object.__setattr__(self, "r", log_range("r", self.r))

    @property
    def name(self) -> str:  # type: ignore[override]
        return f"scaled {self.task.name}"

    def spec(self) -> dict[str, Any]:
        return {"name": "scaled", "task": self.task.spec(), "r": self.r}

    def validation(self) -> Task:
        return replace(self, task=self.task.validation())

    def sample(self, seed: int) -> Problem:
        problem = self.task.sample(seed)
        theta0 = problem.theta0
        scales = factors(generator(seed, stream("scales", self)), theta0.shape, self.r).to(theta0.device, theta0.dtype)
        start = theta0 / scales
        if not (start.isfinite().all() and scales.isfinite().all()):
            raise ValueError(f"r: expected scales that {theta0.dtype} can hold, got {self.r:g}")
        return wrap(problem, _scaled, start, (scales,), problem.parts)


def factors(random: np.random.Generator, shape: tuple[int, ...], r: float) -> Tensor:
    """exp(u), u ~ U[-r, r], float64."""
    return torch.from_numpy(np.exp(random.uniform(-r, r, shape)))


def log_range(name: str, r: object) -> float:
    """`r` as a float, or a clear error unless it is a number from 0 to 40, whose exponential float32 can hold."""
    return number(name, r, "from 0 to 40", lambda x: 0 <= x <= 40)


def _scaled(loss: Callable[[Tensor], Tensor], theta: Tensor, *own: Tensor) -> Tensor:
    (scales,) = own
    return loss(theta * scales)
