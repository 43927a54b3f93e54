"""Losses on a whole data set, kept run by run in FASTL2L_CACHE, and learning rates by them.

What was computed is never computed again: a comparison that was killed goes on where it was, and one with another rule
runs nothing but that rule.
"""

from __future__ import annotations

import contextlib
import itertools
import math
from collections.abc import Iterable

from fastl2l.baselines import Baseline
from fastl2l.evaluate import describe_optimizer
from fastl2l.experiments.kept_numbers import KeptNumbers
from fastl2l.experiments.ways import way
from fastl2l.heap import tidily
from fastl2l.processes import current
from fastl2l.rules import Rule
from fastl2l.tasks.base import Problem, Task, problem_seed

LOSSES = KeptNumbers("own-networks", "loss", format=1, fits=lambda loss: True)
HORIZONS = (100, 1000, 10_000)
"""Where a longer run leaves the loss that it has there."""
_LOWEST, _HIGHEST = -10, 4
"""Decades that learning rates are looked for in."""


# One run


def whole_losses(
    task: Task, optimizer: Rule | Baseline, steps: int, problems: Iterable[int], purpose: str = "test"
) -> list[float]:
    """Loss on all examples after `steps` steps on the problems of these numbers; inf where a run diverges."""
    processes, numbers = current(), list(problems)

    def mine() -> list[float]:
        share = processes.share(len(numbers))
        return [_kept(task, optimizer, steps, problem_seed(1, purpose, numbers[index])) for index in share]

    return [loss for losses in processes.everyone(mine) for loss in losses]


def _kept(task: Task, optimizer: Rule | Baseline, steps: int, seed: int) -> float:
    """From the cache or into it, as are the losses at the horizons that the run passes."""
    about = {"task": task.spec(), "optimizer": describe_optimizer(optimizer), "seed": seed}

    def run() -> float:
        passed = [horizon for horizon in HORIZONS if horizon < steps]
        *losses, last = descend(task.sample(seed), optimizer, [*passed, steps])
        for at, loss in zip(passed, losses, strict=True):
            with contextlib.suppress(OSError):
                LOSSES.keep(about | {"steps": at}, loss)
        return last

    return LOSSES.of(about | {"steps": steps}, run)


def descend(problem: Problem, optimizer: Rule | Baseline, at: list[int]) -> list[float]:
    """Loss on all examples after these numbers of steps, which rise; inf from a loss on that is not finite."""
    found: list[float] = []
    for step, theta in enumerate(tidily(itertools.islice(way(problem, optimizer), at[-1])), start=1):
        if step == at[len(found)]:
            found.append(problem.whole_loss(theta).item() / problem.functions)
            if not math.isfinite(found[-1]):
                found.pop()
                break
    return found + [math.inf] * (len(at) - len(found))


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
        losses = whole_losses(task, baseline.with_lr(rate(number)), steps, range(runs), "tune")
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
    return baseline.with_lr(rate(best())), {rate(number): final for number, final in sorted(finals.items())}


def rate(number: int) -> float:
    """Learning rate number n: 10^(n/4)."""
    return float(f"{10 ** (number / 4):.4g}")
