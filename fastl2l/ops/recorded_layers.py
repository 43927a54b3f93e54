"""The layers of a rule with a memory over the steps of a window of first-order training, by the native CPU kernels.

Their states are kept side by side, and on the way back one place holds the adjoint of the state. Autograd sees what
goes in and out besides: what layers are given, the update, and the last layer's units.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastl2l.heap import Scratch
from fastl2l.ops import averaged_native
from fastl2l.ops.again import once
from fastl2l.ops.coordinates import Coordinates
from fastl2l.ops.coupled_network import Extra, NetworkStep, rows_of_all
from fastl2l.rule_config import RuleConfig
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
        own = [weight.detach().clone() for weight in rule.weights()]
        self.weights = dict(zip([name for name, _ in self.config.weight_shapes], own, strict=True))
        count = self.config.network_weights
        self._heads = [weight.requires_grad_() for weight in own[count:]]
        self._tape = _Tape(self.config, own[:count], layers, steps, where, scratch)
        self._first = self._token = layers.new_zeros(()).requires_grad_()

    def step(self, gradient: Tensor, layers: Tensor, extra: Extra) -> NetworkStep:
        """From the gradient [N], whose numbers nobody changes till the way back, and the state of the last step."""
        rows = rows_of_all(self.config, self.where, extra)
        update, units, self._token = _Step.apply(self._tape, gradient, rows, self._token)
        return NetworkStep(update, self._tape.state, units)

    def backward(self, updates: Sequence[Tensor], adjoints: Tensor) -> Tensor:
        """The gradient with respect to all of the rule's weights, flat, from those of the updates [steps, N]."""
        wanted = [*self._heads, self._first]
        found = torch.autograd.grad(updates, wanted, adjoints.unbind(), materialize_grads=True)
        return torch.cat([self._tape.finish(), *(gradient.reshape(-1) for gradient in found[:-1])])


class _Tape:
    """The states of a window. It knows nothing of autograd's graph, which knows it: neither keeps the other alive."""

    def __init__(
        self, config: RuleConfig, weights: list[Tensor], layers: Tensor, steps: int, where: Coordinates,
        scratch: Scratch,
    ) -> None:  # fmt: skip
        self._config, self._weights, self._where, self._scratch = config, weights, where, scratch
        self._states, self._steps = scratch.borrow((steps + 1, *layers.shape), layers), 0
        self._states[0] = layers
        self._dstate = torch.zeros_like(self._states[0])
        self._dweights = layers.new_zeros(sum(weight.numel() for weight in weights))

    @property
    def state(self) -> Tensor:
        """After the last step."""
        return self._states[self._steps]

    def step(self, gradient: Tensor, rows: Tensor | None) -> tuple[int, Tensor, Tensor]:
        """The next step: its number, update and units."""
        number = self._steps
        before, after = self._states[number : number + 2]
        update, units = averaged_native.step_(
            self._config, self._weights, before, after, gradient, rows, self._where, self._config.output_scale,
            need_units=True,
        )  # fmt: skip
        self._steps += 1
        return number, update, units

    def backward(
        self, number: int, gradient: Tensor, rows: Tensor | None, adjoints: tuple[Tensor | None, Tensor | None],
        need_rows: bool,
    ) -> Tensor | None:  # fmt: skip
        """The way back of a step, after those of all later ones: to what layers were given."""
        dupdate, dunits = adjoints
        dweights, _, drows = averaged_native.window_backward(
            self._config, self._weights, self._states[number : number + 2].unbind(), gradient.unsqueeze(0),
            None if rows is None else rows.unsqueeze(0),
            (torch.zeros_like(gradient) if dupdate is None else dupdate).unsqueeze(0),
            None if dunits is None else dunits.contiguous().unsqueeze(0), self._dstate, self._where,
            self._config.output_scale, need_dextra=need_rows,
        )  # fmt: skip
        self._dweights += dweights
        return drows[0] if need_rows else None

    def finish(self) -> Tensor:
        """The gradient of the layers' weights, flat; the states' memory is the next window's."""
        self._scratch.keep(self._states)
        del self._states
        return self._dweights


class _Step(torch.autograd.Function):
    """Arguments: tape, gradient, what layers are given besides, token.

    The next step has this one's token, so that its way back comes before this one's.
    """

    @staticmethod
    def forward(ctx: Any, tape: _Tape, gradient: Tensor, rows: Tensor | None, token: Tensor) -> tuple[Tensor, ...]:
        ctx.number, update, units = tape.step(gradient, rows)
        ctx.tape = tape
        ctx.save_for_backward(gradient, rows)
        ctx.set_materialize_grads(False)
        return update, units, token.clone()

    @staticmethod
    @once
    def backward(
        ctx: Any, dupdate: Tensor | None, dunits: Tensor | None, dtoken: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        gradient, rows = ctx.saved_tensors
        need = rows is not None and ctx.needs_input_grad[2]
        drows = ctx.tape.backward(ctx.number, gradient, rows, (dupdate, dunits), need)
        return None, None, drows, gradient.new_zeros(())
