"""Stage "machine": what it is, its versions, and the bandwidth that everything is compared with."""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
from typing import Any

import torch
from harness import Findings, arguments, measure

from fastl2l.environment import describe

QUERY = "name,driver_version,memory.total,clocks.sm,clocks.max.sm,clocks.mem,power.limit,temperature.gpu"


def gpu() -> dict[str, Any]:
    """What torch says of the current CUDA device."""
    properties = torch.cuda.get_device_properties(0)
    return {
        "name": properties.name,
        "capability": ".".join(map(str, torch.cuda.get_device_capability(0))),
        "multiprocessors": properties.multi_processor_count,
        "memory_bytes": properties.total_memory,
        "l2_bytes": properties.L2_cache_size,
        "cudnn": torch.backends.cudnn.version(),
    }


def nvidia_smi() -> dict[str, str] | str:
    """Driver and clocks as they are now."""
    if shutil.which("nvidia-smi") is None:
        return "nvidia-smi is not there"
    command = ["nvidia-smi", f"--query-gpu={QUERY}", "--format=csv,noheader", "--id=0"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        return (done.stdout + done.stderr).strip()[:300]
    return dict(zip(QUERY.split(","), done.stdout.strip().split(", "), strict=True))


def compiler(command: str) -> str:
    if shutil.which(command) is None:
        return "not there"
    text = subprocess.run([command, "--version"], capture_output=True, text=True, check=False).stdout
    release = re.search(r"release .*", text)
    return release.group() if release else text.splitlines()[0]


def copy_bandwidth(device: str, size: int) -> dict[str, float]:
    """Of one large copy within the device's memory, bytes read and bytes written both counted."""
    source = torch.randn(size // 4, device=device)
    target = torch.empty_like(source)
    timing = measure(lambda: target.copy_(source), device, 2.0, most=100)
    return {
        "bytes": 2 * source.nbytes,
        "bytes_per_ns": 2 * source.nbytes / timing["median_s"] / 1e9,
        "lowest_bytes_per_ns": 2 * source.nbytes / timing["high_s"] / 1e9,
        "samples": timing["samples"],
    }


def main() -> int:
    args = arguments()
    findings = Findings(args.out)
    known = describe()
    findings.update(
        **{section: known[section] for section in ("versions", "backends", "processor")},
        system=f"{platform.system()} {platform.release()}, {os.cpu_count()} processors",
        nvcc=compiler("nvcc"),
        cxx=compiler(os.environ.get("CXX", "c++").split()[0]),
    )
    if args.device == "cuda":
        findings.update(gpu=gpu(), before=nvidia_smi())
        size = min(4 << 30, torch.cuda.mem_get_info()[0] // 4)
        findings.update(copy=copy_bandwidth("cuda", size))
        findings.update(after_copy=nvidia_smi())
    else:
        findings.update(gpu=None, copy=copy_bandwidth("cpu", 16 << 20 if args.quick else 1 << 28))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
