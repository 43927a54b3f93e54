"""Stage "sanitizer": small_case.py under each tool of NVIDIA's compute-sanitizer."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

from harness import CUDA_ONLY, ROOT, Findings, arguments

TOOLS = {
    "memcheck": [],
    "racecheck": ["--racecheck-report", "all"],
    "initcheck": [],
    "synccheck": [],
}
FOUND = 86
"""Exit status for errors that a tool has found, unlike any of Python's."""
SUMMARY = re.compile(r"=+ (?:ERROR|RACECHECK) SUMMARY: (.*)")
UNSUPPORTED = "Device not supported"


def case(device: str) -> list[str]:
    return [sys.executable, str(Path(__file__).with_name("small_case.py")), device]


def verdict(status: int, output: str) -> dict[str, Any]:
    """What a tool's exit status and output say."""
    row: dict[str, Any] = {"exit_status": status, "ran": re.findall(r"^ran: (\w+)", output, re.MULTILINE)}
    summary = SUMMARY.findall(output)
    row["summary"] = summary[-1] if summary else "none"
    if UNSUPPORTED in output:
        return row | {"outcome": "device not supported"}
    clean = status == 0 and bool(summary) and bool(row["ran"])
    return row | {"outcome": "clean" if clean else "errors" if status == FOUND else "failed"}


def main() -> int:
    args = arguments()
    findings = Findings(args.out)
    tool = shutil.which("compute-sanitizer") or shutil.which("/usr/local/cuda/bin/compute-sanitizer")
    if args.device == "cpu" or tool is None:
        status = subprocess.run(case(args.device), cwd=ROOT, check=False).returncode
        findings.update(without_tools={"exit_status": status})
        findings.leave_out(CUDA_ONLY if args.device == "cpu" else "compute-sanitizer is not there")
        return status
    # Every tensor in an allocation of its own: neighbours in one of torch's would hide what goes past an end.
    environment = os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    running = {}
    for name, options in TOOLS.items():
        command = [tool, "--tool", name, *options, "--error-exitcode", str(FOUND), *case(args.device)]
        log = args.out.with_name(f"{name}.log").open("w+")
        process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=log, stderr=subprocess.STDOUT)
        running[name] = process, log
    for name, (process, log) in running.items():
        status = process.wait()
        log.seek(0)
        output = log.read()
        log.close()
        print(f"--- {name}\n{output}")
        findings.add("tools", {"tool": name} | verdict(status, output))
    outcomes = {row["outcome"] for row in findings.found["tools"]}
    if outcomes == {"device not supported"}:
        findings.leave_out("compute-sanitizer does not support this device here")
        return 0
    return int(outcomes != {"clean"})


if __name__ == "__main__":
    raise SystemExit(main())
