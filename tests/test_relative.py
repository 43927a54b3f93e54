"""Relative rules: updates in units of the size that each parameter had at first."""

from __future__ import annotations

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from helpers import RNNPROP, lstm, rule_of
from torch import nn

from fastl2l import FusedLSTMOptimizer, LSTMRule, MetaTrainer, RNNpropRule, Rule, evaluate, load_rule, save_rule, tasks
from fastl2l.experiments import first_rules
from fastl2l.meta import capture
from fastl2l.ops import update
from fastl2l.ops.layout import new_state
from fastl2l.rule_config import RuleConfig
from fastl2l.rules import stepping
from fastl2l.tasks.base import problem_seed, value_and_grad
from fastl2l.tasks.batch import batch
from fastl2l.trajectory import Trajectory
from fastl2l.units import unit_of, units

RULE = stepping(rule_of(RNNPROP, output_scale=0.1), relative=True)
PLAIN = rule_of(RNNPROP, output_scale=0.1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("param", "expected"),
    [
        (torch.full((3, 4), 0.2), 2.0),  # its root mean square in tenths
        (torch.full((3, 4), -0.2), 2.0),
        (torch.tensor([[0.2, -0.4], [0.4, 0.0]]), 3.0),
        (torch.tensor([[0.2, -0.2], [0.4, 0.2]]), 10 * math.sqrt(0.07)),
        (torch.zeros(5, 25), 0.5),  # at least 1 / (4 sqrt(fan in))
        (torch.zeros(2, 4, 5, 5), 0.25),  # of a convolution
        (torch.full((7, 3), 1.0), 3.0),  # at most
        (torch.full((7,), 0.2), 1.0),  # vectors
        (torch.tensor(0.2), 1.0),
        (torch.zeros(0, 5), 1.0),
        (torch.zeros(5, 0), 1.0),
    ],
    ids=lambda value: str(list(value.shape)) if isinstance(value, torch.Tensor) else "",
)
def test_a_unit_is_the_size_of_a_tensor_at_first(param, expected, dtype):
    found = unit_of(param.to(dtype))
    assert found.shape == ()
    assert found.item() == pytest.approx(expected, rel=1e-6 if dtype.itemsize > 2 else 0.01)


def test_a_unit_has_no_bounds_of_its_numbers_dtype():
    large, small = torch.full((100, 1000), 300.0, dtype=torch.float16), torch.full((3, 3), 1e-30)
    assert unit_of(large).item() == 3.0  # whose square is no float16
    assert unit_of(small).item() == pytest.approx(10 / 4 / math.sqrt(3))


def test_units_of_coordinates_are_those_of_their_tensors():
    theta, shapes = torch.tensor([0.2] * 6 + [0.5] * 3 + [0.05] * 2), [(2, 3), (3,), (2, 1)]
    torch.testing.assert_close(units(theta, shapes), torch.tensor([2.0] * 6 + [1.0] * 3 + [2.5] * 2))


# Rules


@pytest.mark.parametrize("kind", [LSTMRule, RNNpropRule])
def test_rules_are_relative_if_asked_to_be_and_keep_it_in_files(kind, tmp_path):
    rule = kind(relative=True, output_scale=0.2)
    assert rule.config.relative
    assert not kind().config.relative
    loaded = load_rule(save_rule(rule, tmp_path / "rule.safetensors"))
    assert loaded.describe() == rule.describe()
    assert "relative" in repr(rule)
    assert "relative" not in repr(kind())
    again = stepping(kind(seed=3), relative=True)
    assert type(again) is kind
    assert again.config.relative
    assert again.fingerprint() == kind(seed=3).fingerprint()


def test_descriptions_without_a_word_of_units_are_of_plain_rules():
    config = RULE.config
    assert RuleConfig.from_description(config.describe()) == config
    assert RuleConfig.from_description({"text": RNNPROP, "output_scale": 0.1}) == PLAIN.config
    assert "relative" not in PLAIN.config.describe()
    with pytest.raises(ValueError, match="relative: expected True or False, got 1"):
        RuleConfig.from_description({"text": RNNPROP, "output_scale": 0.1, "relative": 1})
    with pytest.raises(ValueError, match="expected text and output_scale"):
        RuleConfig.from_description({"text": RNNPROP, "output_scale": 0.1, "relatives": True})


