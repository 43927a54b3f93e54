"""What many processes and many coordinates cost: python bench/scale.py [processes] [group] [coordinates] [--quick].

Everything with one thread a process, on a machine that does nothing else; all three by default. What is compared is
measured by turns of a few seconds, since cores of shared machines change their speed by half from one minute to the
next, and what is told is the median of each turn's ratio. It writes bench/results/scale/NAME.csv:

- processes: problems a second of meta-training, batches of 16, in one process, in two, in two that keep to a core each,
  and in two that know nothing of each other, which is what the machine itself gives.
- group: batches of 16 in one process, in pieces, with a process group of one and without, and without pieces.
- coordinates: bytes and nanoseconds a coordinate of a step of 3e7 coordinates under the papers' LSTM rule.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from rows import write_rows

from fastl2l import FusedLSTMOptimizer, LSTMRule, MetaTrainer, processes, tasks
from fastl2l.ops.dispatch import select

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "bench" / "results" / "scale"
BATCH = 16
"""Of meta-training in two processes, which wait for each other once a window of a batch."""
TASKS: dict[str, Callable[[], tasks.Task]] = {"quadratic": tasks.Quadratic, "digits": tasks.Digits}


class Sizes(NamedTuple):
    """How much is measured."""

    rounds: int
    trajectories: int
    """Of a turn."""
    coordinates: int
    steps: int


FULL, QUICK = Sizes(15, 32, 30_000_000, 5), Sizes(1, 16, 30_000, 2)


class Speed(NamedTuple):
    """Of meta-training."""

    task: str
    batch: int
    what: str
    problems_a_second: float
    times_the_first: float
    rounds: int
    processor: str


class Step(NamedTuple):
    """Of so many coordinates."""

    coordinates: int
    state: str
    bytes_a_coordinate: float
    """That the first step takes, beside parameters and gradients."""
    peak_bytes_a_coordinate: float
    nanoseconds_a_coordinate: float
    steps: int
    processor: str


def trainer(task: str, sizes: Sizes, pieces: int = 4) -> MetaTrainer:
    short = {"validation_problems": 16, "validation_horizon": 20}
    return MetaTrainer(LSTMRule(), TASKS[task](), trajectories=sizes.trajectories, batch=BATCH, pieces=pieces, **short)


def speed(trained: MetaTrainer) -> float:
    """Problems a second, of a further epoch."""
    began = time.perf_counter()
    trained.fit(len(trained.history) + 1, progress=False)
    return trained.trajectories / (time.perf_counter() - began)


@contextlib.contextmanager
def on_a_core(number: int) -> Iterator[None]:
    """This process runs on one core of those that it may run on."""
    cores = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {sorted(cores)[number % len(cores)]})
    try:
        yield
    finally:
        os.sched_setaffinity(0, cores)


# In processes of their own

Turns = list[dict[str, float]]
"""Problems a second, by what has worked, of each turn."""


def in_a_group_of_two(task: str, sizes: Sizes) -> Turns:
    """The first process while the other one waits, both together, and both as if there were no other."""
    with processes.alone():
        alone, apart = (trainer(task, sizes) for _ in range(2))
    together, group = trainer(task, sizes), processes.current()
    for one in (alone, apart, together):  # what is done once
        one.fit(1, progress=False)

    def turn() -> dict[str, float]:
        first = group.first(lambda: speed(alone))
        both = speed(together)
        with on_a_core(group.rank):
            each = speed(together)
        dist.barrier()
        return {
            "1 process": first,
            "2 processes": both,
            "2 processes, a core each": each,
            "2 processes, each by itself": sum(group.everyone(lambda: speed(apart))),
        }

    return [turn() for _ in range(sizes.rounds)]


def in_a_group_of_one(task: str, sizes: Sizes) -> Turns:
    with processes.alone():
        made = {what: trainer(task, sizes, n) for what, n in (("no group", 4), ("no group, in one piece", 1))}
    made["group of one"] = trainer(task, sizes)
    for one in made.values():
        one.fit(1, progress=False)
    return [{what: speed(one) for what, one in made.items()} for _ in range(sizes.rounds)]


def resident(name: str) -> int:
    """Bytes: VmRSS now, VmHWM at most so far."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name + ":"))


