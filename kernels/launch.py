"""Launches of the kernels: block sizes, memory, and the order of things. Arguments have been checked before."""

from __future__ import annotations

import functools
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
from fastl2l.kernels.window import (
    backward_kernel,
    forward_kernel,
    gradient_kernel,
    inputs_backward_kernel,
    inputs_kernel,
    output_backward_kernel,
    projection_gradient_kernel,
)
from fastl2l.rule_config import Adam, LogSign, Raw, RuleConfig

if triton.knobs.runtime.interpret:
    mend()

PRECISIONS = ("tf32x3", "ieee")
MOST_UNITS = 64
"""Of a layer, with padding; twice as many would not fit into shared memory."""
MOST_HIDDEN = MOST_UNITS - 3
"""There must be room for the constant inputs: a one, and two features."""
MOST_PROGRAMS = 256
"""Of a chunk of a window: two on each of a large GPU's multiprocessors."""
ROWS = 16
"""Of packed weights that a program packs or unpacks."""
TOGETHER = 4
"""Sums that it adds at a time."""
MOST_WORKSPACE = 1 << 30
"""Bytes; windows so long that they would need more are taken with fewer programs at a time."""
CONSTANTS = 5
"""Of features, at most."""

# Only the multiply-adds that are written are fused; no loop is pipelined across the barriers within.
OPTIONS = {"enable_fp_fusion": False, "num_stages": 1}


@dataclass(frozen=True)
class Shape:
    """What the kernels are compiled for: a rule's parts and sizes, without its constants."""

    features: str  # "" where there are none
    feature_count: int
    means: int
    given: int
    projected: int
    layers: int
    hidden: int
    output: str

    @classmethod
    def of(cls, config: RuleConfig) -> Shape:
        return cls(
            features="" if config.features is None else config.features.name,
            feature_count=config.feature_count,
            means=config.state_rows - config.lstm_rows,
            given=config.given,
            projected=0 if config.projection is None else config.projection.units,
            layers=config.num_layers,
            hidden=config.hidden_size,
            output=config.output,
        )

    @property
    def direct(self) -> bool:
        """Whether the first layer reads features as they are, in columns beside h; others read x, as all layers do."""
        return not (self.means or self.given or self.projected)

    @property
    def inputs(self) -> int:
        return self.feature_count + self.given

    @property
    def entering(self) -> int:
        """Numbers that the first layer reads."""
        return self.projected or self.inputs

    @property
    def units(self) -> int:
        """Units with padding: a power of 2 with room for the constant inputs, and as many as tl.dot wants."""
        return max(16, triton.next_power_of_2(max(self.hidden + 3, 0 if self.direct else self.entering)))

    @property
    def lstm_rows(self) -> int:
        return 2 * self.layers * self.hidden

    @property
    def state_rows(self) -> int:
        return self.lstm_rows + self.means

    @property
    def first_level(self) -> int:
        """Of a window's workspace, that of the first layer; what it reads is the level below, if that is made for it."""
        return 0 if self.direct else 1

    @property
    def levels(self) -> int:
        return self.first_level + self.layers

    # Rows of packed weights; see pack.py.

    @property
    def output_row(self) -> int:
        return 4 * self.units * self.layers

    @property
    def constants_row(self) -> int:
        return self.output_row + 1

    @property
    def projection_row(self) -> int:
        return self.output_row + 2

    @property
    def packed_rows(self) -> int:
        return self.projection_row + (self.inputs + 1 if self.projected else 0)


@dataclass(frozen=True)
class Rule:
    """A rule as the kernels know it.

    Raises:
        RuntimeError: it is too large for them.
    """

    config: RuleConfig
    update_scale: float
    dtype: torch.dtype
    precision: str
    """Of float32 matrix products: "tf32x3" on tensor cores, or "ieee", exact."""

    def __post_init__(self) -> None:
        shape = self.shape
        for what, size, most in (
            ("hidden units", shape.hidden, MOST_HIDDEN),
            ("units of a projection", shape.projected, MOST_UNITS),
            ("inputs of the first layer", 0 if shape.direct else shape.entering, MOST_UNITS),
        ):
            if size > most:
                raise RuntimeError(
                    f"rule {self.config.text!r}: expected at most {most} {what} with backend 'triton', got {size}; "
                    "use backend='reference', or 'native' where it takes CUDA tensors"
                )

    @functools.cached_property
    def shape(self) -> Shape:
        return Shape.of(self.config)

    def cell(self, capability: tuple[int, int]) -> dict[str, Any]:
        """Constants of the kernels that run cells."""
        wide = capability[0] == 9 and self.precision == "tf32x3" and self.shape.units <= 32
        return {**self.blocks(), "WIDE": wide, "PRECISION": self.precision}

    def blocks(self) -> dict[str, Any]:
        """Constants of the kernels that take a block of coordinates a program."""
        return {"RULE": self.shape, "BLOCK": self.blocking()[0]}

    def blocking(self) -> tuple[int, int]:
        """Coordinates and warps a program: as many as registers allow for 20 units."""
        return (64, 4) if self.precision == "tf32x3" else (16, 8)

    def constants(self) -> list[float]:
        """Of the features, in the order in which cell.py takes them."""
        match self.config.features:
            case Raw(scale):
                found = [scale]
            case LogSign(p):
                found = [p, math.exp(-p), math.exp(p)]
            case Adam(beta1, beta2, epsilon):
                found = [beta1, beta2, 1 - beta1, 1 - beta2, epsilon]
            case _:
                found = []
        return found + [0.0] * (CONSTANTS - len(found))


