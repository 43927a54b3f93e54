"""Networks of many kinds on small data: a training ground for rules that are to be taken to networks of other people.

Nothing here is one of the papers' problems. Each network, its data and its start are drawn anew, small enough that a
step takes less than a millisecond: images are scikit-learn's digits (8 x 8), all else is made of random numbers.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastl2l.tasks.base import Minibatches, Problem, Task, generator, problem_seed
from fastl2l.tasks.custom import Loss, ModuleFunction, ModuleProblem, defaults, seeded
from fastl2l.tasks.datasets import load


class Sampled(NamedTuple):
    """A network that was drawn, its loss and its data: inputs and, last, targets [n, ...]."""

    module: nn.Module
    loss: Loss
    data: list[Tensor]


class Random:
    """Random numbers as networks are described by them."""

    def __init__(self, random: np.random.Generator) -> None:
        self.numpy = random

    def between(self, low: float, high: float) -> float:
        """Log-uniform."""
        return math.exp(self.numpy.uniform(math.log(low), math.log(high)))

    def whole(self, low: int, high: int) -> int:
        """Log-uniform, both ends included."""
        return round(self.between(low - 0.49, high + 0.49))

    def one(self, *choices: object) -> object:
        return choices[self.numpy.integers(len(choices))]

    def chance(self, probability: float) -> bool:
        return bool(self.numpy.random() < probability)

    def normal(self, *shape: int) -> Tensor:
        return torch.from_numpy(self.numpy.standard_normal(shape)).float()


# Networks


def activation(random: Random) -> nn.Module:
    return random.one(nn.ReLU, nn.ReLU, nn.Tanh, nn.Sigmoid, nn.GELU, nn.ELU, nn.SiLU, nn.LeakyReLU)()  # type: ignore


class Residual(nn.Module):
    """x + f(x)."""

    def __init__(self, *layers: nn.Module) -> None:
        super().__init__()
        self.layers = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.layers(x)


def mlp(random: Random, inputs: int, outputs: int, *, widest: int = 32) -> nn.Sequential:
    """A perceptron: none to four hidden layers, now and then eight; some have norms, some are residual."""
    units, function, layers = random.whole(5, widest), activation(random), list[nn.Module]()
    norm = random.one(*[nn.Identity] * 6, nn.LayerNorm, nn.BatchNorm1d)
    if random.chance(0.1):
        blocks = (
            Residual(nn.LayerNorm(units), nn.Linear(units, 2 * units), function, nn.Linear(2 * units, units))
            for _ in range(random.whole(1, 3))
        )
        return nn.Sequential(nn.Linear(inputs, units), *blocks, nn.LayerNorm(units), nn.Linear(units, outputs))
    depth = random.whole(5, 8) if random.chance(0.1) else random.whole(1, 4) - random.chance(0.15)
    for _ in range(depth):
        layers += [nn.Linear(inputs, units), *([] if norm is nn.Identity else [norm(units)]), function]  # type: ignore
        inputs = units
    return nn.Sequential(*layers, nn.Linear(inputs, outputs))


class Recurrent(nn.Module):
    """The last output of an RNN, GRU or LSTM over [batch, steps, inputs]."""

    def __init__(self, kind: Callable[..., nn.Module], inputs: int, units: int, outputs: int) -> None:
        super().__init__()
        self.recurrent = kind(inputs, units, batch_first=True)
        self.head = nn.Linear(units, outputs)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.recurrent(x)[0][:, -1])


class Attention(nn.Module):
    """A small transformer over [batch, tokens, inputs], its mean over the tokens read out."""

    def __init__(self, inputs: int, tokens: int, width: int, layers: int, outputs: int, *, norm_first: bool) -> None:
        super().__init__()
        self.embed, self.position = nn.Linear(inputs, width), nn.Parameter(0.02 * torch.randn(tokens, width))
        options: dict[str, Any] = {"dropout": 0.0, "batch_first": True, "norm_first": norm_first}
        blocks = (nn.TransformerEncoderLayer(width, 2, 2 * width, **options) for _ in range(layers))
        self.blocks, self.head = nn.Sequential(*blocks), nn.Linear(width, outputs)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.blocks(self.embed(x) + self.position).mean(1))


class Language(nn.Module):
    """The next symbol at each place of [batch, places], by a recurrent layer or a causal transformer."""

    def __init__(self, symbols: int, places: int, width: int, kind: Callable[..., nn.Module] | None) -> None:
        super().__init__()
        self.embed, self.head, self.recurrent = nn.Embedding(symbols, width), nn.Linear(width, symbols), None
        if kind is not None:
            self.recurrent = kind(width, width, batch_first=True)
            return
        self.place = nn.Parameter(0.1 * torch.randn(places, width))
        self.block = nn.TransformerEncoderLayer(width, 2, 2 * width, 0.0, batch_first=True, norm_first=True)
        self.register_buffer("mask", nn.Transformer.generate_square_subsequent_mask(places))

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        x = self.block(x + self.place, src_mask=self.mask) if self.recurrent is None else self.recurrent(x)[0]
        return self.head(x).transpose(1, 2)


class Waves(nn.Module):
    """Sines and cosines of the inputs at random frequencies, which are not trained."""

    frequencies: Tensor

    def __init__(self, inputs: int, frequencies: int) -> None:
        super().__init__()
        self.register_buffer("frequencies", 4 * torch.randn(inputs, frequencies))

    def forward(self, x: Tensor) -> Tensor:
        angles = x @ self.frequencies
        return torch.cat([angles.sin(), angles.cos()], -1)


class Symbols(nn.Module):
    """A perceptron on the embeddings of a few symbols [batch, symbols]."""

    def __init__(self, symbols: int, context: int, width: int, head: Callable[[int], nn.Module]) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(symbols, width), head(context * width)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.embed(x).flatten(1))


class Factors(nn.Module):
    """Products of the embeddings of two symbols [batch, 2], with a bias each."""

    def __init__(self, symbols: int, width: int) -> None:
        super().__init__()
        self.embed, self.bias = nn.Embedding(symbols, width), nn.Embedding(symbols, 1)

    def forward(self, x: Tensor) -> Tensor:
        one, other = self.embed(x).unbind(1)
        return (one * other).sum(-1) + self.bias(x).sum((1, 2))


# Problems


def _digits(random: Random, *, flat: bool = True) -> tuple[Tensor, Tensor]:
    """Images [n, 1, side, side] or [n, side^2] and labels: some of them, which can be learned by heart if they are few.

    The side is 8, or 16 for a fifth of the data. In half of the cases they are standardized (and, flat, permuted).
    """
    images, labels, _ = load("digits", "train")
    chosen = torch.from_numpy(random.numpy.permutation(len(labels))[: random.whole(100, len(labels))])
    images, labels = images[chosen], labels[chosen]
    if random.chance(0.2):
        images = F.interpolate(images, scale_factor=2, mode="bilinear")
    if flat:
        images = images.flatten(1)
    if random.chance(0.5):
        images = (images - images.mean(0)) / (images.std(0) + 0.1)
        if flat:
            images = images[:, torch.from_numpy(random.numpy.permutation(images.shape[1]))]
    return images, labels


def _classes(random: Random, labels: Tensor) -> tuple[Tensor, int]:
    """All ten digits, or fewer classes of them."""
    if random.chance(0.6):
        return labels, 10
    classes = random.whole(2, 5)
    return torch.from_numpy(random.numpy.integers(classes, size=10))[labels], classes


def _table(random: Random) -> tuple[Tensor, Tensor]:
    """Rows [n, 3 to 40], some of them sparse or correlated, and a teacher's standardized answers [n, 1 to 3]."""
    rows, columns, answers = random.whole(100, 2000), random.whole(3, 40), random.whole(1, 3)
    inputs = random.normal(rows, columns)
    if random.chance(0.5):
        inputs = inputs @ random.normal(columns, columns) / math.sqrt(columns)
    if random.chance(0.3):
        inputs = inputs.exp().clamp(max=20) if random.chance(0.5) else (inputs > 0.5).float()
    inputs = (inputs - inputs.mean(0)) / (inputs.std(0) + 1e-3)
    hidden = torch.tanh(inputs @ random.normal(columns, 16) * random.between(0.3, 3) / math.sqrt(columns))
    targets = hidden @ random.normal(16, answers)
    targets = (targets - targets.mean(0)) / targets.std(0)
    return inputs, targets + random.one(0.0, 0.1, 0.5) * random.normal(rows, answers)  # type: ignore[operator]


