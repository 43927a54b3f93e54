"""Memories over the coordinates of functions (Andrychowicz et al. 2016, appendix D), in torch.

Of F functions of D coordinates, a matrix is [F, D, D] and transposed: row j holds what coordinate j gives to all, so
that a read is a product of rows with it, and that of some coordinates are some columns. Pairs are a ring
[K, 2, writes, F, D], left vectors and then right ones; the step tells which place is written next. Everything is
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
    return config.pairs, 2, config.writes, functions, dim


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
    left, right = _pairs(config, memory, step)
    of_each = torch.bmm(right, vectors.permute(1, 2, 0))  # [F, pairs, reads]
    found = torch.bmm(of_each.transpose(1, 2), left * _fit(config, left, right))
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
            memory[place] = pairs
            return memory
        return torch.cat([memory[:place], pairs.unsqueeze(0), memory[place + 1 :]])
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


def _pairs(config: MemoryConfig, ring: Tensor, step: int) -> tuple[Tensor, Tensor]:
    """Left and right vectors [F, pairs, D], the left ones as far as they are not forgotten."""
    left, right = (side.flatten(0, 1).transpose(0, 1) for side in ring.unbind(1))
    if config.forget:
        ages = [(step - 1 - place) % config.pairs for place in range(config.pairs)]
        shares = ring.new_tensor([(1 - config.forget) ** age for age in ages]).repeat_interleave(config.writes)
        left = left * shares.unsqueeze(1)
    return left, right


def _fit(config: MemoryConfig, left: Tensor, right: Tensor) -> Tensor | float:
    """What keeps the norm of sum a b^T, which is at most the sum of |a| |b|, within its bound."""
    if config.memory_bound is None:
        return 1.0
    products = left.square().sum(-1) * right.square().sum(-1)
    norm = root(products).sum(-1).view(-1, 1, 1)
    return _share(config.memory_bound, norm.square(), left.shape[-1])


def _share(bound: float, square: Tensor, dim: int) -> Tensor:
    """By what something of this squared norm is to be multiplied to be within its bound."""
    largest = bound * dim**0.5
    norm = root(square)
    return torch.where(norm > largest, largest / norm, torch.ones_like(square))


def root(square: Tensor) -> Tensor:
    """The root, through which nothing goes back where it is 0."""
    zero = square == 0
    return torch.where(zero, torch.zeros_like(square), torch.where(zero, torch.ones_like(square), square).sqrt())
