"""FusedLSTMOptimizer: a learned rule as a drop-in ``torch.optim`` optimizer."""

from __future__ import annotations

import hashlib
import math
import operator
import warnings
from collections.abc import Callable, Iterable
from dataclasses import asdict
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastl2l.ops.dispatch import Backend, select
from fastl2l.ops.layout import TILE, new_state, state_shape
from fastl2l.rules import Rule

NONFINITE = ("raise", "skip", "propagate")
_DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
_STATE = "lstm_state"


class _Batch(NamedTuple):
    """What one kernel call takes of a parameter group, and the parameters that it works on copies of."""

    number: int  # of the group
    group: dict[str, Any]
    owners: list[Tensor]
    params: list[Tensor]
    grads: list[Tensor]
    copies: list[tuple[Tensor, Tensor]]

    @classmethod
    def of(cls, number: int, group: dict[str, Any]) -> _Batch:
        """The parameters that have a gradient, as they are: nothing has been looked at yet."""
        owners, grads = group["params"], [param.grad for param in group["params"]]
        if any(grad is None for grad in grads):
            owners = [param for param, grad in zip(owners, grads, strict=True) if grad is not None]
            grads = [grad for grad in grads if grad is not None]
        return cls(number, group, owners, owners, grads, [])

    def checked(self) -> _Batch:
        """With contiguous copies of what is not contiguous.

        Raises:
            RuntimeError: a gradient is of a kind that the rule cannot use.
        """
        for param, grad in zip(self.owners, self.grads, strict=True):
            _check_gradient(param, grad)
        params = [param.contiguous() for param in self.owners]
        copies = [(param, work) for param, work in zip(self.owners, params, strict=True) if work is not param]
        return self._replace(params=params, grads=[grad.contiguous() for grad in self.grads], copies=copies)


class _Together(NamedTuple):
    """The states of a group's parameters side by side in one tensor, which the kernel takes in their place."""

    states: list[Tensor]
    state: Tensor

    @classmethod
    def of(cls, rule: Rule, params: list[Tensor], dtype: torch.dtype | None) -> _Together:
        """Fresh ones. Even apart they are better neighbours: a kernel walks faster through one stretch of memory."""
        tiles = [state_shape(rule, param.numel())[0] for param in params]
        state = _allocate(rule, sum(tiles) * TILE, dtype)
        return cls(list(state.split(tiles)), state)

    def holds(self, states: list[Tensor]) -> bool:
        return len(states) == len(self.states) and all(map(operator.is_, states, self.states))


