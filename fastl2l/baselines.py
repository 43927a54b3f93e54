"""Hand-made optimizers to compare with, at their best learning rates (Andrychowicz et al. 2016, section 3).

The optimizers are torch's own, all but the learning rate at torch's defaults. `tune` finds the rate that ends lowest on
fresh problems of the task, which are never those of a test.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from fastl2l.bfgs import BFGS as ScipyBFGS
from fastl2l.files import FileError, cache_file, cached, plain, read_record, shown, write_record
from fastl2l.heap import tidily
from fastl2l.processes import current
from fastl2l.tasks.base import (
    Problem,
    Task,
    check_start,
    evaluate_loss,
    integer,
    parts_of,
    problem_seed,
    value_and_grad,
)

FORMAT = 1
"""Of the cached learning rates. A new number where the same key would no longer mean the same search."""


@dataclass(frozen=True)
class Baseline:
    """A torch optimizer and its learning rate; "tune" leaves the rate to `tune`.

    Raises:
        TypeError, ValueError: lr is neither "tune" nor a finite number > 0.
    """

    lr: float | Literal["tune"] = "tune"
    name: ClassVar[str]
    optimizer: ClassVar[Callable[..., torch.optim.Optimizer]]
    options: ClassVar[dict[str, Any]] = {}

    def __post_init__(self) -> None:
        if self.lr == "tune":
            return
        if isinstance(self.lr, bool) or not isinstance(self.lr, (int, float)):
            raise TypeError(f'lr: expected "tune" or a number > 0, got {self.lr!r}')
        if not 0 < self.lr < math.inf:
            raise ValueError(f'lr: expected "tune" or a finite number > 0, got {self.lr}')

    def build(self, params: Iterable[Tensor]) -> torch.optim.Optimizer:
        """The optimizer for these parameters. Raises ValueError while the learning rate is still to be tuned."""
        if self.lr == "tune":
            raise ValueError(f'lr of {self.name}: expected a number, got "tune"; see fastl2l.baselines.tune')
        return self.optimizer(params, lr=self.lr, **self.options)

    def with_lr(self, lr: float) -> Baseline:
        """The same baseline with this learning rate."""
        return replace(self, lr=lr)


class SGD(Baseline):
    """Stochastic gradient descent."""

    name, optimizer = "sgd", torch.optim.SGD


class NAG(Baseline):
    """Nesterov's accelerated gradient: SGD with momentum 0.9."""

    name, optimizer = "nag", torch.optim.SGD
    options: ClassVar[dict[str, Any]] = {"momentum": 0.9, "nesterov": True}


class Momentum(Baseline):
    """SGD with momentum 0.9."""

    name, optimizer = "momentum", torch.optim.SGD
    options: ClassVar[dict[str, Any]] = {"momentum": 0.9}


class RMSprop(Baseline):
    """RMSprop, with torch's defaults."""

    name, optimizer = "rmsprop", torch.optim.RMSprop


class Adam(Baseline):
    """Adam, with torch's defaults."""

    name, optimizer = "adam", torch.optim.Adam


class Adagrad(Baseline):
    """Adagrad, with torch's defaults."""

    name, optimizer = "adagrad", torch.optim.Adagrad


class Adadelta(Baseline):
    """Adadelta, with torch's defaults."""

    name, optimizer = "adadelta", torch.optim.Adadelta


class LineSearch(Baseline):
    """What needs several evaluations of the function for an iteration, and whose steps are counted by these.

    "tune" means 1: the line search finds the length of a step.
    """

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.lr == "tune":
            object.__setattr__(self, "lr", 1.0)


class LBFGS(LineSearch):
    """L-BFGS with a line search (strong Wolfe conditions), the habit of those who paint by optimization."""

    name, optimizer = "lbfgs", torch.optim.LBFGS
    # It stops when `evaluations` are spent, not by itself.
    options: ClassVar[dict[str, Any]] = {
        "line_search_fn": "strong_wolfe",
        "history_size": 20,
        "max_iter": 10**9,
        "max_eval": 10**9,
        "tolerance_grad": 0.0,
        "tolerance_change": 0.0,
    }


