"""The LSTM rule's results on the CPU are those of fastl2l 0.1, before rules were made of parts, to the bit.

fingerprints.json holds a hash of what that version gave, by instruction set, dtype of the rule and of its state, and
rule. Inputs are exact in every dtype, and drawn by a generator whose numbers are the same everywhere.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import lstm

from fastl2l.rule_config import RuleConfig

SAVED = json.loads((Path(__file__).parent / "fingerprints.json").read_text())
N, STEPS = 517, 5


def whole(seed: int, low: int, high: int, shape: tuple[int, ...]) -> np.ndarray:
    return np.asarray(np.random.Generator(np.random.Philox(seed)).integers(low, high, size=shape))


def numbers(seed: int, *shape: int) -> torch.Tensor:
    """From -1 to 1, of 21 bits."""
    return torch.as_tensor(np.ldexp(whole(seed, -(2**20), 2**20, shape).astype(np.float64), -20))


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("preprocess", ["raw", "log_sign"])
@pytest.mark.parametrize("shape", [(20, 2), (7, 3), (1, 1), (33, 2)])
def test_results_are_those_of_the_first_version(native, shape, preprocess, stored, isa):
    dtype = torch.float64 if stored == torch.float64 else torch.float32
    config = RuleConfig.parse(lstm(preprocess, *shape))
    weights = [numbers(i, *shape).to(dtype) for i, (_, shape) in enumerate(config.weight_shapes)]
    powers = whole(1100, -40, 8, (STEPS, N))
    grads = torch.from_numpy(np.ldexp(numbers(100, STEPS, N).numpy(), powers)).to(dtype)
    tiles = -(-N // 16)
    first = numbers(101, tiles, config.state_rows, 16).to(dtype)
    digest = hashlib.sha256()

    def take(*tensors):
        for tensor in tensors:
            digest.update(tensor.contiguous().view(torch.uint8).numpy().tobytes())

    def take_state(state):
        take(state[..., :-1, :, :], state[..., -1, :, : N % 16])

    state = torch.cat([first.to(stored)] * 2)
    params = [torch.ones(N, dtype=dtype), torch.ones(N, dtype=torch.bfloat16)]
    for grad in grads:
        native.step_(params, [grad, grad.bfloat16()], [state], weights, config.text, 0.3, -1.0)
    take(*params)
    take_state(state.view(2, tiles, -1, 16))
    if stored == dtype:
        adjoints, dstate = numbers(102, STEPS, N).to(dtype), numbers(103, *first.shape).to(dtype)
        dweights, dfirst, dgrads, _ = native.window_backward(
            first, grads, adjoints, weights, config.text, 0.3, dstate, True, True
        )
        take(dweights)
        take_state(dfirst)
        take(dgrads)
    name = f"{isa} {dtype} {stored} {config.text}".replace("torch.", "")
    assert digest.hexdigest()[:32] == SAVED[name]
