"""The CUDA kernels, run by an emulator on the host: as accurate as PyTorch, one result only, nothing out of bounds."""

from __future__ import annotations

import itertools
import math
import os
import subprocess
import sys

import pytest
import torch
from emulated_cuda import SANITIZE, backend, compile_library, elementwise, set_multiprocessors
from helpers import (
    Case,
    assert_accurate,
    assert_bfloat16_is_float32_rounded,
    assert_bfloat16_steps_are_accurate,
    assert_halves_are_rounded_to_even,
    backward_by,
    constants,
    detached,
    random_gradients,
    random_rows,
    random_rule,
    steps_by,
    tiles,
)

from fastl2l.ops.layout import from_rows, new_state, to_rows

FAST = ((20, 2), (20, 1), (12, 3))
"""Hidden units and layers that portable/run_cuda_kernels.cpp has kernels on tensor cores for."""
GENERIC = ((7, 3), (33, 1), (32, 2))
SIZES = ((1, 1, 64), (1, 20, 64), (15, 1, 16), (16, 2, 16), (17, 5, 16))
"""Coordinates, steps, and how often to draw."""
CASES = [
    *(Case(pre, *shape, *size) for pre, shape, size in itertools.product(("raw", "log_sign"), FAST, SIZES)),
    *(Case(pre, 20, 2, 63, 20, 8) for pre in ("raw", "log_sign")),
    *(Case(pre, *shape, 17, 5, 8) for pre, shape in itertools.product(("raw", "log_sign"), GENERIC)),
    Case("log_sign", 20, 2, 1000, 5, 1),
    Case("log_sign", 20, 2, 9, 70, 16),  # several segments, the last one shorter
]
EXTREMES = [
    Case(preprocess, 20, 2, 17, 5, 16, **extreme)
    for preprocess in ("raw", "log_sign")
    for extreme in ({"gain": 10.0}, {"gain": 0.01}, {"magnitude": 1e30}, {"magnitude": 1e-36})
]
"""Saturated gates, gates that are hardly open, huge gradients, denormal gradients."""


@pytest.fixture(scope="session")
def library(tmp_path_factory):
    path = tmp_path_factory.mktemp("emulated") / "kernels.so"
    compile_library(path, [])
    return path


@pytest.fixture(scope="session")
def emulated(library):
    return backend(library)


def window_arguments(rule, n=37, steps=4, seed=0):
    grads, adjoints = (random_gradients(steps, n, seed=seed + i).to(rule.dtype) for i in (0, 1))
    state, dstate = (tiles(random_rows(rule, n, seed + i), rule.dtype) for i in (0, 1))
    return state, grads, adjoints, dstate


def bits(*tensors):
    return [tensor.contiguous().view(torch.uint8).numpy().tobytes() for tensor in tensors]


@pytest.mark.parametrize(
    "case",
    CASES + EXTREMES,
    ids=lambda case: "-".join(str(field) for field in case),
)
def test_float32_is_as_accurate_as_pytorch(emulated, case):
    assert_accurate(steps_by(emulated, case, torch.float32) | backward_by(emulated, case, torch.float32), case)


@pytest.mark.parametrize("shape", [(20, 2), (7, 3)])
def test_float64_is_as_accurate_as_pytorch(emulated, shape):
    case = Case("log_sign", *shape, 17, 5, 8)
    assert_accurate(steps_by(emulated, case, torch.float64) | backward_by(emulated, case, torch.float64), case)


@pytest.mark.parametrize("size", [(1, 5, 32), (17, 5, 16), (100, 2, 4)])
@pytest.mark.parametrize("shape", FAST + GENERIC)
def test_steps_with_state_in_bfloat16_are_as_accurate_as_pytorch(emulated, shape, size):
    assert_bfloat16_steps_are_accurate(emulated, Case("log_sign", *shape, *size))


@pytest.mark.parametrize("n", [1, 37])
@pytest.mark.parametrize("shape", FAST + GENERIC)
def test_state_in_bfloat16_is_what_float32_is_rounded_to(emulated, shape, n):
    assert_bfloat16_is_float32_rounded(emulated, random_rule(hidden=shape[0], layers=shape[1]), n)


def test_state_in_bfloat16_is_rounded_to_even(emulated):
    assert_halves_are_rounded_to_even(emulated)


