"""Memories over the coordinates of functions (Andrychowicz et al. 2016, appendix D), in torch.

Of F functions of D coordinates, a matrix is [F, D, D] and transposed: row j holds what coordinate j gives to all, so
that a read is a product of rows with it, and that of some coordinates are some columns. Pairs are a ring
[2, K, writes, F, D], left vectors and then right ones; the step tells which place is written next. Everything is
differentiable, but for what is in place.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastl2l.memory_config import MemoryConfig

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


def read(config: MemoryConfig, memory: Tensor, vectors: Tensor, step: int) -> Tensor:
    """M r for vectors r [reads, F, D]; `step` counts the writes from 0 on."""
    if config.kind == "matrix":
        return torch.bmm(vectors.transpose(0, 1), memory).transpose(0, 1)
    left, right = (side.flatten(0, 1).transpose(0, 1) for side in memory)  # [F, pairs, D], in place
    of_each = torch.bmm(right, vectors.permute(1, 2, 0))  # [F, pairs, reads]
    shares = _shares(config, left, right, step)
    found = torch.bmm((of_each if shares is None else of_each * shares).transpose(1, 2), left)
    return config.initial * vectors + found.transpose(0, 1)


def write(config: MemoryConfig, memory: Tensor, pairs: Tensor, step: int) -> Tensor:
    """The memory with pairs [2, writes, F, D] in it, and what is to be forgotten forgotten."""
    return _write(config, memory, pairs, step, in_place=False)


def write_(config: MemoryConfig, memory: Tensor, pairs: Tensor, step: int) -> None:
    """The same, in place: of a ring, one place is written to and nothing else."""
    _write(config, memory, pairs, step, in_place=True)


def _write(config: MemoryConfig, memory: Tensor, pairs: Tensor, step: int, in_place: bool) -> Tensor:
    if config.kind == "pairs":
        place = step % config.pairs
        if in_place:
            memory[:, place] = pairs
            return memory
        return torch.select_scatter(memory, pairs, 1, place)
    left, right = pairs.transpose(1, 2)  # [F, writes, D] each
    multiply_add = memory.baddbmm_ if in_place else memory.baddbmm
    found = multiply_add(right.transpose(1, 2), left, beta=1 - config.forget)
    if config.forget:
        kept = torch.eye(memory.shape[1], dtype=memory.dtype, device=memory.device) * (config.forget * config.initial)
        found = found.add_(kept) if in_place else found + kept
    if config.memory_bound is not None:
        share = _share(config.memory_bound, found.square().sum((1, 2), keepdim=True), memory.shape[1])
        found = found.mul_(share) if in_place else found * share
    return found


def _shares(config: MemoryConfig, left: Tensor, right: Tensor, step: int) -> Tensor | None:
    """Of each pair a b^T, what is not forgotten and keeps the norm of them all within its bound.

    That norm is at most the sum of |a| |b|. [pairs, 1], [F, pairs, 1] or, of all of it, None.
    """
    shares = None
    if config.forget:
        ages = [(step - 1 - place) % config.pairs for place in range(config.pairs)]
        kept = left.new_tensor([(1 - config.forget) ** age for age in ages])
        shares = kept.repeat_interleave(config.writes).unsqueeze(1)
    if config.memory_bound is None:
        return shares
    norms = root(left.square().sum(-1, keepdim=True) * right.square().sum(-1, keepdim=True))
    norms = norms if shares is None else norms * shares
    within = _share(config.memory_bound, norms.sum(1, keepdim=True).square(), left.shape[-1])
    return within if shares is None else within * shares


def _share(bound: float, square: Tensor, dim: int) -> Tensor:
    """By what something of this squared norm is to be multiplied to be within its bound."""
    largest = bound * dim**0.5
    norm = root(square)
    return torch.where(norm > largest, largest / norm, torch.ones_like(square))


def root(square: Tensor) -> Tensor:
    """The root, through which nothing goes back where it is 0."""
    zero = square == 0
    return torch.where(zero, torch.zeros_like(square), torch.where(zero, torch.ones_like(square), square).sqrt())