def test_first_rules_are_relative_if_asked_to_be():
    assert first_rules(tasks.Quadratic(), kind="rnnprop", relative=True).config.relative
    before = RNNpropRule(seed=5)
    after = first_rules(tasks.Quadratic(), init=before, relative=True)
    assert after.config.relative
    assert after.fingerprint() == before.fingerprint()
    assert first_rules(tasks.Quadratic(), init=after).config.relative
    pair = first_rules(tasks.Quadratic(), init={"conv": before, "fc": RNNpropRule()}, relative=True)
    assert all(rule.config.relative for rule in pair.values())


# The optimizer


def parameters(dtype=torch.float32):
    made = torch.full((3, 4), 0.2), torch.zeros(5, 25), torch.full((7,), 0.2), torch.full((20, 2), 1.0)
    return [param.to(dtype).requires_grad_() for param in made]


UNITS = [2.0, 0.5, 1.0, 3.0]


def step(optimizer, params, number):
    random = torch.Generator().manual_seed(number)
    for param in params:
        param.grad = torch.randn(param.shape, generator=random).to(param.dtype)
    optimizer.step()


@pytest.mark.parametrize("backend", ["native", "reference"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_updates_are_those_of_the_plain_rule_in_units(dtype, backend):
    found, expected = ([param.detach().requires_grad_() for param in parameters(dtype)] for _ in range(2))
    starts = [param.detach().clone() for param in found]
    optimizers = [
        FusedLSTMOptimizer(params, rule, backend=backend, lr=0.5) for params, rule in ((found, RULE), (expected, PLAIN))
    ]
    for number in range(3):
        step(optimizers[0], found, number)
        step(optimizers[1], expected, number)
        for mine, plain, start, unit in zip(found, expected, starts, UNITS, strict=True):
            want = start.double() + unit * (plain.double() - start.double())
            torch.testing.assert_close(mine.double(), want, rtol=0, atol=1e-6 if dtype == torch.float32 else 0.02)
    assert [optimizers[0].state[param]["unit"].item() for param in found] == pytest.approx(UNITS, rel=2e-3)


def test_units_are_those_of_the_first_step_whatever_becomes_of_the_parameters():
    params = parameters()
    optimizer = FusedLSTMOptimizer(params, RULE)
    step(optimizer, params, 0)
    for param in params:
        param.data.mul_(100)
    step(optimizer, params, 1)
    assert [optimizer.state[param]["unit"].item() for param in params] == pytest.approx(UNITS)


def test_weight_decay_is_not_in_units():
    params = parameters()
    optimizer = FusedLSTMOptimizer(params, RULE, weight_decay=0.1)
    others = parameters()
    step(optimizer, params, 0)
    step(FusedLSTMOptimizer(others, RULE), others, 0)
    for mine, other, start in zip(params, others, parameters(), strict=True):
        torch.testing.assert_close(mine, other - 0.1 * start)


def test_parameters_that_come_later_have_the_units_of_then():
    params = parameters()
    optimizer = FusedLSTMOptimizer(params, RULE)
    for param in params[:2]:
        param.grad = torch.ones_like(param)
    optimizer.step()
    params[3].data.fill_(0.2)
    alone = [params[3].detach().clone().requires_grad_()]
    step(optimizer, params, 1)
    assert optimizer.state[params[3]]["unit"].item() == pytest.approx(2.0)
    alone[0].grad = params[3].grad
    FusedLSTMOptimizer(alone, RULE).step()
    assert torch.equal(alone[0], params[3])


def test_a_loaded_state_goes_on_to_the_bit_with_the_units_that_it_had():
    params, twins = parameters(), parameters()
    optimizer = FusedLSTMOptimizer(params, RULE)
    step(optimizer, params, 0)
    saved = copy.deepcopy(optimizer.state_dict())
    for param, twin in zip(params, twins, strict=True):
        twin.data.copy_(param)
        twin.data.mul_(1)
    resumed = FusedLSTMOptimizer(twins, RULE)
    resumed.load_state_dict(saved)
    copied = copy.deepcopy(optimizer)
    for number in (1, 2):
        step(optimizer, params, number)
        step(resumed, twins, number)
        step(copied, copied.param_groups[0]["params"], number)
    assert all(map(torch.equal, params, twins))
    assert all(map(torch.equal, params, copied.param_groups[0]["params"]))


@pytest.mark.parametrize(
    "unit", [None, 2.0, torch.ones(2), torch.tensor(1), torch.tensor(math.nan), torch.tensor(-1.0)], ids=str
)
def test_states_without_units_are_refused_by_relative_rules(unit):
    params = parameters()
    optimizer = FusedLSTMOptimizer(params, RULE)
    step(optimizer, params, 0)
    saved = copy.deepcopy(optimizer.state_dict())
    saved["state"][1]["unit"] = unit
    if unit is None:
        del saved["state"][1]["unit"]
    before = [param.detach().clone() for param in params]
    with pytest.raises(ValueError, match="state of parameter 1: expected its unit, a finite number > 0"):
        optimizer.load_state_dict(saved)
    step(optimizer, params, 1)
    assert not torch.equal(params[1], before[1])


def test_states_of_plain_rules_are_refused_by_relative_ones_and_the_other_way_round():
    for made, loaded in ((RULE, PLAIN), (PLAIN, RULE)):
        params = parameters()
        optimizer = FusedLSTMOptimizer(params, made)
        step(optimizer, params, 0)
        with pytest.raises(ValueError, match="rule of group 0: expected config"):
            FusedLSTMOptimizer(parameters(), loaded).load_state_dict(optimizer.state_dict())


def test_rows_that_are_pruned_and_grown_keep_the_unit():
    param = torch.full((6, 4), 0.2).requires_grad_()
    optimizer = FusedLSTMOptimizer([param], RULE)
    step(optimizer, [param], 0)
    grown = torch.full((9, 4), 5.0).requires_grad_()
    optimizer.replace_parameter(param, grown, torch.arange(3))
    step(optimizer, [grown], 1)
    assert optimizer.state[grown]["unit"].item() == pytest.approx(2.0)


def test_a_relative_rule_beside_a_plain_one_and_with_a_state_in_bfloat16():
    params = parameters()
    relative_lstm = stepping(rule_of(lstm()), relative=True)
    groups = [{"params": params[:2], "rule": relative_lstm}, {"params": params[2:], "rule": rule_of(lstm())}]
    optimizer = FusedLSTMOptimizer(groups, state_dtype=torch.bfloat16)
    step(optimizer, params, 0)
    assert "unit" in optimizer.state[params[0]]
    assert "unit" not in optimizer.state[params[2]]


# Problems


def network():
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3))


