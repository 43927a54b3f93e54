"""Ratios, rates and result files for the benchmarks."""

from __future__ import annotations

import platform
import shlex
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import fastl2l
from fastl2l.files import write_json


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--results", metavar="FILE", help="write medians, ratios and rates to this JSON file")


def _median_seconds(function: Callable[[], Any], repeats: int = 9) -> float:
    function()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        function()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


@pytest.fixture(scope="session")
def machine() -> dict[str, float]:
    """This machine's own rates: multiply-adds and bytes a nanosecond, on torch's threads."""
    n = 1024
    a, b, out = (torch.randn(n, n) for _ in range(3))
    source, target = torch.randn(1 << 25), torch.empty(1 << 25)
    sgemm = n**3 / _median_seconds(lambda: torch.mm(a, b, out=out)) / 1e9
    copy = 2 * source.nbytes / _median_seconds(lambda: target.copy_(source)) / 1e9
    small = torch.randn(1 << 16)
    exp = small.numel() / _median_seconds(lambda: torch.exp(small, out=small.clone()), 99) / 1e9
    return {"sgemm_multiply_adds_per_ns": sgemm, "copy_bytes_per_ns": copy, "exp_per_ns": exp}


def _rows(session: pytest.Session) -> list[dict[str, Any]]:
    benchmarks = getattr(session.config, "_benchmarksession", None)
    done = [bench for bench in benchmarks.benchmarks if not bench.has_error] if benchmarks else []
    return [{"group": b.group, **b.extra_info, "median_s": b.stats.median, "runs": b.stats.rounds} for b in done]


def pytest_sessionfinish(session: pytest.Session) -> None:
    rows = _rows(session)
    ours = {row["group"]: row["median_s"] for row in rows if row.get("who") == "fastl2l"}
    for row in rows:
        if row["group"] in ours:
            row["slower_than_fastl2l"] = row["median_s"] / ours[row["group"]]
    session.config.stash[_ROWS] = rows
    if rows and (path := session.config.getoption("--results")):
        write_json(path, {"about": _about(), "rows": rows})


_ROWS: pytest.StashKey[list[dict[str, Any]]] = pytest.StashKey()


def _about() -> dict[str, Any]:
    processor = "unknown"
    if Path("/proc/cpuinfo").exists():
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        processor = next((line.split(": ")[1] for line in lines if line.startswith("model name")), processor)
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    return {
        "command": shlex.join(["pytest", *sys.argv[1:]]),
        "fastl2l": fastl2l.__version__,
        "commit": commit.stdout.strip(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "processor": processor,
        "instruction_set": torch.ops.fastl2l.cpu_isa(),
        "threads": torch.get_num_threads(),
    }


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    rows = config.stash.get(_ROWS, [])
    if not rows:
        return
    terminalreporter.section("beside fastl2l, in this run")
    for row in rows:
        text = f"{row['group']:32} {row.get('who', ''):8} {row['median_s'] * 1e6:12.1f} us"
        if "ns_per_coordinate_step" in row:
            text += f" {row['ns_per_coordinate_step']:9.1f} ns a coordinate and step"
        if "slower_than_fastl2l" in row:
            text += f"  {row['slower_than_fastl2l']:6.2f} x fastl2l"
        if "times_sgemm" in row:
            text += f"  {row['times_sgemm']:5.2f} x sgemm"
        if "extra_bytes_per_coordinate" in row:
            text += f"  {row['extra_bytes_per_coordinate']:8.0f} extra bytes a coordinate"
        terminalreporter.write_line(text)
