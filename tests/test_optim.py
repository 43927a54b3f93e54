"""FusedLSTMOptimizer does what torch.optim's optimizers do, with the reference's numbers."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import io
import math
import pickle
import warnings

import numpy as np
import pytest
import torch
from helpers import GIVEN, RNNPROP, constants, detached, lstm, random_gradients, random_rule, rule_of
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from fastl2l import FusedLSTMOptimizer, GACRule, LSTMRule, RNNpropRule, load_rule, optim, optimizer_state, reference
from fastl2l.ops import dispatch
from fastl2l.ops import reference as reference_operators
from fastl2l.ops.dispatch import select
from fastl2l.ops.layout import from_rows, new_state, to_rows
from fastl2l.rules import stepping

DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
SHAPES = ((3, 5), (17,), (), (2, 1, 4, 3), (0, 2))
NAN, INF = math.nan, math.inf


@pytest.fixture
def rule():
    return random_rule(hidden=7, layers=2)


def parameters(dtype=torch.float32, shapes=SHAPES, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [nn.Parameter(torch.randn(shape, generator=generator).to(dtype)) for shape in shapes]


def set_gradients(params, step):
    for i, param in enumerate(params):
        param.grad = random_gradients(*param.shape, seed=100 * step + i).clamp(-100, 100).to(param.dtype)


def run(optimizer, params, steps):
    """Steps with the gradients of these step numbers; copies of the parameters afterwards."""
    for step in steps:
        set_gradients(params, step)
        optimizer.step()
    return [param.detach().clone() for param in params]


def same(one, other):
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def by_reference(rule, params, steps, lr=1.0):
    """What the parameters become in float64."""
    params = [param.detach().double() for param in params]
    rows = [torch.zeros(rule.config.state_rows, param.numel(), dtype=torch.float64) for param in params]
    for step in steps:
        for i, param in enumerate(params):
            grad = random_gradients(*param.shape, seed=100 * step + i).clamp(-100, 100).double()
            change, rows[i] = reference.step(grad.flatten(), rows[i], detached(rule, torch.float64), *constants(rule))
            params[i] = param + lr * change.view(param.shape)
    return params


# Steps


@pytest.mark.parametrize("backend", ["auto", "native", "reference"])
@pytest.mark.parametrize("preprocess", ["raw", "log_sign"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_steps_are_the_reference_s(preprocess, backend, dtype):
    rule = random_rule(preprocess)
    params = parameters(dtype)
    expected = by_reference(rule, params, range(10))
    optimizer = FusedLSTMOptimizer(params, rule, backend=backend)
    for found, wanted in zip(run(optimizer, params, range(10)), expected, strict=True):
        torch.testing.assert_close(found.double(), wanted, rtol=1e-5, atol=1e-5)
    assert all(optimizer.state[param]["lstm_state"].dtype == torch.float32 for param in params)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_parameters_of_any_dtype_are_rounded_at_the_end(rule, dtype):
    params, wide = parameters(dtype), parameters(dtype)
    wide = [nn.Parameter(param.detach().double()) for param in wide]
    optimizers = FusedLSTMOptimizer(params, rule), FusedLSTMOptimizer(wide, rule)
    for step in range(5):
        set_gradients(params, step)
        for param, other in zip(params, wide, strict=True):
            other.grad = param.grad.double()
            other.data = param.detach().double()
        for optimizer in optimizers:
            optimizer.step()
        eps = torch.finfo(dtype).eps
        for param, other in zip(params, wide, strict=True):
            assert param.dtype == dtype
            torch.testing.assert_close(param.double(), other, rtol=eps, atol=1e-7)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_states_are_stored_in_bfloat16_where_that_is_asked(rule, dtype):
    params, twins, states = parameters(dtype), parameters(dtype), []
    for twin in twins:
        states.append(new_state(rule, twin.numel(), dtype=torch.bfloat16))
    optimizer = FusedLSTMOptimizer(params, rule, state_dtype=torch.bfloat16, backend="native")
    native = select("native", "cpu")
    for step in range(4):
        run(optimizer, params, [step])
        set_gradients(twins, step)
        for twin, state in zip(twins, states, strict=True):
            native.step_([twin.detach()], [twin.grad], [state], detached(rule), *constants(rule), 1.0)
        assert same(params, twins)
    for param, state in zip(params, states, strict=True):
        mine = optimizer.state[param]["lstm_state"]
        assert mine.dtype == torch.bfloat16
        assert torch.equal(to_rows(mine, param.numel()), to_rows(state, param.numel()))


def test_a_state_is_kept_from_step_to_step(rule):
    # A widespread fork of the original code resets it: then equal gradients give equal updates.
    param = nn.Parameter(torch.zeros(5))
    optimizer = FusedLSTMOptimizer([param], rule)
    updates = []
    for _ in range(3):
        before = param.detach().clone()
        param.grad = torch.ones(5)
        optimizer.step()
        updates.append(param.detach() - before)
    assert not torch.allclose(updates[0], updates[1], rtol=1e-2)
    assert not torch.allclose(updates[1], updates[2], rtol=1e-2)


LAYOUTS = {
    "channels last": lambda x: x.contiguous(memory_format=torch.channels_last),
    "transposed": lambda x: x.transpose(0, 2).contiguous().transpose(0, 2),
    "every other": lambda x: torch.stack([x, x], -1)[..., 0],
    "within a larger one": lambda x: nn.functional.pad(x, (1, 2, 3, 4))[..., 3:-4, 1:-2],
    "contiguous": lambda x: x,
}


@pytest.mark.parametrize("backend", ["native", "reference"])
@pytest.mark.parametrize("of_gradient", LAYOUTS)
@pytest.mark.parametrize("of_parameter", LAYOUTS)
def test_strides_change_nothing(rule, of_parameter, of_gradient, backend):
    plain = nn.Parameter(torch.randn(2, 3, 4, 5, generator=torch.Generator().manual_seed(0)))
    param = nn.Parameter(LAYOUTS[of_parameter](plain.detach()))
    strides = param.stride()
    optimizers = [FusedLSTMOptimizer([p], rule, backend=backend) for p in (plain, param)]
    for step in range(3):
        set_gradients([plain], step)
        param.grad = LAYOUTS[of_gradient](plain.grad)
        for optimizer in optimizers:
            optimizer.step()
    assert torch.equal(param, plain)
    assert param.stride() == strides


def test_expanded_gradients_are_taken(rule):
    param = nn.Parameter(torch.zeros(3, 4))
    param.sum().backward()
    param.grad = torch.ones(()).expand(3, 4)
    FusedLSTMOptimizer([param], rule).step()
    assert param.unique().numel() == 1
    assert param.any()


def test_maximize_turns_the_gradient(rule):
    one, other = parameters(), parameters()
    ascending = FusedLSTMOptimizer(one, rule, maximize=True)
    descending = FusedLSTMOptimizer(other, rule)
    for step in range(3):
        set_gradients(one, step)
        for param, twin in zip(one, other, strict=True):
            twin.grad = -param.grad
        ascending.step()
        descending.step()
    assert same(one, other)


def test_lr_is_a_factor_on_the_update(rule):
    params = parameters()
    expected = by_reference(rule, params, range(4), lr=0.25)
    for found, wanted in zip(run(FusedLSTMOptimizer(params, rule, lr=0.25), params, range(4)), expected, strict=True):
        torch.testing.assert_close(found.double(), wanted, rtol=1e-5, atol=1e-5)
    before = [param.detach().clone() for param in params]
    assert same(run(FusedLSTMOptimizer(params, rule, lr=0), params, [0]), before)


@pytest.mark.parametrize(
    "make",
    [
        lambda optimizer: torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step)),
        lambda optimizer: torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 10),
        lambda optimizer: torch.optim.lr_scheduler.OneCycleLR(optimizer, 1.0, total_steps=10),
        lambda optimizer: torch.optim.lr_scheduler.CyclicLR(optimizer, 0.1, 1.0, step_size_up=4),
        lambda optimizer: torch.optim.lr_scheduler.SequentialLR(
            optimizer,
            [
                torch.optim.lr_scheduler.LinearLR(optimizer, 0.1, total_iters=2),
                torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5),
            ],
            [2],
        ),
    ],
)
def test_schedulers_work(rule, make):
    params, twins = parameters(), parameters()
    optimizer, by_hand = FusedLSTMOptimizer(params, rule), FusedLSTMOptimizer(twins, rule)
    scheduler, rates = make(optimizer), []
    for step in range(6):
        rates.append(optimizer.param_groups[0]["lr"])
        by_hand.param_groups[0]["lr"] = rates[-1]
        run(optimizer, params, [step])
        run(by_hand, twins, [step])
        scheduler.step()
    assert len(set(rates)) > 3
    assert same(params, twins)


@pytest.mark.parametrize("rate", [torch.tensor(0.5), np.float32(0.5), np.float16(0.5), np.float64(0.5)], ids=type)
def test_numbers_of_other_libraries_are_rates_too(rule, rate):
    params, twins = parameters(), parameters()
    optimizer = FusedLSTMOptimizer(params, rule, lr=rate)
    assert same(run(optimizer, params, range(2)), run(FusedLSTMOptimizer(twins, rule, lr=0.5), twins, range(2)))


def test_plateau_scheduler_works(rule):
    params = parameters()
    optimizer = FusedLSTMOptimizer(params, rule)
    scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, patience=0)
    for _ in range(3):
        run(optimizer, params, [0])
        scheduler.step(1.0)
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.01)


# Groups


def test_groups_have_their_own_rules_rates_and_directions():
    rules = random_rule(hidden=5, seed=1), random_rule("raw", 3, 1, seed=2, dtype=torch.float64)
    one, two, three = parameters(), parameters(torch.float64), parameters(torch.bfloat16)
    optimizer = FusedLSTMOptimizer(
        [
            {"params": one},
            {"params": two, "rule": rules[1], "lr": 0.3},
            {"params": three, "rule": rules[1], "maximize": True},
        ],
        rules[0],
    )
    twins = parameters(), parameters(torch.float64), parameters(torch.bfloat16)
    alone = [
        FusedLSTMOptimizer(twins[0], rules[0]),
        FusedLSTMOptimizer(twins[1], rules[1], lr=0.3),
        FusedLSTMOptimizer(twins[2], rules[1], maximize=True),
    ]
    for step in range(4):
        for params in (one, two, three, *twins):
            set_gradients(params, step)
        optimizer.step()
        for other in alone:
            other.step()
    assert all(same(params, twin) for params, twin in zip((one, two, three), twins, strict=True))
    assert optimizer.state[one[0]]["lstm_state"].shape[1] == 2 * 2 * 5
    assert optimizer.state[three[0]]["lstm_state"].dtype == torch.float64


def test_a_group_may_come_later(rule):
    one, two = parameters(), parameters(seed=1)
    optimizer = FusedLSTMOptimizer(one, rule)
    run(optimizer, one, [0])
    optimizer.add_param_group({"params": two, "rule": random_rule("raw", 3, 1), "lr": 0.5})
    twins = parameters(seed=1)
    alone = FusedLSTMOptimizer(twins, random_rule("raw", 3, 1), lr=0.5)
    for step in (1, 2):
        set_gradients(one, step)
        run(optimizer, two, [step])
    assert same(two, run(alone, twins, (1, 2)))


@pytest.mark.filterwarnings("ignore:optimizer contains a parameter group with duplicate parameters")
@pytest.mark.parametrize(
    ("group", "error", "message"),
    [
        ({"params": parameters(seed=1), "rule": None}, TypeError, "rule: expected a rule.*got NoneType"),
        ({"params": parameters(seed=1), "rule": nn.Linear(1, 1)}, TypeError, "rule: expected a rule.*got Linear"),
        ({"params": parameters(seed=1), "lr": -1}, ValueError, "lr: expected a finite number >= 0, got -1"),
        ({"params": parameters(seed=1), "lr": NAN}, ValueError, "lr: expected a finite number >= 0, got nan"),
        ({"params": parameters(seed=1), "lr": "0.1"}, ValueError, "lr: expected a finite number >= 0, got '0.1'"),
        ({"params": parameters(seed=1), "lr": 10**400}, ValueError, "lr: expected a finite number >= 0, got 1000"),
        ({"params": parameters(seed=1), "lr": torch.ones(2)}, ValueError, "lr: expected a finite number >= 0, got te"),
        ({"params": parameters(seed=1), "lr": np.float32(INF)}, ValueError, "lr: expected a finite number >= 0"),
        ({"params": parameters(seed=1), "weight_decay": -1}, ValueError, "weight_decay: expected a finite number >= 0"),
        (
            {"params": parameters(seed=1), "weight_decay": INF},
            ValueError,
            "weight_decay: expected a finite number >= 0",
        ),
        ({"params": parameters(seed=1), "weight_decay": torch.ones(())}, ValueError, "weight_decay: expected a finite"),
        ({"params": parameters(seed=1), "maximize": "no"}, ValueError, "maximize: expected True or False, got 'no'"),
        (
            {"params": parameters(seed=1), "betas": (0.9, 0.999)},
            ValueError,
            r"betas: expected rule, lr, weight_decay, maximize as the options of a group, got betas=\(0.9, 0.999\)",
        ),
        ({"params": [3.0]}, TypeError, "one of the params is float"),
        ({"params": parameters(seed=1) * 2}, ValueError, "params: expected every parameter once"),
        ({"params": set(parameters(seed=1))}, TypeError, "ordered collections"),
        ({"params": [torch.ones(3, requires_grad=True) * 2]}, ValueError, "non-leaf"),
    ],
)
def test_a_bad_group_is_refused_and_nothing_is_changed(rule, group, error, message):
    optimizer = FusedLSTMOptimizer(parameters(), rule)
    with pytest.raises(error, match=message):
        optimizer.add_param_group(group)
    assert len(optimizer.param_groups) == 1
    with pytest.raises(error, match=message):
        FusedLSTMOptimizer([group], rule)


def test_bad_arguments_are_named(rule):
    with pytest.raises(TypeError, match="rule: expected a rule for every parameter group, got NoneType"):
        FusedLSTMOptimizer(parameters())
    with pytest.raises(ValueError, match="nonfinite: expected one of raise, skip, propagate, got 'ignore'"):
        FusedLSTMOptimizer(parameters(), rule, nonfinite="ignore")
    with pytest.raises(ValueError, match="nonfinite: expected skip or propagate with capturable=True"):
        FusedLSTMOptimizer(parameters(), rule, capturable=True)
    with pytest.raises(ValueError, match="backend: expected one of auto, reference, native, triton, got 'triton2'"):
        FusedLSTMOptimizer(parameters(), rule, backend="triton2")
    for wrong in (torch.float16, torch.float32, "bfloat16"):
        message = rf"state_dtype: expected None \(the rule's dtype\) or torch.bfloat16, got .*{wrong}"
        with pytest.raises(ValueError, match=message):
            FusedLSTMOptimizer(parameters(), rule, state_dtype=wrong)
    with pytest.raises(ValueError, match="empty parameter list"):
        FusedLSTMOptimizer([], rule)
    with pytest.raises(TypeError, match="iterable of Tensors"):
        FusedLSTMOptimizer(torch.zeros(3), rule)
    params = parameters()
    with pytest.raises(ValueError, match="more than one parameter group"):
        FusedLSTMOptimizer([{"params": params}, {"params": params[:1]}], rule)


@pytest.mark.parametrize("name", ["momentum", "eps", "nesterov", "ns_steps", "nonfinite", "capturable", "state_dtype"])
def test_options_that_would_have_no_effect_are_refused_unless_they_are_off(rule, name):
    with pytest.raises(
        ValueError, match=f"{name}: expected rule, lr, weight_decay, maximize.*which would have no effect"
    ):
        FusedLSTMOptimizer([{"params": parameters(), name: 1}], rule)
    FusedLSTMOptimizer([{"params": parameters(), name: 0}], rule)


def test_a_group_is_the_very_dict_that_was_given_and_carries_what_its_owner_likes(rule):
    params, twins = parameters(), parameters()
    group = {"params": iter(params), "name": "all", "lr_scale": 0.5, "initial_lr": 1.0}
    optimizer, alone = FusedLSTMOptimizer([group], rule), FusedLSTMOptimizer(twins, rule, lr=0.25)
    assert optimizer.param_groups[0] is group
    assert group["name"] == "all"
    group["lr"] = 0.25
    assert same(run(optimizer, params, range(2)), run(alone, twins, range(2)))


@pytest.mark.parametrize("backend", ["native", "reference"])
@pytest.mark.parametrize("nonfinite", ["raise", "skip", "propagate"])
def test_groups_may_be_empty_and_filled_later(rule, nonfinite, backend):
    params, twins = parameters(), parameters()
    optimizer = FusedLSTMOptimizer([{"params": []}, {"params": params[:2]}], rule, nonfinite=nonfinite, backend=backend)
    optimizer.param_groups[0]["params"] += params[2:]
    alone = FusedLSTMOptimizer(twins, rule, backend=backend)
    assert same(run(optimizer, params, range(2)), run(alone, twins, range(2)))
    empty = FusedLSTMOptimizer([{"params": []}], rule, nonfinite=nonfinite, backend=backend)
    empty.step()
    empty.load_state_dict(empty.state_dict())
    assert empty.skipped_steps == 0


def test_a_default_device_is_not_taken(rule):
    params, twins = parameters(), parameters()
    expected, fresh = load_rule("lstm-mnist").weights(), LSTMRule(seed=3).weights()
    cells, output = [nn.LSTMCell(1, 3, bias=False)], nn.Linear(3, 1, bias=False)
    with torch.device("meta"):
        assert same(load_rule("lstm-mnist").weights(), expected)
        assert same(LSTMRule(seed=3).weights(), fresh)
        assert not LSTMRule.from_lstm(cells, output, preprocess="raw").bias_out.is_meta
        optimizer, other = FusedLSTMOptimizer(params, rule), FusedLSTMOptimizer(params, rule)
    for step in range(3):
        set_gradients(params, step)
        with torch.device("meta"):
            optimizer.step()
            other.load_state_dict(optimizer.state_dict())
            optimizer, other = other, optimizer
    assert same(params, run(FusedLSTMOptimizer(twins, rule), twins, range(3)))


def test_rules_in_float64_take_no_state_in_bfloat16(rule):
    double = random_rule(dtype=torch.float64)
    message = "state_dtype: expected None for a rule in torch.float64, got torch.bfloat16"
    with pytest.raises(ValueError, match=message):
        FusedLSTMOptimizer(parameters(), double, state_dtype=torch.bfloat16)
    optimizer = FusedLSTMOptimizer(parameters(), rule, state_dtype=torch.bfloat16)
    with pytest.raises(ValueError, match=message):
        optimizer.add_param_group({"params": parameters(seed=1), "rule": double})
    assert len(optimizer.param_groups) == 1


def test_parameters_may_be_named_or_come_from_a_generator(rule):
    model = nn.Linear(3, 2)
    optimizer = FusedLSTMOptimizer(model.named_parameters(), rule)
    assert optimizer.param_groups[0]["param_names"] == ["weight", "bias"]
    assert optimizer.state_dict()["param_groups"][0]["param_names"] == ["weight", "bias"]
    run(optimizer, list(model.parameters()), [0])
    grouped = FusedLSTMOptimizer([{"params": (p for p in model.parameters())}], rule)
    assert len(grouped.param_groups[0]["params"]) == 2
    single = FusedLSTMOptimizer([{"params": model.weight}], rule)
    assert single.param_groups[0]["params"] == [model.weight]


# Gradients that are missing, sparse, of another dtype or not finite


def test_a_parameter_without_gradient_is_left_alone_until_it_has_one(rule):
    params, late = parameters(), parameters(shapes=[(9,)], seed=1)[0]
    optimizer, before = FusedLSTMOptimizer([*params, late], rule), late.detach().clone()
    run(optimizer, params, range(2))
    assert torch.equal(late, before)
    assert late not in optimizer.state
    twin = parameters(shapes=[(9,)], seed=1)[0]
    alone = FusedLSTMOptimizer([twin], rule)
    for step in range(2):
        late.grad = twin.grad = random_gradients(9, seed=step)
        optimizer.step()
        alone.step()
    assert torch.equal(late, twin)
    state = optimizer.state[late]["lstm_state"].clone()
    late.grad = None
    run(optimizer, params, [2])
    assert torch.equal(optimizer.state[late]["lstm_state"], state)
    optimizer.zero_grad()
    optimizer.step()  # nothing has a gradient
    assert torch.equal(late, twin)


STRANGE = {
    "complex64": lambda: nn.Parameter(torch.zeros(3, dtype=torch.complex64)),
    "meta": lambda: nn.Parameter(torch.zeros(3, device="meta")),
    "int64": lambda: nn.Parameter(torch.zeros(3, dtype=torch.int64), requires_grad=False),
}


@pytest.mark.parametrize("several", [False, True])
@pytest.mark.parametrize("backend", ["native", "reference"])
@pytest.mark.parametrize("of", STRANGE)
def test_what_a_rule_cannot_take_is_refused_when_it_gets_a_gradient(rule, of, backend, several):
    strange, params, twins = STRANGE[of](), parameters(), parameters()
    groups = [{"params": params[1:]}, {"params": [params[0], strange]}] if several else [*params, strange]
    optimizer = FusedLSTMOptimizer(groups, rule, backend=backend)
    alone = FusedLSTMOptimizer(twins, rule, backend=backend)
    assert same(run(optimizer, params, range(2)), run(alone, twins, range(2)))
    optimizer.load_state_dict(optimizer.state_dict())
    set_gradients(params, 2)
    if of == "int64":
        strange.grad_dtype = None
    strange.grad = torch.ones_like(strange)
    before = everything(optimizer)
    with pytest.raises(RuntimeError, match=rf"parameter of shape \[3\]: expected .* got .*{of}"):
        optimizer.step()
    strange.grad = None
    if of == "meta":
        strange = optimizer.param_groups[-1]["params"].pop()
        before[0].pop()
    assert_unchanged(optimizer, before)


def test_zero_grad_and_closures_work_as_usual(rule):
    params = parameters()
    optimizer = FusedLSTMOptimizer(params, rule)
    set_gradients(params, 0)
    optimizer.zero_grad(set_to_none=False)
    assert not any(param.grad.any() for param in params)
    optimizer.zero_grad()
    assert all(param.grad is None for param in params)

    def closure():
        assert torch.is_grad_enabled()
        optimizer.zero_grad()
        loss = sum(param.square().sum() for param in params)
        loss.backward()
        return loss

    before = [param.detach().clone() for param in params]
    value = sum(param.square().sum() for param in before)
    torch.testing.assert_close(optimizer.step(closure).detach(), value)
    assert not any(torch.equal(param, old) for param, old in zip(params, before, strict=True) if old.numel())
    assert optimizer.step() is None


def everything(optimizer):
    params = [param for group in optimizer.param_groups for param in group["params"]]
    states = {id(param): state["lstm_state"].clone() for param, state in optimizer.state.items()}
    return [param.detach().clone() for param in params], states


def assert_unchanged(optimizer, before):
    values, states = everything(optimizer)
    assert same(values, before[0])
    assert states.keys() == before[1].keys()
    assert same(states.values(), before[1].values())


@pytest.mark.parametrize("stepped", [0, 2])
@pytest.mark.parametrize("wrong", ["sparse", "dtype"])
def test_a_gradient_of_the_wrong_kind_is_refused_before_anything_is_changed(rule, wrong, stepped):
    params, table = parameters(), nn.Embedding(10, 3, sparse=True)
    optimizer = FusedLSTMOptimizer([{"params": params}, {"params": table.parameters()}], rule)
    run(optimizer, params, range(stepped))
    set_gradients(params, 5)
    if wrong == "sparse":
        table(torch.tensor([1, 2])).sum().backward()
        message = r"gradient of a parameter of shape \[10, 3\]: expected a dense tensor, got a sparse one"
    else:
        table.weight.grad_dtype = torch.float64
        table.weight.grad = torch.ones(10, 3, dtype=torch.float64)
        message = (
            r"gradient of a parameter of shape \[10, 3\]: expected torch.float32 as the parameter is, got.*float64"
        )
    before = everything(optimizer)
    with pytest.raises(RuntimeError, match=message):
        optimizer.step()
    assert_unchanged(optimizer, before)


@pytest.mark.parametrize("backend", ["native", "reference"])
@pytest.mark.parametrize("stepped", [0, 2])
@pytest.mark.parametrize("value", [NAN, INF, -INF])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_nonfinite_gradients_raise_or_skip_for_all_groups_at_once(rule, value, stepped, backend, dtype):
    for nonfinite in ("raise", "skip"):
        one, two = parameters(), parameters(dtype, seed=1)
        groups = [{"params": one}, {"params": two}]
        optimizer = FusedLSTMOptimizer(groups, rule, backend=backend, nonfinite=nonfinite)
        run(optimizer, one + two, range(stepped))
        before = everything(optimizer)
        set_gradients(one + two, 7)
        two[3].grad.view(-1)[-1] = value
        if nonfinite == "raise":
            message = r"NaN or infinity in 1 of 10 parameters, the first of shape \[2, 1, 4, 3\]; nothing was changed"
            with pytest.raises(FloatingPointError, match=message):
                optimizer.step()
        else:
            assert optimizer.step(lambda: 3.0) == 3.0
        assert optimizer.skipped_steps == (nonfinite == "skip")
        assert_unchanged(optimizer, before)
        run(optimizer, one + two, [8])
        assert optimizer.skipped_steps == (nonfinite == "skip")
        assert not same(everything(optimizer)[0], before[0])


@pytest.mark.parametrize("backend", ["native", "reference"])
@pytest.mark.parametrize("wrong", ["nonfinite", "sparse", "dtype"])
@pytest.mark.parametrize("stepped", [0, 2])
@pytest.mark.parametrize("first", [False, True])
def test_one_group_alone_is_refused_as_a_whole(rule, wrong, stepped, backend, first):
    table = nn.Embedding(10, 3, sparse=True)
    params = [*parameters(), table.weight]
    if first:
        params.reverse()
    optimizer = FusedLSTMOptimizer(params, rule, backend=backend)
    run(optimizer, params, range(stepped))
    set_gradients(params, 5)
    if wrong == "nonfinite":
        table.weight.grad[3, 1] = NAN
        error, message = FloatingPointError, "gradient: expected finite numbers"
    elif wrong == "sparse":
        table.weight.grad = None
        table(torch.tensor([1, 2])).sum().backward()
        error, message = RuntimeError, r"gradient of a parameter of shape \[10, 3\]: expected a dense tensor"
    else:
        table.weight.grad = None
        table.weight.grad_dtype = torch.float64
        table.weight.grad = torch.ones(10, 3, dtype=torch.float64)
        error, message = RuntimeError, r"gradient of a parameter of shape \[10, 3\]: expected torch.float32"
    before = everything(optimizer)
    with pytest.raises(error, match=message):
        optimizer.step()
    assert_unchanged(optimizer, before)


@pytest.mark.parametrize("layout", ["contiguous", "transposed"])
def test_a_step_that_fails_in_the_middle_is_not_made_again(rule, layout, monkeypatch):
    params = [nn.Parameter(LAYOUTS[layout](torch.ones(2, 3, 4, 5))) for _ in range(3)]
    optimizer, calls, step = FusedLSTMOptimizer(params, rule, backend="reference"), [], reference.step

    def little_memory(*args):
        calls.append(args)
        if len(calls) == 3:
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory")
        return step(*args)

    monkeypatch.setattr(reference, "step", little_memory)
    set_gradients(params, 0)
    with pytest.raises(RuntimeError, match="can't allocate memory"):
        optimizer.step()
    assert len(calls) == 3


def test_a_kernel_that_fails_is_not_called_again(rule, monkeypatch):
    params, calls = parameters(), []
    optimizer = FusedLSTMOptimizer(params, rule, backend="native")

    def fails(*args):
        calls.append(args)
        raise RuntimeError("out of memory")

    monkeypatch.setitem(dispatch._BACKENDS, "native", dataclasses.replace(select("native", "cpu"), step_=fails))
    set_gradients(params, 0)
    with pytest.raises(RuntimeError, match="out of memory"):
        optimizer.step()
    assert len(calls) == 1


@pytest.mark.parametrize("state_dtype", [None, torch.bfloat16])
def test_states_that_no_memory_holds_are_refused(rule, state_dtype):
    param = nn.Parameter(torch.zeros(()).expand(2**47))  # beyond what a process can address
    param.grad = torch.zeros(()).expand(2**47)
    optimizer = FusedLSTMOptimizer([param], rule, state_dtype=state_dtype)
    size, cure = "7,340,032.0", "take fewer parameters"
    if state_dtype is None:
        size, cure = "14,680,064.0", r"take state_dtype=torch.bfloat16 \(half as much\), fewer parameters"
    message = f"state of 140,737,488,355,328 coordinates: expected {size} GiB of free memory on cpu, got less; {cure}"
    with pytest.raises(torch.OutOfMemoryError, match=message):
        optimizer.step()
    assert not optimizer.state


@pytest.mark.parametrize("stepped", [0, 2])
def test_without_memory_for_one_group_no_other_is_changed(rule, stepped, monkeypatch):
    one, two, late = parameters(), parameters(seed=1), parameters(shapes=[(200,)], seed=2)
    optimizer = FusedLSTMOptimizer([{"params": one}, {"params": two + late}], rule)
    run(optimizer, one + two, range(stepped))
    set_gradients(one + two + late, 5)
    before = everything(optimizer)

    def little_memory(rule, numel, *rest):
        if numel > 100:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return new_state(rule, numel, *rest)

    monkeypatch.setattr(optimizer_state, "new_state", little_memory)
    with pytest.raises(torch.OutOfMemoryError, match=r"state of \d+ coordinates: .*nothing was changed"):
        optimizer.step()
    assert_unchanged(optimizer, before)
    monkeypatch.undo()
    run(optimizer, one + two + late, [5])
    assert not same(everything(optimizer)[0], before[0])


def test_nonfinite_gradients_propagate_when_asked(rule):
    params, twins = parameters(), parameters()
    optimizers = [FusedLSTMOptimizer(p, rule, nonfinite="propagate") for p in (params, twins)]
    set_gradients(params, 0)
    set_gradients(twins, 0)
    params[1].grad[4] = NAN
    for optimizer in optimizers:
        optimizer.step()
    assert params[1][4].isnan()
    twins[1].data[4] = 0
    params[1].data[4] = 0
    assert same(params, twins)


def test_grad_scaler_skips_what_overflowed(rule):
    param, twin = parameters(shapes=[(6,)])[0], parameters(shapes=[(6,)])[0]
    optimizer, plain = FusedLSTMOptimizer([param], rule), FusedLSTMOptimizer([twin], rule)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    for factor in (1.0, INF, 2.0):
        optimizer.zero_grad()
        scaler.scale((factor * param.square()).sum()).backward()
        before = everything(optimizer)
        scaler.step(optimizer)
        scaler.update()
        if factor == INF:
            assert_unchanged(optimizer, before)
            assert scaler.get_scale() == 512
            continue
        plain.zero_grad()
        (factor * twin.square()).sum().backward()
        plain.step()
        assert torch.equal(param, twin)
    assert optimizer.skipped_steps == 0


# Parameters whose data are exchanged, and rows that come and go


@pytest.mark.parametrize("backend", ["native", "reference"])
@pytest.mark.parametrize("apart", [False, True])
@pytest.mark.parametrize("change", ["exchanged", "grown", "turned"])
def test_data_of_another_shape_are_refused(rule, change, apart, backend):
    params = parameters(shapes=[(3, 5), (4, 4), (50,)])
    optimizer = FusedLSTMOptimizer(params, rule, backend=backend)
    run(optimizer, params, [0])
    if apart:
        optimizer.state[params[0]]["lstm_state"] = optimizer.state[params[0]]["lstm_state"].clone()
    for param in params:
        param.grad = None
    if change == "exchanged":
        params[0].data, params[1].data = params[1].data, params[0].data
        message = r"state of a parameter of shape \[4, 4\]: expected shape \[3, 5\]"
    elif change == "grown":
        params[2].data = torch.ones(60)
        message = r"state of a parameter of shape \[60\]: expected shape \[50\].*replace_parameter keeps"
    else:
        params[0].data = params[0].data.T.contiguous()
        message = r"state of a parameter of shape \[5, 3\]: expected shape \[3, 5\]"
    set_gradients(params, 1)
    before, saved = everything(optimizer), optimizer.state_dict()
    with pytest.raises(RuntimeError, match=message):
        optimizer.step()
    assert_unchanged(optimizer, before)
    with pytest.raises(ValueError, match=r"state of parameter \d: expected one of a parameter of shape"):
        FusedLSTMOptimizer(params, rule).load_state_dict(saved)


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("way", ["mask", "indices", "list", "same parameter"])
def test_rows_that_stay_keep_their_state(rule, way, stored):
    rows = torch.tensor([4, 0, 6]) if way == "indices" else torch.tensor([0, 4, 6])
    old, new = nn.Parameter(torch.randn(7, 5, 1)), nn.Parameter(torch.zeros(5, 5, 1))
    other = nn.Parameter(torch.randn(3))
    half = None if stored == torch.float32 else stored
    optimizer = FusedLSTMOptimizer([{"params": [other]}, {"params": [old]}], rule, state_dtype=half)
    run(optimizer, [other, old], range(3))
    optimizer.state[old]["mine"] = "kept"
    before = to_rows(optimizer.state[old]["lstm_state"], 35).unflatten(1, (7, 5, 1)).clone()
    if way == "same parameter":
        new = old
        old.grad, old.data = None, torch.zeros(5, 5, 1)
    given = {"mask": torch.arange(7) % 4 == 0, "list": rows.tolist()}.get(way, rows)
    if way == "mask":
        given[6] = True
    optimizer.replace_parameter(old, new, given)
    assert optimizer.param_groups[1]["params"] == [new]
    assert list(optimizer.state) == [other, new]
    assert optimizer.state[new]["mine"] == "kept"
    after = to_rows(optimizer.state[new]["lstm_state"], 25).unflatten(1, (5, 5, 1))
    assert after.dtype == stored
    assert torch.equal(after[:, :3], before[:, rows])
    assert not after[:, 3:].any()
    # As when those rows had been alone all the time, and the others begin.
    twin = nn.Parameter(new.detach().clone())
    alone = FusedLSTMOptimizer([twin], rule, state_dtype=half)
    alone.state[twin] = {"lstm_state": from_rows(torch.cat([before[:, rows], after[:, 3:] * 0], 1).flatten(1))}
    new.grad = twin.grad = torch.randn(5, 5, 1)
    optimizer.step()
    alone.step()
    assert torch.equal(new, twin)
    run(optimizer, [other, new], [5])
    restored = FusedLSTMOptimizer([{"params": [other]}, {"params": [new]}], rule, state_dtype=half)
    restored.load_state_dict(optimizer.state_dict())


def test_all_rows_stay_where_none_are_named(rule):
    old, new = nn.Parameter(torch.randn(7, 2)), nn.Parameter(torch.randn(9, 2))
    optimizer = FusedLSTMOptimizer([old], rule)
    run(optimizer, [old], range(2))
    before = to_rows(optimizer.state[old]["lstm_state"], 14)
    optimizer.replace_parameter(old, new)
    after = to_rows(optimizer.state[new]["lstm_state"], 18)
    assert torch.equal(after[:, :14], before)
    assert not after[:, 14:].any()
    optimizer.replace_parameter(new, old, [])
    assert not optimizer.state[old]["lstm_state"].any()


def test_a_parameter_that_has_not_been_stepped_is_just_replaced(rule):
    old, new = nn.Parameter(torch.randn(7)), nn.Parameter(torch.randn(3, 2))
    optimizer = FusedLSTMOptimizer([old], rule)
    optimizer.replace_parameter(old, new)
    assert optimizer.param_groups[0]["params"] == [new]
    assert not optimizer.state
    run(optimizer, [new], [0])


@pytest.mark.parametrize(
    ("old", "new", "rows", "message"),
    [
        (2, (3, 4), None, "old: expected a parameter of this optimizer, got another"),
        (0, "not a leaf", None, "new: expected a leaf tensor that is not optimized yet, got another"),
        (1, "optimized", None, "new: expected a leaf tensor that is not optimized yet, got another"),
        (0, (7, 5), None, r"new: expected the shape \[7, 4\] but for the number of rows, got \[7, 5\]"),
        (0, (28,), None, r"new: expected the shape \[7, 4\] but for the number of rows, got \[28\]"),
        (0, (3, 4), None, r"rows: expected at most 3, as many as new has, got \[7\]"),
        (0, (3, 4), [0, 7], "rows: expected a mask or indices of 7 rows, as old has; "),
        (0, (3, 4), torch.ones(8, dtype=torch.bool), "rows: expected a mask or indices of 7 rows, as old has; "),
        (0, (3, 4), "all", "rows: expected a mask or indices of 7 rows, as old has; "),
        (0, (3, 4), 5, r"rows: expected at most 3, as many as new has, got \[\]"),
        (1, (), None, r"new: expected the shape \[\] but for the number of rows, got \[\]"),
    ],
)
def test_rows_that_do_not_fit_are_refused_and_nothing_is_changed(rule, old, new, rows, message):
    params = parameters(shapes=[(7, 4), ()])
    optimizer = FusedLSTMOptimizer(params, rule)
    run(optimizer, params, [0])
    before = everything(optimizer)
    new = {"not a leaf": params[0] * 1, "optimized": params[0]}[new] if isinstance(new, str) else torch.zeros(new)
    with pytest.raises(ValueError, match=message):
        optimizer.replace_parameter([*params, torch.zeros(7, 4)][old], new, rows)
    assert_unchanged(optimizer, before)
    assert all(a is b for a, b in zip(optimizer.param_groups[0]["params"], params, strict=True))


# Entries of other people


def test_looking_for_a_state_changes_nothing(rule):
    params, twins = parameters(), parameters()
    optimizer, alone = FusedLSTMOptimizer(params, rule), FusedLSTMOptimizer(twins, rule)
    assert not any(optimizer.state[param] for param in params)
    restored = FusedLSTMOptimizer(params, rule)
    restored.load_state_dict(through_file(optimizer.state_dict()))
    run(restored, params[1:], [0])
    restored.load_state_dict(through_file(restored.state_dict()))
    run(alone, twins[1:], [0])
    assert same(run(restored, params, [1, 2]), run(alone, twins, [1, 2]))


def test_entries_beside_ours_are_kept_and_saved(rule):
    params, twins = parameters(), parameters()
    optimizer, alone = FusedLSTMOptimizer(params, rule), FusedLSTMOptimizer(twins, rule)
    for param in params:
        optimizer.state[param] |= {"mine": param.detach().clone(), "count": 3}
    optimizer.state["epoch"] = 7
    run(optimizer, params, [0])
    restored = FusedLSTMOptimizer(params, rule)
    restored.load_state_dict(through_file(optimizer.state_dict()))
    for o in (optimizer, restored):
        assert o.state["epoch"] == 7
        assert [set(o.state[param]) for param in params] == [{"mine", "count", "lstm_state", "shape"}] * len(params)
        assert same([o.state[param]["mine"] for param in params], parameters())
    run(restored, params, [1, 2])
    assert same(params, run(alone, twins, range(3)))


# Autograd and hooks


@pytest.mark.parametrize("backend", ["native", "reference"])
@pytest.mark.parametrize("layout", ["contiguous", "transposed"])
def test_autograd_notices_that_parameters_were_changed(rule, backend, layout):
    param = nn.Parameter(LAYOUTS[layout](torch.ones(2, 3, 4, 5)))
    optimizer = FusedLSTMOptimizer([param], rule, backend=backend)
    loss = param.square().sum()
    loss.backward(retain_graph=True)
    version = param._version
    optimizer.step()
    assert param._version > version
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
    assert param.requires_grad
    assert param.grad_fn is None


def test_step_hooks_are_called(rule):
    params, calls = parameters(), []
    optimizer = FusedLSTMOptimizer(params, rule)
    optimizer.register_step_pre_hook(lambda *_: calls.append("before"))
    optimizer.register_step_post_hook(lambda *_: calls.append("after"))
    optimizer.register_state_dict_post_hook(lambda _, saved: calls.append("saved"))
    optimizer.register_load_state_dict_pre_hook(lambda *_: calls.append("loading"))
    run(optimizer, params, [0])
    optimizer.load_state_dict(optimizer.state_dict())
    assert calls == ["before", "after", "saved", "loading"]


def test_hooks_see_what_is_saved_and_their_word_stands(rule):
    params = parameters(torch.bfloat16)
    optimizer, seen = FusedLSTMOptimizer(params, rule), []
    run(optimizer, params, [0])

    def saved(_, state):
        seen.append(through_file(state))  # which takes no module
        state["mine"] = 1
        state["state"].pop(0)
        return {**state, "param_groups": [{**group, "also": 2} for group in state["param_groups"]]}

    optimizer.register_state_dict_post_hook(saved, prepend=True)
    found = optimizer.state_dict()
    assert found["mine"] == 1
    assert found["param_groups"][0]["also"] == 2
    assert 0 not in found["state"]
    assert seen[0]["param_groups"][0]["rule"]["kind"] == "lstm"


def test_hooks_before_loading_decide_what_is_loaded(rule):
    params, twins = parameters(shapes=[(4,)] * 3), parameters(shapes=[(4,)] * 3)
    optimizer = FusedLSTMOptimizer(zip("abc", params, strict=True), rule)
    run(optimizer, params, range(2))
    restored = FusedLSTMOptimizer(zip("cab", [twins[2], *twins[:2]], strict=True), rule)

    def by_name(other, state):
        keys = dict(zip(*(state["param_groups"][0][name] for name in ("param_names", "params")), strict=True))
        names = other.param_groups[0]["param_names"]
        states = {place: state["state"][keys[name]] for place, name in enumerate(names)}
        groups = [{**state["param_groups"][0], "params": list(range(3)), "param_names": names}]
        return {"state": states, "param_groups": groups}

    restored.register_load_state_dict_pre_hook(by_name)
    restored.load_state_dict(optimizer.state_dict())
    for param, twin in zip(params, twins, strict=True):
        assert torch.equal(optimizer.state[param]["lstm_state"], restored.state[twin]["lstm_state"])
        twin.data.copy_(param)
    assert restored.param_groups[0]["param_names"] == ["c", "a", "b"]
    assert same(run(restored, twins, [2]), run(optimizer, params, [2]))


def test_hooks_after_loading_see_an_optimizer_that_is_whole_and_their_word_stands(rule):
    params = parameters(torch.float16)
    optimizer, seen = FusedLSTMOptimizer(params, rule), []
    run(optimizer, params, [0])
    restored = FusedLSTMOptimizer(params, rule)

    def loaded(other):
        seen.append((other.param_groups[0]["rule"], [entry["lstm_state"].clone() for entry in other.state.values()]))
        other.param_groups[0]["lr"] = 0.125
        other.state.pop(params[0])
        other.state[params[1]]["mine"] = 1

    restored.register_load_state_dict_post_hook(loaded, prepend=True)
    restored.load_state_dict(optimizer.state_dict())
    assert seen[0][0] is rule
    assert same(seen[0][1], [entry["lstm_state"] for entry in optimizer.state.values()])
    assert restored.param_groups[0]["lr"] == 0.125
    assert params[0] not in restored.state
    assert restored.state[params[1]]["mine"] == 1
    run(restored, params, [1])


def test_a_hook_that_fails_before_loading_changes_nothing(rule):
    params = parameters()
    optimizer = FusedLSTMOptimizer(params, rule)
    run(optimizer, params, [0])
    before = everything(optimizer)

    def fails(*_):
        raise KeyError("no such name")

    handle = optimizer.register_load_state_dict_pre_hook(fails)
    with pytest.raises(KeyError, match="no such name"):
        optimizer.load_state_dict(optimizer.state_dict())
    assert_unchanged(optimizer, before)
    handle.remove()
    optimizer.load_state_dict(optimizer.state_dict())
    assert not optimizer._optimizer_load_state_dict_pre_hooks
    assert not optimizer._optimizer_load_state_dict_post_hooks
    assert not optimizer._optimizer_state_dict_post_hooks


def test_a_rule_s_own_weights_are_not_trained(rule):
    params = parameters()
    optimizer, before = FusedLSTMOptimizer(params, rule), detached(rule)
    run(optimizer, params, range(3))
    assert same(rule.weights(), before)
    assert all(weight.grad is None for weight in rule.weights())


# Saving and copying


def through_file(state):
    buffer = io.BytesIO()
    torch.save(state, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=True)


@pytest.mark.parametrize("way", [lambda state: state, copy.deepcopy, through_file], ids=["as is", "copied", "saved"])
@pytest.mark.parametrize("rule_dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("state_dtype", [None, torch.bfloat16])
def test_a_restored_optimizer_goes_on_to_the_bit(dtype, rule_dtype, state_dtype, way):
    if state_dtype and rule_dtype == torch.float64:
        pytest.skip("refused: test_rules_in_float64_take_no_state_in_bfloat16")
    rule = random_rule(hidden=5, dtype=rule_dtype)

    def make():
        params = parameters(dtype) + parameters(dtype, shapes=[(8,)], seed=2)
        groups = [{"params": params[:2], "lr": 0.5}, {"params": params[2:]}]
        return params, FusedLSTMOptimizer(groups, rule, state_dtype=state_dtype)

    params, optimizer = make()
    run(optimizer, params[:-1], range(3))  # the last one has not been stepped yet
    saved = way(optimizer.state_dict())
    values = [param.detach().clone() for param in params]
    twins, restored = make()
    restored.param_groups[0]["lr"] = 3.0
    for twin, value in zip(twins, values, strict=True):
        twin.data.copy_(value)
    restored.load_state_dict(saved)
    assert restored.param_groups[0]["lr"] == 0.5
    assert restored.param_groups[0]["rule"] is rule
    assert {state["lstm_state"].dtype for state in restored.state.values()} == {state_dtype or rule_dtype}
    expected = run(optimizer, params, range(3, 6))
    assert same(run(restored, twins, range(3, 6)), expected)


def test_states_that_were_saved_without_shapes_are_loaded(rule):
    params, twins = parameters(), parameters()
    optimizer, restored = FusedLSTMOptimizer(params, rule), FusedLSTMOptimizer(twins, rule)
    run(FusedLSTMOptimizer(twins, rule), twins, [0])
    run(optimizer, params, [0])
    saved = optimizer.state_dict()
    saved["state"] = {key: {"lstm_state": entry["lstm_state"]} for key, entry in saved["state"].items()}
    saved["param_groups"][0].pop("momentum")
    restored.load_state_dict(saved)
    assert restored.state[twins[0]]["shape"] == optimizer.state[params[0]]["shape"]
    assert same(run(restored, twins, [1, 2]), run(optimizer, params, [1, 2]))


@pytest.mark.parametrize("flat", [False, True])
def test_distributed_checkpoints_hold_it_to_the_bit(rule, flat):
    from torch.distributed.checkpoint import state_dict as checkpoints

    options = checkpoints.StateDictOptions(flatten_optimizer_state_dict=flat)
    models = []
    for _ in range(2):
        models.append(nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2)))
        models[-1].register_parameter("scale", nn.Parameter(torch.ones(())))
    params, twins = (list(model.parameters()) for model in models)
    optimizer, restored = FusedLSTMOptimizer(params, rule), FusedLSTMOptimizer(twins, rule)
    run(optimizer, params, range(2))
    saved = copy.deepcopy(checkpoints.get_optimizer_state_dict(models[0], optimizer, options=options))
    checkpoints.set_optimizer_state_dict(models[1], restored, saved, options=options)
    for param, twin in zip(params, twins, strict=True):
        twin.data.copy_(param)
    assert same(run(restored, twins, [2, 3]), run(optimizer, params, [2, 3]))


@pytest.mark.parametrize("lr", [1.0, torch.tensor(1.0)])
@pytest.mark.parametrize("relative", [False, True])
def test_a_state_that_is_asked_for_before_the_first_step_is_that_of_no_step(relative, lr):
    from torch.distributed.checkpoint import state_dict as checkpoints

    rule = stepping(rule_of(RNNPROP, seed=3), relative=relative, ramp=5)
    model = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2))
    twin = copy.deepcopy(model)
    params, twins = list(model.parameters()), list(twin.parameters())
    optimizer, undisturbed = (FusedLSTMOptimizer(of, rule, lr=lr) for of in (params, twins))
    saved = checkpoints.get_optimizer_state_dict(model, optimizer)
    assert not any(entry["lstm_state"].any() for entry in saved["state"].values())
    assert not any(entry["step"] for entry in saved["state"].values())
    assert same(run(optimizer, params, range(3)), run(undisturbed, twins, range(3)))


def test_a_first_step_at_rate_0_with_gradients_is_a_step(rule):
    params, twins = parameters(), parameters()
    optimizer, other = FusedLSTMOptimizer(params, rule, lr=0.0), FusedLSTMOptimizer(twins, rule)
    run(optimizer, params, [0])
    run(other, twins, [0])
    for param, twin in zip(params, twins, strict=True):
        assert torch.equal(optimizer.state[param]["lstm_state"], other.state[twin]["lstm_state"])


def test_a_restored_optimizer_forgets_what_it_had(rule):
    params, twins = parameters(), parameters()
    optimizer, fresh = FusedLSTMOptimizer(params, rule), FusedLSTMOptimizer(twins, rule)
    start = fresh.state_dict()
    run(optimizer, params, range(2))
    optimizer.load_state_dict(start)
    assert not optimizer.state
    for param, twin in zip(params, twins, strict=True):
        param.data.copy_(twin)
    assert same(run(optimizer, params, [3]), run(fresh, twins, [3]))


def test_what_was_saved_is_not_stepped_along(rule):
    params, twins = parameters(), parameters()
    optimizer, restored = FusedLSTMOptimizer(params, rule), FusedLSTMOptimizer(twins, rule)
    run(optimizer, params, [0])
    saved = optimizer.state_dict()
    restored.load_state_dict(saved)
    before = copy.deepcopy(saved["state"])
    run(restored, twins, [1])
    assert all(torch.equal(saved["state"][key]["lstm_state"], before[key]["lstm_state"]) for key in before)


@pytest.mark.parametrize("way", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x)), lambda x: through_pickle(x)])
def test_a_copied_optimizer_goes_on_to_the_bit(rule, way):
    params = parameters()
    half = {"state_dtype": torch.bfloat16}
    optimizer = FusedLSTMOptimizer(params, rule, nonfinite="skip", backend="native", lr=0.7, maximize=True, **half)
    run(optimizer, params, range(2))
    params[0].grad[0, 0] = NAN
    optimizer.step()
    twin = way(optimizer)
    kept = twin.nonfinite, twin.backend, twin.skipped_steps, twin.state_dtype
    assert kept == ("skip", "native", 1, torch.bfloat16)
    twins = twin.param_groups[0]["params"]
    assert not any(a is b for a, b in zip(params, twins, strict=True))
    assert twin.param_groups[0]["rule"] is not rule
    assert same(run(twin, twins, [2, 3]), run(optimizer, params, [2, 3]))


def through_pickle(optimizer):
    buffer = io.BytesIO()
    torch.save(optimizer, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


def test_a_rate_that_is_meant_for_another_optimizer_is_warned_about(rule):
    param = torch.zeros(3, requires_grad=True)
    with pytest.warns(
        UserWarning, match="lr: expected a factor on the rule's own steps, as a rule 1, got 0.001"
    ) as seen:
        FusedLSTMOptimizer([param], rule, lr=1e-3)
    assert seen[0].filename == __file__
    with pytest.warns(UserWarning, match="got 0.04"):
        FusedLSTMOptimizer([param], rule).add_param_group({"params": [torch.zeros(2, requires_grad=True)], "lr": 0.04})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for lr in (0.05, 1, 0, torch.tensor(0.5)):
            FusedLSTMOptimizer([param], rule, lr=lr)
        torch.optim.lr_scheduler.LinearLR(FusedLSTMOptimizer([param], rule), 1 / 50, total_iters=50)


def test_other_weights_are_warned_about(rule):
    params = parameters()
    optimizer = FusedLSTMOptimizer(params, rule)
    run(optimizer, params, [0])
    saved = optimizer.state_dict()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        FusedLSTMOptimizer(params, copy.deepcopy(rule)).load_state_dict(saved)
    other = FusedLSTMOptimizer(params, random_rule(hidden=7, seed=1))
    with pytest.warns(UserWarning, match="rule of group 0 has other weights") as caught:
        other.load_state_dict(saved)
    assert caught[0].filename == __file__


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda params: FusedLSTMOptimizer(params, random_rule(hidden=8)), "rule of group 0: expected config .*8"),
        (lambda params: FusedLSTMOptimizer(params, random_rule(hidden=7, p=5.0)), "rule of group 0: expected config"),
        (
            lambda params: FusedLSTMOptimizer(params, random_rule(hidden=7, dtype=torch.float64)),
            "rule of group 0: expected dtype torch.float64, got 'torch.float32'",
        ),
        (
            lambda params: FusedLSTMOptimizer(params, random_rule(hidden=7), state_dtype=torch.bfloat16),
            "state of parameter 0: expected .* of torch.bfloat16, got .* of torch.float32",
        ),
        (lambda params: FusedLSTMOptimizer(params[:2], random_rule(hidden=7)), "doesn't match the size"),
        (
            lambda params: FusedLSTMOptimizer([{"params": [p]} for p in params], random_rule(hidden=7)),
            "different number of parameter groups",
        ),
        (
            lambda params: FusedLSTMOptimizer(params[::-1], random_rule(hidden=7)),
            r"state of parameter 0: expected one of a parameter of shape \[0, 2\], got \[3, 5\]",
        ),
    ],
)
def test_a_state_that_does_not_fit_is_refused_and_nothing_is_changed(rule, make, message):
    params = parameters()
    optimizer = FusedLSTMOptimizer(params, rule)
    run(optimizer, params, [0])
    other = make(parameters())
    run(other, [param for group in other.param_groups for param in group["params"]], [1])
    before = everything(other)
    with pytest.raises(ValueError, match=message):
        other.load_state_dict(optimizer.state_dict())
    assert_unchanged(other, before)


@pytest.mark.parametrize("damage", [{"lstm_state": 3.0}, {"shape": 15}])
def test_a_damaged_state_is_refused_and_nothing_is_changed(rule, damage):
    params = parameters()
    optimizer = FusedLSTMOptimizer(params, rule)
    run(optimizer, params, [0])
    before, saved = everything(optimizer), optimizer.state_dict()
    saved["state"][1] = {**saved["state"][1], **damage}
    with pytest.raises(ValueError, match="state of parameter 1: expected a dense tensor and a dictionary of sizes"):
        optimizer.load_state_dict(saved)
    assert_unchanged(optimizer, before)


def test_the_state_of_another_kind_of_optimizer_is_refused(rule):
    params = parameters()
    adam = torch.optim.Adam(params)
    run(adam, params, [0])
    with pytest.raises(ValueError, match="rule of group 0: expected a state_dict of FusedLSTMOptimizer"):
        FusedLSTMOptimizer(params, rule).load_state_dict(adam.state_dict())


# Without the host: in CUDA graphs and under torch.compile


class NoWaiting(TorchDispatchMode):
    """Refuses whatever would make the host wait for a GPU."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        assert function is not torch.ops.aten._local_scalar_dense.default
        return function(*args, **(kwargs or {}))