class FusedLSTMOptimizer(torch.optim.Optimizer):
    """Applies a learned rule to parameters: one fused kernel call a parameter group and step.

    Every coordinate of every parameter has its own LSTM state (320 bytes in float32 for the papers' rule, 160 in
    bfloat16), zero at its first step. The update is ``lr`` times the rule's own, so ``lr=1`` is what the rule was
    meta-trained for.

    Args:
        params: parameters, named parameters or groups, as for any torch optimizer. A group may have its own ``rule``,
            ``lr`` and ``maximize``. Parameters: float32, float64, float16 or bfloat16, any strides; the rule computes
            in its own dtype whatever theirs.
        rule: the rule of groups that do not name their own; on the parameters' device.
        lr: factor on the update; learning-rate schedulers work on it.
        maximize: ascend instead of descending.
        backend: ``"auto"`` takes the fastest there is; ``"native"``, ``"triton"`` or ``"reference"`` by name.
        nonfinite: what to do about a gradient with NaN or infinity, for the step as a whole and before anything is
            changed: ``"raise"`` FloatingPointError, ``"skip"`` the step (counted in ``skipped_steps``), or
            ``"propagate"``: do not look, as torch.optim's optimizers do.
        capturable: a step never waits for the device, so that it can be part of a CUDA graph or of a function that
            torch.compile takes; not with ``nonfinite="raise"``. The graph keeps the ``lr`` that it was made with.
        state_dtype: what the states are stored in: None for their rule's dtype, or ``torch.bfloat16``, half as many
            bytes, for rules in float32. Everything is computed in the rule's dtype all the same; only the state is
            rounded, to 8 bits, after every step.

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
        lr: float = 1.0,
        maximize: bool = False,
        backend: str = "auto",
        nonfinite: str = "raise",
        capturable: bool = False,
        state_dtype: torch.dtype | None = None,
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
        self._together: dict[int, _Together] = {}  # by the group's number
        super().__init__(params, {"rule": rule, "lr": lr, "maximize": maximize})
        self._skipped = torch.zeros(1, dtype=torch.int64, device=self.param_groups[0]["params"][0].device)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group; see ``torch.optim.Optimizer.add_param_group``. Checked before anything is changed."""
        if isinstance(param_group, dict):
            group = {**self.defaults, **param_group}
            params = group.get("params", [])
            if not isinstance(params, set):  # which torch refuses
                params = [params] if isinstance(params, Tensor) else list(params)
            _check_group(group, [entry[1] if isinstance(entry, tuple) else entry for entry in params], self.backend)
            _check_state_dtype(self.state_dtype, group["rule"])
            param_group = {**param_group, "params": params}
        super().add_param_group(param_group)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update all parameters that have a gradient.

        Args:
            closure: evaluates the loss again and returns it.

        Returns:
            What `closure` returned, or None.

        Raises:
            FloatingPointError: a gradient is not finite and ``nonfinite="raise"``.
            RuntimeError: a gradient is sparse, or of another dtype than its parameter.
            torch.OutOfMemoryError: there is no memory for the states of parameters that are stepped for the first time.
                Nothing has been changed in any of these cases.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        batches = [_Batch.of(number, group) for number, group in enumerate(self.param_groups)]
        batches = [batch for batch in batches if batch.params]
        if len(batches) > 1:  # what is wrong with one group must be found before another is changed
            batches = [batch.checked() for batch in batches]
        flags = self._flags(batches)
        states = [self._states(batch) for batch in batches]  # and all memory must have been had
        for batch, (kept, new), finite in zip(batches, states, flags, strict=True):
            if not self._apply(batch, kept, new, finite):
                self._refuse(batches)
                break
        if self.capturable and flags and flags[0] is not None:
            self._skipped.add_((~flags[0]).to(self._skipped.device))
        return loss

    @property
    def skipped_steps(self) -> int:
        """Steps that ``nonfinite="skip"`` has left out. With ``capturable`` reading it waits for the device."""
        return int(self._skipped)

    def _flags(self, batches: list[_Batch]) -> list[Tensor] | list[None]:
        """For each kernel call a flag: whether all gradients are finite, of all groups if there are several."""
        if self.nonfinite == "propagate":
            return [None] * len(batches)
        flags = [batch.grads[0].new_ones(1, dtype=torch.bool) for batch in batches]
        if len(batches) <= 1:  # the kernel itself will look
            return flags
        together = flags[0]
        for batch, flag in zip(batches, flags, strict=True):
            self._backend(batch).find_nonfinite_(flag, batch.grads)
            together &= flag.to(together.device)
        return [together.to(flag.device) for flag in flags]

    def _apply(
        self, batch: _Batch, states: list[Tensor], new: list[tuple[Tensor, Tensor]], finite: Tensor | None
    ) -> bool:
        """One kernel call; False if it has changed nothing, because a gradient is not finite."""
        # The kernel checks what it is given before it changes anything, and far faster than a loop over hundreds of
        # parameters here would: only when it refuses are they looked at one by one.
        try:
            self._call(batch, states, finite)
        except RuntimeError:
            batch = batch.checked()
            self._call(batch, states, finite)
        if finite is not None and not self.capturable and not finite:
            return False
        for param, state in new:
            self.state[param][_STATE] = state
        torch.autograd.graph.increment_version(batch.params)
        for param, work in batch.copies:
            param.copy_(work)
        return True

    def _call(self, batch: _Batch, states: list[Tensor], finite: Tensor | None) -> None:
        rule: Rule = batch.group["rule"]
        together = self._together.get(batch.number)
        self._backend(batch).step_(
            batch.params,
            batch.grads,
            [together.state] if together is not None and together.holds(states) else states,
            rule.weights(),
            rule.text,
            rule.config.output_scale * float(batch.group["lr"]),
            -1.0 if batch.group["maximize"] else 1.0,
            finite,
        )

    def _states(self, batch: _Batch) -> tuple[list[Tensor], list[tuple[Tensor, Tensor]]]:
        """The parameters' states, and those among them that are new, to be kept when the step is done."""
        kept = self.state
        try:
            if len(kept) == len(batch.owners) and all(map(operator.is_, kept, batch.owners)):
                return [entry[_STATE] for entry in kept.values()], []  # faster: parameters are slow to look up
            return [kept[param][_STATE] for param in batch.owners], []
        except KeyError:
            missing = [param for param in batch.owners if _STATE not in kept[param]]
        for param in missing:
            del kept[param]  # looking it up has made an entry
        if _is_captured(batch.params[0].device):
            raise RuntimeError(
                "state: expected every parameter to have been stepped before a CUDA graph is captured, got "
                f"{len(missing)} without; the graph would set their state to zero at every replay"
            )
        together = _Together.of(batch.group["rule"], missing, self.state_dtype)
        self._together[batch.number] = together
        new = dict(zip(missing, together.states, strict=True))
        states = [new[param] if param in new else kept[param][_STATE] for param in batch.owners]
        return states, list(new.items())

    def _backend(self, batch: _Batch) -> Backend:
        return select(self.backend, batch.params[0].device)

    def _refuse(self, batches: list[_Batch]) -> None:
        """Raise, or count, for gradients that are not finite."""
        if self.nonfinite == "skip":
            self._skipped.add_(1)
            return
        grads = [grad for batch in batches for grad in batch.grads]
        shapes = [list(grad.shape) for grad in grads if not grad.isfinite().all()]
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

    def state_dict(self) -> dict[str, Any]:
        """As for any torch optimizer; a group's rule is described (kind, configuration, fingerprint), not contained."""
        saved = super().state_dict()
        live = self.param_groups
        saved["param_groups"] = [
            {**group, "rule": _describe(mine["rule"])} for group, mine in zip(saved["param_groups"], live, strict=True)
        ]
        return saved

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore what :meth:`state_dict` gave; the trajectory goes on to the bit if the rules are the same.

        Raises:
            ValueError: it is of another kind of optimizer, or the groups' sizes, a rule's configuration, or a state's
                shape or dtype differ from this optimizer's. Nothing has been changed then.

        Warns:
            UserWarning: a rule's weights differ from those that the state was made with.
        """
        rules = [group["rule"] for group in self.param_groups]
        saved_groups = state_dict["param_groups"]
        if len(saved_groups) == len(rules):
            for index, (group, rule) in enumerate(zip(saved_groups, rules, strict=True)):
                _check_same_rule(index, group.get("rule"), rule)
        found = self._match_states(state_dict) if len(saved_groups) == len(rules) else []
        copies = [
            _Together.of(rule, list(states), self.state_dtype) for rule, states in zip(rules, found, strict=False)
        ]
        super().load_state_dict(state_dict)
        for group, rule in zip(self.param_groups, rules, strict=True):
            group["rule"] = rule
        # torch casts states to the parameter's dtype, but ours is the rule's: put back what was saved.
        self._together = dict(enumerate(copies))
        for together, states in zip(copies, found, strict=True):
            for copy, (param, saved) in zip(together.states, states.items(), strict=True):
                self.state[param] = {_STATE: copy.copy_(saved)}

    def _match_states(self, state_dict: dict[str, Any]) -> list[dict[Tensor, Tensor]]:
        """The saved states of each group's parameters, as they are."""
        matched: list[dict[Tensor, Tensor]] = []
        for group, saved_group in zip(self.param_groups, state_dict["param_groups"], strict=True):
            matched.append({})
            for param, key in zip(group["params"], saved_group["params"], strict=False):
                if (saved := state_dict["state"].get(key)) is None:
                    continue
                expected, dtype = state_shape(group["rule"], param.numel()), self.state_dtype or group["rule"].dtype
                found = saved[_STATE]
                if tuple(found.shape) != expected or found.dtype != dtype:
                    raise ValueError(
                        f"state of parameter {key}: expected {list(expected)} of {dtype}, "
                        f"got {list(found.shape)} of {found.dtype}"
                    )
                matched[-1][param] = found.detach()
        return matched