def image_mlp(random: Random) -> Sampled:
    images, labels = _digits(random)
    labels, classes = _classes(random, labels)
    widest = 32 if images.shape[1] == 64 else 16
    return Sampled(mlp(random, images.shape[1], classes, widest=widest), F.cross_entropy, [images, labels])


def image_cnn(random: Random) -> Sampled:
    images, labels = _digits(random, flat=False)
    labels, classes = _classes(random, labels)
    channels, function, norm = random.whole(3, 10), activation(random), random.chance(0.4)
    layers, side = list[nn.Module](), images.shape[-1]
    for before, after in ((1, channels), (channels, 2 * channels))[: random.whole(1, 2)]:
        layers += [nn.Conv2d(before, after, 3, padding=1), *[nn.BatchNorm2d(after)] * norm, function, nn.MaxPool2d(2)]
        side, last = side // 2, after
    head = nn.Linear(last * side**2, classes)
    return Sampled(nn.Sequential(*layers, nn.Flatten(), head), F.cross_entropy, [images, labels])


def autoencoder(random: Random) -> Sampled:
    images, _ = _digits(random)
    pixels, wide, narrow, function = images.shape[1], random.whole(8, 24), random.whole(2, 8), activation(random)
    sizes = [pixels, wide, narrow, wide, pixels] if random.chance(0.5) else [pixels, narrow, pixels]
    layers = [part for n_in, n_out in pairwise(sizes) for part in (nn.Linear(n_in, n_out), function)]
    return Sampled(nn.Sequential(*layers[:-1]), F.mse_loss, [images, images])