def two_groups():
    params = parameters()
    return params, [{"params": params[:2], "lr": 0.5}, {"params": params[2:], "rule": random_rule(hidden=3)}]


@pytest.mark.parametrize("backend", ["native", "reference"])
@pytest.mark.parametrize("nonfinite", ["skip", "propagate"])
@pytest.mark.parametrize("several", [False, True])
def test_a_capturable_step_does_the_same_without_waiting(rule, backend, nonfinite, several):
    results = []
    for capturable in (False, True):
        params, groups = two_groups()
        optimizer = FusedLSTMOptimizer(
            groups if several else params, rule, backend=backend, nonfinite=nonfinite, capturable=capturable
        )
        for step in range(4):
            set_gradients(params, step)
            if step in (0, 2) and nonfinite == "skip":
                params[3].grad.view(-1)[5] = NAN
            with NoWaiting() if capturable else contextlib.nullcontext():
                optimizer.step()
        results.append((*params, *(entry["lstm_state"] for entry in optimizer.state.values())))
        assert optimizer.skipped_steps == (2 if nonfinite == "skip" else 0)
        assert pickle.loads(pickle.dumps(optimizer)).skipped_steps == optimizer.skipped_steps
    assert same(*results)


def test_a_graph_that_would_start_from_zero_at_every_replay_is_refused(rule, monkeypatch):
    params = parameters()
    optimizer = FusedLSTMOptimizer(params, rule, nonfinite="skip", capturable=True)
    set_gradients(params, 0)
    before = everything(optimizer)
    monkeypatch.setattr(optim, "_is_captured", lambda device: True)
    with pytest.raises(RuntimeError, match=r"state: expected every parameter to have been stepped.*got 5 without"):
        optimizer.step()
    assert_unchanged(optimizer, before)
    monkeypatch.undo()
    optimizer.step()
    monkeypatch.setattr(optim, "_is_captured", lambda device: True)
    optimizer.step()


