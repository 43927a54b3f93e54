"""Weights as the kernels read them: a matrix a layer, padded with zeros; and the way back.

A layer is [i, f, g, o][units] rows of [units of h, units of x]. The column after the hidden units of h is the bias,
and the two after that are W_ih of a first layer that reads features itself, and has no x. After the layers comes a row
of w_out, with b_out in the column after it; a row of the features' constants; and the projection: its bias, then a row
for each input. Gradients are summed in the same order.
"""

import triton
import triton.language as tl


@triton.jit
def position(rows, columns, RULE: tl.constexpr):
    """Where packed numbers are among the flat weights (RuleConfig.weight_shapes), and which of them are."""
    LAYERS: tl.constexpr = RULE.layers
    HIDDEN: tl.constexpr = RULE.hidden
    UNITS: tl.constexpr = RULE.units
    INPUTS: tl.constexpr = RULE.inputs
    PROJECTED: tl.constexpr = RULE.projected
    BEFORE: tl.constexpr = PROJECTED * (INPUTS + 1)
    FIRST: tl.constexpr = 4 * HIDDEN * (RULE.entering + HIDDEN + 1)
    OTHER: tl.constexpr = 4 * HIDDEN * (2 * HIDDEN + 1)
    layer = rows // (4 * UNITS)
    unit = rows % UNITS
    row = rows // UNITS % 4 * HIDDEN + unit
    is_first = layer == 0
    inputs = tl.where(is_first, RULE.entering, HIDDEN)
    w_ih = BEFORE + tl.where(is_first, 0, FIRST + (layer - 1) * OTHER)
    w_hh = w_ih + 4 * HIDDEN * inputs
    bias = w_hh + 4 * HIDDEN * HIDDEN
    # Which input of W_ih a column is: a feature beside h, or of x.
    input = columns - (tl.where(is_first, HIDDEN + 1, UNITS) if RULE.direct else UNITS)
    place = w_ih + row * inputs + input
    place = tl.where(columns == HIDDEN, bias + row, place)
    place = tl.where(columns < HIDDEN, w_hh + row * HIDDEN + columns, place)
    exists = (unit < HIDDEN) & ((columns <= HIDDEN) | ((input >= 0) & (input < inputs)))
    is_layer = rows < RULE.output_row
    is_out = (rows == RULE.output_row) & (RULE.output != "none")
    place = tl.where(is_layer, place, BEFORE + FIRST + (LAYERS - 1) * OTHER + columns)
    exists = tl.where(is_layer, exists, is_out & (columns <= HIDDEN))
    k = rows - RULE.projection_row - 1  # an input of the projection; -1 is its bias
    is_projection = (k >= -1) & (k < INPUTS)
    place = tl.where(is_projection, tl.where(k < 0, PROJECTED * INPUTS + columns, columns * INPUTS + k), place)
    return place, tl.where(is_projection, columns < PROJECTED, exists)


@triton.jit
def pack_kernel(
    weights,
    packed,
    constant0: tl.float64,
    constant1: tl.float64,
    constant2: tl.float64,
    constant3: tl.float64,
    constant4: tl.float64,
    RULE: tl.constexpr,
    ROWS: tl.constexpr,
):
    """A program packs ROWS rows."""
    T: tl.constexpr = packed.dtype.element_ty
    STRIDE: tl.constexpr = 2 * RULE.units
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)[:, None]
    columns = tl.arange(0, STRIDE)[None, :]
    place, exists = position(rows, columns, RULE)
    numbers = tl.load(weights + place, mask=exists, other=0.0)
    is_constant = rows == RULE.constants_row
    numbers = tl.where(is_constant & (columns == 0), tl.full([], constant0, T), numbers)
    numbers = tl.where(is_constant & (columns == 1), tl.full([], constant1, T), numbers)
    numbers = tl.where(is_constant & (columns == 2), tl.full([], constant2, T), numbers)
    numbers = tl.where(is_constant & (columns == 3), tl.full([], constant3, T), numbers)
    numbers = tl.where(is_constant & (columns == 4), tl.full([], constant4, T), numbers)
    tl.store(packed + rows * STRIDE + columns, numbers, mask=rows < RULE.packed_rows)


@triton.jit(do_not_specialize=["programs"])
def unpack_kernel(
    sums,  # [programs, as packed weights]
    dweights,
    programs: tl.int32,
    RULE: tl.constexpr,
    ROWS: tl.constexpr,
    TOGETHER: tl.constexpr,
):
    """The programs' sums of ROWS rows, added in an order that their number alone decides."""
    STRIDE: tl.constexpr = 2 * RULE.units
    numbers = tl.program_id(0) * (ROWS * STRIDE) + tl.arange(0, ROWS * STRIDE)
    place, exists = position(numbers // STRIDE, numbers % STRIDE, RULE)
    SIZE: tl.constexpr = RULE.packed_rows * STRIDE
    total = tl.zeros([TOGETHER, ROWS * STRIDE], tl.float64)
    for first in range(0, programs, TOGETHER):
        each = first + tl.arange(0, TOGETHER)[:, None]
        mask = (each < programs) & exists[None, :]
        total += tl.load(sums + each.to(tl.int64) * SIZE + numbers[None, :], mask=mask, other=0.0)
    tl.store(dweights + place, tl.sum(total, 0).to(dweights.dtype.element_ty), mask=exists)