def task(parts=None):
    random = torch.Generator().manual_seed(0)
    data = torch.randn(40, 6, generator=random), torch.randint(3, (40,), generator=random)
    return tasks.from_module(network, F.cross_entropy, data, batch_size=16, name="small", parts=parts)


def trained(problem, rules, steps):
    """By the optimizer, parameter by parameter, as someone's own loop would."""
    shapes = getattr(problem.function, "network", problem.function).shapes
    sizes = [math.prod(shape) for shape in shapes]
    params = [
        part.clone().view(tuple(shape)).requires_grad_()
        for part, shape in zip(problem.theta0.split(sizes), shapes, strict=True)
    ]
    optimizer = FusedLSTMOptimizer(params, rules) if isinstance(rules, Rule) else FusedLSTMOptimizer(rules(params))
    losses = []
    for number in range(steps):
        loss = problem.loss(torch.cat([param.flatten() for param in params]), number)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return torch.cat([param.detach().flatten() for param in params]), losses


@pytest.mark.parametrize("made", [task, lambda: tasks.Digits(hidden=(5,), init_std=0.4)])
def test_trajectories_and_evaluations_take_the_steps_that_a_training_loop_takes(made):
    own = made()
    problem = own.sample(0)
    theta, _losses = trained(problem, RULE, 10)
    trajectory = Trajectory(problem, RULE)
    for _ in range(10):
        trajectory.advance()
    torch.testing.assert_close(trajectory.theta, theta, rtol=0, atol=1e-3)
    plain = Trajectory(problem, PLAIN)
    for _ in range(10):
        plain.advance()
    assert (plain.theta - theta).abs().max() > 0.01  # and they are others


