"""Stage "build": the native kernels from this checkout's sources, and the registers and stack that they take."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import time
from importlib import util
from pathlib import Path
from typing import Any

import torch
from harness import Findings, arguments

from fastl2l import build
from fastl2l.ops.dispatch import native_missing

USAGE = re.compile(r"Function (\S+):\s+REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)")


def library() -> Path:
    """The shared library that this process has loaded."""
    maps = Path("/proc/self/maps").read_text()
    return Path(re.findall(r"(/\S*(?:fastl2l_C|_C\.abi3)\.so)", maps)[-1])


def cuobjdump() -> str | None:
    """CUDA's, or the one that comes with Triton."""
    if found := shutil.which("cuobjdump"):
        return found
    triton = util.find_spec("triton")
    path = Path(triton.origin).parent / "backends/nvidia/bin/cuobjdump" if triton and triton.origin else None
    return str(path) if path and path.exists() else None


def resources(path: Path) -> list[dict[str, Any]] | str:
    """Registers, stack and local memory (where spilled registers go) of every kernel, by architecture."""
    tool = cuobjdump()
    if tool is None:
        return "cuobjdump is not there"
    dump = subprocess.run([tool, "--dump-resource-usage", str(path)], capture_output=True, text=True, check=False)
    rows = []
    for part in re.split(r"(?m)^arch = ", dump.stdout)[1:]:
        for name, registers, stack, shared, local in USAGE.findall(part):
            numbers = {"registers": registers, "stack": stack, "static_shared": shared, "local": local}
            rows.append(
                {"kernel": _readable(name), "architecture": part.split()[0]}
                | {key: int(value) for key, value in numbers.items()}
            )
    return rows


def _readable(mangled: str) -> str:
    """The kernel's name out of a mangled one."""
    return next(iter(re.findall(r"(\w+?_kernel)", re.sub(r"\d+", " ", mangled))), mangled)


def main() -> int:
    args = arguments()
    findings = Findings(args.out)
    begin = time.monotonic()
    os.environ["FASTL2L_REQUIRE_EXT"] = "1"
    build.load_native()
    findings.update(seconds=time.monotonic() - begin, library=library().name, flags=build.parameters().compile_args)
    if missing := native_missing(torch.device(args.device)):
        print(f"{missing}: remove {build.PACKAGE}/_C.* if it was built for a torch without CUDA; nvcc must be on PATH")
        return 1
    if args.device == "cuda":
        findings.update(resources=resources(library()))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