@pytest.mark.parametrize("function", ["sigmoid", "tanh"])
def test_activations_are_accurate(library, function):
    # The emulator's 2^x and 1 / x are as wrong as the hardware's may be: by 2^-22 and 2^-23 of the result.
    magnitudes = torch.logspace(-30, 3, 200_001, dtype=torch.float64).float()
    x = torch.cat([magnitudes, -magnitudes, torch.tensor([0.0, math.inf, -math.inf])])
    power = torch.exp2(x.double())
    truth = 1 / (1 + power) if function == "sigmoid" else torch.tanh(x.double() * (math.log(2) / 2))
    found = elementwise(library, x, function).double()
    normal = truth.abs() >= torch.finfo(torch.float32).tiny
    assert ((found - truth).abs() / truth.abs())[normal].max() < 5 * 2**-23
    assert (found - truth).abs()[~normal].max() <= torch.finfo(torch.float32).tiny
    assert elementwise(library, torch.tensor([math.nan]), function).isnan().all()


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [(20, 2), (7, 3)])
def test_many_parameters_of_all_dtypes_are_the_same_as_one_by_one(emulated, shape, stored):
    rule = random_rule(hidden=shape[0], layers=shape[1], output_scale=0.01)
    dtypes = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
    sizes = [(7 * i) % 40 for i in range(150)]  # more than one launch, some of them empty
    numbers = [torch.randn(size, generator=torch.Generator().manual_seed(size)) for size in sizes]
    params = [x.to(dtypes[i % 4]) for i, x in enumerate(numbers)]
    grads = [random_gradients(size, seed=i).clamp(-1e4, 1e4).to(dtypes[i % 4]) for i, size in enumerate(sizes)]
    states, rest = [new_state(rule, size, dtype=stored) for size in sizes], (detached(rule), *constants(rule), 0.5)
    expected = []
    for param, grad, state in zip(params, grads, states, strict=True):
        alone, its_state = param.clone(), state.clone()
        emulated.step_([alone], [grad], [its_state], *rest)
        change = torch.zeros(param.shape)
        emulated.step_([change], [grad.float()], [state.clone()], *rest)
        wide = torch.promote_types(param.dtype, torch.float32)
        assert bits(alone) == bits((param.to(wide) + change.to(wide)).to(param.dtype))
        expected += [alone, to_rows(its_state, param.numel())]
    emulated.step_(params, grads, states, *rest)
    found = itertools.chain(*((p, to_rows(s, p.numel())) for p, s in zip(params, states, strict=True)))
    assert bits(*found) == bits(*expected)


@pytest.mark.parametrize("shape", [(20, 2), (7, 3)])
@pytest.mark.parametrize("before", [True, False])
@pytest.mark.parametrize("value", [1.0, math.nan, math.inf, -math.inf])
def test_a_step_that_is_asked_to_changes_nothing_unless_all_gradients_are_finite(emulated, shape, before, value):
    rule = random_rule(hidden=shape[0], layers=shape[1])
    params, grads = ([torch.full((size,), 0.5) for size in [20] * 70] for _ in range(2))  # more than one launch
    states, finite = [new_state(rule, 20) for _ in params], torch.tensor([before])
    grads[68][19] = value
    emulated.step_(params, grads, states, detached(rule), *constants(rule), 1.0, finite)
    done = before and math.isfinite(value)
    assert finite.item() == done
    assert all(bool((param != 0.5).any()) == done for param in params)
    assert all(bool(state.any()) == done for state in states)