def test_evaluation_is_in_units():
    own = task()
    curves = evaluate(own, {"relative": RULE, "plain": PLAIN}, steps=8, runs=1, progress=False)
    for name, rule in (("relative", RULE), ("plain", PLAIN)):
        _, losses = trained(own.sample(problem_seed(1, "test", 0)), rule, 8)
        torch.testing.assert_close(curves.losses[name][0, :8].float(), torch.tensor(losses), rtol=0, atol=1e-4)


def test_of_parts_those_with_relative_rules_are_in_units():
    own = task(parts={"first": ["0"], "last": ["2"]})
    problem = own.sample(0)
    rules = {"first": RULE, "last": rule_of(RNNPROP, seed=1)}
    theta, _ = trained(
        problem, lambda params: [{"params": params[:2], "rule": RULE}, {"params": params[2:], "rule": rules["last"]}], 5
    )
    trajectory = Trajectory(problem, rules)
    for _ in range(5):
        trajectory.advance()
    torch.testing.assert_close(trajectory.theta, theta, rtol=0, atol=1e-4)


def test_the_lstm_on_sines_has_units_as_torch_s_would():
    problem = tasks.Sine(layers=2).sample(0)
    lstm_, head = nn.LSTM(1, 20, 2), nn.Linear(20, 1)
    shapes = [
        *(
            getattr(lstm_, f"{name}_l{layer}").shape
            for layer in (0, 1)
            for name in ("weight_ih", "weight_hh", "bias_ih")
        ),
        head.weight.shape,
        head.bias.shape,
    ]
    assert [tuple(shape) for shape in shapes] == problem.function.shapes
    assert torch.equal(problem.units, units(problem.theta0, shapes))


def test_problems_without_tensors_have_no_units():
    assert tasks.Quadratic().sample(0).units is None
    plain, mine = (Trajectory(tasks.Quadratic().sample(0), rule) for rule in (PLAIN, RULE))
    assert torch.equal(plain.advance(), mine.advance())


@pytest.mark.parametrize("kind", ["raw", "log_sign"])
def test_rules_that_see_the_scale_of_gradients_see_the_same_everywhere(kind):
    """Units are of updates alone: what the rule is given is the gradient of the parameters as they are."""
    rule = LSTMRule(kind, relative=True, ramp=3, seed=1)
    problem = task().sample(problem_seed(1, "test", 0))
    theta, losses = trained(problem, rule, 6)
    trajectory = Trajectory(problem, rule)
    for _ in range(6):
        trajectory.advance()
    torch.testing.assert_close(trajectory.theta, theta, rtol=0, atol=1e-5)
    curves = evaluate(task(), {"mine": rule}, steps=5, runs=1, progress=False)
    torch.testing.assert_close(curves.losses["mine"][0].float(), torch.tensor(losses), rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("units", "error"),
    [
        (20, TypeError),
        (torch.ones(83, dtype=torch.int64), TypeError),
        (torch.ones(83, dtype=torch.float64), TypeError),
        (torch.ones(1), ValueError),
        (torch.ones(83, 1), ValueError),
        (torch.zeros(83), ValueError),
        (-torch.ones(83), ValueError),
        (torch.full((83,), math.nan), ValueError),
    ],
    ids=str,
)
def test_units_of_somebody_s_problem_are_looked_at(units, error):
    problem = task().sample(0)
    problem.units = units
    with pytest.raises(error, match=r"task 'small': units: expected "):
        Trajectory(problem, RULE)
    Trajectory(problem, PLAIN)  # which does not ask for them


