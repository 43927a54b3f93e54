"""Which backend does the work: one place that knows what there is and chooses."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from dataclasses import dataclass
from importlib import metadata, util
from typing import Any

import torch
from torch import Tensor

from fastl2l import build
from fastl2l.ops import reference, schema  # noqa: F401  (schema: the operators must be defined before they get kernels)


@dataclass(frozen=True)
class Backend:
    """The operators of schema.py, as one backend does them."""

    name: str
    step_: Callable[..., None]
    window_backward: Callable[..., tuple[Tensor, Tensor, Tensor, Tensor]]
    find_nonfinite_: Callable[..., None]


def _of_operators(name: str, operators: Any) -> Backend:
    found = (operators.step_, operators.window_backward, operators.find_nonfinite_)
    return Backend(name, *(operator.default for operator in found))


_BACKENDS = {
    "reference": Backend("reference", reference.step_, reference.window_backward, reference.find_nonfinite_),
    "native": _of_operators("native", torch.ops.fastl2l),
}
"""By name; "triton" from the first time that it is chosen."""
NAMES = ("reference", "native", "triton")
CHOICES = ("auto", *NAMES)
OLDEST_TRITON = (3, 6)
OLDEST_GPU = (8, 0)


def available_backends() -> dict[str, str | None]:
    """Every backend, with None where it can be used and otherwise the reason why not."""
    triton = triton_missing(torch.device("cpu" if _interprets() else "cuda"))
    return {"reference": None, "native": build.load_native(), "triton": triton}


def changed(*tensors: Tensor) -> None:
    """Tell autograd that a kernel has written to these: it sees that of torch's own operations alone."""
    torch.autograd.graph.increment_version([tensor for tensor in tensors if not tensor.is_inference()])


def select(name: str, device: torch.device | str) -> Backend:
    """The backend of this name for tensors on `device`; ``"auto"`` is the fastest one there.

    Raises:
        ValueError: there is no backend of this name.
        RuntimeError: this backend cannot be used here; the message says why.
    """
    return _BACKENDS[_choose(name, torch.device(device))]


def _choose(name: str, device: torch.device) -> str:
    """The name of the backend, which is in _BACKENDS then."""
    if name not in CHOICES:
        raise ValueError(f"backend: expected one of {', '.join(CHOICES)}, got {name!r}")
    if name == "auto":
        name = _best(device)
    elif name != "reference":
        missing = native_missing(device) if name == "native" else triton_missing(device)
        if missing is not None:
            raise RuntimeError(f"backend {name!r} cannot be used: {missing}")
    if name not in _BACKENDS:
        from fastl2l.ops import triton  # noqa: F401  (slow to import, and only wanted where it is used)

        _BACKENDS[name] = _of_operators(name, torch.ops.fastl2l_triton)
    return name


# torch.compile need not look at files and environment variables. This is what torch.compiler.assume_constant_result
# does, which would import all of torch._dynamo.
_choose._dynamo_marked_constant = True  # type: ignore[attr-defined]


def native_missing(device: torch.device) -> str | None:
    """Why the native kernels cannot take tensors on `device`, or None."""
    reason = build.load_native()
    if reason is not None or device.type == "cpu":
        return reason
    if device.type == "cuda" and torch._C._dispatch_has_kernel_for_dispatch_key("fastl2l::step_", "CUDA"):
        return None
    return f"its kernels take CPU tensors, and these are on {device.type}"


def triton_missing(device: torch.device) -> str | None:
    """Why the Triton kernels cannot take tensors on `device`, or None."""
    if (reason := _triton_missing()) is not None:
        return reason
    if device.type == "cpu" and _interprets():
        return None
    if device.type != "cuda":
        return f"its kernels take CUDA tensors, and these are on {device.type}"
    if not torch.cuda.is_available():
        return "there is no CUDA device (TRITON_INTERPRET=1 runs its kernels on the CPU, to test them)"
    return _gpu_too_old(device)


def _best(device: torch.device) -> str:
    if device.type in ("cpu", "cuda") and native_missing(device) is None:
        return "native"
    if device.type == "cuda" and triton_missing(device) is None:
        return "triton"
    return "reference"


@functools.cache
def _triton_missing() -> str | None:
    """Why there is no Triton, or None; without importing it."""
    cure = "pip install 'fastl2l[triton]'"
    if util.find_spec("triton") is None:
        return f"triton is not installed: {cure}"
    version = metadata.version("triton")
    if tuple(int(part) for part in version.split(".")[:2]) < OLDEST_TRITON:
        return f"expected triton {'.'.join(map(str, OLDEST_TRITON))} or newer, got {version}: {cure}"
    return None


def _interprets() -> bool:
    return os.environ.get("TRITON_INTERPRET") == "1"


@functools.cache
def _gpu_too_old(device: torch.device) -> str | None:
    capability = torch.cuda.get_device_capability(device)
    if capability >= OLDEST_GPU:
        return None
    oldest, found = (".".join(map(str, numbers)) for numbers in (OLDEST_GPU, capability))
    return (
        f"expected a GPU of compute capability {oldest} or newer, got {torch.cuda.get_device_name(device)} of {found}; "
        "use backend='reference'"
    )
