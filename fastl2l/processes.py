"""The processes of a run, which torchrun or srun has started: whose work is whose, and what they agree on.

The engine is torch.distributed. Work is dealt out in a fixed order and what it gave comes back in the same order, so
that results do not depend on how many processes there are. An error in one process is an error in all of them, and none
waits for another longer than the group's time-out.
"""

from __future__ import annotations

import contextlib
import datetime
import functools
import importlib.metadata
import os
import pickle
import platform
from collections.abc import Callable, Iterator, Mapping
from contextvars import ContextVar
from typing import Any, NamedTuple, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

TIMEOUT = 1800.0
"""Seconds that processes which `joined` has put together wait for each other, unless FASTL2L_TIMEOUT says otherwise."""

STARTED = {"RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"}
"""Environment variables by which torchrun tells a process of the others."""

T = TypeVar("T")
_alone: ContextVar[bool] = ContextVar("alone", default=False)


class ProcessError(RuntimeError):
    """Another process has ended or does not answer, or what it raised could not be sent."""


class Processes(NamedTuple):
    """Those that work on one thing, and which of them this is. Every method is to be called by all of them."""

    rank: int = 0
    size: int = 1

    def share(self, pieces: int) -> range:
        """Which of so many pieces of work are this process's: what comes first is the first process's."""
        return range(pieces * self.rank // self.size, pieces * (self.rank + 1) // self.size)

    def everyone(self, work: Callable[[], T], name: str | None = None) -> list[T]:
        """What `work` gives in each process, in their order; `name` says what it is, by default that of the function.

        Raises:
            ProcessError: another process has ended, has said nothing for as long as the group's time-out is, or is at
                other work.
            Exception: what `work` has raised in any process, in all of them.
        """
        if self.size == 1:
            return [work()]
        name = name or _name(work)
        value: Any = None
        error: Exception | None = None
        try:
            value = work()
        except Exception as caught:
            error = caught
        outcomes = [pickle.loads(sent) for sent in self._exchange(name, _packed(value, error), error)]
        if error is not None:
            raise error
        for rank, (_, theirs) in enumerate(outcomes):
            if theirs is not None:
                if not isinstance(theirs, BaseException):  # what it was packed as is none
                    theirs = ProcessError(f"raised what cannot be sent, {_short(theirs)}")
                raise theirs from ProcessError(f"raised in process {rank} of {self.size}")
        return [one for one, _ in outcomes]

    def first(self, work: Callable[[], T]) -> T:
        """What `work` gives in the first process, the only one that does it. Raises as `everyone` does."""
        results: list[Any] = self.everyone(work if self.rank == 0 else lambda: None, _name(work))
        answer: T = results[0]
        return answer

    def rows(self, work: Callable[[], Tensor]) -> Tensor:
        """The rows that `work` gives in each process, one after the other; where it gave them. Raises as `everyone`."""
        if self.size == 1:
            return work()
        device = torch.device("cpu")

        def sent() -> Tensor:
            nonlocal device
            rows = work()
            device = rows.device
            return rows.detach().cpu()

        return torch.cat(self.everyone(sent, _name(work))).to(device)

    def check_same(self, of: Callable[[], dict[str, Any]]) -> None:
        """That `of` gives the same in every process, in the same order where it gives dicts.

        Raises ValueError in all of them, which names what differs.
        """
        if self.size == 1:
            return
        found = self.everyone(lambda: versions() | of(), _name(of))
        for rank, other in enumerate(found[1:], 1):
            for name in sorted(found[0].keys() | other.keys()):
                if (differ := _difference(found[0].get(name), other.get(name))) is not None:
                    mine, theirs = differ
                    raise ValueError(
                        f"{name}: expected the same in every process, got {mine} in process 0 and {theirs} in process "
                        f"{rank}"
                    )

    def _exchange(self, name: str, mine: bytes, error: Exception | None) -> list[bytes]:
        outcomes: list[Any] = [None] * self.size
        try:
            dist.all_gather_object(outcomes, (name, mine))
        except Exception as failure:
            if error is not None:
                raise error from None
            raise ProcessError(
                f"process {self.rank} of {self.size}: another process has ended, or said nothing until the time-out "
                f"({type(failure).__name__}: {str(failure)[:200]})"
            ) from failure
        for rank, (other, _) in enumerate(outcomes):
            if other != name:  # one of them has left its work by an exception, and has gone on to something else
                if error is not None:
                    raise error
                raise ProcessError(
                    f"process {self.rank} of {self.size}: expected all processes at the same work, got {name} here and "
                    f"{other} in process {rank}"
                )
        return [sent for _, sent in outcomes]


def current() -> Processes:
    """Those of the default process group, if torch.distributed has been initialized and this is not `alone`."""
    if _alone.get() or not dist.is_available() or not dist.is_initialized():
        return Processes()
    return Processes(dist.get_rank(), dist.get_world_size())


@contextlib.contextmanager
def alone() -> Iterator[None]:
    """In here this process works by itself, whatever group it is in."""
    token = _alone.set(True)
    try:
        yield
    finally:
        _alone.reset(token)


@contextlib.contextmanager
def joined() -> Iterator[Processes]:
    """In a group with those that torchrun, or whoever sets RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT, has started.

    Without all of these, or in a group already, nothing is done.

    Raises:
        ValueError: FASTL2L_TIMEOUT is no number of seconds > 0.
        ProcessError: the others do not come within the time-out.
    """
    if not os.environ.keys() >= STARTED or not dist.is_available() or dist.is_initialized():
        yield current()
        return
    seconds = _timeout()
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() and dist.is_nccl_available() else "gloo"
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)) % torch.cuda.device_count())
    try:
        dist.init_process_group(backend, timeout=datetime.timedelta(seconds=seconds))
    except (RuntimeError, ValueError) as error:
        raise ProcessError(f"the other processes were not there within {seconds:g} s: {error}") from error
    try:
        try:
            yield current()
        except SystemExit as ending:  # which a command that has done its work ends with
            if ending.code:
                raise
            current().everyone(_leave)
            raise
        current().everyone(_leave)
    finally:
        dist.destroy_process_group()


