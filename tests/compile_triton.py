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
from helpers import GIVEN, LSTMS, RNNPROP, RULES, lstm
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from fastl2l.kernels import launch, pack, step, window
from fastl2l.rule_config import RuleConfig

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
HOPPER = (9, 0)
INTEGERS = {"number": "i32", "numel": "i64", "first_block": "i64", "steps": "i32", "layer": "i32", "programs": "i32"}
NUMBERS = {"update_scale", "grad_scale", "decay", *(f"constant{i}" for i in range(launch.CONSTANTS))}


def rule(text, precision="tf32x3", dtype=torch.float32):
    return launch.Rule(RuleConfig.parse(text), 0.1, dtype, precision)


def compiled(kernel, capability, rule, state=None, **constants):
    """Registers, bytes of the stack and of shared memory, and matrix instructions in the PTX."""
    number = "fp64" if rule.dtype == torch.float64 else "fp32"
    absent = [] if rule.shape.given else ["given", "dgiven"]
    absent += ["doutputs"] if rule.shape.output == "none" else []
    constants |= {name: None for name in absent if name in kernel.arg_names}

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
        "rule": rule.config.text,
        "capability": capability,
        "registers": int(found["REG"]),
        "stack": int(found["STACK"]) + int(found["LOCAL"]),
        "shared": result.metadata.shared,
        "mma": len(re.findall(r"\bmma\.sync\S*\.tf32\.tf32", ptx)),
        "wgmma": len(re.findall(r"\bwgmma\.mma_async\S*\.tf32\.tf32", ptx)),
    }


def kernels(capability, rule):
    """The largest kernels; for Hopper, which has wide products in them, all of them."""
    cell = rule.cell(capability)
    gradient = {**rule.blocks(), "PRECISION": rule.precision}
    absent, other = dict.fromkeys(("dstate", "dstate_first", "dgrads")), {"FIRST": False}
    yield "step", step.step_kernel, cell
    yield "backward, last", window.backward_kernel, {**cell, **absent, **other, "LAST": True}
    if capability != HOPPER:
        return
    yield "forward, other", window.forward_kernel, {**cell, **other}
    yield "gradient, other", window.gradient_kernel, {**gradient, **other}
    packing, first = {"RULE": rule.shape, "ROWS": launch.ROWS}, {"FIRST": rule.shape.direct}
    yield "pack", pack.pack_kernel, packing
    yield "unpack", pack.unpack_kernel, {**packing, "TOGETHER": launch.TOGETHER}
    yield "backward with states, last", window.backward_kernel, {**cell, **other, "LAST": True}
    yield "forward, first", window.forward_kernel, {**cell, **first}
    yield "gradient, first", window.gradient_kernel, {**gradient, **first}
    yield "backward, first", window.backward_kernel, {**cell, **absent, **first, "LAST": False}
    yield from around_the_layers(rule)


def once(rule):
    """All parts of a rule once: what is in a step is in its way back too, but for rows that are given."""
    cell = rule.cell(HOPPER)
    if rule.shape.given or rule.precision != "tf32x3":
        yield "step", step.step_kernel, cell
    yield "backward", window.backward_kernel, {**cell, "FIRST": rule.shape.direct, "LAST": True}
    yield from around_the_layers(rule)


def around_the_layers(rule):
    """The kernels of a window that run no cells."""
    if rule.shape.output != "none":
        yield "output backward", window.output_backward_kernel, rule.blocks()
    if not rule.shape.direct:
        yield "inputs", window.inputs_kernel, rule.blocks()
        yield "inputs backward", window.inputs_backward_kernel, rule.blocks()
    if rule.shape.projected:
        yield "projection gradient", window.projection_gradient_kernel, rule.blocks()


def variants():
    """What only a compiler finds: that other rules and precisions are valid at all. Rules and what to call them."""
    yield rule(RNNPROP, "ieee"), ", ieee"
    yield rule(lstm(), "ieee", torch.float64), ", float64"
    for text in (lstm("raw", 5), *(text for text in (*RULES, *GIVEN) if text not in (*LSTMS, RNNPROP))):
        yield rule(text), ", other parts"


def report(capabilities):
    for text, capability in itertools.product((lstm(), RNNPROP), capabilities):
        for name, kernel, constants in kernels(capability, rule(text)):
            yield {"kernel": name} | compiled(kernel, capability, rule(text), **constants)
    constants = rule(lstm()).cell(HOPPER)
    yield {"kernel": "step, state in bfloat16"} | compiled(step.step_kernel, HOPPER, rule(lstm()), "bf16", **constants)
    for its_rule, variant in variants():
        for name, kernel, constants in once(its_rule):
            yield {"kernel": name + variant} | compiled(kernel, HOPPER, its_rule, **constants)


if __name__ == "__main__":
    json.dump(list(report([divmod(int(arch), 10) for arch in sys.argv[1:]])), sys.stdout, indent=1)
