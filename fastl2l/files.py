"""Files that appear whole or not at all, and of which no wrong bit is used.

Checkpoints, results and cached learning rates are read back later, perhaps after the process that wrote them was
killed. Each is therefore written to a temporary file beside its place, flushed to the disk and renamed over it: a
reader sees the old file or the new one, never a part.

Disks and people damage files all the same. What is read back has a digest of all that it holds, and readers go the same
way: nothing is read before its size is bounded, the version is looked at before what it decides, and whatever is wrong
is a `FileError` that names the file.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import reprlib
import secrets
import warnings
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

from fastl2l.build import cache_folder

LARGEST_TEXT = 2**22
"""Bytes of JSON that are parsed: of a file, unless its reader allows more, or of the header of one."""
DEEPEST = 64
"""Levels of JSON: every other function that walks over a value may then recurse."""

_DAMAGED = "is damaged: its content does not match its checksum"
_UNSEALED = "is damaged or of an older version: it has no checksum"

T = TypeVar("T")


class FileError(ValueError):
    """A file that is damaged or something else; the message names it, what was expected and what came."""


# Whole or not at all


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
    if target.exists() and not target.is_file():  # a device, which renaming would put a file in the place of
        raise OSError(f"path: expected a file, new or to be replaced, got {os.fspath(path)!r}, which is something else")
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f".{target.name[:200]}.{secrets.token_hex(8)}.tmp")
    try:
        with open(temporary, "xb") as file:  # open, unlike mkstemp, gives the permissions the user's umask asks for
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, target)
    except BaseException as error:
        temporary.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.errno is not None and error.filename is None:  # of a full disk, say
            raise OSError(error.errno, error.strerror, os.fspath(path)) from error
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


def _sync_folder(folder: Path) -> None:
    """Make a rename in `folder` outlast a power failure, where the system can (Windows cannot open folders)."""
    if os.name != "posix":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


# Bounded


def read_bytes(path: str | os.PathLike[str], largest: int) -> bytes:
    """What is in `path`, which may have `largest` bytes.

    Raises:
        FileError: it has more, or is no file: a folder, or a pipe that nobody writes to.
        OSError: it cannot be read.
    """
    with _opened(path) as file:
        content = file.read(min(largest, _size(file)) + 1)
    if len(content) > largest:
        raise FileError(f"{path}: expected at most {largest} bytes, got more")
    return content


def parse_json(text: str | bytes, name: object) -> Any:
    """The value that `text` holds. Raises FileError, which speaks of `name`."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise FileError(f"{name}: expected JSON, got {error}") from error
    level = [value]
    for _ in range(DEEPEST):
        level = [inner for one in level for inner in _inside(one)]
    if level:
        raise FileError(f"{name}: expected JSON of at most {DEEPEST} levels, got more")
    return value


def shown(value: object) -> str:
    """`value` as text for a message, which does not grow with it."""
    try:
        text = _REPR.repr(value)
    except ValueError:  # an integer of too many digits
        text = f"a {type(value).__name__} too long to print"
    return text if len(text) <= 400 else f"{text[:400]}..."


_REPR = reprlib.Repr()
_REPR.maxlevel, _REPR.maxdict, _REPR.maxlist, _REPR.maxtuple, _REPR.maxother = 5, 12, 12, 12, 80
_REPR.maxstring = 100


def _inside(value: Any) -> Collection[Any]:
    if isinstance(value, dict):
        return value.values()
    return value if isinstance(value, list) else ()


def _opened(path: str | os.PathLike[str]) -> BinaryIO:
    if Path(path).exists() and not Path(path).is_file():  # before it is opened: that of a pipe waits for a writer
        raise FileError(f"{path}: expected a file, got a folder or a device")
    return open(path, "rb")


def _size(file: BinaryIO) -> int:
    return os.fstat(file.fileno()).st_size


def digest(path: Path) -> str:
    """Of what is in a file, whatever it is: 32 characters."""
    return hashlib.blake2b(path.read_bytes(), digest_size=16).hexdigest()


# Records: JSON with a digest


def write_record(path: str | os.PathLike[str], record: Mapping[str, Any]) -> Path:
    """Write `record`, whose "format" is its version, for `read_record`; otherwise as `write_json`."""
    record = plain(record)
    return write_json(path, record | {"digest": _digest(record)})


def read_record(
    path: str | os.PathLike[str], version: int, *, largest: int = LARGEST_TEXT, unsealed: Collection[str] = ()
) -> dict[str, Any]:
    """What `write_record` wrote.

    Args:
        path: the file.
        version: the record's "format".
        largest: bytes that it may have.
        unsealed: the names in a record of an older version, which has no digest and is read without.

    Raises:
        FileError: it is damaged, something else or of another version.
        OSError: it cannot be read.
    """
    record = parse_json(read_bytes(path, largest), path)
    if not isinstance(record, dict) or "format" not in record:
        raise FileError(f"{path}: expected a record with a format, got {shown(record)}")
    if record["format"] != version:
        raise FileError(f"{path}: expected format {version}, got {shown(record['format'])}")
    kept = record.pop("digest", None)
    if kept is None and record.keys() == set(unsealed):
        return record
    if kept != _digest(record):
        raise FileError(f"{path}: {_DAMAGED if kept else _UNSEALED}")
    return record


def plain(record: Mapping[str, Any]) -> dict[str, Any]:
    """`record` as it will be read: with lists for tuples, and texts for all names."""
    read: dict[str, Any] = json.loads(json.dumps(record, allow_nan=False))
    return read