class BFGS(LineSearch):
    """BFGS with a line search, as scipy has it, for at most 10,000 coordinates."""

    name, optimizer = "bfgs", ScipyBFGS


ALL: dict[str, type[Baseline]] = {
    baseline.name: baseline for baseline in (SGD, RMSprop, NAG, Adam, Momentum, Adagrad, Adadelta, LBFGS, BFGS)
}
"""The baselines of the papers, and those that search along lines, by name."""
FIRST_ORDER = tuple(name for name, baseline in ALL.items() if not issubclass(baseline, LineSearch))
"""Names of the papers' own, which take a step for an evaluation."""
DEFAULT = ("sgd", "rmsprop", "nag", "adam")
"""Names of those that a rule is compared with where nothing else is said: the ones of both papers."""


def by_name(name: str, lr: float | Literal["tune"] = "tune") -> Baseline:
    """The baseline called `name`, one of `ALL`. Raises ValueError for another name."""
    if name not in ALL:
        raise ValueError(f"name: expected one of {', '.join(ALL)}, got {name!r}")
    return ALL[name](lr)


def descend(problem: Problem, build: Callable[[list[Tensor]], torch.optim.Optimizer], steps: int) -> Tensor:
    """Follow an optimizer on a problem: the losses f_t(theta_t) / functions at t = 0 .. steps, float64 [steps + 1].

    `build` gets a list of the problem's parts; of all of theta, if it has none. From the first non-finite loss on, all
    are inf. Of L-BFGS and BFGS, t counts evaluations of f and its gradient, line search included, and a loss is the
    lowest so far: what it would give if it were stopped there.
    """
    theta = problem.theta0.clone()
    parts = leaves(problem, theta)
    optimizer = build(parts)
    losses: list[Tensor] = []
    if isinstance(optimizer, (torch.optim.LBFGS, ScipyBFGS)):
        evaluations(problem, build, steps + 1, lambda loss, theta: losses.append(loss))
        return torch.stack(losses).cpu().double().nan_to_num(nan=math.inf, posinf=math.inf).cummin(0).values
    for step in tidily(range(steps)):
        loss, gradient = value_and_grad(problem, theta, step)
        give_gradient(parts, gradient)
        losses.append(loss / problem.functions)
        optimizer.step()
    check_in_place(parts, theta)
    losses.append(evaluate_loss(problem, theta, steps) / problem.functions)
    return curve(losses)


def curve(losses: Sequence[Tensor]) -> Tensor:
    """Losses by step, each 0-d or [functions], as float64 [n, ...] on the CPU; inf from one that is not finite on."""
    together = torch.stack(list(losses)).cpu().double()  # in one go: to look at each would make a GPU wait
    return together.masked_fill(together.isfinite().logical_not().cumsum(0) > 0, math.inf)


def evaluations(
    problem: Problem,
    build: Callable[[list[Tensor]], torch.optim.Optimizer],
    count: int,
    visit: Callable[[Tensor, Tensor], object],
    start: Tensor | None = None,
) -> None:
    """Follow an optimizer, of whatever kind, for `count` evaluations of f and its gradient.

    Args:
        problem: what is optimized.
        build: as for `descend`.
        count: how many; of most optimizers a step each, which gives count - 1 updates that are looked at.
        visit: called after each with f / functions, a 0-d Tensor, and theta [N], which is not to be kept.
        start: where to begin, in place of theta_0.
    """
    theta = (problem.theta0 if start is None else start).clone()
    parts = leaves(problem, theta)
    optimizer = build(parts)
    done = 0

    def closure() -> Tensor:
        nonlocal done
        if done == count:
            raise _Spent
        loss, gradient = value_and_grad(problem, theta, done)
        give_gradient(parts, gradient)
        done += 1
        visit(loss / problem.functions, theta)
        return loss

    with contextlib.suppress(_Spent):
        while True:
            optimizer.step(closure)  # type: ignore[arg-type]


