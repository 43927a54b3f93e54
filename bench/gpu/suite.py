"""Runs the stages one after the other, each a process with a time limit, and keeps what they find after every one."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

import torch
from harness import ROOT
from marks import judge

from fastl2l.files import write_json

HERE = Path(__file__).parent
RESULTS, PICTURE, TRACE = "results.json", "speed.png", "trace.json.gz"
BAD = ("failed", "timed out", "cut off")
SPARE = 0.7
"""Share of its limit after which a stage starts nothing new."""
PATIENCE = 10
"""Times as long a dry run may take: it has work for seconds, but perhaps a busy machine."""


@dataclass(frozen=True)
class Stage:
    """A process that does one thing.

    Args:
        name: in the results, and of its log.
        command: what to run; it is given --out, --device, --seconds and --quick.
        limit: seconds after which it is killed.
        expected: seconds that it is likely to take.
    """

    name: str
    command: tuple[str, ...]
    limit: float
    expected: float

    @property
    def file(self) -> str:
        return re.sub(r"\W+", "-", self.name)


def stages(folder: Path) -> list[Stage]:
    """The most valuable first. Their limits add up to less than ten minutes."""

    def script(name: str, *arguments: str) -> tuple[str, ...]:
        return (sys.executable, str(HERE / name), *arguments)

    return [
        Stage("build", script("building.py"), 110, 70),
        Stage("machine", script("machine.py"), 20, 8),
        Stage("tests", script("parity.py"), 120, 90),
        Stage("sanitizer", script("sanitize.py"), 75, 50),
        Stage("speed: native", script("speed.py", "native"), 60, 40),
        Stage("speed: eager", script("speed.py", "eager"), 30, 20),
        Stage("speed: compile", script("speed.py", "compile"), 55, 50),
        Stage("speed: triton", script("speed.py", "triton"), 40, 35),
        Stage("speed: lstm", script("speed.py", "lstm"), 20, 12),
        Stage("training", script("training.py"), 35, 25),
        Stage("profile", script("profiling.py", str(folder / TRACE)), 15, 10),
        Stage("figure", script("picture.py", str(folder / RESULTS), str(folder / PICTURE)), 10, 4),
    ]


class Suite:
    """A run of some stages, and its results file, which is whole after every stage."""

    def __init__(self, folder: Path, device: str, quick: bool) -> None:
        self.folder, self.device, self.quick = folder, device, quick
        self.results: dict[str, Any] = {"about": about(device, quick), "stages": {}, "marks": []}
        self._process: subprocess.Popen[bytes] | None = None
        self._environment = os.environ | {"PYTHONUNBUFFERED": "1"}
        self._environment.setdefault("MAX_JOBS", str(os.cpu_count() or 1))
        path = [str(ROOT), os.environ.get("PYTHONPATH", "")]
        self._environment["PYTHONPATH"] = os.pathsep.join(part for part in path if part)

    def run(self, chosen: Sequence[Stage]) -> int:
        """Run the stages; 0 if none has failed."""
        for stage in chosen:
            self.results["stages"][stage.name] = {"outcome": "not run"}
        self._save()
        with self._interruptible():
            for number, stage in enumerate(chosen):
                left = sum(later.expected for later in chosen[number:])
                place = f"[{number + 1}/{len(chosen)}]"
                say(f"{place} {stage.name}: about {stage.expected:.0f} of the {left:.0f} s that are left")
                self._run(stage)
        say(self.summary())
        return int(any(stage["outcome"] in BAD for stage in self.results["stages"].values()))

    def _run(self, stage: Stage) -> None:
        found, log = self.folder / f"{stage.file}.json", self.folder / "logs" / f"{stage.file}.log"
        log.parent.mkdir(parents=True, exist_ok=True)
        found.unlink(missing_ok=True)
        entry = self.results["stages"][stage.name]
        limit = stage.limit * (PATIENCE if self.quick else 1)
        entry |= {"outcome": "running", "limit_s": limit, "log": str(log.relative_to(self.folder))}
        self._save()
        begin, status, outcome = time.monotonic(), None, "cut off"
        options = ["--out", str(found), "--device", self.device, "--seconds", str(SPARE * limit)]
        command = [*stage.command, *options, *(["--quick"] if self.quick else [])]
        try:
            with log.open("wb") as file:
                self._process = subprocess.Popen(
                    command, cwd=ROOT, env=self._environment, stdout=file, stderr=subprocess.STDOUT,
                    start_new_session=True,
                )  # fmt: skip
                status = self._process.wait(limit)
            outcome = "failed" if status else "passed"
        except subprocess.TimeoutExpired:
            outcome = "timed out"
        finally:
            self._kill()
            entry |= {"outcome": outcome, "seconds": time.monotonic() - begin, "exit_status": status}
            if found.exists():
                entry["found"] = json.loads(found.read_text())
                found.unlink()
            if outcome == "passed" and "left_out" in entry.get("found", {}):
                entry["outcome"] = "left out"
            self._save()
        if outcome in BAD and stage.name == "build":
            # Each later stage would try again.
            self._environment["FASTL2L_NATIVE"] = "0"
        say(f"    {describe(stage.name, entry)}")

    def _kill(self) -> None:
        """End the stage's processes, those that it has started included."""
        if self._process is not None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
            self._process = None

    @contextlib.contextmanager
    def _interruptible(self) -> Any:
        """Being told to end ends the stage that is running, too, and keeps what it has found."""

        def stop(number: int, frame: FrameType | None) -> NoReturn:
            raise SystemExit(128 + number)

        before = {number: signal.signal(number, stop) for number in (signal.SIGTERM, signal.SIGINT)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _save(self) -> None:
        self.results["marks"] = judge(self.results["stages"])
        write_json(self.folder / RESULTS, self.results)

    def summary(self) -> str:
        lines = ["", f"on {self.results['about']['device']}; details in {self.folder / RESULTS}", ""]
        lines += [describe(name, entry) for name, entry in self.results["stages"].items()]
        lines += ["", "What it must reach on an H200:"]
        return "\n".join(lines + [describe_mark(mark) for mark in self.results["marks"]])


def say(text: str) -> None:
    print(text, flush=True)


def describe(name: str, entry: dict[str, Any]) -> str:
    """A stage in a line."""
    text = f"{name:16} {entry['outcome']:10}"
    if "seconds" in entry:
        text += f" {entry['seconds']:6.1f} s"
    if entry["outcome"] in BAD:
        text += f"  see {entry['log']}"
    return text + (f"  {reason}" if (reason := entry.get("found", {}).get("left_out")) else "")


def describe_mark(mark: dict[str, Any]) -> str:
    """A mark in a line."""
    outcome = {True: "reached", False: "MISSED", None: "not measured"}[mark["reached"]]
    wanted = f"at least {mark['at_least']:g}" if "at_least" in mark else f"at most {mark['at_most']:g}"
    measured = mark["why"] if mark["measured"] is None else f"{mark['measured']:.3g}, {wanted}"
    return f"{outcome:12} {mark['mark']}: {measured}"


def about(device: str, quick: bool) -> dict[str, Any]:
    return {
        "command": shlex.join(["python", "bench/gpu", *sys.argv[1:]]),
        "started": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "commit": _git("rev-parse", "--short", "HEAD"),
        "changed_files": _git("status", "--short").splitlines(),
        "device": torch.cuda.get_device_name(0) if device == "cuda" else "CPU",
        "quick": quick,
    }


def _git(*arguments: str) -> str:
    """Empty where there is no git, or no repository."""
    with contextlib.suppress(OSError):
        done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=False)
        return done.stdout.strip() if done.returncode == 0 else ""
    return ""