def _digest(record: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()


# Tensors: safetensors with a checksum


def write_tensors(
    path: str | os.PathLike[str], tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None
) -> Path:
    """Write `tensors` and `metadata` as a safetensors file for `open_tensors`; otherwise as `write_bytes`.

    The same tensors and metadata give the same bytes.

    Raises:
        ValueError: the metadata are longer than what would be read.
    """
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    metadata = dict(metadata or {})
    content = safetensors.torch.save(tensors, metadata | {"checksum": _checksum(metadata, tensors)})
    length = int.from_bytes(content[:8], "little")
    # Safetensors has the metadata in another order every time; and data begin at a multiple of 8.
    header = json.dumps(json.loads(content[8 : 8 + length]), sort_keys=True, separators=(",", ":")).encode()
    header += b" " * (-len(header) % 8)
    if len(header) > LARGEST_TEXT:
        raise ValueError(f"metadata: expected at most {LARGEST_TEXT} bytes, got {len(header)}")
    return write_bytes(path, len(header).to_bytes(8, "little") + header + content[8 + length :])


@dataclass
class StoredTensors:
    """A safetensors file whose header has been read, and nothing else of it.

    Attributes:
        metadata: what was written with the tensors, and under "checksum" a digest of it and of them.
        shapes: by name.
        dtypes: in the words of safetensors, such as "F32".
    """

    path: Path
    metadata: dict[str, str]
    shapes: dict[str, tuple[int, ...]]
    dtypes: set[str]
    _file: BinaryIO
    _header: bytes

    def load(self, *, sealed: bool = True) -> dict[str, Tensor]:
        """The tensors, whose shapes have been found right.

        Args:
            sealed: whether a file without checksum is refused.

        Raises:
            FileError: the file is damaged.
        """
        most = 8 * sum(map(math.prod, self.shapes.values()))  # no dtype of safetensors has more bytes
        data = self._file.read(min(most, _size(self._file)) + 1)
        try:
            tensors: dict[str, Tensor] = safetensors.torch.load(self._header + data)
        except (SafetensorError, KeyError, TypeError, ValueError, RuntimeError) as error:
            raise _damaged(self.path, error) from error
        checksum = _checksum(self.metadata, tensors)
        if self.metadata.get("checksum", "" if sealed else checksum) != checksum:
            raise FileError(f"{self.path}: {_DAMAGED if 'checksum' in self.metadata else _UNSEALED}")
        return tensors


@contextlib.contextmanager
def open_tensors(path: str | os.PathLike[str]) -> Iterator[StoredTensors]:
    """A safetensors file, for a look at what it says of itself before its tensors are loaded.

    Raises:
        FileError: it is damaged or something else.
        OSError: it cannot be read.
    """
    with _opened(path) as file:
        start = file.read(8)
        length = int.from_bytes(start, "little")
        if length > LARGEST_TEXT:
            raise _damaged(path, f"a header of more than {LARGEST_TEXT} bytes")
        header = file.read(length)
        try:
            entries = parse_json(header, "header")
            metadata = entries.pop("__metadata__", {})
            shapes = {name: tuple(entry["shape"]) for name, entry in entries.items()}
            dtypes = {str(entry["dtype"]) for entry in entries.values()}
            if not all(isinstance(text, str) for text in metadata.values()):
                raise TypeError("expected metadata of texts")
            if not all(type(size) is int and size >= 0 for shape in shapes.values() for size in shape):
                raise TypeError("expected shapes of integers")
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise _damaged(path, error) from error
        yield StoredTensors(Path(path), metadata, shapes, dtypes, file, start + header)


def _damaged(path: str | os.PathLike[str], reason: object) -> FileError:
    return FileError(f"{path}: expected a safetensors file, and it is damaged or something else: {str(reason)[:400]}")


def _checksum(metadata: Mapping[str, str], tensors: Mapping[str, Tensor]) -> str:
    """Of all that a file holds. Safetensors has none of its own, and a wrong bit in a number is not seen otherwise."""
    found = hashlib.sha256()
    for name in sorted(metadata.keys() - {"checksum"}):
        found.update(f"{name} {metadata[name]}\n".encode())
    for name in sorted(tensors):
        found.update(f"{name} {tensors[name].dtype} {list(tensors[name].shape)}\n".encode())
        found.update(tensors[name].reshape(-1).view(torch.uint8).numpy().data)
    return found.hexdigest()


# The cache


def cache_file(kind: str, request: dict[str, Any], suffix: str) -> Path:
    """Where FASTL2L_CACHE keeps the answer to `request`: named by a hash of everything the answer depends on."""
    key = hashlib.blake2b(json.dumps(request, sort_keys=True).encode(), digest_size=16).hexdigest()
    return cache_folder() / kind / f"{key}{suffix}"


def cached(path: Path, read: Callable[[Path], T], make: Callable[[], T], write: Callable[[Path, T], object]) -> T:
    """What the cache holds in `path`, or else what `make` gives, which is kept there.

    Nothing in the cache stops anybody: what `read` finds damaged, which is a FileError, is made anew, and what cannot
    be kept is given all the same. Both are warned of.
    """
    with contextlib.suppress(OSError):
        try:
            return read(path)
        except FileError as error:
            _warn(f"{error}; it is computed anew")
    made = make()
    try:
        write(path, made)
    except OSError as error:
        _warn(f"{path.parent}: what was computed cannot be kept there: {error.strerror or error}")
    return made


def _warn(message: str) -> None:
    warnings.warn(message, RuntimeWarning, stacklevel=3)