def table_regression(random: Random) -> Sampled:
    inputs, targets = _table(random)
    loss = random.one(F.mse_loss, F.mse_loss, F.smooth_l1_loss)
    return Sampled(mlp(random, inputs.shape[1], targets.shape[1]), loss, [inputs, targets])  # type: ignore[arg-type]


def table_classification(random: Random) -> Sampled:
    inputs, targets = _table(random)
    labels = (targets > 0).long() @ (2 ** torch.arange(targets.shape[1]))
    return Sampled(mlp(random, inputs.shape[1], 2 ** targets.shape[1]), F.cross_entropy, [inputs, labels])


def curve(random: Random) -> Sampled:
    """A sum of waves over one or two coordinates."""
    points, dimensions = random.whole(200, 2000), random.whole(1, 2)
    inputs = torch.from_numpy(random.numpy.uniform(-1, 1, (points, dimensions))).float()
    waves = inputs @ random.normal(dimensions, 6) * random.between(2, 8)
    targets = torch.sin(waves + 6 * random.normal(6)) @ random.normal(6, 1)
    frequencies = random.whole(8, 24)
    module = mlp(random, dimensions, 1)
    if random.chance(0.4):
        module = nn.Sequential(Waves(dimensions, frequencies), *mlp(random, 2 * frequencies, 1))
    return Sampled(module, F.mse_loss, [inputs, targets / targets.std()])


def sequence(random: Random) -> Sampled:
    """Digits read row by row."""
    images, labels = _digits(random, flat=False)
    labels, classes = _classes(random, labels)
    kind: Any = random.one(nn.RNN, nn.GRU, nn.LSTM)
    module = Recurrent(kind, images.shape[-1], random.whole(5, 16), classes)
    return Sampled(module, F.cross_entropy, [images.squeeze(1), labels])


def attention(random: Random) -> Sampled:
    """Digits whose rows are tokens."""
    images, labels = _digits(random, flat=False)
    labels, classes = _classes(random, labels)
    width, first = 2 * random.whole(3, 6), random.chance(0.5)
    module = Attention(images.shape[-1], images.shape[-1], width, random.whole(1, 2), classes, norm_first=first)
    return Sampled(module, F.cross_entropy, [images.squeeze(1), labels])


def _chain(random: Random, count: int, length: int) -> Tensor:
    """Symbols that follow upon each other with chances of their own."""
    chances = torch.softmax(random.normal(count, count) * random.between(1, 4), 1).cumsum(1)
    chain = [0]
    for draw in torch.from_numpy(random.numpy.random(length)).float():
        chain.append(min(count - 1, int(torch.searchsorted(chances[chain[-1]], draw))))
    return torch.tensor(chain)


def symbols(random: Random) -> Sampled:
    """The next symbol of a chain, from the last few."""
    count, context = random.whole(5, 30), random.whole(1, 4)
    windows = _chain(random, count, random.whole(300, 3000)).unfold(0, context + 1, 1)
    module = Symbols(count, context, random.whole(3, 12), lambda inputs: mlp(random, inputs, count, widest=16))
    return Sampled(module, F.cross_entropy, [windows[:, :-1].contiguous(), windows[:, -1].contiguous()])


