"""A memory of pairs: M = M_0 + sum a b^T over the last pairs of vectors, in a ring.

A ring is [2, K, writes, F, D], left vectors and then right ones, of F functions of D coordinates; the step tells which
place is written next.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastl2l.memory_config import MemoryConfig
from fastl2l.ops.bounds import root


def read(config: MemoryConfig, ring: Tensor, vectors: Tensor, step: int) -> Tensor:
    """M r for vectors r [reads, F, D]; `step` counts the writes from 0 on."""
    left, right = (by_function(side) for side in ring)
    squares = torch.stack([squared(left), squared(right)]) if config.memory_bound is not None else None
    ages = [(step - 1 - place) % config.pairs for place in range(config.pairs)]
    of_each = torch.bmm(right, vectors.permute(1, 2, 0)) * shares(config, ages, squares, vectors)
    return config.initial * vectors + torch.bmm(of_each.transpose(1, 2), left).transpose(0, 1)


def write(config: MemoryConfig, ring: Tensor, pairs: Tensor, step: int) -> Tensor:
    """The ring with pairs [2, writes, F, D] in it."""
    return torch.select_scatter(ring, pairs, 1, step % config.pairs)


def write_(config: MemoryConfig, ring: Tensor, pairs: Tensor, step: int) -> None:
    """The same, in place: one place is written to and nothing else."""
    ring[:, step % config.pairs] = pairs


def by_function(side: Tensor) -> Tensor:
    """[steps, writes, F, D] as [F, pairs, D], in place."""
    return side.flatten(0, 1).transpose(0, 1)


def squared(side: Tensor) -> Tensor:
    """Squared norms of vectors [..., D], [..., 1]."""
    return side.square().sum(-1, keepdim=True)


def shares(config: MemoryConfig, ages: Sequence[int], squares: Tensor | None, like: Tensor) -> Tensor:
    """Of each pair a b^T, what is not forgotten and keeps the norm of them all within its bound.

    That norm is at most the sum of |a| |b|.

    Args:
        config: of the memory.
        ages: how many writes ago those at each place were written.
        squares: of a bounded memory, squared norms of the left and the right vectors, [2, F, pairs, 1].
        like: [..., D], for the dtype, the device and D.

    Returns:
        [pairs, 1], or [F, pairs, 1] of a bounded memory.
    """
    kept = like.new_tensor([(1 - config.forget) ** age for age in ages]).repeat_interleave(config.writes).unsqueeze(1)
    if config.memory_bound is None or squares is None:
        return kept
    norm = (root(squares[0] * squares[1]) * kept).sum(1, keepdim=True)
    largest = config.memory_bound * like.shape[-1] ** 0.5
    above = norm > largest
    return kept * torch.where(above, largest / torch.where(above, norm, 1), 1)
