"""What a problem and a task are, and how their random numbers are drawn.

A task is a distribution of problems; a problem is a sequence of functions f_0, f_1, ... of one flat vector theta, with
a start theta_0. Neither knows of any optimizer.

Random numbers come from Philox, a counter-based generator of 64-bit numbers, keyed by a 128-bit BLAKE2b hash of the
problem's seed and of what is drawn. So everything about a problem is a function of its seed, on every machine and
device; problems of different seeds are independent, however alike the seeds; and the minibatch of step t can be drawn
without those of the steps before.
"""

from __future__ import annotations

import dataclasses
import hashlib
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Generic, TypeVar, cast

import numpy as np
import torch
from torch import Tensor

Draw = TypeVar("Draw")
"""What a step draws: a Tensor or several."""


SECOND_MINIBATCHES = 2**40
"""From this step of a problem on are minibatches that no optimizer sees: at t steps, that of this step + t."""


class Problem(ABC):
    """One sequence of functions f_t of a flat vector theta, with its start.

    Attributes:
        task: name of the task it was sampled from, for messages.
        theta0: the start, [N]: floating, one-dimensional, contiguous, without requires_grad. Not to be written to.
        functions: how many independent functions lie side by side in theta, N / functions coordinates each.
        parts: how many coordinates of theta belong to each part, by name and in their order, where parts are to have
            update rules of their own. Together they are all of theta, and functions lie side by side in each of them.
            None or empty: all is one part.
        units: [N], the units of the parameters that theta is made of, in which relative rules take their steps
            (`fastl2l.units`). None: all are 1.
        uneven: whether functions have different numbers of coordinates, as problems of different sizes side by side.
    """

    task: str
    theta0: Tensor
    functions: int = 1
    parts: Mapping[str, int] | None = None
    units: Tensor | None = None
    uneven: bool = False

    @abstractmethod
    def loss(self, theta: Tensor, step: int) -> Tensor:
        """The sum over `functions` of f_step(theta): a scalar, twice differentiable in theta [N].

        It depends on the problem, theta and step alone: minibatches are a function of (seed of the problem, step), so
        that every optimizer sees the same ones and a resumed run repeats them to the bit. The gradient of the sum holds
        each function's own gradient. The loss one reports is the mean, `loss / functions`.

        Steps may be anything from 0 on: some objectives of meta-training ask for minibatches of far ones, which no
        optimizer sees (`SECOND_MINIBATCHES`).
        """

    def whole_loss(self, theta: Tensor) -> Tensor:
        """What `loss` is an estimate of: the sum over `functions` of the mean over all examples, at theta [N].

        A 0-d float64 Tensor without gradient, computed in bounded memory.

        Raises:
            NotImplementedError: the problem has no finite set of examples. The message names the task.
        """
        raise NotImplementedError(
            f"task {self.task!r}: whole_loss: expected a problem with a set of examples, got a {type(self).__name__}"
        )

    def losses(self, theta: Tensor, step: int) -> Tensor:
        """f_step(theta) of each function, [functions], as differentiable as `loss`.

        Raises:
            NotImplementedError: there are several, and the problem knows their sum alone. The message names the task.
        """
        if self.functions == 1:
            return self.loss(theta, step).reshape(1)
        raise NotImplementedError(f"task {self.task!r}: losses: expected one that tells its functions apart")

    def alone(self, number: int) -> Problem:
        """The problem of one of its functions by itself. Raises as `losses` does."""
        raise NotImplementedError(f"task {self.task!r}: alone: expected one that tells its functions apart")


class PureProblem(Problem):
    """A problem whose loss is `function(theta, *constants, *inputs(step, device))`.

    This says what differs between the problems of a task, so that many of them are evaluated at once (`batch.py`), and
    a new problem or step is a matter of copying numbers into place (CUDA graphs).

    Attributes:
        function: a scalar, from Tensors alone, by operations that `torch.func.vmap` takes. Problems whose `function`
            compares equal and whose Tensors have the same shapes differ in nothing but the numbers in these; what is
            large and the same for all, such as data, belongs to the function.
        constants: Tensors of this problem alone, on theta's device. Not to be written to.
    """

    function: Callable[..., Tensor]
    constants: tuple[Tensor, ...] = ()

    def inputs(self, step: int, device: torch.device) -> tuple[Tensor, ...]:
        """What is drawn for a step, on `device`: small Tensors such as the rows of a minibatch. Nothing by default."""
        return ()

    def loss(self, theta: Tensor, step: int) -> Tensor:
        return self.function(theta, *self.constants, *self.inputs(step, theta.device))