def _is_captured(device: torch.device) -> bool:
    return device.type == "cuda" and not torch.compiler.is_compiling() and torch.cuda.is_current_stream_capturing()


def _check_gradient(param: Tensor, grad: Tensor) -> None:
    of = f"gradient of a parameter of shape {list(param.shape)}: expected "
    if grad.layout != torch.strided:
        raise RuntimeError(of + "a dense tensor, got a sparse one; the rule updates every coordinate at every step")
    if grad.dtype != param.dtype:
        raise RuntimeError(of + f"{param.dtype} as the parameter is, got {grad.dtype}")


def _check_group(group: dict[str, Any], params: list[Any], backend: str) -> None:
    rule, lr = group["rule"], group["lr"]
    if not isinstance(rule, Rule):
        raise TypeError(f"rule: expected an Rule for every parameter group, got {type(rule).__name__}")
    if not isinstance(lr, (Tensor, int, float)) or not 0 <= float(lr) < math.inf:
        raise ValueError(f"lr: expected a finite number >= 0, got {lr!r}")
    if len({id(param) for param in params}) < len(params):
        raise ValueError("params: expected every parameter once, got one twice in a group")
    device = rule.device
    for param in params:
        if not isinstance(param, Tensor):
            raise TypeError(f"params: expected tensors, got {type(param).__name__}")
        if param.dtype not in _DTYPES:
            expected = ", ".join(str(dtype) for dtype in _DTYPES)
            raise ValueError(f"params: expected one of {expected}, got {param.dtype} of shape {list(param.shape)}")
        if param.device != device:
            raise ValueError(f"params: expected tensors on {device}, where their rule is, got one on {param.device}")
    select(backend, device)


