"""All layers of a rule whose coordinates talk, a call of the native CPU kernels a step: in place, or for autograd.

Both have what `coupled_network.Network` has for a memory (`remembering.Layers`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastl2l import reference
from fastl2l.ops import averaged_layer, averaged_native
from fastl2l.ops.again import backward_with_graph
from fastl2l.ops.averaged_layer import LayerStep
from fastl2l.ops.coordinates import Coordinates
from fastl2l.ops.coupled_network import Extra, Network, NetworkStep, rows_of_all
from fastl2l.ops.dispatch import Backend, changed
from fastl2l.rule_config import RuleConfig


class _NativeNetwork:
    """Arguments: the rule, its weights, which function each coordinate belongs to, a factor on the update."""

    def __init__(self, config: RuleConfig, weights: Sequence[Tensor], where: Coordinates, scale: float) -> None:
        self.config, self.where, self.scale, self.all_weights = config, where, scale, list(weights)
        self.weights = {name: weight for (name, _), weight in zip(config.weight_shapes, weights, strict=True)}


class InPlace(_NativeNetwork):
    """Steps that change the states that they are given."""

    def step(self, gradient: Tensor, layers: Tensor, extra: Extra) -> NetworkStep:
        """From the gradient [N] and the layers' states [layers, tiles, rows, 16], which become those after the step."""
        rows = rows_of_all(self.config, self.where, extra)
        update, units = averaged_native.step_(
            self.config, self.all_weights, None, layers, gradient, rows, self.where, self.scale,
            need_units=self.config.memory is not None,
        )  # fmt: skip
        changed(layers)
        return NetworkStep(update, layers, units)


class Differentiable(_NativeNetwork):
    """Steps that are differentiable any number of times in gradient, states, rows and weights.

    Args:
        backend: whose kernels, a layer each, do what is differentiated more than once.
    """

    def __init__(
        self, config: RuleConfig, weights: Sequence[Tensor], where: Coordinates, scale: float, backend: Backend
    ) -> None:
        super().__init__(config, weights, where, scale)
        self.backend = backend

    def step(self, gradient: Tensor, layers: Tensor | Sequence[Tensor], extra: Extra) -> NetworkStep:
        """From the gradient [N] and the layers' states [layers, tiles, rows, 16]."""
        together = layers if isinstance(layers, Tensor) else torch.stack(list(layers))
        rows = rows_of_all(self.config, self.where, extra)
        own = self.all_weights[: self.config.network_weights]
        return NetworkStep(*_Step.apply(self, gradient.contiguous(), together.contiguous(), rows, *own))


class _Step(torch.autograd.Function):
    """Arguments: the network, gradient, states, rows or None, the layers' weights."""

    @staticmethod
    def forward(
        ctx: Any, of: Differentiable, gradient: Tensor, layers: Tensor, rows: Tensor | None, *weights: Tensor
    ) -> tuple[Tensor, ...]:
        new = torch.empty_like(layers)
        update, units = averaged_native.step_(
            of.config, weights, layers, new, gradient, rows, of.where, of.scale,
            need_units=of.config.memory is not None,
        )  # fmt: skip
        ctx.of = of
        ctx.save_for_backward(gradient, layers, rows, *weights, new)
        return update, new, units

    @staticmethod
    def backward(ctx: Any, dupdate: Tensor, dlayers: Tensor, dunits: Tensor) -> tuple[Tensor | None, ...]:
        needs = ctx.needs_input_grad[1:]
        if torch.is_grad_enabled():  # create_graph=True
            return None, *_with_graph(ctx, (dupdate, dlayers, dunits), needs)
        of, (gradient, layers, rows, *weights, new) = ctx.of, ctx.saved_tensors
        dstate = dlayers.clone(memory_format=torch.contiguous_format)
        dweights, dgradient, drows = averaged_native.window_backward(
            of.config, weights, (layers, new), gradient.unsqueeze(0), None if rows is None else rows.unsqueeze(0),
            dupdate.unsqueeze(0), dunits.contiguous().unsqueeze(0) if len(dunits) else None, dstate, of.where, of.scale,
            need_dgradients=needs[0], need_dextra=needs[2],
        )  # fmt: skip
        split = dweights.split([weight.numel() for weight in weights])
        rest = [part.view_as(weight) for part, weight in zip(split, weights, strict=True)]
        found = (dgradient[0] if needs[0] else None, dstate, drows[0] if needs[2] else None, *rest)
        return None, *(one if need else None for one, need in zip(found, needs, strict=True))


def _with_graph(ctx: Any, adjoints: Sequence[Tensor], needs: Sequence[bool]) -> list[Tensor | None]:
    """Layer by layer."""
    of, config, where = ctx.of, ctx.of.config, ctx.of.where
    counts = [0 if config.memory is None else config.memory.inputs(number) for number in range(config.num_layers)]

    def step(gradient: Tensor, layers: Tensor, rows: Tensor | None, *weights: Tensor) -> tuple[Tensor, ...]:
        given = [where.by_function(part) for part in (gradient[None][:0] if rows is None else rows).split(counts)]

        def extra(number: int, before: LayerStep | None) -> Tensor | None:
            return given[number] if counts[number] else None

        heads = of.all_weights[len(weights) :]  # which have no part in it
        network = Network(config, [*weights, *heads], averaged_layer.step, where, of.scale, of.backend)
        update, new, units = network.step(gradient, layers.unbind(), extra)
        return update, torch.stack(list(new)), units

    with reference.exact(adjoints[0].device):
        return backward_with_graph(step, ctx.saved_tensors[:-1], adjoints, needs)
