"""What there is to run on: versions, backends and the reasons why one is missing, folders. `fastl2l env` shows it."""

from __future__ import annotations

import platform
from importlib import metadata

import torch
from rich.table import Table
from rich.text import Text

from fastl2l.build import cache_folder
from fastl2l.ops.dispatch import available_backends
from fastl2l.tasks.datasets import data_folder


def describe() -> dict[str, dict[str, str]]:
    """Everything a bug report should say about this installation: section -> name -> value, in the order to show."""
    return {
        "versions": _versions(),
        "backends": {name: reason or "available" for name, reason in available_backends().items()},
        "processor": _processor(),
        "folders": {"data (FASTL2L_DATA)": str(data_folder()), "cache (FASTL2L_CACHE)": str(cache_folder())},
    }


def render(description: dict[str, dict[str, str]]) -> Table:
    """What :func:`describe` returned, as a table that rich can print."""
    table = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    for section, entries in description.items():
        table.add_row(Text(section, "bold"))
        for name, value in entries.items():
            table.add_row(f"  {name}", Text(value))
    return table


def _versions() -> dict[str, str]:
    versions = {"fastl2l": _version("fastl2l"), "python": platform.python_version(), "torch": str(torch.__version__)}
    # From the metadata: torchvision and triton are slow to import, or cannot be without CUDA.
    versions |= {name: _version(name) for name in ("torchvision", "triton", "numpy")}
    return versions | {"CUDA": _cuda()}


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"


def _cuda() -> str:
    if torch.version.cuda is None:
        return "none: torch was built without it"
    devices = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    return f"{torch.version.cuda}, {', '.join(devices) or 'no device'}"


def _processor() -> dict[str, str]:
    native = available_backends()["native"] is None
    return {
        "architecture": platform.machine(),
        "instruction set (FASTL2L_CPU_ISA)": torch.ops.fastl2l.cpu_isa() if native else "none: no native backend",
        "threads": str(torch.get_num_threads()),
    }
