"""Step and meta-gradient of the papers' rules beside the same in eager PyTorch, torch.compile and JAX.

pytest bench/ --benchmark-only
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from competitors import COMPETITORS, RULES, Workload, fastl2l, multiply_adds

SIZES = [10, 1_000, 15_910, 49_152, 1_000_000, 10_000_000]
UNROLL = 20
LARGEST = {"step": 1_000_000, "meta-gradient": 49_152}
"""The others' largest N: beyond it they take more than 20 GB of memory."""


def _cases(what: str) -> list[Any]:
    """Of the LSTM rule all sizes, of the others one."""
    found = []
    for kind in RULES:
        sizes = [numel for numel in SIZES if what == "step" or numel <= 1_000_000] if kind == "lstm" else [49_152]
        found += [(kind, n, who) for n in sizes for who in COMPETITORS if who == "fastl2l" or n <= LARGEST[what]]
    return found


def _group(what: str, kind: str, numel: int) -> str:
    return f"{what}{'' if kind == 'lstm' else f' of {kind}'}, N = {numel:,}"


def _note(benchmark: Any, who: str, what: str, kind: str, numel: int, steps: int, machine: dict[str, float]) -> None:
    nanoseconds = benchmark.stats.stats.median / numel / steps * 1e9
    floor = multiply_adds(what, kind) / machine["sgemm_multiply_adds_per_ns"]
    benchmark.extra_info.update(
        who=who,
        rule=kind,
        coordinates=numel,
        ns_per_coordinate_step=nanoseconds,
        times_sgemm=nanoseconds / floor,
        **machine,
    )


def _rounds(numel: int, steps: int) -> int:
    return max(3, min(200, int(2e6 / (numel * steps)) * 5))


@pytest.mark.parametrize(("kind", "numel", "who"), _cases("step"))
def test_step(benchmark: Any, machine: dict[str, float], kind: str, numel: int, who: str) -> None:
    """One step of all coordinates."""
    benchmark.group = _group("step", kind, numel)
    work = Workload.of(numel, 1, kind=kind)
    run, ours = COMPETITORS[who](work).step, fastl2l(work).step
    if who != "fastl2l":
        torch.testing.assert_close(torch.tensor(run().tolist()), ours(), rtol=1e-4, atol=1e-6)
    benchmark.pedantic(run, rounds=_rounds(numel, 1), iterations=max(1, 1000 // numel), warmup_rounds=2)
    _note(benchmark, who, "step", kind, numel, 1, machine)


@pytest.mark.parametrize(("kind", "numel", "who"), _cases("meta-gradient"))
def test_meta_gradient(benchmark: Any, machine: dict[str, float], kind: str, numel: int, who: str) -> None:
    """A window of 20 steps and its gradient with respect to the rule's weights."""
    benchmark.group = _group("meta-gradient", kind, numel)
    work = Workload.of(numel, UNROLL, kind=kind)
    run, ours = COMPETITORS[who](work).meta_gradient, fastl2l(work).meta_gradient
    if who != "fastl2l":
        torch.testing.assert_close(run(), ours(), rtol=1e-2, atol=1e-3 * ours().abs().max().item())
    benchmark.pedantic(run, rounds=_rounds(numel, UNROLL), iterations=1, warmup_rounds=1)
    _note(benchmark, who, "meta-gradient", kind, numel, UNROLL, machine)
