"""Problems of the kind that people bring: ordinary networks of torch.nn with torch's initialisation, each on its data.

All data come with scikit-learn or Python or are made of random numbers, except MNIST. No shipped rule was trained on
one of these networks, nor on their data but for MNIST's images (`rnnprop` and `lstm-mnist`). Networks are small, so
that 10,000 steps take seconds to half a minute of one core.
"""

from __future__ import annotations

import hashlib
import unicodedata
from collections.abc import Callable
from functools import cache, partial
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastl2l.tasks import Task, from_module
from fastl2l.tasks.datasets import load
from fastl2l.tasks.random_networks import Residual

Data = tuple[Tensor, Tensor]


# Networks


def mlp(units: tuple[int, ...], activation: Callable[[], nn.Module]) -> nn.Sequential:
    """A multi-layer perceptron, with `activation` after each hidden layer."""
    layers: list[nn.Module] = []
    for n_in, n_out in pairwise(units):
        layers += [nn.Linear(n_in, n_out), activation()]
    return nn.Sequential(*layers[:-1])


def batch_norm_network() -> nn.Sequential:
    """Two convolutions with batch norm, for images 14 x 14."""
    return nn.Sequential(
        nn.Conv2d(1, 8, 3, stride=2, bias=False),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Conv2d(8, 16, 3, stride=2, bias=False),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(16 * 2 * 2, 10),
    )


def convolutional_network() -> nn.Sequential:
    """Two convolutions with max pooling and two layers on top, for colour patches 10 x 10."""
    return nn.Sequential(
        nn.Conv2d(3, 8, 3),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(8, 16, 3),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(16 * 2 * 2, 16),
        nn.ReLU(),
        nn.Linear(16, 8),
    )


def residual_network() -> nn.Sequential:
    """Two residual blocks with layer norm, for colour patches 5 x 5."""
    blocks = (Residual(nn.LayerNorm(24), nn.Linear(24, 48), nn.GELU(), nn.Linear(48, 24)) for _ in range(2))
    return nn.Sequential(nn.Linear(75, 24), *blocks, nn.LayerNorm(24), nn.Linear(24, 8))


class FourierFeatures(nn.Module):
    """Sines and cosines of coordinates at random frequencies, which are not trained."""

    def __init__(self, inputs: int, frequencies: int) -> None:
        super().__init__()
        self.frequencies: Tensor
        self.register_buffer("frequencies", 3 * torch.randn(inputs, frequencies))

    def forward(self, x: Tensor) -> Tensor:
        angles = 2 * torch.pi * x @ self.frequencies
        return torch.cat([angles.sin(), angles.cos()], -1)


def coordinate_network() -> nn.Sequential:
    """From a place in an image to its colour."""
    return nn.Sequential(FourierFeatures(2, 24), *mlp((48, 48, 48, 3), nn.ReLU))


class Factorisation(nn.Module):
    """A matrix as a product of two thin ones and a bias for each row and column."""

    def __init__(self, rows: int, columns: int, rank: int) -> None:
        super().__init__()
        self.row, self.column = nn.Embedding(rows, rank), nn.Embedding(columns, rank)
        self.row_bias, self.column_bias = nn.Embedding(rows, 1), nn.Embedding(columns, 1)

    def forward(self, places: Tensor) -> Tensor:
        row, column = places.unbind(-1)
        biases = self.row_bias(row) + self.column_bias(column)
        return (self.row(row) * self.column(column)).sum(-1) + biases.squeeze(-1)


class Recurrent(nn.Module):
    """A recurrent layer, read out after every step."""

    def __init__(self, first: nn.Module, recurrent: nn.Module, last: nn.Module) -> None:
        super().__init__()
        self.first, self.recurrent, self.last = first, recurrent, last

    def forward(self, x: Tensor) -> Tensor:
        outputs, _ = self.recurrent(self.first(x))
        return self.last(outputs)


