"""FusedLSTMOptimizer: a learned rule as a drop-in ``torch.optim`` optimizer."""

from __future__ import annotations

import operator
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.distributed import ProcessGroup

from fastl2l.files import shown
from fastl2l.ops.coupled_group import MEMORY, ROWS, STEP, step_of
from fastl2l.ops.dispatch import Backend, select
from fastl2l.ops.memory import check_size
from fastl2l.ops.remembering import Remembered
from fastl2l.optimizer_checks import (
    check_gradient,
    check_group,
    check_options,
    check_parameter,
    check_same_rule,
    check_state_dtype,
    missing_gradient,
)
from fastl2l.optimizer_state import (
    SHAPE,
    STATE,
    UNIT,
    WHOLE,
    Factors,
    Together,
    check_factors,
    check_memory,
    check_remembered,
    check_saved,
    check_shape,
    has_data,
    local_entry,
    select_rows,
    whole_entry,
)
from fastl2l.processes import ProcessError
from fastl2l.rule_config import RuleConfig
from fastl2l.rules import Rule
from fastl2l.sharded import BEGINS, FAILED, READY, agree, any_sharded, digests_of, groups_between, groups_of, local
from fastl2l.sharded import check as check_sharding
from fastl2l.units import unit_of

NONFINITE = ("raise", "skip", "propagate")


class _Batch(NamedTuple):
    """What one kernel call takes of a parameter group, and the parameters that it works on copies of."""

    number: int  # of the group
    group: dict[str, Any]
    owners: list[Tensor]
    params: list[Tensor]  # what this process has of them
    grads: list[Tensor]
    copies: list[tuple[Tensor, Tensor]]

    @classmethod
    def of(cls, number: int, group: dict[str, Any]) -> _Batch:
        """The parameters that have a gradient, as they are: nothing has been looked at yet."""
        owners, grads = group["params"], [param.grad for param in group["params"]]
        if any(grad is None for grad in grads):
            owners = [param for param, grad in zip(owners, grads, strict=True) if grad is not None]
            grads = [grad for grad in grads if grad is not None]
        if not any_sharded(owners):
            return cls(number, group, owners, owners, grads, [])
        return cls(number, group, owners, list(map(local, owners)), list(map(local, grads)), [])

    @property
    def device(self) -> torch.device:
        """Where the rule is, and all that it works on."""
        device: torch.device = self.group["rule"].device
        return device

    def check(self) -> None:
        """That the rule can take all of it.

        Raises:
            RuntimeError: a parameter or a gradient is of a kind that it cannot.
        """
        for param, grad in zip(self.params, self.grads, strict=True):
            check_parameter(param, self.device)
            check_gradient(param, grad)

    def checked(self) -> _Batch:
        """With contiguous copies of what is not contiguous. Raises as :meth:`check` does."""
        self.check()
        for param in self.params:
            if any(size > 1 and stride == 0 for size, stride in zip(param.shape, param.stride(), strict=True)):
                raise RuntimeError(
                    f"parameter of shape {list(param.shape)}: expected a place in memory for each number, got an "
                    "expanded tensor"
                )
        params = [param.contiguous() for param in self.params]
        copies = [(param, work) for param, work in zip(self.params, params, strict=True) if work is not param]
        return self._replace(params=params, grads=[grad.contiguous() for grad in self.grads], copies=copies)

    def is_of(self, other: _Batch) -> bool:
        """Whether both give a kernel the same tensors."""
        return all(map(operator.is_, self.params + self.grads, other.params + other.grads))


class _Kept(NamedTuple):
    """What is kept of the parameters that one kernel call takes."""

    states: list[Tensor]
    entries: Sequence[dict[str, Any]]
    """Of all of them, fresh ones where there were none."""
    new: dict[Tensor, dict[str, Any]]
    """Those that are to be kept when the step is done."""
    together: Together | None
    """The states side by side, if they are."""
    factors: Factors | None
    """Side by side as well, if they are."""
    whole: Remembered | None
    """The memory that they have parts of, if they have parts of one still."""


