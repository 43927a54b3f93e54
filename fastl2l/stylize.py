"""Photographs painted in the style of pictures, by any optimizer: what `fastl2l stylize` does."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from fastl2l import baselines, images
from fastl2l.evaluate import Build, builder
from fastl2l.optim import FusedLSTMOptimizer
from fastl2l.progress import Progress
from fastl2l.rule_files import load_rule, shipped
from fastl2l.rules import Rule
from fastl2l.tasks import neural_art, vgg
from fastl2l.tasks.base import integer
from fastl2l.tasks.neural_art import ArtProblem, Styling, Weights

PREFERRED = ("lstm-neural-art", "adam")
"""Optimizers that are taken where none is named: the first that there is."""
FRAMES = ("images", "strip", "gif")
"""What is made of the pictures on the way."""
RATES = {"adam": 0.2, "lbfgs": 1.0}
"""Learning rates of the optimizers that are no rules: Adam's is the best of a few at 64 x 64 and 128 steps."""
_ON_A_STRIP = 64
"""Pictures that one has at most."""


def default_optimizer() -> str:
    """The one that is taken where none is named."""
    return next(name for name in PREFERRED if name in RATES or name in shipped())


@dataclass(frozen=True)
class Painting:
    """What is to be painted, and how.

    Args:
        content: the photograph's file.
        styles: files of the pictures whose style it is to have.
        out: the file to write: .png, .jpg or .webp.
        size: pixels of the longer side.
        steps: optimization steps at each size.
        optimizer: the name of a shipped rule, a rule file, "adam" or "lbfgs"; of the last, steps are evaluations.
        beside: another optimizer, whose picture is put beside.
        lr: factor on a rule's updates, or learning rate of Adam; by default 1, or 0.2. Of `optimizer` alone.
        weights: of the terms, and the layers that they look at.
        style_shares: weights of the styles; by default all alike.
        start: "noise", or "content" for the photograph.
        keep_colours: whether the photograph's colours are kept, and only brightness is painted.
        seed: of the noise.
        levels: sizes from coarse to fine, each twice the one before, which is where it starts.
        save_every: keep the picture after so many steps, each time; 0 for never.
        frames: what is made of those: "images", a "strip", or a "gif".
        device: where to compute.

    Raises:
        TypeError, ValueError: an argument is not as above.
        FileNotFoundError: there is no such picture or rule.
    """

    content: Path
    styles: Sequence[Path]
    out: Path
    size: int = 256
    steps: int = 128
    optimizer: str = field(default_factory=default_optimizer)
    beside: str | None = None
    lr: float | None = None
    weights: Weights = field(default_factory=Weights)
    style_shares: Sequence[float] = ()
    start: str = "noise"
    keep_colours: bool = False
    seed: int = 0
    levels: int = 1
    save_every: int = 0
    frames: str = "images"
    device: str = "cpu"

    def __post_init__(self) -> None:
        integer("size", self.size, least=neural_art.LEAST_SIZE)
        integer("steps", self.steps)
        integer("seed", self.seed, least=0)
        if integer("levels", self.levels) > 1 and self.size >> (self.levels - 1) < neural_art.LEAST_SIZE:
            raise ValueError(
                f"levels: expected so few that the coarsest size is at least {neural_art.LEAST_SIZE}, got "
                f"{self.levels} of size {self.size}"
            )
        integer("save_every", self.save_every, least=0)
        pictures = self.levels * self.steps // self.save_every if self.save_every else 0
        if self.frames == "strip" and pictures > _ON_A_STRIP:
            raise ValueError(
                f"save_every: expected so many steps that at most {_ON_A_STRIP} pictures are on a strip, got {pictures}"
            )
        if self.frames not in FRAMES:
            raise ValueError(f"frames: expected one of {', '.join(FRAMES)}, got {self.frames!r}")
        if self.start not in neural_art.STARTS:
            raise ValueError(f"start: expected one of {', '.join(neural_art.STARTS)}, got {self.start!r}")
        if not self.styles:
            raise ValueError("style: expected at least one picture, got none")
        kept = neural_art.shares("style_shares", self.style_shares, len(self.styles))
        object.__setattr__(self, "style_shares", kept)
        if self.lr is not None and not 0 < self.lr < math.inf:
            raise ValueError(f"lr: expected a finite number > 0, got {self.lr}")
        if self.beside == self.optimizer:
            raise ValueError(f"beside: expected another optimizer than {self.optimizer}, got it twice")
        _check_device(self.device)
        images.check_output("out", self.out)
        for path in (self.content, *self.styles):
            if self.out.exists() and Path(path).exists() and self.out.samefile(path):
                raise ValueError(f"out: expected another file than the pictures that are read, got {self.out}")

    @property
    def optimizers(self) -> list[str]:
        """One or two."""
        return [self.optimizer, *([self.beside] if self.beside is not None else [])]

    @property
    def sizes(self) -> list[int]:
        """From the coarsest to the finest."""
        return [self.size >> level for level in reversed(range(self.levels))]


