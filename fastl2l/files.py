"""Files that appear whole or not at all.

Checkpoints, results and cached learning rates are read back later, perhaps after the process that wrote them was
killed. Each is therefore written to a temporary file beside its place, flushed to the disk and renamed over it: a
reader sees the old file or the new one, never a part.
"""

from __future__ import annotations

import hashlib
import json
import os
import secrets
from pathlib import Path
from typing import Any

from fastl2l.build import cache_folder


def write_bytes(path: str | os.PathLike[str], data: bytes) -> Path:
    """Write `data` to `path`, whole or not at all, and return the path. Missing folders are made.

    A symbolic link is followed, so that the file it names is replaced and not the link.

    Raises:
        TypeError: `data` is not bytes.
        IsADirectoryError: `path` is a folder.
        OSError: the file cannot be written; what was there before is untouched.
    """
    if not isinstance(data, (bytes, bytearray, memoryview)):
        raise TypeError(f"data: expected bytes, got {type(data).__name__}")
    target = Path(os.path.realpath(path))
    if target.is_dir():
        raise IsADirectoryError(f"path: expected a file name, got the folder {os.fspath(path)!r}")
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f".{target.name[:200]}.{secrets.token_hex(8)}.tmp")
    try:
        with open(temporary, "xb") as file:  # open, unlike mkstemp, gives the permissions the user's umask asks for
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, target)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    _sync_folder(target.parent)
    return Path(path)


def write_text(path: str | os.PathLike[str], text: str) -> Path:
    """Write `text` to `path` as UTF-8 with the line ends it has; otherwise as `write_bytes`."""
    return write_bytes(path, text.encode())


def write_json(path: str | os.PathLike[str], value: Any) -> Path:
    """Write `value` to `path` as indented JSON; otherwise as `write_bytes`.

    Raises:
        TypeError: `value` holds something JSON has no word for.
        ValueError: `value` holds NaN or an infinity, which JSON has no word for either and other readers refuse.
    """
    return write_text(path, json.dumps(value, indent=1, allow_nan=False) + "\n")


def cache_file(kind: str, request: dict[str, Any], suffix: str) -> Path:
    """Where FASTL2L_CACHE keeps the answer to `request`: named by a hash of everything the answer depends on."""
    key = hashlib.blake2b(json.dumps(request, sort_keys=True).encode(), digest_size=16).hexdigest()
    return cache_folder() / kind / f"{key}{suffix}"


def _sync_folder(folder: Path) -> None:
    """Make a rename in `folder` outlast a power failure, where the system can (Windows cannot open folders)."""
    if os.name != "posix":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
