"""The Triton kernels: on a GPU where there is one, else by Triton's interpreter.

The interpreter computes every matrix product in float32 whatever the precision asked for, so here the logic is tested,
not the rounding of tensor cores.
"""

from __future__ import annotations

import math
import os
import sys
from importlib import util

import pytest
import torch
from helpers import (
    GIVEN,
    RNNPROP,
    RULES,
    Case,
    all_finite,
    assert_accurate,
    assert_bfloat16_is_float32_rounded,
    assert_bfloat16_steps_are_accurate,
    assert_halves_are_rounded_to_even,
    assert_one_state_does_for_all,
    assert_units_multiply_updates_alone,
    backward_by,
    constants,
    detached,
    lstm,
    random_gradients,
    random_rows,
    random_rule,
    rule_of,
    steps_by,
    tiles,
)

from fastl2l import reference
from fastl2l.ops import dispatch
from fastl2l.ops.layout import from_rows, new_state, to_rows
from fastl2l.rule_config import RuleConfig

if util.find_spec("triton") is None and os.environ.get("CI") != "true":
    pytest.skip("needs triton", allow_module_level=True)

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
with pytest.MonkeyPatch.context() as patch:
    # Triton looks when its functions are decorated, which is now: the variable need not outlive these lines.
    if DEVICE == "cpu":
        assert "triton" not in sys.modules, "triton was imported before it could be told to interpret"
        patch.setenv("TRITON_INTERPRET", "1")
    import triton
    import triton.experimental.gluon  # imported at the first launch, it would look again
    import triton.language as tl

    from fastl2l.kernels import cell, launch
    from fastl2l.ops import triton as operators

    @triton.jit
    def elementwise_kernel(x, y, N: tl.constexpr, FUNCTION: tl.constexpr):
        at = tl.program_id(0) * N + tl.arange(0, N)
        if FUNCTION == "sigmoid":
            tl.store(y + at, cell.sigmoid(tl.load(x + at)))
        elif FUNCTION == "tanh":
            tl.store(y + at, cell.tanh(tl.load(x + at)))
        elif FUNCTION == "elu":
            tl.store(y + at, cell.elu(tl.load(x + at)))
        else:
            tl.store(y + at, cell.log(tl.load(x + at)))


NAN, INF = math.nan, math.inf
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton.runtime.interpreter")


def there(tensors):
    return [tensor.to(DEVICE) for tensor in tensors]


def step_(params, grads, states, weights, rule, scale, grad_scale, *more):
    mine, theirs = [*params, *states], there([*params, *states])
    more = [x.to(DEVICE) if isinstance(x, torch.Tensor) else x for x in more]
    operators.step_(
        theirs[: len(params)], there(grads), theirs[len(params) :], there(weights), rule, scale, grad_scale, *more
    )
    for tensor, result in zip(mine, theirs, strict=True):
        tensor.copy_(result)


def window_backward(state, grads, adjoints, weights, rule, scale, dstate, need_dstate, need_dgrads, *more):
    state, grads, adjoints = there([state, grads, adjoints])
    dstate = None if dstate is None else dstate.to(DEVICE)
    more = [x.to(DEVICE) if isinstance(x, torch.Tensor) else x for x in more]
    found = operators.window_backward(
        state, grads, adjoints, there(weights), rule, scale, dstate, need_dstate, need_dgrads, *more
    )
    return tuple(tensor.cpu() for tensor in found)


# Tensors of the tests are on the CPU.
TRITON = dispatch.Backend("triton", step_, window_backward, operators.find_nonfinite_)


def bits_equal(one, other):
    """Equal to the bit; NaN equals NaN."""
    kind = {2: torch.int16, 4: torch.int32, 8: torch.int64}[one.element_size()]
    return one.dtype == other.dtype and torch.equal(one.contiguous().view(kind), other.contiguous().view(kind))


def window_arguments(rule, n=37, steps=2):
    """A window with NaN in the lanes that belong to no coordinate."""
    grads, adjoints = (random_gradients(steps, n, seed=seed).to(rule.dtype) for seed in (0, 1))
    state, dstate = (tiles(random_rows(rule, n, seed), rule.dtype) for seed in (0, 1))
    return state, grads, adjoints, dstate


# Accuracy

