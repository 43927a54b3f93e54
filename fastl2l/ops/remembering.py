"""A step of a rule with a memory (Andrychowicz et al. 2016, appendix D): what is between its layers and after them.

All that is not a kernel's is here as plain torch on [rows, functions, dim]: what the memory is asked for and told.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor

from fastl2l.heap import Scratch
from fastl2l.memory_config import LARGEST_SEEN, MemoryConfig
from fastl2l.ops import memory
from fastl2l.ops.averaged_layer import LayerStep
from fastl2l.ops.bounds import limited, reciprocal, rms
from fastl2l.ops.coordinates import Coordinates
from fastl2l.ops.coupled_network import Extra, NetworkStep
from fastl2l.ops.layout import new_state
from fastl2l.ops.recorded_pairs import RecordedPairs
from fastl2l.rules import Rule

LEFT, RIGHT = 0.1, 1.0
"""Of written vectors, over the root of the number of coordinates: so that what all of them do is of one size."""


@dataclass
class Remembered:
    """The state of a rule with a memory.

    Attributes:
        layers: of each layer, [tiles, rows, 16]; or of all of them, [layers, tiles, rows, 16].
        rows: what is kept of each coordinate besides, [rows, functions, dim]: gradient and update, results of reads.
        memory: a Tensor, see ops/memory.py; or `RecordedPairs`, over the steps of a window.
        steps: how many there have been.
    """

    config: MemoryConfig
    layers: Sequence[Tensor] | Tensor
    rows: Tensor
    memory: Any
    steps: int = 0

    @classmethod
    def new(cls, rule: Rule, where: Coordinates, device: torch.device, layers: Tensor | None = None) -> Remembered:
        """At the start of a trajectory; `layers` are fresh states, in place of its own.

        Raises:
            ValueError: the memory would be too large. Nothing has been allocated then.
        """
        config = rule.config.memory
        if config is None:
            raise ValueError(f"rule: expected one with a memory, got {rule}")
        memory.check_size(config, where.functions, where.dim, rule.dtype.itemsize)
        numbers: dict[str, Any] = {"dtype": rule.dtype, "device": device}
        made = torch.empty(memory.shape(config, where.functions, where.dim), **numbers)
        rows = torch.zeros(config.rows, where.functions, where.dim, **numbers)
        layers = new_state(rule, where.numel, device).transpose(0, 1) if layers is None else layers
        return cls(config, layers, rows, memory.begin_(config, made))

    def layers_together(self) -> Tensor:
        """The layers' states, which are one tensor from now on."""
        if not isinstance(self.layers, Tensor):
            self.layers = torch.stack(list(self.layers))
        return self.layers

    def zero_(self) -> Remembered:
        """Be at the start of a trajectory again, in the same memory."""
        for tensor in (*self.layers, self.rows):
            tensor.zero_()
        memory.begin_(self.config, self.memory)
        self.steps = 0
        return self

    def clone(self) -> Remembered:
        return Remembered(self.config, self._each(Tensor.clone), self.rows.clone(), self.memory.clone(), self.steps)

    def recorded(self, steps: int, scratch: Scratch | None = None) -> Remembered:
        """The same, to be stepped so often, once, for autograd; `scratch` is as for `RecordedPairs`."""
        if self.config.kind != "pairs":
            return self
        return replace(self, memory=RecordedPairs(self.config, self.memory, self.steps, steps, scratch))

    @property
    def last_update(self) -> Tensor:
        """What coordinates have changed by, [functions, dim], of a memory that is told of differences."""
        return self.rows[1]

    def detach(self) -> Remembered:
        layers = self._each(Tensor.detach)
        return Remembered(self.config, layers, self.rows.detach(), self.memory.detach(), self.steps)

    def _each(self, function: Callable[[Tensor], Tensor]) -> Sequence[Tensor] | Tensor:
        return function(self.layers) if isinstance(self.layers, Tensor) else [function(one) for one in self.layers]


class Layers(Protocol):
    """All layers, as a step with a memory wants them."""

    where: Coordinates
    scale: float
    weights: dict[str, Tensor]

    def step(self, gradient: Tensor, layers: Any, extra: Extra) -> NetworkStep:
        """One step, from the gradient [N] and the layers' states."""


def step(network: Layers, gradient: Tensor, state: Remembered) -> tuple[Tensor, Remembered]:
    """From the gradient [N] to the update [N] and the state after it, for autograd."""
    told = _Step(network, gradient, state)
    new = memory.write(told.config, state.memory, told.pairs, state.steps)
    return told.update, Remembered(told.config, told.layers, told.rows(new), new, state.steps + 1)


def step_(network: Layers, gradient: Tensor, state: Remembered) -> Tensor:
    """The same, in place."""
    told = _Step(network, gradient, state)
    memory.write_(told.config, state.memory, told.pairs, state.steps)
    state.rows.copy_(told.rows(state.memory))
    state.steps += 1
    return told.update


