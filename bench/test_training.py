"""A whole trajectory of meta-training: MNIST, 100 steps, five windows, each with a step of Adam on the rule."""

from __future__ import annotations

from typing import Any

import torch

from fastl2l import LSTMRule, Trajectory, tasks


def test_mnist_trajectory(benchmark: Any) -> None:
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
