"""Shares of images that trained networks classify rightly, kept run by run in FASTL2L_CACHE."""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Mapping

from fastl2l.baselines import Baseline
from fastl2l.evaluate import describe_optimizer
from fastl2l.experiments.kept_numbers import KeptNumbers
from fastl2l.experiments.ways import way
from fastl2l.heap import tidily
from fastl2l.processes import current
from fastl2l.rules import Learned
from fastl2l.tasks.base import problem_seed
from fastl2l.tasks.classification import Classification

SHARES = KeptNumbers("accuracies", "share", format=1, fits=lambda share: 0 <= share <= 1)


def accuracies(
    task: Classification, optimizers: Mapping[str, Learned | Baseline], *, steps: int, runs: int, seed: int = 1
) -> dict[str, list[float]]:
    """By optimizer, of each run the share of all images of the other split; 0 of a run that diverged.

    Args:
        task: whose split is what networks are trained on.
        optimizers: rules, and baselines with their rates.
        steps: of each run.
        runs: on the first test problems; in a process group they are dealt out.
        seed: of the problems, which are those of `evaluate`.
    """
    processes = current()
    seeds = [problem_seed(seed, "test", number) for number in range(runs)]

    def mine(optimizer: Learned | Baseline) -> list[float]:
        return [_kept(task, optimizer, steps, seeds[index]) for index in processes.share(runs)]

    found = {}
    for name, optimizer in optimizers.items():
        shares = processes.everyone(lambda optimizer=optimizer: mine(optimizer))  # type: ignore[misc]
        found[name] = list(itertools.chain.from_iterable(shares))
    return found


def _kept(task: Classification, optimizer: Learned | Baseline, steps: int, seed: int) -> float:
    """From the cache or into it."""
    request = {"task": task.spec(), "optimizer": describe_optimizer(optimizer), "steps": steps, "seed": seed}
    return SHARES.of(request, lambda: _share(task, optimizer, steps, seed))


def _share(task: Classification, optimizer: Learned | Baseline, steps: int, seed: int) -> float:
    problem = task.sample(seed)
    last = deque(enumerate(tidily(itertools.islice(way(problem, optimizer), steps)), start=1), maxlen=1)
    if not last or last[0][0] < steps or not last[0][1].isfinite().all():
        return 0.0
    return problem.accuracy(last[0][1], "train" if task.split == "test" else "test")