def language(random: Random) -> Sampled:
    """The next symbol of a chain at each of several places."""
    count, places, width = random.whole(5, 30), random.whole(6, 16), 2 * random.whole(3, 8)
    windows = _chain(random, count, random.whole(300, 3000)).unfold(0, places + 1, 1)
    kind: Any = random.one(nn.RNN, nn.GRU, nn.GRU, nn.LSTM, None, None)
    module = Language(count, places, width, kind)
    return Sampled(module, F.cross_entropy, [windows[:, :-1].contiguous(), windows[:, 1:].contiguous()])


def factors(random: Random) -> Sampled:
    """A matrix of low rank from some of its entries."""
    count, rank, entries = random.whole(10, 200), random.whole(1, 4), random.whole(300, 10_000)
    matrix = random.normal(count, rank) @ random.normal(rank, count) / math.sqrt(rank)
    pairs = torch.from_numpy(random.numpy.integers(count, size=(entries, 2)))
    targets = matrix[pairs[:, 0], pairs[:, 1]] + 0.1 * random.normal(entries)
    return Sampled(Factors(count, random.whole(2, 8)), F.mse_loss, [pairs, targets])


KINDS: dict[str, tuple[float, Callable[[Random], Sampled]]] = {
    "image-mlp": (2.0, image_mlp),
    "image-cnn": (1.5, image_cnn),
    "autoencoder": (1.5, autoencoder),
    "table-regression": (2.0, table_regression),
    "table-classification": (2.0, table_classification),
    "curve": (1.5, curve),
    "sequence": (0.5, sequence),
    "attention": (0.4, attention),
    "symbols": (1.0, symbols),
    "language": (0.5, language),
    "factors": (1.5, factors),
}
"""By name, how often a kind comes, and what makes one. What takes long for a step comes less often."""


@dataclass(frozen=True)
class RandomNetworks(Task):
    """Small networks of many kinds, each drawn anew with its data, loss, start and minibatch size.

    Perceptrons, convolutional and recurrent networks, transformers, autoencoders, embeddings; on small digits, tables,
    curves, chains of symbols and matrices; some 50 to 5,000 coordinates, minibatches of 8 to 128. Half of them start as
    torch would have it, scaled by a factor from 1/2 to 2; the parameters of the others are iid N(0, s^2), s from .05 to
    .3. All that has a range is log-uniform in it.

    Args:
        kinds: some of `fastl2l.tasks.random_networks.KINDS`, by default all.

    Raises:
        TypeError, ValueError: a kind is not one of these.
    """

    kinds: Sequence[str] = tuple(KINDS)
    name = "random-networks"

    def __post_init__(self) -> None:
        if isinstance(self.kinds, str) or not isinstance(self.kinds, Sequence):
            raise TypeError(f"kinds: expected a sequence of {', '.join(KINDS)}, got {self.kinds!r}")
        if not self.kinds or any(kind not in KINDS for kind in self.kinds):
            raise ValueError(f"kinds: expected some of {', '.join(KINDS)}, got {', '.join(map(repr, self.kinds))}")
        object.__setattr__(self, "kinds", tuple(self.kinds))

    def sample(self, seed: int) -> Problem:
        random = Random(generator(seed, "random-networks"))
        weights = np.array([KINDS[kind][0] for kind in self.kinds])
        kind = self.kinds[random.numpy.choice(len(weights), p=weights / weights.sum())]
        cpu = torch.device("cpu")
        with (
            seeded(problem_seed(seed, "module", 0), cpu),
            defaults(cpu, torch.float32),
            torch.autocast("cpu", enabled=False),
        ):
            module, loss, data = KINDS[kind][1](random)
            _start(random, module)
        batch_size = min(random.whole(8, 128), len(data[0]))
        return ModuleProblem(
            f"{self.name}: {kind}", ModuleFunction(module, loss, data), Minibatches(seed, len(data[0]), batch_size)
        )


@torch.no_grad()
def _start(random: Random, module: nn.Module) -> None:
    """Norms stay as they are: networks whose norms are near 0 are nobody's."""
    factor, std = random.between(0.5, 2), random.between(0.05, 0.3)
    as_torch_has_it = random.chance(0.5)
    for part in module.modules():
        if not isinstance(part, (nn.LayerNorm, nn.modules.batchnorm._BatchNorm)):
            for parameter in part.parameters(recurse=False):
                parameter.copy_(factor * parameter if as_torch_has_it else std * random.normal(*parameter.shape))
