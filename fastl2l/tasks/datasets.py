"""Image data sets, whole in memory and loaded once a process."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from fastl2l.tasks._torchvision import torchvision
from fastl2l.tasks.networks import WHITE

SPLITS = ("train", "test")
_TORCHVISION = {"mnist": "MNIST", "fashion-mnist": "FashionMNIST", "cifar10": "CIFAR10"}
_CIFAR10 = "cifar-10-batches-bin"
_CIFAR10_FILES = {"train": [f"data_batch_{i}.bin" for i in range(1, 6)], "test": ["test_batch.bin"]}
"""The official binary version: in each file as many images, each a byte with the label and its pixels by channel."""


class _Kind(NamedTuple):
    """What a data set is; what is read is held against it."""

    images: dict[str, int]
    """By split."""
    shape: tuple[int, ...]
    """Of an image: (height, width), or (channels, height, width)."""
    white: int
    classes: int
    as_bytes: bool = False
    """Whether pixels stay bytes in memory."""


_MNIST = _Kind({"train": 60_000, "test": 10_000}, shape=(28, 28), white=WHITE, classes=10)
_KINDS = {
    "mnist": _MNIST,
    "fashion-mnist": _MNIST,
    "digits": _Kind({"train": 1437, "test": 360}, shape=(8, 8), white=16, classes=10),
    "cifar10": _Kind({"train": 50_000, "test": 10_000}, shape=(3, 32, 32), white=WHITE, classes=10, as_bytes=True),
}
NAMES = tuple(_KINDS)


class Images(NamedTuple):
    """A split of a data set: images [n, channels, height, width] in [0, 1], labels int64 [n], number of classes.

    The images of CIFAR-10 are bytes, a quarter of the memory; `networks.numbers` makes numbers in [0, 1] of some.
    """

    images: Tensor
    labels: Tensor
    classes: int


def data_folder() -> Path:
    """Where data sets are kept: FASTL2L_DATA, or ~/.cache/fastl2l/data."""
    return Path(os.environ.get("FASTL2L_DATA") or "~/.cache/fastl2l/data").expanduser()


def load(
    name: str,
    split: str,
    *,
    labels: Sequence[int] | None = None,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> Images:
    """A split ("train" or "test") of one of `NAMES`. The tensors are shared: never write to them.

    Of some `labels` alone, if they are given, which become 0, 1, ... in their order.

    MNIST, Fashion-MNIST and CIFAR-10 are read from `data_folder()`, where torchvision downloads them to if they are not
    there. Of CIFAR-10 the official binary version does as well: a folder cifar-10-batches-bin, which comes first.
    Digits (1,797 images, 8 x 8) comes with scikit-learn; every fifth image, from the first on, is its test split.

    Raises:
        ValueError: unknown name or split; labels that there are not, or some of them twice, or fewer than two; or the
            files hold something else than this data set: another number or size
            of images, labels that are out of range.
        ImportError: torchvision or scikit-learn is missing.
        FileNotFoundError: the data set is not there and cannot be downloaded, or its files are damaged.
    """
    if name not in NAMES:
        raise ValueError(f"name: expected one of {', '.join(NAMES)}, got {name!r}")
    if split not in SPLITS:
        raise ValueError(f"split: expected one of {', '.join(SPLITS)}, got {split!r}")
    where = dtype, torch.device(device), data_folder()
    return _load(name, split, *where) if labels is None else _some(name, split, tuple(labels), *where)


@cache
def _some(
    name: str, split: str, labels: tuple[int, ...], dtype: torch.dtype, device: torch.device, folder: Path
) -> Images:
    classes = _KINDS[name].classes
    if len(labels) < 2 or len(set(labels)) < len(labels) or not all(0 <= label < classes for label in labels):
        got = ", ".join(map(str, labels)) or "none"
        raise ValueError(f"labels: expected at least two of 0 to {classes - 1}, each once, got {got}")
    images, all_labels, _ = _load(name, split, dtype, device, folder)
    renamed = torch.full((classes,), -1, device=device)
    renamed[list(labels)] = torch.arange(len(labels), device=device)
    chosen = renamed[all_labels]
    return Images(images[chosen >= 0], chosen[chosen >= 0], len(labels))


@cache  # a problem holds its data anyway, and loading them anew would make them others
def _load(name: str, split: str, dtype: torch.dtype, device: torch.device, folder: Path) -> Images:
    kind = _KINDS[name]
    if name == "digits":
        pixels, labels = _digits(split)
    elif name == "cifar10" and (folder / _CIFAR10).is_dir():
        pixels, labels = _binary_cifar10(kind, split, folder / _CIFAR10)
    else:
        pixels, labels = _from_torchvision(name, split, folder)
    _check(kind, split, pixels, labels, f"data set {name!r}" + f" in {folder}" * (name in _TORCHVISION))
    images = pixels.reshape(len(pixels), -1, *kind.shape[-2:]).to(device)
    images = images if kind.as_bytes else images.to(dtype).div_(kind.white)
    return Images(images, labels.to(device), kind.classes)


def _check(kind: _Kind, split: str, pixels: Tensor, labels: Tensor, where: str) -> None:
    count, size = kind.images[split], " x ".join(map(str, kind.shape))
    expected = f"{count} images {size} of numbers 0 to {kind.white}, labels 0 to {kind.classes - 1}"
    shapes = list(pixels.shape), list(labels.shape)
    if shapes != ([count, *kind.shape], [count]):
        raise ValueError(f"{where}, {split}: expected {expected}, got images {shapes[0]} and labels {shapes[1]}")
    found = [(numbers.min().item(), numbers.max().item()) for numbers in (pixels, labels)]
    if not all(0 <= low <= high <= top for (low, high), top in zip(found, (kind.white, kind.classes - 1), strict=True)):
        ranges = " and labels ".join(f"{low:g} to {high:g}" for low, high in found)
        raise ValueError(f"{where}, {split}: expected {expected}, got numbers {ranges}")


def _digits(split: str) -> tuple[Tensor, Tensor]:
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise ImportError("the digits need scikit-learn, which is not installed: pip install scikit-learn") from error
    data = load_digits()
    fifths = np.s_[::5]
    images, labels = (x[fifths] if split == "test" else np.delete(x, fifths, 0) for x in (data.images, data.target))
    return torch.from_numpy(images), torch.from_numpy(labels).long()


def _from_torchvision(name: str, split: str, folder: Path) -> tuple[Tensor, Tensor]:
    dataset = getattr(torchvision().datasets, _TORCHVISION[name])
    try:
        data = dataset(folder, train=split == "train", download=True)  # downloads only what is not there
    except Exception as error:
        place, files = folder / dataset.__name__ / "raw", "four *-ubyte files"
        if name == "cifar10":
            place, files = folder / _CIFAR10, ".bin files of the binary version"
        reason = " ".join(str(error).split())
        raise FileNotFoundError(
            f"data set {name!r} is not (or not whole) in {place}, and the download failed: {reason} With a network, "
            f"remove that folder and try again; without one, put the {files} of {dataset.__name__} there, "
            "or set FASTL2L_DATA to a folder that has them (the root that torchvision's class takes)."
        ) from error
    pixels, labels = (torch.from_numpy(np.asarray(x)) for x in (data.data, data.targets))
    return (pixels.movedim(-1, 1) if pixels.ndim == 4 else pixels), labels


def _binary_cifar10(kind: _Kind, split: str, folder: Path) -> tuple[Tensor, Tensor]:
    files = [folder / name for name in _CIFAR10_FILES[split]]
    images, record = kind.images[split] // len(files), 1 + math.prod(kind.shape)
    whole = []
    for file in files:
        expected = f"{file}: expected {images} records of {record} bytes, the first of them a label 0 to "
        expected += f"{kind.classes - 1}: {images * record} bytes in all, got "
        if not file.is_file():
            raise FileNotFoundError(expected + "no such file")
        records = np.fromfile(file, np.uint8)
        if len(records) != images * record:
            raise ValueError(expected + f"{len(records)}")
        records = records.reshape(images, record)
        if records[:, 0].max() >= kind.classes:
            raise ValueError(expected + f"a label {records[:, 0].max()}")
        whole.append(torch.from_numpy(records))
    labels, pixels = torch.cat(whole).split([1, record - 1], dim=1)
    return pixels.reshape(-1, *kind.shape), labels.flatten().long()
