"""The native kernels: as accurate as PyTorch, the same bits however they are run, and clear about bad arguments."""

from __future__ import annotations

import itertools
import math
import resource
import threading

import pytest
import torch
from conftest import supported_isas
from helpers import (
    DTYPES,
    GIVEN,
    ISAS,
    RNNPROP,
    RULES,
    SHAPES,
    Case,
    all_finite,
    assert_accurate,
    assert_bfloat16_is_float32_rounded,
    assert_bfloat16_steps_are_accurate,
    assert_halves_are_rounded_to_even,
    assert_one_state_does_for_all,
    assert_units_multiply_updates_alone,
    backward_by,
    by_reference,
    constants,
    detached,
    errors,
    inputs,
    lstm,
    random_gradients,
    random_rows,
    random_rule,
    rule_of,
    steps_by,
    tiles,
)

from fastl2l import reference
from fastl2l.ops import dispatch, update
from fastl2l.ops.layout import TILE, from_rows, new_state, state_shape, to_rows

NAN, INF = math.nan, math.inf
SIZES = ((1, 1, 64), (1, 20, 64), (15, 1, 16), (16, 2, 16), (17, 5, 16), (63, 20, 8), (1000, 5, 4))
"""Coordinates, steps, and how often to draw."""
LARGE = ((lstm(), 8200, 5, 4), (lstm(hidden=7, layers=3), 8200, 1, 4), (RNNPROP, 8200, 5, 4), (lstm(), 65537, 2, 1))
"""Several blocks in each of the parts whose weight gradients are summed."""
CASES = [
    *(Case(rule, *size) for rule, size in itertools.product(RULES + GIVEN, SIZES)),
    *(Case(*large) for large in LARGE),
]
EXTREMES = [
    Case(rule, 17, 5, 16, **extreme)
    for rule, largest in ((lstm("raw"), 1e30), (lstm("log_sign"), 1e30), (RNNPROP, 1e16))  # whose square is finite
    for extreme in ({"gain": 10.0}, {"gain": 0.01}, {"magnitude": largest}, {"magnitude": 1e-36}, {"magnitude": 0.0})
]
"""Saturated gates, gates that are hardly open, huge gradients, denormal gradients, none at all."""


def name(case: Case) -> str:
    return "-".join(str(field) for field in case)


def bits_equal(one, other) -> bool:
    """Equal to the bit; NaN equals NaN."""
    if isinstance(one, torch.Tensor):
        kind = {2: torch.int16, 4: torch.int32, 8: torch.int64}[one.element_size()]
        return one.dtype == other.dtype and torch.equal(one.contiguous().view(kind), other.contiguous().view(kind))
    return len(one) == len(other) and all(itertools.starmap(bits_equal, zip(one, other, strict=True)))


# Accuracy


# In this order the truth is worked out once for all instruction sets.
@pytest.mark.parametrize("isa", ISAS, indirect=True)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES + EXTREMES, ids=name)
def test_steps_and_windows_are_as_accurate_as_pytorch(native, case, dtype, isa):
    truth, found = by_reference(case, torch.float64), steps_by(native, case, dtype) | backward_by(native, case, dtype)
    for vanished in [output for output in found if not truth[output].any()]:
        # All gates of a layer are shut for good. The smallest sigmoid is e^-87 in float32, not 0, times an input.
        assert found.pop(vanished).abs().max() <= 1e-35 * inputs(case).grads.abs().max().clamp_min(1)
    assert_accurate(found, case)


@pytest.mark.parametrize("rule", [lstm("raw", 7, 3), lstm("log_sign", 7, 3), RNNPROP, *GIVEN])
def test_the_reference_backend_is_the_reference(rule):
    case, backend = Case(rule, 17, 5, 4), dispatch.select("reference", "cpu")
    for dtype in DTYPES:
        assert_accurate(steps_by(backend, case, dtype) | backward_by(backend, case, dtype), case)


BFLOAT16_CASES = [
    Case(rule, *size)
    for rule, size in itertools.product(
        (
            *(lstm(pre, *shape) for pre in ("raw", "log_sign") for shape in SHAPES[:3]),
            "log_sign:5 elu:3 lstm:20 linear",
        ),
        ((1, 5, 32), (17, 5, 16), (200, 3, 4)),
    )
]


@pytest.mark.parametrize("case", BFLOAT16_CASES, ids=name)
def test_steps_with_state_in_bfloat16_are_as_accurate_as_pytorch(native, case, isa):
    assert_bfloat16_steps_are_accurate(native, case)


@pytest.mark.parametrize("n", [1, 17, 1000])
@pytest.mark.parametrize("shape", SHAPES)
def test_state_in_bfloat16_is_what_float32_is_rounded_to(native, shape, n, isa):
    assert_bfloat16_is_float32_rounded(native, random_rule(hidden=shape[0], layers=shape[1]), n)


def test_state_in_bfloat16_is_rounded_to_even(native, isa):
    assert_halves_are_rounded_to_even(native)


def test_the_reference_backend_rounds_state_to_bfloat16():
    backend = dispatch.select("reference", "cpu")
    assert_bfloat16_steps_are_accurate(backend, Case(lstm(hidden=7, layers=3), 17, 5, 4))
    assert_bfloat16_is_float32_rounded(backend, random_rule(hidden=7), 37)
    assert_halves_are_rounded_to_even(backend)