def test_wrapped_problems_have_the_units_of_what_they_wrap():
    inner, n = task().sample(3), task().sample(3).theta0.numel()
    scaled = tasks.Scaled(task(), 2.0).sample(3)
    assert torch.equal(scaled.units, inner.units)
    longer = tasks.WithConvex(task(), 4).sample(3)
    assert torch.equal(longer.units, torch.cat([inner.units, torch.ones(4)]))
    two = batch([task().sample(3), task().sample(4)])
    assert torch.equal(two.units, torch.cat([inner.units, task().sample(4).units]))
    own = task(parts={"first": ["0"], "last": ["2"]})
    three = batch([own.sample(seed) for seed in range(3)])
    first = own.sample(0).parts["first"]
    assert torch.equal(three.units[: 3 * first], torch.cat([own.sample(seed).units[:first] for seed in range(3)]))
    assert two.theta0.numel() == 2 * n
    assert batch([tasks.Quadratic().sample(0), tasks.Quadratic().sample(1)]).units is None


@pytest.mark.parametrize("exact", [False, True])
def test_problems_side_by_side_are_trained_on_as_one_by_one(exact):
    losses, gradients = [], []
    for seed in (0, 1):
        window = Trajectory(task().sample(seed), RULE).window([1.0] * 4, second_derivatives=exact)
        losses.append(window.losses)
        gradients.append(window.gradients)
    together = Trajectory(batch([task().sample(0), task().sample(1)]), RULE).window([1.0] * 4, second_derivatives=exact)
    torch.testing.assert_close(together.losses, torch.stack(losses).mean(0), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(together.gradients, torch.stack(gradients).mean(0), rtol=1e-3, atol=1e-4)


def test_training_a_relative_rule_is_another_run(tmp_path):
    settings = {"horizon": 4, "unroll": 2, "trajectories": 2, "validation_problems": 1}
    for rule in (rule_of(RNNPROP), stepping(rule_of(RNNPROP), relative=True)):
        trainer = MetaTrainer(rule, task(), checkpoint=tmp_path / f"{rule.config.relative}.pt", **settings)
        trainer.fit(1, progress=False)
    with pytest.raises(ValueError, match="is of a run with other settings; rule"):
        MetaTrainer(rule, task(), checkpoint=tmp_path / "False.pt", **settings)


# Ramps


def ramped(steps=6, **options):
    return stepping(rule_of(RNNPROP, output_scale=0.1, **options), relative=True, ramp=steps)


def smooth(dtype=torch.float64):
    random = torch.Generator().manual_seed(0)
    data = torch.randn(40, 6, generator=random).to(dtype), torch.randn(40, 2, generator=random).to(dtype)

    def make():
        return nn.Sequential(nn.Linear(6, 4, dtype=dtype), nn.Tanh(), nn.Linear(4, 2, dtype=dtype))

    return tasks.from_module(make, F.mse_loss, data, batch_size=16, name="smooth").sample(0)


def test_updates_rise_to_their_full_size():
    config = ramped(4).config
    assert [config.share(step) for step in range(1, 7)] == [0.25, 0.5, 0.75, 1, 1, 1]
    assert PLAIN.config.share(1) == 1
    assert RuleConfig.from_description(config.describe()) == config
    for wrong in (-1, 0.5, True, None, 2**25):
        with pytest.raises(ValueError, match="ramp: expected an integer of at least 0"):
            RNNpropRule(ramp=wrong)


def test_updates_fall_after_many_steps():
    config = stepping(PLAIN, ramp=2, decay=4).config
    assert [config.share(step) for step in (1, 2, 4, 5, 8, 40)] == [0.5, 1, 1, 0.8, 0.5, 0.1]
    assert RuleConfig.from_description(config.describe()) == config
    with pytest.raises(ValueError, match="decay: expected at least as many steps as the ramp's 5, got 4"):
        RNNpropRule(ramp=5, decay=4)
    for wrong in (-1, 0.5, True, None, 2**25):
        with pytest.raises(ValueError, match="decay: expected an integer of at least 0"):
            RNNpropRule(decay=wrong)


@pytest.mark.parametrize("steps", [{"ramp": 6}, {"decay": 4}, {"ramp": 3, "decay": 5}], ids=str)
def test_trajectories_rise_and_fall_as_the_optimizer_does(steps):
    problem, rule = task().sample(0), stepping(RULE, **steps)
    theta, _ = trained(problem, rule, 10)
    trajectory = Trajectory(problem, rule)
    for _ in range(10):
        trajectory.advance()
    torch.testing.assert_close(trajectory.theta, theta, rtol=0, atol=1e-4)


def test_exact_gradients_of_windows_know_of_the_ramp():
    rule, problem = stepping(ramped(3, dtype=torch.float64), decay=4), smooth()
    trajectory = Trajectory(problem, rule)
    found = trajectory.window([1.0] * 5, second_derivatives=True).gradients

    def loss():
        walk = Trajectory(problem, rule)
        return torch.stack([walk.advance() for _ in range(5)]).sum()

    places, start = range(0, len(found), 301), torch.nn.utils.parameters_to_vector(rule.weights()).detach()
    for place in places:
        sides = []
        for shift in (1e-5, -1e-5):
            moved = start.clone()
            moved[place] += shift
            torch.nn.utils.vector_to_parameters(moved, rule.weights())
            sides.append(loss())
        torch.nn.utils.vector_to_parameters(start, rule.weights())
        assert ((sides[0] - sides[1]) / 2e-5).item() == pytest.approx(found[place].item(), rel=1e-4, abs=1e-9)


def test_first_order_gradients_of_every_window_know_of_the_ramp():
    """By autograd, with the gradients that the rule is given held as they are."""
    rule = stepping(ramped(dtype=torch.float64), decay=7)
    problem = smooth()
    trajectory = Trajectory(problem, rule)
    theta, state = trajectory.theta.clone(), new_state(rule, trajectory.theta.numel())
    for first in (0, 4):  # in the midst of the ramp, and across its end
        found = trajectory.window([1.0] * 4).gradients
        total, moving = 0.0, theta
        for number in range(first, first + 4):
            _, gradient = value_and_grad(problem, moving.detach(), number)
            change, state = update(rule, gradient, state, backend="reference")
            moving = moving + change * rule.config.share(number + 1) * problem.units
            total = total + problem.loss(moving, number + 1)
        expected = torch.cat([one.reshape(-1) for one in torch.autograd.grad(total, rule.weights())])
        torch.testing.assert_close(found, expected)
        theta, state = moving.detach(), state.detach()


@pytest.mark.parametrize("rule", [RULE, ramped()], ids=["relative", "ramp"])
def test_windows_of_rules_with_a_ramp_or_units_are_not_captured(rule, monkeypatch):
    monkeypatch.setitem(capture.RECORDERS, "cpu", None)
    with pytest.raises(ValueError, match="capture: expected rules without ramp, decay and units of parameters"):
        capture.check(rule, task().sample(0), second_derivatives=False)


@pytest.mark.parametrize("backend", ["native", "reference"])
def test_the_optimizer_s_updates_rise_and_other_parameters_do_not_matter(backend):
    found, full = parameters(), parameters()
    rising, plain = (
        FusedLSTMOptimizer(found, ramped(4), backend=backend),
        FusedLSTMOptimizer(full, RULE, backend=backend),
    )
    for number in range(6):
        before = [[param.detach().clone() for param in params] for params in (found, full)]
        step(rising, found, number)
        step(plain, full, number)
        for mine, its, was, its_was in zip(found, full, *before, strict=True):
            torch.testing.assert_close(mine - was, (its - its_was) * min(1, (number + 1) / 4), rtol=1e-3, atol=1e-6)
    assert [rising.state[param]["step"].item() for param in found] == [6.0] * 4
    assert "step" not in plain.state[full[0]]


@pytest.mark.parametrize("backend", ["native", "reference"])
def test_the_optimizer_s_updates_fall(backend):
    found, full = parameters(), parameters()
    falling, plain = FusedLSTMOptimizer(found, stepping(RULE, decay=2), backend=backend), FusedLSTMOptimizer(full, RULE)
    for number in range(6):
        before = [[param.detach().clone() for param in params] for params in (found, full)]
        step(falling, found, number)
        step(plain, full, number)
        for mine, its, was, its_was in zip(found, full, *before, strict=True):
            torch.testing.assert_close(mine - was, (its - its_was) * min(1, 2 / (number + 1)), rtol=1e-3, atol=1e-6)


def test_every_parameter_has_a_ramp_of_its_own():
    params, alone = parameters(), parameters()[3:]
    optimizer = FusedLSTMOptimizer(params, ramped(4))
    for _ in range(2):
        for param in params[:3]:
            param.grad = torch.ones_like(param)
        optimizer.step()
    lonely = FusedLSTMOptimizer(alone, ramped(4))
    for _ in range(3):
        params[3].grad = torch.ones_like(params[3])
        alone[0].grad = torch.ones_like(alone[0])
        optimizer.step()
        lonely.step()
    assert torch.equal(alone[0], params[3])
    assert [optimizer.state[param]["step"].item() for param in params] == [5.0, 5.0, 5.0, 3.0]


@pytest.mark.parametrize("capturable", [False, True])
def test_steps_that_are_skipped_are_not_counted(capturable):
    params = parameters()
    optimizer = FusedLSTMOptimizer(params, ramped(4), nonfinite="skip", capturable=capturable)
    step(optimizer, params, 0)
    before = [param.detach().clone() for param in params]
    params[1].grad[0, 0] = math.nan
    optimizer.step()
    assert all(map(torch.equal, before, params))
    assert optimizer.skipped_steps == 1
    assert [optimizer.state[param]["step"].item() for param in params] == [1.0] * 4
    step(optimizer, params, 1)
    assert [optimizer.state[param]["step"].item() for param in params] == [2.0] * 4


def test_a_loaded_ramp_goes_on_to_the_bit():
    params, twins = parameters(), parameters()
    optimizer, resumed = FusedLSTMOptimizer(params, ramped(5)), FusedLSTMOptimizer(twins, ramped(5))
    for number in range(2):
        step(optimizer, params, number)
    for param, twin in zip(params, twins, strict=True):
        twin.data.copy_(param)
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    copied = copy.deepcopy(optimizer)
    for number in range(2, 6):
        for one in (optimizer, resumed, copied):
            step(one, one.param_groups[0]["params"], number)
    assert all(map(torch.equal, params, twins))
    assert all(map(torch.equal, params, copied.param_groups[0]["params"]))
    saved = optimizer.state_dict()
    del saved["state"][2]["step"]
    with pytest.raises(
        ValueError, match="state of parameter 2: expected its steps, a whole number >= 0 as a 0-d tensor"
    ):
        resumed.load_state_dict(saved)


@pytest.mark.parametrize("rule", [RULE, ramped(4), stepping(RULE, decay=2)], ids=["relative", "ramp", "decay"])
def test_torch_compile_takes_such_steps(rule):
    results = []
    for compiled in (False, True):
        params = parameters()
        optimizer = FusedLSTMOptimizer(params, rule, nonfinite="propagate", capturable=True)
        for param in params:
            param.grad = torch.full_like(param, 0.3)
        torch.compiler.reset()
        call = torch.compile(lambda o=optimizer: o.step(), fullgraph=True, backend="aot_eager") if compiled else None
        for _ in range(6):
            call() if call else optimizer.step()
        results.append([param.detach() for param in params])
        if rule.config.counts_steps:
            assert optimizer.state[params[0]]["step"].item() == 6
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other)


