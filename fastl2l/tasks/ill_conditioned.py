"""Quadratic functions whose curvatures differ by orders of magnitude, other ones in every function."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch

from fastl2l.tasks.base import Task, floating, generator, integer
from fastl2l.tasks.quadratic import QuadraticProblem


@dataclass(frozen=True)
class IllConditioned(Task):
    """f(theta) = ||W (theta - theta*)||^2, with theta* and theta_0 [dim] iid N(0, 1).

    The squared singular values of W are exp(-u), u ~ U[0, ln condition], drawn anew for every function, and its
    singular vectors are random directions. No step length is right for all coordinates, nor a matrix for all functions.

    Raises:
        TypeError, ValueError: dim or batch is not a positive integer, condition is below 1 or not finite, dtype not
            floating.
    """

    dim: int = 10
    condition: float = 1e3
    batch: int = 128
    dtype: torch.dtype = torch.float32
    device: torch.device | str = "cpu"
    name = "ill-conditioned"

    def __post_init__(self) -> None:
        integer("dim", self.dim)
        integer("batch", self.batch)
        floating("dtype", self.dtype)
        if isinstance(self.condition, bool) or not isinstance(self.condition, (int, float)):
            raise TypeError(f"condition: expected a number >= 1, got {self.condition!r}")
        if not 1 <= self.condition < math.inf:
            raise ValueError(f"condition: expected a finite number >= 1, got {self.condition}")

    def sample(self, seed: int) -> QuadraticProblem:
        random = generator(seed, "ill-conditioned")
        u = random.uniform(0, 1, (self.batch, self.dim, 1)) * math.log(self.condition)
        directions, _ = np.linalg.qr(random.standard_normal((self.batch, self.dim, self.dim)))
        w = np.exp(-u / 2) * directions
        best, start = random.standard_normal((2, self.batch, self.dim, 1))
        w, y, theta0 = (torch.from_numpy(numbers).to(self.device, self.dtype) for numbers in (w, w @ best, start))
        return QuadraticProblem(w, y, theta0.flatten())
