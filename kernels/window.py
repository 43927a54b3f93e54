"""Gradient of a window of truncated BPTT with respect to the rule's weights, to its first state and to its inputs.

Coordinates are taken in chunks of a fixed number of programs, a block of coordinates each. For a chunk the layers go
forward through the whole window, one kernel a layer, and leave h and c of every step in a workspace; then back through
it in the opposite order, each recomputing its gates from them. So no more than one layer's weight gradients are
accumulated at a time, in registers, however many layers there are, and the workspace holds one chunk, whatever N is.
States of every step cost one more pass of the gates; with states that are further apart it would be two, and stored
gates are three times the traffic. Program p adds its weight gradients to the p-th sum, chunk after chunk: the order of
all sums depends on N alone.

The workspace is [programs, levels, steps + 1, 2, UNITS, BLOCK]. A layer's level has h and c before every step. Below
the first layer is a level more unless that reads features as they are: in the place of h what the first layer reads,
and in that of c a row for each of the features' means, then for each feature.
"""

import triton
import triton.language as tl

from fastl2l.kernels.cell import (
    beside,
    cell,
    cell_backward,
    column,
    extend,
    features,
    features_backward,
    gate_sums,
    halves,
    output_backward,
    project,
    project_backward,
    sigmoid,
    tanh,
)
from fastl2l.kernels.layout import TILE, lane_offsets, load_constants, load_rows, store_rows, tile_offsets, zero_rows

SCALARS = ("numel", "steps", "layer", "first_block")


@triton.jit
def entry_at(workspace, level, t, which, steps, RULE: tl.constexpr, BLOCK: tl.constexpr):
    """h (`which` = 0) or c (1) of a level before step t, [UNITS, BLOCK]; there are steps + 1 entries."""
    return workspace + ((level * (steps + 1) + t) * 2 + which).to(tl.int64) * (RULE.units * BLOCK)


@triton.jit
def load_entry(workspace, level, t, which, steps, units, lanes, RULE: tl.constexpr, BLOCK: tl.constexpr):
    """As [BLOCK, UNITS]."""
    return tl.load(entry_at(workspace, level, t, which, steps, RULE, BLOCK) + units[None, :] * BLOCK + lanes[:, None])


@triton.jit
def store_entry(workspace, level, t, which, steps, units, lanes, x, RULE: tl.constexpr, BLOCK: tl.constexpr):
    at = entry_at(workspace, level, t, which, steps, RULE, BLOCK)
    tl.store(at + units[None, :] * BLOCK + lanes[:, None], x)


@triton.jit
def load_gradient(grads, t, numel, lanes, exists):
    return tl.load(grads + t * numel + lanes, mask=exists, other=0.0)


@triton.jit
def given_offsets(t, numel, start, lanes, GIVEN: tl.constexpr):
    """Of the coordinates' first row at step t in [steps, tiles, GIVEN, 16]."""
    return (t * (tl.cdiv(numel, TILE) * TILE) + start) * GIVEN + lane_offsets(lanes, GIVEN)


