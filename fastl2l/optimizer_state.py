"""What an optimizer keeps of a parameter: the state of its coordinates, and the shape that they were in."""

from __future__ import annotations

import contextlib
import math
import operator
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple, TypeGuard

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from fastl2l.files import shown
from fastl2l.ops import memory
from fastl2l.ops.coordinates import Coordinates
from fastl2l.ops.coupled_group import MEMORY, ROWS, STEP, of_each
from fastl2l.ops.layout import TILE, from_rows, layers_apart, new_state, state_shape, to_rows
from fastl2l.ops.remembering import Remembered
from fastl2l.rule_config import RuleConfig
from fastl2l.rules import Rule
from fastl2l.sharded import from_saved, is_sharded, local, to_saved

STATE = "lstm_state"
"""The entry of ``optimizer.state[parameter]`` that holds the state."""
WHOLE = "lstm_state_rows"
"""In what is saved of a sharded parameter, its place: that of all coordinates, as a DTensor [*shape, rows]."""
UNIT = "unit"
"""The one that holds what updates of a relative rule are multiplied by, 0-d: see units.py."""
SHAPE = "shape"
"""The one that holds the shape, as sizes by number: of what is not a tensor, distributed checkpoints take numbers and
dictionaries of them."""


class Factors(NamedTuple):
    """What the updates of some parameters are multiplied by, beside the output scale and lr.

    Attributes:
        units: [params], of a relative rule.
        steps: how many steps each parameter has had, of a rule with a ramp or decay: one tensor [params], or one each.
        kept: their parts, which are among what is kept of each parameter, by name; empty where there is none.
    """

    units: Tensor | None
    steps: list[Tensor]
    kept: dict[str, list[Tensor]]

    @classmethod
    def fresh(cls, rule: Rule, count: int) -> Factors:
        """Of parameters that begin, side by side; their units are still to be put in."""
        with _numbers_of_later():
            units = torch.ones(count, dtype=rule.dtype, device=rule.device) if rule.config.relative else None
            steps = torch.zeros(count, dtype=torch.float32, device=rule.device) if rule.config.counts_steps else None
        kept = {name: list(all_of.unbind()) for name, all_of in ((UNIT, units), (STEP, steps)) if all_of is not None}
        return cls(units, [] if steps is None else [steps], kept)

    @classmethod
    def of(cls, entries: Sequence[dict[str, Any]], config: RuleConfig) -> Factors:
        """Those of parameters, by what is kept of each."""
        units = torch.stack([entry[UNIT] for entry in entries]) if config.relative else None
        return cls(units, [entry[STEP] for entry in entries] if config.counts_steps else [], {})

    def are_of(self, entries: Sequence[dict[str, Any]], config: RuleConfig) -> bool:
        """Whether these are what is kept of the parameters: somebody may have put others there."""
        if (self.units is None) == config.relative or bool(self.steps) != config.counts_steps:
            return False
        return all(
            entry.get(name) is number
            for name, numbers in self.kept.items()
            for entry, number in zip(entries, numbers, strict=True)
        )

    def now(self, rule: Rule) -> Tensor | None:
        """[params], for the next step; None if there are none."""
        if not self.steps:
            return self.units
        steps = self.steps[0] if self.steps[0].dim() else torch.stack(self.steps)
        share, config = torch.ones_like(steps), rule.config
        if config.ramp:
            share = torch.minimum(share, (steps + 1) / config.ramp)
        if config.decay:
            share = torch.minimum(share, config.decay / (steps + 1))
        return share.to(rule.dtype) if self.units is None else self.units * share.to(rule.dtype)

    def advance(self, done: Tensor | None) -> None:
        """A step has been taken, if `done`, a bool [1], is None or True."""
        for steps in self.steps:
            steps.add_(1 if done is None else done.view(()).to(steps.device, steps.dtype))


