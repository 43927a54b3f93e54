"""What csrc/checks.h asks of the operators' arguments, for kernels that are launched from Python.

Messages name the argument, what was expected and what came; nothing has been changed when they are raised.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastl2l.ops.layout import TILE, tiles_of
from fastl2l.rule_config import RuleConfig

_NAMES = {
    torch.float32: "float32",
    torch.float64: "float64",
    torch.float16: "float16",
    torch.bfloat16: "bfloat16",
    torch.bool: "bool",
}


def check_rule(weights: Sequence[Tensor], rule: str) -> RuleConfig:
    """The configuration of the rule, whose weights must be these."""
    try:
        config = RuleConfig.parse(rule)
    except ValueError as error:
        raise RuntimeError(str(error)) from None
    shapes = config.weight_shapes
    _require(len(weights) == len(shapes), f"weights: expected {len(shapes)} tensors for {rule}, got {len(weights)}")
    dtype = weights[0].dtype
    _require(
        dtype in (torch.float32, torch.float64), f"weights: expected float32 or float64, got {_name(dtype)}"
    )  # fmt: skip
    for i, (weight, (_, shape)) in enumerate(zip(weights, shapes, strict=True)):
        check_tensor(f"weights[{i}]", weight, weights[0], shape)
    return config


def check_numbers(
    like: Tensor,
    update_scale: float,
    decay: float = 0.0,
    rate: Tensor | None = None,
    units: Tensor | None = None,
    params: int = 0,
) -> None:
    """Numbers of a step: finite in the dtype of `like`, one of the rule's weights."""
    for name, number in (("update_scale", update_scale), ("decay", decay)):
        _require(
            abs(number) <= torch.finfo(like.dtype).max, f"{name}: expected a finite {_name(like.dtype)}, got {number:g}"
        )
    if rate is not None:
        check_tensor("rate", rate, like, ())
    if units is not None:
        check_tensor("units", units, like, (params,))


def check_tensor(
    name: str,
    tensor: Tensor,
    like: Tensor,
    shape: tuple[int, ...],
    dtype: torch.dtype | None = None,
    contiguous: bool = True,
) -> None:
    """Contiguous, of this shape, on the device of `like`, and of its dtype unless another is named."""
    dtype = dtype or like.dtype
    _require(tensor.dtype == dtype, f"{name}: expected {_name(dtype)}, got {_name(tensor.dtype)}")
    _require(tuple(tensor.shape) == shape, f"{name}: expected shape {list(shape)}, got {list(tensor.shape)}")
    _require(not contiguous or tensor.is_contiguous(), f"{name}: expected a contiguous tensor")
    _require(
        tensor.device == like.device, f"{name}: expected a tensor on {like.device}, got one on {tensor.device}"
    )  # fmt: skip


def check_parameters(
    config: RuleConfig,
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    states: Sequence[Tensor],
    given: Tensor | None,
    like: Tensor,
    contiguous: bool = True,
) -> None:
    """What step_ is given beside the rule; `like` is one of the rule's weights."""
    _require(len(grads) == len(params), f"grads: expected {len(params)} tensors, got {len(grads)}")
    together = len(states) == 1  # one state for all parameters
    _require(together or len(states) == len(params), f"states: expected {len(params)} tensors, got {len(states)}")
    stored = _check_state_dtype(config, states, like.dtype)
    for i, (param, grad) in enumerate(zip(params, grads, strict=True)):
        _require(
            param.dtype in _NAMES and param.dtype.is_floating_point,
            f"params[{i}]: expected float32, float64, float16 or bfloat16, got {_name(param.dtype)}",
        )
        _require(not contiguous or param.is_contiguous(), f"params[{i}]: expected a contiguous tensor")
        _require(
            param.device == like.device,
            f"params[{i}]: expected a tensor on {like.device}, where the rule is, got one on {param.device}",
        )
        dense = grad.layout == torch.strided
        _require(dense and (not contiguous or grad.is_contiguous()), f"grads[{i}]: expected a contiguous tensor")
        _require(grad.dtype == param.dtype, f"grads[{i}]: expected {_name(param.dtype)}, got {_name(grad.dtype)}")
        _require(grad.numel() == param.numel(), f"grads[{i}]: expected {param.numel()} elements, got {grad.numel()}")
        _require(
            grad.device == like.device, f"grads[{i}]: expected a tensor on {like.device}, got one on {grad.device}"
        )  # fmt: skip
    tiles = [tiles_of(param.numel()) for param in params]
    for i, (state, expected) in enumerate(zip(states, [sum(tiles)] if together else tiles, strict=True)):
        check_tensor(f"states[{i}]", state, like, (expected, config.state_rows, TILE), stored)
    _check_given(config, given, like, (sum(tiles),))


def check_window(
    config: RuleConfig,
    state: Tensor,
    grads: Tensor,
    adjoints: Tensor,
    dstate: Tensor | None,
    given: Tensor | None,
    like: Tensor,
    contiguous: bool = True,
) -> None:
    """What window_backward is given beside the rule."""
    _require(
        grads.dim() == 2 and grads.shape[0] >= 1, f"grads: expected shape [steps >= 1, N], got {list(grads.shape)}"
    )  # fmt: skip
    steps, numel = grads.shape
    tiles = tiles_of(numel)
    check_tensor("grads", grads, like, (steps, numel), contiguous=contiguous)
    check_tensor("adjoints", adjoints, like, (steps, numel), contiguous=contiguous)
    check_tensor("state", state, like, (tiles, config.state_rows, TILE), contiguous=contiguous)
    if dstate is not None:
        check_tensor("dstate", dstate, like, (tiles, config.state_rows, TILE), contiguous=contiguous)
    _check_given(config, given, like, (steps, tiles))


def _check_given(config: RuleConfig, given: Tensor | None, like: Tensor, leading: tuple[int, ...]) -> None:
    expected = f"{config.given} rows for {config.text}"
    _require((given is not None) == (config.given > 0), f"given: expected {expected}, got {_kind(given)}")
    if given is not None:
        check_tensor("given", given, like, (*leading, config.given, TILE))


def _check_state_dtype(config: RuleConfig, states: Sequence[Tensor], dtype: torch.dtype) -> torch.dtype:
    """The dtype that the states of one call are stored in: `dtype`, the rule's, or bfloat16 where that is float32."""
    halved = dtype == torch.float32 and config.takes_bfloat16_state
    allowed = (dtype, torch.bfloat16) if halved else (dtype,)
    stored = states[0].dtype if states else dtype
    _require(stored in allowed, f"states[0]: expected {' or '.join(map(_name, allowed))}, got {_name(stored)}")
    return stored


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise RuntimeError(message)


def _name(dtype: torch.dtype) -> str:
    return _NAMES.get(dtype, "another dtype")


def _kind(given: Tensor | None) -> str:
    return "none" if given is None else "some"
