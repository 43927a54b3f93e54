"""Weights as the kernels read them: a matrix a layer, padded with zeros; and the way back.

A layer is [i, f, g, o][units] rows of [units of h, units of x]. The column after the hidden units of h is the bias,
and the two after that are the first layer's W_ih, which has no x. After the layers comes a row of w_out, with b_out in
the column after it. Gradients are summed in the same order.
"""

import triton
import triton.language as tl


@triton.jit
def position(
    rows, columns, FEATURES: tl.constexpr, LAYERS: tl.constexpr, HIDDEN: tl.constexpr, UNITS: tl.constexpr
):  # fmt: skip
    """Where packed numbers are among the flat weights (LSTMConfig.weight_shapes), and which of them are."""
    FIRST: tl.constexpr = 4 * HIDDEN * (FEATURES + HIDDEN + 1)
    OTHER: tl.constexpr = 4 * HIDDEN * (2 * HIDDEN + 1)
    layer = rows // (4 * UNITS)
    unit = rows % UNITS
    row = rows // UNITS % 4 * HIDDEN + unit
    is_first = layer == 0
    inputs = tl.where(is_first, FEATURES, HIDDEN)
    w_ih = tl.where(is_first, 0, FIRST + (layer - 1) * OTHER)
    w_hh = w_ih + 4 * HIDDEN * inputs
    bias = w_hh + 4 * HIDDEN * HIDDEN
    # Which input of W_ih a column is: of the first layer a feature, of the others x.
    input = columns - tl.where(is_first, HIDDEN + 1, UNITS)
    place = w_ih + row * inputs + input
    place = tl.where(columns == HIDDEN, bias + row, place)
    place = tl.where(columns < HIDDEN, w_hh + row * HIDDEN + columns, place)
    exists = (unit < HIDDEN) & ((columns <= HIDDEN) | ((input >= 0) & (input < inputs)))
    is_out = rows == 4 * UNITS * LAYERS
    exists = tl.where(rows < 4 * UNITS * LAYERS, exists, is_out & (columns <= HIDDEN))
    return tl.where(is_out, w_ih + columns, place), exists


@triton.jit
def pack_kernel(
    weights,
    packed,
    FEATURES: tl.constexpr,
    LAYERS: tl.constexpr,
    HIDDEN: tl.constexpr,
    UNITS: tl.constexpr,
    ROWS: tl.constexpr,
):
    """A program packs ROWS rows."""
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)[:, None]
    columns = tl.arange(0, 2 * UNITS)[None, :]
    place, exists = position(rows, columns, FEATURES, LAYERS, HIDDEN, UNITS)
    inside = rows <= 4 * UNITS * LAYERS
    tl.store(packed + rows * (2 * UNITS) + columns, tl.load(weights + place, mask=exists, other=0.0), mask=inside)


@triton.jit(do_not_specialize=["programs"])
def unpack_kernel(
    sums,  # [programs, as packed weights]
    dweights,
    programs: tl.int32,
    FEATURES: tl.constexpr,
    LAYERS: tl.constexpr,
    HIDDEN: tl.constexpr,
    UNITS: tl.constexpr,
    ROWS: tl.constexpr,
    TOGETHER: tl.constexpr,
):
    """The programs' sums of ROWS rows, added in an order that their number alone decides."""
    numbers = tl.program_id(0) * (ROWS * 2 * UNITS) + tl.arange(0, ROWS * 2 * UNITS)
    place, exists = position(numbers // (2 * UNITS), numbers % (2 * UNITS), FEATURES, LAYERS, HIDDEN, UNITS)
    SIZE: tl.constexpr = (4 * UNITS * LAYERS + 1) * 2 * UNITS
    total = tl.zeros([TOGETHER, ROWS * 2 * UNITS], tl.float64)
    for first in range(0, programs, TOGETHER):
        each = first + tl.arange(0, TOGETHER)[:, None]
        mask = (each < programs) & exists[None, :]
        total += tl.load(sums + each.to(tl.int64) * SIZE + numbers[None, :], mask=mask, other=0.0)
    tl.store(dweights + place, tl.sum(total, 0).to(dweights.dtype.element_ty), mask=exists)
