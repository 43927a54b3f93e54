"""The CUDA sources compile without a GPU or a torch for CUDA: without spills, and with products on tensor cores."""

from __future__ import annotations

import os
import re
import shutil
import subprocess

import pytest
from torch.utils.cpp_extension import include_paths

from fastl2l import build

ARCHITECTURES = ("sm_80", "sm_90")
REGISTERS = {"step_kernel": 128, "window_backward_kernel": 255}
"""The most that let as many blocks run at once as the kernels are written for, of 256 threads: 2 and 1."""
VARIANTS = {"step_kernel": 4, "window_backward_kernel": 2}
"""For the sizes of both papers: a step for state in float32 and one for bfloat16; a window."""


@pytest.fixture(scope="module")
def nvcc():
    path = shutil.which("nvcc") or shutil.which(f"{os.environ.get('CUDA_HOME', '/usr/local/cuda')}/bin/nvcc")
    if path is None and os.environ.get("CI") != "true":  # CI installs it, and must not do without
        pytest.skip("needs nvcc")
    assert path is not None, "nvcc is not on PATH"

    def run(*arguments: object) -> str:
        sources = [f"-I{path}" for path in build.parameters().include_dirs]
        sources += [f"-isystem={path}" for path in include_paths()]
        command = [path, "-Xcompiler=-fPIC", *sources, *map(str, arguments)]
        result = subprocess.run(command, capture_output=True, text=True)
        assert result.returncode == 0, result.stderr
        return result.stderr

    return run


@pytest.fixture(scope="module")
def compiled(nvcc, tmp_path_factory):
    """What nvcc says of all sources, and the folder that it has kept what it makes on the way in."""
    sources, folder = sorted(build.source_folder().glob("cuda/*.cu")), tmp_path_factory.mktemp("cuda")
    assert sources
    flags = [*build.parameters().compile_args["nvcc"], "-Xptxas=-v", "--keep", f"--keep-dir={folder}", "-c"]
    return "".join(nvcc(*flags, source, "-o", folder / f"{source.stem}.o") for source in sources), folder


@pytest.mark.slow
def test_all_sources_compile_and_no_kernel_spills(compiled):
    report, _ = compiled
    assert "warning" not in report, report
    kernel = (
        r"Compiling entry function '(\w+)' for '(\w+)'"
        r".*?(\d+) bytes spill stores, (\d+) bytes spill loads.*?Used (\d+) registers"
    )
    seen = re.findall(kernel, report, re.DOTALL)
    assert len(seen) == report.count("Compiling entry function")
    for architecture in ARCHITECTURES:
        for name, most in REGISTERS.items():
            # Mangled names hold the length of every part: generic_step_kernel is another.
            entries = [entry for entry in seen if entry[1] == architecture and f"{len(name)}{name}" in entry[0]]
            assert len(entries) == VARIANTS[name], (name, architecture)
            for mangled, *_, registers in entries:
                assert int(registers) <= most, f"{mangled} takes {registers} registers on {architecture}"
                print(f"{architecture} {mangled}: {registers} registers")
    assert [entry for entry in seen if entry[2:4] != ("0", "0")] == []
    assert set(re.findall(r"(\d+) bytes spill", report)) == {"0"}  # of functions that are not inlined, too


def test_fast_kernels_multiply_on_tensor_cores(compiled):
    _, folder = compiled
    ptx = "".join(path.read_text() for path in folder.glob("*.compute_80.ptx"))
    bodies = dict(re.findall(r"\.entry (\w+)\((.*?)\n}\n", ptx, re.DOTALL))
    product = "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32"
    for name in REGISTERS:
        found = [body for mangled, body in bodies.items() if f"{len(name)}{name}" in mangled]
        assert len(found) == VARIANTS[name]
        for body in found:
            assert body.count(product) % 3 == 0
            assert body.count(product) >= 3 * 8, name
    assert len([body for body in bodies.values() if product in body]) == sum(VARIANTS.values())
    rounding = "cvt.rn.bf16x2.f32"  # of two neighbours, which are stored as one word: h and c of both layers
    assert sorted(body.count(rounding) for body in bodies.values() if product in body) == [0, 0, 0, 0, 4, 4]
