"""Stage "training": meta-training as a user runs it, on MNIST and on problems as large as an image."""

from __future__ import annotations

import time
from functools import lru_cache
from typing import Any

import torch
from harness import CUDA_ONLY, Findings, arguments, reason, synchronize
from torch import Tensor, nn

from fastl2l import LSTMRule, MetaTrainer
from fastl2l.tasks import MNIST, Problem, Task, from_module
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


class Denoising(nn.Module):
    """An image, whose loss is its distance to a noisy one plus squared differences of neighbours."""

    def __init__(self, side: int) -> None:
        super().__init__()
        self.image = nn.Parameter(torch.zeros(3, side, side))
        self.register_buffer("noisy", torch.randn(3, side, side))

    def forward(self, inputs: Tensor) -> Tensor:
        rough = self.image.diff(dim=1).square().mean() + self.image.diff(dim=2).square().mean()
        return (self.image - self.noisy).square().mean() + rough


def denoising(side: int, device: str) -> Task:
    """As large as neural art on 3 x side x side numbers, but cheap. There are no data."""
    nothing = torch.zeros(1)
    return from_module(
        lambda: Denoising(side), loss_itself, (nothing, nothing), batch_size=1, name="denoising", device=device
    )


def loss_itself(output: Tensor, target: Tensor) -> Tensor:
    return output


def mnist(device: str, quick: bool) -> tuple[Task, str]:
    """The real images where they are, else noise of the same shapes; nothing is downloaded."""
    if not quick and (data_folder() / "MNIST" / "raw").is_dir():
        return MNIST(device=device), "MNIST"
    return SyntheticMNIST(device=device), "noise of MNIST's shapes"


def problems(device: str, quick: bool) -> list[dict[str, Any]]:
    """What is trained on, for how many steps, and in which ways."""
    batch = 2 if quick else BATCH
    ways: list[dict[str, Any]] = [{}, {"capture": True}, {"batch": batch}, {"batch": batch, "capture": True}]
    task, data = mnist(device, quick)
    horizon, trajectories = (4, 2) if quick else (100, 2 * BATCH)
    found = [
        {"problem": "MNIST", "data": data, "task": task, "horizon": horizon, "unroll": horizon // 2 if quick else 20,
         "trajectories": trajectories, "ways": ways},
    ]  # fmt: skip
    for side in (8,) if quick else (128, 577):
        task = denoising(side, device)
        few = 2 if side > 128 or quick else BATCH
        found.append(
            {"problem": f"image of {side} x {side} x 3", "data": "noise", "task": task,
             "horizon": 4 if quick else 128, "unroll": 2 if quick else 32,
             "trajectories": few, "ways": ways if few == BATCH else ways[:2]},
        )  # fmt: skip
    return found


class Watched(Task):
    """A task that remembers when each of its problems was asked for."""

    def __init__(self, task: Task) -> None:
        self.name, self._task = task.name, task
        self.times: list[float] = []

    def sample(self, seed: int) -> Problem:
        self.times.append(time.perf_counter())
        return self._task.sample(seed)

    def spec(self) -> dict[str, Any]:
        return self._task.spec()


def train(problem: dict[str, Any], way: dict[str, Any], device: str) -> dict[str, Any]:
    """Trajectories a second of an epoch, with its one validation problem, after one that compiles and captures."""
    rule, task = LSTMRule(seed=0).to(device), Watched(problem["task"])
    settings = {name: problem[name] for name in ("horizon", "unroll", "trajectories")}
    trainer = MetaTrainer(rule, task, validation_problems=1, seed=0, **settings, **way)
    epoch = trainer.fit(2, progress=False)[-1]
    synchronize(device)
    seconds = time.perf_counter() - task.times[-problem["trajectories"] - 1]
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
            if way.get("capture") and args.device == "cpu":
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