@triton.jit
def layer_inputs(
    h, grads, constants, workspace, level, t, steps, numel, lanes, units, exists,
    FIRST: tl.constexpr, RULE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The extended h, and x of step t (in the first layer h again, which nothing reads)."""
    if FIRST:
        gradient = load_gradient(grads, t, numel, lanes, exists)
        first, second, _ = features(gradient, (), constants, RULE)
        h = extend(h, first, second, units, FIRST, RULE.hidden)
        x = h
    else:
        x = load_entry(workspace, level - 1, t + 1, 0, steps, units, lanes, RULE, BLOCK)
        h = extend(h, h, h, units, FIRST, RULE.hidden)
    return h, x


@triton.jit(do_not_specialize=SCALARS)
def inputs_kernel(
    state,  # [tiles, rows, 16], before the first step
    grads,  # [steps, numel]
    given,  # [steps, tiles, rows, 16] or None
    weights,  # packed; see pack.py
    workspace,
    numel: tl.int64,
    steps: tl.int32,
    first_block: tl.int64,
    RULE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """What is below the first layer, of all steps."""
    UNITS: tl.constexpr = RULE.units
    ROWS: tl.constexpr = RULE.state_rows
    constants = load_constants(weights, RULE)
    lanes = tl.arange(0, BLOCK)
    units = tl.arange(0, UNITS)
    start = (first_block + tl.program_id(0)) * BLOCK
    exists = start + lanes < numel
    grads += start
    weights += RULE.projection_row * (2 * UNITS)
    workspace += tl.program_id(0).to(tl.int64) * (steps + 1) * (2 * RULE.levels * UNITS * BLOCK)
    means_at = state + start * ROWS + RULE.lstm_rows * TILE + lane_offsets(lanes, ROWS)
    means = load_rows(means_at, TILE, exists, RULE.means)
    for t in range(steps):
        gradient = load_gradient(grads, t, numel, lanes, exists)
        first, second, means = features(gradient, means, constants, RULE)
        at = given_offsets(t, numel, start, lanes, RULE.given)
        x = project(first, second, given, at, exists, weights, units, RULE)
        store_entry(workspace, 0, t + 1, 0, steps, units, lanes, x, RULE, BLOCK)
        rows_at = entry_at(workspace, 0, t + 1, 1, steps, RULE, BLOCK) + lanes
        store_rows(rows_at, BLOCK, means + (first, second), exists, RULE.means + 2)


@triton.jit(do_not_specialize=SCALARS)
def forward_kernel(
    state,  # [tiles, rows, 16], before the first step
    grads,  # [steps, numel]
    weights,  # packed; see pack.py
    workspace,
    numel: tl.int64,
    steps: tl.int32,
    first_block: tl.int64,
    layer: tl.int32,
    FIRST: tl.constexpr,
    RULE: tl.constexpr,
    BLOCK: tl.constexpr,
    WIDE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    HIDDEN: tl.constexpr = RULE.hidden
    UNITS: tl.constexpr = RULE.units
    ROWS: tl.constexpr = RULE.state_rows
    constants = load_constants(weights, RULE)
    level = layer + RULE.first_level
    lanes = tl.arange(0, BLOCK)
    units = tl.arange(0, UNITS)
    start = (first_block + tl.program_id(0)) * BLOCK
    exists = start + lanes < numel
    grads += start
    weights += layer * (8 * UNITS * UNITS)
    workspace += tl.program_id(0).to(tl.int64) * (steps + 1) * (2 * RULE.levels * UNITS * BLOCK)
    h_at = state + start * ROWS + 2 * layer * HIDDEN * TILE + tile_offsets(lanes, units, ROWS)
    mask = exists[:, None] & (units < HIDDEN)[None, :]
    h = tl.load(h_at, mask=mask, other=0.0)
    c = tl.load(h_at + HIDDEN * TILE, mask=mask, other=0.0)
    for t in range(steps):
        store_entry(workspace, level, t, 0, steps, units, lanes, h, RULE, BLOCK)
        store_entry(workspace, level, t, 1, steps, units, lanes, c, RULE, BLOCK)
        h, x = layer_inputs(
            h, grads, constants, workspace, level, t, steps, numel, lanes, units, exists, FIRST, RULE, BLOCK
        )
        i, f, g, o = gate_sums(weights, h, x, FIRST, UNITS, WIDE, PRECISION)
        h, c = cell(i, f, g, o, c, units, HIDDEN)
    store_entry(workspace, level, steps, 0, steps, units, lanes, h, RULE, BLOCK)


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
    weights,  # packed
    dstate,  # [tiles, rows, 16] or None
    dstate_first,  # [tiles, rows, 16] or None
    dgrads,  # [steps, numel] or None
    workspace,
    dgates,  # [programs, steps, i f g o, UNITS, BLOCK]: the layer's, written here
    doutputs,  # [programs, steps, BLOCK], or None if there is no output
    numel: tl.int64,
    steps: tl.int32,
    first_block: tl.int64,
    layer: tl.int32,
    FIRST: tl.constexpr,
    LAST: tl.constexpr,
    RULE: tl.constexpr,
    BLOCK: tl.constexpr,
    WIDE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    T: tl.constexpr = workspace.dtype.element_ty
    HIDDEN: tl.constexpr = RULE.hidden
    UNITS: tl.constexpr = RULE.units
    ROWS: tl.constexpr = RULE.state_rows
    LAYER: tl.constexpr = 8 * UNITS * UNITS  # numbers in its packed weights
    constants = load_constants(weights, RULE)
    level = layer + RULE.first_level
    lanes = tl.arange(0, BLOCK)
    units = tl.arange(0, UNITS)
    program = tl.program_id(0).to(tl.int64)
    start = (first_block + program) * BLOCK
    exists = start + lanes < numel
    is_unit = (units < HIDDEN)[None, :]
    grads += start
    weights += layer * LAYER
    workspace += program * (steps + 1) * (2 * RULE.levels * UNITS * BLOCK)
    offsets = tile_offsets(lanes, units, ROWS)
    of_layer = start * ROWS + 2 * layer * HIDDEN * TILE
    dh = tl.zeros([BLOCK, UNITS], T)
    dc = tl.zeros([BLOCK, UNITS], T)
    if dstate is not None:
        dh = tl.load(dstate + of_layer + offsets, mask=exists[:, None] & is_unit, other=0.0)
        dc = tl.load(dstate + (of_layer + HIDDEN * TILE) + offsets, mask=exists[:, None] & is_unit, other=0.0)
    dgates += program * steps * (4 * UNITS * BLOCK)
    if doutputs is not None:
        doutputs += program * steps * BLOCK
    for back in range(steps):
        t = steps - 1 - back
        tl.debug_barrier()  # below, c of the entry that the last iteration read is overwritten
        h = load_entry(workspace, level, t, 0, steps, units, lanes, RULE, BLOCK)
        h, x = layer_inputs(
            h, grads, constants, workspace, level, t, steps, numel, lanes, units, exists, FIRST, RULE, BLOCK
        )
        i, f, g, o = gate_sums(weights, h, x, FIRST, UNITS, WIDE, PRECISION)
        i, f, g, o = sigmoid(i), sigmoid(f), tanh(g), sigmoid(o)
        c = load_entry(workspace, level, t, 1, steps, units, lanes, RULE, BLOCK)
        tanh_c = tanh(tl.fma(f, c, i * g))
        if not LAST:
            dh += load_entry(workspace, level + 1, t + 1, 1, steps, units, lanes, RULE, BLOCK)
        elif doutputs is not None:
            doutput = tl.load(doutputs + t * BLOCK + lanes)
            dh = tl.fma(doutput[:, None], tl.load(weights + LAYER + units)[None, :], dh)
        di, df, dg, do, dc = cell_backward(i, f, g, o, c, tanh_c, dh, dc, is_unit)
        tl.store(dgates_at(dgates, t, 0, units[None, :], lanes[:, None], UNITS, BLOCK), di)
        tl.store(dgates_at(dgates, t, 1, units[None, :], lanes[:, None], UNITS, BLOCK), df)
        tl.store(dgates_at(dgates, t, 2, units[None, :], lanes[:, None], UNITS, BLOCK), dg)
        tl.store(dgates_at(dgates, t, 3, units[None, :], lanes[:, None], UNITS, BLOCK), do)
        dh, dx = times_matrix(di, df, dg, do, weights, FIRST, UNITS, WIDE, PRECISION)
        if not FIRST:
            # For the level below, in the place of c after this step, which nothing reads any more.
            store_entry(workspace, level, t + 1, 1, steps, units, lanes, dx, RULE, BLOCK)
        if FIRST and dgrads is not None:
            gradient = load_gradient(grads, t, numel, lanes, exists)
            dfirst, dsecond = column(dh, units, HIDDEN + 1), column(dh, units, HIDDEN + 2)
            dgradient, _ = features_backward(gradient, (), dfirst, dsecond, (), constants, RULE)
            tl.store(dgrads + start + t * numel + lanes, dgradient, mask=exists)
        dh = tl.where(is_unit, dh, 0.0)
    if dstate_first is not None:
        tl.store(dstate_first + of_layer + offsets, dh, mask=exists[:, None] & is_unit)
        tl.store(dstate_first + (of_layer + HIDDEN * TILE) + offsets, dc, mask=exists[:, None] & is_unit)


@triton.jit(do_not_specialize=SCALARS)
def gradient_kernel(
    grads,  # [steps, numel]
    weights,  # packed
    sums,  # [programs, as packed weights] of float64
    workspace,
    dgates,
    numel: tl.int64,
    steps: tl.int32,
    first_block: tl.int64,
    layer: tl.int32,
    FIRST: tl.constexpr,
    RULE: tl.constexpr,
    BLOCK: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Adds dgates^T inputs of one block, for a pair of gates a program."""
    T: tl.constexpr = workspace.dtype.element_ty
    UNITS: tl.constexpr = RULE.units
    WIDTH: tl.constexpr = UNITS if FIRST else 2 * UNITS
    constants = load_constants(weights, RULE)
    level = layer + RULE.first_level
    lanes = tl.arange(0, BLOCK)
    units = tl.arange(0, UNITS)
    rows = tl.arange(0, 2 * UNITS)
    program = tl.program_id(0).to(tl.int64)
    pair = tl.program_id(1)
    start = (first_block + program) * BLOCK
    exists = start + lanes < numel
    grads += start
    workspace += program * (steps + 1) * (2 * RULE.levels * UNITS * BLOCK)
    dgates += program * steps * (4 * UNITS * BLOCK)
    total = tl.zeros([2 * UNITS, WIDTH], T)
    for t in range(steps):
        h = load_entry(workspace, level, t, 0, steps, units, lanes, RULE, BLOCK)
        h, x = layer_inputs(
            h, grads, constants, workspace, level, t, steps, numel, lanes, units, exists, FIRST, RULE, BLOCK
        )
        dpair = tl.load(dgates_at(dgates, t, 2 * pair, rows[:, None], lanes[None, :], UNITS, BLOCK))
        inputs = h if FIRST else beside(h, x)
        total = tl.dot(dpair, inputs, total, input_precision=PRECISION, out_dtype=T)
    sums += program * (RULE.packed_rows * 2 * UNITS) + (layer * 4 + pair * 2) * (2 * UNITS * UNITS)
    sums += rows[:, None] * (2 * UNITS) + tl.arange(0, WIDTH)[None, :]
    tl.store(sums, tl.load(sums) + total.to(tl.float64))


@triton.jit(do_not_specialize=SCALARS)
def output_backward_kernel(
    adjoints,  # [steps, numel]
    weights,  # packed
    sums,  # [programs, as packed weights] of float64
    workspace,
    doutputs,  # [programs, steps, BLOCK]: gradients of w_out h + b_out, written here
    numel: tl.int64,
    steps: tl.int32,
    first_block: tl.int64,
    update_scale: tl.float64,
    RULE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The way back through the output; adds the gradients of w_out and b_out of one block."""
    T: tl.constexpr = workspace.dtype.element_ty
    UNITS: tl.constexpr = RULE.units
    lanes = tl.arange(0, BLOCK)
    units = tl.arange(0, UNITS)
    program = tl.program_id(0).to(tl.int64)
    start = (first_block + program) * BLOCK
    exists = start + lanes < numel
    weights += RULE.output_row * (2 * UNITS)
    workspace += program * (steps + 1) * (2 * RULE.levels * UNITS * BLOCK)
    total = tl.zeros([BLOCK, UNITS], T)
    for t in range(steps):
        doutput = load_gradient(adjoints + start, t, numel, lanes, exists) * tl.full([], update_scale, T)
        h = load_entry(workspace, RULE.levels - 1, t + 1, 0, steps, units, lanes, RULE, BLOCK)
        h = extend(h, h, h, units, False, RULE.hidden)
        doutput = output_backward(h, doutput, weights, units, RULE)
        tl.store(doutputs + (program * steps + t) * BLOCK + lanes, doutput)
        total = tl.fma(doutput[:, None], h, total)
    sums += (program * RULE.packed_rows + RULE.output_row) * (2 * UNITS) + units
    tl.store(sums, tl.load(sums) + tl.sum(total.to(tl.float64), 0))


@triton.jit
def load_dprojection(workspace, t, steps, units, lanes, RULE: tl.constexpr, BLOCK: tl.constexpr):
    """Gradients of the projection's sums, or without one of what the first layer reads, at step t."""
    x = load_entry(workspace, 0, t + 1, 0, steps, units, lanes, RULE, BLOCK)
    dx = load_entry(workspace, 1, t + 1, 1, steps, units, lanes, RULE, BLOCK)
    return project_backward(x, dx, units, RULE)


@triton.jit(do_not_specialize=SCALARS)
def projection_gradient_kernel(
    given,  # [steps, tiles, rows, 16] or None
    sums,  # [programs, as packed weights] of float64
    workspace,
    numel: tl.int64,
    steps: tl.int32,
    first_block: tl.int64,
    RULE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Adds the gradients of the projection's weights of one block, for its bias or one input a program."""
    T: tl.constexpr = workspace.dtype.element_ty
    UNITS: tl.constexpr = RULE.units
    COUNT: tl.constexpr = RULE.feature_count
    lanes = tl.arange(0, BLOCK)
    units = tl.arange(0, UNITS)
    program = tl.program_id(0).to(tl.int64)
    start = (first_block + program) * BLOCK
    exists = start + lanes < numel
    k = tl.program_id(1) - 1  # the input; -1 is the bias
    workspace += program * (steps + 1) * (2 * RULE.levels * UNITS * BLOCK)
    total = tl.zeros([BLOCK, UNITS], T)
    for t in range(steps):
        at = entry_at(workspace, 0, t + 1, 1, steps, RULE, BLOCK) + (RULE.means + k) * BLOCK + lanes
        input = tl.load(at, mask=exists & (k >= 0) & (k < COUNT), other=0.0)
        if RULE.given > 0:
            at = given + given_offsets(t, numel, start, lanes, RULE.given) + (k - COUNT) * TILE
            input = tl.where(k < COUNT, input, tl.load(at, mask=exists & (k >= COUNT), other=0.0))
        input = tl.where(k < 0, 1.0, input)
        dsums = load_dprojection(workspace, t, steps, units, lanes, RULE, BLOCK)
        total = tl.fma(dsums, input[:, None], total)
    sums += (program * RULE.packed_rows + RULE.projection_row + 1 + k) * (2 * UNITS) + units
    tl.store(sums, tl.load(sums) + tl.sum(total.to(tl.float64), 0))


@triton.jit
def dinput(dsums, weights, units, k, RULE: tl.constexpr):
    """Gradient of input k, [coordinates]."""
    if RULE.projected > 0:
        found = tl.sum(dsums * tl.load(weights + (1 + k) * (2 * RULE.units) + units)[None, :], 1)
    else:
        found = column(dsums, units, k)
    return found


@triton.jit(do_not_specialize=SCALARS)
def inputs_backward_kernel(
    grads,  # [steps, numel]
    weights,  # packed
    dstate,  # [tiles, rows, 16] or None
    dstate_first,  # [tiles, rows, 16] or None
    dgrads,  # [steps, numel] or None
    dgiven,  # [steps, tiles, rows, 16] or None
    workspace,
    numel: tl.int64,
    steps: tl.int32,
    first_block: tl.int64,
    RULE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """From what the first layer reads to gradients, given rows and the features' means."""
    COUNT: tl.constexpr = RULE.feature_count
    UNITS: tl.constexpr = RULE.units
    ROWS: tl.constexpr = RULE.state_rows
    constants = load_constants(weights, RULE)
    lanes = tl.arange(0, BLOCK)
    units = tl.arange(0, UNITS)
    program = tl.program_id(0).to(tl.int64)
    start = (first_block + program) * BLOCK
    exists = start + lanes < numel
    grads += start
    weights += RULE.projection_row * (2 * UNITS)
    workspace += program * (steps + 1) * (2 * RULE.levels * UNITS * BLOCK)
    means_at = start * ROWS + RULE.lstm_rows * TILE + lane_offsets(lanes, ROWS)
    if dstate is not None:
        dmeans = load_rows(dstate + means_at, TILE, exists, RULE.means)
    else:
        dmeans = zero_rows(BLOCK, workspace.dtype.element_ty, RULE.means)
    for back in range(steps):
        t = steps - 1 - back
        dsums = load_dprojection(workspace, t, steps, units, lanes, RULE, BLOCK)
        dfirst, dsecond = tl.zeros([BLOCK], dsums.dtype), tl.zeros([BLOCK], dsums.dtype)
        if COUNT > 0:
            dfirst = dinput(dsums, weights, units, 0, RULE)
        if COUNT > 1:
            dsecond = dinput(dsums, weights, units, 1, RULE)
        if dgiven is not None:
            at = dgiven + given_offsets(t, numel, start, lanes, RULE.given)
            for k in range(RULE.given):
                tl.store(at + k * TILE, dinput(dsums, weights, units, COUNT + k, RULE), mask=exists)
        means = load_rows(entry_at(workspace, 0, t + 1, 1, steps, RULE, BLOCK) + lanes, BLOCK, exists, RULE.means)
        gradient = load_gradient(grads, t, numel, lanes, exists)
        dgradient, dmeans = features_backward(gradient, means, dfirst, dsecond, dmeans, constants, RULE)
        if dgrads is not None:
            tl.store(dgrads + start + t * numel + lanes, dgradient, mask=exists)
    if dstate_first is not None:
        store_rows(dstate_first + means_at, TILE, dmeans, exists, RULE.means)
