"""The CUDA kernels, run by an emulator on the host: as accurate as PyTorch, one result only."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from emulated_cuda import ANY_SIZE, FAST, backend, compile_library, elementwise, offset_of_output, set_multiprocessors
from helpers import (
    GIVEN,
    RNNPROP,
    RULES,
    Case,
    assert_accurate,
    assert_bfloat16_is_float32_rounded,
    assert_bfloat16_steps_are_accurate,
    assert_halves_are_rounded_to_even,
    assert_units_multiply_updates_alone,
    backward_by,
    constants,
    detached,
    lstm,
    random_gradients,
    random_rows,
    rule_of,
    steps_by,
    tiles,
)

from fastl2l import reference
from fastl2l.ops.layout import from_rows, new_state, to_rows
from fastl2l.rule_config import RuleConfig

SIZES = ((1, 1, 64), (1, 20, 8), (15, 1, 16), (16, 2, 16), (17, 5, 8))
"""Coordinates, steps, and how often to draw."""
CASES = [
    *(Case(rule, *size) for rule, size in itertools.product(FAST, SIZES)),
    *(Case(rule, *size) for rule in RULES + GIVEN if rule not in FAST for size in ((1, 20, 8), (17, 5, 8))),
    *(Case(rule, 63, 20, 4) for rule in (lstm("raw"), lstm(), RNNPROP)),
    *(Case(rule, 1000, 5, 1) for rule in (lstm(), RNNPROP)),
    *(Case(rule, 9, 70, 4) for rule in (lstm(), RNNPROP)),  # several segments, the last one shorter
]
EXTREMES = [
    Case(rule, 17, 5, 8, **extreme)
    for rule, largest in ((lstm("raw"), 1e30), (lstm("log_sign"), 1e30), (RNNPROP, 1e16))  # whose square is finite
    for extreme in ({"gain": 10.0}, {"gain": 0.01}, {"magnitude": largest}, {"magnitude": 1e-36})
]
"""Saturated gates, gates that are hardly open, huge gradients, denormal gradients."""
ONE_OF_EACH = [lstm(), RNNPROP, *ANY_SIZE]
"""Without and with state of the features: with kernels on tensor cores, and by those for every size."""
HALVED = [rule for rule in FAST + RULES if RuleConfig.parse(rule).takes_bfloat16_state]


@pytest.fixture(scope="session")
def library(tmp_path_factory):
    path = tmp_path_factory.mktemp("emulated") / "kernels.so"
    compile_library(path, [])
    return path


@pytest.fixture(scope="session")
def emulated(library):
    return backend(library)


def window_arguments(rule, n=37, steps=4, seed=0):
    """State, gradients, adjoints and d state, with NaN in the lanes that belong to no coordinate."""
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


@pytest.mark.parametrize("rule", [*RULES, *GIVEN])
def test_float64_is_as_accurate_as_pytorch(emulated, rule):
    case = Case(rule, 17, 5, 8)
    assert_accurate(steps_by(emulated, case, torch.float64) | backward_by(emulated, case, torch.float64), case)


@pytest.mark.parametrize("size", [(1, 5, 32), (17, 5, 16), (100, 2, 4)])
@pytest.mark.parametrize("rule", HALVED)
def test_steps_with_state_in_bfloat16_are_as_accurate_as_pytorch(emulated, rule, size):
    assert_bfloat16_steps_are_accurate(emulated, Case(rule, *size))


@pytest.mark.parametrize("n", [1, 37])
@pytest.mark.parametrize("rule", HALVED)
def test_state_in_bfloat16_is_what_float32_is_rounded_to(emulated, rule, n):
    assert_bfloat16_is_float32_rounded(emulated, rule_of(rule), n)


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


@pytest.mark.parametrize(
    ("rule", "stored"),
    [*((rule, torch.float32) for rule in ONE_OF_EACH), *((ONE_OF_EACH[i], torch.bfloat16) for i in (0, 2))],
    ids=str,
)
def test_many_parameters_of_all_dtypes_are_the_same_as_one_by_one(emulated, rule, stored):
    rule = rule_of(rule, output_scale=0.01)
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


@pytest.mark.parametrize("rule", ONE_OF_EACH)
@pytest.mark.parametrize("before", [True, False])
@pytest.mark.parametrize("value", [1.0, math.nan, math.inf, -math.inf])
def test_a_step_that_is_asked_to_changes_nothing_unless_all_gradients_are_finite(emulated, rule, before, value):
    rule = rule_of(rule)
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


@pytest.mark.parametrize("text", [*FAST, *ANY_SIZE, GIVEN[2]])
def test_what_is_not_asked_for_changes_nothing_else(emulated, text):
    rule, n = rule_of(text), 37
    state, grads, adjoints, dstate = window_arguments(rule)
    given = torch.stack([tiles(torch.randn(rule.config.given, n)) for _ in grads]) if rule.config.given else None
    arguments = state, grads, adjoints, detached(rule), *constants(rule)

    def run(*needs, dstate=dstate):
        found = emulated.window_backward(*arguments, dstate, *needs[:2], given, needs[2])
        return found[0], to_rows(found[1], n), found[2], torch.cat([to_rows(step, n) for step in found[3]] or [grads])

    everything = run(True, True, True)
    assert all(tensor.isfinite().all() for tensor in everything)
    for needs in itertools.product((True, False), repeat=3):
        for one, other, needed in zip(run(*needs), everything, (True, *needs), strict=True):
            assert not needed or bits(one) == bits(other)
    assert bits(*run(True, True, True, dstate=None)) == bits(*run(True, True, True, dstate=torch.zeros_like(dstate)))


@pytest.mark.parametrize("text", ONE_OF_EACH)
def test_the_number_of_multiprocessors_changes_no_bit(library, emulated, text):
    rule, n = rule_of(text), 700
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


@pytest.mark.parametrize("text", [lstm("raw"), lstm("raw", 7, 3), *ONE_OF_EACH])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 1e38])
def test_a_strange_gradient_stays_in_its_coordinate(emulated, text, value):
    rule, n, place = rule_of(text), 37, 17
    others, rest = torch.arange(n) != place, (detached(rule), *constants(rule))
    state, grads, adjoints, dstate = window_arguments(rule, n)
    strange = grads.clone()
    strange[2, place] = value
    before, after = (
        emulated.window_backward(state, gradients, adjoints, *rest, dstate, True, True)
        for gradients in (grads, strange)
    )
    for one, other in zip(before[1:3], after[1:3], strict=True):
        one, other = (x if x.dim() == 2 else to_rows(x, n) for x in (one, other))
        assert bits(one[:, others]) == bits(other[:, others])
    assert after[0].isnan().any() or not math.isnan(value)
    param, its_state = torch.zeros(n), tiles(random_rows(rule, n))
    emulated.step_([param], [strange[2]], [its_state], *rest, 1.0)
    assert param[others].isfinite().all()
    expected = reference.step(strange[2], random_rows(rule, n), *rest)
    for found, truth in zip((param, to_rows(its_state, n)), expected, strict=True):
        torch.testing.assert_close(found[..., place], truth[..., place], equal_nan=True)


@pytest.mark.parametrize("text", [lstm(), RNNPROP])
def test_unused_lanes_reach_nothing_and_any_address_will_do(emulated, text):
    rule, n = rule_of(text), 37
    rest = detached(rule), *constants(rule)
    state, grads, adjoints, dstate = window_arguments(rule, n)  # NaN where there is no coordinate
    clean = [from_rows(to_rows(tensor, n)) for tensor in (state, dstate)]
    moved = [torch.cat([torch.zeros(1), x.flatten()])[1:].view(x.shape) for x in clean]
    expected = emulated.window_backward(clean[0], grads, adjoints, *rest, clean[1], True, True)
    for first, last in ((state, dstate), moved):
        found = emulated.window_backward(first, grads, adjoints, *rest, last, True, True)
        assert bits(found[0], to_rows(found[1], n), found[2]) == bits(expected[0], to_rows(expected[1], n), expected[2])
    pairs = [(clean[0], moved[0])]
    if rule.config.takes_bfloat16_state:
        halves = clean[0].bfloat16()
        pairs.append((halves, torch.cat([halves.new_zeros(1), halves.flatten()])[1:].view(halves.shape)))
    for states in pairs:
        results = []
        for x in states:
            param = torch.zeros(n)
            emulated.step_([param], [grads[0]], [x], *rest, 1.0)
            results.append(param)
        torch.testing.assert_close(*results)


def test_given_rows_are_those_of_all_parameters_one_after_the_other(emulated):
    rule = rule_of("raw:0.7 given:3 lstm:5 linear")
    rest, sizes = (detached(rule), *constants(rule), 1.0, None), [(7 * i) % 40 for i in range(150)]  # several launches
    grads = [random_gradients(size, seed=i) for i, size in enumerate(sizes)]
    given = [tiles(torch.randn(3, size, generator=torch.Generator().manual_seed(size))) for size in sizes]
    together, alone = ([torch.zeros(size) for size in sizes] for _ in range(2))
    emulated.step_(together, grads, [new_state(rule, size) for size in sizes], *rest, torch.cat(given))
    for param, grad, rows in zip(alone, grads, given, strict=True):
        emulated.step_([param], [grad], [new_state(rule, param.numel())], *rest, rows)
    assert bits(*together) == bits(*alone)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("text", ONE_OF_EACH)
def test_units_multiply_the_updates_of_their_parameters(emulated, text, dtype):
    assert_units_multiply_updates_alone(emulated, text, dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("text", ONE_OF_EACH)
def test_parameters_decay_and_a_rate_multiplies_decay_and_update(emulated, text, dtype):
    rule, n = rule_of(text), 37
    start, grad = torch.linspace(-2, 3, n).to(dtype), random_gradients(n)
    change = torch.zeros(n)
    emulated.step_([change], [grad], [new_state(rule, n)], *(rest := (detached(rule), *constants(rule), 1.0)))
    for rate in (None, 0.5, 0.0):
        factor = 1.0 if rate is None else rate
        param, tensor = start.clone(), None if rate is None else torch.tensor(rate)
        emulated.step_([param], [grad.to(dtype)], [new_state(rule, n)], *rest, None, None, 0.25, tensor)
        if dtype == torch.bfloat16:  # of other gradients
            change = torch.zeros(n)
            emulated.step_([change], [grad.to(dtype).float()], [new_state(rule, n)], *rest)
        expected = start.double() * (1 - 0.25 * factor) + change.double() * factor
        torch.testing.assert_close(param, expected.to(dtype))


HUGE = "adam:0.9,0.99,1e-06 given:32768 elu:32768 lstm:" + ",".join(["32768"] * 64)


@pytest.mark.parametrize("text", [*(rule.rsplit(" ", 1)[0] for rule in RULES + GIVEN), HUGE])
def test_weights_lie_where_they_are_looked_for(library, text):
    shapes = RuleConfig.parse(text + " none").weight_shapes
    assert offset_of_output(library, text + " none") == sum(math.prod(shape) for _, shape in shapes)


def test_a_rule_without_output_leaves_parameters_alone(emulated):
    rule, n = rule_of("log_sign:10 lstm:20,20 none"), 37
    param, state = torch.ones(n), new_state(rule, n)
    rest = detached(rule), *constants(rule), 1.0, None, None, 0.5
    emulated.step_([param], [random_gradients(n)], [state], *rest)
    assert bits(param) == bits(torch.ones(n))
    assert to_rows(state, n).any()