def _check_state_dtype(dtype: torch.dtype | None, rule: Rule) -> None:
    if dtype is not None and rule.dtype != torch.float32:
        raise ValueError(f"state_dtype: expected None for a rule in {rule.dtype}, got {dtype}; float32 rules take it")


def _allocate(rule: Rule, numel: int, dtype: torch.dtype | None) -> Tensor:
    """Memory for new states."""
    device = rule.device
    try:
        return new_state(rule, numel, device, dtype)
    except RuntimeError as error:
        # The CPU's allocator has no error of its own.
        if not isinstance(error, torch.OutOfMemoryError) and "DefaultCPUAllocator" not in str(error):
            raise
        size = math.prod(state_shape(rule, numel)) * (dtype or rule.dtype).itemsize / 2**30
        half = "state_dtype=torch.bfloat16 (half as much), " if dtype is None and rule.dtype == torch.float32 else ""
        raise torch.OutOfMemoryError(
            f"state of {numel:,} coordinates: expected {size:,.1f} GiB of free memory on {device}, got less; take "
            f"{half}fewer parameters, fewer of them in a group (whose new states are one piece of memory) or a rule of "
            "fewer units; nothing was changed"
        ) from error


def _describe(rule: Rule) -> dict[str, Any]:
    digest = hashlib.sha256()
    for weight in rule.weights():
        digest.update(weight.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return {"kind": "lstm", "config": asdict(rule.config), "dtype": str(rule.dtype), "fingerprint": digest.hexdigest()}


def _check_same_rule(index: int, saved: dict[str, Any] | None, rule: Rule) -> None:
    if saved is None:
        raise ValueError(f"rule of group {index}: expected a state_dict of FusedLSTMOptimizer, got one without a rule")
    mine = _describe(rule)
    for name in ("kind", "config", "dtype"):
        if saved[name] != mine[name]:
            raise ValueError(
                f"rule of group {index}: expected {name} {mine[name]}, got {saved[name]} in the state_dict"
            )
    if saved["fingerprint"] != mine["fingerprint"]:
        warnings.warn(
            f"rule of group {index} has other weights than the one this state_dict was made with; "
            "the trajectory will not go on as it would have",
            stacklevel=3,
        )
