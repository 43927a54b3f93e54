"""Checkpoints of a meta-training run: one file, whole or not at all, read without executing anything in it.

A line with the version, a digest of the rest, and what torch.save makes of the settings and the state.
"""

from __future__ import annotations

import hashlib
import io
import re
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastl2l import files
from fastl2l.rules import upgraded

VERSION = 2
_MAGIC = b"fastl2l checkpoint"
_FIRST_LINE = re.compile(_MAGIC + rb"(?: ([0-9]{1,9}))?\n")
"""Version 1 had its number beside the settings; it is read on."""
_BYTES_BESIDE_WEIGHTS = 2**26
"""What the settings and the history of a run may take."""
BEFORE = {"batch": 1, "pieces": 1}
"""Settings that older files do not name, and what they were."""
_UNKNOWN_BEFORE = ("backend",)
"""Those that older files do not name, and that may have been anything."""


class CheckpointError(ValueError):
    """A checkpoint that this run cannot go on from; the message says what was expected and what came."""


def save(path: Path, settings: dict[str, Any], state: dict[str, Any]) -> None:
    """Write a run's settings (what it is) and state (how far it is)."""
    buffer = io.BytesIO()
    torch.save({"settings": settings, "state": state}, buffer)
    data = buffer.getvalue()
    files.write_bytes(path, _MAGIC + b" %d\n" % VERSION + hashlib.sha256(data).digest() + data)


def load(
    path: Path, settings: dict[str, Any], weights: Mapping[str, Tensor], epoch: Callable[..., object]
) -> dict[str, Any]:
    """The state in `path`, which must be of a run with the same settings.

    Args:
        path: the file.
        settings: of this run.
        weights: its rule's, by name in the order that Adam has them in.
        epoch: what takes an entry of its history.

    Raises:
        CheckpointError: the file is damaged, of another version, or of another run; it names what differs.
    """
    # The rule's weights now and at their best, and Adam's two means of them; twice, for what surrounds them.
    largest = _BYTES_BESIDE_WEIGHTS + 8 * sum(weight.nbytes for weight in weights.values())
    try:
        version, data = _unseal(path, files.read_bytes(path, largest))
    except files.FileError as error:
        raise CheckpointError(str(error)) from error
    # The digest says that the file is as it was written, but not that this wrote it.
    try:
        saved, state = _unpack(version, data)
        different = difference(settings, saved)
        fits = bool(different) or _is_state(state, weights, epoch)
    except Exception as error:  # torch.load raises whatever the operations in a file happen to raise
        reason = f"{type(error).__name__}: {str(error)[:200]}"
        raise CheckpointError(f"{path}: expected a checkpoint, got other content ({reason})") from error
    if different:
        raise CheckpointError(f"{path}: is of a run with other settings; {different}")
    if not fits:
        raise CheckpointError(f"{path}: expected the state of such a run, got {files.shown(state)}")
    return state


def difference(expected: dict[str, Any], saved: dict[str, Any]) -> str:
    """What is other in the settings that were saved, as text for a message; empty if nothing is."""
    saved = BEFORE | saved
    if isinstance(saved.get("rule"), dict):
        saved["rule"] = upgraded(saved["rule"])
    saved |= {name: expected[name] for name in _UNKNOWN_BEFORE if name in expected and name not in saved}
    different = [name for name in sorted(expected.keys() | saved.keys()) if expected.get(name) != saved.get(name)]
    if not different:
        return ""
    name, more = different[0], f" (and {len(different) - 1} more)" if len(different) > 1 else ""
    return f"{name}: expected {files.shown(expected.get(name))}, got {files.shown(saved.get(name))}{more}"


def _unseal(path: Path, content: bytes) -> tuple[int, bytes]:
    """The version and what torch.save has made, which is whole."""
    line = _FIRST_LINE.match(content)
    version = int(line[1] or 1) if line else 0
    if version > VERSION:
        raise CheckpointError(f"{path}: expected checkpoint version {VERSION}, got {version}")
    start = line.end() if line else 0
    digest, data = content[start : start + 32], content[start + 32 :]
    if version < 1 or hashlib.sha256(data).digest() != digest:
        raise CheckpointError(f"{path}: expected a checkpoint, and it is damaged or something else")
    return version, data


def _unpack(version: int, data: bytes) -> tuple[dict[str, Any], dict[str, Any]]:
    """Settings and state."""
    with zipfile.ZipFile(io.BytesIO(data)) as packed:
        if sum(entry.file_size for entry in packed.infolist()) > len(data):
            raise ValueError("it would grow on being unpacked")
    loaded = torch.load(io.BytesIO(data), weights_only=True)
    if version == 1 and loaded["version"] != 1:
        raise ValueError(f"version {files.shown(loaded['version'])}")
    return loaded["settings"], loaded["state"]


def _is_state(state: dict[str, Any], weights: Mapping[str, Tensor], epoch: Callable[..., object]) -> bool:
    """Whether a run whose rule has such weights could have saved `state`; may raise anything where not."""
    kinds = {name: (weight.shape, weight.dtype) for name, weight in weights.items()}
    trained = [(weight.shape, weight.dtype) for weight in weights.values() if weight.requires_grad]
    found = [{name: (one.shape, one.dtype) for name, one in state[key].items()} for key in ("current", "best")]
    entries = state["adam"]["state"]
    means = {number: (entry["exp_avg"], entry["exp_avg_sq"]) for number, entry in entries.items()}
    numbers = [state["best_loss"], *(number for entry in state["history"] for number in entry)]
    return (
        found == [kinds, kinds]
        and len(state["adam"]["param_groups"]) == 1
        # Each weight's own: Adam writes to as many numbers as the weight has, wherever they are.
        and all((mean.shape, mean.dtype) == trained[number] for number, pair in means.items() for mean in pair)
        and sorted(means) in ([], list(range(len(trained))))
        and all(entry["step"].numel() == 1 for entry in entries.values())
        and all(isinstance(number, (int, float)) for number in numbers)
        and all(epoch(*entry) for entry in state["history"])
    )
