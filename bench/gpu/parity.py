"""Stage "tests": all backends against float64, determinism, streams, graphs; by pytest, as in `make test`."""

from __future__ import annotations

import re
import subprocess
import sys
import threading
from typing import Any

from harness import CUDA_ONLY, ROOT, Findings, arguments

# What takes seconds for each new shape is Triton's compiler: side by side they are done in half the time.
RUNS = {
    "native": ["tests/test_gpu.py", "-k", "not triton"],
    "triton": ["tests/test_gpu.py", "-k", "triton"],
    "triton alone": ["tests/test_triton.py"],
}
OUTCOME = re.compile(r"^(\S+?)::(\w+)(\[.*\])? (PASSED|FAILED|SKIPPED|ERROR|XFAIL|XPASS)")


class Counts:
    """Outcomes of tests by run and test function: they come one by one, from several processes."""

    def __init__(self, findings: Findings) -> None:
        self._findings, self._lock = findings, threading.Lock()
        self.tests: dict[str, dict[str, dict[str, int]]] = {}
        self.failures: list[str] = []
        self.statuses: dict[str, int] = {}

    def add(self, run: str, line: str) -> None:
        match = OUTCOME.match(line)
        if match is None:
            return
        file, function, case, outcome = match.groups()
        with self._lock:
            counts = self.tests.setdefault(run, {}).setdefault(function, {})
            counts[outcome.lower()] = counts.get(outcome.lower(), 0) + 1
            if outcome in ("FAILED", "ERROR"):
                self.failures.append(f"{file}::{function}{case or ''}")
            self._findings.update(tests=self.tests, failures=self.failures)

    def end(self, run: str, status: int) -> None:
        with self._lock:
            self.statuses[run] = status
            self._findings.update(exit_statuses=self.statuses)

    def total(self, outcome: str) -> int:
        return sum(counts.get(outcome, 0) for run in self.tests.values() for counts in run.values())


def follow(run: str, selection: list[str], counts: Counts) -> None:
    """Run pytest and count its tests as they end."""
    command = [sys.executable, "-m", "pytest", "-v", "-rs", "--color=no", "-p", "no:cacheprovider", *selection]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert process.stdout is not None
    for line in process.stdout:
        print(f"{run}: {line}", end="")
        counts.add(run, line)
    counts.end(run, process.wait())


def main() -> int:
    args = arguments()
    findings = Findings(args.out)
    counts = Counts(findings)
    runs = {"native": RUNS["native"]} if args.quick and args.device == "cpu" else RUNS
    threads = [threading.Thread(target=follow, args=(*run, counts)) for run in runs.items()]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    totals: dict[str, Any] = {outcome: counts.total(outcome) for outcome in ("passed", "failed", "error", "skipped")}
    findings.update(totals=totals)
    if args.device == "cpu":
        findings.leave_out(CUDA_ONLY)
    return max(counts.statuses.values())


if __name__ == "__main__":
    raise SystemExit(main())
