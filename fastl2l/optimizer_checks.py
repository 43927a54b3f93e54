"""What is wrong with parameters, gradients and parameter groups of FusedLSTMOptimizer, in an error's words."""

from __future__ import annotations

import functools
import inspect
import math
import numbers
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from fastl2l.files import shown
from fastl2l.ops.dispatch import select
from fastl2l.rules import Rule, upgraded

GROUP_OPTIONS = ("rule", "lr", "weight_decay", "maximize")
SMALL_LR = 0.05
"""Below, somebody is likely to have meant a learning rate of another optimizer."""
PARAM_DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)


def check_parameter(param: Tensor, device: torch.device) -> None:
    of = f"parameter of shape {list(param.shape)}: expected "
    if param.dtype not in PARAM_DTYPES:
        raise RuntimeError(of + f"one of {', '.join(map(str, PARAM_DTYPES))}, got {param.dtype}")
    if param.device != device:
        raise RuntimeError(of + f"a tensor on {device}, where its rule is, got one on {param.device}")


def check_gradient(param: Tensor, grad: Tensor) -> None:
    of = f"gradient of a parameter of shape {list(param.shape)}: expected "
    if grad.layout != torch.strided:
        raise RuntimeError(of + "a dense tensor, got a sparse one; the rule updates every coordinate at every step")
    if grad.dtype != param.dtype:
        raise RuntimeError(of + f"{param.dtype} as the parameter is, got {grad.dtype}")


def check_group(group: dict[str, Any], backend: str, optimizer: type[torch.optim.Optimizer]) -> None:
    rule, lr = group["rule"], group["lr"]
    if not isinstance(rule, Rule):
        raise TypeError(f"rule: expected a rule for every parameter group, got {type(rule).__name__}")
    rule.check_alone()
    check_options(group)
    if 0 < float(lr) < SMALL_LR:
        warnings.warn(
            f"lr: expected a factor on the rule's own steps, as a rule 1, got {float(lr):g}: next to nothing will move",
            stacklevel=5,
        )
    for name in _foreign_options(optimizer):
        if group.get(name):  # options that are off have no effect anywhere
            raise ValueError(
                f"{name}: expected {', '.join(GROUP_OPTIONS)} as the options of a group, got {name}={group[name]!r}, "
                "which would have no effect"
            )
    if len(set(group["params"])) < len(group["params"]):
        raise ValueError("params: expected every parameter once, got one twice in a group")
    if rule.config.relative and any(getattr(param, "_fsdp_flattened", False) for param in group["params"]):
        raise ValueError(
            "params: expected whole tensors or DTensors for a relative rule, whose units are of tensors, got "
            "FullyShardedDataParallel's flat pieces of some; fully_shard makes DTensors"
        )
    select(backend, rule.device)


def check_options(group: Mapping[str, Any]) -> None:
    """Of a group, or of one in a state_dict, where what is missing is the default."""
    lr, decay, maximize = group.get("lr", 1.0), group.get("weight_decay", 0.0), group.get("maximize", False)
    if not _is_rate(lr):
        raise ValueError(f"lr: expected a finite number >= 0, got {shown(lr)}")
    if isinstance(decay, Tensor) or not _is_rate(decay):
        raise ValueError(f"weight_decay: expected a finite number >= 0, got {shown(decay)}")
    if not isinstance(maximize, bool):
        raise ValueError(f"maximize: expected True or False, got {shown(maximize)}")


def _is_rate(lr: Any) -> bool:
    try:
        return isinstance(lr, (Tensor, numbers.Real)) and 0 <= float(lr) < math.inf
    except (RuntimeError, ValueError, OverflowError):  # several numbers, or one that is too large
        return False


def _foreign_options(optimizer: type[torch.optim.Optimizer]) -> list[str]:
    """Options of torch's optimizers, and of this one as a whole, that a group of it has not."""
    own = set(inspect.signature(optimizer).parameters)
    return sorted((own | _options_of_torch()) - {"params", "foreach", "fused", *GROUP_OPTIONS})


@functools.cache
def _options_of_torch() -> frozenset[str]:
    theirs = [cls for cls in torch.optim.Optimizer.__subclasses__() if cls.__module__.startswith("torch.optim")]
    return frozenset(name for cls in theirs for name in inspect.signature(cls).parameters)


def check_state_dtype(dtype: torch.dtype | None, rule: Rule) -> None:
    if dtype is not None and rule.dtype != torch.float32:
        raise ValueError(f"state_dtype: expected None for a rule in {rule.dtype}, got {dtype}; float32 rules take it")
    if dtype is not None and rule.config.coupled:
        raise ValueError(f"state_dtype: expected None for a rule whose coordinates talk, got {dtype} for {rule}")
    if dtype is not None and not rule.config.takes_bfloat16_state:
        raise ValueError(
            f"state_dtype: expected None for {rule.text}, whose means would lose their last bits, got {dtype}"
        )


def missing_gradient(params: Sequence[Tensor]) -> RuntimeError:
    """What is wrong where only some parameters of a group whose rule has a memory have a gradient."""
    without = [number for number, param in enumerate(params) if param.grad is None]
    frozen = [number for number in without if not params[number].requires_grad]
    first = (frozen or without)[0]
    return RuntimeError(
        "gradient: expected one for every parameter of a group whose rule has a memory, which is of all of them, got "
        f"{len(params) - len(without)} of {len(params)}: none for its parameter {first}, of shape "
        f"{tuple(params[first].shape)}" + (", which takes none: leave out what requires_grad=False" if frozen else "")
    )


def check_same_rule(index: int, saved: Any, rule: Rule) -> bool:
    """Whether the weights are the same; the rest must be."""
    if not isinstance(saved, dict):
        raise ValueError(f"rule of group {index}: expected a state_dict of FusedLSTMOptimizer, got one without a rule")
    mine, theirs = rule.describe(), upgraded(saved)
    for name in ("kind", "config", "dtype"):
        if theirs.get(name) != mine[name]:
            raise ValueError(
                f"rule of group {index}: expected {name} {mine[name]}, got {shown(theirs.get(name))} in the state_dict"
            )
    return saved.get("fingerprint") == mine["fingerprint"]
