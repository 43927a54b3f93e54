"""Memories over the coordinates of functions (Andrychowicz et al. 2016, appendix D), in torch.

Of F functions of D coordinates, a matrix is [F, D, D] and transposed: row j holds what coordinate j gives to all, so
that a read is a product of rows with it, and that of some coordinates are some columns. Pairs are a ring (pairs.py), or
those of a window (recorded_pairs.py). Everything is differentiable, but for what is in place.
"""

from __future__ import annotations

from typing import TypeAlias

import torch
from torch import Tensor

from fastl2l.memory_config import MemoryConfig
from fastl2l.ops import pairs as pairs_in_a_ring
from fastl2l.ops.bounds import limited, share
from fastl2l.ops.recorded_pairs import RecordedPairs

Memory: TypeAlias = "Tensor | RecordedPairs"

LARGEST = 2**31
"""Bytes of a matrix memory: 23,170 coordinates of one function in float32."""


def check_size(config: MemoryConfig, functions: int, dim: int, itemsize: int) -> None:
    """Raise a ValueError if a matrix over so many coordinates is too large."""
    size = functions * dim * dim * itemsize
    if config.kind == "matrix" and size > LARGEST:
        raise ValueError(
            f"memory: expected a matrix of at most {LARGEST / 2**30:g} GiB, got {functions} of {dim:,} x {dim:,} "
            f"numbers, {size / 2**30:,.1f} GiB; memory='pairs' takes a few numbers a coordinate"
        )


def shape(config: MemoryConfig, functions: int, dim: int) -> tuple[int, ...]:
    """Of the memory of so many functions."""
    if config.kind == "matrix":
        return functions, dim, dim
    return 2, config.pairs, config.writes, functions, dim


def begin_(config: MemoryConfig, memory: Tensor) -> Tensor:
    """Let it be M_0."""
    memory.zero_()
    if config.kind == "matrix":
        memory.diagonal(dim1=1, dim2=2).fill_(config.initial)
    return memory


def read(config: MemoryConfig, memory: Memory, vectors: Tensor, step: int) -> Tensor:
    """M r for vectors r [reads, F, D]; `step` counts the writes from 0 on."""
    if isinstance(memory, RecordedPairs):
        return memory.read(vectors)
    if config.kind == "pairs":
        return pairs_in_a_ring.read(config, memory, vectors, step)
    return torch.bmm(vectors.transpose(0, 1), memory).transpose(0, 1)


def write(config: MemoryConfig, memory: Memory, pairs: Tensor, step: int) -> Memory:
    """The memory with pairs [2, writes, F, D] in it, and what is to be forgotten forgotten."""
    if isinstance(memory, RecordedPairs):
        return memory.write(pairs)
    if config.kind == "pairs":
        return pairs_in_a_ring.write(config, memory, pairs, step)
    found = memory.baddbmm(*_factors(pairs), beta=1 - config.forget)
    if config.forget:
        found = found + _forgotten(config, memory)
    return limited(found.flatten(1), _most(config, memory)).view_as(found)


def write_(config: MemoryConfig, memory: Tensor, pairs: Tensor, step: int) -> None:
    """The same, in place: of a ring, one place is written to and nothing else."""
    if config.kind == "pairs":
        pairs_in_a_ring.write_(config, memory, pairs, step)
        return
    memory.baddbmm_(*_factors(pairs), beta=1 - config.forget)
    if config.forget:
        memory.diagonal(dim1=1, dim2=2).add_(config.forget * config.initial)
    if (most := _most(config, memory)) is not None:
        memory.mul_(share(memory.flatten(1), most).unsqueeze(-1))


def _factors(pairs: Tensor) -> tuple[Tensor, Tensor]:
    """Whose product is what pairs add to the transposed matrix: [F, D, writes] and [F, writes, D]."""
    left, right = pairs.transpose(1, 2)
    return right.transpose(1, 2), left


def _forgotten(config: MemoryConfig, memory: Tensor) -> Tensor:
    """What of M_0 comes back in a step, [D, D]."""
    return torch.eye(memory.shape[1], dtype=memory.dtype, device=memory.device) * (config.forget * config.initial)


def _most(config: MemoryConfig, memory: Tensor) -> float | None:
    """The largest root mean square of a matrix's numbers, from its largest Frobenius norm."""
    return None if config.memory_bound is None else config.memory_bound / memory.shape[1] ** 0.5
