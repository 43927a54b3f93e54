"""Distributions of problems. They know nothing of optimizers."""

from __future__ import annotations

import inspect
from typing import Any

from fastl2l.tasks.augmented import augmented
from fastl2l.tasks.base import Problem, PureProblem, Task
from fastl2l.tasks.batch import batch
from fastl2l.tasks.classification import CIFAR10, MNIST, Digits, FashionMNIST
from fastl2l.tasks.convex import WithConvex
from fastl2l.tasks.custom import from_module
from fastl2l.tasks.ill_conditioned import IllConditioned
from fastl2l.tasks.mixture import Mixture
from fastl2l.tasks.neural_art import NeuralArt
from fastl2l.tasks.parts import conv_and_fc
from fastl2l.tasks.quadratic import Quadratic
from fastl2l.tasks.random_networks import RandomNetworks
from fastl2l.tasks.recurrent import Sine
from fastl2l.tasks.scaled import Scaled
from fastl2l.tasks.spiked import Spiked
from fastl2l.tasks.tables import Table

__all__ = [
    "CIFAR10",
    "MNIST",
    "Digits",
    "FashionMNIST",
    "IllConditioned",
    "Mixture",
    "NeuralArt",
    "Problem",
    "PureProblem",
    "Quadratic",
    "RandomNetworks",
    "Scaled",
    "Sine",
    "Spiked",
    "Table",
    "Task",
    "WithConvex",
    "augmented",
    "batch",
    "by_name",
    "conv_and_fc",
    "from_module",
    "names",
]

_ALL = (Quadratic, IllConditioned, MNIST, FashionMNIST, Digits, CIFAR10, Sine, Table, RandomNetworks, NeuralArt)
_TASKS: dict[str, type[Task]] = {task.name: task for task in _ALL}


def names() -> list[str]:
    """Names that `by_name` knows."""
    return list(_TASKS)


def by_name(name: str, **options: Any) -> Task:
    """The task called `name`, with `options` as its class takes them: `by_name("mnist", hidden=(40,))`.

    Raises:
        ValueError: no task has this name, or it has no such option; the message lists those there are.
        TypeError, ValueError, ...: as the task's class does for its options.
    """
    if name not in _TASKS:
        raise ValueError(f"name: expected one of {', '.join(_TASKS)}, got {name!r}")
    known = inspect.signature(_TASKS[name]).parameters
    for option in options.keys() - known.keys():
        raise ValueError(f"options of task {name!r}: expected some of {', '.join(known)}, got {option!r}")
    return _TASKS[name](**options)
