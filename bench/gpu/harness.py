"""What the stages share: their arguments, what they have found so far, and how time is taken."""

from __future__ import annotations

import argparse
import math
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from fastl2l.files import write_json

ROOT = Path(__file__).resolve().parents[2]
# For whoever is imported after this. At the end: nothing there must hide a module of Python's.
sys.path.append(str(ROOT / "bench"))

CUDA_ONLY = "no CUDA device"


def arguments(*names: str) -> argparse.Namespace:
    """What every stage is called with; `names` are positional arguments of its own."""
    parser = argparse.ArgumentParser()
    for name in names:
        parser.add_argument(name)
    parser.add_argument("--out", type=Path, required=True, help="file for what the stage finds")
    parser.add_argument("--device", choices=("cuda", "cpu"), required=True)
    parser.add_argument("--seconds", type=float, required=True, help="start nothing new after so many")
    parser.add_argument("--quick", action="store_true", help="small sizes, few repetitions")
    return parser.parse_args()


class Findings:
    """What a stage has found, in its file after every addition: a stage that is cut off keeps what it has."""

    def __init__(self, out: Path, seconds: float = math.inf) -> None:
        self.found: dict[str, Any] = {}
        self._out, self._deadline = out, time.monotonic() + seconds

    def update(self, **entries: Any) -> None:
        self.found.update(entries)
        self.save()

    def add(self, name: str, row: dict[str, Any]) -> None:
        """Append a row to the list `name`."""
        self.found.setdefault(name, []).append(row)
        self.save()
        print(", ".join(f"{key} {_shown(value)}" for key, value in row.items()))

    def save(self) -> None:
        write_json(self._out, self.found)

    def leave_out(self, reason: str) -> None:
        """The stage cannot be done here."""
        self.update(left_out=reason)
        print(f"left out: {reason}")

    @property
    def out_of_time(self) -> bool:
        return time.monotonic() > self._deadline


def _shown(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def reason(error: BaseException) -> str:
    """Why something failed, in one line."""
    # torch's own, or CUDA's words where an extension has passed them on.
    if isinstance(error, torch.OutOfMemoryError) or "out of memory" in str(error).lower():
        return "out of memory"
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0]}"[:300]


def synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def measure(run: Callable[[], Any], device: str, seconds: float, *, least: int = 5, most: int = 200) -> dict[str, Any]:
    """Median and quartiles of the seconds that `run` takes, over samples of about a millisecond or one call.

    On a GPU by events of the current stream, so launches count as far as the GPU waits for them.
    """
    once = _warm_up(run, device)
    calls = max(1, min(1000, math.ceil(1e-3 / max(once, 1e-7))))
    count = int(max(least, min(most, seconds / (once * calls))))
    samples = [_sample(run, device, calls) / calls for _ in range(count)]
    low, median, high = statistics.quantiles(samples, n=4)
    return {"median_s": median, "low_s": low, "high_s": high, "samples": count, "calls_a_sample": calls}


def _warm_up(run: Callable[[], Any], device: str) -> float:
    """Compiles what is compiled at the first call, and lets a GPU's clock rise. Gives the seconds of a call."""
    run()
    synchronize(device)
    start = time.perf_counter()
    once = _sample(run, device, 1)
    while device == "cuda" and time.perf_counter() - start < 0.03:
        once = _sample(run, device, 1)
    return once


def _sample(run: Callable[[], Any], device: str, calls: int) -> float:
    if device == "cpu":
        begin = time.perf_counter()
        for _ in range(calls):
            run()
        return time.perf_counter() - begin
    first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    first.record()
    for _ in range(calls):
        run()
    last.record()
    last.synchronize()
    return first.elapsed_time(last) / 1e3


def captured(run: Callable[[], Any], calls: int = 1) -> Callable[[], None]:
    """`calls` calls of `run` in a CUDA graph; calling it replays them."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(calls):
            run()
    return graph.replay
