"""Checkpoints of a meta-training run: one file, whole or not at all, read without executing anything in it."""

from __future__ import annotations

import hashlib
import io
from pathlib import Path
from typing import Any

import torch

from fastl2l import files

VERSION = 1
_MAGIC = b"fastl2l checkpoint\n"
BEFORE = {"batch": 1}
"""Settings that older files do not name, and what they were."""


class CheckpointError(ValueError):
    """A checkpoint that this run cannot go on from; the message says what was expected and what came."""


def save(path: Path, settings: dict[str, Any], state: dict[str, Any]) -> None:
    """Write a run's settings (what it is) and state (how far it is)."""
    buffer = io.BytesIO()
    torch.save({"version": VERSION, "settings": settings, "state": state}, buffer)
    data = buffer.getvalue()
    files.write_bytes(path, _MAGIC + hashlib.sha256(data).digest() + data)


def load(path: Path, settings: dict[str, Any]) -> dict[str, Any]:
    """The state in `path`, which must be of a run with the same settings.

    Raises:
        CheckpointError: the file is damaged, of another version, or of another run; it names what differs.
    """
    content = path.read_bytes()
    digest, data = content[len(_MAGIC) : len(_MAGIC) + 32], content[len(_MAGIC) + 32 :]
    if not content.startswith(_MAGIC) or hashlib.sha256(data).digest() != digest:
        raise CheckpointError(f"{path}: expected a checkpoint, and it is damaged or something else")
    loaded = torch.load(io.BytesIO(data), weights_only=True)
    version, saved, state = loaded["version"], BEFORE | loaded["settings"], loaded["state"]
    if version != VERSION:
        raise CheckpointError(f"{path}: expected checkpoint version {VERSION}, got {version}")
    different = [name for name in sorted(settings.keys() | saved.keys()) if settings.get(name) != saved.get(name)]
    if different:
        name = different[0]
        raise CheckpointError(
            f"{path}: is of a run with other settings; {name}: expected {settings.get(name)!r}, got {saved.get(name)!r}"
            + (f" (and {len(different) - 1} more)" if len(different) > 1 else "")
        )
    result: dict[str, Any] = state
    return result