# What somebody may do in mid-run


@pytest.mark.parametrize("rule", [RULE, ramped(4)], ids=["relative", "ramp"])
@pytest.mark.parametrize("apart", [False, True])
def test_a_rule_that_wants_what_is_not_kept_is_refused_before_anything_is_changed(rule, apart):
    params = parameters()
    groups = [{"params": params[:2], "rule": PLAIN}, {"params": params[2:], "rule": PLAIN}]
    optimizer = FusedLSTMOptimizer(groups)
    step(optimizer, params, 0)
    if apart:
        optimizer = copy.deepcopy(optimizer)
        params = [param for group in optimizer.param_groups for param in group["params"]]
    optimizer.param_groups[1]["rule"] = rule
    before = [param.detach().clone() for param in params]
    with pytest.raises(RuntimeError, match="rule: expected one that makes updates into steps as the one before it did"):
        step(optimizer, params, 1)
    assert all(map(torch.equal, before, params))


def test_a_rule_that_wants_less_than_is_kept_takes_its_own_steps():
    params = parameters()
    optimizer = FusedLSTMOptimizer(params, ramped(4))
    step(optimizer, params, 0)
    copied = copy.deepcopy(optimizer)
    for one in (optimizer, copied):
        for rule in (stepping(ramped(4), relative=False), stepping(ramped(4), relative=False, ramp=0)):
            one.param_groups[0]["rule"] = rule
            step(one, one.param_groups[0]["params"], 1)
    assert all(map(torch.equal, params, copied.param_groups[0]["params"]))


