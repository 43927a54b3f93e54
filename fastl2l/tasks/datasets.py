"""Image data sets, whole in memory and loaded once a process."""

from __future__ import annotations

import os
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from fastl2l.tasks._torchvision import torchvision

SPLITS = ("train", "test")
_TORCHVISION = {"mnist": "MNIST", "fashion-mnist": "FashionMNIST"}


class _Kind(NamedTuple):
    """What a data set is; what is read is held against it."""

    images: dict[str, int]
    """By split."""
    side: int
    white: int
    classes: int


_KINDS = {name: _Kind({"train": 60_000, "test": 10_000}, side=28, white=255, classes=10) for name in _TORCHVISION}
_KINDS["digits"] = _Kind({"train": 1437, "test": 360}, side=8, white=16, classes=10)
NAMES = tuple(_KINDS)


class Images(NamedTuple):
    """A split of a data set: images [n, channels, height, width] in [0, 1], labels int64 [n], number of classes."""

    images: Tensor
    labels: Tensor
    classes: int


def data_folder() -> Path:
    """Where data sets are kept: FASTL2L_DATA, or ~/.cache/fastl2l/data."""
    return Path(os.environ.get("FASTL2L_DATA") or "~/.cache/fastl2l/data").expanduser()


def load(name: str, split: str, *, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu") -> Images:
    """A split ("train" or "test") of "mnist", "fashion-mnist" or "digits". The tensors are shared: never write to them.

    MNIST and Fashion-MNIST are read from `data_folder()`, where torchvision downloads them to if they are not there.
    Digits (1,797 images, 8 x 8) comes with scikit-learn; every fifth image, from the first on, is its test split.

    Raises:
        ValueError: unknown name or split; or the files hold something else than this data set: another number or size
            of images, labels that are out of range.
        ImportError: torchvision or scikit-learn is missing.
        FileNotFoundError: the data set is not there and cannot be downloaded, or its files are damaged.
    """
    if name not in NAMES:
        raise ValueError(f"name: expected one of {', '.join(NAMES)}, got {name!r}")
    if split not in SPLITS:
        raise ValueError(f"split: expected one of {', '.join(SPLITS)}, got {split!r}")
    return _load(name, split, dtype, torch.device(device), data_folder())


@lru_cache(maxsize=8)
def _load(name: str, split: str, dtype: torch.dtype, device: torch.device, folder: Path) -> Images:
    pixels, labels = _digits(split) if name == "digits" else _from_torchvision(name, split, folder)
    kind = _KINDS[name]
    _check(kind, split, pixels, labels, f"data set {name!r}" + f" in {folder}" * (name in _TORCHVISION))
    images = pixels.unsqueeze(1).to(device, dtype).div_(kind.white)
    return Images(images, labels.to(device), kind.classes)


def _check(kind: _Kind, split: str, pixels: Tensor, labels: Tensor, where: str) -> None:
    count, side = kind.images[split], kind.side
    expected = f"{count} images {side} x {side} of numbers 0 to {kind.white}, labels 0 to {kind.classes - 1}"
    shapes = list(pixels.shape), list(labels.shape)
    if shapes != ([count, side, side], [count]):
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
        place, reason = folder / dataset.__name__ / "raw", " ".join(str(error).split())
        raise FileNotFoundError(
            f"data set {name!r} is not (or not whole) in {place}, and the download failed: {reason} With a network, "
            f"remove that folder and try again; without one, put the four *-ubyte files of {dataset.__name__} there, "
            "or set FASTL2L_DATA to a folder that has them (the root that torchvision's class takes)."
        ) from error
    return data.data, data.targets
