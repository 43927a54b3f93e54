"""A step of a rule whose coordinates talk (Andrychowicz et al. 2016, appendix D), and its way back.

A kernel is one coordinate's network between two means over all coordinates, so there is a call for each layer
(``RuleConfig.chain``, averaged_layer.py), and what mixes coordinates, such as a memory (remembering.py), is done
between them. On the CPU one call does all layers and means (averaged_native.py).

A state is [tiles, layers, rows, 16], or `Remembered` of a rule with a memory.
"""

from __future__ import annotations

from typing import TypeAlias

import torch
from torch import Tensor

from fastl2l import reference
from fastl2l.ops import averaged_layer, averaged_native, native_network, remembering
from fastl2l.ops.coordinates import Coordinates
from fastl2l.ops.coupled_network import Network, nothing_more
from fastl2l.ops.dispatch import Backend, select
from fastl2l.ops.layout import new_state
from fastl2l.ops.remembering import Layers, Remembered
from fastl2l.rules import Rule

State: TypeAlias = "Tensor | Remembered"


def begin(rule: Rule, where: Coordinates, device: torch.device | str = "cpu") -> State:
    """The state at the start of a trajectory.

    Raises:
        ValueError: a memory would be too large. Nothing has been allocated then.
    """
    if rule.config.memory is None:
        return new_state(rule, where.numel, device)
    return Remembered.new(rule, where, torch.device(device))


def recorded(state: State, steps: int) -> State:
    """The state, to be stepped so often, once, for autograd: what is cheaper then is prepared."""
    return state.recorded(steps) if isinstance(state, Remembered) else state


def step(
    rule: Rule, gradient: Tensor, state: State, where: Coordinates | None = None, *, backend: str = "auto"
) -> tuple[Tensor, State]:
    """One step of a coupled rule, differentiable in gradient, state and weights, any number of times.

    Args:
        rule: the rule.
        gradient: [N], in the rule's dtype.
        state: from `begin` or the step before.
        where: which function each coordinate belongs to; by default all are one function's.
        backend: see :class:`fastl2l.FusedLSTMOptimizer`.

    Returns:
        The update [N], to be added to the parameters, and the new state.
    """
    where = where or Coordinates((gradient.numel(),))
    chosen = select(backend, gradient.device)
    scale = rule.config.output_scale
    config, weights = rule.config, rule.weights()
    # The way back of the native call is that of coordinates in one tensor.
    native = len(where.tensors) == 1 and averaged_native.takes(config, gradient.device, where, chosen)
    with reference.exact(gradient.device):
        network: Layers = (
            native_network.Differentiable(config, weights, where, scale, chosen)
            if native
            else Network(config, weights, averaged_layer.step, where, scale, chosen)
        )
        if isinstance(state, Remembered):
            return remembering.step(network, gradient, state)
        update, layers, _ = network.step(gradient, state.transpose(0, 1), nothing_more)
    together = layers if isinstance(layers, Tensor) else torch.stack(list(layers))
    return update, together.transpose(0, 1)


@torch.no_grad()
def step_(
    rule: Rule, gradient: Tensor, state: State, where: Coordinates, scale: float, backend: Backend
) -> Tensor:  # fmt: skip
    """One step of a coupled rule, whose state is changed in place; returns the update [N], times `scale`."""
    config, weights = rule.config, [weight.detach() for weight in rule.weights()]
    layers = state.layers_together() if isinstance(state, Remembered) else state.transpose(0, 1)
    native = averaged_native.takes(config, gradient.device, where, backend) and layers.is_contiguous()
    with reference.exact(gradient.device):
        network: Layers = (
            native_network.InPlace(config, weights, where, scale)
            if native
            else Network(config, weights, averaged_layer.step_, where, scale, backend)
        )
        if isinstance(state, Remembered):
            return remembering.step_(network, gradient, state)
        return network.step(gradient, layers, nothing_more).update
