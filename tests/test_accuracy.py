"""Accuracy of the kernels' own sigmoid, tanh and log, over all of float32.

By default every 61st float32 is tried; with FASTL2L_EXHAUSTIVE=1 every one (minutes).
"""

from __future__ import annotations

import os

import numpy as np
import pytest
import torch

from fastl2l.ops.dispatch import available_backends

STRIDE = 1 if os.environ.get("FASTL2L_EXHAUSTIVE") == "1" else 61
CHUNK = 1 << 24
assert available_backends()["native"] is None

# The largest errors in units in the last place of the exact result, where that is a normal number; docs/performance.md
# quotes them. The functions take x times log2(e): sigmoid is 1 / (1 + 2^t), tanh (2^t - 1) / (2^t + 1).
BOUNDS = {"sigmoid": 3.0, "tanh": 3.5, "log": 2.0}
EXACT = {
    "sigmoid": lambda t: 1 / (1 + torch.exp2(t)),
    "tanh": lambda t: torch.tanh(t * (np.log(2) / 2)),
    "log": torch.log,
}
DOMAINS = {"sigmoid": (-126.0, 125.0), "tanh": (-200.0, 200.0), "log": (2.0**-149, 3.4e38)}


def floats(low, high):
    """All float32 from low to high, every STRIDE-th of them, in chunks."""
    bits = [np.float32(value).view(np.int32).item() for value in (low, high)]
    ranges = [(bits[0], bits[1])] if low > 0 else [(0, bits[1]), (-(2**31), bits[0])]
    for first, last in ranges:
        for start in range(first, last, CHUNK * STRIDE):
            numbers = np.arange(start, min(last, start + CHUNK * STRIDE), STRIDE, dtype=np.int64)
            yield torch.from_numpy(numbers.astype(np.int32).view(np.float32))


def kernel(function, x):
    padded = torch.nn.functional.pad(x, (0, -x.numel() % 16), value=1.0)
    return torch.ops.fastl2l.elementwise(padded, function)[: x.numel()]


def worst_ulps(function):
    worst = 0.0
    for x in floats(*DOMAINS[function]):
        exact = EXACT[function](x.double())
        unit = torch.exp2(exact.abs().clamp(min=2.0**-126).log2().floor() - 23)
        error = (kernel(function, x).double() - exact).abs() / unit
        worst = max(worst, error.max().item())
    return worst


@pytest.mark.parametrize("isa", torch.ops.fastl2l.cpu_isas().split(","))
@pytest.mark.parametrize("function", BOUNDS)
def test_error_in_units_in_the_last_place(function, isa, monkeypatch, record_property):
    monkeypatch.setenv("FASTL2L_CPU_ISA", isa)
    worst = worst_ulps(function)
    record_property("worst_ulps", worst)
    print(f"{function}, {isa}: {worst:.3f} ulp")
    assert worst <= BOUNDS[function]


@pytest.mark.parametrize("function", BOUNDS)
def test_special_values(function):
    x = torch.tensor([float("nan"), float("inf"), 0.0, 1.0] * 4)
    nan, infinity, *_ = kernel(function, x)
    assert nan.isnan()
    assert infinity.item() == pytest.approx({"sigmoid": 0.0, "tanh": 1.0, "log": float("inf")}[function], abs=2e-38)
    tiny = torch.tensor([2.0**-140, -(2.0**-140), 2.0**-126, -(2.0**-126)] * 4)
    if function == "tanh":
        torch.testing.assert_close(
            kernel(function, tiny).double(), EXACT[function](tiny.double()), rtol=1e-4, atol=2e-45
        )


@pytest.mark.parametrize("function", BOUNDS)
def test_float64(function):
    low, high = DOMAINS[function]
    x = torch.linspace(max(low, 1e-3), min(high, 60), 100_000, dtype=torch.float64)
    x = torch.cat([x, -x]) if low < 0 else x
    torch.testing.assert_close(kernel(function, x), EXACT[function](x), rtol=2e-15, atol=0)
