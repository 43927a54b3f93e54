"""What Triton's compiler makes of the kernels, for GPUs that need not be there."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib import metadata, util
from pathlib import Path

import pytest
from helpers import GIVEN, LSTMS, RNNPROP, RULES, lstm

from fastl2l.ops import dispatch

if util.find_spec("triton") is None and os.environ.get("CI") != "true":
    pytest.skip("needs triton", allow_module_level=True)

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    """What compile_triton.py says of each kernel; in a process of its own, as tests/test_triton.py may interpret."""
    variables = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    package = str(Path(dispatch.__file__).parents[2])
    variables |= {"PYTHONPATH": package, "TRITON_CACHE_DIR": str(tmp_path_factory.mktemp("triton"))}
    program = Path(__file__).with_name("compile_triton.py")
    result = subprocess.run(
        [sys.executable, program, "80", "90"], env=variables, capture_output=True, text=True, timeout=600
    )
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout)


HOPPER, AMPERE = [9, 0], [8, 0]
SHARED = {8: 99 * 1024, 9: 227 * 1024}


def test_kernels_fit_the_gpu(compiled):
    assert {tuple(kernel["capability"]) for kernel in compiled} == {(8, 0), (9, 0)}
    assert {kernel["rule"] for kernel in compiled} >= {*RULES, *GIVEN} - {*LSTMS}
    for kernel in compiled:
        assert kernel["registers"] <= 255, kernel
        assert kernel["shared"] <= SHARED[kernel["capability"][0]], kernel


def most_stack(kernel):
    """Bytes that may spill: the few loop invariants that do not fit, read back from L1.

    Of Ampere's instructions, which take both operands from registers; where a window's last state has a gradient, which
    only the functional form has; and of exact products, most of a layer that reads x.
    """
    name = kernel["kernel"]
    if kernel["rule"] == RNNPROP and name == "backward, ieee":
        return 256
    return 160 if kernel["capability"] == AMPERE or "states" in name or "float64" in name else 0


def test_the_rules_of_the_papers_spill_nothing(compiled):
    if not metadata.version("triton").startswith("3.6."):  # which `make` installs, and so CI
        pytest.skip("the figures are those of Triton 3.6")
    for kernel in compiled:
        if kernel["rule"] in (lstm(), RNNPROP):
            assert kernel["stack"] <= most_stack(kernel), kernel


def test_matrix_instructions_are_where_they_are_meant(compiled):
    for kernel in compiled:
        part, _, variant = kernel["kernel"].partition(",")
        multiplies = part in ("step", "forward", "gradient", "backward", "backward with states")
        tensor_cores = multiplies and not variant.endswith(("ieee", "float64"))
        assert (kernel["wgmma"] > 0) == (tensor_cores and kernel["capability"] == HOPPER), kernel
        assert (kernel["mma"] > 0) == (tensor_cores and kernel["capability"] == AMPERE), kernel
