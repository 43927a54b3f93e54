"""The C library's heap, in runs of many steps."""

from __future__ import annotations

import ctypes
import math
import sys
import threading
from collections.abc import Iterable, Iterator, Sequence
from functools import cache
from typing import Any, TypeVar

from torch import Tensor

T = TypeVar("T")
EVERY = 256
"""Steps between two times that memory is given back, which takes about a millisecond."""


class _Kept(threading.local):
    """Of each thread, the memory that it has lent back last."""

    memory: Tensor | None = None


_kept = _Kept()


def borrow(shape: Sequence[int], like: Tensor) -> Tensor:
    """Memory with anything in it, in the dtype and on the device of `like`: to be given to :func:`keep` after use.

    Fresh pages of the system's take longer to come by than to fill, and glibc returns what is large when it is freed.
    """
    memory, _kept.memory = _kept.memory, None
    wanted = like.dtype, like.device, math.prod(shape)
    if memory is None or (memory.dtype, memory.device, memory.numel()) != wanted:
        return like.new_empty(*shape)
    return memory.view(*shape)


def keep(memory: Tensor) -> None:
    """Keep what was borrowed and nobody uses any longer, for who borrows as much; :func:`give_back` frees it."""
    if memory.device.type == "cpu" and not memory.is_inference():  # torch itself keeps that of a GPU
        _kept.memory = memory


def give_back() -> None:
    """Give back what is kept, and glibc's free pages: of those between what is in use it keeps ever more."""
    _kept.memory = None
    if (trim := _trim()) is not None:
        trim(0)


def tidily(steps: Iterable[T]) -> Iterator[T]:
    """The steps one by one; every 256 of them free memory is given back.

    Without it 10,000 steps of a small network with minibatches of some hundred kilobytes end with some gigabytes.
    """
    for number, step in enumerate(steps, 1):
        yield step
        if number % EVERY == 0:
            give_back()


@cache
def _trim() -> Any:
    return getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