@pytest.mark.parametrize("name", ["step", "unit"])
def test_what_somebody_puts_among_the_states_counts(name):
    params = parameters()
    optimizer = FusedLSTMOptimizer(params, ramped(4))
    for number in range(5):
        step(optimizer, params, number)
    for param in params:
        optimizer.state[param][name] = torch.tensor(0.25)
    copied = copy.deepcopy(optimizer)
    step(optimizer, params, 5)
    step(copied, copied.param_groups[0]["params"], 5)
    assert all(map(torch.equal, params, copied.param_groups[0]["params"]))
    assert optimizer.state[params[0]][name].item() == 0.25 + (name == "step")


def test_a_first_step_in_inference_mode_is_like_any_other():
    params, others = parameters(), parameters()
    optimizer, plain = FusedLSTMOptimizer(params, ramped(4)), FusedLSTMOptimizer(others, ramped(4))
    for number in range(3):
        step(plain, others, number)
        with torch.inference_mode(number == 0):
            step(optimizer, params, number)
    assert all(map(torch.equal, params, others))


def test_a_number_that_is_not_finite_does_not_spoil_its_tensor():
    param = torch.full((4, 25), 0.2).requires_grad_()
    param.data[0, 0] = math.nan
    optimizer = FusedLSTMOptimizer([param], RULE)
    step(optimizer, [param], 0)
    assert param.isnan().sum() == 1
    assert optimizer.state[param]["unit"].item() == 1
    optimizer.load_state_dict(optimizer.state_dict())


