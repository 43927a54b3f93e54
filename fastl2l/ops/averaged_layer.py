"""One layer of a rule whose coordinates talk: a kernel, and means of its first units over the coordinates.

That a unit is replaced by its mean is a symmetric projection: on the way back its adjoint is averaged likewise.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastl2l import reference
from fastl2l.ops.again import backward_with_graph
from fastl2l.ops.coordinates import Coordinates
from fastl2l.ops.dispatch import Backend
from fastl2l.ops.layout import from_rows, to_rows
from fastl2l.rule_config import RuleConfig


class Layer(NamedTuple):
    """A layer's network between two means."""

    config: RuleConfig
    weights: list[Tensor]
    averages: int
    """How many of its units are averaged."""
    seen: bool
    """Whether anything but its own next step sees its units."""

    @property
    def units(self) -> int:
        """How many are seen."""
        return self.config.hidden_size if self.seen else 0


class LayerStep(NamedTuple):
    """What a step of a layer gives."""

    update: Tensor
    """[N]; zeros of a layer without an output."""
    state: Tensor
    """[tiles, rows, 16], with means in it."""
    means: Tensor
    """[averages, functions, 1]."""
    units: Tensor
    """[tiles, units, 16]: h as others see it, with means in it."""


def step(
    layer: Layer, gradient: Tensor, state: Tensor, given: Tensor | None, where: Coordinates, scale: float,
    backend: Backend,
) -> LayerStep:  # fmt: skip
    """One step of a layer, differentiable any number of times in gradient, state, given rows and weights.

    Args:
        layer: which.
        gradient: [N].
        state: [tiles, rows, 16].
        given: [tiles, rows, 16], for a layer that has such inputs.
        where: which function each coordinate belongs to.
        scale: factor on the update.
        backend: does the work.
    """
    return LayerStep(
        *_Step.apply(layer, where, scale, backend, gradient.contiguous(), state.contiguous(), given, *layer.weights)
    )


@torch.no_grad()
def step_(
    layer: Layer, gradient: Tensor, state: Tensor, given: Tensor | None, where: Coordinates, scale: float,
    backend: Backend,
) -> LayerStep:  # fmt: skip
    """The same, of tensors side by side, and in place: the state that comes back is the one that was given."""
    update, sizes = torch.zeros_like(gradient), where.tensors
    own = state.contiguous()  # itself, but for a state that somebody has laid out otherwise
    params, grads = update.split(sizes), gradient.split(sizes)
    backend.step_(params, grads, [own], layer.weights, layer.config.text, scale, 1.0, None, given)
    means = own.new_empty(0, where.functions, 1)
    if layer.averages:
        means = where.means(own[:, : layer.averages])
        own[:, : layer.averages] = where.of_each(means)
    new = own if own is state else state.copy_(own)
    return LayerStep(update, new, means, new[:, : layer.units])


def backward_(
    layer: Layer, gradient: Tensor, state: Tensor, given: Tensor | None, where: Coordinates, scale: float,
    backend: Backend, adjoints: tuple[Tensor, Tensor, Tensor | None, Tensor | None], needs: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """The way back of a step, as it was before the step, to what went into it.

    Args:
        layer, gradient, state, given, where, scale, backend: as for `step`.
        adjoints: of what `LayerStep` has, in its order; that of the state is written to. None is 0.
        needs: whether the first three of what comes back are wanted.

    Returns:
        Those of the weights, flat; of the gradient; of the state; and of the given rows.
    """
    dupdate, dstate, dmeans, dunits = adjoints
    if dunits is not None:
        dstate[:, : layer.units] += dunits
    if layer.averages:
        averaged = dstate[:, : layer.averages]
        share = where.means(averaged) if dmeans is None else where.means(averaged) + dmeans / where.dim
        averaged.copy_(where.of_each(share).expand_as(averaged))
    dweights, first, dgrads, dgiven = backend.window_backward(
        state, gradient.unsqueeze(0), dupdate.unsqueeze(0), layer.weights, layer.config.text, scale, dstate,
        needs[1], needs[0], None if given is None else given.unsqueeze(0), needs[2],
    )  # fmt: skip
    return dweights, dgrads[0] if needs[0] else dgrads, first, dgiven[0] if needs[2] else dgiven


class _Step(torch.autograd.Function):
    """Arguments: layer, coordinates, scale, backend, gradient, state, given rows or None, weights."""

    @staticmethod
    def forward(
        ctx: Any, layer: Layer, where: Coordinates, scale: float, backend: Backend, gradient: Tensor, state: Tensor,
        given: Tensor | None, *weights: Tensor,
    ) -> tuple[Tensor, ...]:  # fmt: skip
        ctx.layer, ctx.where, ctx.scale, ctx.backend = layer, where, scale, backend
        ctx.save_for_backward(gradient, state, given, *weights)
        found = step_(layer._replace(weights=list(weights)), gradient, state.clone(), given, where, scale, backend)
        return found._replace(units=found.units.clone(memory_format=torch.contiguous_format))

    @staticmethod
    def backward(
        ctx: Any, dupdate: Tensor, dstate: Tensor, dmeans: Tensor, dunits: Tensor
    ) -> tuple[Tensor | None, ...]:
        needs = ctx.needs_input_grad[4:]
        if torch.is_grad_enabled():  # create_graph=True
            return (*[None] * 4, *_with_graph(ctx, (dupdate, dstate, dmeans, dunits), needs))
        gradient, state, given, *weights = ctx.saved_tensors
        layer = ctx.layer._replace(weights=weights)
        written_to = layer.averages or layer.seen
        own = dstate.clone(memory_format=torch.contiguous_format) if written_to else dstate.contiguous()
        adjoints = dupdate.contiguous(), own, dmeans, dunits
        dweights, *found = backward_(layer, gradient, state, given, ctx.where, ctx.scale, ctx.backend, adjoints, needs)
        split = dweights.split([weight.numel() for weight in weights])
        rest = (part.view_as(weight) for part, weight in zip(split, weights, strict=True))
        return (*[None] * 4, *(one if need else None for one, need in zip((*found, *rest), needs, strict=True)))


def _with_graph(ctx: Any, adjoints: Sequence[Tensor], needs: Sequence[bool]) -> list[Tensor | None]:
    """By reference.py."""
    layer, where = ctx.layer, ctx.where
    count = layer.averages

    def step(gradient: Tensor, state: Tensor, given: Tensor | None, *weights: Tensor) -> tuple[Tensor, ...]:
        numel = gradient.numel()
        rows = None if given is None else to_rows(given, numel)
        update, new = reference.step(gradient, to_rows(state, numel), weights, layer.config.text, ctx.scale, rows)
        means = where.by_function(new[:count]).mean(-1, keepdim=True)
        new = from_rows(torch.cat([where.flat(means.expand(-1, -1, where.dim)), new[count:]]))
        return update, new, means, new[:, : layer.units]

    with reference.exact(adjoints[0].device):
        return backward_with_graph(step, ctx.saved_tensors, adjoints, needs)
