"""Steps and a window's backward of a few coordinates, for compute-sanitizer to watch: by every backend there is.

N = 37 is two whole tiles and a ragged one; 7 hidden units take other kernels than 20.

    python bench/gpu/small_case.py cuda
"""

from __future__ import annotations

import sys

import torch

from fastl2l import LSTMRule
from fastl2l.ops.dispatch import Backend, select
from fastl2l.ops.layout import new_state

COORDINATES, STEPS, HIDDEN = 37, 3, (20, 7)


def run(backend: Backend, device: str, hidden: int) -> None:
    rule = LSTMRule(hidden_size=hidden, seed=0).to(device)
    config = rule.config
    arguments = (
        [weight.detach() for weight in rule.weights()],
        config.preprocess,
        config.preprocess_constant,
        config.output_scale,
    )
    random = torch.Generator(device).manual_seed(0)
    grads, adjoints = (torch.randn(STEPS, COORDINATES, device=device, generator=random) for _ in range(2))
    theta = torch.zeros(COORDINATES, device=device)
    for dtype in (torch.float32, torch.bfloat16):
        state = new_state(rule, COORDINATES, device, dtype)
        for grad in grads:
            backend.step_([theta], [grad], [state], *arguments, 1.0)
    first = new_state(rule, COORDINATES, device)
    dstate = torch.ones_like(first)
    found = (theta, *backend.window_backward(first, grads, adjoints, *arguments, dstate, True, True))
    assert all(tensor.isfinite().all() for tensor in found)


def main(device: str) -> None:
    for name in ("native", "triton"):
        try:
            backend = select(name, device)
        except RuntimeError as error:
            print(f"left out: {error}")
            continue
        for hidden in HIDDEN:
            run(backend, device, hidden)
        print(f"ran: {name}")


if __name__ == "__main__":
    main(*sys.argv[1:])
