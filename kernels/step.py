"""One optimizer step of one parameter: features, LSTM and update in one pass over the state."""

import triton
import triton.language as tl

from fastl2l.kernels.cell import activate, extend, features, gate_sums

TILE = tl.constexpr(16)


@triton.jit(do_not_specialize=("numel",))
def step_kernel(
    param,
    grad,
    state,  # [tiles, rows, 16]
    weights,  # packed; see pack.py
    finite,  # a bool: nothing is changed unless it is True; or None
    numel: tl.int64,
    constant: tl.float64,
    threshold: tl.float64,
    slope: tl.float64,
    update_scale: tl.float64,
    grad_scale: tl.float64,
    LOG_SIGN: tl.constexpr,
    LAYERS: tl.constexpr,
    HIDDEN: tl.constexpr,
    UNITS: tl.constexpr,
    BLOCK: tl.constexpr,
    WIDE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    T: tl.constexpr = state.dtype.element_ty
    ROWS: tl.constexpr = 2 * LAYERS * HIDDEN
    start = tl.program_id(0).to(tl.int64) * BLOCK
    lanes = tl.arange(0, BLOCK)
    units = tl.arange(0, UNITS)
    exists = start + lanes < numel
    if finite is not None:
        exists &= tl.load(finite)
    gradient = tl.load(grad + start + lanes, mask=exists, other=0.0).to(T) * tl.full([], grad_scale, T)
    first, second = features(
        gradient, tl.full([], constant, T), tl.full([], threshold, T), tl.full([], slope, T), LOG_SIGN
    )
    # 16 coordinates of a row are neighbours: a thread loads four, a warp whole lines.
    state += start * ROWS
    offsets = (lanes // TILE * (ROWS * TILE) + lanes % TILE)[:, None] + units[None, :] * TILE
    mask = exists[:, None] & (units < HIDDEN)[None, :]
    x = tl.zeros([BLOCK, UNITS], T)
    for layer in tl.static_range(LAYERS):
        h_at = state + offsets + 2 * layer * HIDDEN * TILE
        c_at = h_at + HIDDEN * TILE
        h = tl.load(h_at, mask=mask, other=0.0)
        h = extend(h, first, second, units, layer == 0, HIDDEN)
        i, f, g, o = gate_sums(weights, h, x, layer == 0, UNITS, WIDE, PRECISION)
        c = tl.load(c_at, mask=mask, other=0.0)
        h, c = activate(i, f, g, o, c, units, HIDDEN)
        weights += 8 * UNITS * UNITS
        tl.store(h_at, h, mask=mask)
        tl.store(c_at, c, mask=mask)
        x = h
    update = tl.sum(tl.where((units == HIDDEN)[None, :], 1.0, x) * tl.load(weights + units)[None, :], 1)
    update *= tl.full([], update_scale, T)
    old = tl.load(param + start + lanes, mask=exists)
    if old.dtype == tl.float64:
        new = old + update.to(tl.float64)
    else:
        new = (old.to(T) + update).to(tl.float32).to(old.dtype)  # as torch rounds float64 to 16 bits
    tl.store(param + start + lanes, new, mask=exists)