CASES = [
    *(Case(rule, 17, 2, 1) for rule in RULES + GIVEN),
    Case(lstm(), 200, 1, 1),
    Case(RNNPROP, 200, 2, 1),
    Case(lstm(hidden=14, layers=1), 16, 1, 1, gain=10.0),
    Case(lstm("raw", 5, 1), 17, 2, 1, magnitude=1e30),
    *(Case(RNNPROP, 17, 2, 1, magnitude=magnitude) for magnitude in (0.0, 1e-36, 1e16)),
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: "-".join(map(str, case)))
def test_steps_and_windows_are_as_accurate_as_pytorch(case):
    assert_accurate(steps_by(TRITON, case, torch.float32) | backward_by(TRITON, case, torch.float32), case)


@pytest.mark.parametrize("rule", [lstm(hidden=5), "adam:0.9,0.99,1e-06 given:1 elu:5 lstm:5 tanh"])
def test_float64_rules(rule):
    case = Case(rule, 17, 2, 1)
    assert_accurate(steps_by(TRITON, case, torch.float64) | backward_by(TRITON, case, torch.float64), case)


def test_steps_with_state_in_bfloat16():
    assert_bfloat16_steps_are_accurate(TRITON, Case(lstm(), 17, 2, 4))
    assert_bfloat16_steps_are_accurate(TRITON, Case(lstm("raw", 5, 3), 70, 2, 4))
    assert_bfloat16_steps_are_accurate(TRITON, Case("log_sign:5 elu:3 lstm:20 tanh", 17, 2, 4))
    assert_bfloat16_is_float32_rounded(TRITON, random_rule(hidden=5), 37)
    assert_halves_are_rounded_to_even(TRITON)


BOUNDS = {"sigmoid": 3.0, "tanh": 3.0, "log": 2.0, "elu": 4.0}
EXACT = {"sigmoid": torch.sigmoid, "tanh": torch.tanh, "log": torch.log, "elu": torch.nn.functional.elu}


def elementwise(function, x):
    x = x.to(DEVICE)
    y = torch.full_like(x, NAN)
    elementwise_kernel[(1,)](x, y, N=x.numel(), FUNCTION=function, **launch.OPTIONS)
    return y.cpu()


@pytest.mark.parametrize("function", BOUNDS)
def test_functions_are_accurate(function):
    magnitudes = torch.logspace(-44, 38, 16384, dtype=torch.float64).float()
    x = magnitudes if function == "log" else torch.cat([magnitudes[:8192], -magnitudes[8192:]])
    # Sigmoid of large negative numbers is small: its error is that of x, in units of x.
    x = x.clamp(-80, 80) if function == "sigmoid" else x
    exact = EXACT[function](x.double())
    if function == "sigmoid":
        allowed = exact * 2**-23 * (3 + x.double().abs())
    else:
        allowed = BOUNDS[function] * torch.exp2(exact.abs().clamp(min=2.0**-126).log2().floor() - 23)
    assert ((elementwise(function, x).double() - exact).abs() <= allowed).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_functions_of_special_values(dtype):
    x = torch.tensor([NAN, INF, -INF, 0.0, 1e-5, -1e-5, 1.0, -1.0], dtype=dtype)
    for function, exact in EXACT.items():
        if function == "log":
            continue
        torch.testing.assert_close(elementwise(function, x), exact(x), equal_nan=True, rtol=1e-6, atol=0)
    positive = torch.tensor([NAN, INF, 1.0, 2.0], dtype=dtype)
    torch.testing.assert_close(elementwise("log", positive), positive.log(), equal_nan=True)


# What must not matter


SMALL = [lstm(hidden=5), "adam:0.9,0.99,1e-06 given:2 elu:3 lstm:5 tanh", "raw:0.7 given:3 lstm:5,5 none"]
"""Every part and every way between them, in few units."""


def random_given(rule, steps, n):
    """Given rows of a window with NaN in the lanes that belong to no coordinate, or None."""
    count, generator = rule.config.given, torch.Generator().manual_seed(0)
    rows = torch.randn(steps, count, n, generator=generator).to(rule.dtype)
    return torch.stack([tiles(step) for step in rows]) if count else None