@pytest.mark.parametrize("p", [0.5, 10.0, 87.0])
def test_features_are_accurate_over_all_magnitudes(native, p, isa):
    # One unit whose gates are open and whose candidate is a small multiple of one feature: h is that feature.
    magnitudes = torch.logspace(-44, 38, 4001, dtype=torch.float64).float()
    gradients, zeros = torch.cat([magnitudes, -magnitudes]), torch.zeros(2, 8002)
    for feature in (0, 1):
        rule = random_rule(hidden=1, layers=1, p=p, output_scale=1.0)
        with torch.no_grad():
            for weight in rule.weights():
                weight.zero_()
            rule.weight_ih_l0[2, feature] = 0.01 if p > 1 else 0.001
            rule.bias_l0[[0, 3]] = 30.0
            rule.weight_out.fill_(1.0)
        found = torch.zeros_like(gradients)
        native.step_([found], [gradients], [new_state(rule, 8002)], detached(rule), *constants(rule), 1.0)
        truth, single = (
            reference.step(gradients.to(dtype), zeros.to(dtype), detached(rule, dtype), *constants(rule))[0]
            for dtype in (torch.float64, torch.float32)
        )
        relative = ((found.double() - truth) / truth).abs().max()
        assert relative <= 2 * ((single.double() - truth) / truth).abs().max() + 4 * torch.finfo(torch.float32).eps


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_switch_of_log_sign_is_where_the_reference_has_it(native, dtype, isa):
    edge = torch.tensor(math.exp(-10), dtype=torch.float64).to(dtype)
    beside = torch.stack([torch.nextafter(edge, edge * 0), edge, torch.nextafter(edge, edge * 2)])
    grads, rule = torch.cat([beside, -beside])[None], random_rule(hidden=5, dtype=dtype)
    weights, rows = detached(rule), random_rows(rule, 6).to(dtype)
    state, ones, leaf = tiles(rows), torch.ones_like(grads), grads[0].clone().requires_grad_()
    dgrads = native.window_backward(state, grads, ones, weights, *constants(rule), None, False, True)[2][0]
    (expected,) = torch.autograd.grad(reference.step(leaf, rows, weights, *constants(rule))[0].sum(), leaf)
    torch.testing.assert_close(dgrads, expected, rtol=1e-3, atol=0)
    assert not torch.allclose(expected[0], expected[1], rtol=0.1)


@pytest.mark.parametrize("flush", [False, True])
@pytest.mark.parametrize("backend", ["native", "reference"])
def test_a_gradient_of_nothing_takes_the_linear_branch_where_denormals_are_flushed_too(backend, flush):
    rule, grad = random_rule(p=87.0), torch.tensor([0.0, -0.0, 1.0])
    results = []
    try:
        for flushed in (False, flush):
            assert torch.set_flush_denormal(flushed)
            param = torch.zeros(3)
            dispatch.select(backend, "cpu").step_(
                [param], [grad], [new_state(rule, 3)], detached(rule), *constants(rule), 1.0
            )  # fmt: skip
            results.append(param)
    finally:
        torch.set_flush_denormal(False)
    assert results[0].isfinite().all()
    torch.testing.assert_close(*results, rtol=1e-5, atol=0)


# What is not asked for, empty, or beside the numbers


def window_arguments(rule, n=37, steps=4, seed=0, dtype=None):
    dtype = dtype or rule.dtype
    grads, adjoints = (random_gradients(steps, n, seed=seed + i).to(dtype) for i in (0, 1))
    state, dstate = (tiles(random_rows(rule, n, seed + i), dtype) for i in (0, 1))
    return state, grads, adjoints, dstate


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("text", RULES)
def test_what_is_not_asked_for_changes_nothing_else(native, text, dtype, isa, poisoned_memory):
    rule = rule_of(text, dtype=dtype)
    state, grads, adjoints, dstate = window_arguments(rule)
    arguments = state, grads, adjoints, detached(rule), *constants(rule)
    for given in (None, dstate):
        everything = native.window_backward(*arguments, given, True, True)
        for need_dstate, need_dgrads in itertools.product((True, False), repeat=2):
            found = native.window_backward(*arguments, given, need_dstate, need_dgrads)
            assert bits_equal(found[0], everything[0])
            assert bits_equal(found[1], everything[1] if need_dstate else state[:0])
            assert bits_equal(found[2], everything[2] if need_dgrads else grads[:0])
    without = native.window_backward(*arguments, None, True, True)
    zeros = native.window_backward(*arguments, torch.zeros_like(dstate), True, True)
    assert bits_equal(without, zeros)


@pytest.mark.parametrize("text", [lstm(), RNNPROP])
@pytest.mark.parametrize("n", [1, 15, 17, 63, 1000])
def test_nan_in_unused_lanes_and_fresh_memory_reaches_nothing(native, n, text, isa, poisoned_memory):
    rule = rule_of(text)
    state, grads, adjoints, dstate = window_arguments(rule, n)
    assert state.isnan().any()
    for _ in range(2):  # the second time around, what the threads keep holds what the first left there
        dweights, dfirst, dgrads, _ = native.window_backward(
            state, grads, adjoints, detached(rule), *constants(rule), dstate, True, True
        )
        assert dweights.isfinite().all()
        assert to_rows(dfirst, n).isfinite().all()
        assert dgrads.isfinite().all()
        clean = [from_rows(to_rows(tensor, n)) for tensor in (state, dstate)]
        expected = native.window_backward(
            clean[0], grads, adjoints, detached(rule), *constants(rule), clean[1], True, True
        )
        assert bits_equal((dweights, dfirst, dgrads), expected[:3])
    param, clean_param = torch.ones(n), torch.ones(n)
    for grad in grads:
        native.step_([param], [grad], [state], detached(rule), *constants(rule), 1.0)
        native.step_([clean_param], [grad], [clean[0]], detached(rule), *constants(rule), 1.0)
    assert bits_equal(param, clean_param)
    assert bits_equal(to_rows(state, n), to_rows(clean[0], n))


def test_what_a_call_leaves_in_a_thread_s_memory_reaches_no_other(native, isa):
    rule = random_rule()
    arguments = window_arguments(rule)

    def run(state, grads, adjoints, dstate):
        return native.window_backward(state, grads, adjoints, detached(rule), *constants(rule), dstate, True, True)

    before = run(*arguments)
    for n, steps in ((200, 20), (5, 1), (100, 9)):
        run(*(tensor * NAN for tensor in window_arguments(rule, n, steps)))
    assert bits_equal(run(*arguments), before)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_nothing_is_an_input_too(native, dtype, isa, poisoned_memory):
    rule = random_rule(dtype=dtype)
    rest = detached(rule), *constants(rule)
    native.step_([], [], [], *rest, 1.0)
    empty, full = torch.zeros(0, 3, dtype=dtype), torch.zeros(5, dtype=dtype)
    native.step_([empty], [empty], [new_state(rule, 0)], *rest, 1.0)
    mixed, states = torch.zeros(5, dtype=dtype), [new_state(rule, n) for n in (0, 5, 0)]
    grad = random_gradients(5).to(dtype)
    native.step_([empty, mixed, empty], [empty, grad, empty], states, *rest, 1.0)
    native.step_([full], [grad], [new_state(rule, 5)], *rest, 1.0)
    assert bits_equal(full, mixed)
    assert full.any()
    for steps in (1, 3):
        nothing = torch.zeros(steps, 0, dtype=dtype)
        dweights, dstate, dgrads, _ = native.window_backward(
            new_state(rule, 0), nothing, nothing, *rest, new_state(rule, 0), True, True
        )
        assert torch.equal(dweights, torch.zeros(5141, dtype=dtype))
        assert dstate.shape == (0, 80, TILE)
        assert dgrads.shape == (steps, 0)