@dataclass
class Painted:
    """What came of it.

    Attributes:
        files: that were written, in their order; the first is `Painting.out`.
        losses: by optimizer, the lowest f a pixel that its picture has, and its terms: content, style, smoothness.
        steps: by optimizer, how many it took in all, which are fewer where it was interrupted.
        interrupted: whether it was.
    """

    files: list[Path]
    losses: dict[str, tuple[float, list[float]]]
    steps: dict[str, int]
    interrupted: bool = False


@dataclass
class Studio:
    """All that is needed to paint, read and checked: what can be wrong shows before minutes are spent.

    Args:
        painting: what is to be painted.

    Raises:
        as `Painting`; ImportError, FileNotFoundError, ValueError: of pictures, rules and the network's weights.
        MemoryError: there is less memory than it takes. The message says how much both are.
    """

    painting: Painting

    def __post_init__(self) -> None:
        painting = self.painting
        self._builds = {
            name: _build(what, name, painting.lr if what == "optimizer" else None, painting.device)
            for what, name in zip(("optimizer", "beside"), painting.optimizers, strict=False)
        }
        self.content = images.read("content", painting.content)
        self._styles = [images.read("style", path) for path in painting.styles]
        width, height = images.fitted_size(self.content, painting.size)
        _check_depth(painting, width, height)
        most = max(build.rows for build in self._builds.values())
        self.memory = needed_memory(painting.weights, height, width, most)
        available = available_memory(torch.device(painting.device))
        if available is not None and self.memory > available:
            raise MemoryError(
                f"size: expected one that fits the {_gigabytes(available)} of memory that are free, got "
                f"{painting.size}, for about {_gigabytes(self.memory)}; a smaller size needs less, by its square"
            )
        self._features = vgg.load(
            painting.weights.network, painting.weights.convolutions, torch.float32, torch.device(painting.device)
        )

    def describe(self) -> str:
        """What is about to be done, in a line."""
        width, height = images.fitted_size(self.content, self.painting.size)
        with_ = " and ".join(self._builds)
        return (
            f"{width} x {height} pixels, {3 * width * height:,} coordinates, {self.painting.steps} steps with {with_}; "
            f"about {_gigabytes(self.memory)} of memory"
        )

    def problem(self, size: int) -> ArtProblem:
        """The picture to be painted, `size` pixels along its longer side."""
        painting = self.painting
        content = self._pixels(images.fitted(self.content, size))
        styles = [self._pixels(images.fitted(style, size)) for style in self._styles]
        grams = neural_art.style_targets(painting.weights, self._features, styles, painting.style_shares)
        _, height, width = content.shape
        function = Styling(painting.weights, self._features, grams, height, width)
        if painting.start == "content":
            return ArtProblem(function, content, neural_art.to_theta(content))
        noise = neural_art.noise(painting.seed, height, width, torch.float32, painting.device)
        return ArtProblem(function, content, noise)

    def paint(self, *, progress: bool = True) -> Painted:
        """Paint, and write all files. What is interrupted (KeyboardInterrupt) leaves the best picture so far.

        Raises:
            ValueError: the loss is not finite from the first step on.
            OSError: a file cannot be written.
        """
        painting = self.painting
        problems = [self.problem(size) for size in painting.sizes]
        total = len(self._builds) * len(problems) * (painting.steps + 1)
        easels: dict[str, _Easel] = {}
        interrupted = False
        try:
            with Progress("painting", total, shown=progress) as shown:
                for name, build in self._builds.items():
                    easels[name] = _Easel(painting, problems, build, name, shown)
                    easels[name].paint()
        except KeyboardInterrupt:
            if all(easel.best is None for easel in easels.values()):
                raise
            interrupted = True
        easels = {name: easel for name, easel in easels.items() if easel.best is not None}
        files = self._write(easels)
        losses = {name: (easel.loss, easel.terms()) for name, easel in easels.items()}
        return Painted(files, losses, {name: easel.steps for name, easel in easels.items()}, interrupted)

    def _write(self, easels: dict[str, _Easel]) -> list[Path]:
        painting, out = self.painting, self.painting.out
        files = []
        for name, easel in easels.items():
            place = out if name == painting.optimizer else _beside(out, Path(name).stem)
            files += [images.write(place, easel.picture()), *easel.write_frames(place)]
        if len(easels) > 1:
            first = images.picture(easels[painting.optimizer].problem.content)
            shown = [first, *(self._fit(style, first) for style in self._styles[:1])]
            captions = [
                "content",
                "style",
                *(f"{Path(name).stem} {easel.loss:.4g}" for name, easel in easels.items()),
            ]
            pictures = [easel.picture() for easel in easels.values()]
            files.append(images.write(_beside(out, "beside"), images.sheet([[*shown, *pictures]], captions)))
        return files

    @staticmethod
    def _fit(style: Image.Image, like: Image.Image) -> Image.Image:
        return images.fitted(style, max(like.size))

    def _pixels(self, picture: Image.Image) -> Tensor:
        return images.tensor(picture).to(self.painting.device)


