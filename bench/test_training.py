"""Meta-training: a whole trajectory on MNIST, and what it gains to take problems side by side."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from fastl2l import LSTMRule, Trajectory, tasks

PROBLEMS = 16
TASKS = {"quadratic": tasks.Quadratic, "digits": tasks.Digits, "mnist": tasks.MNIST}


def test_mnist_trajectory(benchmark: Any) -> None:
    """100 steps, five windows, each with a step of Adam on the rule."""
    benchmark.group = "MNIST, 100 steps with five meta-updates"
    benchmark.extra_info["who"] = "fastl2l"
    problem, rule = tasks.MNIST().sample(0), LSTMRule()
    adam = torch.optim.Adam(rule.weights(), lr=1e-4, fused=True)
    sizes = [weight.numel() for weight in rule.weights()]

    def run() -> None:
        trajectory = Trajectory(problem, rule)
        for _ in range(5):
            gradients = trajectory.window([1.0] * 20).gradients.split(sizes)
            for weight, gradient in zip(rule.weights(), gradients, strict=True):
                weight.grad = gradient.view_as(weight)
            adam.step()

    benchmark.pedantic(run, rounds=7, warmup_rounds=1)


@pytest.mark.parametrize("together", [1, 4, 16])
@pytest.mark.parametrize("task", TASKS)
def test_problems_side_by_side(benchmark: Any, task: str, together: int) -> None:
    """A window of 20 steps of 16 problems, so many at a time: what MetaTrainer's `batch` changes."""
    benchmark.group = f"{task}, a window of {PROBLEMS} problems"
    benchmark.extra_info["who"] = "fastl2l" if together == 1 else f"{together} at once"
    problems, rule = [TASKS[task]().sample(seed) for seed in range(PROBLEMS)], LSTMRule()
    batches = [tasks.batch(problems[first : first + together]) for first in range(0, PROBLEMS, together)]

    def run() -> None:
        for batch in batches:
            Trajectory(batch, rule).window([1.0] * 20)

    benchmark.pedantic(run, rounds=7, warmup_rounds=1)