@pytest.mark.parametrize("text", SMALL)
def test_nan_in_unused_lanes_and_fresh_memory_reaches_nothing_and_runs_repeat(text, poisoned_memory):
    rule, n = rule_of(text), 63
    state, grads, adjoints, dstate = window_arguments(rule, n)
    given = random_given(rule, len(grads), n)
    assert state.isnan().any()
    rest = detached(rule), *constants(rule)
    dweights, dfirst, dgrads, dgiven = window_backward(
        state, grads, adjoints, *rest, dstate, True, True, given, True
    )  # fmt: skip
    clean = [from_rows(to_rows(tensor, n)) for tensor in (state, dstate)]
    clean_given = None if given is None else given.nan_to_num()
    expected = window_backward(clean[0], grads, adjoints, *rest, clean[1], True, True, clean_given, True)
    assert dweights.isfinite().all()
    assert bits_equal(dweights, expected[0])
    assert bits_equal(dfirst, expected[1])
    assert not dfirst[-1, :, n % 16 :].any()
    assert bits_equal(dgrads, expected[2])
    assert bits_equal(dgiven, expected[3])
    assert dgiven.isfinite().all()


@pytest.mark.parametrize("text", SMALL)
def test_what_is_not_asked_for_changes_nothing_else(text):
    rule = rule_of(text)
    state, grads, adjoints, dstate = window_arguments(rule)
    arguments = state, grads, adjoints, detached(rule), *constants(rule)
    given = random_given(rule, len(grads), grads.shape[1])
    without = window_backward(*arguments, None, False, False, given)
    zeros = window_backward(*arguments, torch.zeros_like(dstate), True, True, given, True)
    assert bits_equal(without[0], zeros[0])
    assert without[1].shape == (0, *state.shape[1:])
    assert without[2].shape == (0, grads.shape[1])
    assert without[3].shape == (0,)
    assert zeros[3].shape == (zeros[3] if given is None else given).shape
    for needs in ((True, False, False), (False, True, False), (False, False, True)):
        found = window_backward(*arguments, None, *needs[:2], given, needs[2])
        for one, other, need in zip(found[1:], zeros[1:], needs, strict=True):
            assert not need or bits_equal(one, other)


@pytest.mark.parametrize("rule", SMALL)
def test_chunks_of_a_window_add_up(rule, monkeypatch):
    case = Case(rule, 150, 2, 1)
    monkeypatch.setattr(launch, "MOST_PROGRAMS", 2)
    rule = operators._rule(detached(case.rules()[0]), *constants(case.rules()[0]))
    assert launch.programs_at_once(rule, 2) == 2
    assert_accurate(backward_by(TRITON, case, torch.float32), case)


def test_workspace_is_bounded():
    rule = launch.Rule(RuleConfig.parse(lstm()), 0.1, torch.float32, "tf32x3")
    assert launch.programs_at_once(rule, 20) == launch.MOST_PROGRAMS
    for steps in (1, 100, 10_000, 10**8):
        programs = launch.programs_at_once(rule, steps)
        size = programs * (4 * (steps + 1) + 4 * steps) * 32 * 64 * 4
        assert programs == 1 or size <= launch.MOST_WORKSPACE


def test_rules_that_differ_in_constants_share_their_kernels():
    one, other, third = (
        launch.shape_of(RuleConfig.parse(f"adam:{constants} elu:20 lstm:20,20 tanh"))
        for constants in ("0.95,0.95,1e-08", "0.9,0.9,1e-06", "0.9,0.99,1e-06")
    )
    assert one == other
    assert one != third


def test_inputs_are_left_alone():
    rule = random_rule(hidden=5)
    tensors = [*window_arguments(rule), *detached(rule)]
    before = [tensor.clone() for tensor in tensors]
    state, grads, adjoints, dstate, *weights = tensors
    window_backward(state, grads, adjoints, weights, *constants(rule), dstate, True, True)
    assert all(bits_equal(a, b) for a, b in zip(tensors, before, strict=True))


# Parameters of every dtype, and several at once


