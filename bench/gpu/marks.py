"""What the kernels must reach on an H200, and whether they did."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import harness  # noqa: F401  (finds the competitors)

# isort: split
from competitors import BYTES, STATE_BYTES

LARGE = 1_000_000
OURS = ("native", "triton")
"""In the order in which backend="auto" takes them."""


class NotMeasured(Exception):
    """Why there is no number."""

    reached: bool | None = None


class OutOfMemory(NotMeasured):
    """There is none since it does not fit, which is the worst that a mark of what must fit can have."""

    reached = False


@dataclass(frozen=True)
class Mark:
    """A number that the measured one must not be on the wrong side of."""

    text: str
    limit: float
    at_least: bool
    measure: Callable[[Results], float]

    def judge(self, results: Results) -> dict[str, Any]:
        mark = {"mark": self.text, ("at_least" if self.at_least else "at_most"): self.limit}
        try:
            measured = self.measure(results)
        except NotMeasured as why:
            return mark | {"measured": None, "reached": why.reached, "why": str(why)}
        reached = measured >= self.limit if self.at_least else measured <= self.limit
        return mark | {"measured": measured, "reached": reached}


class Results:
    """The stages' findings, asked for what the marks are about."""

    def __init__(self, stages: dict[str, dict[str, Any]]) -> None:
        self._found = {name: stage.get("found") or {} for name, stage in stages.items()}
        self._rows = [row for found in self._found.values() for row in found.get("rows", [])]
        self.backend = next((who for who in OURS if any(row["who"] == who for row in self._rows)), OURS[0])

    def row(self, what: str, who: str, numel: int, mode: str = "launches", state: str = "float32") -> dict[str, Any]:
        wanted = {"what": what, "who": who, "coordinates": numel, "mode": mode, "state": state}
        name = f"{what} by {who}, N = {numel:,}, {mode}, {state}"
        for row in self._rows:
            if all(row.get(key) == value for key, value in wanted.items()):
                if "failed" in row:
                    raise NotMeasured(f"{name}: {row['failed']}")
                return row
        raise NotMeasured(f"{name}: not measured")

    def seconds(self, what: str, who: str, numel: int, mode: str = "launches") -> float:
        return self.row(what, who, numel, mode)["median_s"]

    def times_faster(self, what: str, than: str, numel: int, mode: str) -> float:
        return self.seconds(what, than, numel, mode) / self.seconds(what, self.backend, numel, mode)

    def copy(self) -> float:
        """Bytes a nanosecond."""
        try:
            return self._found["machine"]["copy"]["bytes_per_ns"]
        except KeyError:
            raise NotMeasured("the copy bandwidth was not measured") from None

    def share_of_copy(self, state: str) -> float:
        """The smallest over all large sizes that memory allows."""
        self.row("step", self.backend, LARGE, state=state)
        shares = [
            share_of_copy(row, self.copy())
            for row in self._rows
            if row["who"] == self.backend and row["what"] == "step" and row["coordinates"] >= LARGE
            if row["state"] == state and row.get("mode") == "launches" and "failed" not in row
        ]
        return min(shares)

    def times_memory_floor(self, numel: int) -> float:
        """The time of a meta-gradient in units of that of copying as many bytes as it must move."""
        floor = BYTES["meta-gradient"] / self.copy()
        return self.row("meta-gradient", self.backend, numel)["ns_per_coordinate_step"] / floor

    def share_of_memory(self, numel: int) -> float:
        """Most memory in use in a meta-gradient, as a share of the card's."""
        try:
            row = self.row("meta-gradient", self.backend, numel)
        except NotMeasured as why:
            raise OutOfMemory(str(why)) if str(why).endswith(": out of memory") else why from None
        gpu = self._found.get("machine", {}).get("gpu")
        if not gpu:
            raise NotMeasured("there is no GPU")
        return row["peak_bytes"] / gpu["memory_bytes"]

    def failed_tests(self, function: str) -> float:
        counts = self._found.get("tests", {}).get("tests", {}).get(self.backend, {}).get(function, {})
        failed = counts.get("failed", 0) + counts.get("error", 0)
        if failed + counts.get("passed", 0) == 0:
            raise NotMeasured(f"{function} did not run with backend {self.backend}")
        if not failed and self.backend not in self._found["tests"].get("exit_statuses", {}):
            raise NotMeasured(f"the tests of backend {self.backend} did not end")
        return float(failed)


def share_of_copy(row: dict[str, Any], copy_bytes_per_ns: float) -> float:
    """What a step moves of its state alone, as a share of what a copy moves in the same time."""
    size = STATE_BYTES if row["state"] == "float32" else STATE_BYTES // 2
    return size / row["ns_per_coordinate_step"] / copy_bytes_per_ns


MARKS = (
    Mark(
        "step, float32 state, N >= 1,000,000: share of the copy bandwidth at 640 bytes a coordinate",
        0.85, True, lambda results: results.share_of_copy("float32"),
    ),
    Mark(
        "step, bfloat16 state, N >= 1,000,000: share of the copy bandwidth at 320 bytes a coordinate",
        0.75, True, lambda results: results.share_of_copy("bfloat16"),
    ),
    Mark(
        "step, N = 49,152, in CUDA graphs: times faster than eager PyTorch",
        8, True, lambda results: results.times_faster("step", "eager", 49_152, "graph"),
    ),
    Mark(
        "step, N = 49,152, in CUDA graphs: times faster than torch.compile",
        4, True, lambda results: results.times_faster("step", "compile", 49_152, "graph"),
    ),
    Mark(
        "step, N = 12,288, in a CUDA graph: microseconds",
        8, False, lambda results: results.seconds("step", results.backend, 12_288, "graph") * 1e6,
    ),
    Mark(
        "meta-gradient at unroll 20, N = 1,000,000: times faster than eager autograd",
        10, True, lambda results: results.times_faster("meta-gradient", "eager", LARGE, "launches"),
    ),
    Mark(
        "meta-gradient at unroll 20, N = 1,000,000: times faster than torch.compile",
        5, True, lambda results: results.times_faster("meta-gradient", "compile", LARGE, "launches"),
    ),
    Mark(
        "meta-gradient at unroll 20, N = 1,000,000: times its memory floor",
        3, False, lambda results: results.times_memory_floor(LARGE),
    ),
    Mark(
        "meta-gradient at unroll 20, N = 20,000,000: share of the card's memory",
        1, False, lambda results: results.share_of_memory(20_000_000),
    ),
    Mark(
        "float32: tests that find an error of more than twice PyTorch's",
        0, False, lambda results: results.failed_tests("test_steps_and_windows_are_as_accurate_as_pytorch"),
    ),
    Mark(
        "tests that find other bits in another run",
        0, False, lambda results: results.failed_tests("test_any_run_gives_the_same_bits"),
    ),
)  # fmt: skip


def judge(stages: dict[str, dict[str, Any]]) -> list[dict[str, Any]]:
    """Every mark with what was measured and whether it is reached: None where it could not be measured, and why."""
    results = Results(stages)
    return [mark.judge(results) | {"backend": results.backend} for mark in MARKS]