@pytest.mark.parametrize("kind", [float, torch.tensor])
@pytest.mark.parametrize("scheduler", [False, True])
def test_a_schedule_inside_compiled_steps_makes_at_most_two_graphs(rule, kind, scheduler):
    """As with AdamW, where a number is in the graph at first, and then an argument of it."""
    graphs, results = [], []

    def count(module, inputs):
        graphs.append(module)
        return module.forward

    for compiled in (False, True):
        params = parameters()
        optimizer = FusedLSTMOptimizer(params, rule, lr=kind(1.0), weight_decay=0.01, nonfinite="skip", capturable=True)
        cosine = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 8) if scheduler else None
        run(optimizer, params, [0])
        torch.compiler.reset()

        def step(o=optimizer):
            o.step()

        if compiled:  # torch's schedulers wrap the step in what it does not trace
            step = torch.compile(step, fullgraph=not scheduler, backend=count)
        for number in range(1, 9):
            set_gradients(params, number)
            step()
            lr = optimizer.param_groups[0]["lr"]
            if cosine is not None:
                cosine.step()
            elif isinstance(lr, torch.Tensor):
                lr.mul_(0.9)
            else:
                optimizer.param_groups[0]["lr"] = lr * 0.9
        results.append((*params, *(entry["lstm_state"] for entry in optimizer.state.values())))
    assert 1 <= len(graphs) <= 2
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, rtol=2e-2 if one.dtype.itemsize == 2 else 1e-5, atol=1e-6)


