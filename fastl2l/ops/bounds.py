"""What keeps vectors within bounds: roots of sums through which nothing goes back where they are 0.

Each is one node of autograd's graph, since the functions of a rule with a memory are many and small.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def root(square: Tensor) -> Tensor:
    """The root, through which nothing goes back where it is 0."""
    return _Root.apply(square)


def reciprocal(number: Tensor) -> Tensor:
    """1 / number, and 0 of 0."""
    return _Reciprocal.apply(number)


def rms(vectors: Tensor) -> Tensor:
    """Root mean square over the coordinates of each function, [..., 1]; through that of 0 nothing goes back."""
    return root(vectors.square().mean(-1, keepdim=True))


def limited(vectors: Tensor, most: Tensor | float | None) -> Tensor:
    """Vectors made smaller where their root mean square is above `most`; [..., 1] if it is a Tensor."""
    if most is None:
        return vectors
    return _Limited.apply(vectors, most if isinstance(most, Tensor) else vectors.new_full((), most))


def share(vectors: Tensor, most: Tensor | float) -> Tensor:
    """By what such vectors are multiplied, [..., 1]."""
    size = vectors.square().mean(-1, keepdim=True).sqrt()
    return torch.fmin(most / size, torch.ones_like(size))


class _Root(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, square: Tensor) -> Tensor:
        found = square.sqrt()
        ctx.save_for_backward(found)
        return found

    @staticmethod
    def backward(ctx: Any, dfound: Tensor) -> Tensor:
        (found,) = ctx.saved_tensors
        return 0.5 * dfound * reciprocal(found)


class _Reciprocal(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, number: Tensor) -> Tensor:
        found = torch.where(number == 0, 0, 1 / number)
        ctx.save_for_backward(found)
        return found

    @staticmethod
    def backward(ctx: Any, dfound: Tensor) -> Tensor:
        (found,) = ctx.saved_tensors
        return -dfound * found * found


class _Limited(torch.autograd.Function):
    """Arguments: vectors [..., D], most [] or [..., 1]."""

    @staticmethod
    def forward(ctx: Any, vectors: Tensor, most: Tensor) -> Tensor:
        ctx.save_for_backward(vectors, most)
        return vectors * share(vectors, most)

    @staticmethod
    def backward(ctx: Any, dfound: Tensor) -> tuple[Tensor, Tensor | None]:
        vectors, most = ctx.saved_tensors
        square = vectors.square().mean(-1, keepdim=True)
        above = square > most.square()
        size = torch.where(above, square, 1).sqrt()
        along = torch.where(above, (vectors * dfound).sum(-1, keepdim=True) / size, 0)
        factor = torch.where(above, most / size, 1)
        dvectors = factor * dfound - vectors * (factor * along / (size * vectors.shape[-1]))
        return dvectors, along if ctx.needs_input_grad[1] else None
