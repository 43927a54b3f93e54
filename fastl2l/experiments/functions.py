"""Losses of many quadratic functions, each followed by itself: where a mean is that of a few that are hard."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from fastl2l import baselines
from fastl2l.baselines import Baseline, LineSearch
from fastl2l.evaluate import Curves, describe, describe_optimizer
from fastl2l.experiments import losses
from fastl2l.processes import current
from fastl2l.rules import Learned
from fastl2l.tasks.base import Problem, Task, problem_seed, value_and_grad
from fastl2l.trajectory import Trajectory


def curves(
    task: Task,
    optimizers: Mapping[str, Learned | Baseline],
    *,
    steps: int,
    problems: int,
    seed: int = 1,
    advance: Callable[[str], None] = lambda message: None,
) -> Curves:
    """As `fastl2l.evaluate`, with a run for each function of the task's problems, which are stepped side by side.

    All losses are kept in FASTL2L_CACHE, problem by problem.

    Args:
        task: whose problems know the losses of their functions (`Problem.losses`).
        optimizers: rules, and baselines with their rates.
        steps: of each.
        problems: how many; in a process group they are dealt out.
        seed: of the problems, which are those of `evaluate`.
        advance: called after every problem of an optimizer.
    """
    processes, found = current(), {}

    def mine(optimizer: Learned | Baseline, name: str) -> Tensor:
        parts = [torch.empty(0, steps + 1, dtype=torch.float64)]
        for number in processes.share(problems):
            parts.append(_kept(task, optimizer, steps, number, seed))
            advance(f"{task.name}: {name}")
        return torch.cat(parts)

    for name, optimizer in optimizers.items():
        found[name] = processes.rows(lambda optimizer=optimizer, name=name: mine(optimizer, name))  # type: ignore[misc]
        for _ in range(problems - len(processes.share(problems))):
            advance(f"{task.name}: {name}")  # those of others
    runs = len(next(iter(found.values())))
    return Curves(found, describe(task, optimizers, steps=steps, runs=runs, seed=seed, backend="auto"))


def _kept(task: Task, optimizer: Learned | Baseline, steps: int, number: int, seed: int) -> Tensor:
    """Of the functions of one problem, from the cache or into it."""
    problem = task.sample(problem_seed(seed, "test", number))
    request = {"task": task.spec(), "optimizer": describe_optimizer(optimizer), "steps": steps, "seed": seed}
    request |= {"problem": number, "functions": problem.functions}
    return losses.kept(request, (problem.functions, steps + 1), lambda: _follow(problem, optimizer, steps))


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
    found = [_losses(problem, trajectory.theta, 0)]
    for step in range(1, steps + 1):
        trajectory.advance()
        found.append(_losses(problem, trajectory.theta, step))
    return found


def _baseline(problem: Problem, baseline: Baseline, steps: int) -> list[Tensor]:
    """Of one that goes coordinate by coordinate."""
    theta = problem.theta0.clone()
    parts = baselines.leaves(problem, theta)
    optimizer, found = baseline.build(parts), [_losses(problem, theta, 0)]
    for step in range(steps):
        baselines.give_gradient(parts, value_and_grad(problem, theta, step)[1])
        optimizer.step()
        found.append(_losses(problem, theta, step + 1))
    return found


@torch.no_grad()
def _losses(problem: Problem, theta: Tensor, step: int) -> Tensor:
    return problem.losses(theta, step)