def guarded(tensor, offset):
    """`tensor` in the middle of a larger one, at an address that is no multiple of any vector's size."""
    around = torch.full((tensor.numel() + 64,), 7.0, dtype=tensor.dtype)
    inside = around[offset : offset + tensor.numel()].view(tensor.shape)
    inside.copy_(tensor)
    return inside, lambda: (torch.cat([around[:offset], around[offset + tensor.numel() :]]) == 7).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("n", [1, 16, 45])
def test_any_address_will_do_and_nothing_around_it_is_written(native, n, dtype, isa):
    rule = random_rule(dtype=dtype)
    state, grads, adjoints, dstate = window_arguments(rule, n)
    param, moved_state = torch.ones(n, dtype=dtype), state.clone()
    native.step_([param], [grads[0]], [moved_state], detached(rule), *constants(rule), 1.0)
    expected = native.window_backward(state, grads, adjoints, detached(rule), *constants(rule), dstate, True, True)
    weights, whole = zip(*(guarded(weight, 3) for weight in detached(rule)), strict=True)
    tensors, more_whole = zip(*(guarded(x, 1) for x in (state, grads, adjoints, dstate)), strict=True)
    other, other_whole = guarded(torch.ones(n, dtype=dtype), 5)
    found = native.window_backward(*tensors[:3], weights, *constants(rule), tensors[3], True, True)
    native.step_([other], [tensors[1][0]], [tensors[0]], weights, *constants(rule), 1.0)
    assert bits_equal(found, expected)
    assert bits_equal(other, param)
    assert bits_equal(to_rows(tensors[0], n), to_rows(moved_state, n))
    assert all(check() for check in (*whole, *more_whole, other_whole))


@pytest.mark.parametrize("n", [1, 16, 45])
def test_any_address_will_do_for_state_in_bfloat16(native, n, isa):
    rule, grad = random_rule(), random_gradients(n)
    states, params = [tiles(random_rows(rule, n), torch.bfloat16)], torch.zeros(2, n)
    moved, whole = guarded(states[0], 3)
    for param, state in zip(params, [*states, moved], strict=True):
        native.step_([param], [grad], [state], detached(rule), *constants(rule), 1.0)
    assert bits_equal(params[0], params[1])
    assert bits_equal(to_rows(states[0], n), to_rows(moved, n))
    assert whole()


def test_inputs_are_left_alone(native, isa):
    rule = random_rule()
    weights, (state, grads, adjoints, dstate) = detached(rule), window_arguments(rule)
    read_only = [*weights, grads, adjoints, dstate]
    before, state_before = [tensor.clone() for tensor in read_only], state.clone()
    native.window_backward(state, grads, adjoints, weights, *constants(rule), dstate, True, True)
    assert bits_equal(state, state_before)
    native.step_([torch.zeros(37)], [grads[0]], [state], weights, *constants(rule), 1.0)
    assert bits_equal(read_only, before)


# Parameters of every dtype, and several at once


