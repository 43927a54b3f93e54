"""What a step of neural art costs, and the optimizer's share of it: python bench/neural_art_cost.py [SIZE ...].

Milliseconds of processor time, one thread, medians; the two are measured by turns. It needs the weights of VGG16.
"""

from __future__ import annotations

import statistics
import sys
import time

import torch

from fastl2l import baselines
from fastl2l.evaluate import builder
from fastl2l.experiments import fresh_rule
from fastl2l.tasks import vgg
from fastl2l.tasks.base import value_and_grad
from fastl2l.tasks.neural_art import ArtProblem, Styling, Weights, noise, style_targets

REPETITIONS = 15


def costs(size: int) -> dict[str, float]:
    """Milliseconds of f and its gradient, and of each optimizer's step."""
    weights = Weights()
    features = vgg.load(weights.network, weights.convolutions, torch.float32, torch.device("cpu"))
    picture = torch.rand(3, size, size, generator=torch.Generator().manual_seed(0))
    function = Styling(weights, features, style_targets(weights, features, [picture], [1.0]), size, size)
    problem = ArtProblem(function, picture, noise(0, size, size, torch.float32, "cpu"))
    optimizers = {
        "lstm": builder("lstm", fresh_rule("lstm", "neural-art")),
        "rnnprop": builder("rnnprop", fresh_rule("rnnprop", "neural-art")),
        "adam": baselines.Adam(1e-3).build,
    }
    thetas = {name: problem.theta0.clone().requires_grad_() for name in optimizers}
    built = {name: build([thetas[name]]) for name, build in optimizers.items()}
    times: dict[str, list[float]] = {name: [] for name in ("f and its gradient", *built)}
    for repetition in range(REPETITIONS + 2):
        start = time.process_time()
        _, gradient = value_and_grad(problem, problem.theta0, 0)
        spent = {"f and its gradient": time.process_time() - start}
        for name, optimizer in built.items():
            thetas[name].grad = gradient.clone()
            start = time.process_time()
            optimizer.step()
            spent[name] = time.process_time() - start
        for name, seconds in spent.items() if repetition >= 2 else ():
            times[name].append(1000 * seconds)
    return {name: statistics.median(all_times) for name, all_times in times.items()}


def main() -> None:
    """A table for each size."""
    torch.set_num_threads(1)
    for size in [int(word) for word in sys.argv[1:]] or [64, 128, 256]:
        found = costs(size)
        problem = found.pop("f and its gradient")
        print(f"{size} x {size}, {3 * size * size:,} coordinates: f and its gradient {problem:.1f} ms")
        for name, spent in found.items():
            print(
                f"  {name}: {spent:.2f} ms, {100 * spent / (problem + spent):.2f}% of a step, whose time is "
                f"{(problem + spent) / (problem + found['adam']):.3f} x that with adam"
            )


if __name__ == "__main__":
    main()
