"""Step and meta-gradient of rules whose coordinates talk, beside the plain rule's and the same in eager PyTorch.

pytest bench/test_coupled_rules.py --benchmark-only
"""

from __future__ import annotations

import itertools
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


def _plain_step(kind: str, rule: Rule) -> tuple[Callable[..., Any], Callable[[int], list[Tensor]]]:
    """In plain torch, (gradient, weights, *state) -> (update, *state); and the first state for N coordinates."""
    config, scale = rule.config, rule.config.output_scale
    if kind == "gac":

        def step(gradient: Tensor, weights: list[Tensor], rows: Tensor) -> tuple[Tensor, ...]:
            return reference.coupled_step(gradient, rows, weights, config, scale)

        return step, lambda numel: [torch.zeros(config.state_rows, numel)]
    memory = config.memory
    assert memory is not None
    names = [name for name, _ in config.weight_shapes]

    def step_with_pairs(
        gradient: Tensor, weights: list[Tensor], rows: Tensor, reads: Tensor, left: Tensor, right: Tensor
    ) -> tuple[Tensor, ...]:
        by_name = dict(zip(names, weights, strict=True))
        x, _ = reference.features(gradient, rows[:0], config.features)
        layers = reference._averaging_layers
        _, h, rows = layers(config, torch.cat([x, reads]), rows, weights, lambda h: h[:0])
        update = scale * (by_name["weight_out"] @ h + by_name["bias_out"])
        written = reference._heads(by_name, "write", h) / len(gradient) ** 0.5
        left = torch.cat([left[memory.writes :], 0.1 * written[: memory.writes]])
        right = torch.cat([right[memory.writes :], written[memory.writes :]])
        asked = reference._heads(by_name, "read", h)
        return update, rows, memory.initial * asked + (asked @ right.T) @ left, left, right

    def first(numel: int) -> list[Tensor]:
        pairs = torch.zeros(memory.pairs * memory.writes, numel)
        return [torch.zeros(config.state_rows, numel), torch.zeros(memory.reads, numel), pairs, pairs]

    return step_with_pairs, first


def _plain(who: str, kind: str) -> tuple[Rule, Callable[..., Any], Callable[[int], list[Tensor]]]:
    rule = _rule(kind)
    step, first = _plain_step(kind, rule)
    return rule, torch.compile(step, dynamic=False) if who == "torch.compile" else step, first


PLAIN_CASES = list(itertools.product(("eager", "torch.compile"), ("gac", "ntm-pairs"), SIZES))


@pytest.mark.parametrize(("who", "kind", "numel"), PLAIN_CASES)
def test_step_of_plain_pytorch(benchmark: Any, who: str, kind: str, numel: int) -> None:
    """The same step in plain torch, of rules whose coordinates talk."""
    benchmark.group = f"step of rules whose coordinates talk, N = {numel:,}"
    rule, step, first = _plain(who, kind)
    gradient, state, weights = torch.randn(numel), first(numel), [weight.detach() for weight in rule.weights()]
    where = Coordinates((numel,))
    own = coupled.begin(rule, where)
    with torch.no_grad():
        for _ in range(2):
            update, own = coupled.step(rule, gradient, own, where)
            found, *state = step(gradient, weights, *state)
            torch.testing.assert_close(found, update, rtol=1e-3, atol=1e-5)
        benchmark.pedantic(
            lambda: step(gradient, weights, *state), rounds=5, iterations=max(1, 10_000 // numel), warmup_rounds=2
        )
    _note(benchmark, kind, who, numel, 1)


@pytest.mark.parametrize(("who", "kind", "numel"), PLAIN_CASES)
def test_meta_gradient_of_plain_pytorch(benchmark: Any, who: str, kind: str, numel: int) -> None:
    """The same window in plain torch and by its autograd; torch.compile has the step."""
    benchmark.group = f"meta-gradient of rules whose coordinates talk, N = {numel:,}"
    rule, step, first = _plain(who, kind)
    gradients, adjoints = torch.randn(UNROLL, numel), torch.randn(UNROLL, numel)
    weights = list(rule.weights())

    def run() -> tuple[Tensor, ...]:
        state, updates = first(numel), []
        for gradient in gradients:
            update, *state = step(gradient, weights, *state)
            updates.append(update)
        return torch.autograd.grad(updates, weights, list(adjoints), allow_unused=True)

    benchmark.pedantic(run, rounds=2, iterations=1, warmup_rounds=1)
    _note(benchmark, kind, who, numel, UNROLL)


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