def _leave() -> None:
    """Nobody leaves while another still listens."""


def versions() -> dict[str, str]:
    """Of what results depend on: fastl2l, torch, Python and the machine."""
    try:
        version = importlib.metadata.version("fastl2l")
    except importlib.metadata.PackageNotFoundError:  # used from a checkout that was not installed
        version = "unknown"
    return {
        "fastl2l": version,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "machine": f"{platform.system()} {platform.machine()}",
    }


def _timeout() -> float:
    text = os.environ.get("FASTL2L_TIMEOUT", str(TIMEOUT))
    try:
        seconds = float(text)
    except ValueError:
        seconds = 0.0
    if not 0 < seconds < 10**8:
        raise ValueError(f"FASTL2L_TIMEOUT: expected a number of seconds > 0, got {text!r}")
    return seconds


def _name(work: Callable[..., object]) -> str:
    """What work is called, wherever it is written."""
    function = work.func if isinstance(work, functools.partial) else work
    return f"{function.__module__}.{getattr(function, '__qualname__', type(function).__name__)}"


def _packed(value: Any, error: Exception | None) -> bytes:
    """For others; what cannot be sent is an error in all of them, and not one that they would wait for."""
    try:
        packed = pickle.dumps((value, error))
        if error is not None:
            pickle.loads(packed)  # some exceptions can be packed and not unpacked
    except Exception as failure:
        reason = failure if error is None else error
        return pickle.dumps((None, ProcessError(f"{type(reason).__name__}: {_short(reason, str)}")))
    return packed


def _difference(mine: Any, theirs: Any) -> tuple[str, str] | None:
    """What differs between two values, in words: in dicts the first entry that does, or else their order."""
    if not (isinstance(mine, Mapping) and isinstance(theirs, Mapping)):
        return None if mine == theirs else (_short(mine), _short(theirs))
    for key in [*mine, *(key for key in theirs if key not in mine)]:
        if (differ := _difference(mine.get(key), theirs.get(key))) is not None:
            first, second = differ
            return f"{key}: {first}", f"{key}: {second}"
    return None if list(mine) == list(theirs) else (_short(list(mine)), _short(list(theirs)))


def _short(value: object, text: Callable[[Any], str] = repr) -> str:
    try:
        found = text(value)
    except Exception:  # of whatever it is
        return f"something of type {type(value).__name__}"
    return found if len(found) <= 200 else f"{found[:200]}..."
