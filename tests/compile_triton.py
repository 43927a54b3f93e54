"""Compiles the Triton kernels for GPUs that need not be there, and prints what came of it as JSON.

    python tests/compile_triton.py 80 90

A program of its own because tests/test_triton.py may have Triton's interpreter in its process.
"""

from __future__ import annotations

import itertools
import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
import triton
from helpers import GIVEN, RNNPROP, RULES, lstm
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from fastl2l.kernels import launch, pack, step, window
from fastl2l.rule_config import RuleConfig

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
INTEGERS = {"numel": "i64", "first_block": "i64", "steps": "i32", "layer": "i32", "programs": "i32"}
NUMBERS = {"update_scale", "grad_scale", "decay", *(f"constant{i}" for i in range(launch.CONSTANTS))}


def rule(text, precision="tf32x3", dtype=torch.float32):
    return launch.Rule(RuleConfig.parse(text), 0.1, dtype, precision)


def compiled(kernel, capability, rule, state=None, **constants):
    """Registers, bytes of the stack and of shared memory, and matrix instructions in the PTX."""
    number = "fp64" if rule.dtype == torch.float64 else "fp32"

    def kind(name):
        if name in constants:
            return "constexpr"
        if name in INTEGERS:
            return INTEGERS[name]
        if name in NUMBERS:
            return "fp64"
        return "*" + {"state": state or number, "finite": "i1", "sums": "fp64"}.get(name, number)

    signature = {name: kind(name) for name in kernel.arg_names}
    aligned = {(i,): [["tt.divisibility", 16]] for i, type in enumerate(signature.values()) if type.startswith("*")}
    options = {"num_warps": rule.blocking()[1], **launch.OPTIONS}
    target = GPUTarget("cuda", capability[0] * 10 + capability[1], 32)
    result = triton.compile(ASTSource(kernel, signature, constants, aligned), target=target, options=options)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(result.asm["cubin"])
        file.flush()
        usage = subprocess.run(
            [TOOLS / "cuobjdump", "-res-usage", file.name], check=True, capture_output=True, text=True
        ).stdout
    found = dict(re.findall(r"(REG|STACK|LOCAL):(\d+)", usage))
    ptx = result.asm["ptx"]
    return {
        "registers": int(found["REG"]),
        "stack": int(found["STACK"]) + int(found["LOCAL"]),
        "shared": result.metadata.shared,
        "mma": len(re.findall(r"\bmma\.sync\S*\.tf32\.tf32", ptx)),
        "wgmma": len(re.findall(r"\bwgmma\.mma_async\S*\.tf32\.tf32", ptx)),
    }


def kernels(capability, rule):
    """The kernels that matter; those that Hopper has wide products in, all of them."""
    cell, plain, shape = rule.cell(capability), rule.blocks(), rule.shape
    gradient = {**plain, "PRECISION": rule.precision}
    absent = dict.fromkeys(("dstate", "dstate_first", "dgrads"))
    no_given = {} if shape.given else {"given": None}
    other, first = {"FIRST": False}, {"FIRST": True}
    yield "step", step.step_kernel, {**cell, **no_given}
    yield "forward, other", window.forward_kernel, {**cell, **other}
    yield "gradient, other", window.gradient_kernel, {**gradient, **other}
    yield "backward, last", window.backward_kernel, {**cell, **absent, **other, "LAST": True}
    if capability != (9, 0):
        return
    packing = {"RULE": shape, "ROWS": launch.ROWS}
    yield "pack", pack.pack_kernel, packing
    yield "unpack", pack.unpack_kernel, {**packing, "TOGETHER": launch.TOGETHER}
    yield "output backward", window.output_backward_kernel, plain
    yield "backward with states, last", window.backward_kernel, {**cell, **other, "LAST": True}
    if shape.direct:
        yield "forward, first", window.forward_kernel, {**cell, **first}
        yield "gradient, first", window.gradient_kernel, {**gradient, **first}
        yield "backward, first", window.backward_kernel, {**cell, **absent, **first, "LAST": False}
    else:
        yield "backward, other", window.backward_kernel, {**cell, **absent, **other, "LAST": False}
        yield "inputs", window.inputs_kernel, {**plain, **no_given}
        no_dgiven = {} if shape.given else {"dgiven": None}
        yield "inputs backward", window.inputs_backward_kernel, {**plain, **no_dgiven}
    if shape.projected:
        yield "projection gradient", window.projection_gradient_kernel, {**plain, **no_given}


def report(capabilities):
    for text, capability in itertools.product((lstm(), RNNPROP), capabilities):
        its_rule = rule(text)
        for name, kernel, constants in kernels(capability, its_rule):
            found = compiled(kernel, capability, its_rule, **constants)
            yield {"rule": text, "kernel": name, "capability": capability} | found
    for capability in capabilities:
        constants = {**rule(lstm()).cell(capability), "given": None}
        found = compiled(step.step_kernel, capability, rule(lstm()), "bf16", **constants)
        yield {"rule": lstm(), "kernel": "step, state in bfloat16", "capability": capability} | found
    # What only a compiler finds: that the other variants are valid at all.
    variants = [(lstm(), "ieee"), (lstm(), "float64"), *((text, "tf32x3") for text in RULES + GIVEN)]



if __name__ == "__main__":
    json.dump(list(report([divmod(int(arch), 10) for arch in sys.argv[1:]])), sys.stdout, indent=1)
