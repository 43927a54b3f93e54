"""Windows of first-order training of rules whose coordinates talk: steps whose states are kept, and their way back."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from fastl2l import reference
from fastl2l.heap import Scratch
from fastl2l.ops import averaged_layer, averaged_native, remembering
from fastl2l.ops.coordinates import Coordinates
from fastl2l.ops.coupled import State
from fastl2l.ops.coupled_network import Network
from fastl2l.ops.dispatch import Backend
from fastl2l.ops.recorded_layers import RecordedLayers
from fastl2l.ops.recorded_pairs import RecordedPairs
from fastl2l.ops.remembering import Remembered
from fastl2l.rules import Rule


class Recording(Protocol):
    """Steps of a window."""

    @property
    def state(self) -> State:
        """After the last step."""

    def step(self, gradient: Tensor) -> Tensor:
        """One step, from the gradient [N] to the update [N]."""

    def backward(self, gradients: Tensor, adjoints: Tensor) -> Tensor:
        """The gradient of ``sum(adjoints * updates)`` with respect to the rule's weights, flat.

        Args:
            gradients: what the steps were given, [steps, N].
            adjoints: [steps, N].
        """


def record(
    rule: Rule, state: State, steps: int, where: Coordinates, backend: Backend, scratch: Scratch | None = None
) -> Recording:
    """Begin a window.

    Args:
        rule: as its weights are now.
        state: before the first step; it is left as it is.
        steps: how many there are.
        where: which function each coordinate belongs to.
        backend: does the work.
        scratch: for the states of the steps, till the window's way back.
    """
    with reference.exact(state.rows.device if isinstance(state, Remembered) else state.device):
        scratch = scratch or Scratch()
        if isinstance(state, Remembered):
            return _WithMemory(rule, state, steps, where, backend, scratch)
        native = averaged_native.takes(rule.config, state.device, where, backend)
        return (_Native if native else _ByLayer)(rule, state, steps, where, backend, scratch)


class _OfAverages(ABC):
    """Of a rule without a memory: its states are kept side by side, so that the way back needs no graph."""

    @torch.no_grad()
    def __init__(
        self, rule: Rule, state: Tensor, steps: int, where: Coordinates, backend: Backend, scratch: Scratch
    ) -> None:
        self._config, self._where, self._backend, self._scratch = rule.config, where, backend, scratch
        self._weights = [weight.detach().clone() for weight in rule.weights()]
        layers = state.detach().transpose(0, 1)
        self._states = scratch.borrow((steps + 1, *layers.shape), layers)  # [steps + 1, layers, tiles, rows, 16]
        self._states[0] = layers
        self._steps = 0

    @property
    def state(self) -> Tensor:
        return self._states[self._steps].transpose(0, 1).clone()

    @torch.no_grad()
    def step(self, gradient: Tensor) -> Tensor:
        before, after = self._states[self._steps : self._steps + 2]
        update = self._step(gradient, before, after)
        self._steps += 1
        return update

    @torch.no_grad()
    def backward(self, gradients: Tensor, adjoints: Tensor) -> Tensor:
        if not self._steps == len(self._states) - 1 == len(gradients):
            raise RuntimeError(
                f"window: expected {len(self._states) - 1} steps and their gradients before its way back, got "
                f"{self._steps} and {len(gradients)}"
            )
        found = self._backward(gradients, adjoints)
        self._scratch.keep(self._states)
        del self._states  # they are the next window's
        return found

    @abstractmethod
    def _step(self, gradient: Tensor, before: Tensor, after: Tensor) -> Tensor:
        """One step, from the layers' states `before` to `after`, which holds anything."""

    @abstractmethod
    def _backward(self, gradients: Tensor, adjoints: Tensor) -> Tensor:
        """As `backward`."""


class _Native(_OfAverages):
    """By one call a step, and one for the way back."""

    def _step(self, gradient: Tensor, before: Tensor, after: Tensor) -> Tensor:
        config = self._config
        return averaged_native.step_(
            config, self._weights, before, after, gradient, None, self._where, config.output_scale
        )[0]

    def _backward(self, gradients: Tensor, adjoints: Tensor) -> Tensor:
        config, states = self._config, self._states.unbind()
        return averaged_native.window_backward(
            config, self._weights, states, gradients, None, adjoints, None, None, self._where, config.output_scale
        )[0]


