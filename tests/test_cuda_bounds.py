"""The CUDA kernels, run by an emulator on the host: nothing is read or written out of bounds."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
from emulated_cuda import ANY_SIZE, FAST, SANITIZE, compile_library
from helpers import GIVEN

SANITIZED = """
import sys
import torch
from emulated_cuda import backend
from helpers import Case, assert_bfloat16_is_float32_rounded, backward_by, steps_by
torch.set_num_threads(1)
emulated = backend(sys.argv[1])
for rule in sys.argv[2:]:
    for n, steps in ((1, 1), (17, 3), (140, 2), (3, 33)):
        case = Case(rule, n, steps, 1)
        steps_by(emulated, case, torch.float32)
        backward_by(emulated, case, torch.float32)
    if case.rules()[0].config.takes_bfloat16_state and not case.rules()[0].config.given:
        assert_bfloat16_is_float32_rounded(emulated, case.rules()[0], 37)
    backward_by(emulated, case, torch.float64)
print("done")
"""


@pytest.mark.slow
def test_nothing_is_read_or_written_out_of_bounds(tmp_path):
    library = tmp_path / "kernels.so"
    compile_library(library, SANITIZE)
    runtime = [
        subprocess.run(["c++", f"-print-file-name={name}"], check=True, capture_output=True, text=True).stdout.strip()
        for name in ("libasan.so", "libubsan.so", "libstdc++.so")
    ]
    variables = {
        "LD_PRELOAD": " ".join(runtime),
        "ASAN_OPTIONS": "detect_leaks=0:detect_stack_use_after_return=0",
        "PYTHONMALLOC": "malloc",  # so that memory ends where a tensor does
        "PYTHONPATH": os.pathsep.join(sys.path),
    }
    result = subprocess.run(
        [sys.executable, "-c", SANITIZED, str(library), *FAST, *ANY_SIZE, *GIVEN],
        env=os.environ | variables,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert result.returncode == 0, result.stderr[-5000:]
    assert result.stdout.strip() == "done"
