"""BFGS of scipy as a torch optimizer."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import scipy.optimize
import torch
from torch import Tensor

MOST = 10_000
"""Coordinates: the inverse Hessian takes 8 bytes for each two of them."""


SMALLEST = 1e-100
"""Gradient that iterations go on with: of smaller ones, products have no inverse."""


class BFGS(torch.optim.Optimizer):
    """`scipy.optimize.minimize` with method BFGS, in float64, whose line search asks for strong Wolfe conditions.

    Args:
        params: what is optimized, of any floating dtype.
        lr: the inverse Hessian begins as this times the identity.

    Raises:
        ValueError: lr is not > 0, there are several groups, or more than 10,000 coordinates.
    """

    def __init__(self, params: Iterable[Tensor], lr: float = 1.0) -> None:
        if not lr > 0:
            raise ValueError(f"lr: expected a number > 0, got {lr}")
        super().__init__(params, {"lr": lr})
        if len(self.param_groups) != 1:
            raise ValueError(f"params: expected one group, got {len(self.param_groups)}")
        self._params: list[Tensor] = self.param_groups[0]["params"]
        self._sizes = [param.numel() for param in self._params]
        if sum(self._sizes) > MOST:
            raise ValueError(f"params: expected at most {MOST:,} coordinates for BFGS, got {sum(self._sizes):,}")

    def step(self, closure: Callable[[], Any]) -> float:  # type: ignore[override]
        """All iterations, until a line search finds nothing lower or `closure` raises; returns the last loss.

        Args:
            closure: gives the loss and leaves its gradient in the parameters, wherever they have been put.
        """

        def evaluate(x: Any) -> tuple[float, Any]:
            self._write(x)
            return torch.as_tensor(closure()).item(), self._read(lambda param: param.grad)

        n = sum(self._sizes)
        options = {"gtol": SMALLEST, "maxiter": 10**9, "hess_inv0": self.param_groups[0]["lr"] * np.eye(n)}
        start = self._read(lambda param: param)
        found = scipy.optimize.minimize(evaluate, start, method="BFGS", jac=True, options=options)
        self._write(found.x)
        return float(found.fun)

    def _read(self, what: Callable[[Tensor], Tensor | None]) -> Any:
        """Something of each parameter, together as float64; zeros where there is none."""
        parts = [(param, what(param)) for param in self._params]
        flat = [torch.zeros_like(param) if part is None else part for param, part in parts]
        return torch.cat([part.detach().flatten().double().cpu() for part in flat]).numpy()

    @torch.no_grad()
    def _write(self, x: Any) -> None:
        numbers = torch.from_numpy(np.asarray(x, dtype=np.float64)).split(self._sizes)
        for param, part in zip(self._params, numbers, strict=True):
            param.copy_(part.view_as(param))