class _ByLayer(_OfAverages):
    """By a call of the backend's operators for each layer and step."""

    def __init__(
        self, rule: Rule, state: Tensor, steps: int, where: Coordinates, backend: Backend, scratch: Scratch
    ) -> None:
        super().__init__(rule, state, steps, where, backend, scratch)
        scale = rule.config.output_scale
        self._network = Network(rule.config, self._weights, averaged_layer.step_, where, scale, backend)
        self._means: list[Tensor] = []  # of the last layer, of each step

    def _step(self, gradient: Tensor, before: Tensor, after: Tensor) -> Tensor:
        with reference.exact(gradient.device):
            update, steps = self._network.run(gradient, after.copy_(before).unbind())
        self._means.append(steps[-1].means)
        return update

    def _backward(self, gradients: Tensor, adjoints: Tensor) -> Tensor:
        network, dstates = self._network, list(torch.zeros_like(self._states[0]).unbind())
        totals = [gradients.new_zeros(sum(weight.numel() for weight in layer.weights)) for layer in network.layers]
        shared = gradients.new_zeros(network.layers[-1].averages)
        with reference.exact(gradients.device):
            for step in reversed(range(len(gradients))):
                dshared, dmeans = network.shared_backward(self._means[step], adjoints[step])
                shared += dshared
                found = self._step_backward(step, gradients[step], adjoints[step], dmeans, dstates)
                for total, dweights in zip(totals, found, strict=True):
                    total += dweights
        # In the last layer's own output are no averaged units.
        totals[-1].split([weight.numel() for weight in network.layers[-1].weights])[3][: len(shared)] = shared
        return torch.cat(totals)

    def _step_backward(
        self, step: int, gradient: Tensor, dupdate: Tensor, dmeans: Tensor, dstates: list[Tensor]
    ) -> list[Tensor]:
        """Of each layer's weights; the states' adjoints become those before the step."""
        network, last, found = self._network, len(dstates) - 1, list[Tensor]()
        nothing, dunits = torch.zeros_like(dupdate), None
        for number in range(last, -1, -1):
            layer, given = network.layers[number], None
            if number:
                given = self._states[step + 1, number - 1, :, : network.layers[number - 1].units].contiguous()
            of_last = (dupdate, dstates[number], dmeans, None)
            adjoints = of_last if number == last else (nothing, dstates[number], None, dunits)
            dweights, _, dstates[number], dunits = averaged_layer.backward_(
                layer, gradient, self._states[step, number], given, network.where, network.scale, self._backend,
                adjoints, (False, step > 0, number > 0),
            )  # fmt: skip
            found.append(dweights)
        return found[::-1]


class _WithMemory:
    """By autograd, which keeps what it needs; but for the layers where kernels keep their states."""

    def __init__(
        self, rule: Rule, state: Remembered, steps: int, where: Coordinates, backend: Backend, scratch: Scratch
    ) -> None:
        self._now, self._updates = state.recorded(steps, scratch), list[Tensor]()
        self._network: RecordedLayers | _ByAutograd
        if averaged_native.takes(rule.config, state.rows.device, where, backend):
            self._network = RecordedLayers(rule, state.layers_together(), steps, where, scratch)
        else:
            self._network = _ByAutograd(rule, where, backend)

    @property
    def state(self) -> Remembered:
        now = self._now.detach()
        if isinstance(now.layers, Tensor):
            now.layers = now.layers.clone()  # of scratch
        return now

    def step(self, gradient: Tensor) -> Tensor:
        with torch.enable_grad(), reference.exact(gradient.device):
            # A gradient is its caller's to write to.
            update, self._now = remembering.step(self._network, gradient.clone(), self._now)
        self._updates.append(update)
        return update.detach()

    def backward(self, gradients: Tensor, adjoints: Tensor) -> Tensor:
        with reference.exact(adjoints.device):
            found = self._network.backward(self._updates, adjoints)
        if isinstance(self._now.memory, RecordedPairs):
            self._now.memory.release()
        del self._now  # its memory is the next window's
        return found


class _ByAutograd(Network):
    """Layers whose states autograd keeps."""

    def __init__(self, rule: Rule, where: Coordinates, backend: Backend) -> None:
        self._all = [weight.detach().requires_grad_() for weight in rule.weights()]
        with torch.enable_grad():
            super().__init__(rule.config, self._all, averaged_layer.step, where, rule.config.output_scale, backend)

    def backward(self, updates: Sequence[Tensor], adjoints: Tensor) -> Tensor:
        """The gradient with respect to all weights, flat, from those of the updates [steps, N]."""
        found = torch.autograd.grad(updates, self._all, adjoints.unbind(), materialize_grads=True)
        return torch.cat([gradient.reshape(-1) for gradient in found])
