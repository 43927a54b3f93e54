"""How the state of an update rule lies in memory: tiles of 16 coordinates, [tiles, rows, 16].

A tile's rows are neighbours, so a kernel that takes some tiles touches one run of memory, whatever N is; with rows of
length N it would touch as many far-apart places as there are rows. Lanes past N in the last tile mean nothing.

Of a coupled rule, each of whose layers is a kernel call, the state is [tiles, layers, rows, 16], and in memory layers
are apart: that of one is what a kernel takes.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastl2l.rules import Rule

TILE = 16
"""Coordinates in a tile; csrc/cpu/kernels.h has it too."""


def tiles_of(numel: int) -> int:
    """Tiles of `numel` coordinates, the last of which may not be full."""
    return -(-numel // TILE)


def state_shape(rule: Rule, numel: int) -> tuple[int, ...]:
    """Shape of the state of `numel` coordinates."""
    config = rule.config
    if config.coupled:
        return tiles_of(numel), config.num_layers, config.state_rows // config.num_layers, TILE
    return tiles_of(numel), config.state_rows, TILE


def new_state(rule: Rule, numel: int, device: torch.device | str = "cpu", dtype: torch.dtype | None = None) -> Tensor:
    """State at the start of a trajectory: zeros, in the rule's dtype unless another is named."""
    tiles, *layers = state_shape(rule, numel)
    if rule.config.coupled:
        layers[0], tiles = tiles, layers[0]
    state = torch.zeros(tiles, *layers, dtype=dtype or rule.dtype, device=device)
    return state.transpose(0, 1) if rule.config.coupled else state


def layers_apart(state: Tensor) -> Tensor:
    """A state as :func:`new_state` lays it out, whatever its strides are."""
    return state if state.dim() == 3 else state.transpose(0, 1).contiguous().transpose(0, 1)


def split_state(state: Sequence[Tensor], numels: Sequence[int]) -> Sequence[Tensor]:
    """The states of parameters with so many coordinates, from what `step_` takes: those, or one that holds them all."""
    if len(state) == len(numels):
        return state
    return state[0].split([tiles_of(numel) for numel in numels])


def to_rows(state: Tensor, numel: int) -> Tensor:
    """State [tiles, rows, 16] as [rows, N], the layout of reference.py. Differentiable.

    That of a coupled rule has the rows of its layers one after the other.
    """
    state = state.flatten(1, -2)
    return state.permute(1, 0, 2).reshape(state.shape[1], -1)[:, :numel]


def from_rows(rows: Tensor) -> Tensor:
    """The inverse of :func:`to_rows`, with zeros in the lanes past N. Differentiable."""
    padding = -rows.shape[1] % TILE
    padded = torch.nn.functional.pad(rows, (0, padding))
    return padded.reshape(rows.shape[0], -1, TILE).permute(1, 0, 2).contiguous()