def default_folder(device: str, quick: bool) -> Path:
    """One for each GPU; a dry run's results are nobody's."""
    if device == "cpu" or quick:
        return ROOT / "build" / "gpu-dry-run"
    name = re.sub(r"\W+", "-", torch.cuda.get_device_name(0)).strip("-").lower()
    return ROOT / "bench" / "results" / name


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python bench/gpu",
        description="Build, tests, compute-sanitizer, benchmarks, training, profile and figure on this machine's GPU.",
        epilog="example: python bench/gpu --only build,machine,tests",
    )
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--quick", action="store_true", help="a dry run: small sizes, numbers that mean nothing")
    parser.add_argument("--out", type=Path, help="folder for the results (bench/results/DEVICE, for dry runs build/)")
    parser.add_argument("--only", metavar="STAGE,...", help="these stages alone")
    args = parser.parse_args(arguments)
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("there is no CUDA device, or torch is built without CUDA; --quick --device cpu is a dry run")
    args.out = (args.out or default_folder(args.device, args.quick)).resolve()
    known = stages(args.out)
    names = [stage.name for stage in known] if args.only is None else args.only.split(",")
    for name in names:
        if name not in {stage.name for stage in known}:
            parser.error(f"--only: expected some of {', '.join(stage.name for stage in known)}, got {name!r}")
    args.stages = [stage for stage in known if stage.name in names]
    return args


def main(arguments: Sequence[str] | None = None) -> int:
    args = parse(arguments)
    return Suite(args.out, args.device, args.quick).run(args.stages)
