"""A number for each run, kept in FASTL2L_CACHE: a comparison that was killed goes on where it was."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from fastl2l.evaluate import json_number
from fastl2l.files import FileError, cache_file, cached, plain, read_record, shown, write_record


class KeptNumbers(NamedTuple):
    """Of one kind.

    Args:
        folder: where, in the cache.
        name: what such a number is.
        format: a new number where the same request would no longer mean the same one.
        fits: whether a float may be one.
    """

    folder: str
    name: str
    format: int
    fits: Callable[[float], bool]

    def of(self, request: dict[str, Any], run: Callable[[], float]) -> float:
        """From the cache, or from `run` and into it; a request is all that decides the number."""
        return cached(self._path(request), lambda path: self._read(path, request), run, self._writer(request))

    def keep(self, request: dict[str, Any], number: float) -> None:
        """Into the cache. Raises an OSError if that cannot be."""
        self._writer(request)(self._path(request), number)

    def _whole(self, request: dict[str, Any]) -> dict[str, Any]:
        return plain({"format": self.format, **request})

    def _path(self, request: dict[str, Any]) -> Path:
        return cache_file(self.folder, self._whole(request), ".json")

    def _read(self, path: Path, request: dict[str, Any]) -> float:
        record = read_record(path, self.format)
        number = record.pop(self.name, None)
        if record != self._whole(request):
            raise FileError(f"{path}: is the answer to another request")
        found = math.inf if number == "inf" else number
        if not isinstance(found, float) or not self.fits(found):
            raise FileError(f"{path}: expected a {self.name}, got {shown(number)}")
        return found

    def _writer(self, request: dict[str, Any]) -> Callable[[Path, float], object]:
        whole = self._whole(request)
        return lambda path, number: write_record(path, whole | {self.name: json_number(number)})
