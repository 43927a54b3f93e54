"""Which backend does the work: one place that knows what there is and chooses."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from fastl2l import build
from fastl2l.ops import reference, schema  # noqa: F401  (schema: the operators must be defined before they get kernels)


@dataclass(frozen=True)
class Backend:
    """The operators of schema.py, as one backend does them."""

    name: str
    step_: Callable[..., None]
    window_backward: Callable[..., tuple[Tensor, Tensor, Tensor]]
    all_finite: Callable[..., bool]


_REFERENCE = Backend("reference", reference.step_, reference.window_backward, reference.all_finite)
_NATIVE = Backend(
    "native",
    torch.ops.fastl2l.step_.default,
    torch.ops.fastl2l.window_backward.default,
    torch.ops.fastl2l.all_finite.default,
)
BACKENDS = {"reference": _REFERENCE, "native": _NATIVE}
CHOICES = ("auto", *BACKENDS)


def available_backends() -> dict[str, str | None]:
    """Every backend, with None where it can be used and otherwise the reason why not."""
    return {"reference": None, "native": build.load_native()}


def select(name: str, device: torch.device | str) -> Backend:
    """The backend of this name for tensors on `device`; ``"auto"`` is the fastest one there.

    Raises:
        ValueError: there is no backend of this name.
        RuntimeError: this backend cannot be used here; the message says why.
    """
    if name not in CHOICES:
        raise ValueError(f"backend: expected one of {', '.join(CHOICES)}, got {name!r}")
    kind = torch.device(device).type
    if name == "reference" or (name == "auto" and kind != "cpu"):
        return _REFERENCE
    missing = build.load_native() if kind == "cpu" else f"its kernels take CPU tensors, and these are on {kind}"
    if missing is None:
        return _NATIVE
    if name == "auto":
        return _REFERENCE
    raise RuntimeError(f"backend {name!r} cannot be used: {missing}")
