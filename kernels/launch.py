"""Launches of the kernels: block sizes, memory, and the order of things. Arguments have been checked before."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch import Tensor

from fastl2l.kernels.interpreter import mend
from fastl2l.kernels.pack import pack_kernel, unpack_kernel
from fastl2l.kernels.step import step_kernel
from fastl2l.kernels.window import backward_kernel, forward_kernel, gradient_kernel, output_gradient_kernel

if triton.knobs.runtime.interpret:
    mend()

PRECISIONS = ("tf32x3", "ieee")
MOST_HIDDEN = 61
"""With three constant inputs, what 64 units hold; twice as many would not fit into shared memory."""
MOST_PROGRAMS = 256
"""Of a chunk of a window: two on each of a large GPU's multiprocessors."""
ROWS = 16
"""Of packed weights that a program packs or unpacks."""
TOGETHER = 4
"""Sums that it adds at a time."""
MOST_WORKSPACE = 1 << 30
"""Bytes; windows so long that they would need more are taken with fewer programs at a time."""

# Only the multiply-adds that are written are fused; no loop is pipelined across the barriers within.
OPTIONS = {"enable_fp_fusion": False, "num_stages": 1}


@dataclass(frozen=True)
class Rule:
    """A rule as the kernels know it."""

    preprocess: str
    constant: float
    update_scale: float
    layers: int
    hidden: int
    dtype: torch.dtype
    precision: str
    """Of float32 matrix products: "tf32x3" on tensor cores, or "ieee", exact."""

    @property
    def features(self) -> int:
        return 1 if self.preprocess == "raw" else 2

    @property
    def units(self) -> int:
        """Hidden units with padding: a power of 2 with room for the constant inputs, and as many as tl.dot wants."""
        return max(16, triton.next_power_of_2(self.hidden + 3))

    @property
    def packed_rows(self) -> int:
        return 4 * self.units * self.layers + 1

    def sizes(self) -> dict[str, int]:
        return {"LAYERS": self.layers, "HIDDEN": self.hidden, "UNITS": self.units}

    def cell(self, capability: tuple[int, int]) -> dict[str, Any]:
        """Constants of the kernels that run cells."""
        block, _ = self.blocking()
        wide = capability[0] == 9 and self.precision == "tf32x3" and self.units <= 32
        return {
            **self.sizes(),
            "LOG_SIGN": self.preprocess == "log_sign",
            "BLOCK": block,
            "WIDE": wide,
            "PRECISION": self.precision,
        }

    def blocking(self) -> tuple[int, int]:
        """Coordinates and warps a program: as many as registers allow for 20 units."""
        return (64, 4) if self.precision == "tf32x3" else (16, 8)

    def gradient(self) -> dict[str, float]:
        """Arguments of the features."""
        bound = 709.0  # beyond, exp() is not a float64
        return {
            "constant": self.constant,
            "threshold": math.exp(-self.constant),
            "slope": math.exp(min(self.constant, bound)),
        }


def pack(rule: Rule, weights: Sequence[Tensor]) -> Tensor:
    flat = torch.cat([weight.reshape(-1) for weight in weights])
    packed = flat.new_empty(rule.packed_rows, 2 * rule.units)
    grid = (triton.cdiv(rule.packed_rows, ROWS),)
    pack_kernel[grid](flat, packed, FEATURES=rule.features, **rule.sizes(), ROWS=ROWS)
    return packed


def step_(
    rule: Rule,
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    states: Sequence[Tensor],
    weights: Sequence[Tensor],
    grad_scale: float,
    finite: Tensor | None,
) -> None:
    """One launch a parameter; a table of all their addresses would have to be copied to the GPU at every step."""
    packed = pack(rule, weights)
    block, warps = rule.blocking()
    constants = rule.cell(_capability(packed))
    for param, grad, state in zip(params, grads, states, strict=True):
        if param.numel():
            step_kernel[(triton.cdiv(param.numel(), block),)](
                param, grad, state, packed, finite, param.numel(), **rule.gradient(), update_scale=rule.update_scale,
                grad_scale=grad_scale, **constants, num_warps=warps, **OPTIONS,
            )  # fmt: skip


def window_backward(
    rule: Rule,
    state: Tensor,
    grads: Tensor,
    adjoints: Tensor,
    weights: Sequence[Tensor],
    dstate: Tensor | None,
    need_dstate: bool,
    need_dgrads: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    steps, numel = grads.shape
    dweights = state.new_empty(sum(weight.numel() for weight in weights))
    # Lanes past N are not written.
    dstate_first = state.new_zeros(state.shape[0] if need_dstate else 0, *state.shape[1:])
    dgrads = grads.new_empty(steps if need_dgrads else 0, numel)
    packed = pack(rule, weights)
    block, warps = rule.blocking()
    blocks = triton.cdiv(numel, block)
    programs = min(blocks, programs_at_once(rule, steps))
    sums = packed.new_zeros(programs, *packed.shape, dtype=torch.float64)
    workspace = state.new_empty(programs, rule.layers, steps + 1, 2, rule.units, block)
    dgates = state.new_empty(programs, steps, 4, rule.units, block)
    constants = rule.cell(_capability(packed)) | {"num_warps": warps} | OPTIONS
    of_gradient = {name: value for name, value in constants.items() if name != "WIDE"}
    scale = {"update_scale": rule.update_scale}
    for first_block in range(0, blocks, max(programs, 1)):
        now = min(programs, blocks - first_block)
        where = {"numel": numel, "steps": steps, "first_block": first_block}
        for layer in range(rule.layers):
            forward_kernel[(now,)](
                state, grads, packed, workspace, **where, layer=layer, **rule.gradient(), FIRST=layer == 0, **constants
            )
        output_gradient_kernel[(now,)](
            adjoints, sums, workspace, **where, **scale, **rule.sizes(), BLOCK=block, num_warps=warps, **OPTIONS
        )
        for layer in reversed(range(rule.layers)):
            backward_kernel[(now,)](
                grads, adjoints, packed, dstate, dstate_first if need_dstate else None,
                dgrads if need_dgrads else None, workspace, dgates, **where, layer=layer, **rule.gradient(), **scale,
                FIRST=layer == 0, LAST=layer == rule.layers - 1, **constants,
            )  # fmt: skip
            gradient_kernel[(now, 2)](
                grads, sums, workspace, dgates, **where, layer=layer, **rule.gradient(), FIRST=layer == 0,
                **of_gradient,
            )  # fmt: skip
    unpack_kernel[(triton.cdiv(rule.packed_rows, ROWS),)](
        sums, dweights, programs, FEATURES=rule.features, **rule.sizes(), ROWS=ROWS, TOGETHER=TOGETHER
    )
    return dweights, dstate_first, dgrads


def programs_at_once(rule: Rule, steps: int) -> int:
    """Programs of a chunk. The rule, its precision and the steps decide, so sums have one order on any GPU."""
    block, _ = rule.blocking()
    entries = 2 * rule.layers * (steps + 1) + 4 * steps
    size = entries * rule.units * block * rule.dtype.itemsize
    return max(1, min(MOST_PROGRAMS * 64 // block, MOST_WORKSPACE // size))


def _capability(tensor: Tensor) -> tuple[int, int]:
    return torch.cuda.get_device_capability(tensor.device) if tensor.is_cuda else (9, 0)
