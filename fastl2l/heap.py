"""Memory in runs of many steps: given back to the system, or kept for the next of them."""

from __future__ import annotations

import ctypes
import math
import sys
from collections.abc import Iterable, Iterator, Sequence
from functools import cache
from typing import Any, TypeVar

from torch import Tensor

T = TypeVar("T")
EVERY = 256
"""Steps between two times that memory is given back, which takes about a millisecond."""


def give_back() -> None:
    """Give glibc's free pages back: it keeps those between what is in use, ever more of them in a long run."""
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


class Scratch:
    """Memory for what is done again and again: what was used once is there for the next time.

    Fresh pages of the system's take longer to come by than to fill, and glibc returns what is large when it is freed.
    """

    def __init__(self) -> None:
        self._kept: list[Tensor] = []

    def borrow(self, shape: Sequence[int], like: Tensor) -> Tensor:
        """Memory with anything in it, in the dtype and on the device of `like`."""
        wanted = like.dtype, like.device, math.prod(shape)
        if type(like) is Tensor:
            for number, memory in enumerate(self._kept):
                if (memory.dtype, memory.device, memory.numel()) == wanted:
                    return self._kept.pop(number).view(*shape)
        self.clear()  # what is of another size now is of no use
        return like.new_empty(*shape)

    def keep(self, memory: Tensor) -> None:
        """Take back what was borrowed, which nobody may use any longer."""
        plain = type(memory) is Tensor and not (memory.is_inference() or memory.requires_grad)
        if plain and memory.device.type == "cpu":  # torch itself keeps that of a GPU
            self._kept.append(memory)

    def clear(self) -> None:
        """Free what is kept."""
        self._kept.clear()

    def __reduce__(self) -> tuple[type[Scratch], tuple[()]]:
        """Copies have memory of their own."""
        return Scratch, ()


@cache
def _trim() -> Any:
    return getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
