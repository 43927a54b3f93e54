"""The operators: their schemas, once for all backends, and their shapes for torch.compile.

``fastl2l::step_`` and so on are those of the native backend, ``fastl2l_triton::step_`` those of Triton.

``rule`` is a rule's text (rule_config.py) and ``weights`` its weights in their order; all tensors are contiguous,
states have the layout of layout.py. Arguments are checked before anything is changed.

step_
    One step of every coordinate of several parameters. ``params``: float32, float64, float16 or bfloat16, any shape,
    changed in place by ``+ update_scale * output``; ``grads``: like params; ``states``: one a parameter, or a single
    one that holds those of all parameters one after the other; in the weights' dtype, or all of them in bfloat16 if
    that is float32, changed in place. Everything is computed in the weights' dtype, the update from the new state, and
    only then is that rounded to bfloat16: to the nearest, and halfway to the even one; NaN stays NaN. A rule whose
    features have a state (means) takes none in bfloat16. ``grad_scale`` multiplies the gradients first. ``finite``:
    None, or a bool [1] that becomes False if a gradient is not finite in the weights' dtype; while it is False, from
    before the call or since, nothing else is changed. ``given``: [tiles, rows, 16] in the weights' dtype, as if all
    parameters were one, for a rule that has given rows. ``decay``: parameters are multiplied by ``1 - decay`` before
    they are updated. ``rate``: None, or a scalar in the weights' dtype on their device, which multiplies both
    update_scale and decay. ``units``: None, or [params] in the weights' dtype on their device: what each parameter's
    update is multiplied by besides. A rule whose output is none changes states alone; its params only say how many
    coordinates there are.

window_backward
    Gradients of ``sum(adjoints * updates)`` over a window of T steps, by recomputation from its first state.
    ``state``: before the first step; ``grads``, ``adjoints``: [T, N]; ``dstate``: gradient with respect to the state
    after the last step; ``given``: [T, tiles, rows, 16]; all in the weights' dtype. Returns the gradients with respect
    to the weights (flat, in their order), to the first state if ``need_dstate``, to grads if ``need_dgrads`` and to
    given if ``need_dgiven``; what is not needed comes back with a first dimension of 0, and no given rows as [0].

averaged_step_
    One step of the layers of a rule whose coordinates talk, and of the means between them, on the CPU. ``state``:
    [layers, tiles, rows, 16], changed in place; with ``before`` that is the state before the step, and ``state`` is
    only written. ``grad``: [N]; ``extra``: [rows, N], what layers are given besides the units of the one before, in
    their order, or None of nothing; ``weights``: of all layers; ``rules``: the text of each (``RuleConfig.chain``);
    ``averages``: how many of its units are averaged; ``tensors``, ``parts``, ``functions``: see coordinates.py. Returns
    the update [N] and, with ``need_units``, the last layer's units, means in them, [units, N]; [0, N] without.

averaged_window_backward
    The way back of a window of T such steps. ``states``: T + 1 of them, before the first and after each; ``grads``:
    [T, N]; ``extra``: [T, rows, N]; ``adjoints``: [T, N], of the updates; ``dunits``: None, or [T, units, N], of the
    last layer's units; ``dstate``: None, or [layers, tiles, rows, 16], of the state after the last step, which becomes
    that of the state before the first. Returns the gradients with respect to the weights, flat, in their order; to
    ``grads`` with ``need_dgrads``, and [0, N] without; and to ``extra`` with ``need_dextra``, and [0, rows, N] without.

find_nonfinite_
    Sets ``finite``, a bool [1], to False if a number in ``tensors`` is not finite, or not as a float32 with
    ``in_float32``: gradients in float64 may be too large for a rule. The host does not wait for it.

describe_rule
    What the native kernels make of a rule's text: weights, state rows, features, and its numbers in order. To hold the
    two readers of it against each other.

elementwise
    The kernels' own sigmoid (``1 / (1 + 2^x)``), tanh (``(2^x - 1) / (2^x + 1)``), log and elu, to test their accuracy.

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

_RULE = "Tensor[] weights, str rule, float update_scale"


def _step(
    params: list[Tensor],
    grads: list[Tensor],
    states: list[Tensor],
    weights: list[Tensor],
    rule: str,
    update_scale: float,
    grad_scale: float,
    finite: Tensor | None = None,
    given: Tensor | None = None,
    decay: float = 0.0,
    rate: Tensor | None = None,
    units: Tensor | None = None,
) -> None:
    return None


def _window_backward(
    state: Tensor,
    grads: Tensor,
    adjoints: Tensor,
    weights: list[Tensor],
    rule: str,
    update_scale: float,
    dstate: Tensor | None,
    need_dstate: bool,
    need_dgrads: bool,
    given: Tensor | None = None,
    need_dgiven: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    dweights = state.new_empty(sum(weight.numel() for weight in weights))
    dstate_first = state.new_empty(state.shape[0] if need_dstate else 0, *state.shape[1:])
    dgrads = state.new_empty(grads.shape[0] if need_dgrads else 0, grads.shape[1])
    dgiven = torch.empty_like(given) if given is not None and need_dgiven else state.new_empty(0)
    return dweights, dstate_first, dgrads, dgiven


def _find_nonfinite(finite: Tensor, tensors: list[Tensor], in_float32: bool = False) -> None:
    return None


def _averaged_step(
    before: Tensor | None,
    state: Tensor,
    grad: Tensor,
    extra: Tensor | None,
    weights: list[Tensor],
    rules: list[str],
    averages: list[int],
    update_scale: float,
    tensors: list[int],
    parts: list[int],
    functions: int,
    need_units: bool = False,
) -> tuple[Tensor, Tensor]:
    return torch.empty_like(grad), grad.new_empty(state.shape[2] // 2 if need_units else 0, grad.shape[0])


def _averaged_window_backward(
    states: list[Tensor],
    grads: Tensor,
    extra: Tensor | None,
    adjoints: Tensor,
    dunits: Tensor | None,
    dstate: Tensor | None,
    weights: list[Tensor],
    rules: list[str],
    averages: list[int],
    update_scale: float,
    parts: list[int],
    functions: int,
    need_dgrads: bool = False,
    need_dextra: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    steps, numel = grads.shape
    dextra = grads.new_empty(steps if need_dextra else 0, 0 if extra is None else extra.shape[1], numel)
    dgrads = grads.new_empty(steps if need_dgrads else 0, numel)
    return grads.new_empty(sum(weight.numel() for weight in weights)), dgrads, dextra


def _define(namespace: str) -> torch.library.Library:
    """The operators that every backend has, and what torch.compile has to know of them."""
    library = torch.library.Library(namespace, "DEF")
    library.define(
        f"step_(Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] states, {_RULE}, float grad_scale, "
        "Tensor(c!)? finite=None, Tensor? given=None, float decay=0.0, Tensor? rate=None, "
        "Tensor? units=None) -> ()"
    )
    library.define(
        f"window_backward(Tensor state, Tensor grads, Tensor adjoints, {_RULE}, Tensor? dstate, bool need_dstate, "
        "bool need_dgrads, Tensor? given=None, bool need_dgiven=False) -> (Tensor, Tensor, Tensor, Tensor)"
    )
    library.define("find_nonfinite_(Tensor(a!) finite, Tensor[] tensors, bool in_float32=False) -> ()")
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
_AVERAGED = "Tensor[] weights, str[] rules, int[] averages, float update_scale"
library.define(
    f"averaged_step_(Tensor? before, Tensor(a!) state, Tensor grad, Tensor? extra, {_AVERAGED}, int[] tensors, "
    "int[] parts, int functions, bool need_units=False) -> (Tensor, Tensor)"
)
library.define(
    "averaged_window_backward(Tensor[] states, Tensor grads, Tensor? extra, Tensor adjoints, Tensor? dunits, "
    f"Tensor(a!)? dstate, {_AVERAGED}, int[] parts, int functions, bool need_dgrads=False, "
    "bool need_dextra=False) -> (Tensor, Tensor, Tensor)"
)
torch.library.register_fake("fastl2l::averaged_step_", _averaged_step, lib=library)
torch.library.register_fake("fastl2l::averaged_window_backward", _averaged_window_backward, lib=library)
library.define("elementwise(Tensor x, str function) -> Tensor")
library.define("describe_rule(str rule) -> str")
library.define("cpu_isa() -> str")
library.define("cpu_isas() -> str")