class Together(NamedTuple):
    """The states of a group's parameters side by side in one tensor, which the kernel takes in their place."""

    states: list[Tensor]
    shapes: list[torch.Size]  # of the parameters
    state: Tensor
    places: list[int]  # in memory, of the state and of its parts
    factors: Factors
    remembered: Remembered | None
    """Of a rule with a memory."""

    @classmethod
    def of(cls, rule: Rule, params: Iterable[Tensor], dtype: torch.dtype | None) -> Together:
        """Fresh ones. Even apart they are better neighbours: a kernel walks faster through one stretch of memory.

        The units of a relative rule are still to be put in: see :meth:`put_units`.
        """
        shapes = [param.shape for param in params]
        tiles = [state_shape(rule, shape.numel())[0] for shape in shapes]
        where = Coordinates(tuple(shape.numel() for shape in shapes))
        remembered = None
        with _numbers_of_later(), _lack_of_memory(rule, where, dtype):
            state = new_state(rule, sum(tiles) * TILE, rule.device, dtype)
            if rule.config.memory is not None and shapes:
                remembered = Remembered.new(rule, where, state.device, state.transpose(0, 1))
            states = list(state.split(tiles))
        factors = Factors.fresh(rule, len(shapes))
        together = cls(states, shapes, state, [], factors, remembered)
        if not torch.compiler.is_compiling() and has_data(state):
            together.places.extend(together._places())
        return together

    def put_units(self, units: Iterable[Tensor]) -> None:
        """Of a relative rule, a unit for each parameter."""
        _fill(self.factors.units, units)

    def take_factors(self, entries: Sequence[dict[str, Any]]) -> None:
        """Units and steps that were saved of each parameter."""
        _fill(self.factors.units, (entry[UNIT] for entry in entries))
        for steps in self.factors.steps:
            _fill(steps, (entry[STEP] for entry in entries))

    def take_memory(self, entries: Sequence[dict[str, Any]]) -> None:
        """What was saved of each parameter's part."""
        for own, entry in zip(self._parts(), entries, strict=True):
            for name, part in own.items():
                part.copy_(entry[name].detach())

    def _parts(self) -> list[dict[str, Tensor]]:
        """Of the memory, for each parameter."""
        if self.remembered is None:
            return [{} for _ in self.shapes]
        return of_each(self.remembered, [shape.numel() for shape in self.shapes])

    def memory_of(self, entries: Sequence[dict[str, Any]], config: RuleConfig) -> Remembered | None:
        """The memory, if the rule takes it and these are parts of it still: somebody may have put others there."""
        if self.remembered is None or self.remembered.config != config.memory:
            return None
        same = all(
            _is_at(entry.get(name), part)
            for own, entry in zip(self._parts(), entries, strict=True)
            for name, part in own.items()
        )
        return self.remembered if same else None

    def holds(self, states: Sequence[Tensor | None]) -> bool:
        """Whether these are the states, and still parts of this memory: somebody may have given them other data."""
        if len(states) != len(self.states) or not all(map(operator.is_, states, self.states)):
            return False
        return torch.compiler.is_compiling() or not has_data(self.state) or self._places() == self.places

    def _places(self) -> list[int]:
        return [self.state.data_ptr(), *map(Tensor.data_ptr, self.states)]

    def entries(self) -> list[dict[str, Any]]:
        """What is kept of each parameter."""
        entries = [new_entry(state, shape) for state, shape in zip(self.states, self.shapes, strict=True)]
        for name, numbers in self.factors.kept.items():
            for entry, number in zip(entries, numbers, strict=True):
                entry[name] = number
        for entry, parts in zip(entries, self._parts(), strict=True):
            entry.update(parts)
        return entries


def _numbers_of_later() -> contextlib.AbstractContextManager[object]:
    """Tensors that are made in it may be written to outside of the inference mode that they are made in."""
    if torch.compiler.is_compiling() or not torch.is_inference_mode_enabled():
        return contextlib.nullcontext()
    return torch.inference_mode(False)


def _fill(target: Tensor | None, numbers: Iterable[Tensor]) -> None:
    if target is not None and len(target):
        target.copy_(torch.stack([number.to(target.device, target.dtype) for number in numbers]))


def has_data(tensor: Tensor) -> bool:
    """Whether there are numbers in it."""
    return not isinstance(tensor, FakeTensor) and not tensor.is_meta


def new_entry(state: Tensor, shape: Iterable[int]) -> dict[str, Any]:
    return {STATE: state, SHAPE: {str(axis): size for axis, size in enumerate(shape)}}


def kept_shape(entry: dict[str, Any], param: Tensor) -> tuple[int, ...]:
    """The shape that a parameter had when its state was made. Those saved long ago do not say."""
    return tuple(entry[SHAPE].values()) if SHAPE in entry else tuple(param.shape)


def check_shape(entry: dict[str, Any], param: Tensor) -> None:
    """That a state belongs to the coordinates of its parameter as it is now.

    Raises:
        RuntimeError: the parameter has got data of another shape.
    """
    if (shape := kept_shape(entry, param)) != tuple(param.shape):
        raise RuntimeError(
            f"state of a parameter of shape {list(param.shape)}: expected shape {list(shape)}, as when its state was "
            "made; replace_parameter keeps the state of those rows that stay"
        )


def whole_entry(entry: dict[str, Any], param: Tensor) -> dict[str, Any]:
    """What is saved of a parameter that may be sharded."""
    if not is_sharded(param):
        return entry
    rest = {name: value for name, value in entry.items() if name not in (STATE, SHAPE)}
    sizes = {str(axis): size for axis, size in enumerate(param.shape)}
    return {**rest, WHOLE: to_saved(entry[STATE], param), SHAPE: sizes}