class Transformer(nn.Module):
    """A causal transformer on characters."""

    def __init__(self, characters: int, context: int, width: int, heads: int, layers: int) -> None:
        super().__init__()
        self.characters, self.places = nn.Embedding(characters, width), nn.Embedding(context, width)
        self.layers = nn.ModuleList(
            nn.TransformerEncoderLayer(width, heads, 2 * width, dropout=0.0, batch_first=True, norm_first=True)
            for _ in range(layers)
        )
        self.norm, self.last = nn.LayerNorm(width), nn.Linear(width, characters)
        self.register_buffer("mask", nn.Transformer.generate_square_subsequent_mask(context))

    def forward(self, x: Tensor) -> Tensor:
        x = self.characters(x) + self.places.weight
        for layer in self.layers:
            x = layer(x, src_mask=self.mask, is_causal=True)
        return self.last(self.norm(x))


def image_mlp() -> nn.Sequential:
    """A perceptron on images 28 x 28."""
    return nn.Sequential(nn.Flatten(), *mlp((784, 32, 10), nn.GELU))


def recurrent_forecaster() -> Recurrent:
    """From a number at each step to another."""
    return Recurrent(nn.Identity(), nn.LSTM(1, 16, batch_first=True), nn.Linear(16, 1))


def recurrent_reader() -> Recurrent:
    """From a character at each step, of 45, to the next."""
    return Recurrent(nn.Embedding(45, 16), nn.GRU(16, 32, batch_first=True), nn.Linear(32, 45))


def smoothed_cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """Mean cross-entropy with a tenth of each label spread over all classes."""
    return F.cross_entropy(logits, targets, label_smoothing=0.1)


def next_character(logits: Tensor, targets: Tensor) -> Tensor:
    """Mean cross-entropy over a batch of texts and their places."""
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten())


# Data


def standardised(x: Tensor, dim: int | None = 0) -> Tensor:
    """With mean 0 and deviation 1 over the examples; of all numbers together if dim is None.

    To four decimals: sums have other last digits on other machines, which this takes away.
    """
    x = x.double()
    mean, deviation = (x.mean(), x.std()) if dim is None else (x.mean(dim), x.std(dim))
    return ((x - mean) / deviation).round(decimals=4).float()


def table(name: str, features: int | None = None) -> Data:
    """A table of scikit-learn, standardised: features and classes, or a number to be predicted."""
    from sklearn import datasets  # which takes a second

    inputs, targets = getattr(datasets, f"load_{name}")(return_X_y=True)
    x = standardised(torch.from_numpy(inputs[:, :features]))
    if targets.dtype.kind == "i":
        return x, torch.from_numpy(targets).long()
    return x, standardised(torch.from_numpy(targets)[:, None])


def friedman() -> Data:
    """Friedman's first function of 5 of 10 numbers, with noise."""
    from sklearn import datasets  # which takes a second

    inputs, targets = datasets.make_friedman1(4000, 10, noise=1.0, random_state=0)
    return torch.from_numpy(inputs).float(), standardised(torch.from_numpy(targets)[:, None])


@cache
def photograph(name: str) -> Tensor:
    """One of scikit-learn's two photographs at half its size: [3, 213, 320] in [0, 1]."""
    from sklearn import datasets  # which takes a second

    pixels = torch.from_numpy(datasets.load_sample_image(f"{name}.jpg").copy()).float() / 255
    return F.avg_pool2d(pixels.permute(2, 0, 1), 2)


def patches(side: int, stride: int, name: str) -> Tensor:
    """Patches of a photograph, row by row: [rows, columns, 3, side, side]."""
    return photograph(name).unfold(1, side, stride).unfold(2, side, stride).permute(1, 2, 0, 3, 4)


def where_from(side: int, stride: int, *, flat: bool = False) -> Data:
    """Colour patches of both photographs, and which of the eight quarters each comes from."""
    found, places = [], []
    for number, name in enumerate(("china", "flower")):
        of_one = patches(side, stride, name)
        rows, columns = of_one.shape[:2]
        lower, right = torch.arange(rows) >= rows / 2, torch.arange(columns) >= columns / 2
        found.append(of_one.flatten(0, 1))
        places.append((4 * number + 2 * lower[:, None] + right.long()).flatten())
    x = standardised(torch.cat(found), dim=None)
    return x.flatten(1) if flat else x, torch.cat(places)


