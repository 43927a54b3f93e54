"""FusedLSTMOptimizer does what torch.optim's optimizers do, with the reference's numbers."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import io
import math
import pickle
import warnings

import pytest
import torch
from helpers import constants, detached, random_gradients, random_rule
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from fastl2l import FusedLSTMOptimizer, LSTMRule, optim, reference
from fastl2l.ops import dispatch
from fastl2l.ops import reference as reference_operators

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


def test_a_tensor_is_a_rate_too(rule):
    params, twins = parameters(), parameters()
    optimizer = FusedLSTMOptimizer(params, rule, lr=torch.tensor(0.5))
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


@pytest.mark.parametrize(
    ("group", "error", "message"),
    [
        ({"params": parameters(seed=1), "rule": None}, TypeError, "rule: expected an LSTMRule.*got NoneType"),
        ({"params": parameters(seed=1), "rule": nn.Linear(1, 1)}, TypeError, "rule: expected an LSTMRule.*got Linear"),
        ({"params": parameters(seed=1), "lr": -1}, ValueError, "lr: expected a finite number >= 0, got -1"),
        ({"params": parameters(seed=1), "lr": NAN}, ValueError, "lr: expected a finite number >= 0, got nan"),
        ({"params": parameters(seed=1), "lr": "0.1"}, ValueError, "lr: expected a finite number >= 0, got '0.1'"),
        ({"params": [torch.zeros(3, dtype=torch.int64)]}, ValueError, "params: expected one of torch.float32.*int64"),
        ({"params": [nn.Parameter(torch.zeros(3, dtype=torch.complex64))]}, ValueError, "params: .*complex64"),
        ({"params": [3.0]}, TypeError, "params: expected tensors, got float"),
        ({"params": [torch.zeros(3, device="meta")]}, ValueError, "params: expected tensors on cpu.*got one on meta"),
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
    with pytest.raises(TypeError, match="rule: expected an LSTMRule for every parameter group, got NoneType"):
        FusedLSTMOptimizer(parameters())
    with pytest.raises(ValueError, match="nonfinite: expected one of raise, skip, propagate, got 'ignore'"):
        FusedLSTMOptimizer(parameters(), rule, nonfinite="ignore")
    with pytest.raises(ValueError, match="nonfinite: expected skip or propagate with capturable=True"):
        FusedLSTMOptimizer(parameters(), rule, capturable=True)
    with pytest.raises(ValueError, match="backend: expected one of auto, reference, native, triton, got 'triton2'"):
        FusedLSTMOptimizer(parameters(), rule, backend="triton2")
    with pytest.raises(ValueError, match="empty parameter list"):
        FusedLSTMOptimizer([], rule)
    with pytest.raises(TypeError, match="iterable of Tensors"):
        FusedLSTMOptimizer(torch.zeros(3), rule)
    params = parameters()
    with pytest.raises(ValueError, match="more than one parameter group"):
        FusedLSTMOptimizer([{"params": params}, {"params": params[:1]}], rule)


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
def test_one_group_alone_is_refused_as_a_whole(rule, wrong, stepped, backend):
    table = nn.Embedding(10, 3, sparse=True)
    params = [*parameters(), table.weight]
    optimizer = FusedLSTMOptimizer(params, rule, backend=backend)
    run(optimizer, params, range(stepped))
    set_gradients(params, 5)
    if wrong == "nonfinite":
        params[-1].grad[3, 1] = NAN
    elif wrong == "sparse":
        params[-1].grad = None
        table(torch.tensor([1, 2])).sum().backward()
    else:
        params[-1].grad = None
        params[-1].grad_dtype = torch.float64
        params[-1].grad = torch.ones(10, 3, dtype=torch.float64)
    before = everything(optimizer)
    with pytest.raises(FloatingPointError if wrong == "nonfinite" else RuntimeError, match="gradient"):
        optimizer.step()
    assert_unchanged(optimizer, before)


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
def test_a_restored_optimizer_goes_on_to_the_bit(dtype, rule_dtype, way):
    rule = random_rule(hidden=5, dtype=rule_dtype)

    def make():
        params = parameters(dtype) + parameters(dtype, shapes=[(8,)], seed=2)
        groups = [{"params": params[:2], "lr": 0.5}, {"params": params[2:]}]
        return params, FusedLSTMOptimizer(groups, rule)

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
    expected = run(optimizer, params, range(3, 6))
    assert same(run(restored, twins, range(3, 6)), expected)


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
    optimizer = FusedLSTMOptimizer(params, rule, nonfinite="skip", backend="native", lr=0.7, maximize=True)
    run(optimizer, params, range(2))
    params[0].grad[0, 0] = NAN
    optimizer.step()
    twin = way(optimizer)
    assert (twin.nonfinite, twin.backend, twin.skipped_steps) == ("skip", "native", 1)
    twins = twin.param_groups[0]["params"]
    assert not any(a is b for a, b in zip(params, twins, strict=True))
    assert twin.param_groups[0]["rule"] is not rule
    assert same(run(twin, twins, [2, 3]), run(optimizer, params, [2, 3]))


def through_pickle(optimizer):
    buffer = io.BytesIO()
    torch.save(optimizer, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


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
            "rule of group 0: expected dtype torch.float64, got torch.float32",
        ),
        (lambda params: FusedLSTMOptimizer(params[:2], random_rule(hidden=7)), "doesn't match the size"),
        (
            lambda params: FusedLSTMOptimizer([{"params": [p]} for p in params], random_rule(hidden=7)),
            "different number of parameter groups",
        ),
        (
            lambda params: FusedLSTMOptimizer(params[::-1], random_rule(hidden=7)),
            r"state of parameter 0: expected \[0, 28, 16\] of torch.float32, got \[1, 28, 16\]",
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
