"""Training a small network to classify images (Andrychowicz et al. 2016, section 3.2; Lv et al. 2017)."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

from fastl2l.tasks.base import DataProblem, Minibatches, Task, floating, generator, integer, normal, take
from fastl2l.tasks.datasets import Images, load

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "sigmoid": torch.sigmoid,
    "relu": torch.relu,
    "tanh": torch.tanh,
    "elu": F.elu,
}


@dataclass(frozen=True)
class Classification(Task):
    """Mean cross-entropy (nats) of a multi-layer perceptron on a minibatch of images, as a function of its parameters.

    theta [N] holds weight [out, in] and bias [out] of each layer in turn. theta_0 is iid N(0, init_std^2). Each step
    has a minibatch of its own, iid uniform from the split, with replacement. Pixels lie in [0, 1].

    Args:
        hidden: units of each hidden layer; () for none.
        activation: "sigmoid", "relu", "tanh" or "elu", after each hidden layer.
        batch_size: images in a minibatch.
        split: "train" or "test", the images that minibatches are drawn from.
        init_std: standard deviation of theta_0.
        dtype, device: of theta and the images.

    Raises:
        TypeError, ValueError: an argument is not as above.
        FileNotFoundError, ImportError: the data set cannot be had (see `fastl2l.tasks.datasets.load`).
    """

    hidden: Sequence[int] = (20,)
    activation: str = "sigmoid"
    batch_size: int = 128
    split: str = "train"
    init_std: float = 0.1
    dtype: torch.dtype = torch.float32
    device: torch.device | str = "cpu"

    def __post_init__(self) -> None:
        if isinstance(self.hidden, str) or not isinstance(self.hidden, Sequence):
            raise TypeError(f"hidden: expected a sequence of positive integers such as (20,), got {self.hidden!r}")
        object.__setattr__(self, "hidden", tuple(integer("hidden", units) for units in self.hidden))
        if self.activation not in ACTIVATIONS:
            raise ValueError(f"activation: expected one of {', '.join(ACTIVATIONS)}, got {self.activation!r}")
        integer("batch_size", self.batch_size)
        if isinstance(self.init_std, bool) or not isinstance(self.init_std, (int, float)):
            raise TypeError(f"init_std: expected a number >= 0, got {self.init_std!r}")
        if not 0 <= self.init_std < math.inf:
            raise ValueError(f"init_std: expected a finite number >= 0, got {self.init_std}")
        floating("dtype", self.dtype)
        self.data(self.split)  # data that cannot be had should be noticed here, before anything is done with the task

    def data(self, split: str) -> Images:
        """The images and labels of a split, loaded once a process."""
        return load(self.name, split, dtype=self.dtype, device=self.device)

    def sample(self, seed: int) -> ClassificationProblem:
        return ClassificationProblem(self, seed)


class MNIST(Classification):
    __doc__ = Classification.__doc__
    name = "mnist"


class FashionMNIST(Classification):
    __doc__ = Classification.__doc__
    name = "fashion-mnist"


class Digits(Classification):
    __doc__ = Classification.__doc__
    name = "digits"


class _Network:
    """The network of a task: from theta and the rows of a minibatch to its cross-entropy."""

    def __init__(self, data: Images, hidden: Sequence[int], activation: str) -> None:
        self._data, self._images, self._labels = data, data.images.flatten(1), data.labels
        self._kind = (*hidden, activation)
        self._activation = ACTIVATIONS[activation]
        units = (self._images.shape[1], *hidden, data.classes)
        self._shapes = [shape for n_in, n_out in pairwise(units) for shape in ((n_out, n_in), (n_out,))]
        self._sizes = [math.prod(shape) for shape in self._shapes]
        self.parameters = sum(self._sizes)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Network) and self._data is other._data and self._kind == other._kind

    def __call__(self, theta: Tensor, rows: Tensor) -> Tensor:
        return F.cross_entropy(self.logits(theta, take(self._images, rows)), take(self._labels, rows))

    def logits(self, theta: Tensor, images: Tensor) -> Tensor:
        """Outputs [batch, classes] of the network with parameters theta [N] for images [batch, pixels]."""
        weight, bias, *rest = (
            part.view(shape) for part, shape in zip(theta.split(self._sizes), self._shapes, strict=True)
        )
        output = F.linear(images, weight, bias)
        for weight, bias in zip(rest[::2], rest[1::2], strict=True):
            output = F.linear(self._activation(output), weight, bias)
        return output


class ClassificationProblem(DataProblem):
    """One initialisation of the network and one sequence of minibatches."""

    def __init__(self, task: Classification, seed: int) -> None:
        self.task = task.name
        self._data = task.data
        data = task.data(task.split)
        super().__init__(Minibatches(seed, len(data.labels), task.batch_size))
        self.function = network = _Network(data, task.hidden, task.activation)
        self.theta0 = normal(generator(seed, "theta0"), (network.parameters,), task.init_std, task.dtype, task.device)
        self.logits = network.logits

    @torch.no_grad()
    def accuracy(self, theta: Tensor, split: str = "test") -> float:
        """Share of a whole split ("train" or "test") that the network with parameters theta [N] classifies rightly."""
        images, labels, _ = self._data(split)
        return (self.logits(theta, images.flatten(1)).argmax(1) == labels).double().mean().item()