def stepped(state: str, sizes: Sizes) -> list[float]:
    """Bytes and peak of bytes that the first step takes, and seconds of a step, each a coordinate."""
    param = torch.nn.Parameter(torch.randn(sizes.coordinates))
    param.grad = torch.randn(sizes.coordinates)
    optimizer = FusedLSTMOptimizer([param], LSTMRule(), state_dtype=torch.bfloat16 if state == "bfloat16" else None)
    before = resident("VmRSS")
    optimizer.step()
    taken, peak, times = resident("VmRSS") - before, resident("VmHWM") - before, []
    for _ in range(sizes.steps):
        began = time.perf_counter()
        optimizer.step()
        times.append(time.perf_counter() - began)
    return [number / sizes.coordinates for number in (taken, peak, statistics.median(times))]


def started(what: str, on: str, size: int, rounds: int, quick: bool) -> Any:
    """What a function of the above gives in the first process of a group of so many."""
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        port = str(one.getsockname()[1])
    path = os.pathsep.join([os.fspath(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    group = {"WORLD_SIZE": str(size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, __file__, "--part", what, on, folder, "--rounds", str(rounds)]
        command += ["--quick"] * quick
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path, **group}
        begun = [subprocess.Popen(command, env={**environment, "RANK": str(rank)}) for rank in range(size)]
        codes = [one.wait() for one in begun]
        if any(codes):
            raise RuntimeError(f"{what} of {on}: a process ended with {codes}")
        return json.loads((Path(folder) / "answer.json").read_text())


def part(what: str, on: str, folder: str, sizes: Sizes) -> None:
    torch.set_num_threads(1)
    with processes.joined() as group:
        answer = globals()[what](on, sizes)
        if group.rank == 0:
            (Path(folder) / "answer.json").write_text(json.dumps(answer))


# What is written


def processor() -> str:
    select("native", "cpu")  # which loads what knows the instruction set
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.exists() else []
    model = next((line.split(": ")[1] for line in lines if line.startswith("model name")), platform.machine())
    return f"{model}, {os.cpu_count()} cores, {torch.ops.fastl2l.cpu_isa()}"


def speeds(where: str, size: int, quick: bool, sizes: Sizes) -> list[Speed]:
    rows = []
    for task in TASKS:
        turns: Turns = started(where, task, size, sizes.rounds, quick)
        first = next(iter(turns[0]))
        for what in turns[0]:
            middle = statistics.median(turn[what] for turn in turns)
            times = statistics.median(turn[what] / turn[first] for turn in turns)
            rows.append(Speed(task, BATCH, what, round(middle, 2), round(times, 3), len(turns), processor()))
    return rows


def measure_processes(sizes: Sizes, quick: bool) -> Sequence[Any]:
    return speeds("in_a_group_of_two", 2, quick, sizes)


def measure_group(sizes: Sizes, quick: bool) -> Sequence[Any]:
    return speeds("in_a_group_of_one", 1, quick, sizes)


def measure_coordinates(sizes: Sizes, quick: bool) -> Sequence[Any]:
    rows = []
    for state in ("float32", "bfloat16"):
        taken, peak, seconds = started("stepped", state, 1, sizes.rounds, quick)
        numbers = round(taken, 1), round(peak, 1), round(seconds * 1e9, 1)
        rows.append(Step(sizes.coordinates, state, *numbers, sizes.steps, processor()))
    return rows


MEASURES = {"processes": measure_processes, "group": measure_group, "coordinates": measure_coordinates}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition(":")[0])
    parser.add_argument("measures", nargs="*", help=f"some of {', '.join(MEASURES)}; all by default")
    parser.add_argument("--quick", action="store_true", help="tiny sizes, to see that it runs")
    parser.add_argument("--rounds", type=int, help="of which medians are taken; 15 by default")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder for the CSV files")
    parser.add_argument("--part", nargs=3, help=argparse.SUPPRESS)
    given = parser.parse_args()
    sizes = QUICK if given.quick else FULL
    sizes = sizes._replace(rounds=given.rounds or sizes.rounds)
    if given.part:
        part(*given.part, sizes)
        return
    for name in given.measures or MEASURES:
        if name not in MEASURES:
            parser.error(f"measures: expected some of {', '.join(MEASURES)}, got {name!r}")
        rows = MEASURES[name](sizes, given.quick)
        write_rows(given.out / f"{name}.csv", rows)
        for row in rows:
            print(row, flush=True)
        print(f"written: {given.out / name}.csv", flush=True)


if __name__ == "__main__":
    main()