@pytest.mark.parametrize("rule_dtype", [torch.float32, torch.float64], ids=str)
def test_parameters_of_any_dtype_and_number(rule_dtype):
    rule = random_rule(hidden=5, dtype=rule_dtype, output_scale=0.01)
    sizes, dtypes = (0, 1, 17, 80), (torch.float64, torch.float16, torch.bfloat16, torch.float32)
    grads = [random_gradients(n, seed=n).clamp(-1e4, 1e4).to(dtype) for n, dtype in zip(sizes, dtypes, strict=True)]
    params = [torch.linspace(-2, 3, grad.numel()).to(grad.dtype) for grad in grads]
    states = [tiles(random_rows(rule, n, n), rule_dtype) for n in sizes]
    expected = [param.clone() for param in params]
    for param, grad, state in zip(expected, grads, states, strict=True):
        change, _ = reference.step(
            grad.to(rule_dtype) * -0.5, to_rows(state, grad.numel()), detached(rule), *constants(rule)
        )
        wide = torch.promote_types(param.dtype, rule_dtype)
        param.copy_((param.to(wide) + change.to(wide)).to(param.dtype))
    step_(params, grads, states, detached(rule), *constants(rule), -0.5)
    for found, truth in zip(params, expected, strict=True):
        eps = torch.finfo(found.dtype if rule_dtype == torch.float64 else torch.float32).eps
        tolerance = max(torch.finfo(found.dtype).eps, 8 * eps)
        torch.testing.assert_close(found, truth, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("text", [RNNPROP, GIVEN[1], GIVEN[3]])
def test_rate_decay_and_given_rows_are_those_of_the_reference_backend(text):
    rule, sizes, dtypes = rule_of(text), (3, 0, 20, 33), (torch.float32, torch.bfloat16, torch.float64, torch.float32)
    grads = [random_gradients(n, seed=n).to(dtype) for n, dtype in zip(sizes, dtypes, strict=True)]
    state, given = tiles(random_rows(rule, 96)), random_given(rule, 1, 96)
    rows, tile_counts = None if given is None else given[0], [1, 0, 2, 3]

    def run(backend, rate):
        params, its_state = [torch.linspace(-2, 3, grad.numel()).to(grad.dtype) for grad in grads], state.clone()
        backend.step_(params, grads, [its_state], detached(rule), *constants(rule), 1.0, None, rows, 0.25, rate)
        return *params, *(to_rows(part, n) for part, n in zip(its_state.split(tile_counts), sizes, strict=True))

    results = []
    for rate in (None, torch.tensor(0.7)):
        results.append(run(TRITON, rate))
        for found, truth in zip(results[-1], run(dispatch.select("reference", "cpu"), rate), strict=True):
            torch.testing.assert_close(found, truth, rtol=1e-5, atol=1e-6)
    if rule.config.output != "none":
        assert not torch.allclose(results[0][0], results[1][0], rtol=1e-2)


def test_half_precision_overflows_to_infinity():
    rule = random_rule(hidden=5, output_scale=1e9)
    param, grad = torch.zeros(20, dtype=torch.float16), torch.ones(20, dtype=torch.float16)
    step_([param], [grad], [new_state(rule, 20)], detached(rule), *constants(rule), 1.0)
    assert param.isinf().all()


@pytest.mark.parametrize("steps", [1, 3])
def test_nothing_is_an_input_too(steps, poisoned_memory):
    rule = random_rule(hidden=5)
    step_([], [], [], detached(rule), *constants(rule), 1.0)
    nothing = torch.zeros(steps, 0)
    dweights, dstate, dgrads, _ = window_backward(
        new_state(rule, 0), nothing, nothing, detached(rule), *constants(rule), None, True, True
    )
    assert torch.equal(dweights, torch.zeros(sum(weight.numel() for weight in rule.weights())))
    assert dstate.shape == (0, 20, 16)
    assert dgrads.shape == (steps, 0)


# Numbers that are not finite


STRANGE = [lstm("raw", 5), lstm(hidden=5), "log_sign:10 elu:3 lstm:5 linear", "adam:0.95,0.95,1e-08 elu:3 lstm:5 tanh"]


@pytest.mark.parametrize("text", STRANGE)
@pytest.mark.parametrize("value", [NAN, INF, 1e-45])
def test_a_strange_gradient_stays_in_its_coordinate(text, value):
    rule, n, place = rule_of(text), 37, 17
    others = torch.arange(n) != place
    ordinary, rows = random_gradients(n), random_rows(rule, n)
    strange = ordinary.clone()
    strange[place] = value
    found = []
    for grad in (ordinary, strange):
        param, state = torch.zeros(n), tiles(rows)
        step_([param], [grad], [state], detached(rule), *constants(rule), 1.0)
        found.append((param, to_rows(state, n)))
    for before, after in zip(*found, strict=True):
        assert bits_equal(before[..., others], after[..., others])
    expected = reference.step(strange, rows, detached(rule), *constants(rule))
    for after, truth in zip(found[1], expected, strict=True):
        torch.testing.assert_close(after[..., place], truth[..., place], equal_nan=True)
    if math.isnan(value):
        assert found[1][0][place].isnan()
        assert found[1][1][: rule.config.lstm_rows, place].isnan().all()


@pytest.mark.parametrize("text", STRANGE[1:])
@pytest.mark.parametrize("value", [NAN, INF])
def test_a_window_with_a_strange_gradient_is_strange_in_its_coordinate_and_the_weights(text, value):
    rule, n, place = rule_of(text), 37, 18
    state, grads, adjoints, dstate = window_arguments(rule, n)
    rest = detached(rule), *constants(rule), dstate, True, True
    before = window_backward(state, grads, adjoints, *rest)
    grads[1, place] = value
    after, others = window_backward(state, grads, adjoints, *rest), torch.arange(n) != place
    assert bits_equal(to_rows(before[1], n)[:, others], to_rows(after[1], n)[:, others])
    assert bits_equal(before[2][:, others], after[2][:, others])
    if math.isnan(value):
        assert after[0].isnan().any()
        assert after[1][1, :, place - 16].isnan().any()


@pytest.mark.parametrize("text", [lstm(hidden=3, layers=1), STRANGE[-1]])
@pytest.mark.parametrize("value", [1.0, NAN, -INF])
def test_a_step_that_is_asked_to_changes_nothing_unless_all_gradients_are_finite(text, value):
    rule, flag = rule_of(text), torch.ones(1, dtype=torch.bool)
    grad, tensors = random_gradients(17), [torch.zeros(17), new_state(rule, 17), flag]
    grad[16] = value
    param, state, flag = there(tensors)
    operators.step_([param], there([grad]), [state], there(detached(rule)), *constants(rule), 1.0, flag)
    assert flag.item() == math.isfinite(value)
    assert bool(state.any()) == bool(param.any()) == math.isfinite(value)


def test_one_state_does_for_all_parameters():
    assert_one_state_does_for_all(dispatch._of_operators("triton", torch.ops.fastl2l_triton), DEVICE)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("text", [lstm(), RNNPROP])
def test_units_multiply_the_updates_of_their_parameters(text, dtype):
    assert_units_multiply_updates_alone(TRITON, text, dtype)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_all_finite_misses_nothing(dtype):
    fine = torch.full((100,), torch.finfo(dtype).max, dtype=dtype, device=DEVICE)
    empty = fine[:0]
    assert all_finite(TRITON, [fine, empty])
    for value in (NAN, INF, -INF):
        wrong = fine.clone()
        wrong[99] = value
        assert not all_finite(TRITON, [fine, wrong])


# Arguments that are not as they should be

RULE = random_rule()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"grads": lambda x: []}, "grads: expected 1 tensors, got 0"),
        ({"params": lambda x: [x[0].int()]}, r"params\[0\]: expected float32, float64, float16 or bfloat16, got"),
        ({"params": lambda x: [x[0].view(4, 5).T]}, r"params\[0\]: expected a contiguous tensor"),
        ({"grads": lambda x: [x[0].double()]}, r"grads\[0\]: expected float32, got float64"),
        ({"grads": lambda x: [x[0][:3]]}, r"grads\[0\]: expected 20 elements, got 3"),
        ({"grads": lambda x: [x[0].to("meta")]}, r"grads\[0\]: expected a tensor on .*, got one on meta"),
        ({"states": lambda x: [x[0].double()]}, r"states\[0\]: expected float32 or bfloat16, got float64"),
        ({"states": lambda x: [x[0][:1]]}, r"states\[0\]: expected shape \[2, 80, 16\], got \[1, 80, 16\]"),
        ({"weights": lambda x: x[1:]}, "weights: expected 8 tensors for log_sign:10 lstm:20,20 linear, got 7"),
        ({"weights": lambda x: [w.half() for w in x]}, "weights: expected float32 or float64, got float16"),
        ({"weights": lambda x: [*x[:-1], x[-1].view(1)]}, r"weights\[7\]: expected shape \[\], got \[1\]"),
        ({"weights": lambda x: [*x[:-2], x[-2][:0], x[-1]]}, r"weights\[6\]: expected shape \[20\], got \[0\]"),
        ({"rule": lambda x: "log:10 lstm:20,20 linear"}, "rule 'log:10 lstm:20,20 linear': expected the parts"),
        ({"rule": lambda x: lstm("raw")}, r"weights\[0\]: expected shape \[80, 1\], got \[80, 2\]"),
    ],
)
def test_bad_arguments_of_step_are_named_and_nothing_is_changed(changes, message):
    arguments = {
        "params": [torch.zeros(20)],
        "grads": [torch.ones(20)],
        "states": [new_state(RULE, 20)],
        "weights": detached(RULE),
        "rule": RULE.text,
    }
    params, states = arguments["params"], arguments["states"]
    for key, change in changes.items():
        arguments[key] = change(arguments[key])
    with pytest.raises(RuntimeError, match=message):
        operators.step_(*arguments.values(), 1.0, 1.0)
    assert not params[0].any()
    assert not states[0].any()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"grads": lambda x: x[0]}, r"grads: expected shape \[steps >= 1, N\], got \[37\]"),
        ({"grads": lambda x: x[:0]}, r"grads: expected shape \[steps >= 1, N\], got \[0, 37\]"),
        ({"adjoints": lambda x: x[:1]}, r"adjoints: expected shape \[2, 37\], got \[1, 37\]"),
        ({"state": torch.Tensor.double}, "state: expected float32, got float64"),
        ({"state": torch.Tensor.bfloat16}, "state: expected float32, got bfloat16"),
        ({"dstate": lambda x: x[:, 1:]}, r"dstate: expected shape \[3, 80, 16\], got \[3, 79, 16\]"),
    ],
)
def test_bad_arguments_of_window_backward_are_named(changes, message):
    arguments = dict(zip(("state", "grads", "adjoints", "dstate"), window_arguments(RULE), strict=True))
    for key, change in changes.items():
        arguments[key] = change(arguments[key])
    dstate = arguments.pop("dstate")
    with pytest.raises(RuntimeError, match=message):
        operators.window_backward(*arguments.values(), detached(RULE), *constants(RULE), dstate, True, True)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (lstm(hidden=80), "61 hidden units with backend 'triton', got 80; use"),
        ("raw:1 elu:65 lstm:5 linear", "64 units of a projection with backend 'triton', got 65; use"),
        ("raw:1 given:64 lstm:5 none", "64 inputs of the first layer with backend 'triton', got 65; use"),
    ],
)
def test_rules_too_large_are_refused(text, message):
    rule = rule_of(text)
    with pytest.raises(RuntimeError, match=f"rule '{text}': expected at most {message}"):
        operators.step_([], [], [], detached(rule), *constants(rule), 1.0)