def grey_patches() -> Data:
    """Grey patches 8 x 8 of both photographs, to be reproduced."""
    x = torch.cat([patches(8, 4, name).mean(2).flatten(0, 1).flatten(1) for name in ("china", "flower")])
    x = standardised(x, dim=None)
    return x, x


def places_and_values(image: Tensor) -> Data:
    """Row and column of each pixel of an image [channels, rows, columns], and its values."""
    places = torch.cartesian_prod(*map(torch.arange, image.shape[1:]))
    return places, image.flatten(1).T


def coordinates() -> Data:
    """Places in a photograph, from -1 to 1, and their colours."""
    image = F.avg_pool2d(photograph("china"), 4)
    places, colours = places_and_values(image)
    return places / torch.tensor(image.shape[1:]) * 2 - 1, colours


def matrix() -> Data:
    """Places in a photograph and how bright they are."""
    places, brightness = places_and_values(F.avg_pool2d(photograph("flower"), 2).mean(0, keepdim=True))
    return places, standardised(brightness.squeeze(1))


def forecasts() -> Data:
    """The chaotic series of Mackey and Glass with noise: 12 numbers, and for each the number three steps on."""
    # By basic arithmetic alone, of which every machine makes the same numbers.
    x = [1.2] * 18
    while len(x) < 4000:
        delayed = x[-18]
        fifth = delayed * delayed * delayed * delayed * delayed
        x.append(0.9 * x[-1] + 0.2 * delayed / (1 + fifth * fifth))
    noise = np.random.default_rng(0).normal(scale=0.3, size=len(x))
    series = standardised(torch.tensor(x)) + torch.from_numpy(noise).float()
    windows = series.unfold(0, 12 + 3, 1)
    return windows[:, :12, None].contiguous(), windows[:, 3:, None].contiguous()


def zen() -> str:
    """The Zen of Python, which comes with it, in rot13, and is printed by the first import."""
    import contextlib
    import io

    with contextlib.redirect_stdout(io.StringIO()):
        import this
    return "".join(this.d.get(character, character) for character in this.s)


def names() -> str:
    """The names of the first 4,096 characters of Unicode 3.2, which Python keeps beside the newest, a line each."""
    found = (unicodedata.ucd_3_2_0.name(chr(code), "") for code in range(4096))
    return "\n".join(name for name in found if name)


_TEXTS = {
    zen: "e250f274f33b9b621a04264025d50e5fb9b1f989f444d13bb373882e734e996f",
    names: "bbf61fc843a0a36428c776775763baef8110e1b7f872d7d5a4e1a3a0e0d8eaad",
}
"""The SHA-256 of each, so that the problem is the same for everyone."""


def text(make: Callable[[], str], context: int, stride: int) -> Data:
    """Pieces of a text as numbers of its characters, and for each character the one after it."""
    content = make()
    found = hashlib.sha256(content.encode()).hexdigest()
    if found != _TEXTS[make]:
        raise ValueError(f"{make.__name__}: expected a text of SHA-256 {_TEXTS[make]}, got one of {found}")
    alphabet = sorted(set(content))
    pieces = torch.tensor([alphabet.index(character) for character in content]).unfold(0, context + 1, stride)
    return pieces[:, :-1].contiguous(), pieces[:, 1:].contiguous()


def mnist(pooled: bool = False) -> Data:
    """Every fifth of MNIST's training images, standardised, and their labels; at half their size if pooled."""
    images, labels, _ = load("mnist", "train")
    images = F.avg_pool2d(images[::5], 2) if pooled else images[::5]
    return standardised(images, dim=None), labels[::5]


# Problems


class OwnNetwork(NamedTuple):
    """What someone might want to train."""

    about: str
    make_module: Callable[[], nn.Module]
    loss: Callable[[Tensor, Tensor], Tensor]
    data: Callable[[], Data]
    batch_size: int

    def task(self, name: str) -> Task:
        """Reads or makes the data."""
        return from_module(self.make_module, self.loss, self.data(), batch_size=self.batch_size, name=name)


