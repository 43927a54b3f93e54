"""Networks as functions of one flat vector of parameters, and problems that train them on rows of data."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from fastl2l.tasks.base import DataProblem, Minibatches, floating, generator, integer, normal, take

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "sigmoid": torch.sigmoid,
    "relu": torch.relu,
    "tanh": torch.tanh,
    "elu": F.elu,
    "leaky_relu": F.leaky_relu,
    "gelu": F.gelu,
    "silu": F.silu,
    "selu": F.selu,
    "softplus": F.softplus,
    "softsign": F.softsign,
    "mish": F.mish,
}
WHITE = 255
"""Of pixels that are held as bytes."""
_CHANNELS = 16
"""Of the first stage of convolutions; each later one has twice as many."""


@dataclass(frozen=True)
class Network:
    """Stages of convolutions, fully connected layers, and a linear one to the outputs.

    A stage is some 3x3 convolutions that keep the size, each with the activation behind it, and 2x2 max pooling; the
    first has 16 channels, each later one twice as many. The parameters are weight and bias of each layer in turn, as
    torch lays them out: [out, in, 3, 3] or [out, in], and [out].

    Args:
        inputs: shape of one input: (channels, height, width) where there are convolutions.
        outputs: how many.
        hidden: units of each hidden layer.
        activation: one of `ACTIVATIONS`, after each layer but the last.
        convolutions: how many in each stage.

    Raises:
        TypeError, ValueError: an argument is not as above, or the inputs are too small for so many stages.
    """

    inputs: tuple[int, ...]
    outputs: int
    hidden: Sequence[int] = ()
    activation: str = "sigmoid"
    convolutions: Sequence[int] = ()

    def __post_init__(self) -> None:
        for name, example in (("hidden", (20,)), ("convolutions", (2, 2))):
            object.__setattr__(self, name, integers(name, getattr(self, name), example))
        check_activation(self.activation)
        most = min(size.bit_length() - 1 for size in self.inputs[1:]) if len(self.inputs) == 3 else 0
        if len(self.convolutions) > most:
            size = " x ".join(map(str, self.inputs))
            raise ValueError(
                f"convolutions: expected at most {most} stages for inputs of {size}, which each halves, "
                f"got {list(self.convolutions)}"
            )

    @cached_property
    def parameters(self) -> int:
        """How many numbers theta holds."""
        return sum(self._sizes)

    @cached_property
    def _shapes(self) -> list[tuple[int, ...]]:
        """Of each weight and bias."""
        weights: list[tuple[int, ...]] = []
        shape = self.inputs
        for stage, count in enumerate(self.convolutions):
            channels, *sides = shape
            units = (channels, *[_CHANNELS << stage] * count)
            weights += [(n_out, n_in, 3, 3) for n_in, n_out in pairwise(units)]
            shape = (units[-1], *(side // 2 for side in sides))
        units = (math.prod(shape), *self.hidden, self.outputs)
        weights += [(n_out, n_in) for n_in, n_out in pairwise(units)]
        return [shape for weight in weights for shape in (weight, weight[:1])]

    @cached_property
    def _sizes(self) -> list[int]:
        return [math.prod(shape) for shape in self._shapes]

    def __call__(self, theta: Tensor, inputs: Tensor) -> Tensor:
        """Outputs [batch, outputs] for parameters theta [N] and inputs [batch, ...]."""
        parameters = [part.view(shape) for part, shape in zip(theta.split(self._sizes), self._shapes, strict=True)]
        layers = iter(zip(parameters[::2], parameters[1::2], strict=True))
        activation = ACTIVATIONS[self.activation]
        output = inputs.reshape(len(inputs), *self.inputs)
        for count in self.convolutions:
            for _ in range(count):
                output = activation(F.conv2d(output, *next(layers), padding=1))
            output = F.max_pool2d(output, 2)
        output = output.flatten(1)
        for _ in self.hidden:
            output = activation(F.linear(output, *next(layers)))
        return F.linear(output, *next(layers))


def integers(name: str, value: object, example: tuple[int, ...]) -> tuple[int, ...]:
    """`value` as a tuple of positive integers, or a TypeError or ValueError that names it."""
    if isinstance(value, str) or not isinstance(value, Sequence):
        raise TypeError(f"{name}: expected a sequence of positive integers such as {example}, got {value!r}")
    return tuple(integer(name, number) for number in value)


def check_activation(value: object) -> None:
    """Raise a ValueError unless `value` is one of `ACTIVATIONS`."""
    if value not in ACTIVATIONS:
        raise ValueError(f"activation: expected one of {', '.join(ACTIVATIONS)}, got {value!r}")


def deviation(name: str, value: object) -> float:
    """`value` as a standard deviation, or a TypeError or ValueError that names it."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name}: expected a number >= 0, got {value!r}")
    if not 0 <= value < math.inf:
        raise ValueError(f"{name}: expected a finite number >= 0, got {value}")
    return value


class LossOnRows:
    """From theta and the rows of a minibatch to a network's loss there.

    `inputs` are numbers as the network takes them, or bytes: pixels, of which numbers in [0, 1] are made here, of the
    minibatch alone, since all of them would take four times the memory.
    """

    def __init__(
        self, network: Network, loss: Callable[[Tensor, Tensor], Tensor], inputs: Tensor, targets: Tensor
    ) -> None:
        self.network, self._loss, self._inputs, self._targets = network, loss, inputs, targets
        self.rows = len(inputs)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, LossOnRows) or self._inputs is not other._inputs:
            return False
        return self._targets is other._targets and self._loss is other._loss and self.network == other.network

    def __call__(self, theta: Tensor, rows: Tensor) -> Tensor:
        inputs = numbers(take(self._inputs, rows), theta.dtype)
        return self._loss(self.network(theta, inputs), take(self._targets, rows))


def numbers(inputs: Tensor, dtype: torch.dtype) -> Tensor:
    """`inputs` as a network takes them: bytes as numbers in [0, 1]."""
    return inputs.to(dtype).div_(WHITE) if inputs.dtype == torch.uint8 else inputs


class Training(Protocol):
    """What tasks that train networks have in common."""

    @property
    def name(self) -> str: ...
    @property
    def batch_size(self) -> int: ...
    @property
    def init_std(self) -> float: ...
    @property
    def dtype(self) -> torch.dtype: ...
    @property
    def device(self) -> torch.device | str: ...


def check_training(task: Training) -> None:
    """Raise a TypeError or ValueError that names what is not a batch size, a standard deviation or a dtype."""
    integer("batch_size", task.batch_size)
    deviation("init_std", task.init_std)
    floating("dtype", task.dtype)


def initial(task: Training, seed: int, parameters: int) -> Tensor:
    """The start of a network's parameters: iid N(0, init_std^2)."""
    return normal(generator(seed, "theta0"), (parameters,), task.init_std, task.dtype, task.device)


class NetworkProblem(DataProblem):
    """One initialisation of a network and one sequence of minibatches."""

    function: LossOnRows

    def __init__(self, task: Training, function: LossOnRows, seed: int) -> None:
        super().__init__(Minibatches(seed, function.rows, task.batch_size))
        self.task, self.function = task.name, function
        self.theta0 = initial(task, seed, function.network.parameters)
