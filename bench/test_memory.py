"""Peak memory of a meta-gradient beyond what was there before it: theta, the rule and its state."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest

PROGRAM = """
import resource, sys, threading
import torch
sys.path.insert(0, {folder!r})
from competitors import COMPETITORS, Workload
numel, who = {numel}, {who!r}
small = Workload.of(1000, 20)
COMPETITORS[who](small).meta_gradient()
work = Workload.of(numel, 20)
# fastl2l must also keep the window's gradients and adjoints: they are part of `work`, so they are counted by hand
own = 2 * work.gradients.nbytes if who == "fastl2l" else 0
run = COMPETITORS[who](work).meta_gradient
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
run()
after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
print((after - before + own) / numel)
"""


@pytest.mark.parametrize("who", ["fastl2l", "eager"])
@pytest.mark.parametrize("numel", [200_000])
def test_extra_memory_of_a_meta_gradient(benchmark: Any, numel: int, who: str) -> None:
    benchmark.group = f"memory of a meta-gradient, N = {numel:,}"
    program = PROGRAM.format(folder=str(__file__).rsplit("/", 1)[0], numel=numel, who=who)

    def run() -> float:
        done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
        return float(done.stdout)

    extra = benchmark.pedantic(run, rounds=1)
    benchmark.extra_info.update(who=who, coordinates=numel, extra_bytes_per_coordinate=extra)