class _Ready(NamedTuple):
    """A step for which all has been had that it takes, while nothing has been changed yet."""

    batches: list[_Batch]
    flags: list[Tensor] | list[None]
    """For each whether all gradients are finite, of all of them if several, and of all processes."""
    kept: list[_Kept]
    """For each what is kept of its parameters."""
    word: Tensor | None = None
    """What several processes have agreed on: see `sharded.agree`."""
    begins: bool = False
    """Whether states are made and nothing else."""

    @property
    def at_rest(self) -> bool:
        """Whether nothing can move, and all states are new."""
        pairs = zip(self.batches, self.kept, strict=True)
        return bool(self.batches) and all(_at_rest(batch, kept) for batch, kept in pairs)

    @property
    def only_begins(self) -> bool:
        """Whether this is torch's way to have states made, which are to be those of no step at all.

        `torch.distributed.checkpoint.state_dict` takes a step with a rate and gradients of 0 if there are no states.
        """
        grads = (grad for batch in self.batches for grad in batch.grads)
        return self.at_rest and all(has_data(grad) and not bool(grad.any()) for grad in grads)

    @property
    def needs_units(self) -> bool:
        """Whether there are parameters that have no unit yet and whose rule is relative."""
        pairs = zip(self.batches, self.kept, strict=True)
        return any(kept.new and batch.group["rule"].config.relative for batch, kept in pairs)