@dataclass
class _Easel:
    """One optimizer's picture on its way from coarse to fine."""

    painting: Painting
    problems: Sequence[ArtProblem]
    build: _Build
    name: str
    shown: Progress
    best: Tensor | None = None
    loss: float = math.inf
    steps: int = 0
    problem: ArtProblem = field(init=False)
    _kept: dict[int, Image.Image] = field(default_factory=dict)

    def paint(self) -> None:
        start: Tensor | None = None
        for number, problem in enumerate(self.problems):
            if number:
                assert self.best is not None
                start = _finer(self.best, self.problem, problem)
            self.problem, self.best, self.loss = problem, start if number else None, math.inf
            self.steps -= 1  # the first evaluation of each size is before its first step
            baselines.evaluations(problem, self.build.build, self.painting.steps + 1, self._visit, start)
            if self.best is None:
                raise ValueError(
                    f"optimizer: expected one whose loss is finite, got {self.name}, whose is not; try a smaller lr"
                )

    def _visit(self, loss: Tensor, theta: Tensor) -> None:
        self.steps += 1
        value = loss.item() / (theta.numel() // 3)
        if value < self.loss:
            self.loss, self.best = value, theta.detach().clone()
        every = self.painting.save_every
        if every and self.steps and self.steps % every == 0:
            self._kept[self.steps] = self.picture()
        self.shown.advance(f"{Path(self.name).stem}: loss {value:.4g}, best {self.loss:.4g}")

    def picture(self) -> Image.Image:
        """The best so far."""
        assert self.best is not None
        pixels = self.problem.pixels(self.best)
        if self.painting.keep_colours:
            pixels = images.with_colours_of(pixels, self.problem.content)
        return images.picture(pixels)

    def terms(self) -> list[float]:
        assert self.best is not None
        return self.problem.terms(self.best)

    def write_frames(self, place: Path) -> list[Path]:
        """The pictures on the way, beside the last one."""
        if not self._kept:
            return []
        if self.painting.frames == "images":
            return [images.write(_beside(place, f"{step:04d}"), shown) for step, shown in self._kept.items()]
        size = self.picture().size
        frames = [one.resize(size, Image.Resampling.BICUBIC) for one in self._kept.values()]
        if self.painting.frames == "gif":
            return [
                images.write_gif(place.with_suffix(".gif"), frames + [self.picture()] * (self.steps not in self._kept))
            ]
        captions = [f"step {step}" for step in self._kept]
        return [images.write(_beside(place, "strip"), images.sheet([frames], captions))]


def _check_device(device: str) -> None:
    try:
        kind = torch.device(device).type
    except RuntimeError:
        kind = ""
    if kind not in ("cpu", "cuda") or (kind == "cuda" and not torch.cuda.is_available()):
        known = "cpu or cuda" if torch.cuda.is_available() else "cpu, as torch finds no GPU here"
        raise ValueError(f"device: expected {known}, got {device!r}")


def _check_depth(painting: Painting, width: int, height: int) -> None:
    """That the deepest features have a place to be."""
    halvings = vgg.block_of(painting.weights.convolutions - 1, painting.weights.network)
    if min(width, height) >> (halvings + painting.levels - 1) == 0:
        raise ValueError(
            f"size: expected a shorter side of at least {1 << (halvings + painting.levels - 1)} pixels, got {width} x "
            f"{height} of {painting.content}; crop the photograph, or name a larger size or fewer levels"
        )


def _beside(path: Path, what: str) -> Path:
    return path.with_name(f"{path.stem}-{what}{path.suffix}")


def _finer(theta: Tensor, coarse: ArtProblem, fine: ArtProblem) -> Tensor:
    """The picture in more pixels."""
    small = theta.view(1, 3, coarse.function.height, coarse.function.width)
    size = fine.function.height, fine.function.width
    return F.interpolate(small, size, mode="bicubic", align_corners=False).flatten().contiguous()


# Optimizers


@dataclass(frozen=True)
class _Build:
    build: Build
    rows: int
    """Numbers that it keeps of a coordinate."""


def _build(what: str, name: str, lr: float | None, device: str) -> _Build:
    if name in RATES:
        baseline = baselines.by_name(name, lr or RATES[name])
        return _Build(baseline.build, 2 if name == "adam" else 2 * int(baselines.LBFGS.options["history_size"]) + 8)
    rule = _rule(what, name).to(device)
    if lr is None:
        return _Build(builder(what, rule), rule.config.state_rows)
    return _Build(lambda params: FusedLSTMOptimizer(params, rule, lr=lr, nonfinite="propagate"), rule.config.state_rows)


def _rule(what: str, name: str) -> Rule:
    known = f"{', '.join(RATES)}, a rule that comes with fastl2l ({', '.join(shipped())}) or a rule file"
    if not Path(name).exists() and name not in shipped():
        raise ValueError(f"{what}: expected {known}, got {name!r}")
    rule: Any = load_rule(name)
    if not isinstance(rule, Rule):
        raise ValueError(f"{what}: expected one rule, got {name!r}, which has one for each of {', '.join(rule)}")
    if rule.dtype != torch.float32:
        raise ValueError(f"{what}: expected a rule in float32, got {name!r} in {rule.dtype}")
    rule.check_alone()
    return rule


# Memory

_NETWORK = 6e8
"""Bytes of Python, torch, the network and what its convolutions work in."""
_ACTIVATIONS = 2.6
"""Bytes that go to and fro for each byte of features that autograd keeps."""


def needed_memory(weights: Weights, height: int, width: int, rows: int) -> int:
    """Bytes that a painting takes at its largest, about: features and their gradients, and what an optimizer keeps.

    Args:
        weights: say which layers of the network are looked at.
        height, width: of the picture.
        rows: numbers of 4 bytes that the optimizer keeps of a coordinate.
    """
    features = sum(
        vgg.channels(number, weights.network) / 4 ** vgg.block_of(number, weights.network)
        for number in range(weights.convolutions)
    )
    return round(_NETWORK + 4 * height * width * (_ACTIVATIONS * features + 3 * (rows + 8)))


def available_memory(device: torch.device) -> int | None:
    """Bytes that are free; None where the system does not say."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        found = [1024 * int(_meminfo()["MemAvailable"].split()[0])]
    except (OSError, KeyError, ValueError):
        return None
    for folder, largest, used in (  # of a container: version 2 and 1
        ("/sys/fs/cgroup", "memory.max", "memory.current"),
        ("/sys/fs/cgroup/memory", "memory.limit_in_bytes", "memory.usage_in_bytes"),
    ):
        try:
            limit, usage = (int(Path(folder, name).read_text()) for name in (largest, used))
        except (OSError, ValueError):  # no container, or one without a limit
            continue
        found.append(max(0, limit - usage + _reclaimable(Path(folder, "memory.stat"))))
    return min(found)


def _reclaimable(stat: Path) -> int:
    """Bytes of files that a container's usage counts and that are given up when memory is wanted."""
    try:
        return sum(int(line.split()[1]) for line in stat.read_text().splitlines() if line.startswith("inactive_file "))
    except (OSError, ValueError, IndexError):
        return 0


def _meminfo() -> dict[str, str]:
    lines = Path("/proc/meminfo").read_text().splitlines()
    return {name: value for name, _, value in (line.partition(":") for line in lines)}


def _gigabytes(number: float) -> str:
    return f"{number / 1e9:.2g} GB"


def stylize(
    painting: Painting, *, before: Callable[[str], object] = lambda text: None, progress: bool = True
) -> Painted:
    """Paint a picture; `before` is told what is about to be done, once all has been checked. Raises as `Studio`."""
    studio = Studio(painting)
    before(studio.describe())
    return studio.paint(progress=progress)