def pack(rule: Rule, weights: Sequence[Tensor]) -> Tensor:
    shape = rule.shape
    flat = torch.cat([weight.reshape(-1) for weight in weights])
    packed = flat.new_empty(shape.packed_rows, 2 * shape.units)
    grid = (triton.cdiv(shape.packed_rows, ROWS),)
    pack_kernel[grid](flat, packed, *rule.constants(), RULE=shape, ROWS=ROWS)
    return packed


def step_(
    rule: Rule,
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    states: Sequence[Tensor],
    weights: Sequence[Tensor],
    grad_scale: float,
    finite: Tensor | None,
    given: Sequence[Tensor | None],
    decay: float,
    rate: Tensor | None,
) -> None:
    """One launch a parameter; a table of all their addresses would have to be copied to the GPU at every step."""
    packed = pack(rule, weights)
    block, warps = rule.blocking()
    constants = rule.cell(_capability(packed)) | {"num_warps": warps} | OPTIONS
    for param, grad, state, rows in zip(params, grads, states, given, strict=True):
        if param.numel():
            step_kernel[(triton.cdiv(param.numel(), block),)](
                param, grad, state, rows, packed, finite, rate, param.numel(), update_scale=rule.update_scale,
                grad_scale=grad_scale, decay=decay, **constants,
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
    given: Tensor | None,
    need_dgiven: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    shape = rule.shape
    steps, numel = grads.shape
    dweights = state.new_empty(sum(weight.numel() for weight in weights))
    # Lanes past N are not written.
    dstate_first = state.new_zeros(state.shape[0] if need_dstate else 0, *state.shape[1:])
    dgrads = grads.new_empty(steps if need_dgrads else 0, numel)
    dgiven = torch.zeros_like(given) if given is not None and need_dgiven else state.new_empty(0)
    to_dstate, to_dgrads = dstate_first if need_dstate else None, dgrads if need_dgrads else None
    to_dgiven = dgiven if given is not None and need_dgiven else None
    packed = pack(rule, weights)
    block, warps = rule.blocking()
    blocks = triton.cdiv(numel, block)
    programs = min(blocks, programs_at_once(rule, steps))
    sums = packed.new_zeros(programs, *packed.shape, dtype=torch.float64)
    workspace = state.new_empty(programs, shape.levels, steps + 1, 2, shape.units, block)
    dgates = state.new_empty(programs, steps, 4, shape.units, block)
    doutputs = state.new_empty(programs, steps, block) if shape.output != "none" else None
    options = {"num_warps": warps} | OPTIONS
    cell, plain = rule.cell(_capability(packed)) | options, rule.blocks() | options
    for first_block in range(0, blocks, max(programs, 1)):
        now = min(programs, blocks - first_block)
        where = {"numel": numel, "steps": steps, "first_block": first_block}
        if not shape.direct:
            inputs_kernel[(now,)](state, grads, given, packed, workspace, **where, **plain)
        for layer in range(shape.layers):
            first = shape.direct and layer == 0
            forward_kernel[(now,)](state, grads, packed, workspace, **where, layer=layer, FIRST=first, **cell)
        if doutputs is not None:
            output_backward_kernel[(now,)](
                adjoints, packed, sums, workspace, doutputs, **where, update_scale=rule.update_scale, **plain
            )
        for layer in reversed(range(shape.layers)):
            first = shape.direct and layer == 0
            backward_kernel[(now,)](
                grads, packed, dstate, to_dstate, to_dgrads, workspace, dgates, doutputs, **where, layer=layer,
                FIRST=first, LAST=layer == shape.layers - 1, **cell,
            )  # fmt: skip
            gradient_kernel[(now, 2)](
                grads, packed, sums, workspace, dgates, **where, layer=layer, FIRST=first, PRECISION=rule.precision,
                **plain,
            )  # fmt: skip
        if shape.projected:
            projection_gradient_kernel[(now, 1 + shape.inputs)](given, sums, workspace, **where, **plain)
        if not shape.direct and (need_dgrads or to_dgiven is not None or (need_dstate and shape.means)):
            inputs_backward_kernel[(now,)](
                grads, packed, dstate, to_dstate, to_dgrads, to_dgiven, workspace, **where, **plain
            )
    unpack_kernel[(triton.cdiv(shape.packed_rows, ROWS),)](
        sums, dweights, programs, RULE=shape, ROWS=ROWS, TOGETHER=TOGETHER
    )
    return dweights, dstate_first, dgrads, dgiven


def programs_at_once(rule: Rule, steps: int) -> int:
    """Programs of a chunk. The rule, its precision and the steps decide, so sums have one order on any GPU."""
    block, _ = rule.blocking()
    entries = 2 * rule.shape.levels * (steps + 1) + 4 * steps
    size = entries * rule.shape.units * block * rule.dtype.itemsize
    return max(1, min(MOST_PROGRAMS * 64 // block, MOST_WORKSPACE // size))


def _capability(tensor: Tensor) -> tuple[int, int]:
    return torch.cuda.get_device_capability(tensor.device) if tensor.is_cuda else (9, 0)