@pytest.mark.parametrize("value", [1.0, math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("place", [(0, 0), (69, 19), (40, 7)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16], ids=str)
def test_nonfinite_numbers_are_found_wherever_they_are(emulated, dtype, place, value):
    tensors = [torch.full((20,), 0.5, dtype=dtype) for _ in range(70)]  # more than one launch
    tensors[place[0]][place[1]] = value
    finite = torch.tensor([True])
    emulated.find_nonfinite_(finite, [*tensors, torch.zeros(0, dtype=dtype)])
    assert finite.item() == math.isfinite(value)
    emulated.find_nonfinite_(finite, tensors[:1] if place[0] else tensors[1:])  # and stay found
    assert finite.item() == math.isfinite(value)


@pytest.mark.parametrize("shape", [(20, 2), (12, 3), (7, 3)])
def test_what_is_not_asked_for_changes_nothing_else(emulated, shape):
    rule = random_rule(hidden=shape[0], layers=shape[1])
    state, grads, adjoints, dstate = window_arguments(rule)
    arguments = state, grads, adjoints, detached(rule), *constants(rule)
    everything = emulated.window_backward(*arguments, dstate, True, True)
    for need_dstate, need_dgrads in itertools.product((True, False), repeat=2):
        found = emulated.window_backward(*arguments, dstate, need_dstate, need_dgrads)
        assert bits(found[0]) == bits(everything[0])
        if need_dstate:
            assert bits(to_rows(found[1], 37)) == bits(to_rows(everything[1], 37))
        if need_dgrads:
            assert bits(found[2]) == bits(everything[2])
    without = emulated.window_backward(*arguments, None, False, True)
    zeros = emulated.window_backward(*arguments, torch.zeros_like(dstate), False, True)
    assert bits(without[0], without[2]) == bits(zeros[0], zeros[2])


@pytest.mark.parametrize("shape", [(20, 2), (7, 3)])
def test_the_number_of_multiprocessors_changes_no_bit(library, emulated, shape):
    rule, n = random_rule(hidden=shape[0], layers=shape[1]), 700
    arguments, results = window_arguments(rule, n, 2), []
    for count in (1, 3, 100):
        set_multiprocessors(library, count)
        state, grads, adjoints, dstate = (tensor.clone() for tensor in arguments)
        rest = detached(rule), *constants(rule)
        found = emulated.window_backward(state, grads, adjoints, *rest, dstate, True, True)
        param = torch.zeros(n)
        emulated.step_([param], [grads[0]], [state], *rest, 1.0)
        results.append(bits(found[0], to_rows(found[1], n), found[2], param, to_rows(state, n)))
    set_multiprocessors(library, 3)
    assert results[0] == results[1] == results[2]


@pytest.mark.parametrize("shape", [(20, 2), (7, 3)])
@pytest.mark.parametrize("preprocess", ["raw", "log_sign"])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 1e38])
def test_a_strange_gradient_stays_in_its_coordinate(emulated, preprocess, shape, value):
    rule, n, place = random_rule(preprocess, *shape), 37, 17
    others, rest = torch.arange(n) != place, (detached(rule), *constants(rule))
    state, grads, adjoints, dstate = window_arguments(rule, n)
    strange = grads.clone()
    strange[2, place] = value
    before, after = (
        emulated.window_backward(state, gradients, adjoints, *rest, dstate, True, True)
        for gradients in (grads, strange)
    )
    for one, other in zip(before[1:], after[1:], strict=True):
        one, other = (x if x.dim() == 2 else to_rows(x, n) for x in (one, other))
        assert bits(one[:, others]) == bits(other[:, others])
    assert after[0].isnan().any() or not math.isnan(value)
    param, its_state = torch.zeros(n), tiles(random_rows(rule, n))
    emulated.step_([param], [strange[2]], [its_state], *rest, 1.0)
    assert param[others].isfinite().all()
    assert param[place].isnan() == math.isnan(value)
    assert to_rows(its_state, n)[:, place].isnan().all() == math.isnan(value)


def test_unused_lanes_reach_nothing_and_any_address_will_do(emulated):
    rule, n = random_rule(), 37
    rest = detached(rule), *constants(rule)
    state, grads, adjoints, dstate = window_arguments(rule, n)  # NaN where there is no coordinate
    clean = [from_rows(to_rows(tensor, n)) for tensor in (state, dstate)]
    moved = [torch.cat([torch.zeros(1), x.flatten()])[1:].view(x.shape) for x in clean]
    expected = emulated.window_backward(clean[0], grads, adjoints, *rest, clean[1], True, True)
    for first, last in ((state, dstate), moved):
        found = emulated.window_backward(first, grads, adjoints, *rest, last, True, True)
        assert bits(found[0], to_rows(found[1], n), found[2]) == bits(expected[0], to_rows(expected[1], n), expected[2])
    halves = clean[0].bfloat16()
    odd = torch.cat([halves.new_zeros(1), halves.flatten()])[1:].view(halves.shape)
    for states in ((clean[0], moved[0]), (halves, odd)):
        results = []
        for x in states:
            param = torch.zeros(n)
            emulated.step_([param], [grads[0]], [x], *rest, 1.0)
            results.append(param)
        torch.testing.assert_close(*results)


SANITIZED = """
import sys
import torch
from emulated_cuda import backend
from helpers import Case, assert_bfloat16_is_float32_rounded, backward_by, steps_by
torch.set_num_threads(1)
emulated = backend(sys.argv[1])
for shape in ((20, 2), (12, 3), (7, 3)):
    for n, steps in ((1, 1), (17, 3), (140, 2), (3, 33)):
        case = Case("log_sign", *shape, n, steps, 1)
        steps_by(emulated, case, torch.float32)
        backward_by(emulated, case, torch.float32)
    assert_bfloat16_is_float32_rounded(emulated, case.rules()[0], 37)
backward_by(emulated, case, torch.float64)
print("done")
"""


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
        [sys.executable, "-c", SANITIZED, str(library)],
        env=os.environ | variables,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert result.returncode == 0, result.stderr[-5000:]
    assert result.stdout.strip() == "done"