@pytest.mark.parametrize("rule_dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16], ids=str)
def test_parameters_of_any_dtype_take_the_rule_s_update_rounded_once(native, dtype, rule_dtype, isa):
    rule, n = random_rule(dtype=rule_dtype, output_scale=0.01), 1003
    grads = random_gradients(3, n).clamp(-1e4, 1e4).to(dtype)
    param, state = torch.randn(17, 59, generator=torch.Generator().manual_seed(0)).to(dtype), new_state(rule, n)
    expected, its_state = param.clone(), new_state(rule, n)
    wide = torch.promote_types(dtype, rule_dtype)
    for grad in grads:
        native.step_([param], [grad.view(17, 59)], [state], detached(rule), *constants(rule), 1.0)
        change = torch.zeros(n, dtype=rule_dtype)
        native.step_([change], [grad.to(rule_dtype)], [its_state], detached(rule), *constants(rule), 1.0)
        expected = (expected.to(wide) + change.to(wide).view(17, 59)).to(dtype)
        assert bits_equal(param, expected)
        assert bits_equal(to_rows(state, n), to_rows(its_state, n))


@pytest.mark.parametrize("backend", ["native", "reference"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("text", [lstm(), RNNPROP])
def test_units_multiply_the_updates_of_their_parameters(text, dtype, backend):
    assert_units_multiply_updates_alone(dispatch.select(backend, "cpu"), text, dtype)


@pytest.mark.parametrize("backend", ["native", "reference"])
@pytest.mark.parametrize("units", [torch.ones(2), torch.ones(1, dtype=torch.float64), torch.ones(())], ids=str)
def test_units_are_one_a_parameter_in_the_rule_s_dtype(units, backend):
    rule, param, grad = random_rule(), torch.zeros(5), torch.ones(5)
    rest = [new_state(rule, 5)], detached(rule), *constants(rule), 1.0, None, None, 0.0, None
    with pytest.raises(RuntimeError, match="units: expected "):
        dispatch.select(backend, "cpu").step_([param], [grad], *rest, units)
    assert not param.any()


@pytest.mark.parametrize("backend", ["native", "reference"])
def test_half_precision_overflows_to_infinity(backend):
    rule, backend = random_rule(output_scale=1e9), dispatch.select(backend, "cpu")
    param, grad = torch.zeros(20, dtype=torch.float16), torch.ones(20, dtype=torch.float16)
    backend.step_([param], [grad], [new_state(rule, 20)], detached(rule), *constants(rule), 1.0)
    assert param.isinf().all()


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16], ids=str)
def test_many_parameters_at_once_are_the_same_as_one_by_one(native, stored, threads, isa, set_threads):
    set_threads(threads)
    rule = random_rule()
    sizes, dtypes = (0, 1, 16, 17, 100, 31, 5, 3000, 1, 48), (torch.float32, torch.bfloat16, torch.float64)
    grads = [random_gradients(n, seed=i).to(dtypes[i % 3]) for i, n in enumerate(sizes)]
    states = [tiles(random_rows(rule, n, i), stored) for i, n in enumerate(sizes)]
    params = [torch.ones_like(grad) for grad in grads]
    alone = [(torch.ones_like(grad), grad, state.clone()) for grad, state in zip(grads, states, strict=True)]
    native.step_(params, grads, states, detached(rule), *constants(rule), 1.0)
    for param, grad, state in alone:
        native.step_([param], [grad], [state], detached(rule), *constants(rule), 1.0)
    assert bits_equal(params, [param for param, _, _ in alone])
    for n, state, (_, _, its_state) in zip(sizes, states, alone, strict=True):
        assert bits_equal(to_rows(state, n), to_rows(its_state, n))


@pytest.mark.parametrize("backend", ["native", "reference"])
@pytest.mark.parametrize("scale", [-1.0, 0.25])
def test_grad_scale_multiplies_the_gradients_first(backend, scale):
    rule, backend, grad = random_rule(), dispatch.select(backend, "cpu"), random_gradients(50)
    found, expected = torch.zeros(50), torch.zeros(50)
    backend.step_([found], [grad], [new_state(rule, 50)], detached(rule), *constants(rule), scale)
    backend.step_([expected], [grad * scale], [new_state(rule, 50)], detached(rule), *constants(rule), 1.0)
    assert bits_equal(found, expected)


# The same bits


def everything(native, rule, n, steps=3, seed=0):
    """All that the operators give for some inputs."""
    state, grads, adjoints, dstate = window_arguments(rule, n, steps, seed)
    found = native.window_backward(state, grads, adjoints, detached(rule), *constants(rule), dstate, True, True)
    param = torch.zeros(n, dtype=rule.dtype)
    for grad in grads:
        native.step_([param], [grad], [state], detached(rule), *constants(rule), 1.0)
    return [*found, param, to_rows(state, n)]


@pytest.mark.parametrize("text", [lstm(), RNNPROP])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("n", [63, 6007])
def test_any_number_of_threads_and_any_run_gives_the_same_bits(native, n, dtype, text, isa, set_threads):
    rule, first = rule_of(text, dtype=dtype), None
    for threads in (1, 2, 3, 7, 64, 2, 1):
        set_threads(threads)
        found = everything(native, rule, n)
        first = first or found
        assert bits_equal(found, first)


@pytest.mark.parametrize("dtype", [*DTYPES, torch.bfloat16], ids=str)
@pytest.mark.parametrize("text", RULES)
def test_avx2_and_avx512_take_the_same_steps(native, monkeypatch, text, dtype):
    stored, dtype = dtype, torch.float32 if dtype == torch.bfloat16 else dtype
    if "avx512" not in supported_isas():
        pytest.skip("this machine does not have avx512")
    rule, n, found = rule_of(text, dtype=dtype), 517, {}
    stored = stored if rule.config.takes_bfloat16_state else dtype
    large = 1e16 if "adam" in text else 1e30
    grads = torch.cat([random_gradients(4, n), random_gradients(4, n, seed=1) * large, random_gradients(1, n) * 1e-36])
    for isa in ("avx2", "avx512"):
        monkeypatch.setenv("FASTL2L_CPU_ISA", isa)
        param, state = torch.zeros(n, dtype=dtype), tiles(random_rows(rule, n), stored)
        for grad in grads.to(dtype):
            native.step_([param], [grad], [state], detached(rule), *constants(rule), 1.0)
        found[isa] = param, to_rows(state, n)
    assert found["avx2"][0].isfinite().all()
    assert bits_equal(found["avx2"], found["avx512"])


def test_the_best_instruction_set_is_taken_unless_another_is_named(native, monkeypatch):
    best = supported_isas()[0]
    monkeypatch.delenv("FASTL2L_CPU_ISA", raising=False)
    assert torch.ops.fastl2l.cpu_isa() == best
    monkeypatch.setenv("FASTL2L_CPU_ISA", "")
    assert torch.ops.fastl2l.cpu_isa() == best
    for isa in supported_isas():
        monkeypatch.setenv("FASTL2L_CPU_ISA", isa)
        assert torch.ops.fastl2l.cpu_isa() == isa


def test_a_wrong_instruction_set_is_named_and_changes_nothing(native, monkeypatch):
    rule = random_rule()
    state, grads, adjoints, dstate = window_arguments(rule)
    param, before = torch.zeros(37), state.clone()
    monkeypatch.setenv("FASTL2L_CPU_ISA", "AVX512")
    message = "FASTL2L_CPU_ISA: expected one of .*generic on this machine, got AVX512"
    with pytest.raises(RuntimeError, match=message):
        torch.ops.fastl2l.cpu_isa()
    with pytest.raises(RuntimeError, match=message):
        native.step_([param], [grads[0]], [state], detached(rule), *constants(rule), 1.0)
    with pytest.raises(RuntimeError, match=message):
        native.window_backward(state, grads, adjoints, detached(rule), *constants(rule), dstate, True, True)
    assert not param.any()
    assert bits_equal(state, before)


def test_python_threads_do_not_disturb_each_other(native):
    rules = [random_rule(hidden=hidden, layers=2, seed=hidden) for hidden in (5, 20, 33)]
    expected = [everything(native, rule, 500, seed=i) for i, rule in enumerate(rules)]
    wrong = []

    def work(i):
        for _ in range(20):
            if not bits_equal(everything(native, rules[i], 500, seed=i), expected[i]):
                wrong.append(i)

    workers = [threading.Thread(target=work, args=(i,)) for i in range(3)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert not wrong


# Numbers that are not finite


def step_once(native, rule, grad):
    param, state = torch.zeros_like(grad), tiles(random_rows(rule, grad.numel()), rule.dtype)
    native.step_([param], [grad], [state], detached(rule), *constants(rule), 1.0)
    return param, to_rows(state, grad.numel())


STRANGE = [lstm("raw", 7, 2), lstm("log_sign", 7, 2), RNNPROP]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("text", STRANGE)
@pytest.mark.parametrize("value", [NAN, INF, -INF, 1e30, 1e-45])
def test_a_strange_gradient_stays_in_its_coordinate(native, text, value, dtype, isa):
    rule, n = rule_of(text, dtype=dtype), 37
    for place in (0, 15, 17, 36):
        ordinary = random_gradients(n).to(dtype)
        strange = ordinary.clone()
        strange[place] = value
        others = torch.arange(n) != place
        before, after = step_once(native, rule, ordinary), step_once(native, rule, strange)
        assert all(bits_equal(a[..., others], b[..., others]) for a, b in zip(before, after, strict=True))
        rows = random_rows(rule, n).to(dtype)
        change, state = reference.step(strange, rows, detached(rule), *constants(rule))
        for found, expected in zip(after, (change, state), strict=True):
            torch.testing.assert_close(found[..., place], expected[..., place], equal_nan=True)
        if "adam" not in text:  # whose means of infinity give NaN, in the reference too
            assert after[0][place].isnan() == math.isnan(value)
            assert after[1][:, place].isnan().all() == math.isnan(value)


@pytest.mark.parametrize("text", STRANGE)
@pytest.mark.parametrize("which", ["grads", "adjoints", "state", "dstate"])
@pytest.mark.parametrize("value", [NAN, INF])
def test_a_window_with_a_strange_number_is_strange_in_its_coordinate_and_the_weights(native, text, which, value, isa):
    rule, n, place = rule_of(text), 37, 18
    arguments = dict(zip(("state", "grads", "adjoints", "dstate"), window_arguments(rule, n), strict=True))

    def run():
        state, grads, adjoints, dstate = arguments.values()
        weights = detached(rule)
        dweights, *rest = native.window_backward(state, grads, adjoints, weights, *constants(rule), dstate, True, True)
        return dweights, to_rows(rest[0], n), rest[1]

    before = run()
    target = arguments[which]
    if which in ("grads", "adjoints"):
        target[2, place] = value
    else:
        target[place // TILE, 0, place % TILE] = value
    after, others = run(), torch.arange(n) != place
    assert all(bits_equal(a[:, others], b[:, others]) for a, b in zip(before[1:], after[1:], strict=True))
    if math.isnan(value):
        assert after[0].isnan().any()
        assert after[1][:, place].isnan().any()


@pytest.mark.parametrize("backend", ["native", "reference"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_all_finite_misses_nothing(backend, dtype):
    chosen = dispatch.select(backend, "cpu")
    largest = torch.finfo(dtype).max
    for n in (0, 1, 15, 16, 17, 4095, 4096, 4097, 9000):
        tensor = torch.full((n,), largest, dtype=dtype)
        tensor[1::2] *= -1
        assert all_finite(chosen, [tensor, tensor])
        for place in {0, n // 2, n - 1, min(n, 4096) - 1} if n else ():
            for value in (NAN, INF, -INF):
                wrong = tensor.clone()
                wrong[place] = value
                assert not all_finite(chosen, [tensor, wrong])


@pytest.mark.parametrize("backend", ["native", "reference"])
@pytest.mark.parametrize("value", [1.0, NAN, INF, -INF])
def test_a_step_that_is_asked_to_changes_nothing_unless_all_gradients_are_finite(backend, value):
    arguments, flag = step_arguments(), torch.ones(1, dtype=torch.bool)
    arguments["grads"][1].view(-1)[-1] = value
    before = [tensor.clone() for tensor in tensors_of(arguments)]
    dispatch.select(backend, "cpu").step_(*arguments.values(), 1.0, 1.0, flag)
    assert flag.item() == math.isfinite(value)
    assert bits_equal(tensors_of(arguments), before) == (not math.isfinite(value))


@pytest.mark.parametrize("backend", ["native", "reference"])
def test_a_step_is_left_out_where_the_flag_says_so_before(backend):
    arguments, flag = step_arguments(), torch.zeros(1, dtype=torch.bool)
    before = [tensor.clone() for tensor in tensors_of(arguments)]
    dispatch.select(backend, "cpu").step_(*arguments.values(), 1.0, 1.0, flag)
    assert not flag
    assert bits_equal(tensors_of(arguments), before)


@pytest.mark.parametrize("backend", ["native", "reference"])
def test_one_state_does_for_all_parameters(backend):
    assert_one_state_does_for_all(dispatch.select(backend, "cpu"))


@pytest.mark.parametrize(
    ("flag", "message"),
    [
        (torch.zeros(1), "finite: expected bool, got float32"),
        (torch.zeros(2, dtype=torch.bool), r"finite: expected shape \[1\], got \[2\]"),
    ],
)
def test_the_flag_of_a_step_is_one_bool(native, flag, message):
    arguments = step_arguments()
    before = [tensor.clone() for tensor in tensors_of(arguments)]
    with pytest.raises(RuntimeError, match=message):
        native.step_(*arguments.values(), 1.0, 1.0, flag)
    assert bits_equal(tensors_of(arguments), before)


def test_find_nonfinite_takes_floating_contiguous_tensors(native):
    with pytest.raises(RuntimeError, match=r"tensors\[1\]: expected a contiguous tensor"):
        native.find_nonfinite_(torch.ones(1, dtype=torch.bool), [torch.zeros(3), torch.zeros(4, 4).T[1:]])
    with pytest.raises(RuntimeError, match=r"tensors\[0\]: expected a floating dtype"):
        native.find_nonfinite_(torch.ones(1, dtype=torch.bool), [torch.zeros(3, dtype=torch.int32)])


# What multiplies updates and parameters


@pytest.mark.parametrize("backend", ["native", "reference"])
@pytest.mark.parametrize("text", [lstm(), RNNPROP])
@pytest.mark.parametrize("rule_dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_decay_multiplies_parameters_and_a_rate_multiplies_both(backend, text, rule_dtype, dtype):
    rule, chosen, n = rule_of(text, dtype=rule_dtype), dispatch.select(backend, "cpu"), 37
    grad = random_gradients(n).to(dtype)

    def step(start, scale=1.0, **options):
        param, state = torch.full((n,), start, dtype=dtype), new_state(rule, n)
        chosen.step_([param], [grad], [state], detached(rule), rule.text, scale, 1.0, **options)
        return param

    eps = torch.finfo(dtype).eps
    assert bits_equal(step(3.0, decay=0.0), step(3.0))
    torch.testing.assert_close(step(3.0, decay=0.25), step(2.25), rtol=2 * eps, atol=0)
    rate = torch.tensor(0.5, dtype=rule_dtype)
    torch.testing.assert_close(
        step(3.0, 0.3, decay=0.25, rate=rate), step(3.0, 0.15, decay=0.125), rtol=2 * eps, atol=0
    )


@pytest.mark.parametrize("backend", ["native", "reference"])
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"update_scale": 1e39}, r"update_scale: expected a finite float32, got 1e\+39"),
        ({"update_scale": NAN}, "update_scale: expected a finite float32, got nan"),
        ({"decay": INF}, "decay: expected a finite float32, got inf"),
        ({"rate": torch.ones(1)}, r"rate: expected shape \[\], got \[1\]"),
        ({"rate": torch.ones((), dtype=torch.float64)}, "rate: expected float32, got float64"),
        ({"given": torch.ones(3, 1, TILE)}, "given: expected 0 rows"),
    ],
)
def test_numbers_of_a_step_are_checked_before_anything_is_changed(backend, options, message):
    arguments = step_arguments()
    before = [tensor.clone() for tensor in tensors_of(arguments)]
    with pytest.raises(RuntimeError, match=message):
        dispatch.select(backend, "cpu").step_(**{"update_scale": 1.0, "grad_scale": 1.0} | arguments | options)
    assert bits_equal(tensors_of(arguments), before)


@pytest.mark.parametrize("backend", ["native", "reference"])
@pytest.mark.parametrize("text", GIVEN)
def test_given_rows_belong_to_the_parameters_in_their_order(backend, text):
    rule, chosen, sizes = rule_of(text), dispatch.select(backend, "cpu"), (3, 20, 0, 33)
    grads = [random_gradients(size, seed=size) for size in sizes]
    given = [tiles(torch.randn(rule.config.given, size)) for size in sizes]
    params, state = [torch.ones(size) for size in sizes], tiles(random_rows(rule, 6 * TILE))
    alone = [(torch.ones(size), state.clone()) for size, state in zip(sizes, state.split([1, 2, 0, 3]), strict=True)]
    chosen.step_(params, grads, [state], detached(rule), *constants(rule), 1.0, None, torch.cat(given))
    for (param, own), grad, rows in zip(alone, grads, given, strict=True):
        chosen.step_([param], [grad], [own], detached(rule), *constants(rule), 1.0, None, rows)
    for size, param, (its, own), part in zip(sizes, params, alone, state.split([1, 2, 0, 3]), strict=True):
        assert bits_equal(param, its)
        assert bits_equal(to_rows(part, size), to_rows(own, size))
        assert (param == 1).all() == (size == 0 or rule.config.output == "none")


def test_the_sums_of_a_large_rule_take_bounded_memory(native):
    rule = random_rule(hidden=600, layers=1)
    state, grads, adjoints, _ = window_arguments(rule, n=2048, steps=1)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    native.window_backward(state, grads, adjoints, detached(rule), *constants(rule), None, False, False)
    weights = sum(weight.numel() for weight in rule.weights())
    assert 64 * 8 * weights > 700e6  # what a sum a part would be
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 450e3  # kilobytes


# Arguments that are not as they should be

RULE = random_rule()


def step_arguments(**changes):
    n = 20
    arguments = {
        "params": [torch.zeros(3), torch.zeros(4, 5)],
        "grads": [torch.ones(3), torch.ones(4, 5)],
        "states": [new_state(RULE, 3), new_state(RULE, n)],
        "weights": detached(RULE),
        "rule": RULE.text,
    }
    for key, change in changes.items():
        arguments[key] = change(arguments[key])
    return arguments


def second(change):
    """Changes the second tensor of a list."""
    return lambda tensors: [tensors[0], change(tensors[1]), *tensors[2:]]


def spread(tensor):
    """The same numbers, not contiguous."""
    return torch.stack([tensor, tensor], -1)[..., 0]


def tensors_of(arguments):
    flat = itertools.chain.from_iterable(x if isinstance(x, list) else [x] for x in arguments.values())
    return [tensor for tensor in flat if isinstance(tensor, torch.Tensor)]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"grads": lambda x: x[:1]}, "grads: expected 2 tensors, got 1"),
        ({"states": lambda x: [*x, x[0]]}, "states: expected 2 tensors, got 3"),
        ({"params": second(torch.Tensor.int)}, r"params\[1\]: expected float32, float64, float16 or bfloat16, got"),
        ({"params": second(spread)}, r"params\[1\]: expected a contiguous tensor"),
        ({"grads": second(spread)}, r"grads\[1\]: expected a contiguous tensor"),
        ({"grads": second(torch.Tensor.double)}, r"grads\[1\]: expected float32, got float64"),
        ({"grads": second(lambda x: x[:3])}, r"grads\[1\]: expected 20 elements, got 15"),
        ({"states": lambda x: x[:1]}, r"states\[0\]: expected shape \[3, 80, 16\], got \[1, 80, 16\]"),
        ({"states": lambda x: [torch.cat(x).double()]}, r"states\[0\]: expected float32 or bfloat16, got float64"),
        ({"states": second(torch.Tensor.double)}, r"states\[1\]: expected float32, got float64"),
        ({"states": second(torch.Tensor.bfloat16)}, r"states\[1\]: expected float32, got bfloat16"),
        ({"states": lambda x: [x[0].bfloat16(), x[1]]}, r"states\[1\]: expected bfloat16, got float32"),
        ({"states": lambda x: [x[0].half(), x[1]]}, r"states\[0\]: expected float32 or bfloat16, got float16"),
        ({"states": second(lambda x: x[:1])}, r"states\[1\]: expected shape \[2, 80, 16\], got \[1, 80, 16\]"),
        ({"states": second(lambda x: x[:, :79])}, r"states\[1\]: expected shape \[2, 80, 16\], got \[2, 79, 16\]"),
        ({"states": second(lambda x: x.view(-1))}, r"states\[1\]: expected shape \[2, 80, 16\], got \[2560\]"),
        ({"states": second(spread)}, r"states\[1\]: expected a contiguous tensor"),
        ({"weights": lambda x: x[1:]}, f"weights: expected 8 tensors for {RULE.text}, got 7"),
        ({"weights": lambda x: []}, "weights: expected 8 tensors.*, got 0"),
        ({"weights": lambda x: [x[3], *x[1:]]}, r"weights\[0\]: expected shape \[80, 2\], got \[80, 20\]"),
        ({"weights": lambda x: [w.half() for w in x]}, "weights: expected float32 or float64, got float16"),
        ({"weights": second(torch.Tensor.double)}, r"weights\[1\]: expected float32, got float64"),
        ({"weights": second(lambda x: x.T.contiguous().T)}, r"weights\[1\]: expected a contiguous tensor"),
        ({"weights": lambda x: [*x[:-1], x[-1].view(1)]}, r"weights\[7\]: expected shape \[\], got \[1\]"),
        ({"weights": lambda x: [*x[:-2], x[-2][:0], x[-1]]}, r"weights\[6\]: expected shape \[20\], got \[0\]"),
        ({"weights": lambda x: [w.double() for w in x]}, r"states\[0\]: expected float64, got float32"),
        (
            {"rule": lambda x: "log:10 lstm:20,20 linear"},
            "rule 'log:10 lstm:20,20 linear': expected the parts .*raw.log_sign.log_and_sign.adam",
        ),
        ({"rule": lambda x: lstm("raw")}, r"weights\[0\]: expected shape \[80, 1\], got \[80, 2\]"),
        ({"rule": lambda x: RNNPROP}, "weights: expected 10 tensors for adam.*, got 8"),
    ],
)
def test_bad_arguments_of_step_are_named_and_nothing_is_changed(native, changes, message):
    arguments = step_arguments(**changes)
    before = [tensor.clone() for tensor in tensors_of(arguments)]
    with pytest.raises(RuntimeError, match=message):
        native.step_(*arguments.values(), 1.0, 1.0)
    assert bits_equal(tensors_of(arguments), before)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"grads": lambda x: x[0]}, r"grads: expected shape \[steps >= 1, N\], got \[37\]"),
        ({"grads": lambda x: x[:0]}, r"grads: expected shape \[steps >= 1, N\], got \[0, 37\]"),
        ({"grads": torch.Tensor.double}, "grads: expected float32, got float64"),
        ({"grads": spread}, "grads: expected a contiguous tensor"),
        ({"adjoints": lambda x: x[:2]}, r"adjoints: expected shape \[4, 37\], got \[2, 37\]"),
        ({"adjoints": torch.Tensor.half}, "adjoints: expected float32, got float16"),
        ({"adjoints": spread}, "adjoints: expected a contiguous tensor"),
        ({"state": lambda x: x[:2]}, r"state: expected shape \[3, 80, 16\], got \[2, 80, 16\]"),
        ({"state": torch.Tensor.double}, "state: expected float32, got float64"),
        ({"state": torch.Tensor.bfloat16}, "state: expected float32, got bfloat16"),
        ({"state": spread}, "state: expected a contiguous tensor"),
        ({"dstate": lambda x: x[:, 1:]}, r"dstate: expected shape \[3, 80, 16\], got \[3, 79, 16\]"),
        ({"dstate": torch.Tensor.int}, "dstate: expected float32, got another dtype"),
        ({"dstate": spread}, "dstate: expected a contiguous tensor"),
        ({"weights": lambda x: x[2:]}, "weights: expected 8 tensors.*, got 6"),
    ],
)
def test_bad_arguments_of_window_backward_are_named(native, changes, message):
    state, grads, adjoints, dstate = window_arguments(RULE)
    weights = detached(RULE)
    arguments = {"state": state, "grads": grads, "adjoints": adjoints, "weights": weights, "dstate": dstate}
    for key, change in changes.items():
        arguments[key] = change(arguments[key])
    dstate = arguments.pop("dstate")
    with pytest.raises(RuntimeError, match=message):
        native.window_backward(*arguments.values(), *constants(RULE), dstate, True, True)


