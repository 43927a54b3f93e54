"""Ways back that are to be gone again, or differentiated again: which the kernels' cannot be, and what is refused."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

Function = Callable[..., Sequence[Tensor]]


def backward_with_graph(
    function: Function, inputs: Sequence[Tensor | None], adjoints: Sequence[Tensor], needs: Sequence[bool]
) -> list[Tensor | None]:
    """The gradients of ``sum(adjoints * function(*inputs))`` with respect to the inputs that need one, with a graph.

    Args:
        function: differentiable by torch, as often as is wanted.
        inputs: its arguments, with their own history: one may depend on another.
        adjoints: of its results.
        needs: of each input.
    """
    # With history the way back through an input that depends on another would be counted here and again by the caller.
    apart = [tensor if tensor is None else tensor.view_as(tensor) for tensor in inputs]
    pairs = zip(function(*apart), adjoints, strict=True)
    # Some results depend on nothing: of a rule without an output the update, say.
    outputs, dual = zip(*((output, adjoint) for output, adjoint in pairs if output.requires_grad), strict=True)
    needed = [tensor for tensor, need in zip(apart, needs, strict=True) if need and tensor is not None]
    found = iter(torch.autograd.grad(outputs, needed, dual, create_graph=True, materialize_grads=True))
    return [next(found) if need else None for need in needs]


def once(backward: Callable[..., Any]) -> Callable[..., Any]:
    """For a Function whose way back changes what the window keeps: it is gone once, and is not differentiated.

    Raises:
        RuntimeError: it is gone again, or with a graph.
    """

    @functools.wraps(backward)
    def checked(ctx: Any, *adjoints: Any) -> Any:
        if torch.is_grad_enabled():
            raise RuntimeError("window: expected a way back without create_graph=True, through what keeps its steps")
        if getattr(ctx, "gone", False):
            raise RuntimeError("window: expected one way back, got another one (retain_graph=True)")
        ctx.gone = True
        return backward(ctx, *adjoints)

    return checked
