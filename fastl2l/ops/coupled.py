"""A step of a rule whose coordinates talk (Andrychowicz et al. 2016, appendix D), and its way back.

A kernel is one coordinate's network between two means over all coordinates, so there is a call for each layer
(``RuleConfig.chain``, averaged_layer.py), and what mixes coordinates is done between them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor

from fastl2l.ops import averaged_layer
from fastl2l.ops.averaged_layer import Layer, LayerStep
from fastl2l.ops.coordinates import Coordinates
from fastl2l.ops.dispatch import Backend, select
from fastl2l.rule_config import RuleConfig
from fastl2l.rules import Rule


def step(
    rule: Rule, gradient: Tensor, state: Tensor, where: Coordinates | None = None, *, backend: str = "auto"
) -> tuple[Tensor, Tensor]:
    """One step of a coupled rule, differentiable in gradient, state and weights, any number of times.

    Args:
        rule: the rule.
        gradient: [N], in the rule's dtype.
        state: [tiles, layers, rows, 16], from ``ops.layout.new_state`` or the step before.
        where: which function each coordinate belongs to; by default all are one function's.
        backend: see :class:`fastl2l.FusedLSTMOptimizer`.

    Returns:
        The update [N], to be added to the parameters, and the new state.
    """
    where = where or Coordinates((gradient.numel(),))
    run = _Run(rule.config, averaged_layer.step, where, rule.config.output_scale, select(backend, gradient.device))
    update, layers = run.step(rule.weights(), gradient, state.unbind(1))
    return update, torch.stack(layers).transpose(0, 1)


@torch.no_grad()
def step_(
    rule: Rule, gradient: Tensor, state: Tensor, where: Coordinates, scale: float, backend: Backend
) -> Tensor:  # fmt: skip
    """One step of a coupled rule, whose state is changed in place; returns the update [N], times `scale`."""
    run = _Run(rule.config, averaged_layer.step_, where, scale, backend)
    return run.step([weight.detach() for weight in rule.weights()], gradient, state.unbind(1))[0]


def window_backward(
    rule: Rule, state: Tensor, grads: Tensor, adjoints: Tensor, where: Coordinates, backend: Backend
) -> Tensor:  # fmt: skip
    """The gradient of ``sum(adjoints * updates)`` over a window with respect to the rule's weights, flat.

    The window is gone through once more from its first state, and the states of all its steps are kept until the way
    back.
    """
    run = _Run(rule.config, averaged_layer.step, where, rule.config.output_scale, backend)
    weights = [weight.detach().requires_grad_() for weight in rule.weights()]
    layers, updates = state.unbind(1), []
    with torch.enable_grad():
        for gradient in grads:
            update, layers = run.step(weights, gradient, layers)
            updates.append(update)
        found = torch.autograd.grad(updates, weights, adjoints.unbind(), materialize_grads=True)
    return torch.cat([gradient.reshape(-1) for gradient in found])


class _Run:
    """Steps of a rule, on these coordinates."""

    def __init__(
        self, config: RuleConfig, layer: Callable[..., LayerStep], where: Coordinates, scale: float, backend: Backend
    ) -> None:
        self._config, self._where, self._scale = config, where, scale
        self._layer = partial(layer, where=where, scale=scale, backend=backend)

    def step(
        self, weights: Sequence[Tensor], gradient: Tensor, layers: Sequence[Tensor]
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """From the layers' states to the update and the new ones."""
        found: list[LayerStep] = []
        for layer, state in zip(self._layers(weights), layers, strict=True):
            given = found[-1].state[:, : self._config.hidden_size].contiguous() if found else None
            found.append(self._layer(layer, gradient, state, given))
        last = found[-1]
        update = last.update + self._shared(weights, last.means) if len(last.means) else last.update
        return update, tuple(one.state for one in found)

    def _shared(self, weights: Sequence[Tensor], means: Tensor) -> Tensor:
        """What averaged units of the last layer have in the update: of a function's coordinates all the same."""
        found = self._scale * (weights[-2][: len(means)] @ means.squeeze(-1))
        return self._where.flat(found.view(1, -1, 1).expand(-1, -1, self._where.dim))[0]

    def _layers(self, weights: Sequence[Tensor]) -> list[Layer]:
        """The output is without averaged units, whose means are known only when the last layer is done."""
        config = self._config
        own = [list(weights[3 * layer : 3 * layer + 3]) for layer in range(config.num_layers)]
        w_out, b_out = weights[-2:]
        if count := config.averages[-1]:
            w_out = torch.cat([torch.zeros_like(w_out[:count]), w_out[count:]])
        own[-1] += [w_out, b_out]
        return [Layer(*all_of) for all_of in zip(config.chain, own, config.averages, strict=True)]