class FusedLSTMOptimizer(torch.optim.Optimizer):
    """Applies a learned rule to parameters: one fused kernel call a parameter group and step.

    Every coordinate of every parameter has its own LSTM state (320 bytes in float32 for the papers' rule, 160 in
    bfloat16), zero at its first step. The update is ``lr`` times the rule's own, so ``lr=1`` is what the rule was
    meta-trained for. A relative rule, such as rnnprop-long, has for each parameter of two or more dimensions a unit
    besides: the size of its numbers at its first step (``fastl2l.units``), which is kept with its state. The updates of
    a rule with a ramp rise over a parameter's first steps, so there is no need to warm up; those of one with a decay
    fall after many, so there is none of a schedule.

    The coordinates of a `GACRule` talk to each other, over all parameters of a group that have a gradient, also where
    these are DTensors, all sharded over the same dimensions of a mesh. It takes neither ``capturable`` nor bfloat16
    states. Nor does an `NTMRule`, whose memory is of all parameters of a group: each must be whole, and have a gradient
    at every step.

    DTensors (FSDP2, tensor parallelism) are stepped in place where they are, each process its own part, and nothing is
    gathered; a gradient that is not finite in one process is one in all. ``state_dict`` has their states as DTensors
    ``[*shape, rows]``, which torch.distributed.checkpoint loads onto any number of processes. See docs/scale.md.

    Args:
        params: parameters, named parameters or groups, as for any torch optimizer. A group may have its own ``rule``,
            ``lr``, ``weight_decay`` and ``maximize``, and what it is to carry besides; options of torch's optimizers
            that would have no effect are refused. Parameters that get a gradient: float32, float64, float16 or
            bfloat16, any strides; the rule computes in its own dtype whatever theirs.
        rule: the rule of groups that do not name their own; on the parameters' device.
        lr: factor on the update, not a learning rate such as Adam's: one below 0.05 warns. Learning-rate schedulers
            work on it. A tensor is read where the rule is, without waiting for the device: in a CUDA graph too, where a
            number would be the same at every replay. The momentum that some schedulers turn as well has no effect.
        weight_decay: decoupled, as AdamW's: parameters are multiplied by ``1 - lr * weight_decay`` before every update.
            As lr is 1 rather than 0.001, it is to be so much smaller: what ``lr * weight_decay`` would be there.
        maximize: ascend instead of descending.
        backend: ``"auto"`` takes the fastest there is; ``"native"``, ``"triton"`` or ``"reference"`` by name.
        nonfinite: what to do about a gradient with NaN or infinity, for the step as a whole and before anything is
            changed: ``"raise"`` FloatingPointError, ``"skip"`` the step (counted in ``skipped_steps``), or
            ``"propagate"``: do not look, as torch.optim's optimizers do.
        capturable: a step never waits for the device, so that it can be part of a CUDA graph or of a function that
            torch.compile takes; not with ``nonfinite="raise"``. A CUDA graph keeps an ``lr`` that is no tensor.
        state_dtype: what the states are stored in: None for their rule's dtype, or ``torch.bfloat16``, half as many
            bytes, for rules in float32. Everything is computed in the rule's dtype all the same; only the state is
            rounded, to 8 bits, after every step.
        group: processes that step parts of one model without DTensors, as ZeroRedundancyOptimizer has them do:
            gradients that are not finite are agreed on over it too. All of them call :meth:`step` together.

    Raises:
        TypeError, ValueError: an argument is not as above.
        RuntimeError: the backend named cannot be used here.

    Example::

        optimizer = FusedLSTMOptimizer(model.parameters(), fastl2l.load_rule("mine.safetensors"))
        loss(model(x), y).backward()
        optimizer.step()
    """

    def __init__(
        self,
        params: Iterable[Any],
        rule: Rule | None = None,
        *,
        lr: float | Tensor = 1.0,
        weight_decay: float = 0.0,
        maximize: bool = False,
        backend: str = "auto",
        nonfinite: str = "raise",
        capturable: bool = False,
        state_dtype: torch.dtype | None = None,
        group: ProcessGroup | None = None,
    ) -> None:
        if nonfinite not in NONFINITE:
            raise ValueError(f"nonfinite: expected one of {', '.join(NONFINITE)}, got {nonfinite!r}")
        if capturable and nonfinite == "raise":
            raise ValueError(
                "nonfinite: expected skip or propagate with capturable=True, which cannot look, got 'raise'"
            )
        if state_dtype not in (None, torch.bfloat16):
            raise ValueError(f"state_dtype: expected None (the rule's dtype) or torch.bfloat16, got {state_dtype!r}")
        self.backend = backend
        self.nonfinite = nonfinite
        self.capturable = capturable
        self.state_dtype = state_dtype
        self._agreeing = {} if group is None else {"group": group}  # of an optimizer, torch.compile sees dictionaries
        self._together: dict[int, Together] = {}  # by the group's number
        # Cyclic schedulers want a momentum that they can turn, unless they are told not to.
        defaults = {"rule": rule, "lr": lr, "weight_decay": weight_decay, "maximize": maximize, "momentum": 0.0}
        super().__init__(params, defaults)
        device = self.param_groups[0]["rule"].device
        self._skipped = torch.zeros(1, dtype=torch.int64, device=device)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group; see ``torch.optim.Optimizer.add_param_group``. One that is refused is not added."""
        super().add_param_group(param_group)
        try:
            check_group(param_group, self.backend, FusedLSTMOptimizer)
            check_state_dtype(self.state_dtype, param_group["rule"])
            self._check_coupled(param_group)
        except Exception:
            self.param_groups.pop()
            raise

    def _check_coupled(self, group: dict[str, Any]) -> None:
        """That a rule whose coordinates talk has all of them here, and may wait for the device."""
        if not group["rule"].config.coupled:
            return
        if self.capturable:
            raise ValueError(f"capturable: expected False with a rule whose coordinates talk, got {group['rule']}")
        if self._agreeing:
            raise ValueError("group: expected none with a rule whose coordinates talk, got one; it takes DTensors")
        groups = groups_between(group["params"])
        if groups and group["rule"].config.memory is not None:
            raise ValueError("params: expected whole ones for a rule with a memory, got DTensors that are sharded")
        if (config := group["rule"].config.memory) is not None:
            check_size(config, 1, sum(param.numel() for param in group["params"]), group["rule"].dtype.itemsize)

    @torch.no_grad()
    def replace_parameter(self, old: Tensor, new: Tensor, rows: Any = None) -> None:
        """Put a parameter in another's place with the state of the rows that stay, when it is pruned or grown.

        The gradient is left behind. Entries of your own in ``optimizer.state[old]`` become those of `new` as they are.

        Args:
            old: a parameter of this optimizer.
            new: what is optimized in its stead: any number of rows, each of them shaped as before. It may be `old`
                itself, if that has got other data.
            rows: a mask or indices: ``old[rows]`` are the first rows of `new`; None for all of them. Rows of `new`
                after those begin with a fresh state, but with the unit and as far along the ramp as `old`.

        Raises:
            ValueError: `old` is not optimized here, `new` already is or has other rows, or `rows` are not of `old`.
                Nothing has been changed then.

        Example::

            keep = opacity.flatten() > 0.01
            fewer = torch.nn.Parameter(points[keep])
            optimizer.replace_parameter(points, fewer, keep)
            more = torch.nn.Parameter(torch.cat([fewer, clones]))
            optimizer.replace_parameter(fewer, more)
        """
        places = {
            param: (group["params"], at) for group in self.param_groups for at, param in enumerate(group["params"])
        }
        if any_sharded([old, new]):
            raise ValueError("old, new: expected parameters that are whole in this process, got a DTensor")
        if any(group["rule"].config.memory is not None for group in self.param_groups if _has(group, old)):
            raise ValueError("old: expected a parameter whose rule has no memory, which is of all coordinates, got one")
        if old not in places:
            raise ValueError("old: expected a parameter of this optimizer, got another")
        if not isinstance(new, Tensor) or not new.is_leaf or (new is not old and new in places):
            raise ValueError("new: expected a leaf tensor that is not optimized yet, got another")
        if (entry := self.state.get(old)) is not None:
            if STATE in entry:
                entry = {**entry, **select_rows(entry, old, new, rows)}
            del self.state[old]
            self.state[new] = entry
        params, at = places[old]
        params[at] = new

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update all parameters that have a gradient.

        Args:
            closure: evaluates the loss again and returns it.

        Returns:
            What `closure` returned, or None.

        Raises:
            FloatingPointError: a gradient is not finite and ``nonfinite="raise"``.
            RuntimeError: a gradient is sparse or of another dtype than its parameter, a parameter is of a dtype, on a
                device or sharded in a way that its rule cannot take, or has got data of another shape since the step
                before; or any of this, or a lack of memory, in another process that has parts of the parameters.
            torch.OutOfMemoryError: there is no memory for the states of parameters that are stepped for the first time.
            ProcessError: another process has ended, or has said nothing for as long as its group's time-out is.
                Nothing has been changed in any of these cases, unless a process ends amidst a step of a rule whose
                coordinates talk: then states have been, and are to be loaded again, as the message says.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        groups = self._groups()
        ready = self._ready_together(groups) if groups else self._ready(look=False)
        self._put_units(ready)
        for batch, kept, finite in zip(ready.batches, ready.kept, ready.flags, strict=True):
            if ready.begins:
                self._keep(kept)
            elif not self._apply(batch, kept, finite):
                self._refuse(ready)
                break
        if self.capturable and ready.flags and ready.flags[0] is not None:
            self._skipped.add_((~ready.flags[0]).to(self._skipped.device))
        return loss

    @property
    def skipped_steps(self) -> int:
        """Steps that ``nonfinite="skip"`` has left out. With ``capturable`` reading it waits for the device."""
        return int(self._skipped)

    def _groups(self) -> list[ProcessGroup]:
        """The groups of processes that have parts of the parameters."""
        first = list(self._agreeing.values())
        if not any(any_sharded(group["params"]) for group in self.param_groups):
            return first
        return groups_of(_params(self.param_groups), first)

    def _ready(self, look: bool) -> _Ready:
        """What a step takes; with `look` all that can be wrong with it here is found."""
        batches = [_Batch.of(number, group) for number, group in enumerate(self.param_groups)]
        batches = [batch for batch in batches if batch.params]
        # What is wrong with one group must be found before another is changed; and with one parameter, by what takes
        # them one by one: the reference, and the steps of rules whose coordinates talk.
        one_by_one = any(self._backend(b).name == "reference" or b.group["rule"].config.coupled for b in batches)
        if look or len(batches) > 1 or one_by_one:
            batches = [batch.checked() for batch in batches]
        flags = self._flags(batches, look)
        ready = _Ready(batches, flags, [self._kept(batch) for batch in batches])  # all memory must have been had
        return ready._replace(begins=ready.only_begins)

    def _ready_together(self, groups: list[ProcessGroup]) -> _Ready:
        """As `_ready`, in all processes of these groups or in none: what is wrong in one is an error in all of them."""
        device = self.param_groups[0]["rule"].device
        if self.nonfinite == "propagate":  # which does not communicate
            self._check_sharding()
            ready = self._ready(look=False)
            # But here: whether such a step is one depends on the gradients of all processes.
            if ready.at_rest and any(any_sharded(batch.owners) for batch in ready.batches):
                word = torch.full((1,), BEGINS if ready.begins else READY, dtype=torch.int32, device=device)
                ready = ready._replace(begins=int(agree(word, groups)[0]) == BEGINS)
            return ready
        word = torch.full((1,), FAILED, dtype=torch.int32, device=device)
        ready, failure = _Ready([], [], []), None
        try:
            self._check_sharding()
            ready = self._ready(look=True)
            finite = ready.flags[0] if ready.flags else None
            word.copy_(torch.tensor([BEGINS]) if ready.begins or finite is None else finite)
        except Exception as error:
            failure = error
        try:
            word, alike = agree(word, groups, digests_of(_params(self.param_groups), self._has_begun))
        except ProcessError:
            if failure is None:
                raise
        if failure is not None:
            raise failure
        if self.capturable:
            word = torch.where(alike, word, FAILED)
        elif not alike and int(word) != FAILED:
            raise self._others_elsewhere()
        ready = ready._replace(
            flags=[(word >= READY).to(batch.device) for batch in ready.batches],
            word=word,
            begins=ready.begins and int(word) == BEGINS,
        )
        # Otherwise the kernels look, so that nobody waits for the device.
        nothing_here = not ready.batches and not self.capturable and int(word) < READY
        if nothing_here or (ready.needs_units and int(word) == FAILED):
            self._refuse(ready)
        return ready

    def _others_elsewhere(self) -> RuntimeError:
        """For parameters that have a gradient, or a state, in one process and none in another."""
        names = {
            param: _name(group, number, index)
            for number, group in enumerate(self.param_groups)
            for index, param in enumerate(group["params"])
        }
        lacks = [name for param, name in names.items() if param.grad is None]
        fresh = [name for param, name in names.items() if not self._has_begun(param)]
        here = [f"no {what} of {shown(', '.join(of))}" for what, of in (("gradient", lacks), ("state", fresh)) if of]
        return RuntimeError(
            "gradients: expected those of the same parameters in all processes that have parts of them, and states of "
            f"the same ones, got others in another process (here: {' and '.join(here) or 'all'}); nothing was changed"
        )

    def _check_sharding(self) -> None:
        for number, group in enumerate(self.param_groups):
            if any_sharded(group["params"]):
                for index, param in enumerate(group["params"]):
                    check_sharding(param, _name(group, number, index))

    def _flags(self, batches: list[_Batch], look: bool) -> list[Tensor] | list[None]:
        """For each kernel call a flag: whether all gradients are finite, of all groups if several."""
        if self.nonfinite == "propagate":
            return [None] * len(batches)
        flags = [torch.ones(1, dtype=torch.bool, device=batch.device) for batch in batches]
        if len(batches) <= 1 and not look:  # the kernel itself will look
            return flags
        for batch, flag in zip(batches, flags, strict=True):
            self._backend(batch).find_nonfinite_(flag, batch.grads, batch.group["rule"].dtype == torch.float32)
            flags[0] &= flag.to(flags[0].device)
        return [flags[0].to(flag.device) for flag in flags]

    def _put_units(self, ready: _Ready) -> None:
        """The units of parameters that begin now. Of DTensors all processes that have parts of them work together."""
        for batch, kept in zip(ready.batches, ready.kept, strict=True):
            if kept.new and batch.group["rule"].config.relative:
                self._together[batch.number].put_units(map(unit_of, kept.new))

    def _apply(self, batch: _Batch, kept: _Kept, finite: Tensor | None) -> bool:
        """One kernel call; False if it has changed nothing, because a gradient is not finite."""
        rule: Rule = batch.group["rule"]
        factors = kept.factors or Factors.of(kept.entries, rule.config)
        units = factors.now(rule)
        # The kernel checks what it is given before it changes anything, and far faster than a loop over hundreds of
        # parameters here would: only when it fails are they looked at one by one. It has refused what is not
        # contiguous; where all was, it has failed otherwise, maybe in the middle.
        try:
            self._call(batch, kept, units, finite)
        except RuntimeError:
            contiguous = batch.checked()
            if contiguous.is_of(batch):
                raise
            batch = contiguous
            self._call(batch, kept, units, finite)
        if finite is not None and not self.capturable and has_data(finite) and not finite:
            return False
        factors.advance(finite)
        self._keep(kept)
        states = kept.states if kept.together is None else [kept.together.state]
        torch.autograd.graph.increment_version([*batch.params, *states])
        for param, work in batch.copies:
            param.copy_(work)
        return True

    def _keep(self, kept: _Kept) -> None:
        for param, entry in kept.new.items():
            self.state[param].update(entry)

    def _call(self, batch: _Batch, kept: _Kept, units: Tensor | None, finite: Tensor | None) -> None:
        rule: Rule = batch.group["rule"]
        scale, decay, rate = _scales(batch.group, rule)
        groups = groups_between(batch.owners) if rule.config.coupled else ()
        step_of(rule, self._backend(batch), kept.entries, kept.whole, groups)(
            batch.params,
            batch.grads,
            kept.states if kept.together is None else [kept.together.state],
            _weights(rule, batch.params[0]),
            rule.text,
            scale,
            -1.0 if batch.group["maximize"] else 1.0,
            finite,
            None,
            decay,
            rate,
            units,
        )

    def _kept(self, batch: _Batch) -> _Kept:
        """What is kept of the parameters, with fresh states for those whose first step it is."""
        if batch.owners[0].device != batch.device:  # the rule has been moved
            batch.check()
        config, entries = batch.group["rule"].config, self._entries(batch.owners)
        if config.memory is not None and len(entries) < len(batch.group["params"]):
            raise missing_gradient(batch.group["params"])
        states: list[Any] = [entry.get(STATE) for entry in entries]
        together = self._together.get(batch.number)
        if together is not None and not together.holds(states):
            together = None
        factors = together.factors if together is not None and together.factors.are_of(entries, config) else None
        if factors is None:
            check_factors(entries, config)
        whole = together.memory_of(entries, config) if together is not None else None
        if whole is None and (config.memory is not None or any(MEMORY in entry for entry in entries)):
            check_remembered(entries, batch.params, batch.group["rule"])
        if together is None or together.shapes != [param.shape for param in batch.params]:
            for param, entry in zip(batch.params, entries, strict=True):
                if STATE in entry:
                    check_shape(entry, param)
        missing = [param for param, state in zip(batch.owners, states, strict=True) if state is None]
        if not missing:
            return _Kept(states, entries, {}, together, factors, whole)
        return self._begun(batch, entries, missing)

    def _begun(self, batch: _Batch, entries: Sequence[dict[str, Any]], missing: list[Tensor]) -> _Kept:
        """The same, some of them without a state."""
        batch.check()
        if _is_captured(batch.device):
            raise RuntimeError(
                "state: expected every parameter to have been stepped before a CUDA graph is captured, got "
                f"{len(missing)} without; the graph would set their state to zero at every replay"
            )
        if batch.group["rule"].config.memory is not None and len(missing) < len(entries):
            raise RuntimeError(
                f"state: expected one of every parameter or of none, as they share a memory, got {len(missing)} without"
            )
        together = Together.of(batch.group["rule"], map(local, missing), self.state_dtype)
        self._together[batch.number] = together
        new = dict(zip(missing, together.entries(), strict=True))
        entries = [new.get(param, entry) for param, entry in zip(batch.owners, entries, strict=True)]
        states = [entry[STATE] for entry in entries]
        if len(missing) < len(states):  # side by side are the new ones alone
            return _Kept(states, entries, new, None, None, None)
        return _Kept(states, entries, new, together, together.factors, together.remembered)

    def _entries(self, params: list[Tensor]) -> Sequence[dict[str, Any]]:
        """What is kept of parameters. Looking does not make entries."""
        kept = self.state
        if len(kept) == len(params) and all(map(operator.is_, kept, params)):
            return list(kept.values())  # faster: parameters are slow to look up
        return [kept.get(param, {}) for param in params]

    def _has_begun(self, param: Tensor) -> bool:
        return STATE in self.state.get(param, {})

    def _backend(self, batch: _Batch) -> Backend:
        return select(self.backend, batch.device)

    def _refuse(self, ready: _Ready) -> None:
        """Raise for another process's error; raise, or count, for gradients that are not finite."""
        if ready.word is not None and int(ready.word) == FAILED:
            raise RuntimeError(
                "step: expected every process to take it, got an error in another process, which says what it is; "
                "nothing was changed"
            )
        if self.nonfinite == "skip":
            self._skipped.add_(1)
            return
        grads = [(grad, batch.group["rule"].dtype) for batch in ready.batches for grad in batch.grads]
        # As the rule sees them: float64 has larger numbers than float32.
        shapes = [list(grad.shape) for grad, dtype in grads if not grad.to(dtype).isfinite().all()]
        if not shapes:
            raise FloatingPointError(
                "gradient: expected finite numbers, got NaN or infinity in another process; nothing was changed"
            )
        raise FloatingPointError(
            f"gradient: expected finite numbers, got NaN or infinity in {len(shapes)} of {len(grads)} "
            f"parameters, the first of shape {shapes[0]}; nothing was changed"
        )

    def __getstate__(self) -> dict[str, Any]:
        """For copies and pickles: torch's optimizers name what they hold."""
        names = ("backend", "nonfinite", "capturable", "state_dtype", "_skipped")
        mine = {name: getattr(self, name) for name in names}
        return {**super().__getstate__(), **mine}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._together = {}
        self._agreeing = {}  # the processes are not those that there were
        for group in self.param_groups:  # those that were saved by an older version have not all of them
            for name, value in self.defaults.items():
                group.setdefault(name, value)

    # Of all hooks, ours is the last before torch loads, and the first after it has saved or loaded: whatever the others
    # see is whole, and their word stands.

    def state_dict(self) -> dict[str, Any]:
        """As for any torch optimizer; a group's rule is described (kind, configuration, fingerprint), not contained."""
        with (
            self.register_state_dict_post_hook(_save_whole, prepend=True),
            self.register_state_dict_post_hook(_describe_rules, prepend=True),
        ):
            return super().state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore what :meth:`state_dict` gave; the trajectory goes on to the bit if the rules are the same.

        Raises:
            ValueError: it is of another kind of optimizer, or the groups' sizes, a rule's configuration, a parameter's
                shape or a state's dtype differ from this optimizer's. Nothing has been changed then.

        Warns:
            UserWarning: a rule's weights differ from those that the state was made with.
        """
        loaded: list[_Loaded] = []
        with (
            self.register_load_state_dict_pre_hook(lambda _, saved: self._take_states(saved, loaded)),
            self.register_load_state_dict_post_hook(lambda _: self._put_states(loaded), prepend=True),
        ):
            super().load_state_dict(state_dict)
        for index, group in enumerate(loaded):
            if not group.same_weights:
                warnings.warn(
                    f"rule of group {index} has other weights than the one this state_dict was made with; "
                    "the trajectory will not go on as it would have",
                    stacklevel=2,
                )

    def _take_states(self, saved: dict[str, Any], loaded: list[_Loaded]) -> dict[str, Any]:
        """Check what is to be loaded, and keep from torch the states, which it would cast to the parameters' dtype."""
        if not isinstance(saved.get("state"), dict) or not isinstance(saved.get("param_groups"), list):
            raise ValueError(f"state_dict: expected a dict of states and a list of groups, got {shown(saved)}")
        sizes = [[len(group["params"]) for group in groups] for groups in (self.param_groups, saved["param_groups"])]
        if sizes[0] != sizes[1]:
            return saved  # which torch refuses
        entries = saved["state"]
        for index, (group, saved_group) in enumerate(zip(self.param_groups, saved["param_groups"], strict=True)):
            rule = group["rule"]
            same = check_same_rule(index, saved_group.get("rule"), rule)
            check_options(saved_group)
            for key in saved_group["params"]:
                if not isinstance(entries.get(key, {}), dict):
                    raise ValueError(f"state of parameter {key}: expected a dictionary, got {shown(entries[key])}")
            keys = zip(group["params"], saved_group["params"], strict=True)
            found = {
                param: (key, local_entry(key, entries[key], rule, param))
                for param, key in keys
                if _is_stepped(entries.get(key))
            }
            for param, (key, entry) in found.items():
                check_saved(key, entry, rule, local(param), self.state_dtype or rule.dtype)
            kept = [entry for _, entry in found.values()]
            check_memory(index, kept, group["params"], rule)
            together = Together.of(rule, map(local, found), self.state_dtype)
            together.take_factors(kept)
            together.take_memory(kept)
            for copy, (_, entry) in zip(together.states, found.values(), strict=True):
                copy.copy_(entry[STATE].detach())
            loaded.append(_Loaded(rule, same, list(found), together))
        configs = {
            key: group["rule"].config
            for group, saved_group in zip(self.param_groups, saved["param_groups"], strict=True)
            for key in saved_group["params"]
        }
        return {**saved, "state": {key: _without_state(entry, configs.get(key)) for key, entry in entries.items()}}

    def _put_states(self, loaded: list[_Loaded]) -> None:
        for number, (group, (rule, _, params, together)) in enumerate(zip(self.param_groups, loaded, strict=True)):
            group["rule"] = rule
            self._together[number] = together
            for param, entry in zip(params, together.entries(), strict=True):
                self.state[param].update(entry)


