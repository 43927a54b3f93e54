"""Training a small network to classify images (Andrychowicz et al. 2016, section 3.2; Lv et al. 2017)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastl2l.tasks.base import Task
from fastl2l.tasks.datasets import Images, load
from fastl2l.tasks.networks import LossOnRows, Network, NetworkProblem, check_training, integers, numbers

_AT_ONCE = 1000
"""Images whose accuracy is computed at once: convolutions of many more take gigabytes."""


@dataclass(frozen=True)
class Classification(Task):
    """Mean cross-entropy (nats) of a network on a minibatch of images, as a function of its parameters.

    theta [N] holds weight and bias of each layer in turn: of the convolutions, [out, in, 3, 3], and of the fully
    connected layers, [out, in]. theta_0 is iid N(0, init_std^2). Each step has a minibatch of its own, iid uniform from
    the split, with replacement. Pixels lie in [0, 1].

    Args:
        hidden: units of each hidden layer; () for none.
        activation: "sigmoid", "relu", "tanh", "elu", ... (`networks.ACTIVATIONS`), after each layer but the last.
        batch_size: images in a minibatch.
        split: "train" or "test", the images that minibatches are drawn from.
        init_std: standard deviation of theta_0.
        dtype, device: of theta and the images.
        convolutions: how many 3 x 3 convolutions, which keep the size, in each stage before the hidden layers; () for
            none. The first stage has 16 channels, each later one twice as many; 2 x 2 max pooling after each. So the
            networks of Lv et al. are c-c-p-f, `hidden=(), activation="relu", convolutions=(2,)`, and c-c-p-c-c-p-f-f,
            `hidden=(64,), activation="relu", convolutions=(2, 2)`. With convolutions, theta has parts: "conv" and "fc".

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
    convolutions: Sequence[int] = ()

    def __post_init__(self) -> None:
        check_training(self)
        # Data that cannot be had should be noticed here, before anything is done with the task.
        network = self.network(self.data(self.split))
        object.__setattr__(self, "hidden", network.hidden)
        object.__setattr__(self, "convolutions", network.convolutions)

    def spec(self) -> dict[str, Any]:
        """As of any task. Without convolutions there is no word of them, as before there were any."""
        spec = super().spec()
        if not self.convolutions:
            del spec["convolutions"]
        return spec

    def data(self, split: str) -> Images:
        """The images and labels of a split, loaded once a process."""
        return load(self.name, split, dtype=self.dtype, device=self.device)

    def network(self, data: Images) -> Network:
        """The network for such images."""
        return Network(tuple(data.images.shape[1:]), data.classes, self.hidden, self.activation, self.convolutions)

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


@dataclass(frozen=True)
class CIFAR10(Classification):
    """Mean cross-entropy (nats) of a convolutional network on a minibatch of CIFAR-10, as a function of its parameters.

    By default the network of Andrychowicz et al. 2016, section 3.3: three 5 x 5 convolutions of 16 channels, each with
    batch norm (over the minibatch: there are no running means), ReLU and 2 x 2 max pooling, 32 hidden units with batch
    norm and ReLU, a linear layer. theta [N] has parts, for rules of their own: "conv" and "fc". theta_0 is iid
    N(0, init_std^2), but for norms, which begin with gains of 1 and shifts of 0. Each step has a minibatch of its own,
    iid uniform from the split, with replacement. Pixels are held as bytes; networks get them in [0, 1].

    The networks of Lv et al. 2017 have `kernel=3, widening=2, batch_norm=False`; see `convolutions`.

    Args:
        hidden, activation, batch_size, split, init_std, dtype, device: as of `MNIST`.
        convolutions: how many, which keep the size, in each stage before the hidden layers; () for none. The first
            stage has 16 channels; 2 x 2 max pooling after each.
        kernel: side of the convolutions, odd.
        widening: how many times as many channels each stage has as the one before.
        batch_norm: whether channels and hidden units are normalised over the minibatch, before the activation.
        labels: those whose images are used, of 0 to 9, which become 0, 1, ... in this order; None for all.

    Raises:
        TypeError, ValueError: an argument is not as above.
        FileNotFoundError, ImportError: the data set cannot be had (see `fastl2l.tasks.datasets.load`).
    """

    hidden: Sequence[int] = (32,)
    activation: str = "relu"
    convolutions: Sequence[int] = (1, 1, 1)
    kernel: int = 5
    widening: int = 1
    batch_norm: bool = True
    labels: Sequence[int] | None = None
    name = "cifar10"

    def __post_init__(self) -> None:
        if self.labels is not None:
            object.__setattr__(self, "labels", integers("labels", self.labels, (0, 1), least=0))
        super().__post_init__()

    def data(self, split: str) -> Images:
        return load(self.name, split, labels=self.labels, dtype=self.dtype, device=self.device)

    def network(self, data: Images) -> Network:
        return replace(super().network(data), kernel=self.kernel, widening=self.widening, batch_norm=self.batch_norm)


class ClassificationProblem(NetworkProblem):
    """One initialisation of the network and one sequence of minibatches."""

    def __init__(self, task: Classification, seed: int) -> None:
        self._data = task.data
        data = task.data(task.split)
        super().__init__(task, LossOnRows(task.network(data), F.cross_entropy, data.images, data.labels), seed)

    def logits(self, theta: Tensor, images: Tensor) -> Tensor:
        """Outputs [batch, classes] of the network with parameters theta [N] for images as `datasets.load` has them."""
        return self.function.network(theta, numbers(images, theta.dtype))

    @torch.no_grad()
    def accuracy(self, theta: Tensor, split: str = "test") -> float:
        """Share of a whole split ("train" or "test") that the network with parameters theta [N] classifies rightly."""
        images, labels, _ = self._data(split)
        classes = torch.cat([self.logits(theta, some).argmax(1) for some in images.split(_AT_ONCE)])
        return (classes == labels).double().mean().item()
