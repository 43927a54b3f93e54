"""The operators: their schemas, once for all backends, and their shapes for torch.compile.

``fastl2l::step_`` and so on are those of the native backend, ``fastl2l_triton::step_`` those of Triton.

``weights`` and ``preprocess``, ``preprocess_constant`` are a rule's ``weights()`` and configuration; all tensors are
contiguous, states have the layout of layout.py.

step_
    One step of every coordinate of several parameters. ``params``: float32, float64, float16 or bfloat16, any shape,
    changed in place by ``+ update_scale * (w_out . h + b_out)``; ``grads``: like params; ``states``: one a parameter,
    or a single one that holds those of all parameters one after the other, in the weights' dtype, changed in place.
    ``grad_scale`` multiplies the gradients first. ``finite``: None, or a bool [1] that becomes False if a gradient is
    not finite; while it is False, from before the call or since, nothing else is changed. Arguments are checked before
    anything is changed.

window_backward
    Gradients of ``sum(adjoints * updates)`` over a window of T steps, by recomputation from its first state.
    ``state``: before the first step; ``grads``, ``adjoints``: [T, N]; ``dstate``: gradient with respect to the state
    after the last step. Returns the gradients with respect to the weights (flat, in their order), to the first state
    if ``need_dstate`` and to grads if ``need_dgrads``; what is not needed comes back with a first dimension of 0.

find_nonfinite_
    Sets ``finite``, a bool [1], to False if a number in ``tensors`` is not finite. The host does not wait for it.

elementwise
    The kernels' own sigmoid (``1 / (1 + 2^x)``), tanh (``(2^x - 1) / (2^x + 1)``) and log, to test their accuracy.

cpu_isa
    The instruction set that the native CPU kernels use: avx512, avx2 or generic; ``FASTL2L_CPU_ISA`` names another.

cpu_isas
    All that the machine has, the best first, separated by commas.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

_RULE = "Tensor[] weights, str preprocess, float preprocess_constant, float update_scale"


def _step(
    params: list[Tensor],
    grads: list[Tensor],
    states: list[Tensor],
    weights: list[Tensor],
    preprocess: str,
    preprocess_constant: float,
    update_scale: float,
    grad_scale: float,
    finite: Tensor | None = None,
) -> None:
    return None


def _window_backward(
    state: Tensor,
    grads: Tensor,
    adjoints: Tensor,
    weights: list[Tensor],
    preprocess: str,
    preprocess_constant: float,
    update_scale: float,
    dstate: Tensor | None,
    need_dstate: bool,
    need_dgrads: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    dweights = state.new_empty(sum(weight.numel() for weight in weights))
    dstate_first = state.new_empty(state.shape[0] if need_dstate else 0, *state.shape[1:])
    dgrads = state.new_empty(grads.shape[0] if need_dgrads else 0, grads.shape[1])
    return dweights, dstate_first, dgrads


def _find_nonfinite(finite: Tensor, tensors: list[Tensor]) -> None:
    return None


def _define(namespace: str) -> torch.library.Library:
    """The operators that every backend has, and what torch.compile has to know of them."""
    library = torch.library.Library(namespace, "DEF")
    library.define(
        f"step_(Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] states, {_RULE}, "
        "float grad_scale, Tensor(c!)? finite=None) -> ()"
    )
    library.define(
        f"window_backward(Tensor state, Tensor grads, Tensor adjoints, {_RULE}, "
        "Tensor? dstate, bool need_dstate, bool need_dgrads) -> (Tensor, Tensor, Tensor)"
    )
    library.define("find_nonfinite_(Tensor(a!) finite, Tensor[] tensors) -> ()")
    fakes: dict[str, Callable[..., Any]] = {
        "step_": _step,
        "window_backward": _window_backward,
        "find_nonfinite_": _find_nonfinite,
    }
    for name, fake in fakes.items():
        torch.library.register_fake(f"{namespace}::{name}", fake, lib=library)
    return library


triton_library = _define("fastl2l_triton")
library = _define("fastl2l")
library.define("elementwise(Tensor x, str function) -> Tensor")
library.define("cpu_isa() -> str")
library.define("cpu_isas() -> str")