@pytest.mark.parametrize("backend", ["native", "reference"])
def test_rules_in_float64_take_no_state_in_bfloat16(backend):
    rule, param, state = random_rule(dtype=torch.float64), torch.zeros(20), new_state(RULE, 20, dtype=torch.bfloat16)
    with pytest.raises(RuntimeError, match=r"states\[0\]: expected float64, got bfloat16"):
        dispatch.select(backend, "cpu").step_(
            [param], [torch.ones(20)], [state], detached(rule), *constants(rule), 1.0
        )  # fmt: skip
    assert not param.any()


def test_the_reference_takes_windows_in_the_rule_s_dtype_only():
    state, grads, adjoints, _ = window_arguments(RULE)
    with pytest.raises(RuntimeError, match="state: expected float32, got bfloat16"):
        dispatch.select("reference", "cpu").window_backward(
            state.bfloat16(), grads, adjoints, detached(RULE), *constants(RULE), None, False, False
        )


def test_backends_are_chosen_by_name():
    available = dispatch.available_backends()
    assert list(available) == ["reference", "native", "triton"]
    assert available["reference"] is available["native"] is None
    assert dispatch.select("auto", "cpu").name == "native"
    assert dispatch.select("auto", "meta").name == "reference"
    with pytest.raises(ValueError, match="backend: expected one of auto, reference, native, triton, got 'cuda'"):
        dispatch.select("cuda", "cpu")
    with pytest.raises(RuntimeError, match=r"backend 'native' cannot be used: .* CPU tensors.*on meta"):
        dispatch.select("native", "meta")