@pytest.mark.parametrize("text", [text for text in RULES + GIVEN if "adam" in text])
def test_means_in_bfloat16_are_refused(text):
    rule, param = rule_of(text), torch.zeros(20)
    given = random_given(rule, 1, 20)
    with pytest.raises(RuntimeError, match=r"states\[0\]: expected float32, got bfloat16"):
        operators.step_(
            [param], [param + 1], [new_state(rule, 20, dtype=torch.bfloat16)], detached(rule), *constants(rule), 1.0,
            None, None if given is None else given[0],
        )  # fmt: skip
    assert not param.any()


def test_numbers_and_given_rows_that_do_not_fit_are_refused():
    rule, param = rule_of(GIVEN[3]), torch.zeros(20)
    tensors = [param], [param + 1], [new_state(rule, 20)], detached(rule), *constants(rule), 1.0, None
    given = torch.zeros(2, 3, 16)
    for rest, message in (
        ((None,), "given: expected 3 rows for raw:0.7 given:3 lstm:20,20 linear, got none"),
        ((given[:, :2].contiguous(),), r"given: expected shape \[2, 3, 16\], got \[2, 2, 16\]"),
        ((given, INF), "decay: expected a finite float32, got inf"),
        ((given, 0.0, torch.zeros(1)), r"rate: expected shape \[\], got \[1\]"),
    ):
        with pytest.raises(RuntimeError, match=message):
            operators.step_(*tensors, *rest)
    assert not param.any()


