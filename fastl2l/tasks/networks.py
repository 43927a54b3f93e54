"""Networks as functions of one flat vector of parameters, and problems that train them on rows of data."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from fastl2l.tasks.base import DataProblem, Minibatches, floating, generator, integer, normal, take
from fastl2l.units import units

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
RISING = {"sigmoid", "relu", "tanh", "elu", "leaky_relu", "selu", "softplus", "softsign"}
"""Of these, the ones that never fall."""
WHITE = 255
"""Of pixels that are held as bytes."""
_CHANNELS = 16
"""Of the first stage of convolutions."""


class _Layer(NamedTuple):
    """Shapes of a layer's parameters, as torch lays them out, and whether channels are normalised behind it."""

    weight: tuple[int, ...]
    norm: bool

    @property
    def shapes(self) -> list[tuple[int, ...]]:
        """Of the weight, then of the bias or of the norm's gains and shifts."""
        return [self.weight, *[self.weight[:1]] * (2 if self.norm else 1)]

    @property
    def part(self) -> str:
        """Convolutional or fully connected."""
        return "conv" if len(self.weight) == 4 else "fc"

    def __call__(self, output: Tensor, parameters: Iterator[Tensor]) -> Tensor:
        convolution = len(self.weight) == 4
        weight, bias = next(parameters), None if self.norm else next(parameters)
        if convolution:
            output = F.conv2d(output, weight, bias, padding=self.weight[-1] // 2)
        else:
            output = F.linear(output, weight, bias)
        if self.norm:
            output = F.batch_norm(output, None, None, next(parameters), next(parameters), training=True)
        return output


@dataclass(frozen=True)
class Network:
    """Stages of convolutions, fully connected layers, and a linear one to the outputs.

    A stage is some square convolutions that keep the size, each with the activation behind it, and 2x2 max pooling; the
    first has 16 channels. The parameters are weight and bias of each layer in turn, as torch lays them out:
    [out, in, k, k] or [out, in], and [out].

    Args:
        inputs: shape of one input: (channels, height, width) where there are convolutions.
        outputs: how many.
        hidden: units of each hidden layer.
        activation: one of `ACTIVATIONS`, after each layer but the last.
        convolutions: how many in each stage.
        kernel: side of the convolutions, odd.
        widening: how many times as many channels each stage has as the one before.
        batch_norm: normalise each channel and hidden unit over the minibatch, before the activation. Then a layer has
            gains and shifts, [out] each, behind its weight in place of a bias. The last layer is as ever.

    Raises:
        TypeError, ValueError: an argument is not as above, or the inputs are too small for so many stages.
    """

    inputs: tuple[int, ...]
    outputs: int
    hidden: Sequence[int] = ()
    activation: str = "sigmoid"
    convolutions: Sequence[int] = ()
    kernel: int = 3
    widening: int = 2
    batch_norm: bool = False

    def __post_init__(self) -> None:
        for name, example in (("hidden", (20,)), ("convolutions", (2, 2))):
            object.__setattr__(self, name, integers(name, getattr(self, name), example))
        check_activation(self.activation)
        if integer("kernel", self.kernel) % 2 == 0:
            raise ValueError(f"kernel: expected an odd number, so that a convolution keeps the size, got {self.kernel}")
        integer("widening", self.widening)
        if not isinstance(self.batch_norm, bool):
            raise TypeError(f"batch_norm: expected True or False, got {self.batch_norm!r}")
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
    def parts(self) -> dict[str, int] | None:
        """How many of them belong to convolutions and their norms, "conv", and to all else, "fc"; None if to one."""
        sizes = {"conv": 0, "fc": 0}
        for layer in self._layers:
            sizes[layer.part] += sum(map(math.prod, layer.shapes))
        return sizes if sizes["conv"] else None

    @cached_property
    def _layers(self) -> list[_Layer]:
        weights: list[tuple[int, ...]] = []
        shape = self.inputs
        for stage, count in enumerate(self.convolutions):
            channels, *sides = shape
            units = (channels, *[_CHANNELS * self.widening**stage] * count)
            weights += [(n_out, n_in, self.kernel, self.kernel) for n_in, n_out in pairwise(units)]
            shape = (units[-1], *(side // 2 for side in sides))
        units = (math.prod(shape), *self.hidden, self.outputs)
        weights += [(n_out, n_in) for n_in, n_out in pairwise(units)]
        return [_Layer(weight, self.batch_norm and place > 0) for place, weight in enumerate(weights[::-1])][::-1]

    @cached_property
    def shapes(self) -> list[tuple[int, ...]]:
        """Of each parameter."""
        return [shape for layer in self._layers for shape in layer.shapes]

    @cached_property
    def _sizes(self) -> list[int]:
        return [math.prod(shape) for shape in self.shapes]

    def _parameters(self, theta: Tensor) -> Iterator[Tensor]:
        return (part.view(shape) for part, shape in zip(theta.split(self._sizes), self.shapes, strict=True))

    def __call__(self, theta: Tensor, inputs: Tensor) -> Tensor:
        """Outputs [batch, outputs] for parameters theta [N] and inputs [batch, ...]."""
        parameters, layers = self._parameters(theta), iter(self._layers)
        activation = ACTIVATIONS[self.activation]
        output = inputs.reshape(len(inputs), *self.inputs)
        if self.convolutions and self.inputs[0] > 1:
            output = _by_pixel(output)
        for count in self.convolutions:
            for _ in range(count - 1):
                output = activation(next(layers)(output, parameters))
            output = self._pooled(next(layers)(output, parameters))
        output = output.flatten(1)
        for _ in self.hidden:
            output = activation(next(layers)(output, parameters))
        return next(layers)(output, parameters)

    def _pooled(self, output: Tensor) -> Tensor:
        """Activation and pooling, in the cheaper order: the activation of a largest number is the largest one."""
        activation = ACTIVATIONS[self.activation]
        if self.activation in RISING:
            return activation(F.max_pool2d(output, 2))
        return F.max_pool2d(activation(output), 2)

    def settle(self, theta: Tensor) -> Tensor:
        """Give norms gains of 1 and shifts of 0, in place, and return theta [N]."""
        parameters = self._parameters(theta)
        for layer in self._layers:
            _, second, *shifts = (next(parameters) for _ in layer.shapes)
            if layer.norm:
                second.fill_(1)
                shifts[0].zero_()
        return theta


def _by_pixel(images: Tensor) -> Tensor:
    """The same images [n, channels, height, width], with the channels of a pixel side by side in memory.

    Convolutions, norms and pooling are faster so on CPUs, but not of images of one channel.
    """
    return images.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2)


def integers(name: str, value: object, example: tuple[int, ...], *, least: int = 1) -> tuple[int, ...]:
    """`value` as a tuple of integers, or a TypeError or ValueError that names it."""
    if isinstance(value, str) or not isinstance(value, Sequence):
        raise TypeError(f"{name}: expected a sequence of integers >= {least} such as {example}, got {value!r}")
    return tuple(integer(name, number, least) for number in value)


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
        self.theta0 = function.network.settle(initial(task, seed, function.network.parameters))
        self.parts = function.network.parts

    @cached_property
    def units(self) -> Tensor:  # type: ignore[override]
        return units(self.theta0, self.function.network.shapes)
