"""The operators: their schemas, once for all backends, and their shapes for torch.compile.

``weights`` and ``preprocess``, ``preprocess_constant`` are a rule's ``weights()`` and configuration; all tensors are
contiguous, states have the layout of layout.py.

step_
    One step of every coordinate of several parameters. ``params``: float32, float64, float16 or bfloat16, any shape,
    changed in place by ``+ update_scale * (w_out . h + b_out)``; ``grads``: like params; ``states``: one a parameter,
    all of them in the weights' dtype, or in bfloat16 if that is float32, changed in place. Everything is computed in
    the weights' dtype, the update from the new h, and only then is the new state rounded to bfloat16: to the nearest,
    and halfway to the even one; NaN stays NaN. ``grad_scale`` multiplies the gradients first. ``finite``: None, or a
    bool [1] that is set to whether every gradient is finite; where one is not, nothing else is changed. Arguments are
    checked before anything is changed.

window_backward
    Gradients of ``sum(adjoints * updates)`` over a window of T steps, by recomputation from its first state.
    ``state``: before the first step; ``grads``, ``adjoints``: [T, N]; ``dstate``: gradient with respect to the state
    after the last step; all in the weights' dtype. Returns the gradients with respect to the weights (flat, in their
    order), to the first state if ``need_dstate`` and to grads if ``need_dgrads``; what is not needed comes back with a
    first dimension of 0.

all_finite
    Whether every number in all tensors is finite.

elementwise
    The kernels' own sigmoid (``1 / (1 + 2^x)``), tanh (``(2^x - 1) / (2^x + 1)``) and log, to test their accuracy.

cpu_isa
    The instruction set that the native CPU kernels use: avx512, avx2 or generic; ``FASTL2L_CPU_ISA`` names another.

cpu_isas
    All that the machine has, the best first, separated by commas.
"""

from __future__ import annotations

import torch
from torch import Tensor

_RULE = "Tensor[] weights, str preprocess, float preprocess_constant, float update_scale"

library = torch.library.Library("fastl2l", "DEF")
library.define(
    f"step_(Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] states, {_RULE}, "
    "float grad_scale, Tensor(c!)? finite=None) -> ()"
)
library.define(
    f"window_backward(Tensor state, Tensor grads, Tensor adjoints, {_RULE}, "
    "Tensor? dstate, bool need_dstate, bool need_dgrads) -> (Tensor, Tensor, Tensor)"
)
library.define("all_finite(Tensor[] tensors) -> bool")
library.define("elementwise(Tensor x, str function) -> Tensor")
library.define("cpu_isa() -> str")
library.define("cpu_isas() -> str")


@torch.library.register_fake("fastl2l::step_")
def _(
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


@torch.library.register_fake("fastl2l::window_backward")
def _(
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
