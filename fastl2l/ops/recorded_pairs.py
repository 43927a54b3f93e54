"""The pairs of a memory over the steps of a window, and the way back through their reads and writes.

Autograd copies a ring whenever it is written, and its gradient as often. Here pairs are written side by side in the
order of the steps, each of them once, so that what a read has seen stays what it was; and gradients are summed in one
place, of those pairs alone that the window has written.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor

from fastl2l.heap import Scratch
from fastl2l.memory_config import MemoryConfig
from fastl2l.ops.again import once
from fastl2l.ops.pairs import by_function, shares, squared


class RecordedPairs:
    """A ring of pairs as it is after some steps of a window. It stays that: a write gives another one.

    Args:
        config: of the memory.
        ring: as in ops/memory.py, before the first step; it is left as it is.
        step: how many writes there have been.
        steps: how many may follow.
        scratch: for the pairs and their gradients, till `release`.
    """

    def __init__(
        self, config: MemoryConfig, ring: Tensor, step: int, steps: int, scratch: Scratch | None = None
    ) -> None:
        self._tape = _Tape(config, ring, step % config.pairs, steps, scratch or Scratch())
        self._first, self._written, self._token = step, 0, ring.new_zeros(())

    def read(self, vectors: Tensor) -> Tensor:
        """M r for vectors r [reads, F, D].

        Raises:
            RuntimeError: it has been written to since.
        """
        return _Read.apply(self._current(), vectors, self._token)

    def write(self, pairs: Tensor) -> RecordedPairs:
        """With pairs [2, writes, F, D] in it.

        Raises:
            RuntimeError: it has been written to before.
        """
        new = copy.copy(self)
        new._token, new._written = _Write.apply(self._current(), pairs, self._token), self._written + 1
        return new

    def _current(self) -> _Tape:
        if self._tape.written != self._written:
            raise RuntimeError("memory: expected the steps of a window one after the other")
        return self._tape

    def release(self) -> None:
        """Give the scratch back what it has lent: none of these pairs is read or written any longer."""
        self._tape.release()

    def detach(self) -> Tensor:
        """As a ring."""
        config = self._tape.config
        return self._tape.pairs_at(self._written).roll((self._first + self._written) % config.pairs, 1)


class _Tape:
    """Pairs in the order of their steps: those of the ring, oldest first, and then those of the window."""

    def __init__(self, config: MemoryConfig, ring: Tensor, oldest: int, steps: int, scratch: Scratch) -> None:
        self.config, self.written, self._steps, self._scratch = config, 0, steps, scratch
        self._pairs = scratch.borrow((2, config.pairs + steps, *ring.shape[2:]), ring)
        newer = config.pairs - oldest
        self._pairs[:, :newer] = ring[:, oldest:]
        self._pairs[:, newer : config.pairs] = ring[:, :oldest]
        self._squares = squared(self.pairs_at(0)) if config.memory_bound is not None else None
        self._gradients: Tensor | None = None

    def pairs_at(self, written: int) -> Tensor:
        """The last pairs after so many writes, [2, K, writes, F, D]."""
        return self._pairs[:, written : written + self.config.pairs]

    def put(self, pairs: Tensor) -> None:
        self._pairs[:, self.config.pairs + self.written] = pairs
        self.written += 1
        if self._squares is not None:
            self._squares = torch.cat([self._squares[:, 1:], squared(pairs).unsqueeze(1)], 1)

    def squares(self) -> Tensor | None:
        """Squared norms of the last pairs, [2, F, pairs, 1]; a copy of its own."""
        if self._squares is None:
            return None
        return self._squares.flatten(1, 2).transpose(1, 2).contiguous()

    def gradients_at(self, written: int) -> Tensor:
        """Of those of `pairs_at` that the window has written, which are its last ones."""
        if self._gradients is None:
            shape = (2, self._steps, *self._pairs.shape[2:])
            self._gradients = self._scratch.borrow(shape, self._pairs).zero_()
        return self._gradients[:, max(0, written - self.config.pairs) : written]

    def release(self) -> None:
        for memory in (self._pairs, self._gradients):
            if memory is not None:
                self._scratch.keep(memory)
        del self._pairs, self._gradients


class _Write(torch.autograd.Function):
    """Arguments: tape, pairs, token. What comes after it has its token, so that its way back comes after theirs."""

    @staticmethod
    def forward(ctx: Any, tape: _Tape, pairs: Tensor, token: Tensor) -> Tensor:
        tape.put(pairs)
        ctx.tape, ctx.written = tape, tape.written
        return token.clone()

    @staticmethod
    @once
    def backward(ctx: Any, dtoken: Tensor) -> tuple[Tensor | None, ...]:
        return None, ctx.tape.gradients_at(ctx.written)[:, -1], dtoken


class _Read(torch.autograd.Function):
    """Arguments: tape, vectors [reads, F, D], token."""

    @staticmethod
    def forward(ctx: Any, tape: _Tape, vectors: Tensor, token: Tensor) -> Tensor:
        config = tape.config
        left, right = map(by_function, tape.pairs_at(tape.written))
        with torch.enable_grad():
            squares = tape.squares()
            squares = None if squares is None else squares.requires_grad_()
            kept = shares(config, range(config.pairs - 1, -1, -1), squares, vectors)
        of_each = torch.bmm(right, vectors.permute(1, 2, 0))
        ctx.tape, ctx.written, ctx.squares, ctx.kept = tape, tape.written, squares, kept
        ctx.save_for_backward(vectors, of_each)
        found = torch.bmm((of_each * kept.detach()).transpose(1, 2), left)
        return found.transpose(0, 1).add(vectors, alpha=config.initial)

    @staticmethod
    @once
    def backward(ctx: Any, dfound: Tensor) -> tuple[Tensor | None, ...]:
        tape, (vectors, of_each), kept = ctx.tape, ctx.saved_tensors, ctx.kept.detach()
        sides, dsides = tape.pairs_at(ctx.written), tape.gradients_at(ctx.written)
        (left, right), (dleft, dright) = map(by_function, sides), map(by_function, dsides)
        new = slice(left.shape[1] - dleft.shape[1], None)
        back = torch.bmm(left, dfound.permute(1, 2, 0))  # [F, pairs, reads]
        asked = back * kept
        dvectors = torch.bmm(asked.transpose(1, 2), right).transpose(0, 1).add(dfound, alpha=tape.config.initial)
        dleft.baddbmm_((of_each * kept)[:, new], dfound.transpose(0, 1))
        dright.baddbmm_(asked[:, new], vectors.transpose(0, 1))
        if ctx.squares is not None:
            dkept = (back * of_each).sum(-1, keepdim=True)
            (dsquares,) = torch.autograd.grad(ctx.kept, ctx.squares, dkept)
            for side, dside, dsquare in zip((left, right), (dleft, dright), dsquares, strict=True):
                dside.addcmul_(side[:, new], dsquare[:, new], value=2)
        return None, dvectors, dfound.new_zeros(())
