"""Networks of the kind that people bring, trained by rules and by tuned optimizers: the loss on the whole data set.

Whatever was computed is kept in FASTL2L_CACHE, run by run: a comparison that was killed goes on where it was, and one
with another rule runs nothing but that rule.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterable
from pathlib import Path

import torch

from fastl2l.baselines import Baseline
from fastl2l.evaluate import builder, describe_optimizer
from fastl2l.files import FileError, cache_file, cached, plain, read_record, write_record
from fastl2l.rules import Rule
from fastl2l.tasks.base import Problem, Task, problem_seed, value_and_grad

FORMAT = 1
"""Of the kept losses. A new number where the same key would no longer mean the same losses."""
HORIZONS = (100, 1000, 10_000)
_LOWEST, _HIGHEST = -10, 4
"""Decades that learning rates are looked for in."""


# One run


def whole_losses(
    task: Task, optimizer: Rule | Baseline, steps: int, problems: Iterable[int], purpose: str = "test"
) -> list[float]:
    """Loss on all examples after `steps` steps on the problems of these numbers; inf where a run diverges."""
    return [_kept(task, optimizer, steps, problem_seed(1, purpose, number)) for number in problems]


def _kept(task: Task, optimizer: Rule | Baseline, steps: int, seed: int) -> float:
    """From the cache or into it, as are the losses at the horizons that the run passes."""
    request = {
        "format": FORMAT,
        "task": task.spec(),
        "optimizer": describe_optimizer(optimizer),
        "seed": seed,
    }

    def path(steps: int) -> Path:
        return cache_file("own-networks", plain(request | {"steps": steps}), ".json")

    def read(path: Path) -> float:
        record = read_record(path, FORMAT)
        if record != plain(request | {"steps": steps, "loss": record.get("loss")}):
            raise FileError(f"{path}: is the answer to another request")
        return float(record["loss"])

    def write(path: Path, loss: float, steps: int = steps) -> None:
        write_record(path, request | {"steps": steps, "loss": loss if math.isfinite(loss) else str(loss)})

    def run() -> float:
        passed = [horizon for horizon in HORIZONS if horizon < steps]
        *losses, last = descend(task.sample(seed), builder("optimizer", optimizer), [*passed, steps])
        for horizon, loss in zip(passed, losses, strict=True):
            with contextlib.suppress(OSError):
                write(path(horizon), loss, horizon)
        return last

    return cached(path(steps), read, run, write)


def descend(
    problem: Problem, build: Callable[[list[torch.Tensor]], torch.optim.Optimizer], at: list[int]
) -> list[float]:
    """Loss on all examples after these numbers of steps, which rise; inf from a loss on that is not finite."""
    theta = problem.theta0.clone().requires_grad_()
    optimizer = build([theta])
    losses: list[float] = []
    for step in range(at[-1]):
        loss, theta.grad = value_and_grad(problem, theta, step)
        if not loss.isfinite():
            break
        optimizer.step()
        if step + 1 == at[len(losses)]:
            loss = problem.whole_loss(theta.detach()).item() / problem.functions
            if not math.isfinite(loss):
                break
            losses.append(loss)
    return losses + [math.inf] * (len(at) - len(losses))


# Tuning


def tuned(
    task: Task, baseline: Baseline, steps: int, rates: Iterable[int], runs: int, *, refined: bool = True
) -> tuple[Baseline, dict[float, float]]:
    """`baseline` with the rate that ends lowest on fresh problems, and the mean loss of all rates tried.

    Args:
        task, steps: what is trained, and for how long.
        baseline: its own rate does not matter.
        rates: to begin with, as fourth parts of decades: number n is 10^(n/4). While the best is at an end, the search
            goes on there by half a decade.
        runs: number of problems.
        refined: whether the two between the best and its neighbours are tried as well.
    """
    finals: dict[int, float] = {}

    def attempt(number: int) -> None:
        losses = whole_losses(task, baseline.with_lr(_rate(number)), steps, range(runs), "tune")
        finals[number] = sum(losses) / runs

    def best() -> int:
        return min(finals, key=lambda number: (finals[number], number))

    for number in rates:
        attempt(number)
    while best() == min(finals) and best() > 4 * _LOWEST:
        attempt(best() - 2)
    while best() == max(finals) and best() < 4 * _HIGHEST:
        attempt(best() + 2)
    if refined:
        centre = best()
        attempt(centre - 1)
        attempt(centre + 1)
    if finals[best()] == math.inf:
        raise ValueError(f"task {task.name!r}: {baseline.name} diverges at every learning rate")
    return baseline.with_lr(_rate(best())), {_rate(number): final for number, final in sorted(finals.items())}


def _rate(number: int) -> float:
    return float(f"{10 ** (number / 4):.4g}")
