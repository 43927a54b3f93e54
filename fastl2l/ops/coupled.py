"""A step of a rule whose coordinates talk (Andrychowicz et al. 2016, appendix D), and its way back.

A kernel is one coordinate's network between two means over all coordinates, so there is a call for each layer
(``RuleConfig.chain``, averaged_layer.py), and what mixes coordinates, such as a memory (remembering.py), is done
between them.

A state is [tiles, layers, rows, 16], or `Remembered` of a rule with a memory.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeAlias

import torch
from torch import Tensor

from fastl2l import reference
from fastl2l.ops import averaged_layer, remembering
from fastl2l.ops.coordinates import Coordinates
from fastl2l.ops.coupled_network import Network
from fastl2l.ops.dispatch import Backend, select
from fastl2l.ops.layout import new_state
from fastl2l.ops.remembering import Remembered
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
    with reference.exact(gradient.device):
        network = Network(rule.config, rule.weights(), averaged_layer.step, where, scale, chosen)
        update, new = _step(network, gradient, _layers(state))
    return update, new if isinstance(new, Remembered) else torch.stack(list(new)).transpose(0, 1)


@torch.no_grad()
def step_(
    rule: Rule, gradient: Tensor, state: State, where: Coordinates, scale: float, backend: Backend
) -> Tensor:  # fmt: skip
    """One step of a coupled rule, whose state is changed in place; returns the update [N], times `scale`."""
    weights = [weight.detach() for weight in rule.weights()]
    with reference.exact(gradient.device):
        network = Network(rule.config, weights, averaged_layer.step_, where, scale, backend)
        if isinstance(state, Remembered):
            return remembering.step_(network, gradient, state)
        return network.run(gradient, state.unbind(1))[0]


def window_backward(
    rule: Rule, state: State, grads: Tensor, adjoints: Tensor, where: Coordinates, backend: Backend
) -> Tensor:  # fmt: skip
    """The gradient of ``sum(adjoints * updates)`` over a window with respect to the rule's weights, flat.

    The window is gone through once more from its first state, and the states of all its steps are kept until the way
    back.
    """
    weights = [weight.detach().requires_grad_() for weight in rule.weights()]
    now, updates = _layers(state), []
    with torch.enable_grad(), reference.exact(grads.device):
        network = Network(rule.config, weights, averaged_layer.step, where, rule.config.output_scale, backend)
        for gradient in grads:
            update, now = _step(network, gradient, now)
            updates.append(update)
        found = torch.autograd.grad(updates, weights, adjoints.unbind(), materialize_grads=True)
    return torch.cat([gradient.reshape(-1) for gradient in found])


def _layers(state: State) -> Sequence[Tensor] | Remembered:
    """A state whose layers are tensors of their own."""
    return state if isinstance(state, Remembered) else state.unbind(1)


def _step(
    network: Network, gradient: Tensor, state: Sequence[Tensor] | Remembered
) -> tuple[Tensor, Sequence[Tensor] | Remembered]:
    if isinstance(state, Remembered):
        return remembering.step(network, gradient, state)
    update, steps = network.run(gradient, state)
    return update, [one.state for one in steps]