def test_entries_of_one_s_own_are_kept_by_rules_that_have_none_of_that_name():
    params = parameters()
    optimizer = FusedLSTMOptimizer(params, PLAIN)
    step(optimizer, params, 0)
    for param in params:
        optimizer.state[param] |= {"step": torch.tensor(5.0), "unit": "kg", "mine": 3}
    other = FusedLSTMOptimizer(twins := parameters(), PLAIN)
    other.load_state_dict(optimizer.state_dict())
    assert {"step", "unit", "mine"} <= other.state[twins[0]].keys()


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("unit", torch.tensor(1e300, dtype=torch.float64)),
        ("unit", torch.tensor(1e-60, dtype=torch.float64)),
        ("unit", torch.tensor(1.0).to_sparse()),
        ("unit", torch.tensor(1.0, device="meta")),
        ("step", torch.tensor(-0.5)),
        ("step", torch.tensor(math.inf)),
    ],
    ids=str,
)
def test_hostile_numbers_are_refused(name, value):
    params = parameters()
    optimizer = FusedLSTMOptimizer(params, ramped(4))
    step(optimizer, params, 0)
    saved = copy.deepcopy(optimizer.state_dict())
    saved["state"][1][name] = value
    with pytest.raises(ValueError, match=f"state of parameter 1: expected its {name}"):
        optimizer.load_state_dict(saved)


def test_a_rule_that_steps_otherwise_is_the_same_in_all_else():
    class Mine(LSTMRule):
        pass

    rule = Mine(seed=3)
    rule.weight_out.requires_grad_(False)
    made = stepping(rule, ramp=5)
    assert type(made) is Mine
    assert not made.weight_out.requires_grad
    assert made.weight_out is not rule.weight_out
    assert (made.config.ramp, rule.config.ramp) == (5, 0)
    with pytest.raises(TypeError, match="rule: expected an update rule, got dict"):
        stepping({"conv": rule}, ramp=5)