class _Loaded(NamedTuple):
    """What load_state_dict keeps for a group while torch loads the rest."""

    rule: Rule
    same_weights: bool
    params: list[Tensor]
    together: Together


def _is_captured(device: torch.device) -> bool:
    if device.type != "cuda" or torch.compiler.is_compiling() or not torch.cuda.is_available():  # fake tensors
        return False
    return torch.cuda.is_current_stream_capturing()


def _params(groups: Iterable[dict[str, Any]]) -> Iterator[Tensor]:
    return (param for group in groups for param in group["params"])


def _at_rest(batch: _Batch, kept: _Kept) -> bool:
    """Whether the rate is 0 and all states are new."""
    if len(kept.new) < len(batch.params) or torch.compiler.is_compiling() or _is_captured(batch.device):
        return False
    lr = batch.group["lr"]
    if isinstance(lr, Tensor):  # on the CPU, where torch puts its 0, nobody waits for it
        return lr.device.type == "cpu" and has_data(lr) and not lr.detach().numpy().any()
    return bool(lr == 0)


def _scales(group: dict[str, Any], rule: Rule) -> tuple[float, float, Tensor | None]:
    """What multiplies the update, what is taken off the parameters, and a rate on the device that multiplies both.

    A compiled or captured step reads the rate from there: a number would be part of the graph.
    """
    lr, scale, decay = group["lr"], rule.config.output_scale, group["weight_decay"]
    if isinstance(lr, Tensor):
        return scale, decay, lr.detach().to(rule.device, rule.dtype).reshape(())
    if torch.compiler.is_compiling():
        return scale, decay, torch.full((), lr, dtype=rule.dtype, device=rule.device)
    return scale * float(lr), float(decay) * float(lr), None