def _seen(vector: Tensor) -> Tensor:
    """So that squares are finite in float32, and a bound has something to measure."""
    return vector.clamp(-LARGEST_SEEN, LARGEST_SEEN)


class _Step:
    """What is done before anything is written; afterwards `rows` says what is to be kept of the coordinates."""

    def __init__(self, network: Layers, gradient: Tensor, state: Remembered) -> None:
        self.config, self._network, self._state = state.config, network, state
        self._where = network.where
        self._g = _seen(self.config.scale * self._by_function(gradient))
        self._reads = state.rows[2 * self.config.differences :]
        if self.config.differences:
            self._s, self._y = self._differences()
        update, self.layers, h = network.step(gradient, state.layers, self._extra)
        self._of_units = self._heads(self._after, h)
        self._move = self._along_reads(self._by_function(update))
        self.update = self._where.flat(self._move)
        self.pairs = self._written()

    def rows(self, new: memory.Memory) -> Tensor:
        """What the next step is to have of the coordinates, from the memory after this one."""
        kept = [self._g.unsqueeze(0), self._move.unsqueeze(0)] if self.config.differences else []
        if not self.config.inside:
            kept.append(self._read(new, self._of_units.get("read"), self._state.steps + 1))
        return torch.cat(kept) if kept else self._state.rows

    def _differences(self) -> tuple[Tensor, Tensor]:
        """The last update and the change of the gradient in units of that update's root mean square."""
        before, update = self._state.rows[:2]
        s, y = torch.stack([update, self._g - before]) * reciprocal(rms(update))
        return s, limited(_seen(y), self.config.read_bound)

    def _extra(self, number: int, before: LayerStep | None) -> Tensor | None:
        """What layers are given: differences and results for the first, what this step reads for the second."""
        rows: list[Tensor] = []
        if number == 0 and self.config.differences:
            rows += [self._s, self._y, self._s * self._y]
        if number == 0 and not self.config.inside:
            rows += self._reads.unbind()
        if number == 1 and self.config.inside:
            of_units = {} if before is None else self._heads(self._within, self._where.rows(before.units))
            self._reads = self._read(self._state.memory, of_units.get("read"), self._state.steps)
            rows += self._reads.unbind()
            rows += [self._y * self._reads[1]] if self.config.multiply else []
        return torch.stack(rows) if rows else None

    def _read(self, from_memory: memory.Memory, vectors: Tensor | None, steps: int) -> Tensor:
        """Results of reads, [reads, functions, dim]; heads that multiply ask for no vectors of their own."""
        config = self.config
        vectors = torch.stack([self._g, self._y]) if vectors is None else vectors
        found = memory.read(config, from_memory, vectors, steps)
        if config.read_bound is None:
            return found
        most = torch.full_like(found[..., :1], config.read_bound)
        if config.multiply:  # M g is a step's direction, and is to fall with the gradient
            most = torch.cat([config.read_bound * rms(vectors[:1]), most[1:]])
        return limited(found, most)

    def _along_reads(self, update: Tensor) -> Tensor:
        """The update [functions, dim], with the network's multiple of M g, and bounded."""
        scale, bound = self._network.scale, self.config.update_bound
        if self.config.multiply:
            update = update + scale * self._of_units["step"][0] * self._reads[0]
        return update if bound is None else update.clamp(-bound * scale, bound * scale)

    def _written(self) -> Tensor:
        """[2, writes, functions, dim]: left vectors, and right ones."""
        config = self.config
        found = self._of_units["write"].unflatten(0, (2, config.writes, config.terms))
        if config.multiply:
            found = found * torch.stack([self._s, self._reads[1]])
        sizes = found.new_tensor([LEFT, RIGHT]) / self._where.dim**0.5
        return found.sum(2) * sizes.view(2, 1, 1, 1)

    @property
    def _within(self) -> list[str]:
        """Heads on the first layer's units."""
        return ["read"] if self.config.asks_units_within else []

    @property
    def _after(self) -> list[str]:
        """Heads on the last layer's units."""
        of_reads = "step" if self.config.multiply else "read"
        return ["write"] if self.config.asks_units_within else ["write", of_reads]

    def _heads(self, names: Sequence[str], h: Tensor) -> dict[str, Tensor]:
        """Linear outputs of a layer's units [units, N], by name: [heads, functions, dim]; by one product."""
        if not names:
            return {}
        weights = [self._network.weights[f"weight_{name}"].view(-1, len(h)) for name in names]
        biases = [self._network.weights[f"bias_{name}"].view(-1, 1) for name in names]
        found = self._where.by_function(torch.addmm(torch.cat(biases), torch.cat(weights), h))
        return dict(zip(names, found.split([len(weight) for weight in weights]), strict=True))

    def _by_function(self, vector: Tensor) -> Tensor:
        return self._where.by_function(vector.unsqueeze(0))[0]