def test_unknown_precisions_are_refused(monkeypatch):
    monkeypatch.setenv("FASTL2L_TRITON_PRECISION", "tf32")
    with pytest.raises(RuntimeError, match="FASTL2L_TRITON_PRECISION: expected one of tf32x3, ieee, got tf32"):
        operators.step_([], [], [], detached(RULE), *constants(RULE), 1.0)


def test_precision_is_chosen_by_the_environment_and_the_dtype(monkeypatch):
    assert operators._rule(detached(RULE), *constants(RULE)).precision == "tf32x3"
    assert operators._rule(detached(RULE, torch.float64), *constants(RULE)).precision == "ieee"
    monkeypatch.setenv("FASTL2L_TRITON_PRECISION", "ieee")
    assert operators._rule(detached(RULE), *constants(RULE)).precision == "ieee"
    rule, grad = random_rule(hidden=5), random_gradients(37)
    found, expected = torch.zeros(37), torch.zeros(37)
    step_([found], [grad], [new_state(rule, 37)], detached(rule), *constants(rule), 1.0)
    dispatch.select("reference", "cpu").step_(
        [expected], [grad], [new_state(rule, 37)], detached(rule), *constants(rule), 1.0
    )
    torch.testing.assert_close(found, expected)


# The choice of a backend