def _weights(rule: Rule, like: Tensor) -> list[Tensor]:
    """The rule's weights, as tensors that a step of `like` may be given: fake tensors want fake ones."""
    weights = rule.weights()
    if not isinstance(like, FakeTensor):
        return weights
    return [w if isinstance(w, FakeTensor) else like.fake_mode.from_tensor(w) for w in weights]


def _describe_rules(_: torch.optim.Optimizer, saved: dict[str, Any]) -> None:
    for group in saved["param_groups"]:
        group["rule"] = group["rule"].describe()


def _save_whole(optimizer: torch.optim.Optimizer, saved: dict[str, Any]) -> None:
    """Put states of whole parameters in the place of those of what is here of them."""
    for group, saved_group in zip(optimizer.param_groups, saved["param_groups"], strict=True):
        if any_sharded(group["params"]):
            for param, key in zip(group["params"], saved_group["params"], strict=True):
                if STATE in saved["state"].get(key, {}):
                    saved["state"][key] = whole_entry(saved["state"][key], param)


def _name(group: dict[str, Any], number: int, index: int) -> str:
    """What a parameter is called in messages."""
    names = group.get("param_names")
    return f"parameter {names[index]}" if names else f"parameter {index} of group {number}"


def _has(group: dict[str, Any], param: Tensor) -> bool:
    return any(one is param for one in group["params"])


def _is_stepped(entry: Any) -> bool:
    """Whether a state is among what is kept of a parameter, or under another key."""
    return isinstance(entry, dict) and (STATE in entry or WHOLE in entry)


def _without_state(entry: Any, config: RuleConfig | None) -> Any:
    """What of an entry is not the rule's: torch is to keep it."""
    if config is None or not _is_stepped(entry):
        return entry
    own = {STATE, WHOLE, SHAPE, *[UNIT] * config.relative, *[STEP] * config.counts_steps}
    own |= {MEMORY, ROWS} if config.memory is not None else set()
    return {name: value for name, value in entry.items() if name not in own}
