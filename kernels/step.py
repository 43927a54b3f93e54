"""One optimizer step of one parameter: features, LSTM and update in one pass over the state."""

import triton
import triton.language as tl

from fastl2l.kernels.cell import cell, extend, features, gate_sums, output, project
from fastl2l.kernels.layout import TILE, lane_offsets, load_constants, load_rows, store_rows, tile_offsets


@triton.jit
def moved(old, update, decay, rate):
    """The parameter after its decay and update, in the wider of both dtypes, then rounded as torch does."""
    if old.dtype == tl.float64:
        WIDER: tl.constexpr = tl.float64
    else:
        WIDER: tl.constexpr = update.dtype
    taken = tl.full([], decay, WIDER)
    if rate is not None:
        taken *= tl.load(rate).to(WIDER)
    new = old.to(WIDER) * (1.0 - taken) + update.to(WIDER)
    if old.dtype != tl.float64:
        new = new.to(tl.float32)  # as torch rounds float64 to 16 bits
    return new.to(old.dtype)


@triton.jit(do_not_specialize=("number", "numel"))
def step_kernel(
    param,
    grad,
    state,  # [tiles, rows, 16]
    given,  # [tiles, rows, 16] or None
    weights,  # packed; see pack.py
    finite,  # a bool: nothing is changed unless it is True; or None
    rate,  # a number that multiplies update_scale and decay, or None
    parameter_units,  # of each parameter a number that multiplies its update, or None
    number,  # the parameter's
    numel: tl.int64,
    update_scale: tl.float64,
    grad_scale: tl.float64,
    decay: tl.float64,
    RULE: tl.constexpr,
    BLOCK: tl.constexpr,
    WIDE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    T: tl.constexpr = weights.dtype.element_ty  # of all that is computed; the state may be stored in bfloat16
    HIDDEN: tl.constexpr = RULE.hidden
    UNITS: tl.constexpr = RULE.units
    LAYERS: tl.constexpr = RULE.layers
    ROWS: tl.constexpr = RULE.state_rows
    start = tl.program_id(0).to(tl.int64) * BLOCK
    lanes = tl.arange(0, BLOCK)
    units = tl.arange(0, UNITS)
    exists = start + lanes < numel
    if finite is not None:
        exists &= tl.load(finite)
    gradient = tl.load(grad + start + lanes, mask=exists, other=0.0).to(T) * tl.full([], grad_scale, T)
    state += start * ROWS
    means_at = state + RULE.lstm_rows * TILE + lane_offsets(lanes, ROWS)
    means = load_rows(means_at, TILE, exists, RULE.means)
    first, second, means = features(gradient, means, load_constants(weights, RULE), RULE)
    if RULE.means > 0:
        tl.debug_barrier()  # several threads have read the same means
        store_rows(means_at, TILE, means, exists, RULE.means)
    if RULE.direct:
        x = tl.zeros([BLOCK, UNITS], T)
    else:
        given_at = start * RULE.given + lane_offsets(lanes, RULE.given)
        x = project(first, second, given, given_at, exists, weights + RULE.projection_row * (2 * UNITS), units, RULE)
    offsets = tile_offsets(lanes, units, ROWS)
    mask = exists[:, None] & (units < HIDDEN)[None, :]
    for layer in tl.static_range(LAYERS):
        h_at = state + offsets + 2 * layer * HIDDEN * TILE
        c_at = h_at + HIDDEN * TILE
        h = tl.load(h_at, mask=mask, other=0.0).to(T)
        h = extend(h, first, second, units, layer == 0 and RULE.direct, HIDDEN)
        i, f, g, o = gate_sums(weights, h, x, layer == 0 and RULE.direct, UNITS, WIDE, PRECISION)
        c = tl.load(c_at, mask=mask, other=0.0).to(T)
        h, c = cell(i, f, g, o, c, units, HIDDEN)
        weights += 8 * UNITS * UNITS
        tl.store(h_at, h, mask=mask)  # rounded to the nearest, if at all
        tl.store(c_at, c, mask=mask)
        x = h
    if RULE.output != "none":
        update = output(extend(x, first, second, units, False, HIDDEN), weights, units, RULE)
        scale = tl.full([], update_scale, T)
        if rate is not None:
            scale *= tl.load(rate)
        update *= scale
        if parameter_units is not None:
            update *= tl.load(parameter_units + number)
        old = tl.load(param + start + lanes, mask=exists)
        tl.store(param + start + lanes, moved(old, update, decay, rate), mask=exists)