# As torch sees the operators


def test_opcheck_of_step(native):
    params, grads = [torch.zeros(3, 7), torch.zeros(5).half()], [random_gradients(3, 7), torch.ones(5).half()]
    arguments = params, grads, [new_state(RULE, 21), new_state(RULE, 5)], detached(RULE), *constants(RULE), 1.0
    torch.library.opcheck(native.step_, arguments)
    torch.library.opcheck(native.step_, (*arguments, torch.ones(1, dtype=torch.bool)))
    halves = [state.bfloat16() for state in arguments[2]]
    torch.library.opcheck(native.step_, (*arguments[:2], halves, *arguments[3:]))


def test_opcheck_of_find_nonfinite(native):
    torch.library.opcheck(native.find_nonfinite_, (torch.ones(1, dtype=torch.bool), [torch.tensor([1.0, NAN])]))


@pytest.mark.parametrize("need", [True, False])
def test_opcheck_of_window_backward(native, need):
    state, grads, adjoints, dstate = window_arguments(RULE)
    state, dstate = (tensor.nan_to_num() for tensor in (state, dstate))
    arguments = state, grads, adjoints, detached(RULE), *constants(RULE), dstate if need else None, need, need
    torch.library.opcheck(native.window_backward, arguments)


# The functional form


@pytest.mark.parametrize("backend", ["native", "reference"])
@pytest.mark.parametrize("text", [lstm("raw", 7, 2), lstm("log_sign", 7, 2), RNNPROP, *GIVEN])
@pytest.mark.parametrize("n", [1, 37])
def test_update_has_the_gradients_of_the_reference(text, n, backend):
    rule = rule_of(text, dtype=torch.float64)
    grads = random_gradients(2, n, preprocess=text).double().requires_grad_()
    rows = random_rows(rule, n).double().requires_grad_()
    weigh = [torch.randn(n, dtype=torch.float64), torch.randn(rows.shape, dtype=torch.float64)]
    given = torch.randn(rule.config.given, n, dtype=torch.float64).requires_grad_() if rule.config.given else None
    leaves = [*([grads] if rule.config.features else []), rows, *rule.weights(), *([] if given is None else [given])]

    def objective(step, state, to_rows):
        one, state = step(grads[0], state)
        two, state = step(grads[1], state)
        return ((one.sin() + two) * weigh[0]).sum() + (to_rows(state) * weigh[1]).sum()

    outside = None if given is None else from_rows(given)
    mine = objective(
        lambda g, s: update(rule, g, s, outside, backend=backend), from_rows(rows), lambda s: to_rows(s, n)
    )
    truth = objective(lambda g, s: reference.step(g, s, rule.weights(), *constants(rule), given), rows, lambda s: s)
    torch.testing.assert_close(mine, truth, rtol=1e-13, atol=1e-13)
    for found, expected in zip(torch.autograd.grad(mine, leaves), torch.autograd.grad(truth, leaves), strict=True):
        assert found.shape == expected.shape
        assert errors(found, expected)["largest"] < 1e-13