def test_the_interpreter_takes_cpu_tensors_only_when_asked(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert dispatch.available_backends()["triton"] is None
    assert dispatch.select("triton", "cpu").name == "triton"
    assert dispatch.select("auto", "cpu").name == "native"
    monkeypatch.delenv("TRITON_INTERPRET")
    with pytest.raises(RuntimeError, match=r"'triton' cannot be used: its kernels take CUDA tensors.*on cpu"):
        dispatch.select("triton", "cpu")


@pytest.fixture
def _no_native_cuda(monkeypatch):
    """Native kernels for the CPU alone, though a build on this machine may have others."""
    monkeypatch.setattr(torch._C, "_dispatch_has_kernel_for_dispatch_key", lambda name, key: False)


@pytest.mark.usefixtures("_no_native_cuda")
def test_without_a_device_the_reason_is_given(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert "no CUDA device" in dispatch.available_backends()["triton"]
    with pytest.raises(RuntimeError, match="backend 'triton' cannot be used: there is no CUDA device"):
        dispatch.select("triton", "cuda")
    assert dispatch.select("auto", "cuda").name == "reference"


@pytest.fixture
def _fresh_answers(monkeypatch):
    """As on a machine with a GPU; what dispatch remembers is forgotten, before and after."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    remembered = dispatch._triton_missing, dispatch._gpu_too_old
    for function in remembered:
        function.cache_clear()
    yield
    for function in remembered:
        function.cache_clear()


@pytest.mark.usefixtures("_fresh_answers", "_no_native_cuda")
@pytest.mark.parametrize(
    ("spec", "version", "message"),
    [
        (None, None, r"triton is not installed: pip install 'fastl2l\[triton\]'"),
        (object(), "3.5.1", r"expected triton 3.6 or newer, got 3.5.1: pip install"),
    ],
)
def test_triton_that_is_missing_or_too_old_is_an_error_with_the_cure(monkeypatch, spec, version, message):
    monkeypatch.setattr(dispatch.util, "find_spec", lambda name: spec)
    monkeypatch.setattr(dispatch.metadata, "version", lambda name: version)
    with pytest.raises(RuntimeError, match=message):
        dispatch.select("triton", "cuda")
    assert dispatch.select("auto", "cuda:0").name == "reference"


@pytest.mark.usefixtures("_fresh_answers", "_no_native_cuda")
def test_a_gpu_that_is_too_old_is_an_error(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Old GPU")
    message = r"expected a GPU of compute capability 8.0 or newer, got Old GPU of 7.5; use backend='reference'"
    with pytest.raises(RuntimeError, match=message):
        dispatch.select("triton", "cuda:0")
    assert dispatch.select("auto", "cuda:0").name == "reference"


@pytest.mark.usefixtures("_fresh_answers")
@pytest.mark.parametrize("has_kernels", [True, False])
def test_cuda_tensors_get_native_kernels_where_there_are_some_else_triton(monkeypatch, has_kernels):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(torch._C, "_dispatch_has_kernel_for_dispatch_key", lambda name, key: has_kernels)
    assert dispatch.select("auto", "cuda:0").name == ("native" if has_kernels else "triton")
    assert dispatch.select("triton", "cuda:0").name == "triton"
