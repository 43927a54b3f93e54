"""What FusedLSTMOptimizer costs beside torch.optim on one small tensor, and on many."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from fastl2l import FusedLSTMOptimizer, LSTMRule

OPTIMIZERS: dict[str, Callable[[list[torch.Tensor]], torch.optim.Optimizer]] = {
    "fastl2l": lambda params: FusedLSTMOptimizer(params, LSTMRule()),
    "sgd": lambda params: torch.optim.SGD(params, lr=0.1),
    "adam": lambda params: torch.optim.Adam(params),
}
MODELS = {"one tensor of 10": [10], "150 layers of 20 to 16 units": [320, 16] * 150}


@pytest.mark.parametrize("who", OPTIMIZERS)
@pytest.mark.parametrize("model", MODELS)
def test_optimizer(benchmark: Any, model: str, who: str) -> None:
    benchmark.group = f"optimizer.step, {model}"
    benchmark.extra_info["who"] = who
    params = [torch.nn.Parameter(torch.randn(numel)) for numel in MODELS[model]]
    for param in params:
        param.grad = torch.randn_like(param) * 1e-3
    step = OPTIMIZERS[who](params).step
    few = len(params) == 1
    benchmark.pedantic(step, rounds=200 if few else 30, iterations=100 if few else 1, warmup_rounds=3)


def test_same_coordinates_in_one_tensor(benchmark: Any) -> None:
    """What gathering from 300 tensors is to be compared with."""
    benchmark.group = "optimizer.step, 150 layers of 20 to 16 units"
    benchmark.extra_info["who"] = "one tensor"
    param = torch.nn.Parameter(torch.randn(sum(MODELS["150 layers of 20 to 16 units"])))
    param.grad = torch.randn_like(param) * 1e-3
    benchmark.pedantic(FusedLSTMOptimizer([param], LSTMRule()).step, rounds=30, warmup_rounds=3)