@pytest.mark.parametrize("backend", ["native", "reference"])
@pytest.mark.parametrize("several", [False, True])
def test_a_rate_in_a_tensor_is_the_number_in_it_and_nobody_waits_for_it(rule, backend, several):
    results = []
    for lr in (0.3, torch.tensor(0.3), torch.tensor(0.3, dtype=torch.float64), torch.tensor([0.3])):
        params, groups = two_groups()
        groups[0].pop("lr")
        optimizer = FusedLSTMOptimizer(
            groups if several else params, rule, lr=lr, weight_decay=0.1, backend=backend, nonfinite="propagate"
        )
        for step in range(3):
            set_gradients(params, step)
            with NoWaiting():
                optimizer.step()
            if step == 1 and isinstance(lr, torch.Tensor):
                lr.fill_(0.1)
            elif step == 1:
                for group in optimizer.param_groups:
                    group["lr"] = 0.1
        results.append(params)
    for other in results[1:]:
        for mine, theirs in zip(results[0], other, strict=True):
            torch.testing.assert_close(mine, theirs, rtol=1e-2 if mine.dtype.itemsize == 2 else 1e-5, atol=1e-6)


@pytest.mark.parametrize("backend", ["native", "reference"])
def test_weight_decay_is_adamw_s(rule, backend):
    """With gradients of zero and a rule without biases nothing else moves the parameters."""
    with torch.no_grad():
        for name, weight in rule.named_parameters():
            if "bias" in name:
                weight.zero_()
        rule.weight_out.zero_()
    mine, theirs = parameters(), parameters()
    optimizer = FusedLSTMOptimizer(
        [{"params": mine[:2], "weight_decay": 0.5}, {"params": mine[2:]}],
        rule,
        lr=0.1,
        weight_decay=0.2,
        backend=backend,
    )
    adamw = torch.optim.AdamW(
        [{"params": theirs[:2], "weight_decay": 0.5}, {"params": theirs[2:]}], lr=0.1, weight_decay=0.2
    )
    for _ in range(3):
        for param in mine + theirs:
            param.grad = torch.zeros_like(param)
        optimizer.step()
        adamw.step()
    for one, other in zip(mine, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=2 * torch.finfo(one.dtype).eps, atol=0)
    assert not any(torch.equal(one, other) for one, other in zip(mine, parameters(), strict=True) if one.numel())


