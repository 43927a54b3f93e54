"""Painting a photograph in the style of a picture (Andrychowicz et al. 2016, section 3.4; Gatys et al. 2015)."""

from __future__ import annotations

import hashlib
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageOps
from torch import Tensor

from fastl2l import images
from fastl2l.files import digest
from fastl2l.tasks import vgg
from fastl2l.tasks.base import PureProblem, Task, floating, generator, integer, normal
from fastl2l.tasks.datasets import data_folder

SPLITS = ("train", "validation", "test", "all")
STARTS = ("noise", "content")
TERMS = ("content", "style", "smoothness")
LEAST_SIZE = 16
"""Pixels of a side: the deepest features by default are of an eighth of it."""
_SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff"}
_GREY, _UNIT = 0.45, 0.25
"""A pixel is _GREY + _UNIT * coordinate: coordinates of photographs have a deviation of about 1."""
_NOISE = 0.5
"""Deviation of the coordinates of white noise."""
_BUCKETS = {"test": range(3), "validation": range(3, 5), "train": range(5, 20)}
"""Photographs belong to 20 buckets by what they hold, so that one stays where it is whatever else is in a folder."""
_SMALLEST_CROP = 0.6
"""Side of a crop, as a share of the photograph's shorter side, at least."""


def to_theta(pixels: Tensor) -> Tensor:
    """Coordinates [3 * height * width] of pixels [3, height, width] in [0, 1]."""
    return ((pixels - _GREY) / _UNIT).flatten()


def to_pixels(theta: Tensor, height: int, width: int) -> Tensor:
    """Pixels [3, height, width] of coordinates; some may lie outside of [0, 1]."""
    return _GREY + _UNIT * theta.view(3, height, width)


@dataclass(frozen=True)
class Weights:
    """Of the three terms; and the layers that two of them look at.

    Args:
        content: of the squared error of the content layer's features, as a share of their square.
        style: of the squared error of the style layers' Gram matrices, as a share of their square, mean over layers.
        smoothness: of total variation: the mean square of differences between neighbours, in coordinates.
        content_layer, style_layers: such as "relu3_1".
        network: "vgg16" or "vgg19", with torchvision's weights.

    Raises:
        ValueError: a weight is not finite or below 0, all are 0, or the network has no such layer.
    """

    content: float = 1.0
    style: float = 5.0
    smoothness: float = 0.3
    content_layer: str = "relu4_1"
    style_layers: Sequence[str] = ("relu1_1", "relu2_1", "relu3_1", "relu4_1")
    network: str = "vgg16"

    def __post_init__(self) -> None:
        for name in ("content", "style", "smoothness"):
            weight_at_least_0(f"{name}_weight", getattr(self, name))
        if self.content == self.style == 0:
            raise ValueError("content_weight: expected one above 0 where style_weight is 0, got 0")
        if self.network not in vgg.NETWORKS:
            raise ValueError(f"network: expected one of {', '.join(vgg.NETWORKS)}, got {self.network!r}")
        if isinstance(self.style_layers, str) or not self.style_layers:
            raise ValueError(f"style_layers: expected names of layers, got {self.style_layers!r}")
        object.__setattr__(self, "style_layers", tuple(self.style_layers))
        self.layers  # noqa: B018, which raises for layers that there are not

    @property
    def layers(self) -> tuple[int, tuple[int, ...]]:
        """Numbers of the content layer and of the style layers."""
        content = vgg.layer_number("content_layer", self.content_layer, self.network)
        return content, tuple(vgg.layer_number("style_layers", one, self.network) for one in self.style_layers)

    @property
    def convolutions(self) -> int:
        """How many of the network's are looked at."""
        content, styles = self.layers
        return max(content, *styles) + 1


