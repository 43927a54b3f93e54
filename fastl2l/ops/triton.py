"""The operators of schema.py by the Triton kernels of fastl2l.kernels.

``FASTL2L_TRITON_PRECISION`` says how they multiply matrices of float32: ``tf32x3`` (the default) on tensor cores, each
number as the sum of two that they take, or ``ieee``, in float32 itself. Float64 is always exact.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Sequence

import torch
from torch import Tensor

from fastl2l.kernels import launch
from fastl2l.ops import reference, schema
from fastl2l.ops.checks import check_parameters, check_rule, check_tensor, check_window
from fastl2l.ops.layout import split_state

PRECISION = "FASTL2L_TRITON_PRECISION"


@torch.no_grad()
def step_(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    states: Sequence[Tensor],
    weights: Sequence[Tensor],
    preprocess: str,
    preprocess_constant: float,
    update_scale: float,
    grad_scale: float,
    finite: Tensor | None = None,
) -> None:
    """See schema.py."""
    rule = _rule(weights, preprocess, preprocess_constant, update_scale)
    check_parameters(params, grads, states, weights[-2], 2 * rule.layers * rule.hidden)
    if finite is not None:
        check_tensor("finite", finite, weights[-2].new_empty(1, dtype=torch.bool), (1,))
        find_nonfinite_(finite, grads)
    states = split_state(states, [param.numel() for param in params])
    if params:
        with _on(weights[-2].device):
            launch.step_(rule, params, grads, states, weights, grad_scale, finite)


@torch.no_grad()
def window_backward(
    state: Tensor,
    grads: Tensor,
    adjoints: Tensor,
    weights: Sequence[Tensor],
    preprocess: str,
    preprocess_constant: float,
    update_scale: float,
    dstate: Tensor | None,
    need_dstate: bool,
    need_dgrads: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """See schema.py."""
    rule = _rule(weights, preprocess, preprocess_constant, update_scale)
    check_window(state, grads, adjoints, dstate, weights[-2], 2 * rule.layers * rule.hidden)
    with _on(weights[-2].device):
        return launch.window_backward(rule, state, grads, adjoints, weights, dstate, need_dstate, need_dgrads)


find_nonfinite_ = reference.find_nonfinite_


def _rule(weights: Sequence[Tensor], preprocess: str, constant: float, update_scale: float) -> launch.Rule:
    layers, hidden = check_rule(weights, preprocess)
    if hidden > launch.MOST_HIDDEN:
        raise RuntimeError(
            f"weights: expected at most {launch.MOST_HIDDEN} hidden units with backend 'triton', got {hidden}; "
            "use backend='reference', or 'native' where it takes CUDA tensors"
        )
    dtype = weights[-2].dtype
    precision = os.environ.get(PRECISION) or launch.PRECISIONS[0]
    if precision not in launch.PRECISIONS:
        raise RuntimeError(f"{PRECISION}: expected one of {', '.join(launch.PRECISIONS)}, got {precision}")
    precision = "ieee" if dtype == torch.float64 else precision
    return launch.Rule(preprocess, constant, update_scale, layers, hidden, dtype, precision)


def _on(device: torch.device) -> contextlib.AbstractContextManager[object]:
    """Launches go to the current stream of the current device."""
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()


for _operator in (step_, window_backward, find_nonfinite_):
    schema.triton_library.impl(_operator.__name__, _operator, "CompositeExplicitAutograd")