class _Spent(Exception):
    """There are no evaluations left."""


def leaves(problem: Problem, theta: Tensor) -> list[Tensor]:
    """The problem's parts as parameters for a torch optimizer, in their order: they share memory with theta [N]."""
    return [part.requires_grad_() for part in theta.detach().split(list(parts_of(problem).values()))]


def check_in_place(parts: Sequence[Tensor], theta: Tensor) -> None:
    """Raise a TypeError unless `leaves` are in theta's memory still; where they were replaced, theta has not moved."""
    if parts[0].data_ptr() != theta.data_ptr():
        raise TypeError(
            "optimizer: expected one that changes parameters in place (param.add_(...)), got one that gives them other "
            "data (param.data = ...)"
        )


def give_gradient(parts: Sequence[Tensor], gradient: Tensor) -> None:
    """Let `gradient` [N] be that of `leaves`."""
    for part, found in zip(parts, gradient.split([part.numel() for part in parts]), strict=True):
        part.grad = found


# Tuning


def tune(
    task: Task,
    baseline: Baseline,
    steps: int,
    *,
    runs: int = 20,
    seed: int = 0,
    last: int = 1,
    cache: bool = True,
    report: Callable[[float, float], None] | None = None,
) -> float:
    """The learning rate with which `baseline` has the lowest mean loss after `steps` steps on `runs` fresh problems.

    A minibatch's last loss is a noisy judge: with few problems, let the mean over the `last` losses decide.

    Rates from 1e-4 to 1e2, three a decade, and on beyond either end while the best is there; then twice the two between
    the best and its neighbours, down to factors of 10^(1/12). Every rate meets the same problems and minibatches.
    Divergence counts as inf, and no rate is tried above one that ends far above where it started.

    The result is kept in FASTL2L_CACHE (~/.cache/fastl2l), with all rates tried and their losses, under a hash of
    everything it depends on. A file that is damaged is warned of and written anew.

    Args:
        task: what to tune on.
        baseline: the optimizer; its own learning rate does not matter.
        steps: length of the trajectories.
        runs: number of problems.
        seed: problems are number 0 .. runs - 1 of purpose "tune" of this seed.
        last: how many losses, the last ones of a trajectory, count; at most `steps`.
        cache: whether to use and write the file.
        report: called with each learning rate tried and its loss.

    Raises:
        TypeError, ValueError: an argument is not as above, or no learning rate gives a finite loss.
    """
    processes = current()
    request = processes.everyone(lambda: _request(task, baseline, steps, runs, seed, last))[processes.rank]

    def search() -> dict[str, Any]:
        check_start(task.sample(problem_seed(seed, "tune", 0)))
        tried = _search(try_rate)
        best = min(tried, key=lambda lr: tried[lr])
        if tried[best] == math.inf:
            rates = f"every learning rate, even {min(tried):.0e}"
            raise ValueError(f"task {task.name!r}: {baseline.name} diverges at {rates}")
        record = [{"lr": lr, "loss": loss if loss < math.inf else "inf"} for lr, loss in sorted(tried.items())]
        return request | {"lr": best, "tried": record}

    def try_rate(lr: float) -> tuple[float, float]:
        start, final = _mean_losses(task, baseline.with_lr(lr), steps, runs, seed, last)
        if report is not None:
            report(lr, final)
        return start, final

    # In a process group the first process alone reads and writes, and its word is everybody's.
    path = cache_file("tuning", request, ".json")
    processes.check_same(lambda: {"tune": request, "cache": cache})

    def read(path: Path) -> dict[str, Any]:
        return processes.first(lambda: _read(path, request))

    def write(path: Path, found: dict[str, Any]) -> object:
        return processes.first(lambda: write_record(path, found))

    answer = cached(path, read, search, write) if cache else search()
    lr: float = answer["lr"]
    return lr


