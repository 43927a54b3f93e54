"""Training a small LSTM to go on with a sine (Lv et al. 2017)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from fastl2l.tasks.base import Drawn, PureProblem, Task, generator, integer
from fastl2l.tasks.networks import check_training, deviation, initial
from fastl2l.units import units

_VALUES = 10
"""That the network sees, of steps 0 to 9."""


@dataclass(frozen=True)
class Sine(Task):
    """Mean squared error of an LSTM that predicts A sin(10 w + b) from A sin(k w + b) + noise, k = 0, ..., 9.

    A ~ U(0, 10), w ~ U(0, pi / 2), b ~ U(0, 2 pi), noise ~ N(0, noise^2), which what is predicted is free of; each step
    has fresh sequences. The prediction is linear in the last h. theta [N] holds of each layer the weights of its inputs
    [4 units, in], of its last h [4 units, units] and one bias a gate [4 units], gates in the order i, f, o, g; then the
    output's weights [units] and bias. Nothing is added to the forget gate. theta_0 is iid N(0, init_std^2).

    Args:
        layers, units: LSTM layers, and units of each.
        noise: standard deviation of the noise.
        batch_size: sequences of a step.
        init_std: standard deviation of theta_0.
        dtype, device: of theta and the sequences.

    Raises:
        TypeError, ValueError: an argument is not as above.
    """

    layers: int = 1
    units: int = 20
    noise: float = 0.1
    batch_size: int = 128
    init_std: float = 0.1
    dtype: torch.dtype = torch.float32
    device: torch.device | str = "cpu"
    name = "sine"

    def __post_init__(self) -> None:
        integer("layers", self.layers)
        integer("units", self.units)
        deviation("noise", self.noise)
        check_training(self)

    def sample(self, seed: int) -> SineProblem:
        return SineProblem(self, seed)


@dataclass(frozen=True)
class _Forecast:
    """The function of a problem: from theta and sequences to the mean squared error of the predictions."""

    layers: int
    units: int

    @property
    def parameters(self) -> int:
        return sum(self._sizes)

    @cached_property
    def _shapes(self) -> list[tuple[int, int]]:
        gates = 4 * self.units
        inputs = (1, *[self.units] * (self.layers - 1))
        layers = [shape for n_in in inputs for shape in ((gates, n_in), (gates, self.units), (gates, 1))]
        return [*layers, (1, self.units), (1, 1)]

    @property
    def shapes(self) -> list[tuple[int, ...]]:
        """Of the parameters, as torch's modules have them: biases are vectors."""
        *of_layers, weight, bias = self._shapes
        return [*(shape[: 1 if place % 3 == 2 else 2] for place, shape in enumerate(of_layers)), weight, bias[:1]]

    @cached_property
    def _sizes(self) -> list[int]:
        return [math.prod(shape) for shape in self._shapes]

    def __call__(self, theta: Tensor, values: Tensor, targets: Tensor) -> Tensor:
        *of_layers, weight, bias = (
            part.view(shape) for part, shape in zip(theta.split(self._sizes), self._shapes, strict=True)
        )
        # [features, sequences]: what is of one gate is in one piece. All steps side by side are one matrix product.
        outputs = values.unsqueeze(1).unbind()
        for layer in range(self.layers):
            of_input, of_state, of_gate = of_layers[3 * layer : 3 * layer + 3]
            driven = torch.addmm(of_gate, of_input, torch.cat(outputs, 1)).split(values.shape[1], 1)
            outputs = self._outputs(driven, of_state)
        return F.mse_loss(torch.addmm(bias, weight, outputs[-1])[0], targets)

    def _outputs(self, driven: Sequence[Tensor], of_state: Tensor) -> tuple[Tensor, ...]:
        """The h of a layer at each step, [units, sequences], from what its inputs give to the gates [4 units, ...]."""
        outputs: list[Tensor] = []
        c: Tensor | None = None
        for given in driven:
            sums = given if c is None else torch.addmm(given, of_state, outputs[-1])
            gates, new = sums.split([3 * self.units, self.units])
            i, f, o = torch.sigmoid(gates).chunk(3)
            new = i * torch.tanh(new)
            c = new if c is None else torch.addcmul(new, f, c)
            outputs.append(o * torch.tanh(c))
        return tuple(outputs)


class _Sequences(Drawn[tuple[Tensor, Tensor]]):
    """Values [10, batch_size], with noise, and what is to be predicted of them [batch_size]."""

    def __init__(self, task: Sine, seed: int) -> None:
        super().__init__(64)
        self._of, self._seed = task, seed

    def draw(self, block: int, device: torch.device) -> Sequence[tuple[Tensor, Tensor]]:
        random, batch_size = generator(self._seed, "sequences", block), self._of.batch_size
        amplitude, frequency, phase = random.random((3, self._steps, 1, batch_size))
        steps = np.arange(_VALUES + 1)[:, None]
        sines = 10 * amplitude * np.sin(math.pi / 2 * frequency * steps + 2 * math.pi * phase)
        noise = random.standard_normal((self._steps, _VALUES, batch_size)) * self._of.noise
        drawn = (sines[:, :_VALUES] + noise, sines[:, _VALUES])
        values, targets = (torch.from_numpy(x).to(device, self._of.dtype).unbind() for x in drawn)
        return list(zip(values, targets, strict=True))


class SineProblem(PureProblem):
    """One initialisation of the network and the sequences of each step."""

    task = Sine.name
    function: _Forecast

    def __init__(self, task: Sine, seed: int) -> None:
        self.function = _Forecast(task.layers, task.units)
        self.theta0 = initial(task, seed, self.function.parameters)
        self._sequences = _Sequences(task, seed)

    @cached_property
    def units(self) -> Tensor:  # type: ignore[override]
        return units(self.theta0, self.function.shapes)

    def inputs(self, step: int, device: torch.device) -> tuple[Tensor, ...]:
        return self._sequences.at(step, device)
