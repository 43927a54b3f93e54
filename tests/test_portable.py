"""What needs no torch: the plain kernels, cross-compiled and in an emulator; and how threads share.

On this machine every test that goes by instruction sets has them too, as "generic".
"""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import (
    RULES,
    assert_as_accurate_as_pytorch,
    constants,
    detached,
    random_gradients,
    random_rows,
    rule_of,
    tiles,
)

from fastl2l import build
from fastl2l.ops import reference
from fastl2l.ops.layout import new_state, to_rows

HERE = Path(__file__).parent / "portable"
COMPILER, EMULATOR = "aarch64-linux-gnu-g++", ("qemu-aarch64", "-L", "/usr/aarch64-linux-gnu")


@pytest.fixture(scope="session")
def program(tmp_path_factory):
    missing = [tool for tool in (COMPILER, EMULATOR[0]) if shutil.which(tool) is None]
    if missing and os.environ.get("CI") != "true":  # CI installs them, and must not do without
        pytest.skip(f"needs {' and '.join(missing)}")
    csrc = build.source_folder()
    sources = [str(path) for path in csrc.glob("cpu/*.cpp") if not path.name.endswith("operators.cpp")]
    flags = [flag for flag in build.CXX_FLAGS if not flag.startswith("-g")]
    target = tmp_path_factory.mktemp("aarch64") / "run_kernels"
    subprocess.run([COMPILER, *flags, f"-I{csrc}", HERE / "run_kernels.cpp", *sources, "-o", target], check=True)
    return [*EMULATOR, str(target)]


def run(program, rule, n, steps, numbers, folder):
    (folder / "in").write_bytes(np.concatenate([tensor.numpy().ravel() for tensor in numbers]).tobytes())
    subprocess.run([*program, folder / "in", folder / "out", rule.text, str(n), str(steps)], check=True)
    found = torch.from_numpy(np.fromfile(folder / "out", np.float32))
    state = new_state(rule, n)
    return found.split([n, state.numel(), sum(weight.numel() for weight in rule.weights())]), state.shape


@pytest.mark.parametrize("text", RULES)
def test_plain_kernels_are_accurate(program, text, tmp_path, monkeypatch):
    monkeypatch.setenv("FASTL2L_CPU_ISA", "generic")
    n, steps = 83, 5
    rule = rule_of(text, output_scale=0.1)
    gradients, adjoints = random_gradients(steps, n), torch.randn(steps, n, generator=torch.Generator().manual_seed(1))
    first = tiles(random_rows(rule, n), poison=0.0)
    (update, state, dweights), shape = run(
        program, rule, n, steps, [*detached(rule), first, gradients, adjoints], tmp_path
    )
    found = {"update": update, "state": to_rows(state.view(shape), n), "dweights": dweights}
    truth, single = (
        by_reference(rule, first.to(dtype), gradients.to(dtype), adjoints.to(dtype))
        for dtype in (torch.float64, torch.float32)
    )
    assert_as_accurate_as_pytorch(*({name: x[None] for name, x in one.items()} for one in (found, truth, single)))


def by_reference(rule, first, gradients, adjoints):
    weights, state, update = detached(rule, first.dtype), first.clone(), torch.zeros_like(gradients[0])
    for gradient in gradients:
        reference.step_([update], [gradient], [state], weights, *constants(rule), 1.0)
    dweights, *_ = reference.window_backward(first, gradients, adjoints, weights, *constants(rule), None, False, False)
    return {"update": update, "state": to_rows(state, update.numel()), "dweights": dweights}


def test_threads_do_everything_once_and_help_the_late_one(tmp_path):
    source, target = HERE / "run_share_out.cpp", tmp_path / "run_share_out"
    includes = [f"-I{HERE / 'threads'}", f"-I{build.source_folder()}"]
    subprocess.run(["c++", *build.CXX_FLAGS, "-pthread", *includes, source, "-o", target], check=True)
    result = subprocess.run([target], capture_output=True, text=True, timeout=60)
    assert result.returncode == 0, result.stdout
