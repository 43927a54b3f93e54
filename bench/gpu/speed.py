"""Stages "speed: ...": step and meta-gradient by one implementation, for as many sizes as memory and time allow.

Each implementation is a process of its own, so that none is disturbed by what another has left behind.
"""

from __future__ import annotations

import functools
import gc
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from harness import CUDA_ONLY, Findings, arguments, captured, measure, reason

# isort: split
import competitors
from competitors import BYTES, STATE_BYTES, Runner, Workload

from fastl2l import FusedLSTMOptimizer, LSTMRule
from fastl2l.ops.dispatch import native_missing, triton_missing

OURS = {"native": native_missing, "triton": triton_missing}
UNROLL = 20
SIZES = {
    "step": (1_000, 12_288, 49_152, 1_000_000, 10_000_000, 100_000_000),
    "meta-gradient": (1_000, 12_288, 49_152, 1_000_000, 10_000_000, 20_000_000, 100_000_000),
}
QUICK_SIZES = (1_000, 3_000)
MARKED = [
    ("step", 1_000_000),
    ("step", 49_152),
    ("step", 12_288),
    ("meta-gradient", 1_000_000),
    ("meta-gradient", 20_000_000),
]
"""What the marks are about comes before the rest."""
WORTH_COMPILING = [
    ("step", 49_152), ("meta-gradient", 1_000_000), ("step", 1_000_000), ("meta-gradient", 49_152), ("step", 12_288),
    ("step", 10_000_000),
]  # fmt: skip
"""Seconds of compilation each."""
GRAPHS_UP_TO = {"step": 10_000_000, "meta-gradient": 49_152}
"""Beyond, the gaps between launches are no part of the time."""
CHECKED = {"compile": 49_152}
"""Where it is checked what is computed: 1,003, but what has been compiled for it should be of use."""
MOST_TURNS = 64
MANY_TENSORS = [320, 16] * 150
"""Numbers in the parameters of 150 layers of 20 to 16 units."""


class Case(NamedTuple):
    what: str
    coordinates: int
    state: str
    modes: tuple[str, ...]
    kind: str = "lstm"


OTHER_RULES = [("step", 49_152, "rnnprop"), ("meta-gradient", 49_152, "rnnprop")]
"""One size says what another rule costs beside the LSTM rule."""


def cases(who: str, quick: bool) -> list[Case]:
    """In the order in which they are worth their time."""
    everything = [(what, numel) for what in SIZES for numel in SIZES[what]]
    places = WORTH_COMPILING if who == "compile" else [*MARKED, *(place for place in everything if place not in MARKED)]
    if quick:
        places = [(what, numel) for what in SIZES for numel in QUICK_SIZES]
    found = []
    for what, numel in places:
        states = ("float32", "bfloat16") if who in OURS and what == "step" else ("float32",)
        modes = ("launches", "graph") if numel <= GRAPHS_UP_TO[what] else ("launches",)
        found += [Case(what, numel, state, modes) for state in states]
    if who != "lstm":  # torch's nn.LSTM has no projection
        numels = {what: QUICK_SIZES[0] if quick else numel for what, numel, _ in OTHER_RULES}
        others = [Case(what, numels[what], "float32", ("launches",), kind) for what, _, kind in OTHER_RULES]
        marked = len([case for case in found if (case.what, case.coordinates) in MARKED])
        found[marked:marked] = others
    return found


def implementation(who: str, state: str, quick: bool) -> Callable[[Workload], Runner]:
    if who in OURS:
        return functools.partial(competitors.fastl2l, backend=who, state_dtype=getattr(torch, state))
    if who == "compile":
        torch.compiler.reset()  # each size gets code of its own, not the first size's made general
        # In a dry run Dynamo alone: the compiler takes longer than all the rest.
        return functools.partial(competitors.compiled, dynamic=False, **({"backend": "eager"} if quick else {}))
    return {"eager": competitors.eager, "lstm": competitors.whole_lstm}[who]


def turns(numel: int, state: str, device: str) -> int:
    """States to take in turn, so that none is in the cache when its turn comes: twice the cache, within reason."""
    cache = torch.cuda.get_device_properties(0).L2_cache_size if device == "cuda" else 1 << 20
    size = numel * STATE_BYTES // 2 * getattr(torch, state).itemsize // 4
    return max(1, min(MOST_TURNS, math.ceil(2 * cache / size)))


def workload(case: Case, device: str) -> Workload:
    if case.what == "meta-gradient":
        return Workload.of(case.coordinates, UNROLL, device, kind=case.kind)
    in_turn = turns(case.coordinates, case.state, device)
    return Workload.of(case.coordinates, in_turn, device, in_turn, case.kind)


def describe(case: Case, who: str) -> dict[str, Any]:
    what = case.what if case.kind == "lstm" else f"{case.what} of {case.kind}"
    return {"who": who, "what": what, "coordinates": case.coordinates, "state": case.state}