@pytest.mark.parametrize("text", [lstm("raw", 3, 2), lstm("log_sign", 3, 2), "adam:0.9,0.99,1e-06 elu:4 lstm:3,3 tanh"])
def test_update_has_the_gradients_of_differences(text, isa):
    rule = rule_of(text, dtype=torch.float64)
    gradient = torch.tensor([0.7, -2e-3, 2e-5, -1e-5, 0.0], dtype=torch.float64, requires_grad=True)
    rows = random_rows(rule, 5).double().requires_grad_()

    def step(gradient, rows, *weights):
        change, state = update(rule, gradient, from_rows(rows), backend="native")
        return change, to_rows(state, 5)

    assert torch.autograd.gradcheck(step, (gradient, rows, *rule.weights()), eps=1e-7, atol=1e-5, rtol=1e-4)


def test_update_leaves_its_inputs_and_may_be_asked_for_any_of_its_gradients():
    rule = random_rule()
    gradient, state = random_gradients(37), from_rows(random_rows(rule, 37))
    before = gradient.clone(), state.clone()
    change, after = update(rule, spread(gradient), spread(state))
    assert bits_equal((gradient, state), before)
    assert not torch.equal(after, state)
    (only_weight,) = torch.autograd.grad(change.sum(), rule.weight_out, retain_graph=True)
    expected = to_rows(after, 37)[40:60].sum(1) * rule.config.output_scale  # h of the second layer
    torch.testing.assert_close(only_weight, expected)
    frozen = [weight.requires_grad_(False) for weight in rule.parameters()]
    assert len(frozen) == 8
    assert not update(rule, gradient, state)[0].requires_grad


