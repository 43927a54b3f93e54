"""What a step of 300 small tensors costs beyond one of a single tensor with as many coordinates.

Both are stepped in turn, so that each finds the caches as the other left them, and noise hits both alike:

    python bench/small_tensors.py
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from fastl2l import FusedLSTMOptimizer, LSTMRule

SHAPES = [(16, 20), (16,)] * 150
ROUNDS = 100


def stepper(params: Sequence[Tensor]) -> Callable[[], float]:
    """Seconds of a step with fresh gradients, as a training loop makes them."""
    optimizer = FusedLSTMOptimizer(params, LSTMRule())

    def step() -> float:
        optimizer.zero_grad()
        loss = torch.stack([param.square().sum() for param in params]).sum()
        loss.backward()
        began = time.perf_counter()
        optimizer.step()
        return time.perf_counter() - began

    return step


def main() -> None:
    many = [torch.nn.Parameter(torch.randn(shape) / 10) for shape in SHAPES]
    one = torch.nn.Parameter(torch.cat([param.detach().flatten() for param in many]))
    step_many, step_one = stepper(many), stepper([one])
    times = [(step_many(), step_one()) for _ in range(ROUNDS)][3:]
    single = statistics.median(one for _, one in times)
    surplus = statistics.median(many - one for many, one in times)
    threads = torch.get_num_threads()
    print(f"{len(SHAPES)} tensors, {one.numel():,} coordinates, {threads} threads: one tensor {single * 1e3:.2f} ms,")
    print(f"all of them {surplus * 1e3:.2f} ms more ({surplus / single:.1%}), medians of {len(times)} pairs")


if __name__ == "__main__":
    main()