def parts_of(problem: Problem) -> dict[str, int]:
    """The parts of `problem`; one that is called "theta" where it names none.

    Raises:
        TypeError, ValueError: `problem.parts` is not as `Problem` says. The message names the task.
    """
    coordinates, where = problem.theta0.numel(), f"task {problem.task!r}: parts"
    if problem.parts is not None and not isinstance(problem.parts, Mapping):
        raise TypeError(f"{where}: expected a dict of name: number of coordinates, got {_kind(problem.parts)}")
    parts = dict(problem.parts or {"theta": coordinates})
    for name, size in parts.items():
        if not isinstance(name, str) or not name:
            raise TypeError(f"{where}: expected non-empty strings as names, got {name!r}")
        parts[name] = integer(f"{where}[{name!r}]", size)
    if sum(parts.values()) != coordinates:
        raise ValueError(
            f"{where}: expected sizes that add up to the {coordinates} coordinates of theta, got {parts}, "
            f"which add up to {sum(parts.values())}"
        )
    return parts


def is_pure(problem: Problem) -> bool:
    """Whether `problem` is a `PureProblem` that says all of itself, not one with a loss of its own."""
    return getattr(problem.loss, "__func__", None) is PureProblem.loss


class Task(ABC):
    """A distribution of problems. Most tasks are frozen dataclasses, whose fields describe the distribution."""

    name: str

    @abstractmethod
    def sample(self, seed: int) -> Problem:
        """The problem of this seed, always the same. Problems of different seeds are independent, however close."""

    def validation(self) -> Task:
        """The task whose problems validate what is trained on this one: itself, unless some data are kept for that."""
        return self

    def spec(self) -> dict[str, Any]:
        """Complete description of the distribution, as JSON would hold it: cache key, and part of every result file.

        The fields of a dataclass, without the device, which changes no problem; of a field that has a spec() of its
        own, that. Other tasks must override this.

        Raises:
            TypeError: a field holds something that JSON has no word for.
        """
        names = [field.name for field in dataclasses.fields(cast(Any, self)) if field.name != "device"]
        return {"name": self.name} | {
            name: as_json(f"task {self.name!r}: {name}", getattr(self, name)) for name in names
        }


def as_json(name: str, value: Any) -> Any:
    """`value` as JSON would hold it. Raises TypeError, which speaks of `name`, if there is no word for it."""
    if isinstance(value, torch.dtype):
        return str(value).removeprefix("torch.")
    if isinstance(value, np.generic):
        return as_json(name, value.item())
    if isinstance(value, (tuple, list)):
        return [as_json(name, item) for item in value]
    if isinstance(value, dict) and all(isinstance(key, str) for key in value):
        return {key: as_json(name, item) for key, item in value.items()}
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if callable(getattr(value, "spec", None)):
        return as_json(name, value.spec())
    raise TypeError(f"{name}: expected what JSON has a word for, got {_kind(value)}; override spec() to describe it")


# Seeds and streams of random numbers


def problem_seed(seed: int, purpose: str, index: int) -> int:
    """Seed of problem number `index` for `purpose` ("train", "validation", "test", "tune", ...) of a run seeded `seed`.

    63 bits of BLAKE2b over the three (so that it fits a signed 64-bit integer): problems of one purpose never come back
    under another. The trainer, the evaluation and the tuning of baselines all number their problems through it.
    """
    return int.from_bytes(_digest(f"{seed:d}/{purpose}/{index:d}", 8), "little") >> 1


def generator(seed: int, stream: str, block: int = 0) -> np.random.Generator:
    """The random numbers that a problem of this seed uses for `stream`; `block` jumps to a far part of the stream."""
    key = int.from_bytes(_digest(f"{seed:d}/{stream}", 16), "little")
    return np.random.Generator(np.random.Philox(key=key, counter=[0, 0, 0, block]))


