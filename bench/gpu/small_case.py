"""Steps and a window's backward of a few coordinates, for compute-sanitizer to watch: by every backend there is.

N = 37 is two whole tiles and a ragged one; 7 hidden units, and given rows, take other kernels than the papers' rules.

    python bench/gpu/small_case.py cuda
"""

from __future__ import annotations

import sys

import torch

from fastl2l import Rule
from fastl2l.ops.dispatch import Backend, select
from fastl2l.ops.layout import TILE, new_state
from fastl2l.rule_config import RuleConfig

COORDINATES, STEPS = 37, 3
RULES = (
    "log_sign:10 lstm:20,20 linear",
    "adam:0.95,0.95,1e-08 elu:20 lstm:20,20 tanh",
    "log_sign:10 lstm:7,7 linear",
    "adam:0.9,0.99,1e-06 given:3 elu:5 lstm:7 linear",
)


def run(backend: Backend, device: str, text: str) -> None:
    config = RuleConfig.parse(text)
    rule = Rule(config, seed=0).to(device)
    arguments = [weight.detach() for weight in rule.weights()], rule.text, config.output_scale
    random = torch.Generator(device).manual_seed(0)
    grads, adjoints = (torch.randn(STEPS, COORDINATES, device=device, generator=random) for _ in range(2))
    theta = torch.zeros(COORDINATES, device=device)
    tiles = -(-COORDINATES // TILE)
    given = torch.randn(STEPS, tiles, config.given, TILE, device=device, generator=random) if config.given else None
    rate = torch.tensor(0.5, device=device)
    for dtype in (torch.float32, torch.bfloat16)[: 1 + config.takes_bfloat16_state]:
        state = new_state(rule, COORDINATES, device, dtype)
        for t, grad in enumerate(grads):
            now = None if given is None else given[t]
            backend.step_([theta], [grad], [state], *arguments, 1.0, None, now, 0.1, rate)
    first = new_state(rule, COORDINATES, device)
    dstate = torch.ones_like(first)
    found = (theta, *backend.window_backward(first, grads, adjoints, *arguments, dstate, True, True, given, True))
    assert all(tensor.isfinite().all() for tensor in found)


def main(device: str) -> None:
    for name in ("native", "triton"):
        try:
            backend = select(name, device)
        except RuntimeError as error:
            print(f"left out: {error}")
            continue
        for text in RULES:
            run(backend, device, text)
        print(f"ran: {name}")


if __name__ == "__main__":
    main(*sys.argv[1:])
