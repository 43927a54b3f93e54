"""Regression and classification on small tables: those that come with scikit-learn, or anyone's own."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from fastl2l.tasks.base import Task, fingerprint, refuse
from fastl2l.tasks.networks import LossOnRows, Network, NetworkProblem, check_training

TABLES = ("diabetes", "breast-cancer", "wine", "iris", "linnerud")
"""Tables of scikit-learn: diabetes and linnerud (three targets) are regressions, the others classifications."""


@dataclass(frozen=True)
class Table(Task):
    """Mean loss of a multi-layer perceptron on a minibatch of a table's rows, as a function of its parameters.

    The loss is the cross-entropy (nats) where targets are whole numbers, labels 0, 1, ...; else the mean squared error,
    over rows and targets. Inputs, and targets of a regression, are standardized: each column has mean 0 and deviation 1
    (0 if it is constant) over the whole table. theta, theta_0 and minibatches are as of `Classification`.

    Args:
        table: one of "diabetes", "breast-cancer", "wine", "iris" and "linnerud"; or (inputs, targets), arrays or
            Tensors [rows, columns] and [rows] or, for a regression, [rows, targets].
        hidden: units of each hidden layer; () for none.
        activation: "sigmoid", "relu", "tanh", "elu", ... (`networks.ACTIVATIONS`), after each hidden layer.
        batch_size: rows in a minibatch.
        init_std: standard deviation of theta_0.
        dtype, device: of theta and the table.

    Raises:
        TypeError, ValueError: an argument is not as above; or numbers of the table are not finite.
        ImportError: scikit-learn is missing.
    """

    table: str | tuple[Any, Any] = "diabetes"
    hidden: Sequence[int] = (20,)
    activation: str = "sigmoid"
    batch_size: int = 32
    init_std: float = 0.1
    dtype: torch.dtype = torch.float32
    device: torch.device | str = "cpu"
    name = "table"

    def __post_init__(self) -> None:
        check_training(self)
        if isinstance(self.table, str) and self.table not in TABLES:
            raise ValueError(f"table: expected one of {', '.join(TABLES)} or (inputs, targets), got {self.table!r}")
        if not isinstance(self.table, (str, _Rows)):
            object.__setattr__(self, "table", _own(self.table))
        object.__setattr__(self, "hidden", self._function().network.hidden)

    def sample(self, seed: int) -> NetworkProblem:
        return NetworkProblem(self, self._function(), seed)

    def _function(self) -> LossOnRows:
        rows = self.table if isinstance(self.table, _Rows) else _bundled(str(self.table))
        inputs, targets = rows.on(self.dtype, torch.device(self.device))
        network = Network((inputs.shape[1],), rows.outputs, self.hidden, self.activation)
        return LossOnRows(network, rows.loss, inputs, targets)


class _Rows:
    """A table: inputs float64 [rows, columns] and targets, float64 [rows, targets] or labels int64 [rows]."""

    def __init__(self, inputs: Tensor, targets: Tensor) -> None:
        self._hash = fingerprint(inputs, targets)
        labels = targets.dtype == torch.int64
        self.loss: Callable[[Tensor, Tensor], Tensor] = F.cross_entropy if labels else F.mse_loss
        self.outputs = int(targets.max()) + 1 if labels else targets.shape[1]
        self._inputs, self._targets = _standardized(inputs), targets if labels else _standardized(targets)
        self._held: dict[tuple[torch.dtype, torch.device], tuple[Tensor, Tensor]] = {}

    def on(self, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
        """Inputs and targets; the same Tensors every time."""
        if (dtype, device) not in self._held:
            targets = self._targets if self.loss is F.cross_entropy else self._targets.to(dtype)
            self._held[dtype, device] = self._inputs.to(device, dtype), targets.to(device)
        return self._held[dtype, device]

    def spec(self) -> str:
        return self._hash

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Rows) and self._hash == other._hash

    def __hash__(self) -> int:
        return hash(self._hash)


@cache
def _bundled(name: str) -> _Rows:
    try:
        from sklearn import datasets
    except ImportError as error:
        raise ImportError(f"the table {name!r} needs scikit-learn, which is not installed") from error
    return _own(getattr(datasets, f"load_{name.replace('-', '_')}")(return_X_y=True))


def _own(table: object) -> _Rows:
    """The table of (inputs, targets)."""
    if not isinstance(table, (tuple, list)) or len(table) != 2:
        got = type(table).__name__ + (f" of {len(table)}" if isinstance(table, (tuple, list)) else "")
        raise TypeError(f"table: expected a name or (inputs, targets), got {got}")
    inputs, targets = _array("inputs", table[0]), _array("targets", table[1])
    labels = targets.dtype == torch.int64
    shapes = f"{list(inputs.shape)} and {list(targets.shape)}"
    if inputs.ndim != 2 or not inputs.numel() or targets.ndim not in (1, 2) or len(targets) != len(inputs):
        raise ValueError(f"table: expected inputs [rows, columns] and targets [rows] or [rows, targets], got {shapes}")
    if labels and (targets.ndim != 1 or targets.min() < 0):
        got = f"{targets.min()}" if targets.ndim == 1 else f"shape {list(targets.shape)}"
        raise ValueError(f"table: expected labels 0, 1, ... [rows] as targets that are whole, got {got}")
    return _Rows(inputs.double(), targets if labels or targets.ndim == 2 else targets[:, None])


def _array(name: str, values: Any) -> Tensor:
    """`values` as int64 or float64, all finite."""
    array = np.asarray(values.detach().cpu() if isinstance(values, Tensor) else values)
    if array.dtype.kind not in "biuf":
        raise TypeError(f"table: {name}: expected numbers, got {array.dtype}")
    numbers = torch.from_numpy(array.astype(np.float64 if array.dtype.kind == "f" else np.int64))
    refuse(f"table: {name}", numbers, ~numbers.isfinite(), "finite numbers")
    return numbers


def _standardized(columns: Tensor) -> Tensor:
    constant = (columns == columns[0]).all(0)  # of such, rounding may leave some deviation
    deviations = columns.std(0, correction=0).masked_fill(constant, 1.0)
    if not deviations.isfinite().all():
        raise ValueError(f"table: expected numbers whose squares are finite, got up to {columns.abs().max()}")
    return (columns - columns.mean(0)) / deviations
