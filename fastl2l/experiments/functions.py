"""Losses of many quadratic functions, each followed by itself: where a mean is that of a few that are hard."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from fastl2l import baselines
from fastl2l.baselines import Baseline, LineSearch
from fastl2l.evaluate import Curves, describe
from fastl2l.processes import current
from fastl2l.rules import Learned
from fastl2l.tasks.base import Problem, Task, problem_seed, value_and_grad
from fastl2l.trajectory import Trajectory


def curves(
    task: Task, optimizers: Mapping[str, Learned | Baseline], *, steps: int, problems: int, seed: int = 1
) -> Curves:
    """As `fastl2l.evaluate`, with a run for each function of the task's problems, which are stepped side by side.

    Args:
        task: whose problems know the losses of their functions (`Problem.losses`).
        optimizers: rules, and baselines with their rates.
        steps: of each.
        problems: how many; in a process group they are dealt out.
        seed: of the problems, which are those of `evaluate`.
    """
    processes, losses = current(), {}
    seeds = [problem_seed(seed, "test", number) for number in processes.share(problems)]
    for name, optimizer in optimizers.items():
        losses[name] = processes.rows(lambda optimizer=optimizer: _all(task, optimizer, steps, seeds))  # type: ignore[misc]
    runs = len(next(iter(losses.values())))
    return Curves(losses, describe(task, optimizers, steps=steps, runs=runs, seed=seed, backend="auto"))


def _all(task: Task, optimizer: Learned | Baseline, steps: int, seeds: Sequence[int]) -> Tensor:
    found = [_follow(task.sample(seed), optimizer, steps) for seed in seeds]
    return torch.cat(found) if found else torch.empty(0, steps + 1, dtype=torch.float64)


def _follow(problem: Problem, optimizer: Learned | Baseline, steps: int) -> Tensor:
    """The loss of each function at steps 0 to `steps`, float64 [functions, steps + 1]; inf from where it diverged."""
    if isinstance(optimizer, LineSearch):
        alone = [problem.alone(number) for number in range(problem.functions)]
        return torch.stack([baselines.descend(one, optimizer.build, steps) for one in alone])
    by_step = (
        _baseline(problem, optimizer, steps) if isinstance(optimizer, Baseline) else _rule(problem, optimizer, steps)
    )
    return baselines.curve(by_step).T.contiguous()


def _rule(problem: Problem, rule: Learned, steps: int) -> list[Tensor]:
    trajectory = Trajectory(problem, rule)
    losses = [_losses(problem, trajectory.theta, 0)]
    for step in range(1, steps + 1):
        trajectory.advance()
        losses.append(_losses(problem, trajectory.theta, step))
    return losses


def _baseline(problem: Problem, baseline: Baseline, steps: int) -> list[Tensor]:
    """Of one that goes coordinate by coordinate."""
    theta = problem.theta0.clone()
    parts = baselines.leaves(problem, theta)
    optimizer, losses = baseline.build(parts), [_losses(problem, theta, 0)]
    for step in range(steps):
        baselines.give_gradient(parts, value_and_grad(problem, theta, step)[1])
        optimizer.step()
        losses.append(_losses(problem, theta, step + 1))
    return losses


@torch.no_grad()
def _losses(problem: Problem, theta: Tensor, step: int) -> Tensor:
    return problem.losses(theta, step)
