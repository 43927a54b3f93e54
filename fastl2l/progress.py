"""How far long work is, with an estimate of the time left: a bar on a terminal, a line now and then elsewhere."""

from __future__ import annotations

import time
from types import TracebackType

from rich import progress as rich_progress
from rich.console import Console

_SECONDS_BETWEEN_LINES = 15.0


def plain_console(*, stderr: bool = False) -> Console:
    """A console that shows texts as they are: brackets and colons in names and paths mean nothing to it."""
    return Console(stderr=stderr, markup=False, emoji=False, highlight=False)


class Progress:
    """Use as a context manager, and call :meth:`advance` after every piece of the work.

    Args:
        title: what is being done.
        total: pieces of work in all.
        done: pieces that were done before.
        shown: False for silence.
    """

    def __init__(self, title: str, total: int, *, done: int = 0, shown: bool = True) -> None:
        self._title, self._total, self._done, self._shown = title, total, done, shown
        self._console = plain_console(stderr=True)
        self._bar = rich_progress.Progress(
            rich_progress.TextColumn("{task.description}", markup=False),
            rich_progress.BarColumn(),
            rich_progress.MofNCompleteColumn(),
            rich_progress.TimeElapsedColumn(),
            rich_progress.TextColumn("left"),
            rich_progress.TimeRemainingColumn(),
            rich_progress.TextColumn("{task.fields[message]}", markup=False),
            console=self._console,
            disable=not (shown and self._console.is_terminal),
        )
        self._task = self._bar.add_task(title, total=total, completed=done, message="")
        self._first, self._started, self._last_line = done, time.monotonic(), 0.0

    def __enter__(self) -> Progress:
        self._bar.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.__exit__(kind, error, trace)

    def note(self, message: str) -> None:
        """Say what is being tried, on a terminal."""
        self._bar.update(self._task, message=message)

    def advance(self, message: str = "", *, pieces: int = 1) -> None:
        """So many more pieces are done; `message` says what they gave."""
        self._done += pieces
        self._bar.update(self._task, completed=self._done, message=message)
        now = time.monotonic()
        due = self._done == self._total or now - self._last_line >= _SECONDS_BETWEEN_LINES
        if self._shown and not self._console.is_terminal and due:
            self._last_line = now
            left = (now - self._started) / (self._done - self._first) * (self._total - self._done)
            text = f"{self._title}: {self._done}/{self._total}, {left:.0f} s left"
            self._console.print(f"{text}; {message}" if message else text, soft_wrap=True)
