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
from fastl2l.rule_config import Adam, LogAndSign, LogSign, Raw, RuleConfig

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
    """What the kernels are compiled for: a rule's parts and sizes, without its constants.

    Fields and no properties, because the fields are what Triton keeps compiled kernels by.
    """

    features: str
    """Their name, or none."""
    feature_count: int
    means: int
    """Rows of state after those of the LSTM."""
    given: int
    inputs: int
    """Features and given rows."""
    projected: int
    """Units of the projection; 0 without one."""
    entering: int
    """Numbers that the first layer reads."""
    direct: bool
    """Whether these are features in columns beside h; else they are made for it, and x as in all layers."""
    layers: int
    hidden: int
    units: int
    """Units with padding: a power of 2 with room for the constant inputs, and as many as tl.dot wants."""
    output: str
    lstm_rows: int
    state_rows: int
    first_level: int
    """Of a window's workspace, that of the first layer: what is made for it is the level below."""
    levels: int
    output_row: int
    """Of the packed weights, as those that follow; see pack.py."""
    constants_row: int
    projection_row: int
    packed_rows: int


def shape_of(config: RuleConfig) -> Shape:
    projected = 0 if config.projection is None else config.projection.units
    means, inputs = config.state_rows - config.lstm_rows, config.inputs
    direct, entering = not (means or config.given or projected), projected or inputs
    units = max(16, triton.next_power_of_2(max(config.hidden_size + 3, 0 if direct else entering)))
    output_row = 4 * units * config.num_layers
    return Shape(
        features="none" if config.features is None else config.features.name,
        feature_count=config.feature_count,
        means=means,
        given=config.given,
        inputs=inputs,
        projected=projected,
        entering=entering,
        direct=direct,
        layers=config.num_layers,
        hidden=config.hidden_size,
        units=units,
        output=config.output,
        lstm_rows=config.lstm_rows,
        state_rows=config.state_rows,
        first_level=0 if direct else 1,
        levels=config.num_layers + (0 if direct else 1),
        output_row=output_row,
        constants_row=output_row + 1,
        projection_row=output_row + 2,
        packed_rows=output_row + 2 + (inputs + 1 if projected else 0),
    )


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
        return shape_of(self.config)

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
            case LogSign(p) | LogAndSign(p):
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
    units: Tensor | None,
) -> None:
    """One launch a parameter; a table of all their addresses would have to be copied to the GPU at every step."""
    packed = pack(rule, weights)
    block, warps = rule.blocking()
    constants = rule.cell(_capability(packed)) | {"num_warps": warps} | OPTIONS
    for number, (param, grad, state, rows) in enumerate(zip(params, grads, states, given, strict=True)):
        if param.numel():
            step_kernel[(triton.cdiv(param.numel(), block),)](
                param, grad, state, rows, packed, finite, rate, units, number, param.numel(),
                update_scale=rule.update_scale, grad_scale=grad_scale, decay=decay, **constants,
            )  # fmt: skip


def window_backward(
    rule: Rule,
    state: Tensor,
    grads: Tensor,
    adjoints: Tensor,
    weights: Sequence[Tensor],
    dstate: Tensor | None,
    dstate_first: Tensor | None,
    dgrads: Tensor | None,
    given: Tensor | None,
    dgiven: Tensor | None,
) -> Tensor:
    """Gradients with respect to the weights; the others go where they are wanted, but for lanes past N."""
    shape = rule.shape
    steps, numel = grads.shape
    dweights = state.new_empty(sum(weight.numel() for weight in weights))
    packed = pack(rule, weights)
    block, warps = rule.blocking()
    blocks = triton.cdiv(numel, block)
    programs = min(blocks, programs_at_once(rule, steps))
    sums = packed.new_zeros(programs, *packed.shape, dtype=torch.float64)
    workspace = state.new_empty(programs, shape.levels, steps + 1, 2, shape.units, block)
    dgates = state.new_empty(programs, steps, 4, shape.units, block)
    doutputs = None if shape.output == "none" else state.new_empty(programs, steps, block)
    options = {"num_warps": warps} | OPTIONS
    cell, plain = rule.cell(_capability(packed)) | options, rule.blocks() | options
    firsts = [shape.direct and layer == 0 for layer in range(shape.layers)]
    for first_block in range(0, blocks, max(programs, 1)):
        now = min(programs, blocks - first_block)
        where = {"numel": numel, "steps": steps, "first_block": first_block}
        if not shape.direct:
            inputs_kernel[(now,)](state, grads, given, packed, workspace, **where, **plain)
        for layer, first in enumerate(firsts):
            forward_kernel[(now,)](state, grads, packed, workspace, **where, layer=layer, FIRST=first, **cell)
        if doutputs is not None:
            output_backward_kernel[(now,)](
                adjoints, packed, sums, workspace, doutputs, **where, update_scale=rule.update_scale, **plain
            )
        for layer, first in reversed(list(enumerate(firsts))):
            backward_kernel[(now,)](
                grads, packed, dstate, dstate_first, dgrads, workspace, dgates, doutputs, **where, layer=layer,
                FIRST=first, LAST=layer == shape.layers - 1, **cell,
            )  # fmt: skip
            gradient_kernel[(now, 2)](
                grads, packed, sums, workspace, dgates, **where, layer=layer, FIRST=first, PRECISION=rule.precision,
                **plain,
            )  # fmt: skip
        if shape.projected:
            projection_gradient_kernel[(now, 1 + shape.inputs)](given, sums, workspace, **where, **plain)
        to_means = dstate_first if shape.means else None
        if not (shape.direct or dgrads is to_means is dgiven is None):
            inputs_backward_kernel[(now,)](grads, packed, dstate, to_means, dgrads, dgiven, workspace, **where, **plain)
    unpack_kernel[(triton.cdiv(shape.packed_rows, ROWS),)](
        sums, dweights, programs, RULE=shape, ROWS=ROWS, TOGETHER=TOGETHER
    )
    return dweights


def programs_at_once(rule: Rule, steps: int) -> int:
    """Programs of a chunk. The rule, its precision and the steps decide, so sums have one order on any GPU."""
    block, _ = rule.blocking()
    entries = 2 * rule.shape.levels * (steps + 1) + 4 * steps
    size = entries * rule.shape.units * block * rule.dtype.itemsize
    return max(1, min(MOST_PROGRAMS * 64 // block, MOST_WORKSPACE // size))


def _capability(tensor: Tensor) -> tuple[int, int]:
    return torch.cuda.get_device_capability(tensor.device) if tensor.is_cuda else (9, 0)
