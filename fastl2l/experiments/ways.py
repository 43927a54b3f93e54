"""The way of a problem's theta under a rule or a baseline, step by step."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

from torch import Tensor

from fastl2l.baselines import Baseline, check_in_place, give_gradient, leaves
from fastl2l.evaluate import builder, wants_trajectory
from fastl2l.rules import Learned
from fastl2l.tasks.base import Problem, value_and_grad
from fastl2l.trajectory import Trajectory


def way(problem: Problem, optimizer: Learned | Baseline) -> Iterator[Tensor]:
    """Theta [N] after each step, for as long as losses are finite; written to by the next one."""
    return _by_rule(problem, optimizer) if wants_trajectory(optimizer) else _by_optimizer(problem, optimizer)


def _by_rule(problem: Problem, rule: Learned) -> Iterator[Tensor]:
    trajectory = Trajectory(problem, rule)
    while trajectory.loss.isfinite():
        trajectory.advance()
        yield trajectory.theta


def _by_optimizer(problem: Problem, optimizer: Learned | Baseline) -> Iterator[Tensor]:
    theta = problem.theta0.clone()
    parts = leaves(problem, theta)
    built = builder("optimizer", optimizer, parts=problem.parts)(parts)
    for step in itertools.count():
        loss, gradient = value_and_grad(problem, theta, step)
        if not loss.isfinite():
            return
        give_gradient(parts, gradient)
        built.step()
        check_in_place(parts, theta)
        yield theta