def fingerprint(*tensors: Tensor) -> str:
    """Hash of the tensors' dtypes, shapes and bytes, to tell data or weights apart by."""
    digest = hashlib.blake2b(digest_size=16)
    for tensor in tensors:
        digest.update(f"{tensor.dtype} {list(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _digest(text: str, size: int) -> bytes:
    return hashlib.blake2b(text.encode(), digest_size=size).digest()


def normal(
    random: np.random.Generator, shape: Sequence[int], std: float, dtype: torch.dtype, device: torch.device | str
) -> Tensor:
    """Iid N(0, std^2) numbers. Drawn in float64 on the CPU, so that every dtype and device gets the same, rounded."""
    return torch.from_numpy(random.standard_normal(shape) * std).to(device, dtype)


class Drawn(ABC, Generic[Draw]):
    """What a problem draws for each step, in blocks of `steps` steps.

    So a step costs about a microsecond, and one copy to the device is enough for many.
    """

    def __init__(self, steps: int) -> None:
        self._steps = steps
        # The last two blocks: a trajectory may go along two sequences of steps, one far from the other.
        self._held: dict[tuple[int, torch.device], Sequence[Draw]] = {}

    @abstractmethod
    def draw(self, block: int, device: torch.device) -> Sequence[Draw]:
        """What each step of this block gets, on `device`: a function of the block alone."""

    def at(self, step: int, device: torch.device) -> Draw:
        """What a step gets, on `device`."""
        block, place = divmod(step, self._steps)
        drawn = self._held.get((block, device))
        if drawn is None:
            drawn = self.draw(block, device)
            if len(self._held) == 2:
                del self._held[next(iter(self._held))]
            self._held[block, device] = drawn
        return drawn[place]


class Minibatches(Drawn[Tensor]):
    """Which rows of a data set each step of a problem sees: iid uniform, with replacement.

    `minibatches.at(step, device)` is an int64 Tensor [batch_size] of row numbers below `rows`.
    """

    def __init__(self, seed: int, rows: int, batch_size: int) -> None:
        super().__init__(max(1, min(64, 65536 // batch_size)))
        self._seed, self._rows, self._batch_size = seed, rows, batch_size

    def draw(self, block: int, device: torch.device) -> Sequence[Tensor]:
        random = generator(self._seed, "minibatches", block)
        numbers = random.integers(self._rows, size=(self._steps, self._batch_size))
        return torch.from_numpy(numbers).to(device).unbind()

    def whole(self, device: torch.device) -> Iterator[Tensor]:
        """All rows, each once, in as few minibatches of at most `batch_size` as there can be, as even as can be.

        They are in one random order, the same for every seed: a minibatch is as mixed as those of the steps.
        """
        order = torch.from_numpy(generator(0, "whole").permutation(self._rows)).to(device)
        yield from order.tensor_split(math.ceil(self._rows / self._batch_size))


class DataProblem(PureProblem):
    """A pure problem that draws nothing for a step but a minibatch: `function(theta, *constants, rows)` is a mean."""

    def __init__(self, minibatches: Minibatches) -> None:
        self._minibatches = minibatches

    def inputs(self, step: int, device: torch.device) -> tuple[Tensor, ...]:
        return (self._minibatches.at(step, device),)

    @torch.no_grad()
    def whole_loss(self, theta: Tensor) -> Tensor:
        """As `Problem` says, in minibatches of the task's size: batch norm normalises by those, as in a step."""
        total = torch.zeros((), dtype=torch.float64, device=theta.device)
        rows = 0
        for minibatch in self._minibatches.whole(theta.device):
            total += len(minibatch) * self.function(theta, *self.constants, minibatch)
            rows += len(minibatch)
        return total / rows


def take(data: Tensor, rows: Tensor) -> Tensor:
    """`data[rows]` of contiguous data [n, ...]; an embedding, since vmap makes other ways several times slower."""
    flat = data.view(len(data), math.prod(data.shape[1:]))
    return torch.embedding(flat, rows).view(len(rows), *data.shape[1:])


# Evaluating a problem


def value_and_grad(problem: Problem, theta: Tensor, step: int) -> tuple[Tensor, Tensor]:
    """Loss and gradient of `problem` at theta [N]: a 0-d Tensor, the sum over its functions, and a Tensor [N].

    Both are detached, and not looked at: non-finite values pass through.

    Raises:
        TypeError: the loss is not a Tensor.
        ValueError: the loss is not a scalar, or does not depend on theta. Both name the task.
    """
    with torch.enable_grad():
        leaf = theta.detach().requires_grad_()
        loss = problem.loss(leaf, step)
        if not (isinstance(loss, Tensor) and loss.ndim == 0 and loss.requires_grad):
            raise _bad_loss(problem, loss)
        return loss.detach(), torch.autograd.grad(loss, leaf)[0]


def evaluate_loss(problem: Problem, theta: Tensor, step: int) -> Tensor:
    """Loss of `problem` at theta [N] without gradient: a 0-d Tensor, the sum over its functions. Raises as above."""
    with torch.no_grad():
        loss = problem.loss(theta, step)
    if not (isinstance(loss, Tensor) and loss.ndim == 0):
        raise _bad_loss(problem, loss)
    return loss


def _bad_loss(problem: Problem, loss: object) -> Exception:
    expected = f"task {problem.task!r}: loss(theta, step): expected a scalar Tensor that depends on theta, got "
    if not isinstance(loss, Tensor):
        return TypeError(expected + f"a {type(loss).__name__}")
    if loss.ndim:
        return ValueError(expected + f"a Tensor of shape {list(loss.shape)}; take its mean or sum")
    return ValueError(expected + "one that autograd cannot follow back to theta")


def check_start(problem: Problem) -> None:
    """Check that `problem` keeps its contract where it starts.

    Raises:
        TypeError, ValueError: theta_0 or parts are not as `Problem` says, or the loss at theta_0 is no scalar or not
            finite. The message names the task.
    """
    theta0 = problem.theta0
    if not isinstance(theta0, Tensor) or not theta0.is_floating_point():
        raise TypeError(f"task {problem.task!r}: theta0: expected a floating Tensor, got {_kind(theta0)}")
    if theta0.ndim != 1 or theta0.numel() == 0 or not theta0.is_contiguous() or theta0.requires_grad:
        raise ValueError(
            f"task {problem.task!r}: theta0: expected a contiguous, non-empty Tensor [N] that does not require grad, "
            f"got shape {list(theta0.shape)}, strides {list(theta0.stride())}, requires_grad={theta0.requires_grad}"
        )
    parts_of(problem)
    loss, _ = value_and_grad(problem, theta0, 0)
    if not torch.isfinite(loss):
        raise ValueError(f"task {problem.task!r}: loss at theta0: expected a finite number, got {loss.item()}")


def _kind(value: object) -> str:
    return f"a Tensor of {value.dtype}" if isinstance(value, Tensor) else f"a {type(value).__name__}"


# Checking arguments


def integer(name: str, value: object, least: int = 1) -> int:
    """`value` as an int, or a clear error: TypeError if it is no integer, ValueError if it is below `least`."""
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)):
        raise TypeError(f"{name}: expected an integer >= {least}, got {value!r}")
    if value < least:
        raise ValueError(f"{name}: expected an integer >= {least}, got {value}")
    return int(value)


def number(name: str, value: object, expected: str, fits: Callable[[float], bool]) -> float:
    """`value` as a float, or a clear error: TypeError if it is no number, ValueError if it does not fit."""
    if isinstance(value, bool) or not isinstance(value, (int, float, np.number)):
        raise TypeError(f"{name}: expected a number {expected}, got {value!r}")
    if not fits(float(value)):
        raise ValueError(f"{name}: expected a number {expected}, got {value}")
    return float(value)


def refuse(name: str, data: Tensor, bad: Tensor, expected: str) -> None:
    """Raise a ValueError if some of `data` [rows, ...] is `bad`: it says where, and how many there are."""
    places = bad.nonzero()
    if len(places):
        found, row = data[tuple(places[0])].item(), places[0, 0].item()
        raise ValueError(
            f"{name}: expected {expected}, got {found} in row {row} and {len(places) - 1} more; "
            "fill them in or leave out such rows"
        )


def floating(name: str, value: object) -> torch.dtype:
    """`value` if it is a floating torch.dtype, or a TypeError."""
    if not (isinstance(value, torch.dtype) and value.is_floating_point):
        raise TypeError(f"{name}: expected a floating torch.dtype, got {value!r}")
    return value