def _request(task: Task, baseline: Baseline, steps: int, runs: int, seed: int, last: int) -> dict[str, Any]:
    """What is tuned, as files tell it."""
    if not isinstance(task, Task):
        raise TypeError(f"task: expected a fastl2l Task, got {type(task).__name__}")
    if not isinstance(baseline, Baseline):
        raise TypeError(f"baseline: expected a Baseline such as Adam(), got {baseline!r}")
    integer("steps", steps)
    integer("runs", runs)
    integer("seed", seed, least=0)
    if integer("last", last) > steps:
        raise ValueError(f"last: expected at most the {steps} steps, got {last}")
    found: dict[str, Any] = plain(
        {
            "format": FORMAT,
            "task": task.spec(),
            "baseline": {"name": baseline.name, **baseline.options},
            "steps": steps,
            "runs": runs,
            "seed": seed,
            **({"last": last} if last > 1 else {}),  # rates that were kept before there was a choice are found
        }
    )
    return found


def _mean_losses(task: Task, baseline: Baseline, steps: int, runs: int, seed: int, last: int) -> tuple[float, float]:
    """Mean first and `last` losses over the tuning problems; (first, inf) as soon as one of them diverges."""
    processes = current()
    total = torch.zeros(2, dtype=torch.float64, device="cpu")
    pairs = processes.rows(lambda: _ends(task, baseline, steps, processes.share(runs), seed, last))
    for done, pair in enumerate(pairs, 1):
        total += pair
        if total[1] == math.inf:
            return total[0].item() / done, math.inf
    start, final = (total / runs).tolist()
    return start, final


def _ends(task: Task, baseline: Baseline, steps: int, numbers: range, seed: int, last: int) -> Tensor:
    """First and mean of the `last` losses, float64 [problems, 2], up to the first of them that diverges."""
    pairs = []
    for number in numbers:
        losses = descend(task.sample(problem_seed(seed, "tune", number)), baseline.build, steps)
        pairs.append(torch.stack([losses[0], losses[-last:].mean()]))
        if pairs[-1][1] == math.inf:
            break
    return torch.stack(pairs) if pairs else torch.empty(0, 2, dtype=torch.float64, device="cpu")


def _search(try_rate: Callable[[float], tuple[float, float]]) -> dict[float, float]:
    """Final loss by learning rate, for the rates that `tune` speaks of. They are numbered: rate n is 10^(n/12)."""
    finals: dict[int, float] = {}

    def attempt(number: int) -> bool:
        start, finals[number] = try_rate(_rate(number))
        return finals[number] - start <= abs(start)  # False: hopeless, as higher rates will be

    def best() -> int:
        return min(finals, key=lambda number: (finals[number], number))

    hopeful = all(attempt(number) for number in range(-48, 25, 4))
    while best() == min(finals) and best() > -120:
        attempt(best() - 4)
    while hopeful and best() == max(finals) and best() < 120:
        hopeful = attempt(best() + 4)
    for distance in (2, 1):
        centre = best()
        attempt(centre - distance)
        attempt(centre + distance)
    return {_rate(number): final for number, final in finals.items()}


def _rate(number: int) -> float:
    return float(f"{10 ** (number / 12):.4g}")


def _read(path: Path, request: dict[str, Any]) -> dict[str, Any]:
    """What the cache holds for this request."""
    record = read_record(path, FORMAT)
    lr = record.get("lr")
    if record != request | {"lr": lr, "tried": record.get("tried")}:
        raise FileError(f"{path}: is the answer to another request")
    if not isinstance(lr, float) or not 0 < lr < math.inf:
        raise FileError(f"{path}: expected a learning rate, got {shown(lr)}")
    return record