def test_rules_with_means_take_no_state_in_bfloat16():
    with pytest.raises(ValueError, match=r"state_dtype: expected None for adam.*, whose means would lose"):
        FusedLSTMOptimizer(parameters(), RNNpropRule(), state_dtype=torch.bfloat16)


def test_rules_whose_coordinates_talk_take_no_state_in_bfloat16():
    with pytest.raises(ValueError, match=r"state_dtype: expected None for a rule whose coordinates talk, got torch.b"):
        FusedLSTMOptimizer(parameters(), GACRule(averages=2), state_dtype=torch.bfloat16)


@pytest.mark.parametrize("backend", ["native", "reference"])
def test_parameters_that_are_added_later_begin_with_means_of_their_own(backend):
    rule = rule_of(RNNPROP)
    early, late, alone = parameters(seed=1), parameters(seed=2), parameters(seed=2)
    together, single = (
        FusedLSTMOptimizer(early, rule, backend=backend),
        FusedLSTMOptimizer(alone, rule, backend=backend),
    )
    run(together, early, [0, 1])
    together.add_param_group({"params": late})
    for step in range(3):
        set_gradients(early, step)
        set_gradients(late, step)
        set_gradients(alone, step)
        together.step()
        single.step()
    assert same(late, alone)
    assert not same(early, parameters(seed=1))


