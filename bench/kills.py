"""Processes of a training run are killed at random moments: python bench/kills.py [--kills 20] [--seed 0].

A run of two processes under torchrun loses one of them, by SIGKILL, at a moment drawn uniformly from its epochs: after
so many whole ones and a part of the next. By turns torchrun starts the processes again (--max-restarts), or it ends and
the same command is given once more. Whatever was killed and when, the rule that is left in the end has to have the same
bits as that of the run that nobody disturbed. It prints a line for every kill, writes bench/results/scale/kills.csv,
and fails if one rule is another.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import math
import os
import random
import re
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

from rows import write_rows

from fastl2l.rule_files import load_rule

ROOT = Path(__file__).resolve().parents[1]
RESULT = ROOT / "bench" / "results" / "scale" / "kills.csv"
TRAIN = "train --task quadratic --batch 4 --trajectories 8 --horizon 40 --validation-problems 4 --hidden-size 8"
PROCESSES = 2
LONGEST = 120.0
"""Seconds until a run is given up: none may hang."""


class Kill(NamedTuple):
    """What was killed when, and what became of it."""

    number: int
    started_again_by: str
    rank: int
    epochs: float
    """That were to be over."""
    went_on_after_epoch: int
    seconds: float
    """From the start to the end."""
    same_bits: bool


def command(out: Path, epochs: int, restarts: int) -> list[str]:
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(PROCESSES), "--max-restarts"]
    torchrun += [str(restarts), "--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0", "--monitor-interval", "0.1"]
    return [*torchrun, "-m", "fastl2l", *TRAIN.split(), "--epochs", str(epochs), "--out", os.fspath(out)]


def start(out: Path, epochs: int, restarts: int) -> subprocess.Popen[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.fspath(ROOT), "PYTHONFAULTHANDLER": "1"}
    environment["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1"  # see docs/scale.md
    with open(out.with_suffix(".log"), "a") as log:
        return subprocess.Popen(command(out, epochs, restarts), env=environment, stdout=log, stderr=log, text=True)


def finish(running: subprocess.Popen[str], out: Path) -> int:
    try:
        return running.wait(LONGEST)
    except subprocess.TimeoutExpired:
        for rank in range(PROCESSES):
            if (pid := worker(running, rank)) is not None:
                os.kill(pid, signal.SIGABRT)  # which makes it say where it is
        time.sleep(2)
        running.terminate()
        running.wait()
        raise RuntimeError(f"hangs after {LONGEST:g} s: {out.with_suffix('.log').read_text()}") from None


def worker(running: subprocess.Popen[str], rank: int) -> int | None:
    """The process of this rank, if it has been started."""
    children = Path(f"/proc/{running.pid}/task/{running.pid}/children")
    try:
        for child in children.read_text().split():
            if f"RANK={rank}".encode() in Path(f"/proc/{child}/environ").read_bytes().split(b"\0"):
                return int(child)
    except (FileNotFoundError, ProcessLookupError):
        pass
    return None


def wait_for(running: subprocess.Popen[str], out: Path, written: int) -> bool:
    """Until the checkpoint was written so many times; False if the run is over before."""
    seen = set()
    while len(seen) < written and running.poll() is None:
        with contextlib.suppress(FileNotFoundError):
            found = (out / "checkpoint.pt").stat()
            seen.add((found.st_ino, found.st_mtime_ns))
        time.sleep(0.001)
    return running.poll() is None


def disturbed(out: Path, epochs: int, rank: int, moment: float, epoch_seconds: float, by_torchrun: bool) -> bool:
    """Run, lose a rank after so many epochs, go on to the end; False if all was over by then."""
    running = start(out, epochs, 3 if by_torchrun else 0)
    if not wait_for(running, out, math.floor(moment)):
        return False
    time.sleep(moment % 1 * epoch_seconds)
    while (pid := worker(running, rank)) is None:
        if running.poll() is not None:
            return False
        time.sleep(0.01)
    os.kill(pid, signal.SIGKILL)
    code = finish(running, out)
    if code and not by_torchrun:
        code = finish(start(out, epochs, 0), out)
    if code:
        raise RuntimeError(f"ended with {code}: {out.with_suffix('.log').read_text()}")
    return True


def kill(
    number: int, out: Path, epochs: int, rank: int, moment: float, epoch_seconds: float, whole: Path
) -> Kill | None:
    """None if the run was over before."""
    by_torchrun, began = bool(number % 2), time.monotonic()
    if not disturbed(out, epochs, rank, moment, epoch_seconds, by_torchrun):
        return None
    seconds = time.monotonic() - began
    epoch = max(map(int, re.findall(r"going on after epoch (\d+)", out.with_suffix(".log").read_text())), default=0)
    by = "torchrun" if by_torchrun else "hand"
    return Kill(number, by, rank, round(moment, 2), epoch, round(seconds, 1), same(out, whole))


def same(one: Path, other: Path) -> bool:
    """Whether two folders' rules have the same bits."""
    first, second = (load_rule(folder / "rule.safetensors").weights() for folder in (one, other))
    return [weight.detach().numpy().tobytes() for weight in first] == [
        weight.detach().numpy().tobytes() for weight in second
    ]


def kills(number: int, seed: int, epochs: int, folder: Path) -> list[Kill]:
    whole, draw = folder / "whole", random.Random(seed)
    running = start(whole, epochs, 0)
    wait_for(running, whole, 1)
    began = time.monotonic()
    wait_for(running, whole, epochs)
    epoch_seconds = (time.monotonic() - began) / epochs
    if finish(running, whole):
        raise RuntimeError(whole.with_suffix(".log").read_text())
    print(f"nobody disturbed: an epoch takes {epoch_seconds:.3f} s", flush=True)
    done: list[Kill] = []
    attempts = itertools.count()
    while len(done) < number:
        rank, moment = draw.randrange(PROCESSES), draw.uniform(0, epochs)
        out = folder / f"run-{next(attempts)}"
        if (one := kill(len(done) + 1, out, epochs, rank, moment, epoch_seconds, whole)) is None:
            print(f"over before {moment:.2f} epochs were: another moment is drawn", flush=True)
        else:
            done.append(one)
            print(one, flush=True)
    return done


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition(":")[0])
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0, help="of ranks and moments")
    parser.add_argument("--epochs", type=int, default=30, help="of the run")
    parser.add_argument("--out", type=Path, default=RESULT, help="the CSV file")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        done = kills(given.kills, given.seed, given.epochs, Path(folder))
    write_rows(given.out, done)
    equal = sum(one.same_bits for one in done)
    print(f"{equal} of {len(done)} have the bits of the run that nobody disturbed; written: {given.out}")
    return equal < len(done)


if __name__ == "__main__":
    sys.exit(main())
