"""Windows of first-order training of rules whose coordinates talk: steps whose states are kept, and their way back."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import replace
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
    scratch = scratch or Scratch()
    # What autograd is to keep may not be made in inference mode.
    with (
        torch.inference_mode(False),
        reference.exact(state.rows.device if isinstance(state, Remembered) else state.device),
    ):
        if isinstance(state, Remembered):
            return _WithMemory(rule, state, steps, where, backend, scratch)
        native = averaged_native.takes(rule.config, state.device, where, backend)
        return (_Native if native else _ByLayer)(rule, state, steps, where, backend, scratch)


class _Window(ABC):
    """So many steps, and then their way back, once."""

    def __init__(self, steps: int) -> None:
        self._taken, self._wanted, self._over = 0, steps, False

    @property
    def state(self) -> State:
        if self._over:
            raise RuntimeError("window: expected its state to be asked for before its way back")
        return self._state()

    def step(self, gradient: Tensor) -> Tensor:
        if self._over or self._taken == self._wanted:
            raise RuntimeError(f"window: expected {self._wanted} steps before its way back, got another one")
        update = self._step(gradient)
        self._taken += 1
        return update

    def backward(self, gradients: Tensor, adjoints: Tensor) -> Tensor:
        if self._over:
            raise RuntimeError("window: expected one way back, got another one")
        if not self._taken == self._wanted == len(gradients):
            raise RuntimeError(
                f"window: expected {self._wanted} steps and their gradients before its way back, got {self._taken} and "
                f"{len(gradients)}"
            )
        self._over = True
        return self._backward(gradients, adjoints)

    @abstractmethod
    def _state(self) -> State:
        """After the last step."""

    @abstractmethod
    def _step(self, gradient: Tensor) -> Tensor:
        """One step."""

    @abstractmethod
    def _backward(self, gradients: Tensor, adjoints: Tensor) -> Tensor:
        """As `backward`; nothing of the window is needed any longer then."""


class _OfAverages(_Window):
    """Of a rule without a memory: its states are kept side by side, so that the way back needs no graph."""

    @torch.no_grad()
    def __init__(
        self, rule: Rule, state: Tensor, steps: int, where: Coordinates, backend: Backend, scratch: Scratch
    ) -> None:
        super().__init__(steps)
        self._config, self._where, self._backend, self._scratch = rule.config, where, backend, scratch
        self._weights = [weight.detach().clone() for weight in rule.weights()]
        layers = state.detach().transpose(0, 1)
        self._states = scratch.borrow((steps + 1, *layers.shape), layers)  # [steps + 1, layers, tiles, rows, 16]
        self._states[0] = layers

    def _state(self) -> Tensor:
        return self._states[self._taken].transpose(0, 1).clone()

    @torch.no_grad()
    def _step(self, gradient: Tensor) -> Tensor:
        before, after = self._states[self._taken : self._taken + 2]
        return self._forward_of(gradient, before, after)

    @torch.no_grad()
    def _backward(self, gradients: Tensor, adjoints: Tensor) -> Tensor:
        found = self._backward_of(gradients, adjoints)
        self._scratch.keep(self._states)
        del self._states  # they are the next window's
        return found

    @abstractmethod
    def _forward_of(self, gradient: Tensor, before: Tensor, after: Tensor) -> Tensor:
        """One step, from the layers' states `before` to `after`, which holds anything."""

    @abstractmethod
    def _backward_of(self, gradients: Tensor, adjoints: Tensor) -> Tensor:
        """As `backward`."""


class _Native(_OfAverages):
    """By one call a step, and one for the way back."""

    def _forward_of(self, gradient: Tensor, before: Tensor, after: Tensor) -> Tensor:
        config = self._config
        return averaged_native.step_(
            config, self._weights, before, after, gradient, None, self._where, config.output_scale
        )[0]

    def _backward_of(self, gradients: Tensor, adjoints: Tensor) -> Tensor:
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

    def _forward_of(self, gradient: Tensor, before: Tensor, after: Tensor) -> Tensor:
        with reference.exact(gradient.device):
            update, steps = self._network.run(gradient, after.copy_(before).unbind())
        self._means.append(steps[-1].means)
        return update

    def _backward_of(self, gradients: Tensor, adjoints: Tensor) -> Tensor:
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


class _WithMemory(_Window):
    """By autograd, which keeps what it needs; but for the layers where kernels keep their states."""

    def __init__(
        self, rule: Rule, state: Remembered, steps: int, where: Coordinates, backend: Backend, scratch: Scratch
    ) -> None:
        super().__init__(steps)
        # The window's result depends on rows till its end; a matrix, or layers', autograd itself watches.
        layers, memory = _watched(state.layers_together()), _watched(state.memory)
        own = replace(state, layers=layers, rows=state.rows.clone(), memory=memory)
        self._now, self._updates = own.recorded(steps, scratch), list[Tensor]()
        self._network: RecordedLayers | _ByAutograd
        if averaged_native.takes(rule.config, state.rows.device, where, backend):
            self._network = RecordedLayers(rule, own.layers_together(), steps, where, scratch)
        else:
            self._network = _ByAutograd(rule, where, backend)

    def _state(self) -> Remembered:
        now = self._now.detach()
        if isinstance(now.layers, Tensor):
            now.layers = now.layers.clone()  # of scratch
        return now

    @torch.inference_mode(False)
    def _step(self, gradient: Tensor) -> Tensor:
        with torch.enable_grad(), reference.exact(gradient.device):
            # A gradient is its caller's to write to.
            update, self._now = remembering.step(self._network, gradient.clone(), self._now)
        self._updates.append(update)
        return update.detach()

    @torch.inference_mode(False)
    def _backward(self, gradients: Tensor, adjoints: Tensor) -> Tensor:
        with reference.exact(adjoints.device):
            found = self._network.backward(self._updates, adjoints)
        if isinstance(self._now.memory, RecordedPairs):
            self._now.memory.release()
        del self._now, self._network, self._updates  # their memory is the next window's
        return found


def _watched(tensor: Tensor) -> Tensor:
    """It, or a copy of what was made in inference mode: that is not for autograd."""
    return tensor.clone() if tensor.is_inference() else tensor


class _ByAutograd(Network):
    """Layers whose states autograd keeps."""

    def __init__(self, rule: Rule, where: Coordinates, backend: Backend) -> None:
        self._all = [weight.detach().clone().requires_grad_() for weight in rule.weights()]
        with torch.enable_grad():
            super().__init__(rule.config, self._all, averaged_layer.step, where, rule.config.output_scale, backend)

    def backward(self, updates: Sequence[Tensor], adjoints: Tensor) -> Tensor:
        """The gradient with respect to all weights, flat, from those of the updates [steps, N]."""
        found = torch.autograd.grad(updates, self._all, adjoints.unbind(), materialize_grads=True)
        return torch.cat([gradient.reshape(-1) for gradient in found])