def run_case(case: Case, who: str, device: str, seconds: float, quick: bool) -> list[dict[str, Any]]:
    """A row for each mode: times, or why there are none."""
    about = describe(case, who)
    try:
        work = workload(case, device)
        runner = implementation(who, case.state, quick)(work)
        run = runner.step if case.what == "step" else runner.meta_gradient
        memory = peak_memory(run) if device == "cuda" else {}
    except Exception as error:  # the next size may fit
        return [about | {"mode": mode, "failed": reason(error)} for mode in case.modes]
    steps = UNROLL if case.what == "meta-gradient" else 1
    rows = []
    for mode in case.modes:
        row = about | {"mode": mode, "turns": work.turns} | memory
        if mode == "graph" and device == "cpu":
            rows.append(row | {"failed": CUDA_ONLY})
            continue
        try:
            replay, calls = (captured(run, work.turns), work.turns) if mode == "graph" else (run, 1)
            timing = measure(replay, device, seconds, least=3, most=5 if quick else 200)
        except Exception as error:
            rows.append(row | {"failed": reason(error)})
            continue
        timing |= {name: timing[name] / calls for name in ("median_s", "low_s", "high_s")}
        rows.append(row | timing | {"ns_per_coordinate_step": timing["median_s"] / case.coordinates / steps * 1e9})
    return rows


def peak_memory(run: Callable[[], Any]) -> dict[str, int]:
    """Most bytes of tensors in a call: all, and beyond what was there before."""
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    run()
    peak = torch.cuda.max_memory_allocated()
    return {"peak_bytes": peak, "extra_bytes": peak - before}


def free_memory(device: str) -> None:
    gc.collect()
    if device == "cuda":
        torch.cuda.empty_cache()


def check(who: str, device: str, quick: bool, kind: str = "lstm") -> None:
    """What is timed computes the same, within what float32 allows over 20 steps."""
    work = Workload.of(1003 if quick else CHECKED.get(who, 1003), UNROLL, device, kind=kind)
    mine, plain = implementation(who, "float32", quick)(work), competitors.eager(work)
    torch.testing.assert_close(mine.step(), plain.step(), rtol=1e-4, atol=1e-6)
    expected = plain.meta_gradient()
    torch.testing.assert_close(mine.meta_gradient(), expected, rtol=1e-2, atol=1e-3 * expected.abs().max().item())


# The optimizer as it is used, on one tensor and on many


def optimizer_rows(backend: str, device: str, quick: bool) -> list[dict[str, Any]]:
    models = {"one tensor": [1_000 if quick else 49_152], "300 tensors": MANY_TENSORS[:4] if quick else MANY_TENSORS}
    modes: list[dict[str, Any]] = [{}, {"nonfinite": "propagate"}]
    if device == "cuda":
        modes.append({"capturable": True, "nonfinite": "skip"})
    rows = []
    for model, sizes in models.items():
        for options in modes:
            row = {"model": model, "coordinates": sum(sizes), "who": backend, **options}
            try:
                rows.append(row | measure(optimizer_step(sizes, backend, device, options), device, 0.5, most=50))
            except Exception as error:
                rows.append(row | {"failed": reason(error)})
    return rows


def optimizer_step(sizes: list[int], backend: str, device: str, options: dict[str, Any]) -> Callable[[], Any]:
    params = [torch.nn.Parameter(torch.zeros(size, device=device)) for size in sizes]
    for param in params:
        param.grad = torch.full_like(param, 1e-3)
    optimizer = FusedLSTMOptimizer(params, LSTMRule(seed=0).to(device), backend=backend, **options)
    return captured(optimizer.step) if optimizer.capturable else optimizer.step


def main() -> int:
    args = arguments("who")
    findings, who = Findings(args.out, args.seconds), args.who
    findings.update(rows=[], bytes_a_coordinate_and_step=BYTES)
    if who in OURS and (missing := OURS[who](torch.device(args.device))):
        findings.leave_out(missing)
        return 0
    torch.backends.cudnn.allow_tf32 = False  # float32 for everyone
    check(who, args.device, args.quick)
    if who != "lstm":
        check(who, args.device, args.quick, "rnnprop")
    each = 0.02 if args.quick else 0.5
    for case in cases(who, args.quick):
        if findings.out_of_time:
            for mode in case.modes:
                findings.add("rows", describe(case, who) | {"mode": mode, "failed": "left out: no time left"})
            continue
        for row in run_case(case, who, args.device, each, args.quick):
            findings.add("rows", row)
        free_memory(args.device)
    if who in OURS:
        for row in optimizer_rows(who, args.device, args.quick):
            findings.add("optimizer", row)
    return int(who in OURS and any(is_failure(row) for rows in ("rows", "optimizer") for row in findings.found[rows]))


def is_failure(row: dict[str, Any]) -> bool:
    """Whether one of our rows has failed for another reason than the machine's."""
    allowed = (CUDA_ONLY, "out of memory", "left out")
    return "failed" in row and not row["failed"].startswith(allowed)


if __name__ == "__main__":
    raise SystemExit(main())
