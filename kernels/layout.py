"""Where the numbers of coordinates lie: in tiles, [tiles, rows, 16], whose rows of 16 are neighbours."""

import triton
import triton.language as tl

TILE = tl.constexpr(16)


@triton.jit
def lane_offsets(lanes, ROWS: tl.constexpr):
    """Of the first row of coordinates in [tiles, ROWS, 16]."""
    return lanes // TILE * (ROWS * TILE) + lanes % TILE


@triton.jit
def tile_offsets(lanes, units, ROWS: tl.constexpr):
    """Of [coordinates, units] in [tiles, ROWS, 16]: a thread loads four, a warp whole lines."""
    return lane_offsets(lanes, ROWS)[:, None] + units[None, :] * TILE


@triton.jit
def load_rows(at, stride, mask, COUNT: tl.constexpr):
    """A tuple of COUNT rows, [coordinates] each, the first of which is at `at`."""
    rows = ()
    for i in tl.static_range(COUNT):
        rows = rows + (tl.load(at + i * stride, mask=mask, other=0.0),)
    return rows


@triton.jit
def store_rows(at, stride, rows, mask, COUNT: tl.constexpr):
    for i in tl.static_range(COUNT):
        tl.store(at + i * stride, rows[i], mask=mask)


@triton.jit
def zero_rows(LANES: tl.constexpr, T: tl.constexpr, COUNT: tl.constexpr):
    rows = ()
    for _ in tl.static_range(COUNT):
        rows = rows + (tl.zeros([LANES], T),)
    return rows


@triton.jit
def load_constants(weights, RULE: tl.constexpr):
    """Those of the features, from a rule's packed weights."""
    at = weights + RULE.constants_row * (2 * RULE.units)
    return tl.load(at), tl.load(at + 1), tl.load(at + 2), tl.load(at + 3), tl.load(at + 4)
