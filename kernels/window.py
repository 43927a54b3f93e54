"""Gradient of a window of truncated BPTT with respect to the rule's weights, to its first state and to the gradients.

Coordinates are taken in chunks of a fixed number of programs, a block of coordinates each. For a chunk the layers go
forward through the whole window, one kernel a layer, and leave h and c of every step in a workspace; then back through
it in the opposite order, each recomputing its gates from them. So no more than one layer's weight gradients are
accumulated at a time, in registers, however many layers there are, and the workspace holds one chunk, whatever N is.
States of every step cost one more pass of the gates; with states that are further apart it would be two, and stored
gates are three times the traffic. Program p adds its weight gradients to the p-th sum, chunk after chunk: the order of
all sums depends on N alone.
"""

import triton
import triton.language as tl

from fastl2l.kernels.cell import (
    activate,
    beside,
    extend,
    features,
    features_backward,
    gate_sums,
    halves,
    sigmoid,
    tanh,
)

TILE = tl.constexpr(16)
SCALARS = ("numel", "steps", "layer", "first_block")


@triton.jit
def tile_offsets(lanes, units, ROWS: tl.constexpr):
    """Of [coordinates, units] in a state [tiles, ROWS, 16]: 16 coordinates of a row are neighbours."""
    return (lanes // TILE * (ROWS * TILE) + lanes % TILE)[:, None] + units[None, :] * TILE


@triton.jit
def entry_at(workspace, layer, t, which, steps, units, lanes, UNITS: tl.constexpr, BLOCK: tl.constexpr):
    """[BLOCK, UNITS]: h (`which` = 0) or c (1) of a layer before step t; there are steps + 1 entries."""
    entry = workspace + ((layer * (steps + 1) + t) * 2 + which).to(tl.int64) * (UNITS * BLOCK)
    return entry + units[None, :] * BLOCK + lanes[:, None]


@triton.jit
def load_gradient(grads, t, numel, lanes, exists):
    return tl.load(grads + t * numel + lanes, mask=exists, other=0.0)


@triton.jit
def layer_inputs(
    h, grads, workspace, layer, t, steps, numel, lanes, units, exists, constant, threshold, slope,
    FIRST: tl.constexpr, LOG_SIGN: tl.constexpr, HIDDEN: tl.constexpr, UNITS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The extended h, and x of step t (in the first layer h again, which nothing reads)."""
    if FIRST:
        gradient = load_gradient(grads, t, numel, lanes, exists)
        first, second = features(gradient, constant, threshold, slope, LOG_SIGN)
        h = extend(h, first, second, units, FIRST, HIDDEN)
        x = h
    else:
        x = tl.load(entry_at(workspace, layer - 1, t + 1, 0, steps, units, lanes, UNITS, BLOCK))
        h = extend(h, h, h, units, FIRST, HIDDEN)
    return h, x


@triton.jit(do_not_specialize=SCALARS)
def forward_kernel(
    state,  # [tiles, rows, 16], before the first step
    grads,  # [steps, numel]
    weights,  # packed; see pack.py
    workspace,  # [programs, layers, steps + 1, h and c, UNITS, BLOCK]
    numel: tl.int64,
    steps: tl.int32,
    layer: tl.int32,
    first_block: tl.int64,
    constant: tl.float64,
    threshold: tl.float64,
    slope: tl.float64,
    FIRST: tl.constexpr,
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
    constant, threshold, slope = tl.full([], constant, T), tl.full([], threshold, T), tl.full([], slope, T)
    lanes = tl.arange(0, BLOCK)
    units = tl.arange(0, UNITS)
    start = (first_block + tl.program_id(0)) * BLOCK
    exists = start + lanes < numel
    grads += start
    weights += layer * (8 * UNITS * UNITS)
    workspace += tl.program_id(0).to(tl.int64) * (steps + 1) * (2 * LAYERS * UNITS * BLOCK)
    h_at = state + start * ROWS + 2 * layer * HIDDEN * TILE + tile_offsets(lanes, units, ROWS)
    mask = exists[:, None] & (units < HIDDEN)[None, :]
    h = tl.load(h_at, mask=mask, other=0.0)
    c = tl.load(h_at + HIDDEN * TILE, mask=mask, other=0.0)
    for t in range(steps):
        tl.store(entry_at(workspace, layer, t, 0, steps, units, lanes, UNITS, BLOCK), h)
        tl.store(entry_at(workspace, layer, t, 1, steps, units, lanes, UNITS, BLOCK), c)
        h, x = layer_inputs(
            h, grads, workspace, layer, t, steps, numel, lanes, units, exists, constant, threshold, slope, FIRST,
            LOG_SIGN, HIDDEN, UNITS, BLOCK,
        )  # fmt: skip
        i, f, g, o = gate_sums(weights, h, x, FIRST, UNITS, WIDE, PRECISION)
        h, c = activate(i, f, g, o, c, units, HIDDEN)
    tl.store(entry_at(workspace, layer, steps, 0, steps, units, lanes, UNITS, BLOCK), h)


@triton.jit
def times_rows(dgate, at, row, column, total, UNITS: tl.constexpr, PRECISION: tl.constexpr):
    """total + dgate W, with as many rows of W from `row` on as dgate has columns."""
    rows = tl.arange(0, dgate.shape[1])[:, None]
    columns = tl.arange(0, total.shape[1])[None, :]
    matrix = tl.load(at + (row + rows) * (2 * UNITS) + column + columns)
    return tl.dot(dgate, matrix, total, input_precision=PRECISION, out_dtype=dgate.dtype)


@triton.jit
def times_columns(di, df, dg, do, at, column, UNITS: tl.constexpr, PRECISION: tl.constexpr):
    """dgates W of UNITS columns."""
    total = tl.zeros(di.shape, di.dtype)
    total = times_rows(di, at, 0, column, total, UNITS, PRECISION)
    total = times_rows(df, at, UNITS, column, total, UNITS, PRECISION)
    total = times_rows(dg, at, 2 * UNITS, column, total, UNITS, PRECISION)
    return times_rows(do, at, 3 * UNITS, column, total, UNITS, PRECISION)


@triton.jit
def times_matrix(
    di, df, dg, do, at, FIRST: tl.constexpr, UNITS: tl.constexpr, WIDE: tl.constexpr, PRECISION: tl.constexpr
):  # fmt: skip
    """dh and dx (in the first layer dh again) from the gates' gradients; WIDE as in gate_sums."""
    if WIDE:
        dinputs = tl.zeros([di.shape[0], UNITS if FIRST else 2 * UNITS], di.dtype)
        dinputs = times_rows(beside(di, df), at, 0, 0, dinputs, UNITS, PRECISION)
        dinputs = times_rows(beside(dg, do), at, 2 * UNITS, 0, dinputs, UNITS, PRECISION)
        if FIRST:
            dh, dx = dinputs, dinputs
        else:
            dh, dx = halves(dinputs)
    else:
        dh = times_columns(di, df, dg, do, at, 0, UNITS, PRECISION)
        dx = dh
        if not FIRST:
            dx = times_columns(di, df, dg, do, at, UNITS, UNITS, PRECISION)
    return dh, dx


@triton.jit
def dgates_at(dgates, t, gate, units, lanes, UNITS: tl.constexpr, BLOCK: tl.constexpr):
    """[units, lanes] of a gate's gradients at step t."""
    return dgates + (t * 4 + gate).to(tl.int64) * (UNITS * BLOCK) + units * BLOCK + lanes


@triton.jit(do_not_specialize=SCALARS)
def backward_kernel(
    grads,  # [steps, numel]
    adjoints,  # [steps, numel]
    weights,  # packed
    dstate,  # [tiles, rows, 16] or None
    dstate_first,  # [tiles, rows, 16] or None
    dgrads,  # [steps, numel] or None
    workspace,
    dgates,  # [programs, steps, i f g o, UNITS, BLOCK]: the layer's, written here
    numel: tl.int64,
    steps: tl.int32,
    layer: tl.int32,
    first_block: tl.int64,
    constant: tl.float64,
    threshold: tl.float64,
    slope: tl.float64,
    update_scale: tl.float64,
    FIRST: tl.constexpr,
    LAST: tl.constexpr,
    LOG_SIGN: tl.constexpr,
    LAYERS: tl.constexpr,
    HIDDEN: tl.constexpr,
    UNITS: tl.constexpr,
    BLOCK: tl.constexpr,
    WIDE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    T: tl.constexpr = workspace.dtype.element_ty
    ROWS: tl.constexpr = 2 * LAYERS * HIDDEN
    LAYER: tl.constexpr = 8 * UNITS * UNITS  # numbers in its packed weights
    constant, threshold, slope = tl.full([], constant, T), tl.full([], threshold, T), tl.full([], slope, T)
    lanes = tl.arange(0, BLOCK)
    units = tl.arange(0, UNITS)
    program = tl.program_id(0).to(tl.int64)
    start = (first_block + program) * BLOCK
    exists = start + lanes < numel
    is_unit = (units < HIDDEN)[None, :]
    grads += start
    weights += layer * LAYER
    workspace += program * (steps + 1) * (2 * LAYERS * UNITS * BLOCK)
    offsets = tile_offsets(lanes, units, ROWS)
    of_layer = start * ROWS + 2 * layer * HIDDEN * TILE
    dh = tl.zeros([BLOCK, UNITS], T)
    dc = tl.zeros([BLOCK, UNITS], T)
    if dstate is not None:
        dh = tl.load(dstate + of_layer + offsets, mask=exists[:, None] & is_unit, other=0.0)
        dc = tl.load(dstate + (of_layer + HIDDEN * TILE) + offsets, mask=exists[:, None] & is_unit, other=0.0)
    dgates += program * steps * (4 * UNITS * BLOCK)
    for back in range(steps):
        t = steps - 1 - back
        tl.debug_barrier()  # below, c of the entry that the last iteration read is overwritten
        h = tl.load(entry_at(workspace, layer, t, 0, steps, units, lanes, UNITS, BLOCK))
        h, x = layer_inputs(
            h, grads, workspace, layer, t, steps, numel, lanes, units, exists, constant, threshold, slope, FIRST,
            LOG_SIGN, HIDDEN, UNITS, BLOCK,
        )  # fmt: skip
        i, f, g, o = gate_sums(weights, h, x, FIRST, UNITS, WIDE, PRECISION)
        i, f, g, o = sigmoid(i), sigmoid(f), tanh(g), sigmoid(o)
        c = tl.load(entry_at(workspace, layer, t, 1, steps, units, lanes, UNITS, BLOCK))
        tanh_c = tanh(tl.fma(f, c, i * g))
        if LAST:
            dupdate = load_gradient(adjoints + start, t, numel, lanes, exists) * tl.full([], update_scale, T)
            dh = tl.fma(dupdate[:, None], tl.load(weights + LAYER + units)[None, :], dh)
        else:
            dh += tl.load(entry_at(workspace, layer + 1, t + 1, 1, steps, units, lanes, UNITS, BLOCK))
        dtanh = dh * o
        dc += tl.fma(-dtanh * tanh_c, tanh_c, dtanh)
        # Infinity in a coordinate makes its padded units NaN; these must not reach the others of its row.
        di = tl.where(is_unit, dc * g * i * (1.0 - i), 0.0)
        df = tl.where(is_unit, dc * c * f * (1.0 - f), 0.0)
        dg = tl.where(is_unit, dc * i * tl.fma(-g, g, tl.full(g.shape, 1.0, T)), 0.0)
        do = tl.where(is_unit, dh * tanh_c * o * (1.0 - o), 0.0)
        dc = tl.where(is_unit, dc * f, 0.0)
        tl.store(dgates_at(dgates, t, 0, units[None, :], lanes[:, None], UNITS, BLOCK), di)
        tl.store(dgates_at(dgates, t, 1, units[None, :], lanes[:, None], UNITS, BLOCK), df)
        tl.store(dgates_at(dgates, t, 2, units[None, :], lanes[:, None], UNITS, BLOCK), dg)
        tl.store(dgates_at(dgates, t, 3, units[None, :], lanes[:, None], UNITS, BLOCK), do)
        dh, dx = times_matrix(di, df, dg, do, weights, FIRST, UNITS, WIDE, PRECISION)
        if not FIRST:
            # For the layer below, in the place of c after this step, which nothing reads any more.
            tl.store(entry_at(workspace, layer, t + 1, 1, steps, units, lanes, UNITS, BLOCK), dx)
        if FIRST and dgrads is not None:
            gradient = load_gradient(grads, t, numel, lanes, exists)
            dfirst = tl.sum(tl.where((units == HIDDEN + 1)[None, :], dh, 0.0), 1)
            dsecond = tl.sum(tl.where((units == HIDDEN + 2)[None, :], dh, 0.0), 1)
            dgradient = features_backward(gradient, dfirst, dsecond, constant, threshold, slope, LOG_SIGN)
            tl.store(dgrads + start + t * numel + lanes, dgradient, mask=exists)
        dh = tl.where(is_unit, dh, 0.0)
    if dstate_first is not None:
        tl.store(dstate_first + of_layer + offsets, dh, mask=exists[:, None] & is_unit)
        tl.store(dstate_first + (of_layer + HIDDEN * TILE) + offsets, dc, mask=exists[:, None] & is_unit)


@triton.jit(do_not_specialize=SCALARS)
def gradient_kernel(
    grads,  # [steps, numel]
    sums,  # [programs, as packed weights] of float64
    workspace,
    dgates,
    numel: tl.int64,
    steps: tl.int32,
    layer: tl.int32,
    first_block: tl.int64,
    constant: tl.float64,
    threshold: tl.float64,
    slope: tl.float64,
    FIRST: tl.constexpr,
    LOG_SIGN: tl.constexpr,
    LAYERS: tl.constexpr,
    HIDDEN: tl.constexpr,
    UNITS: tl.constexpr,
    BLOCK: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Adds dgates^T inputs of one block, for a pair of gates a program."""
    T: tl.constexpr = workspace.dtype.element_ty
    WIDTH: tl.constexpr = UNITS if FIRST else 2 * UNITS
    constant, threshold, slope = tl.full([], constant, T), tl.full([], threshold, T), tl.full([], slope, T)
    lanes = tl.arange(0, BLOCK)
    units = tl.arange(0, UNITS)
    rows = tl.arange(0, 2 * UNITS)
    program = tl.program_id(0).to(tl.int64)
    pair = tl.program_id(1)
    start = (first_block + program) * BLOCK
    exists = start + lanes < numel
    grads += start
    workspace += program * (steps + 1) * (2 * LAYERS * UNITS * BLOCK)
    dgates += program * steps * (4 * UNITS * BLOCK)
    total = tl.zeros([2 * UNITS, WIDTH], T)
    for t in range(steps):
        h = tl.load(entry_at(workspace, layer, t, 0, steps, units, lanes, UNITS, BLOCK))
        h, x = layer_inputs(
            h, grads, workspace, layer, t, steps, numel, lanes, units, exists, constant, threshold, slope, FIRST,
            LOG_SIGN, HIDDEN, UNITS, BLOCK,
        )  # fmt: skip
        dpair = tl.load(dgates_at(dgates, t, 2 * pair, rows[:, None], lanes[None, :], UNITS, BLOCK))
        inputs = h if FIRST else beside(h, x)
        total = tl.dot(dpair, inputs, total, input_precision=PRECISION, out_dtype=T)
    sums += program * ((4 * UNITS * LAYERS + 1) * 2 * UNITS) + (layer * 4 + pair * 2) * (2 * UNITS * UNITS)
    sums += rows[:, None] * (2 * UNITS) + tl.arange(0, WIDTH)[None, :]
    tl.store(sums, tl.load(sums) + total.to(tl.float64))


@triton.jit(do_not_specialize=SCALARS)
def output_gradient_kernel(
    adjoints,  # [steps, numel]
    sums,  # [programs, as packed weights] of float64
    workspace,
    numel: tl.int64,
    steps: tl.int32,
    first_block: tl.int64,
    update_scale: tl.float64,
    LAYERS: tl.constexpr,
    HIDDEN: tl.constexpr,
    UNITS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Adds the gradients of w_out and b_out of one block."""
    T: tl.constexpr = workspace.dtype.element_ty
    lanes = tl.arange(0, BLOCK)
    units = tl.arange(0, UNITS)
    program = tl.program_id(0).to(tl.int64)
    start = (first_block + program) * BLOCK
    exists = start + lanes < numel
    workspace += program * (steps + 1) * (2 * LAYERS * UNITS * BLOCK)
    total = tl.zeros([BLOCK, UNITS], T)
    for t in range(steps):
        dupdate = load_gradient(adjoints + start, t, numel, lanes, exists) * tl.full([], update_scale, T)
        h = tl.load(entry_at(workspace, LAYERS - 1, t + 1, 0, steps, units, lanes, UNITS, BLOCK))
        total = tl.fma(dupdate[:, None], tl.where((units == HIDDEN)[None, :], 1.0, h), total)
    sums += program * ((4 * UNITS * LAYERS + 1) * 2 * UNITS) + LAYERS * (8 * UNITS * UNITS) + units
    tl.store(sums, tl.load(sums) + tl.sum(total.to(tl.float64), 0))
