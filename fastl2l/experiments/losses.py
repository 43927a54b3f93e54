"""Losses of optimizers on test problems, kept as soon as a few problems are done.

What was computed is never computed again: a run that was killed goes on where it was, an experiment with fewer problems
uses those of a longer one, and a figure is redrawn in seconds.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastl2l import baselines
from fastl2l.baselines import Baseline
from fastl2l.evaluate import Curves, describe, describe_optimizer, follow, kernels
from fastl2l.files import FileError, cache_file, cached, open_tensors, parse_json, plain, shown, write_tensors
from fastl2l.processes import current
from fastl2l.rules import Learned
from fastl2l.tasks import Task

FORMAT = 1
"""Of the kept losses. A new number where the same key would no longer mean the same losses."""


def curves(
    task: Task,
    optimizers: Mapping[str, Learned | Baseline],
    *,
    steps: int,
    runs: int,
    tuning_runs: int,
    tuning_steps: int | None = None,
    piece: int = 10,
    last: int = 1,
    seed: int = 1,
    note: Callable[[str], None] = lambda message: None,
    advance: Callable[[str], None] = lambda message: None,
) -> Curves:
    """As `fastl2l.evaluate`, of rules and baselines, and with all losses kept in FASTL2L_CACHE.

    Args:
        task, optimizers, steps, seed: as for `evaluate`.
        runs: number of problems, a multiple of `piece`.
        tuning_runs: problems that learning rates are tuned on.
        tuning_steps: how many steps they are tuned for at most; by default all.
        piece: how many problems are kept together: what is lost when a run is killed.
        last: how many losses, the last ones of a run, are averaged to its final loss; in tuning a like share of them.
        note: called with what is being done.
        advance: called after every `piece` of an optimizer.
    """
    if runs % piece:
        raise ValueError(f"runs: expected a multiple of {piece}, got {runs}")
    for_steps = min(steps, tuning_steps or steps)
    for_last = max(1, last * for_steps // steps)
    tuned: dict[str, Any] = {}
    losses, processes = {}, current()
    processes.check_same(
        lambda: (
            describe(task, optimizers, steps=steps, runs=runs, seed=seed, backend="auto")
            | kernels("auto")
            | {"piece": piece, "tuning": [tuning_runs, for_steps, for_last]}
        )
    )

    def mine(optimizer: Learned | Baseline, name: str) -> Tensor:
        """Of the pieces that are this process's."""
        parts = [torch.empty(0, steps + 1, dtype=torch.float64)]
        for number in processes.share(runs // piece):
            numbers = range(number * piece, (number + 1) * piece)
            request = {"task": task.spec(), "optimizer": describe_optimizer(optimizer), "steps": steps, "seed": seed}
            request |= {"first": numbers.start, "problems": piece}
            follow_them = partial(follow, task, optimizer, steps, numbers, seed=seed)
            parts.append(kept(request, (piece, steps + 1), follow_them))
            advance(f"{task.name}: {name}")
        return torch.cat(parts)

    for name, optimizer in optimizers.items():
        if isinstance(optimizer, Baseline) and optimizer.lr == "tune":

            def report(lr: float, loss: float, name: str = name) -> None:
                note(f"{task.name}: tuning {name}: {lr:.3g} ends at {loss:.3g}")

            lr = baselines.tune(task, optimizer, for_steps, runs=tuning_runs, last=for_last, report=report)
            optimizer = optimizer.with_lr(lr)
        tuned[name] = optimizer
        losses[name] = processes.rows(lambda optimizer=optimizer, name=name: mine(optimizer, name))  # type: ignore[misc]
        for _ in range(runs // piece - len(processes.share(runs // piece))):
            advance(f"{task.name}: {name}")  # those of others
    return Curves(losses, describe(task, tuned, steps=steps, runs=runs, seed=seed, backend="auto", last=last))


def kept(request: dict[str, Any], shape: tuple[int, int], run: Callable[[], Tensor]) -> Tensor:
    """Losses, float64 [runs, steps + 1] of this shape, from the cache, or from `run` and into it.

    A request is all that decides them.
    """
    request = plain({"format": FORMAT, **request})
    return cached(
        cache_file("losses", request, ".safetensors"),
        lambda path: _read(path, request, shape),
        run,
        lambda path, losses: write_tensors(path, {"losses": losses}, {"request": json.dumps(request)}),
    )


def _read(path: Path, request: dict[str, Any], shape: tuple[int, int]) -> Tensor:
    with open_tensors(path) as stored:
        if parse_json(stored.metadata.get("request", ""), f"{path}: its request") != request:
            raise FileError(f"{path}: is the answer to another request")
        if stored.shapes != {"losses": shape} or stored.dtypes != {"F64"}:
            raise FileError(f"{path}: expected float64 {shape}, got {shown(stored.shapes)}")
        losses = stored.load()["losses"]
    if losses.isnan().any():  # what diverged is inf
        raise FileError(f"{path}: expected losses, got NaN")
    return losses