PROBLEMS = {
    "logistic-cancer": OwnNetwork(
        "logistic regression on 10 numbers about breast cancer",
        partial(nn.Linear, 10, 2),
        F.cross_entropy,
        partial(table, "breast_cancer", 10),
        batch_size=32,
    ),
    "relu-wine": OwnNetwork(
        "ReLU MLP 13-32-32-3 on the wine table, smoothed labels",
        partial(mlp, (13, 32, 32, 3), nn.ReLU),
        smoothed_cross_entropy,
        partial(table, "wine"),
        batch_size=32,
    ),
    "tanh-diabetes": OwnNetwork(
        "tanh MLP 10-20-1, regression on the diabetes table",
        partial(mlp, (10, 20, 1), nn.Tanh),
        F.mse_loss,
        partial(table, "diabetes"),
        batch_size=64,
    ),
    "silu-friedman": OwnNetwork(
        "SiLU MLP 10-48-48-1, regression on Friedman's function with noise",
        partial(mlp, (10, 48, 48, 1), nn.SiLU),
        F.mse_loss,
        friedman,
        batch_size=128,
    ),
    "deep-patches": OwnNetwork(
        "tanh MLP of 8 hidden layers of 16: from which part of which photograph a patch is",
        partial(mlp, (75, *(16,) * 8, 8), nn.Tanh),
        F.cross_entropy,
        partial(where_from, 5, 3, flat=True),
        batch_size=64,
    ),
    "residual-patches": OwnNetwork(
        "residual MLP with layer norm and GELU, the same patches",
        residual_network,
        F.cross_entropy,
        partial(where_from, 5, 3, flat=True),
        batch_size=64,
    ),
    "convnet-patches": OwnNetwork(
        "ConvNet with max pooling, patches of 10 x 10",
        convolutional_network,
        F.cross_entropy,
        partial(where_from, 10, 4),
        batch_size=32,
    ),
    "autoencoder-patches": OwnNetwork(
        "ELU autoencoder 64-32-8-32-64 of grey patches",
        partial(mlp, (64, 32, 8, 32, 64), nn.ELU),
        F.mse_loss,
        grey_patches,
        batch_size=64,
    ),
    "coordinates-photo": OwnNetwork(
        "Fourier features and a ReLU MLP 48-48-48-3: a photograph from its coordinates",
        coordinate_network,
        F.mse_loss,
        coordinates,
        batch_size=128,
    ),
    "factorisation-photo": OwnNetwork(
        "embeddings of rows and columns, rank 8: a photograph as a matrix",
        partial(Factorisation, 106, 160, 8),
        F.mse_loss,
        matrix,
        batch_size=128,
    ),
    "batchnorm-mnist": OwnNetwork(
        "CNN with batch norm, MNIST at 14 x 14",
        batch_norm_network,
        F.cross_entropy,
        partial(mnist, pooled=True),
        batch_size=32,
    ),
    "gelu-mnist": OwnNetwork(
        "GELU MLP 784-32-10, MNIST",
        image_mlp,
        F.cross_entropy,
        mnist,
        batch_size=64,
    ),
    "lstm-series": OwnNetwork(
        "LSTM of 16 units: a chaotic series with noise, three steps ahead",
        recurrent_forecaster,
        F.mse_loss,
        forecasts,
        batch_size=32,
    ),
    "gru-zen": OwnNetwork(
        "GRU of 32 units: the next character of the Zen of Python",
        recurrent_reader,
        next_character,
        partial(text, zen, 10, 1),
        batch_size=16,
    ),
    "transformer-names": OwnNetwork(
        "causal transformer of width 32: the next character of Unicode's names",
        partial(Transformer, 29, 24, width=32, heads=4, layers=1),
        next_character,
        partial(text, names, 24, 24),
        batch_size=8,
    ),
}


def own_networks() -> dict[str, Task]:
    """The tasks by name, with their data."""
    return {name: problem.task(name) for name, problem in PROBLEMS.items()}
