"""The CUDA kernels without a GPU: compiled by the C++ compiler with portable/cuda_emulator.h in place of CUDA."""

from __future__ import annotations

import ctypes
import subprocess
from pathlib import Path

import torch
from helpers import RNNPROP, lstm

from fastl2l import build
from fastl2l.ops import dispatch

HERE = Path(__file__).parent / "portable"
SHAPES = "Shape<20, 2, 0>, Shape<20, 2, 20>, Shape<12, 3, 8>, Shape<12, 1, 4>"
"""All numbers of layers, both sizes, with what is projected and without: fewer than all, as compiling takes long."""
FLAGS = ["-std=c++20", "-O2", "-fPIC", "-shared", "-ffp-contract=off", "-Wno-unknown-pragmas"]
SANITIZE = ["-O1", "-g1", "-fsanitize=address,undefined", "-fno-sanitize-recover=undefined"]
SANITIZE += [f"-DFASTL2L_CUDA_SHAPES={SHAPES}"]
FAST = [
    "raw:0.7 lstm:20,20 linear",
    "log_sign:10 lstm:20,20 tanh",
    "adam:0.9,0.99,1e-06 lstm:20,20 linear",
    RNNPROP,
    "log_sign:5 elu:20 lstm:20,20 linear",
    "raw:0.7 lstm:20 tanh",
    "log_sign:10 lstm:12,12,12 linear",
    "adam:0.9,0.99,1e-06 elu:8 lstm:12,12,12 tanh",
    "raw:0.7 elu:4 lstm:12 linear",
]
"""All parts at the sizes that portable/run_cuda_kernels.cpp has kernels on tensor cores for."""
ANY_SIZE = [lstm(hidden=7, layers=3), "adam:0.9,0.99,1e-06 elu:33 lstm:5 tanh"]
"""Rules whose sizes have none, so that the kernels for every size take them."""
_DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16]


def compile_library(target: Path, flags: list[str]) -> None:
    sources = [f"-I{build.source_folder()}", f"-I{HERE}", str(HERE / "run_cuda_kernels.cpp")]
    subprocess.run(["c++", *FLAGS, *flags, *sources, "-o", str(target)], check=True)


def _pointers(tensors):
    assert all(tensor.is_contiguous() for tensor in tensors)
    return (ctypes.c_void_p * len(tensors))(*(tensor.data_ptr() for tensor in tensors))


def _sizes(tensors):
    numels = (ctypes.c_int64 * len(tensors))(*(tensor.numel() for tensor in tensors))
    dtypes = (ctypes.c_int * len(tensors))(*(_DTYPES.index(tensor.dtype) for tensor in tensors))
    return numels, dtypes


def _address(tensor):
    return ctypes.c_void_p(None if tensor is None else tensor.data_ptr())


def _rule(rule, update_scale):
    return rule.encode(), ctypes.c_double(update_scale)


def backend(library: Path) -> dispatch.Backend:
    """The operators, as schema.py has them, on the host."""
    kernels = ctypes.CDLL(str(library))

    def step_(
        params, grads, states, weights, rule, update_scale, grad_scale, finite=None, given=None, decay=0.0, rate=None,
        units=None,
    ):  # fmt: skip
        error = kernels.emulated_step(
            *_rule(rule, update_scale), ctypes.c_double(grad_scale), ctypes.c_double(decay), _address(rate),
            int(weights[0].dtype == torch.float64), int(states[0].dtype == torch.bfloat16), _pointers(weights),
            len(params), _pointers(params), _pointers(grads), _pointers(states), *_sizes(params),
            _address(finite), _address(given), _address(units),
        )  # fmt: skip
        assert error == 0

    def window_backward(
        state, grads, adjoints, weights, rule, update_scale, dstate, need_dstate, need_dgrads, given=None,
        need_dgiven=False,
    ):  # fmt: skip
        steps, numel = grads.shape
        need_dgiven = need_dgiven and given is not None
        dweights = state.new_full((sum(weight.numel() for weight in weights),), float("nan"))
        dstate_first = torch.full_like(state if need_dstate else state[:0], float("nan"))
        dgrads = torch.full_like(grads if need_dgrads else grads[:0], float("nan"))
        dgiven = torch.full_like(given, float("nan")) if need_dgiven else state.new_empty(0)
        results = [x if needed else None for x, needed in (
            (dstate_first, need_dstate), (dgrads, need_dgrads), (dgiven, need_dgiven), (dweights, True)
        )]  # fmt: skip
        error = kernels.emulated_window_backward(
            *_rule(rule, update_scale), int(weights[0].dtype == torch.float64),
            _pointers(weights), ctypes.c_int64(numel), ctypes.c_int64(steps),
            *map(_address, (state, grads, adjoints, dstate, given, *results)),
        )  # fmt: skip
        assert error == 0
        return dweights, dstate_first, dgrads, dgiven

    def find_nonfinite_(finite, tensors, in_float32=False):
        error = kernels.emulated_find_nonfinite(
            len(tensors), _pointers(tensors), *_sizes(tensors), int(in_float32), ctypes.c_void_p(finite.data_ptr())
        )
        assert error == 0

    return dispatch.Backend("emulated", step_, window_backward, find_nonfinite_)


def elementwise(library: Path, x: torch.Tensor, function: str) -> torch.Tensor:
    """The fast kernels' sigmoid (``1 / (1 + 2^x)``) or tanh (``(2^x - 1) / (2^x + 1)``)."""
    found = torch.empty_like(x)
    pointers = ctypes.c_void_p(x.data_ptr()), ctypes.c_void_p(found.data_ptr())
    ctypes.CDLL(str(library)).emulated_elementwise(int(function == "tanh"), *pointers, ctypes.c_int64(x.numel()))
    return found


def offset_of_output(library: Path, rule: str) -> int:
    """How many weights come before the output's, as the kernels for every size count them."""
    function = ctypes.CDLL(str(library)).emulated_offset_of_output
    function.restype = ctypes.c_int64
    return function(rule.encode())


def set_multiprocessors(library: Path, count: int) -> None:
    ctypes.c_int.in_dll(ctypes.CDLL(str(library)), "emulated_multiprocessors").value = count
