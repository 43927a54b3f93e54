"""Peak memory of a meta-gradient beyond what was there before it: theta, the rule and its state."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest

PROGRAM = """
import sys
sys.path.insert(0, {folder!r})
import torch
from competitors import COMPETITORS, Workload
from fastl2l import LSTMRule, Trajectory
from fastl2l.tasks import Problem

class Bowl(Problem):
    task = "bowl"

    def __init__(self, numel):
        self.theta0 = torch.ones(numel)

    def loss(self, theta, step):
        return theta.dot(theta)

def prepare(who, numel):
    if who == "fastl2l":  # as it is used: the trajectory has its theta and state already
        trajectory = Trajectory(Bowl(numel), LSTMRule())
        return lambda: trajectory.window([1.0] * 20)
    return COMPETITORS[who](Workload.of(numel, 20)).meta_gradient

def resident(name):  # VmRSS: now; VmHWM: the most since it was last told to start again
    lines = open("/proc/self/status").read().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name + ":"))

prepare({who!r}, 1000)()
run = prepare({who!r}, {numel})
open("/proc/self/clear_refs", "w").write("5")
before = resident("VmRSS")
run()
print((resident("VmHWM") - before) / {numel})
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
