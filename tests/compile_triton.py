"""Compiles the Triton kernels for GPUs that need not be there, and prints what came of it as JSON.

    python tests/compile_triton.py 80 90

A program of its own because tests/test_triton.py may have Triton's interpreter in its process.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from fastl2l.kernels import launch, pack, step, window

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
INTEGERS = {"numel": "i64", "first_block": "i64", "steps": "i32", "layer": "i32", "programs": "i32"}
POINTERS = {
    "param", "grad", "state", "weights", "packed", "grads", "adjoints", "dstate", "dstate_first", "dgrads",
    "workspace", "dgates", "dweights",
}  # fmt: skip


def rule(precision="tf32x3", dtype=torch.float32, preprocess="log_sign", hidden=20):
    return launch.Rule(preprocess, 10.0, 0.1, 2, hidden, dtype, precision)


def compiled(kernel, capability, rule, state=None, **constants):
    """Registers, bytes of the stack and of shared memory, and matrix instructions in the PTX."""
    number = "fp64" if rule.dtype == torch.float64 else "fp32"

    def kind(name):
        if name in constants:
            return "constexpr"
        if name == "state" and state:
            return f"*{state}"
        if name == "finite":
            return "*i1"
        if name in POINTERS:
            return f"*{number}"
        return INTEGERS.get(name) or ("*fp64" if name == "sums" else "fp64")

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
    cell = rule.cell(capability)
    gradient = {name: value for name, value in cell.items() if name != "WIDE"}
    absent = dict.fromkeys(("dstate", "dstate_first", "dgrads"))
    yield "step", step.step_kernel, cell
    yield "forward, other", window.forward_kernel, {**cell, "FIRST": False}
    yield "gradient, other", window.gradient_kernel, {**gradient, "FIRST": False}
    yield "backward, last", window.backward_kernel, {**cell, **absent, "FIRST": False, "LAST": True}
    if capability == (9, 0):
        packing = {**rule.sizes(), "FEATURES": rule.features, "ROWS": launch.ROWS}
        yield "pack", pack.pack_kernel, packing
        yield "unpack", pack.unpack_kernel, {**packing, "TOGETHER": launch.TOGETHER}
        yield "output gradient", window.output_gradient_kernel, {**rule.sizes(), "BLOCK": cell["BLOCK"]}
        yield "forward, first", window.forward_kernel, {**cell, "FIRST": True}
        yield "gradient, first", window.gradient_kernel, {**gradient, "FIRST": True}
        yield "backward, first", window.backward_kernel, {**cell, **absent, "FIRST": True, "LAST": False}
        yield "backward with states, last", window.backward_kernel, {**cell, "FIRST": False, "LAST": True}


def report(capabilities):
    for capability in capabilities:
        for name, kernel, constants in kernels(capability, rule()):
            yield {"kernel": name, "capability": capability} | compiled(kernel, capability, rule(), **constants)
        found = compiled(step.step_kernel, capability, rule(), "bf16", **rule().cell(capability))
        yield {"kernel": "step, state in bfloat16", "capability": capability} | found
    # What only a compiler finds: that the other variants are valid at all.
    variants = {
        "ieee": rule("ieee"),
        "float64": rule("ieee", torch.float64),
        "raw": rule(preprocess="raw", hidden=5),
    }
    for variant, its_rule in variants.items():
        constants = its_rule.cell((9, 0))
        for name, kernel, more in (
            ("step", step.step_kernel, {}),
            ("backward", window.backward_kernel, {"FIRST": True, "LAST": True}),
        ):
            found = compiled(kernel, (9, 0), its_rule, **constants, **more)
            yield {"kernel": f"{name}, {variant}", "capability": (9, 0)} | found


if __name__ == "__main__":
    json.dump(list(report([divmod(int(arch), 10) for arch in sys.argv[1:]])), sys.stdout, indent=1)
