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
from fastl2l.ops.checks import check_numbers, check_parameters, check_rule, check_tensor, check_window
from fastl2l.ops.layout import split_state, tiles_of

PRECISION = "FASTL2L_TRITON_PRECISION"


@torch.no_grad()
def step_(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    states: Sequence[Tensor],
    weights: Sequence[Tensor],
    rule: str,
    update_scale: float,
    grad_scale: float,
    finite: Tensor | None = None,
    given: Tensor | None = None,
    decay: float = 0.0,
    rate: Tensor | None = None,
    units: Tensor | None = None,
) -> None:
    """See schema.py."""
    its_rule, like = _rule(weights, rule, update_scale), weights[0]
    check_parameters(its_rule.config, params, grads, states, given, like)
    check_numbers(like, update_scale, decay, rate, units, len(params))
    if finite is not None:
        check_tensor("finite", finite, like, (1,), torch.bool)
        find_nonfinite_(finite, grads, weights[0].dtype == torch.float32)
    sizes = [param.numel() for param in params]
    rows = [None] * len(sizes) if given is None else given.split([tiles_of(size) for size in sizes])
    if params:
        with _on(like.device):
            launch.step_(
                its_rule, params, grads, split_state(states, sizes), weights, grad_scale, finite, rows, decay, rate,
                units,
            )  # fmt: skip


@torch.no_grad()
def window_backward(
    state: Tensor,
    grads: Tensor,
    adjoints: Tensor,
    weights: Sequence[Tensor],
    rule: str,
    update_scale: float,
    dstate: Tensor | None,
    need_dstate: bool,
    need_dgrads: bool,
    given: Tensor | None = None,
    need_dgiven: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """See schema.py."""
    its_rule, like = _rule(weights, rule, update_scale), weights[0]
    check_window(its_rule.config, state, grads, adjoints, dstate, given, like)
    check_numbers(like, update_scale)
    # Kernels write no lanes past N.
    dstate_first = torch.zeros_like(state) if need_dstate else None
    dgrads = torch.empty_like(grads) if need_dgrads else None
    dgiven = torch.zeros_like(given) if given is not None and need_dgiven else None
    with _on(like.device):
        dweights = launch.window_backward(
            its_rule, state, grads, adjoints, weights, dstate, dstate_first, dgrads, given, dgiven
        )
    return (
        dweights,
        state.new_empty(0, *state.shape[1:]) if dstate_first is None else dstate_first,
        grads.new_empty(0, grads.shape[1]) if dgrads is None else dgrads,
        state.new_empty(0) if dgiven is None else dgiven,
    )


find_nonfinite_ = reference.find_nonfinite_


def _rule(weights: Sequence[Tensor], text: str, update_scale: float) -> launch.Rule:
    config = check_rule(weights, text)
    precision = os.environ.get(PRECISION) or launch.PRECISIONS[0]
    if precision not in launch.PRECISIONS:
        raise RuntimeError(f"{PRECISION}: expected one of {', '.join(launch.PRECISIONS)}, got {precision}")
    dtype = weights[0].dtype
    return launch.Rule(config, update_scale, dtype, "ieee" if dtype == torch.float64 else precision)


def _on(device: torch.device) -> contextlib.AbstractContextManager[object]:
    """Launches go to the current stream of the current device."""
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()


for _operator in (step_, window_backward, find_nonfinite_):
    schema.triton_library.impl(_operator.__name__, _operator, "CompositeExplicitAutograd")