@pytest.mark.parametrize("several", [False, True])
@pytest.mark.parametrize("stepped", [0, 1])
def test_torch_compile_takes_the_step_without_a_break(rule, several, stepped):
    results = []
    for compiled in (False, True):
        params, groups = two_groups()
        optimizer = FusedLSTMOptimizer(groups if several else params, rule, nonfinite="skip", capturable=True)
        run(optimizer, params, range(stepped))
        torch.compiler.reset()
        step = torch.compile(lambda o=optimizer: o.step(), fullgraph=True, backend="aot_eager")
        for number in range(stepped, 5):
            set_gradients(params, number)
            if number == 3:
                params[0].grad[0, 0] = NAN
            step() if compiled else optimizer.step()
        results.append((*params, *(entry["lstm_state"] for entry in optimizer.state.values())))
        assert optimizer.skipped_steps == 1
    assert same(*results)


# What others do to it behind its back


@pytest.mark.parametrize(
    "change", [lambda state: setattr(state, "data", state.data.clone()), lambda state: state.set_(state.clone())]
)
def test_states_that_were_given_other_data_are_used_as_they_are(rule, change):
    """As loops over all states do, to move or to copy them."""
    results = []
    for changed in (False, True):
        params = parameters()
        optimizer = FusedLSTMOptimizer(params, rule)
        run(optimizer, params, [0, 1])
        if changed:
            with torch.no_grad():
                for entry in optimizer.state.values():
                    change(entry["lstm_state"])
        run(optimizer, params, [2, 3])
        results.append((*params, *(entry["lstm_state"] for entry in optimizer.state_dict()["state"].values())))
    assert same(*results)
    with torch.no_grad():
        optimizer.state[params[0]]["lstm_state"].data = torch.zeros_like(optimizer.state[params[0]]["lstm_state"])
    run(optimizer, params, [4])
    fresh = FusedLSTMOptimizer([params[0]], rule)
    run(fresh, [params[0]], [4])
    n = params[0].numel()
    assert same(*([to_rows(o.state[params[0]]["lstm_state"], n)] for o in (optimizer, fresh)))


