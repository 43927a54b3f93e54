"""Processes of Python that find torch imported, which takes seconds: forked from one that has done nothing else."""

from __future__ import annotations

import multiprocessing
import os
import subprocess
import sys
from collections.abc import Mapping
from multiprocessing.process import BaseProcess
from pathlib import Path

_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(["torch", "torch.utils.cpp_extension"])
OUTPUT, ERRORS = "output.txt", "errors.txt"


def start(code: str, variables: Mapping[str, str], folder: Path, outputs: Path | None = None) -> BaseProcess:
    """Run code as `python -c` does.

    Args:
        code: to be run.
        variables: of the environment, all of them; of PYTHON* only PYTHONPATH has an effect.
        folder: the current one.
        outputs: a folder for what is written; by default it goes where that of the tests does.
    """
    process = _CONTEXT.Process(target=_run, args=(code, dict(variables), str(folder), outputs), daemon=True)
    process.start()
    return process


def run(
    code: str, variables: Mapping[str, str], folder: Path, outputs: Path, timeout: float
) -> subprocess.CompletedProcess[str]:
    """The same to its end.

    Raises:
        subprocess.TimeoutExpired: it has not come to it.
    """
    process = start(code, variables, folder, outputs)
    process.join(timeout)
    if process.exitcode is None:
        process.kill()
        raise subprocess.TimeoutExpired(code, timeout)
    output, errors = ((outputs / name).read_text() for name in (OUTPUT, ERRORS))
    return subprocess.CompletedProcess(code, process.exitcode, output, errors)


def _run(code: str, variables: dict[str, str], folder: str, outputs: Path | None) -> None:
    os.environ.clear()
    os.environ.update(variables)
    os.chdir(folder)
    for number, name in enumerate((OUTPUT, ERRORS), 1) if outputs else ():
        with open(outputs / name, "wb") as file:
            os.dup2(file.fileno(), number)
    sys.path[:0] = [path for path in variables.get("PYTHONPATH", "").split(os.pathsep) if path]
    exec(compile(code, "<string>", "exec"), {"__name__": "__main__"})