class Styling:
    """f of a picture: the function of neural-art problems whose pictures are of one size, style and weights.

    f = height * width * (content * C + style * S + smoothness * R): a sum over pixels, so that the gradient of a
    coordinate does not depend on the picture's size. C and S are shares of the targets' squares, R a mean square.

    Args:
        weights: of the terms.
        features: of the network, as many layers as `weights` looks at.
        grams: Gram matrices that the style layers are to have.
        height, width: of the picture.
    """

    def __init__(
        self, weights: Weights, features: vgg.Features, grams: Sequence[Tensor], height: int, width: int
    ) -> None:
        self.weights, self.height, self.width = weights, height, width
        self._features, self._grams = features, list(grams)
        self._content, self._styles = weights.layers

    def __call__(self, theta: Tensor, target: Tensor, square: Tensor) -> Tensor:
        return self.height * self.width * torch.stack(self.terms(theta, target, square)).sum()

    def terms(self, theta: Tensor, target: Tensor, square: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The three terms a pixel, with their weights: content, style, smoothness.

        Args:
            theta: coordinates [3 * height * width].
            target, square: what `target` gave.
        """
        seen = self._features(to_pixels(theta, self.height, self.width))
        content = (seen[self._content] - target).square().sum() / square
        errors = [
            (gram(seen[layer]) - wanted).square().sum() / _sum_of_squares(wanted)
            for layer, wanted in zip(self._styles, self._grams, strict=True)
        ]
        image = theta.view(3, self.height, self.width)
        variation = image.diff(dim=1).square().mean() + image.diff(dim=2).square().mean()
        return (
            self.weights.content * content,
            self.weights.style * torch.stack(errors).mean(),
            self.weights.smoothness * variation,
        )

    @torch.no_grad()
    def target(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """What the content layer is to be like, from pixels [3, height, width] in [0, 1]; and its sum of squares."""
        target = self._features(pixels)[self._content]
        return target, _sum_of_squares(target)


def gram(features: Tensor) -> Tensor:
    """Mean over all places of the products of features [channels, height, width]: [channels, channels]."""
    flat = features.flatten(1)
    return flat @ flat.mT / flat.shape[1]


def _sum_of_squares(tensor: Tensor) -> Tensor:
    return tensor.square().sum().clamp(min=torch.finfo(tensor.dtype).tiny)


@torch.no_grad()
def style_targets(
    weights: Weights, features: vgg.Features, styles: Sequence[Tensor], shares: Sequence[float]
) -> list[Tensor]:
    """Gram matrices of pictures [3, height, width] in [0, 1] by style layer; of several the mean, by their shares."""
    mixed: list[Tensor] = []
    for pixels, share in zip(styles, shares, strict=True):
        seen = features(pixels)
        grams = [share / sum(shares) * gram(seen[layer]) for layer in weights.layers[1]]
        mixed = grams if not mixed else [a + b for a, b in zip(mixed, grams, strict=True)]
    return mixed


class ArtProblem(PureProblem):
    """One picture to be painted.

    Args:
        function: what it is judged by.
        content: the photograph, pixels [3, height, width] in [0, 1], of the function's size.
        theta0: the start, [3 * height * width].

    Attributes:
        content: as above.
    """

    task = "neural-art"

    def __init__(self, function: Styling, content: Tensor, theta0: Tensor) -> None:
        self.function: Styling = function
        self.content, self.theta0, self.constants = content, theta0, function.target(content)

    def terms(self, theta: Tensor) -> list[float]:
        """Content, style and smoothness a pixel, with their weights, at theta."""
        with torch.no_grad():
            return [term.item() for term in self.function.terms(theta, *self.constants)]

    def pixels(self, theta: Tensor) -> Tensor:
        """The picture at theta: [3, height, width] in [0, 1]."""
        return to_pixels(theta.detach(), self.function.height, self.function.width).clamp(0, 1)


def noise(seed: int, height: int, width: int, dtype: torch.dtype, device: torch.device | str) -> Tensor:
    """White noise to start from: coordinates [3 * height * width]."""
    return normal(generator(seed, "noise"), (3 * height * width,), _NOISE, dtype, device)


@dataclass(frozen=True)
class NeuralArt(Task):
    """f(picture) = alpha L_content + beta L_style + gamma L_reg, over the pixels of a square picture.

    A problem has one photograph, or a crop of it, and begins from white noise; theta [3 * size * size] holds its
    pixels by channel, 0.45 + 0.25 theta each. `Styling` says what f is; its targets are computed once a problem, those
    of style once a task. Problems of a task differ in numbers alone, so that pictures go side by side
    (`tasks.batch`).

    Args:
        content: a folder of photographs, a file or several; by default the folder images/content in FASTL2L_DATA.
        style: the picture whose style is wanted, or several: files, or names of files in images/style there.
        size: pixels of a side; at least 16.
        content_weight, style_weight, smoothness: of the three terms, see `Weights`.
        style_shares: of several styles; by default all alike.
        split: "train" (three quarters), "validation" (a tenth), "test" (the rest) or "all" of the photographs. Each
            is in one of them by what it holds. By default "train" of a folder, "all" of files.
        crops: whether a photograph is cropped (a square of 0.6 to 1 of the shorter side, anywhere) and turned over at
            random, which makes many of few; else it is the square in its middle.
        start: "noise" or "content".
        network: "vgg16" or "vgg19", with torchvision's weights.
        content_layer, style_layers: of the network, such as "relu3_1".
        dtype, device: of theta and the network.

    Raises:
        TypeError, ValueError: an argument is not as above, or there is no picture in the split.
        FileNotFoundError, ImportError: there is no such picture, or no weights of the network (see `vgg.load`).
    """

    content: str | os.PathLike[str] | Sequence[str | os.PathLike[str]] | None = None
    style: str | os.PathLike[str] | Sequence[str | os.PathLike[str]] = "starry-night"
    size: int = 64
    content_weight: float = Weights.content
    style_weight: float = Weights.style
    smoothness: float = Weights.smoothness
    style_shares: Sequence[float] = ()
    split: str | None = None
    crops: bool = True
    start: str = "noise"
    network: str = Weights.network
    content_layer: str = Weights.content_layer
    style_layers: Sequence[str] = Weights.style_layers
    dtype: torch.dtype = torch.float32
    device: torch.device | str = "cpu"
    name = "neural-art"

    def __post_init__(self) -> None:
        integer("size", self.size, least=LEAST_SIZE)
        floating("dtype", self.dtype)
        content = data_folder() / "images" / "content" if self.content is None else self.content
        object.__setattr__(self, "content", _names("content", content))
        object.__setattr__(self, "style", tuple(str(_style(one)) for one in _names("style", self.style)))
        object.__setattr__(self, "style_shares", shares("style_shares", self.style_shares, len(self.style)))  # type: ignore[arg-type]
        object.__setattr__(self, "style_layers", self.weights.style_layers)
        if self.split is None:
            folder = len(self.content) == 1 and Path(self.content[0]).is_dir()  # type: ignore[arg-type, index]
            object.__setattr__(self, "split", "train" if folder else "all")
        if self.split not in SPLITS:
            raise ValueError(f"split: expected one of {', '.join(SPLITS)}, got {self.split!r}")
        if self.start not in STARTS:
            raise ValueError(f"start: expected one of {', '.join(STARTS)}, got {self.start!r}")
        self.photographs  # noqa: B018, which raises where there is none

    @cached_property
    def weights(self) -> Weights:
        """Of the terms, and the layers that they look at."""
        terms = self.content_weight, self.style_weight, self.smoothness
        return Weights(*terms, self.content_layer, self.style_layers, self.network)

    @cached_property
    def photographs(self) -> dict[Path, str]:
        """The split's files, with a digest of what each holds."""
        return _split("content", self.content, str(self.split))  # type: ignore[arg-type]

    @cached_property
    def function(self) -> Styling:
        """What all pictures are judged by."""
        features = vgg.load(self.weights.network, self.weights.convolutions, self.dtype, torch.device(self.device))
        styles = [self._pixels(images.square(images.read("style", one), self.size)) for one in self.style]  # type: ignore[union-attr]
        grams = style_targets(self.weights, features, styles, self.style_shares)
        return Styling(self.weights, features, grams, self.size, self.size)

    def sample(self, seed: int) -> ArtProblem:
        random = generator(seed, "content")
        names = list(self.photographs)
        photograph = self._photograph(names[random.integers(len(names))])
        side, left, top, turned = random.uniform((_SMALLEST_CROP, 0, 0, 0), 1)
        if self.crops:
            photograph = images.square(photograph, self.size, left=left, top=top, side=side)
            photograph = ImageOps.mirror(photograph) if turned < 0.5 else photograph
        else:
            photograph = images.square(photograph, self.size)
        content = self._pixels(photograph)
        if self.start == "content":
            return ArtProblem(self.function, content, to_theta(content))
        return ArtProblem(self.function, content, noise(seed, self.size, self.size, self.dtype, self.device))

    def validation(self) -> NeuralArt:
        """The photographs that validation has to itself, if this is the training split."""
        return replace(self, split="validation") if self.split == "train" else self

    def spec(self) -> dict[str, Any]:
        """As `Task` says, with digests of the pictures in place of where they are."""
        content = hashlib.blake2b("".join(sorted(self.photographs.values())).encode(), digest_size=16).hexdigest()
        return super().spec() | {"content": content, "style": [digest(Path(one)) for one in self.style]}  # type: ignore[union-attr]

    @cached_property
    def _held(self) -> dict[Path, Image.Image]:
        return {}

    def _photograph(self, path: Path) -> Image.Image:
        """Kept no larger than crops of it can use."""
        if path not in self._held:
            photograph, most = images.read("content", path), math.ceil(2 * self.size / _SMALLEST_CROP)
            if min(photograph.size) > most:
                photograph = images.fitted(photograph, round(most * max(photograph.size) / min(photograph.size)))
            self._held[path] = photograph
        return self._held[path]

    def _pixels(self, picture: Image.Image) -> Tensor:
        return images.tensor(picture).to(self.device, self.dtype)


def weight_at_least_0(name: str, value: object) -> float:
    """`value` as a float, or a ValueError."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < math.inf:
        raise ValueError(f"{name}: expected a finite number >= 0, got {value!r}")
    return float(value)


def shares(name: str, given: Sequence[float], count: int) -> tuple[float, ...]:
    """Weights of `count` styles: `given`, or all alike if there are none."""
    found = tuple(weight_at_least_0(name, share) for share in given) or (1.0,) * count
    if len(found) != count or not any(found):
        raise ValueError(f"{name}: expected a weight for each of {count} styles, not all 0, got {given!r}")
    return found


def _names(name: str, given: object) -> tuple[str, ...]:
    one = isinstance(given, (str, os.PathLike))
    names: list[Any] = [given] if one else list(given)  # type: ignore[call-overload]
    if not names or not all(isinstance(path, (str, os.PathLike)) for path in names):
        raise TypeError(f"{name}: expected a path or several, got {given!r}")
    return tuple(os.fspath(path) for path in names)


def _style(name: str) -> Path:
    """A file, or one in images/style of the data folder, which is named without its suffix."""
    folder = data_folder() / "images" / "style"
    named = [path for path in sorted(folder.glob("*")) if name in (path.name, path.stem)]
    if Path(name).exists() or not named:
        if not Path(name).is_file():
            raise FileNotFoundError(f"style: expected a picture, or the name of one in {folder}, got {name!r}")
        return Path(name)
    return named[0]


def _split(name: str, content: Sequence[str], split: str) -> dict[Path, str]:
    files: list[Path] = []
    for path in map(Path, content):
        if not path.exists():
            raise FileNotFoundError(f"{name}: expected photographs, got {path}, which does not exist")
        found = sorted(path.iterdir()) if path.is_dir() else [path]
        files += [file for file in found if file == path or file.suffix.lower() in _SUFFIXES]
    digests = {file: digest(file) for file in files}
    chosen = {file: known for file, known in digests.items() if split == "all" or _bucket(known) in _BUCKETS[split]}
    if not chosen:
        where = ", ".join(map(str, content))
        cure = "; more photographs would reach it, or split='all'" * bool(files)
        raise ValueError(
            f"{name}: expected photographs of which some are of split {split!r}, got none of the "
            f"{len(files)} in {where}{cure}"
        )
    return chosen


def _bucket(known: str) -> int:
    return int(known[:8], 16) % 20