def local_entry(key: object, entry: dict[str, Any], rule: Rule, param: Tensor) -> dict[str, Any]:
    """What is kept of a parameter here, of an entry that was saved of a sharded or of a whole one.

    Raises:
        ValueError: the saved state is of another shape, or sharded otherwise.
    """
    saved = entry.get(WHOLE)
    if saved is None and is_sharded(param) and tuple(entry[STATE].shape) == state_shape(rule, param.numel()):
        saved = to_rows(entry[STATE], param.numel()).unflatten(1, param.shape).movedim(0, -1).contiguous()
    if saved is None:
        return entry
    try:
        state = from_saved(saved, param, rule.config.state_rows)
    except ValueError as error:
        raise ValueError(f"state of parameter {key}: {error}") from error
    rest = {name: value for name, value in entry.items() if name != WHOLE}
    here = local(param)
    layers = state.unflatten(1, state_shape(rule, here.numel())[1:-1])
    return {**rest, **new_entry(layers_apart(layers), here.shape)}


def check_saved(key: object, entry: dict[str, Any], rule: Rule, param: Tensor, dtype: torch.dtype) -> None:
    """That a saved state is one of this parameter.

    Raises:
        ValueError: its shape or dtype is another, its parameter had another shape, or it is something else.
    """
    found, sizes = entry[STATE], entry.get(SHAPE, {})
    dense = isinstance(found, Tensor) and _is_dense(found, param.device)
    if not dense or not isinstance(sizes, dict):
        got = f"{type(found).__name__} and {type(sizes).__name__}"
        raise ValueError(f"state of parameter {key}: expected a dense tensor and a dictionary of sizes, got {got}")
    if rule.config.relative and not (_is_number(entry.get(UNIT), rule.dtype) and entry[UNIT].to(rule.dtype) > 0):
        got = shown(entry.get(UNIT))
        raise ValueError(f"state of parameter {key}: expected its unit, a finite number > 0 as a 0-d tensor, got {got}")
    steps = entry.get(STEP)
    counted = _is_number(steps, torch.float32) and float(steps) >= 0 and float(steps).is_integer()
    if rule.config.counts_steps and not counted:
        raise ValueError(
            f"state of parameter {key}: expected its steps, a whole number >= 0 as a 0-d tensor, got {shown(steps)}"
        )
    if (shape := kept_shape(entry, param)) != tuple(param.shape):
        raise ValueError(
            f"state of parameter {key}: expected one of a parameter of shape {list(param.shape)}, got {list(shape)}"
        )
    expected = state_shape(rule, param.numel())
    if tuple(found.shape) != expected or found.dtype != dtype:
        raise ValueError(
            f"state of parameter {key}: expected {list(expected)} of {dtype}, got {list(found.shape)} of {found.dtype}"
        )


def check_memory(number: int, entries: Sequence[dict[str, Any]], params: Sequence[Tensor], rule: Rule) -> None:
    """That the saved states of a group are those of all its parameters, whose memory they have parts of, or none.

    Raises:
        ValueError: they are not, or are parts of the memory of another number of coordinates, or of other steps.
    """
    config = rule.config.memory
    if config is None or not entries:
        return
    if len(entries) != len(params):
        raise ValueError(
            f"state of group {number}: expected the states of all parameters of a group, which share a memory, got "
            f"{len(entries)} of {len(params)}"
        )
    numel = sum(param.numel() for param in params)
    for entry, param in zip(entries, params, strict=True):
        if wrong := _wrong_part(entry, param, rule, numel):
            raise ValueError(f"state of group {number}: {wrong}")
    if len(steps := {float(entry[STEP]) for entry in entries}) > 1:
        raise ValueError(
            f"state of group {number}: expected {STEP} to be the same of all parameters, which share a memory, got "
            f"{', '.join(f'{step:g}' for step in sorted(steps))}"
        )


def check_remembered(entries: Sequence[dict[str, Any]], params: Sequence[Tensor], rule: Rule) -> None:
    """That there is the memory that a rule takes of parameters which have been stepped, or none.

    Raises:
        RuntimeError: they were stepped by a rule of another memory.
    """
    numel = sum(param.numel() for param in params)
    for entry, param in zip(entries, params, strict=True):
        if STATE in entry and (wrong := _wrong_part(entry, param, rule, numel)):
            raise RuntimeError(f"state: {wrong}; a rule with another memory takes a new optimizer")


def _wrong_part(entry: dict[str, Any], param: Tensor, rule: Rule, numel: int) -> str:
    """What is wrong with a parameter's part of the memory of so many coordinates."""
    config = rule.config.memory
    if config is None:
        return f"expected no {MEMORY} of {rule}, got one" if MEMORY in entry else ""
    for name, shape in {ROWS: (config.rows, 1, numel), MEMORY: memory.shape(config, 1, numel)}.items():
        expected, found = (*shape[:-1], param.numel()), entry.get(name)
        if not isinstance(found, Tensor):
            got = shown(found)
        elif tuple(found.shape) != expected or found.dtype != rule.dtype or not _is_dense(found, rule.device):
            got = f"{list(found.shape)} of {found.dtype}, {found.layout}, on {found.device}"
        else:
            continue
        return f"expected {name} of {list(expected)} of {rule.dtype}, as {numel} coordinates in all have it, got {got}"
    return ""


