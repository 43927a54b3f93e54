"""What csrc/checks.h asks of the operators' arguments, for kernels that are launched from Python.

Messages name the argument, what was expected and what came; nothing has been changed when they are raised.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastl2l.ops.layout import TILE

_NAMES = {
    torch.float32: "float32",
    torch.float64: "float64",
    torch.float16: "float16",
    torch.bfloat16: "bfloat16",
    torch.bool: "bool",
}


def check_rule(weights: Sequence[Tensor], preprocess: str) -> tuple[int, int]:
    """Layers and hidden units of an LSTM rule, read off its weights."""
    _require(
        len(weights) >= 5 and len(weights) % 3 == 2,
        f"weights: expected W_ih, W_hh and bias of each layer, then w_out and b_out; got {len(weights)} tensors",
    )
    _require(preprocess in ("raw", "log_sign"), f"preprocess: expected raw or log_sign, got {preprocess}")
    layers, hidden, dtype = len(weights) // 3, weights[-2].numel(), weights[-2].dtype
    _require(
        dtype in (torch.float32, torch.float64), f"weights: expected float32 or float64, got {_name(dtype)}"
    )  # fmt: skip
    _require(hidden >= 1, "weights: expected at least one hidden unit")
    inputs = 1 if preprocess == "raw" else 2
    for layer in range(layers):
        shapes = (4 * hidden, inputs), (4 * hidden, hidden), (4 * hidden,)
        for i, shape in enumerate(shapes, 3 * layer):
            check_tensor(f"weights[{i}]", weights[i], weights[-2], shape)
        inputs = hidden
    check_tensor(f"weights[{3 * layers}]", weights[-2], weights[-2], (hidden,))
    check_tensor(f"weights[{3 * layers + 1}]", weights[-1], weights[-2], ())
    return layers, hidden


def check_tensor(
    name: str, tensor: Tensor, like: Tensor, shape: tuple[int, ...], dtype: torch.dtype | None = None
) -> None:  # fmt: skip
    """Contiguous, of this shape, on the device of `like`, and of its dtype unless another is named."""
    dtype = dtype or like.dtype
    _require(tensor.dtype == dtype, f"{name}: expected {_name(dtype)}, got {_name(tensor.dtype)}")
    _require(tuple(tensor.shape) == shape, f"{name}: expected shape {list(shape)}, got {list(tensor.shape)}")
    _require(tensor.is_contiguous(), f"{name}: expected a contiguous tensor")
    _require(
        tensor.device == like.device, f"{name}: expected a tensor on {like.device}, got one on {tensor.device}"
    )  # fmt: skip


def check_state_dtype(states: Sequence[Tensor], dtype: torch.dtype) -> torch.dtype:
    """The dtype that the states of one call are stored in: `dtype`, the rule's, or bfloat16 where that is float32."""
    allowed = (dtype, torch.bfloat16) if dtype == torch.float32 else (dtype,)
    stored = states[0].dtype if states else dtype
    _require(stored in allowed, f"states[0]: expected {' or '.join(map(_name, allowed))}, got {_name(stored)}")
    return stored


def check_parameters(
    params: Sequence[Tensor], grads: Sequence[Tensor], states: Sequence[Tensor], like: Tensor, rows: int
) -> None:
    """What step_ is given beside the rule; `like` is one of the rule's weights."""
    _require(len(grads) == len(params), f"grads: expected {len(params)} tensors, got {len(grads)}")
    together = len(states) == 1  # one state for all parameters
    _require(together or len(states) == len(params), f"states: expected {len(params)} tensors, got {len(states)}")
    stored = check_state_dtype(states, like.dtype)
    for i, (param, grad) in enumerate(zip(params, grads, strict=True)):
        _require(
            param.dtype in _NAMES,
            f"params[{i}]: expected float32, float64, float16 or bfloat16, got {_name(param.dtype)}",
        )
        _require(param.is_contiguous(), f"params[{i}]: expected a contiguous tensor")
        _require(
            param.device == like.device,
            f"params[{i}]: expected a tensor on {like.device}, where the rule is, got one on {param.device}",
        )
        _require(grad.is_contiguous(), f"grads[{i}]: expected a contiguous tensor")
        _require(grad.dtype == param.dtype, f"grads[{i}]: expected {_name(param.dtype)}, got {_name(grad.dtype)}")
        _require(grad.numel() == param.numel(), f"grads[{i}]: expected {param.numel()} elements, got {grad.numel()}")
        _require(
            grad.device == like.device, f"grads[{i}]: expected a tensor on {like.device}, got one on {grad.device}"
        )  # fmt: skip
    tiles = [-(-param.numel() // TILE) for param in params]
    for i, (state, expected) in enumerate(zip(states, [sum(tiles)] if together else tiles, strict=True)):
        check_tensor(f"states[{i}]", state, like, (expected, rows, TILE), stored)


def check_window(
    state: Tensor, grads: Tensor, adjoints: Tensor, dstate: Tensor | None, like: Tensor, rows: int
) -> None:  # fmt: skip
    """What window_backward is given beside the rule."""
    _require(
        grads.dim() == 2 and grads.shape[0] >= 1, f"grads: expected shape [steps >= 1, N], got {list(grads.shape)}"
    )  # fmt: skip
    steps, numel = grads.shape
    tiles = -(-numel // TILE)
    check_tensor("grads", grads, like, (steps, numel))
    check_tensor("adjoints", adjoints, like, (steps, numel))
    check_tensor("state", state, like, (tiles, rows, TILE))
    if dstate is not None:
        check_tensor("dstate", dstate, like, (tiles, rows, TILE))


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise RuntimeError(message)


def _name(dtype: torch.dtype) -> str:
    return _NAMES.get(dtype, "another dtype")
