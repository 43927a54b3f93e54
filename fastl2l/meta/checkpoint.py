"""Checkpoints of a meta-training run: one file, whole or not at all, read without executing anything in it."""

from __future__ import annotations

import io
import pickle
from pathlib import Path
from typing import Any

import torch

from fastl2l import files

VERSION = 1


class CheckpointError(ValueError):
    """A checkpoint that this run cannot go on from; the message says what was expected and what came."""


def save(path: Path, settings: dict[str, Any], state: dict[str, Any]) -> None:
    """Write a run's settings (what it is) and state (how far it is)."""
    buffer = io.BytesIO()
    torch.save({"version": VERSION, "settings": settings, "state": state}, buffer)
    files.write_bytes(path, buffer.getvalue())


def load(path: Path, settings: dict[str, Any]) -> dict[str, Any]:
    """The state in `path`, which must be of a run with the same settings.

    Raises:
        CheckpointError: the file is damaged, of another version, or of another run; it names what differs.
    """
    try:
        content = torch.load(path, weights_only=True)
        version, saved, state = content["version"], content["settings"], content["state"]
    except (RuntimeError, pickle.UnpicklingError, EOFError, KeyError, TypeError, OSError) as error:
        raise CheckpointError(f"{path}: expected a checkpoint, and it is damaged or something else: {error}") from error
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
