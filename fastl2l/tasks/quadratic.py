"""Random quadratic functions (Andrychowicz et al. 2016, section 3.1)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fastl2l.tasks.base import PureProblem, Task, floating, generator, integer, normal


@dataclass(frozen=True)
class Quadratic(Task):
    """f(theta) = ||W theta - y||^2, with W [dim, dim], y [dim] and theta_0 [dim] all iid N(0, 1).

    A problem holds `batch` functions side by side: theta is [batch * dim], function after function. Other code draws W
    and y from other distributions (uniform on [0, 1] is common): losses cannot be compared with theirs.

    Raises:
        TypeError, ValueError: dim or batch is not a positive integer, dtype not floating.
    """

    dim: int = 10
    batch: int = 128
    dtype: torch.dtype = torch.float32
    device: torch.device | str = "cpu"
    name = "quadratic"

    def __post_init__(self) -> None:
        integer("dim", self.dim)
        integer("batch", self.batch)
        floating("dtype", self.dtype)

    def sample(self, seed: int) -> QuadraticProblem:
        random = generator(seed, "quadratic")
        w, y, theta0 = (
            normal(random, (self.batch, self.dim, columns), 1.0, self.dtype, self.device)
            for columns in (self.dim, 1, 1)
        )
        return QuadraticProblem(w, y, theta0.flatten())


class QuadraticProblem(PureProblem):
    """The functions ||W_i theta_i - y_i||^2 of w [functions, dim, dim] and y [functions, dim, 1]."""

    task = Quadratic.name

    def __init__(self, w: Tensor, y: Tensor, theta0: Tensor) -> None:
        self.w, self.y, self.theta0, self.functions = w, y, theta0, len(w)
        self.constants = w, y

    def losses(self, theta: Tensor, step: int) -> Tensor:
        return torch.baddbmm(self.y, self.w, theta.view_as(self.y), beta=-1).square().sum((1, 2))

    def alone(self, number: int) -> QuadraticProblem:
        if not 0 <= number < self.functions:
            raise IndexError(f"number: expected one of {self.functions} functions, got {number}")
        one = slice(number, number + 1)
        return QuadraticProblem(self.w[one], self.y[one], self.theta0.view(self.functions, -1)[number])

    @staticmethod
    def function(theta: Tensor, w: Tensor, y: Tensor) -> Tensor:
        residual = torch.baddbmm(y, w, theta.view_as(y), beta=-1).flatten()
        return torch.dot(residual, residual)
