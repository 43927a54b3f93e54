"""Stage "training": meta-training as a user runs it, on MNIST and on problems as large as an image."""

from __future__ import annotations

import time
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from harness import CUDA_ONLY, NOT_YET, Findings, accepts, arguments, reason, synchronize
from torch import Tensor

from fastl2l import LSTMRule, MetaTrainer
from fastl2l.tasks import MNIST, Problem, Task
from fastl2l.tasks.base import generator, integer, normal
from fastl2l.tasks.classification import Classification
from fastl2l.tasks.datasets import Images, data_folder

BATCH = 16


class SyntheticMNIST(Classification):
    """MNIST's shapes, and noise for its images: as much work, nothing to learn."""

    name = "synthetic-mnist"

    def data(self, split: str) -> Images:
        return noise(self.dtype, str(self.device))


@lru_cache(maxsize=1)
def noise(dtype: torch.dtype, device: str) -> Images:
    random = torch.Generator().manual_seed(0)
    images = torch.rand(60_000, 1, 28, 28, generator=random)
    labels = torch.randint(10, (60_000,), generator=random)
    return Images(images.to(device, dtype), labels.to(device), 10)


@dataclass(frozen=True)
class Denoising(Task):
    """Squared distance to a noisy image plus squared differences of neighbours: as large as neural art, but cheap."""

    name = "denoising"
    side: int = 128
    channels: int = 3
    dtype: torch.dtype = torch.float32
    device: torch.device | str = "cpu"

    def __post_init__(self) -> None:
        integer("side", self.side)

    def sample(self, seed: int) -> Problem:
        return DenoisingProblem(self, seed)


class DenoisingProblem(Problem):
    task = "denoising"

    def __init__(self, task: Denoising, seed: int) -> None:
        self._shape = task.channels, task.side, task.side
        numel = task.channels * task.side**2
        self._noisy = normal(generator(seed, "image"), (numel,), 1.0, task.dtype, task.device)
        self.theta0 = torch.zeros_like(self._noisy)

    def loss(self, theta: Tensor, step: int) -> Tensor:
        image = theta.view(self._shape)
        rough = image.diff(dim=1).square().mean() + image.diff(dim=2).square().mean()
        return (theta - self._noisy).square().mean() + rough


def mnist(device: str, quick: bool) -> tuple[Task, str]:
    """The real images where they are, else noise of the same shapes; nothing is downloaded."""
    if not quick and (data_folder() / "MNIST" / "raw").is_dir():
        return MNIST(device=device), "MNIST"
    return SyntheticMNIST(device=device), "noise of MNIST's shapes"


def problems(device: str, quick: bool) -> list[dict[str, Any]]:
    """What is trained on, for how many steps, and in which ways."""
    ways: list[dict[str, Any]] = [{}, {"capture": True}, {"batch": BATCH}, {"batch": BATCH, "capture": True}]
    task, data = mnist(device, quick)
    horizon, trajectories = (4, 2) if quick else (100, 2 * BATCH)
    found = [
        {"problem": "MNIST", "data": data, "task": task, "horizon": horizon, "unroll": horizon // 2 if quick else 20,
         "trajectories": trajectories, "ways": ways},
    ]  # fmt: skip
    for side in (8,) if quick else (128, 577):
        task = Denoising(side=side, device=device)
        few = 2 if side > 128 or quick else BATCH
        found.append(
            {"problem": f"image of {side} x {side} x 3", "data": "noise", "task": task,
             "horizon": 4 if quick else 128, "unroll": 2 if quick else 32,
             "trajectories": few, "ways": ways if few == BATCH else ways[:2]},
        )  # fmt: skip
    return found


def train(problem: dict[str, Any], way: dict[str, Any], device: str) -> dict[str, Any]:
    """Trajectories a second of one epoch, after one that compiles and captures."""
    rule = LSTMRule(seed=0).to(device)
    settings = {name: problem[name] for name in ("horizon", "unroll", "trajectories")}
    trainer = MetaTrainer(rule, problem["task"], validation_problems=1, seed=0, **settings, **way)
    trainer.fit(1, progress=False)
    synchronize(device)
    begin = time.perf_counter()
    epoch = trainer.fit(2, progress=False)[-1]
    synchronize(device)
    seconds = time.perf_counter() - begin
    coordinates = problem["task"].sample(0).theta0.numel()
    done = problem["trajectories"]
    return {
        "coordinates": coordinates,
        "seconds": seconds,
        "trajectories_per_s": done / seconds,
        "coordinate_steps_per_s": done * problem["horizon"] * coordinates / seconds,
        "skipped": epoch.skipped,
    }


def main() -> int:
    args = arguments()
    findings = Findings(args.out, args.seconds)
    failed = False
    for problem in problems(args.device, args.quick):
        about = {name: problem[name] for name in ("problem", "data", "horizon", "unroll", "trajectories")}
        for way in problem["ways"]:
            row = about | {"batch": 1, "capture": False} | way
            if not accepts(MetaTrainer, *way):
                row |= {"failed": NOT_YET}
            elif way.get("capture") and args.device == "cpu":
                row |= {"failed": CUDA_ONLY}
            elif findings.out_of_time:
                row |= {"failed": "left out: no time left"}
            else:
                try:
                    row |= train(problem, way, args.device)
                except Exception as error:  # the other ways are worth knowing all the same
                    row |= {"failed": reason(error)}
                    failed = failed or row["failed"] != "out of memory"
            findings.add("training", row)
    return int(failed)


if __name__ == "__main__":
    raise SystemExit(main())