def _is_at(found: object, part: Tensor) -> bool:
    """Whether it is this part of a memory."""
    if not isinstance(found, Tensor) or (found.shape, found.dtype) != (part.shape, part.dtype):
        return False
    return found.data_ptr() == part.data_ptr()


def _is_dense(found: Tensor, device: torch.device) -> bool:
    """Whether there are numbers, one after the other, that can be copied to this device."""
    return found.layout == torch.strided and found.is_meta == (device.type == "meta")


def _is_number(found: Any, dtype: torch.dtype) -> TypeGuard[Tensor]:
    """Whether it is a 0-d tensor, finite in this dtype."""
    if not isinstance(found, Tensor) or found.shape != () or not found.is_floating_point():
        return False
    return found.layout == torch.strided and not found.is_meta and math.isfinite(float(found.to(dtype)))


def check_factors(entries: Iterable[dict[str, Any]], config: RuleConfig) -> None:
    """That there are the units and steps that a rule takes of parameters which have been stepped.

    Raises:
        RuntimeError: they were stepped by a rule that has none.
    """
    for name, wanted in ((UNIT, config.relative), (STEP, config.counts_steps)):
        if wanted and any(STATE in entry and name not in entry for entry in entries):
            what = "a relative one" if name == UNIT else "one with a ramp or decay"
            raise RuntimeError(
                f"rule: expected one that makes updates into steps as the one before it did, got {what}, whose {name} "
                "is not kept of parameters that the other has stepped; make a new optimizer for it"
            )


def select_rows(entry: dict[str, Any], old: Tensor, new: Tensor, rows: Any) -> dict[str, Any]:
    """What is kept of `new`, whose first rows go on from these rows of `old`, while those after them begin.

    Raises:
        ValueError: `old` has no rows, or not these, or `new` has rows of another shape, or fewer.
    """
    shape = kept_shape(entry, old)
    if not shape or new.dim() != len(shape) or new.shape[1:] != shape[1:]:
        raise ValueError(f"new: expected the shape {list(shape)} but for the number of rows, got {list(new.shape)}")
    try:
        chosen = slice(None) if rows is None else torch.as_tensor(rows, device=entry[STATE].device)
        if isinstance(chosen, Tensor) and chosen.numel() and (chosen.is_floating_point() or chosen.is_complex()):
            raise TypeError(f"got numbers of {chosen.dtype}")
        if isinstance(chosen, Tensor) and not chosen.numel():
            chosen = slice(0, 0)
        index = torch.arange(shape[0], device=entry[STATE].device)[chosen]
    except (IndexError, TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"rows: expected a mask or indices of {shape[0]} rows, as old has; {error}") from error
    if index.dim() != 1 or len(index) > len(new):
        raise ValueError(f"rows: expected at most {len(new)}, as many as new has, got {list(index.shape)}")
    kept = to_rows(entry[STATE], math.prod(shape)).unflatten(1, shape)[:, index].flatten(1)
    begun = kept.new_zeros(len(kept), new.numel() - kept.shape[1])
    state = from_rows(torch.cat([kept, begun], 1)).unflatten(1, entry[STATE].shape[1:-1])
    return new_entry(layers_apart(state), new.shape)


@contextlib.contextmanager
def _lack_of_memory(rule: Rule, where: Coordinates, dtype: torch.dtype | None) -> Iterator[None]:
    """What is raised where there is none for new states says what would help."""
    try:
        yield
    except RuntimeError as error:
        # The CPU's allocator has no error of its own.
        if not isinstance(error, torch.OutOfMemoryError) and "DefaultCPUAllocator" not in str(error):
            raise
        config = rule.config
        size = math.prod(state_shape(rule, where.numel)) * (dtype or rule.dtype).itemsize
        if config.memory is not None:
            size += math.prod(memory.shape(config.memory, 1, where.numel)) * rule.dtype.itemsize
        halved = dtype is None and rule.dtype == torch.float32 and config.takes_bfloat16_state
        half = "state_dtype=torch.bfloat16 (half as much), " if halved else ""
        raise torch.OutOfMemoryError(
            f"state of {where.numel:,} coordinates: expected {size / 2**30:,.1f} GiB of free memory on {rule.device}, "
            f"got less; take {half}fewer parameters, fewer of them in a group (whose new states are one piece of "
            "memory) or a rule of fewer units; nothing was changed"
        ) from error
