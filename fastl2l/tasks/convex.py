"""Combination with convex functions (Lv et al. 2017, section 4.2)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from fastl2l.tasks.base import Problem, Task, generator, integer, parts_of
from fastl2l.tasks.scaled import factors, log_range
from fastl2l.tasks.wrapped import check_coordinates, check_task, stream, wrap


@dataclass(frozen=True)
class WithConvex(Task):
    """The problems of `task`, each with a convex function of `dim` further coordinates x, whose loss is added.

    It is the mean of (c x - a)^2, with a ~ U[-1, 1] and c = exp(u), u ~ U[-r, r], from x = 0. These are coordinates
    that every rule can bring to their end, so that one is taught to, though its other coordinates never get there.
    Functions that lie side by side have one each, and so have parts, so that each part's rule sees it; theirs count as
    much as one.

    Raises:
        TypeError, ValueError: `task` is no task, or not one of floating coordinates; dim is not a positive integer; r
            is not a number from 0 to 40.
    """

    task: Task
    dim: int = 20
    r: float = 1.0

    def __post_init__(self) -> None:
        check_coordinates(check_task(self.task).sample(0))
        object.__setattr__(self, "dim", integer("dim", self.dim))
        object.__setattr__(self, "r", log_range("r", self.r))

    @property
    def name(self) -> str:  # type: ignore[override]
        return f"{self.task.name} with convex functions"

    def spec(self) -> dict[str, Any]:
        return {"name": "with-convex", "task": self.task.spec(), "dim": self.dim, "r": self.r}

    def validation(self) -> Task:
        return replace(self, task=self.task.validation())

    def sample(self, seed: int) -> Problem:
        problem = self.task.sample(seed)
        parts, random = parts_of(problem), generator(seed, stream("convex", self))
        shape = (len(parts), problem.functions, self.dim)
        targets, scales = torch.from_numpy(random.uniform(-1, 1, shape)), factors(random, shape, self.r)
        change = _AddConvex(tuple(parts.values()), problem.functions, self.dim)
        own = tuple(drawn.to(problem.theta0.device, problem.theta0.dtype) for drawn in (targets, scales))
        longer = {name: size + problem.functions * self.dim for name, size in parts.items()}
        units = partial(change.longer, value=1.0)
        return wrap(problem, change, change.longer(problem.theta0), own, longer if problem.parts else None, units)


@dataclass(frozen=True)
class _AddConvex:
    """A part of theta is [functions, its coordinates of one function and then `dim` more]."""

    sizes: tuple[int, ...]
    functions: int
    dim: int

    def longer(self, numbers: Tensor, value: float = 0.0) -> Tensor:
        """Numbers of coordinates [N], such as theta_0, with this value for the new ones."""
        pieces = (piece.view(self.functions, -1) for piece in numbers.split(self.sizes))
        new = numbers.new_full((self.functions, self.dim), value)
        return torch.cat([torch.cat([piece, new], 1).flatten() for piece in pieces])

    def __call__(self, loss: Callable[[Tensor], Tensor], theta: Tensor, *own: Tensor) -> Tensor:
        targets, scales = own
        pieces = theta.split([size + self.functions * self.dim for size in self.sizes])
        rows = [piece.view(self.functions, -1) for piece in pieces]
        inner = torch.cat([row[:, : -self.dim].flatten() for row in rows])
        extra = torch.stack([row[:, -self.dim :] for row in rows])
        return loss(inner) + (extra * scales - targets).square().mean((0, 2)).sum()