@pytest.mark.parametrize("text", [lstm(hidden=3), "adam:0.9,0.99,1e-06 elu:4 lstm:3,3 tanh"])
@pytest.mark.parametrize("linear", [True, False])
def test_update_has_second_derivatives(linear, text):
    rule = rule_of(text, dtype=torch.float64)
    gradient, rows = random_gradients(5).double().requires_grad_(), random_rows(rule, 5).double().requires_grad_()
    leaves = [gradient, rows, rule.weight_hh_l0, rule.bias_out]

    def second(change, state):
        objective = (change if linear else change.sin()).sum() + state.sum()
        first = torch.autograd.grad(objective, leaves[:3], create_graph=True)
        return torch.autograd.grad(sum(part.square().sum() for part in first), leaves, materialize_grads=True)

    change, state = update(rule, gradient, from_rows(rows), backend="native")
    mine = second(change, to_rows(state, 5))
    truth = second(*reference.step(gradient, rows, rule.weights(), *constants(rule)))
    assert all(part.any() for part in truth[:3])
    for found, expected in zip(mine, truth, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize(
    ("gradient", "state", "message"),
    [
        (torch.zeros(2, 8), new_state(RULE, 16), r"gradient: expected \[N\] of torch.float32, got \[2, 8\]"),
        (torch.zeros(16).double(), new_state(RULE, 16), r"gradient: expected \[N\] of torch.float32, got .*float64"),
        (torch.zeros(17), new_state(RULE, 16), r"state: expected \[2, 80, 16\] of torch.float32, got \[1, 80, 16\]"),
        (torch.zeros(16), new_state(RULE, 16).double(), r"state: expected .* of torch.float32, got .*float64"),
        (torch.zeros(16), new_state(RULE, 16).bfloat16(), r"state: expected .* of torch.float32, got .*bfloat16"),
    ],
)
def test_bad_arguments_of_update_are_named(gradient, state, message):
    with pytest.raises(ValueError, match=message):
        update(RULE, gradient, state)


def test_layouts_are_inverse():
    rule = random_rule(hidden=3)
    for n in (0, 1, 16, 37):
        rows = random_rows(rule, n)
        state = from_rows(rows)
        assert state.shape == state_shape(rule, n) == new_state(rule, n).shape
        assert torch.equal(to_rows(state, n), rows)
        assert state.sum().item() == pytest.approx(rows.sum().item(), abs=1e-4)  # nothing beside them


def test_torch_compile_takes_the_update_without_a_break():
    def objective(gradient, state):
        first, state = update(RULE, gradient, state)
        second, state = update(RULE, 2 * gradient + first, state)
        return (first + second).sum() + state.square().sum()

    gradient, state = random_gradients(37), tiles(random_rows(RULE, 37), poison=0.0)
    torch.compiler.reset()
    results = []
    for function in (objective, torch.compile(objective, fullgraph=True, backend="aot_eager")):
        loss = function(gradient, state)
        results.append([loss.detach(), *torch.autograd.grad(loss, RULE.weights())])
    assert bits_equal(*results)
