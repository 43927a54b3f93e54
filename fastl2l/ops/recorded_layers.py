"""The layers of a rule with a memory over the steps of a window of first-order training, by the native CPU kernels.

Their states are kept side by side, and on the way back one place holds the adjoint of the state. Autograd sees what
goes in and out besides: what layers are given, the update, and the last layer's units.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from fastl2l.heap import Scratch
from fastl2l.ops import averaged_native
from fastl2l.ops.coordinates import Coordinates
from fastl2l.ops.coupled_network import Extra, NetworkStep, rows_of_all
from fastl2l.rules import Rule


class RecordedLayers:
    """Steps of all layers one after the other, with the interface of `coupled_network.Network`.

    Args:
        rule: as its weights are now.
        layers: their states before the first step, [layers, tiles, rows, 16]; they are left as they are.
        steps: how many there are.
        where: which function each coordinate belongs to.
        scratch: for the states of the steps, till the way back.
    """

    def __init__(self, rule: Rule, layers: Tensor, steps: int, where: Coordinates, scratch: Scratch) -> None:
        self.config, self.where, self.scale = rule.config, where, rule.config.output_scale
        self._own = [weight.detach().clone() for weight in rule.weights()]
        names = [name for name, _ in self.config.weight_shapes]
        self.weights = dict(zip(names, self._own, strict=True))
        self._heads = [weight.requires_grad_() for weight in self._own[self.config.network_weights :]]
        self._states, self._scratch, self._steps = scratch.borrow((steps + 1, *layers.shape), layers), scratch, 0
        self._states[0] = layers
        self._dstate = torch.zeros_like(self._states[0])
        self._dweights: Tensor | None = None
        self._first = self._token = layers.new_zeros(()).requires_grad_()

    def step(self, gradient: Tensor, layers: Tensor, extra: Extra) -> NetworkStep:
        """From the gradient [N], whose numbers nobody changes till the way back, and the state of the last step."""
        rows = rows_of_all(self.config, self.where, extra)
        update, units, self._token = _Step.apply(self, gradient, rows, self._token)
        return NetworkStep(update, self._states[self._steps], units)

    def backward(self, updates: Sequence[Tensor], adjoints: Tensor) -> Tensor:
        """The gradient with respect to all of the rule's weights, flat, from those of the updates [steps, N]."""
        if not self._steps == len(self._states) - 1 == len(adjoints):
            raise RuntimeError(
                f"window: expected {len(self._states) - 1} steps and their adjoints before its way back, got "
                f"{self._steps} and {len(adjoints)}"
            )
        wanted = [*self._heads, self._first]
        found = torch.autograd.grad(updates, wanted, adjoints.unbind(), materialize_grads=True)
        assert self._dweights is not None
        self._scratch.keep(self._states)
        del self._states  # they are the next window's
        return torch.cat([self._dweights, *(gradient.reshape(-1) for gradient in found[:-1])])

    def forward_of(self, gradient: Tensor, rows: Tensor | None) -> tuple[int, Tensor, Tensor]:
        """The next step: its number, update and units."""
        number = self._steps
        before, after = self._states[number : number + 2]
        update, units = averaged_native.step_(
            self.config, self._own, before, after, gradient, rows, self.where, self.scale, need_units=True
        )
        self._steps += 1
        return number, update, units

    def backward_of(
        self, number: int, gradient: Tensor, rows: Tensor | None, adjoints: Sequence[Tensor | None], need_rows: bool
    ) -> Tensor | None:
        """The way back of that step, after those of all later ones: to what layers were given."""
        dupdate, dunits = adjoints
        dweights, _, drows = averaged_native.window_backward(
            self.config, self._own, self._states[number : number + 2].unbind(), gradient.unsqueeze(0),
            None if rows is None else rows.unsqueeze(0), (gradient * 0 if dupdate is None else dupdate).unsqueeze(0),
            None if dunits is None else dunits.contiguous().unsqueeze(0), self._dstate, self.where,
            self.scale, need_dextra=need_rows,
        )  # fmt: skip
        self._dweights = dweights if self._dweights is None else self._dweights.add_(dweights)
        return drows[0] if need_rows else None


class _Step(torch.autograd.Function):
    """Arguments: the layers, gradient, what they are given besides, token.

    The next step has this one's token, so that its way back comes before this one's.
    """

    @staticmethod
    def forward(
        ctx: Any, layers: RecordedLayers, gradient: Tensor, rows: Tensor | None, token: Tensor
    ) -> tuple[Tensor, ...]:
        number, update, units = layers.forward_of(gradient, rows)
        ctx.layers, ctx.number = layers, number
        ctx.save_for_backward(gradient, rows)
        ctx.set_materialize_grads(False)
        return update, units, token.clone()

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, dupdate: Tensor | None, dunits: Tensor | None, dtoken: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        gradient, rows = ctx.saved_tensors
        need = rows is not None and ctx.needs_input_grad[2]
        drows = ctx.layers.backward_of(ctx.number, gradient, rows, (dupdate, dunits), need)
        return None, None, drows, gradient.new_zeros(())
