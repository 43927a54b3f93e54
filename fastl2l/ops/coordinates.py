"""Where the coordinates of a state lie, which function each belongs to, and means over those of a function."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from fastl2l.ops.layout import TILE, from_rows, tiles_of, to_rows
from fastl2l.processes import ProcessError


@dataclass(frozen=True)
class Coordinates:
    """All coordinates that know of each other, or several functions' side by side, each of which is by itself.

    Args:
        tensors: sizes of the tensors whose states lie one after the other, each from a tile of its own on.
        parts: sizes of the parts that they are made of, in each of which functions lie side by side.
        functions: how many there are, all with as many coordinates.
        groups: of processes that have other coordinates of the one function; each of them takes every mean together.

    Raises:
        ValueError: functions are not of one size.
    """

    tensors: tuple[int, ...]
    parts: tuple[int, ...] = ()
    functions: int = 1
    groups: tuple[dist.ProcessGroup, ...] = ()

    def __post_init__(self) -> None:
        parts = self.parts or (sum(self.tensors),)
        if any(part % self.functions for part in parts):
            raise ValueError(
                f"problem: expected {self.functions} functions with as many coordinates each, got parts of "
                f"{', '.join(map(str, parts))} coordinates"
            )
        object.__setattr__(self, "parts", parts)

    @property
    def numel(self) -> int:
        """How many there are."""
        return sum(self.tensors)

    @property
    def dim(self) -> int:
        """How many a function has."""
        return self.numel // self.functions

    # Between tiles [tiles, rows, 16], rows [rows, N] and functions [rows, functions, dim]

    def rows(self, tiles: Tensor) -> Tensor:
        """[tiles, rows, 16] as [rows, N]."""
        if self._filled:
            return to_rows(tiles, self.numel)
        return to_rows(tiles, len(tiles) * TILE)[:, _lanes(self.tensors, tiles.device)]

    def tiles(self, rows: Tensor) -> Tensor:
        """The inverse of :meth:`rows`, with zeros in lanes that are no coordinate's."""
        if self._filled:
            return from_rows(rows)
        lanes = _lanes(self.tensors, rows.device)
        return from_rows(rows.new_zeros(len(rows), sum(map(tiles_of, self.tensors)) * TILE).index_copy(1, lanes, rows))

    def by_function(self, rows: Tensor) -> Tensor:
        """[rows, N] as [rows, functions, dim]."""
        if len(self.parts) == 1:  # a view, whose way back is one
            return rows.unflatten(-1, (self.functions, self.dim))
        sizes = [(self.functions, part // self.functions) for part in self.parts]
        pieces = [part.unflatten(-1, size) for part, size in zip(rows.split(self.parts, -1), sizes, strict=True)]
        return torch.cat(pieces, -1)

    def flat(self, functions: Tensor) -> Tensor:
        """The inverse of :meth:`by_function`."""
        if len(self.parts) == 1:
            return functions.flatten(-2)
        pieces = functions.split([part // self.functions for part in self.parts], -1)
        return torch.cat([piece.flatten(-2) for piece in pieces], -1)

    # Means

    def means(self, tiles: Tensor) -> Tensor:
        """The means of rows [tiles, rows, 16] over each function's coordinates, [rows, functions, 1].

        They are summed in float64, so that they hardly depend on where and in how many threads that is done.
        """
        if self.functions == 1 and self._filled:  # where they are, which spares a copy
            whole, rest = divmod(self.numel, TILE)
            total = tiles[:whole].sum((0, 2), dtype=torch.float64)
            total = total + tiles[whole:, :, :rest].sum((0, 2), dtype=torch.float64)
            return mean_of(total, self.dim, self.groups).to(tiles.dtype).view(-1, 1, 1)
        rows = self.by_function(self.rows(tiles))
        total = rows.sum(-1, keepdim=True, dtype=torch.float64)
        return mean_of(total, self.dim, self.groups).to(tiles.dtype)

    def of_each(self, means: Tensor) -> Tensor:
        """[rows, functions, 1] as what each coordinate has of it: something that can be expanded to its tiles."""
        if self.functions == 1:
            return means.view(1, -1, 1)
        return self.tiles(self.flat(means.expand(-1, -1, self.dim)))

    @property
    def _filled(self) -> bool:
        """Whether no tile but the last has lanes that are no coordinate's."""
        return not any(size % TILE for size in self.tensors[:-1])


def mean_of(total: Tensor, count: int, groups: Sequence[dist.ProcessGroup]) -> Tensor:
    """The means of so many numbers here, whose sums are `total`, and of those in the other processes of `groups`.

    Sums and counts are reduced, so that processes may have different numbers of coordinates, and some none.

    Raises:
        ProcessError: another process has ended, or has said nothing for as long as its group's time-out is.
    """
    if not groups:
        return total / count
    sums = torch.cat([total.reshape(-1), total.new_full((1,), count)])
    for group in groups:
        try:
            dist.all_reduce(sums, group=group)
        except RuntimeError as error:
            raise ProcessError(
                "step: expected all processes that have parts of the parameters to take it, but another has ended "
                f"amidst it, or said nothing until the time-out ({str(error)[:200]}); load the optimizer's state again"
            ) from error
    return (sums[:-1] / sums[-1]).view_as(total)


def _lanes(tensors: tuple[int, ...], device: torch.device) -> Tensor:
    """[N]: which of all lanes are coordinates."""
    return torch.from_numpy(_lane_numbers(tensors)).to(device)


@functools.lru_cache(maxsize=64)
def _lane_numbers(tensors: tuple[int, ...]) -> Any:
    """The same, not as a Tensor: what is kept is to be good in all surroundings (inference mode, fake tensors)."""
    places, place = [], 0
    for size in tensors:
        places.append(np.arange(place, place + size))
        place += tiles_of(size) * TILE
    return np.concatenate(places)
