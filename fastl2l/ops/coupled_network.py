"""The layers of a rule whose coordinates talk, one after the other."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from fastl2l.ops.averaged_layer import Layer, LayerStep
from fastl2l.ops.coordinates import Coordinates
from fastl2l.ops.dispatch import Backend
from fastl2l.rule_config import RuleConfig

Extra = Callable[[int, "LayerStep | None"], "Tensor | None"]
"""From a layer's number and the step of the one before it to rows [rows, functions, dim] that it is given besides."""


class NetworkStep(NamedTuple):
    """What a step of all layers gives."""

    update: Tensor
    """[N]."""
    layers: Sequence[Tensor] | Tensor
    """The state of each after the step, [tiles, rows, 16]."""
    units: Tensor
    """H of the last layer, means in it, [units, N]; [0, N] of a rule without a memory."""


def nothing_more(number: int, before: LayerStep | None) -> Tensor | None:
    """Of a rule without a memory."""
    return None


def rows_of_all(config: RuleConfig, where: Coordinates, extra: Extra) -> Tensor | None:
    """What all layers are given besides, [rows, N], where that is known before the first of them."""
    rows = [found for number in range(config.num_layers) if (found := extra(number, None)) is not None]
    if not rows:
        return None
    flat = [where.flat(one) for one in rows]
    return flat[0].contiguous() if len(flat) == 1 else torch.cat(flat)


class Network:
    """Steps of all layers.

    Args:
        config: the rule.
        weights: its weights.
        step: of a layer: `averaged_layer.step` or `averaged_layer.step_`.
        where: which function each coordinate belongs to.
        scale: factor on the update.
        backend: does the work.
    """

    def __init__(
        self,
        config: RuleConfig,
        weights: Sequence[Tensor],
        step: Callable[..., LayerStep],
        where: Coordinates,
        scale: float,
        backend: Backend,
    ) -> None:
        self.config, self.where, self.scale = config, where, scale
        self.weights = {name: weight for (name, _), weight in zip(config.weight_shapes, weights, strict=True)}
        self.layers = self._without_averaged_output(weights)
        self._step = partial(step, where=where, scale=scale, backend=backend)

    def run(
        self, gradient: Tensor, states: Sequence[Tensor], extra: Extra = nothing_more
    ) -> tuple[Tensor, list[LayerStep]]:
        """From the gradient [N] and the layers' states to the update [N] and each layer's step."""
        found: list[LayerStep] = []
        for number, (layer, state) in enumerate(zip(self.layers, states, strict=True)):
            before = found[-1] if found else None
            given = self._given(before, extra(number, before))
            found.append(self._step(layer, gradient, state, given))
        last = found[-1]
        return (last.update + self._shared(last.means) if len(last.means) else last.update), found

    def step(self, gradient: Tensor, layers: Sequence[Tensor], extra: Extra) -> NetworkStep:
        """The same, with what a memory wants."""
        update, steps = self.run(gradient, layers, extra)
        seen = self.layers[-1].seen
        units = self.where.rows(steps[-1].units) if seen else gradient.new_empty(0, gradient.numel())
        return NetworkStep(update, [one.state for one in steps], units)

    def _given(self, before: LayerStep | None, extra: Tensor | None) -> Tensor | None:
        """What a layer is given, [tiles, rows, 16]."""
        parts = [] if before is None else [before.units]
        parts += [] if extra is None else [self.where.tiles(self.where.flat(extra))]
        if not parts:
            return None
        return torch.cat(parts, 1) if len(parts) > 1 else parts[0].contiguous()

    def _shared(self, means: Tensor) -> Tensor:
        """What averaged units of the last layer have in the update: of a function's coordinates all the same."""
        found = self.scale * (self.weights["weight_out"][: len(means)] @ means.squeeze(-1))
        return self.where.flat(found.view(1, -1, 1).expand(-1, -1, self.where.dim))[0]

    def shared_backward(self, means: Tensor, dupdate: Tensor) -> tuple[Tensor, Tensor]:
        """From the update's adjoint [N] to those of the averaged units' output weights, and of their means."""
        total = self.where.by_function(dupdate.unsqueeze(0)).sum(-1, keepdim=True) * self.scale  # [1, functions, 1]
        return (means * total).sum((1, 2)), self.weights["weight_out"][: len(means)].view(-1, 1, 1) * total

    def _without_averaged_output(self, weights: Sequence[Tensor]) -> list[Layer]:
        """The layers; in the last one's output are no averaged units, whose means are known only when it is done."""
        config = self.config
        own = [list(weights[3 * layer : 3 * layer + 3]) for layer in range(config.num_layers)]
        w_out = self.weights["weight_out"]
        if count := config.averages[-1]:
            w_out = torch.cat([torch.zeros_like(w_out[:count]), w_out[count:]])
        own[-1] += [w_out, self.weights["bias_out"]]
        seen = [layer < config.num_layers - 1 or config.memory is not None for layer in range(config.num_layers)]
        return [Layer(*all_of) for all_of in zip(config.chain, own, config.averages, seen, strict=True)]