@pytest.mark.parametrize("backend", ["native", "reference"])
@pytest.mark.parametrize("several", [False, True])
def test_gradients_that_are_infinite_for_the_rule_are_found(backend, several):
    params = [nn.Parameter(torch.zeros(5, dtype=torch.float64)), nn.Parameter(torch.zeros(3))]
    groups = [{"params": [param]} for param in params]
    optimizer = FusedLSTMOptimizer(groups if several else params, rule_of(RNNPROP), backend=backend)
    for param in params:
        param.grad = torch.ones_like(param)
    params[0].grad[3] = 1e300
    with pytest.raises(FloatingPointError, match="gradient: expected finite numbers"):
        optimizer.step()
    assert not any(param.any() for param in params)
    double = FusedLSTMOptimizer(params[:1], rule_of(lstm(), dtype=torch.float64), backend=backend)
    double.step()


@pytest.mark.parametrize("backend", ["native", "reference"])
def test_an_expanded_parameter_is_refused_and_nothing_is_changed(rule, backend):
    params = [nn.Parameter(torch.zeros(3)), nn.Parameter(torch.zeros(1).expand(10))]
    optimizer = FusedLSTMOptimizer(params, rule, backend=backend)
    for param in params:
        param.grad = torch.ones(param.shape)
    with pytest.raises(RuntimeError, match=r"parameter of shape \[10\]: expected a place in memory for each number"):
        optimizer.step()
    assert not any(param.any() for param in params)
    assert not optimizer.state


