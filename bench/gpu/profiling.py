"""Stage "profile": what torch.profiler sees of a few steps of the optimizer and of a window of meta-training."""

from __future__ import annotations

import gzip
import tempfile
from pathlib import Path
from typing import Any

import torch
from harness import Findings, arguments, synchronize
from torch.profiler import ProfilerActivity, profile, record_function
from training import denoising

from fastl2l import FusedLSTMOptimizer, LSTMRule, Trajectory
from fastl2l.files import write_bytes

STEPS, UNROLL = 3, 20
MOST_BYTES = 2_000_000


def profiled(device: str, side: int) -> profile:
    """Steps of 3 x side x side coordinates and a window of them, after others that warm everything up."""
    rule = LSTMRule(seed=0).to(device)
    param = torch.nn.Parameter(torch.zeros(3 * side * side, device=device))
    param.grad = torch.full_like(param, 1e-3)
    optimizer = FusedLSTMOptimizer([param], rule)
    trajectory = Trajectory(denoising(side, device).sample(0), rule)

    def work() -> None:
        with record_function("steps"):
            for _ in range(STEPS):
                optimizer.step()
        with record_function("window"):
            trajectory.window([1.0] * UNROLL)
        synchronize(device)

    work()
    activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if device == "cuda" else [])
    with profile(activities=activities) as trace:
        work()
    return trace


def table(trace: profile, device: str) -> list[dict[str, Any]]:
    """Kernels on a GPU, operators on a CPU: their own time, the longest first."""
    kind = torch.autograd.DeviceType.CUDA if device == "cuda" else torch.autograd.DeviceType.CPU
    rows = [
        {
            "name": event.key[:120],
            "calls": event.count,
            "microseconds": event.self_device_time_total if device == "cuda" else event.self_cpu_time_total,
        }
        for event in trace.key_averages()
        if event.device_type == kind and not event.is_user_annotation
    ]
    return sorted(rows, key=lambda row: -row["microseconds"])


def compressed(trace: profile) -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        trace.export_chrome_trace(str(path))
        return gzip.compress(path.read_bytes(), 9)


def main() -> int:
    args = arguments("trace")
    findings = Findings(args.out)
    trace = profiled(args.device, 8 if args.quick else 128)
    findings.update(kernels=table(trace, args.device))
    for row in findings.found["kernels"][:12]:
        print(f"{row['microseconds']:12.1f} us {row['calls']:6} x  {row['name']}")
    data = compressed(trace)
    if len(data) > MOST_BYTES:
        print(f"the trace takes {len(data)} bytes, more than {MOST_BYTES}: not kept")
        return 1
    findings.update(trace=write_bytes(args.trace, data).name, trace_bytes=len(data))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
