"""BFGS of scipy as a torch optimizer."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
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
        ValueError: lr is not > 0 and finite, there are several groups, or more than 10,000 coordinates.
    """

    def __init__(self, params: Iterable[Tensor], lr: float = 1.0) -> None:
        if not 0 < lr < math.inf:
            raise ValueError(f"lr: expected a finite number > 0, got {lr}")
        super().__init__(params, {"lr": lr})

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """The one group there is. Raises ValueError for a further one, or if it is too large."""
        super().add_param_group(param_group)
        if len(self.param_groups) > 1:
            self.param_groups.pop()
            raise ValueError("params: expected one group for BFGS, got another")
        if (numel := sum(self._sizes)) > MOST:
            raise ValueError(f"params: expected at most {MOST:,} coordinates for BFGS, got {numel:,}")

    @property
    def _params(self) -> list[Tensor]:
        params: list[Tensor] = self.param_groups[0]["params"]
        return params

    @property
    def _sizes(self) -> list[int]:
        return [param.numel() for param in self._params]

    def step(self, closure: Callable[[], Any]) -> float:  # type: ignore[override]
        """All iterations, until a line search finds nothing lower or `closure` raises.

        Args:
            closure: gives the loss and leaves its gradient in the parameters, wherever they have been put.

        Returns:
            The lowest loss, which the parameters are left at; where none was finite they are where they were, and it is
            the last.
        """
        import scipy.optimize  # slow to import

        start = best = self._read(lambda param: param)
        lowest = last = math.inf

        def evaluate(x: Any) -> tuple[float, Any]:
            nonlocal best, lowest, last
            self._write(x)
            with torch.enable_grad():
                last = _number(closure())
            if last < lowest:
                best, lowest = self._read(lambda param: param), last
            return last, self._read(lambda param: param.grad)

        options = {"gtol": SMALLEST, "maxiter": 10**9, "hess_inv0": self.param_groups[0]["lr"] * np.eye(len(start))}
        with np.errstate(all="ignore"):  # what overflows is not the lowest
            scipy.optimize.minimize(evaluate, start, method="BFGS", jac=True, options=options)
        self._write(best)
        return lowest if lowest < math.inf else last

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


def _number(loss: object) -> float:
    if isinstance(loss, Tensor):
        return loss.item()
    if isinstance(loss, float | int):
        return float(loss)
    raise TypeError(f"closure: expected one that gives the loss, got {loss!r}")