def test_a_state_dict_of_the_first_version_goes_on(rule):
    params, twins = parameters(), parameters()
    optimizer, twin = FusedLSTMOptimizer(params, rule), FusedLSTMOptimizer(twins, rule)
    run(optimizer, params, [0, 1])
    run(twin, twins, [0, 1])
    saved = copy.deepcopy(optimizer.state_dict())
    for group in saved["param_groups"]:
        for name in ("weight_decay", "momentum"):
            del group[name]
        group["rule"]["config"] = {
            "preprocess": "log_sign", "p": 10.0, "scale": 0.7, "output_scale": 0.3, "hidden_size": 7, "num_layers": 2,
        }  # fmt: skip
    for entry in saved["state"].values():
        del entry["shape"]
    again = FusedLSTMOptimizer(params, rule)
    again.load_state_dict(saved)
    assert same(run(again, params, [2, 3]), run(twin, twins, [2, 3]))


@pytest.mark.parametrize("factors", [{"lr": -1}, {"lr": "abc"}, {"lr": None}, {"weight_decay": -5}])
def test_factors_that_are_loaded_are_checked(rule, factors):
    params = parameters()
    optimizer = FusedLSTMOptimizer(params, rule)
    run(optimizer, params, [0])
    saved = optimizer.state_dict()
    saved["param_groups"][0] |= factors
    with pytest.raises(ValueError, match=f"{next(iter(factors))}: expected a finite number >= 0"):
        optimizer.load_state_dict(saved)
    with pytest.raises(ValueError, match="state_dict: expected a dict of states and a list of groups"):
        optimizer.load_state_dict({**saved, "state": None})


@pytest.mark.parametrize("text", GIVEN)
def test_rules_that_cannot_step_by_themselves_are_refused(text):
    with pytest.raises(ValueError, match="rule: expected one with an update and no given rows, got"):
        FusedLSTMOptimizer(parameters(), rule_of(text))


# Without numbers


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("nonfinite", ["raise", "skip", "propagate"])
@pytest.mark.parametrize("mode", [FakeTensorMode, lambda: FakeTensorMode(allow_non_fake_inputs=True)])
def test_fake_tensors_are_stepped(rule, mode, nonfinite, backend):
    with mode():
        model = nn.Linear(3, 2)
        optimizer = FusedLSTMOptimizer(model.parameters(), rule, nonfinite=nonfinite, backend=backend)
        for _ in range(2):
            model(torch.ones(1, 3)).sum().backward()
            optimizer.step()
        saved = optimizer.state_dict()
        optimizer.load_state_dict(saved)
        optimizer.step()
    state = optimizer.state[model.weight]["lstm_state"]
    assert isinstance(state, FakeTensor)
    assert state.shape == new_state(rule, 6).shape
    assert (
        saved["param_groups"][0]["rule"]
        == FusedLSTMOptimizer(parameters(), rule).state_dict()["param_groups"][0]["rule"]
    )


@pytest.mark.parametrize("nonfinite", ["raise", "skip", "propagate"])
def test_parameters_and_a_rule_on_meta_are_stepped(rule, nonfinite):
    rule.to("meta")
    model = nn.Linear(3, 2, device="meta")
    optimizer = FusedLSTMOptimizer(model.parameters(), rule, nonfinite=nonfinite)
    for _ in range(2):
        model(torch.ones(1, 3, device="meta")).sum().backward()
        optimizer.step()
        optimizer.load_state_dict(optimizer.state_dict())
    assert optimizer.state[model.weight]["lstm_state"].is_meta


# Together


@pytest.mark.parametrize("restored", [False, True])
def test_the_states_of_a_group_are_one_argument_of_the_kernel(rule, restored, monkeypatch):
    params = parameters()
    optimizer = FusedLSTMOptimizer(params, rule, backend="reference")
    run(optimizer, params, [0])
    if restored:
        optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    taken, step_ = [], reference_operators.step_
    spy = dataclasses.replace(
        dispatch.select("reference", "cpu"), step_=lambda *args: (taken.append(args[2]), step_(*args))
    )
    monkeypatch.setitem(dispatch._BACKENDS, "reference", spy)
    run(optimizer, params, [1])
    assert [len(states) for states in taken] == [1]
    optimizer.state[params[0]]["lstm_state"] = torch.ones_like(optimizer.state[params[0]]["lstm_state"])
    run(optimizer, params, [2])
    assert [len(states) for states in taken] == [1, len(params)]  # someone has put another in its place
    assert taken[1][0] is optimizer.state[params[0]]["lstm_state"]


def test_backends_agree_along_a_trajectory(rule):
    found = {}
    for backend in ("native", "reference"):
        params = parameters()
        optimizer = FusedLSTMOptimizer(params, rule, backend=backend)
        found[backend] = run(optimizer, params, range(20))
    for one, other in zip(found["native"], found["reference"], strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


def test_a_network_is_trained_on_digits():
    from sklearn.datasets import load_digits

    torch.manual_seed(0)
    digits = load_digits()
    images, labels = torch.from_numpy(digits.images).float().flatten(1) / 16, torch.from_numpy(digits.target)
    model = nn.Sequential(nn.Linear(64, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 10))
    before = copy.deepcopy(model.state_dict())
    optimizer = FusedLSTMOptimizer(model.parameters(), LSTMRule(hidden_size=4, num_layers=1, output_scale=0.01))
    for step in range(30):
        rows = torch.arange(step * 50, step * 50 + 50) % len(labels)
        loss = nn.functional.cross_entropy(model(images[rows]), labels[rows])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss.isfinite()
    after = model.state_dict()
    assert not any(torch.equal(after[name], before[name]) for name, _ in model.named_parameters())
