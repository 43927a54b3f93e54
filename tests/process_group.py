"""What the processes of tests/test_processes.py do: python process_group.py NAME FOLDER, with RANK and so on set."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from small_training import Cliff, outcome, seeds, small_rule, trainer
from torch import nn

from fastl2l import FusedLSTMOptimizer, baselines, evaluate, processes
from fastl2l.experiments import losses, own_networks_losses
from fastl2l.meta import Imitation, search_meta_lr
from fastl2l.meta.checkpoint import CheckpointError
from fastl2l.processes import ProcessError, current
from fastl2l.tasks import Digits, Quadratic

TASK = Quadratic(dim=3, batch=4)
SKIPPING = Cliff(dim=3, batch=4, edge=3, seeds=seeds("train", 5))
"""Problem number 5 is not finite in the first window."""
BATCH = {"batch": 4, "trajectories": 8, "validation_problems": 5}


def numbers(folder: Path) -> dict[str, object]:
    """Everything that is to be the same whatever the number of processes."""
    (folder / "cache").mkdir(exist_ok=True)
    os.environ["FASTL2L_CACHE"] = str(folder / "cache")
    found: dict[str, object] = {}
    for name, options in {
        "plain": {},
        "skipped": {"task": SKIPPING},
        "imitation": {"imitation": Imitation([baselines.Adam(0.01)], 0.5), "horizon": (4, 12), "log_floor": 1e-3},
        "exact": {"second_derivatives": True, "second_minibatch": True},
    }.items():
        made = trainer(**BATCH | options, checkpoint=folder / f"{name}.pt")
        made.fit(2, progress=False)
        found[name] = [*outcome(made), made.history[0].skipped]
    rule = small_rule()
    curves = evaluate(TASK, {"rule": rule, "adam": baselines.Adam()}, steps=5, runs=7)
    found["evaluate"] = {name: of.tolist() for name, of in curves.losses.items()} | curves.metadata["optimizers"]
    figure = losses.curves(TASK, {"rule": rule, "sgd": baselines.SGD(0.01)}, steps=5, runs=6, tuning_runs=3, piece=2)
    found["reproduce"] = {name: of.tolist() for name, of in figure.losses.items()}
    found["whole"] = own_networks_losses.whole_losses(Digits(hidden=(2,)), rule, 4, range(5))
    found["tune"] = search_meta_lr(
        lambda lr, path: trainer(meta_lr=lr, checkpoint=path), folder / "search", trials=3, epochs=1, progress=False
    )
    return found


# Bad input: every process must say the same


@dataclass(frozen=True)
class FailsOnce(Quadratic):
    """One problem cannot be made."""

    number: int = 0

    def sample(self, seed):
        if seed in seeds("train", self.number):
            raise ValueError("there is no such problem")
        return super().sample(seed)


def other_versions() -> None:
    rank, true = current().rank, processes.versions
    processes.versions = lambda: true() | {"torch": f"0.{rank}"}
    try:
        trainer(**BATCH)
    finally:
        processes.versions = true


def seen_by_one(folder: Path) -> None:
    path = folder / f"of-{current().rank}" / "checkpoint.pt"
    trainer(**BATCH, checkpoint=path).fit(1, progress=False)
    trainer(**BATCH, checkpoint=path)


def optimizer_of(placement, **options):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import DTensor

    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    param = nn.Parameter(DTensor.from_local(torch.ones(2, 3), mesh, [placement], run_check=False))
    param.grad = DTensor.from_local(torch.ones(2, 3), mesh, [placement], run_check=False)
    return FusedLSTMOptimizer([("scale.weight", param)], small_rule(), **options)


def partial_sums() -> None:
    from torch.distributed.tensor import Partial

    optimizer_of(Partial()).step()


def gradient_elsewhere() -> None:
    from torch.distributed.tensor import DTensor, Replicate, Shard

    optimizer = optimizer_of(Shard(0))
    (param,) = optimizer.param_groups[0]["params"]
    param.grad = DTensor.from_local(torch.ones(4, 3), param.device_mesh, [Replicate()], run_check=False)
    optimizer.step()


def frozen_in_one() -> None:
    made = trainer(**BATCH)
    made.rule.weights()[0].requires_grad_(current().rank == 0)
    made.fit(1, progress=False)


def errors(folder: Path) -> dict[str, str]:
    """What each of these raises here."""
    rank = current().rank
    optimizers = {"a": baselines.SGD(0.1), "b": baselines.SGD(0.2)}
    cases = {
        "undivided": lambda: trainer(),
        "pieces": lambda: trainer(**BATCH, pieces=3),
        "one argument": lambda: trainer(**BATCH, unroll=3 if rank else 4),
        "rules": lambda: trainer(**BATCH, rule=small_rule(seed=rank)),
        "kinds": lambda: trainer(**BATCH, rule=small_rule(hidden_size=4 + rank)),
        "tasks": lambda: trainer(Quadratic(dim=3 + rank, batch=4), **BATCH),
        "evaluate": lambda: evaluate(Quadratic(dim=3 + rank, batch=4), {"sgd": baselines.SGD(0.1)}, steps=2, runs=4),
        "order": lambda: evaluate(TASK, dict(sorted(optimizers.items(), reverse=rank > 0)), steps=2, runs=4),
        "tuning": lambda: baselines.tune(Quadratic(dim=3 + rank, batch=4), baselines.SGD(), 2, runs=2),
        "keep": lambda: trainer(**BATCH, keep=("best", "last")[rank]),
        "no checkpoint": lambda: trainer(**BATCH, checkpoint=folder / "mine.pt" if rank == 0 else None),
        "epochs": lambda: trainer(**BATCH).fit(1 + rank, progress=False),
        "fit": lambda: trainer(**BATCH).fit(-1 if rank else 1, progress=False),
        "frozen": frozen_in_one,
        "searching": lambda: search_meta_lr(lambda lr, path: trainer(meta_lr=lr), folder, trials=-1 if rank else 1),
        "tuning runs": lambda: baselines.tune(TASK, baselines.SGD(), 2, runs=-1 if rank else 2),
        "other work": (lambda: trainer(**BATCH))
        if rank
        else (lambda: baselines.tune(TASK, baselines.SGD(), 2, runs=2)),
        "versions": other_versions,
        "one problem": lambda: trainer(FailsOnce(dim=3, batch=4, number=6), **BATCH).fit(1, progress=False),
        "checkpoint": lambda: seen_by_one(folder),
        "partial": partial_sums,
        "gradient": gradient_elsewhere,
    }
    found = {}
    for name, work in cases.items():
        try:
            work()
            found[name] = "nothing"
        except (ValueError, RuntimeError, CheckpointError) as error:
            found[name] = f"{type(error).__name__}: {error}"
    return found


def lost(folder: Path) -> dict[str, object]:
    """The last process is gone in the second epoch."""
    made = trainer(**BATCH, checkpoint=folder / "checkpoint.pt")
    made.fit(1, progress=False)
    if current().rank == current().size - 1:
        os._exit(9)
    try:
        made.fit(2, progress=False)
    except ProcessError as error:
        return {"error": str(error), "epochs": len(made.history)}
    return {}


def leaves(folder: Path) -> dict[str, object]:
    """The last process is done, while the others are not."""
    if current().rank == current().size - 1:
        raise SystemExit
    try:
        trainer(**BATCH)
    except ProcessError as error:
        return {"error": str(error)}
    return {}


def silent(folder: Path) -> dict[str, object]:
    """The last process says nothing for longer than the time-out."""
    start = time.monotonic()
    try:
        if current().rank == current().size - 1:
            time.sleep(8)
        trainer(**BATCH)
    except ProcessError as error:
        return {"error": str(error), "seconds": time.monotonic() - start}
    return {}


def main(works: Mapping[str, Any], without_others: Sequence[str]) -> None:
    """What the work that the command line names finds, to a file of each process; some works end without the others."""
    torch.set_num_threads(1)
    work, folder = sys.argv[1], Path(sys.argv[2])
    with processes.joined() as group:
        answer = works[work](folder)
        (folder / f"{work}-{group.size}-{group.rank}.json").write_text(json.dumps(answer))
        if work in without_others:
            os._exit(0)  # there is nobody to say goodbye to


if __name__ == "__main__":
    main(globals(), ("lost", "silent", "leaves"))
