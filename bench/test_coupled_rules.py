"""Step and meta-gradient of rules whose coordinates talk, beside the plain rule's and the same in eager PyTorch.

pytest bench/test_coupled_rules.py --benchmark-only
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from fastl2l import GACRule, LSTMRule, NTMRule, Rule, Trajectory, reference
from fastl2l.ops import coupled, memory
from fastl2l.ops.coordinates import Coordinates
from fastl2l.tasks import Problem

UNROLL = 20
SIZES = [1_000, 49_152]
RULES: dict[str, Callable[[], Rule]] = {
    "lstm": LSTMRule,
    "gac": lambda: GACRule(averages=5),
    "ntm-pairs": lambda: NTMRule("pairs", pairs=20),
}
"""The plain rule; five averaged units a layer; and a read head, three write heads and the pairs of 20 steps."""
OF_A_MATRIX = {"ntm-matrix": NTMRule}
SMALL = 1_000
"""Coordinates of a matrix."""


class Bowl(Problem):
    """A sum of squares: next to nothing beside the rule."""

    task = "bowl"

    def __init__(self, numel: int) -> None:
        self.theta0 = torch.randn(numel, generator=torch.Generator().manual_seed(0))

    def loss(self, theta: Tensor, step: int) -> Tensor:
        return 0.5 * theta.square().sum()


def _cases() -> list[Any]:
    cases = [(kind, numel) for numel in SIZES for kind in RULES]
    return cases + [(kind, SMALL) for kind in OF_A_MATRIX]


def _rule(kind: str) -> Rule:
    return (RULES | OF_A_MATRIX)[kind]()


def _note(benchmark: Any, kind: str, who: str, numel: int, steps: int) -> None:
    nanoseconds = benchmark.stats.stats.median / numel / steps * 1e9
    who = {("lstm", "fastl2l"): who}.get((kind, who), f"{kind}, {who}")  # the plain rule is what others are beside
    benchmark.extra_info.update(who=who, rule=kind, coordinates=numel, ns_per_coordinate_step=nanoseconds)


@pytest.mark.parametrize(("kind", "numel"), _cases())
def test_step(benchmark: Any, kind: str, numel: int) -> None:
    """One step of all coordinates of a trajectory."""
    benchmark.group = f"step of rules whose coordinates talk, N = {numel:,}"
    trajectory = Trajectory(Bowl(numel), _rule(kind))
    benchmark.pedantic(trajectory.advance, rounds=10, iterations=max(1, 10_000 // numel), warmup_rounds=2)
    _note(benchmark, kind, "fastl2l", numel, 1)


@pytest.mark.parametrize(("kind", "numel"), _cases())
def test_meta_gradient(benchmark: Any, kind: str, numel: int) -> None:
    """A window of 20 steps and its gradient with respect to the rule's weights."""
    benchmark.group = f"meta-gradient of rules whose coordinates talk, N = {numel:,}"
    trajectory = Trajectory(Bowl(numel), _rule(kind))
    benchmark.pedantic(lambda: trajectory.window([1.0] * UNROLL), rounds=3, iterations=1, warmup_rounds=1)
    _note(benchmark, kind, "fastl2l", numel, UNROLL)


@pytest.mark.parametrize("numel", SIZES)
def test_step_of_eager_pytorch(benchmark: Any, numel: int) -> None:
    """The same step of the rule with averages, in plain torch."""
    benchmark.group = f"step of rules whose coordinates talk, N = {numel:,}"
    rule, gradient, state = GACRule(averages=5), torch.randn(numel), torch.zeros(80, numel)
    run = torch.no_grad()(lambda: reference.coupled_step(gradient, state, rule.weights(), rule.config, 0.1))
    where = Coordinates((numel,))
    torch.testing.assert_close(run()[0], coupled.step(rule, gradient, coupled.begin(rule, where))[0].detach())
    benchmark.pedantic(run, rounds=5, iterations=max(1, 10_000 // numel), warmup_rounds=1)
    _note(benchmark, "gac", "eager", numel, 1)


@pytest.mark.parametrize("numel", SIZES)
def test_meta_gradient_of_eager_pytorch(benchmark: Any, numel: int) -> None:
    """The same window of the rule with averages, in plain torch and by its autograd."""
    benchmark.group = f"meta-gradient of rules whose coordinates talk, N = {numel:,}"
    rule, gradients, adjoints = GACRule(averages=5), torch.randn(UNROLL, numel), torch.randn(UNROLL, numel)

    def run() -> tuple[Tensor, ...]:
        state, updates = torch.zeros(80, numel), []
        for gradient in gradients:
            update, state = reference.coupled_step(gradient, state, rule.weights(), rule.config, 0.1)
            updates.append(update)
        return torch.autograd.grad(updates, rule.weights(), list(adjoints))

    benchmark.pedantic(run, rounds=2, iterations=1, warmup_rounds=1)
    _note(benchmark, "gac", "eager", numel, UNROLL)


@pytest.mark.parametrize("kind", ["matrix", "pairs"])
def test_memory_alone(benchmark: Any, kind: str) -> None:
    """A read and three writes, of a matrix of 1,000 coordinates or the pairs of 20 steps of 49,152."""
    rule, dim = (NTMRule(), SMALL) if kind == "matrix" else (NTMRule("pairs", pairs=20), SIZES[-1])
    benchmark.group = "memory alone"
    config = rule.config.memory
    assert config is not None
    kept = memory.begin_(config, torch.empty(memory.shape(config, 1, dim)))
    pairs, vector = torch.randn(2, 3, 1, dim) / dim**0.5, torch.randn(1, 1, dim)

    def run() -> Tensor:
        memory.write_(config, kept, pairs, 0)
        return memory.read(config, kept, vector, 1)

    benchmark.pedantic(run, rounds=10, iterations=5, warmup_rounds=2)
    _note(benchmark, f"ntm-{kind}", "memory", dim, 1)
