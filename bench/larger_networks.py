"""Rules on networks of 29,000 to 204,000 parameters: python bench/larger_networks.py [--steps N] [NAME=FILE ...].

Loss on a fixed set of examples after so many steps, for each start, beside Adam at several rates. Larger than what any
shipped rule was trained on, and what a mean hides is shown: a rule that is lost at one start of four is no use.
"""

from __future__ import annotations

import argparse
import csv
import functools
import statistics
import sys
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fastl2l
from fastl2l import FusedLSTMOptimizer
from fastl2l.experiments.own_networks_problems import Transformer, mlp, names, next_character, text
from fastl2l.tasks.datasets import load

RATES = (3e-4, 1e-3, 3e-3, 1e-2)
RULES = ("rnnprop-long", "rnnprop")
JUDGED = 1000
"""Examples that are not trained on."""


def images() -> tuple[Tensor, Tensor]:
    """MNIST, one of five."""
    pixels, labels, _ = load("mnist", "train")
    return pixels[::5], labels[::5]


def wide_perceptron() -> nn.Module:
    return nn.Sequential(nn.Flatten(), *mlp((784, 256, 10), nn.ReLU))


def convolutional() -> nn.Module:
    """With GroupNorm."""
    layers: list[nn.Module] = []
    for before, after in ((1, 16), (16, 32), (32, 64)):
        layers += [nn.Conv2d(before, after, 3, padding=1), nn.GroupNorm(4, after), nn.ReLU(), nn.MaxPool2d(2)]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(64 * 9, 10))


def transformer() -> nn.Module:
    return Transformer(45, 32, 64, 4, 2)


NETWORKS: dict[str, tuple[Callable[[], nn.Module], Callable[..., Tensor], Callable[[], tuple[Tensor, Tensor]]]] = {
    "perceptron 784-256-10": (wide_perceptron, F.cross_entropy, images),
    "convolutions with GroupNorm": (convolutional, F.cross_entropy, images),
    "transformer": (transformer, next_character, functools.partial(text, names, 32, 5)),
}


def final(
    make: Callable[[], nn.Module],
    loss: Callable[..., Tensor],
    data: tuple[Tensor, Tensor],
    build: Callable[[list[nn.Parameter]], torch.optim.Optimizer],
    start: int,
    steps: int,
    batch: int,
) -> float:
    """The loss on what is not trained on, after so many minibatches of so many examples."""
    random = torch.Generator().manual_seed(start)
    torch.manual_seed(start)
    model, (inputs, targets) = make(), data
    order = torch.randperm(len(inputs), generator=torch.Generator().manual_seed(0))
    judged, trained = order[:JUDGED], order[JUDGED:]
    optimizer = build(list(model.parameters()))
    for _ in range(steps):
        rows = trained[torch.randint(len(trained), (batch,), generator=random)]
        optimizer.zero_grad()
        loss(model(inputs[rows]), targets[rows]).backward()
        optimizer.step()
    with torch.no_grad():
        return float(loss(model(inputs[judged]), targets[judged]))


def main() -> None:
    """Rows as CSV: the network, its parameters, the optimizer, and its mean, worst and all losses."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("rules", nargs="*", metavar="NAME=FILE", help="more rules")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--starts", type=int, default=4)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--lr", type=float, nargs="+", default=[1.0], help="factors on the rules' steps")
    given = parser.parse_args()
    rules = {name: name for name in RULES} | dict(entry.split("=", 1) for entry in given.rules)
    builds: dict[str, Callable[[list[nn.Parameter]], torch.optim.Optimizer]] = {
        **{
            name + f" lr {lr:g}" * (lr != 1): functools.partial(
                FusedLSTMOptimizer, rule=fastl2l.load_rule(file), lr=lr, nonfinite="skip"
            )
            for name, file in rules.items()
            for lr in given.lr
        },
        **{f"adam {rate:g}": functools.partial(torch.optim.Adam, lr=rate) for rate in RATES},
    }
    table = csv.writer(sys.stdout)
    table.writerow(["network", "parameters", "steps", "batch", "optimizer", "mean", "worst", "losses"])
    for network, (make, loss, read) in NETWORKS.items():
        data, parameters = read(), sum(param.numel() for param in make().parameters())
        for name, build in builds.items():
            losses = [final(make, loss, data, build, start, given.steps, given.batch) for start in range(given.starts)]
            shown = " ".join(f"{one:.4g}" for one in losses)
            row = [
                network,
                parameters,
                given.steps,
                given.batch,
                name,
                f"{statistics.mean(losses):.4g}",
                f"{max(losses):.4g}",
                shown,
            ]
            table.writerow(row)
            sys.stdout.flush()


if __name__ == "__main__":
    main()
