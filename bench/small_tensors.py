"""What a step of 300 small tensors costs beyond one of a single tensor with as many coordinates.

Both are stepped in turn, so that each finds the caches as the other left them, and noise hits both alike. A third
optimizer finds a NaN among the gradients of the 300 and leaves its steps out: what it takes is not the kernel's.

    python bench/small_tensors.py
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from fastl2l import FusedLSTMOptimizer, LSTMRule

SHAPES = [(16, 20), (16,)] * 150
ROUNDS = 100


def stepper(params: Sequence[Tensor], left_out: bool = False) -> Callable[[], float]:
    """Seconds of a step with fresh gradients, as a training loop makes them; or of one that is left out."""
    optimizer = FusedLSTMOptimizer(params, LSTMRule(), nonfinite="skip")

    def step() -> float:
        optimizer.zero_grad()
        loss = torch.stack([param.square().sum() for param in params]).sum()
        loss.backward()
        if left_out and optimizer.state:  # there are none before the first step
            params[0].grad[0] = math.nan
        began = time.perf_counter()
        optimizer.step()
        return time.perf_counter() - began

    return step


def main() -> None:
    many = [torch.nn.Parameter(torch.randn(shape) / 10) for shape in SHAPES]
    one = torch.nn.Parameter(torch.cat([param.detach().flatten() for param in many]))
    step_many, step_one, step_none = stepper(many), stepper([one]), stepper(many, left_out=True)
    times = [(step_many(), step_one(), step_none()) for _ in range(ROUNDS)][3:]
    single = statistics.median(one for _, one, _ in times)
    surplus = statistics.median(many - one for many, one, _ in times)
    nothing = statistics.median(none for _, _, none in times)
    threads = torch.get_num_threads()
    print(f"{len(SHAPES)} tensors, {one.numel():,} coordinates, {threads} threads: one tensor {single * 1e3:.2f} ms,")
    print(f"all of them {surplus * 1e3:.2f} ms more ({surplus / single:.1%}),")
    print(f"all of them, but the step left out, {nothing * 1e3:.2f} ms; medians of {len(times)} rounds")


if __name__ == "__main__":
    main()
