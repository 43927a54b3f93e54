"""Rules whose coordinates talk: means over coordinates are those of the reference, forward and back, wherever they run.

The truth is `reference.coupled_step` in float64, one function at a time.
"""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from helpers import errors, random_gradients, random_rows, randomized, tiles
from torch._subclasses.fake_tensor import FakeTensorMode

from fastl2l import (
    FusedLSTMOptimizer,
    GACRule,
    LSTMRule,
    MetaTrainer,
    NTMRule,
    Rule,
    Trajectory,
    evaluate,
    load_rule,
    reference,
    save_rule,
)
from fastl2l.inside import look
from fastl2l.meta import capture
from fastl2l.ops import coupled, update
from fastl2l.ops.coordinates import Coordinates
from fastl2l.ops.dispatch import select
from fastl2l.ops.layout import TILE, layers_apart, new_state, state_shape, to_rows
from fastl2l.rule_config import RuleConfig
from fastl2l.tasks import Problem, Quadratic, batch
from fastl2l.trajectory import Objective, step_weights

F64 = torch.float64
AVERAGES = [(2, 2), (0, 3), (3, 0), (5, 5)]
BACKENDS = ["native", "reference"]


def gac(averages=(2, 2), preprocess="log_sign", *, hidden=5, dtype=F64, seed=0, **options) -> GACRule:
    """A rule none of whose weights is zero."""
    options = {"output_scale": 0.3, "scale": 0.7, "num_layers": len(averages)} | options
    rule = GACRule(preprocess, averages=averages, hidden_size=hidden, seed=seed, dtype=dtype, **options)
    randomized(rule)
    return rule


def truth(rule, gradient, rows, scale=None):
    scale = rule.config.output_scale if scale is None else scale
    return reference.coupled_step(gradient, rows, rule.weights(), rule.config, scale)


def state_of(rule: Rule, rows: torch.Tensor) -> torch.Tensor:
    """The state with these rows, and NaN in lanes that are no coordinate's."""
    return layers_apart(tiles(rows, rule.dtype).unflatten(1, state_shape(rule, 1)[1:-1]))


def random_state(rule, n, seed=0):
    """Rows as after some steps, with means where there are means."""
    rows = random_rows(rule, n, seed).to(rule.dtype)
    for layer, count in enumerate(rule.config.averages):
        h = rows[2 * layer * rule.config.hidden_size :][:count]
        h.copy_(h.mean(1, keepdim=True).expand(-1, n))
    return rows


# A step


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("preprocess", ["raw", "log_sign"])
@pytest.mark.parametrize("averages", [*AVERAGES, (4,), (1, 2, 3)])
@pytest.mark.parametrize("n", [1, 16, 37])
def test_a_step_is_the_references(averages, preprocess, n, backend):
    rule = gac(averages, preprocess)
    gradient, rows = random_gradients(n, preprocess=preprocess).double(), random_state(rule, n)
    state = state_of(rule, rows)
    found = coupled.step(rule, gradient, state, backend=backend)
    in_place = coupled.step_(rule, gradient, state, Coordinates((n,)), 0.3, select(backend, "cpu"))
    change, after = truth(rule, gradient, rows)
    for one, new in (found, (in_place, state)):
        torch.testing.assert_close(one, change, rtol=1e-13, atol=1e-13)
        torch.testing.assert_close(to_rows(new, n), after, rtol=1e-13, atol=1e-13)


def test_averaged_units_are_means_and_the_others_are_not():
    rule = gac((2, 1))
    gradient = random_gradients(37).double()
    _, state = coupled.step(rule, gradient, new_state(rule, 37))
    h1, _, h2, _ = to_rows(state, 37).split(5)
    for h, count in ((h1, 2), (h2, 1)):
        assert (h[:count] == h[:count, :1]).all()
        assert (h[count:].std(1) > 1e-3).all()


def test_without_averaged_units_it_is_the_lstm_rule():
    plain = LSTMRule("log_sign", hidden_size=5, dtype=F64)
    rule = gac((0, 1))
    rule.load_weights(dict(plain.named_parameters()))
    rule.config = copy.copy(rule.config)
    object.__setattr__(rule.config, "averages", (0, 0))
    gradient = random_gradients(37).double()
    change, state = coupled.step(rule, gradient, new_state(rule, 37))
    expected, after = update(plain, gradient, new_state(plain, 37))
    torch.testing.assert_close(change * 0.1 / 0.3, expected, rtol=1e-13, atol=1e-13)
    torch.testing.assert_close(state.flatten(1, 2), after, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("dtype", [torch.float32])
def test_float32_is_as_accurate_as_the_reference_in_float32(dtype, isa):
    rule, n = gac((5, 5), hidden=20), 1000
    gradients = random_gradients(8, n)
    exact, plain, mine = [], [], []
    states = [torch.zeros(80, n, dtype=F64), torch.zeros(80, n), new_state(rule.float(), n)]
    wide = gac((5, 5), hidden=20)
    with torch.no_grad():
        for gradient in gradients:
            change, states[0] = truth(wide, gradient.double(), states[0])
            exact.append(change)
            change, states[1] = truth(rule, gradient, states[1])
            plain.append(change)
            mine.append(coupled.step_(rule, gradient, states[2], Coordinates((n,)), 0.3, select("native", "cpu")))
    limit, found = (errors(torch.stack(some), torch.stack(exact)) for some in (plain, mine))
    assert found["largest"] <= 2 * limit["largest"]


# Functions side by side


def in_blocks(parts, functions):
    """[N]: the number of the function that each coordinate belongs to."""
    return torch.cat([torch.arange(functions).repeat_interleave(part // functions) for part in parts])


@pytest.mark.parametrize(("parts", "functions"), [((36,), 3), ((36, 9), 3), ((16, 48, 8), 2)])
def test_functions_side_by_side_take_the_step_that_each_takes_alone(parts, functions):
    rule, n = gac((2, 3)), sum(parts)
    owner, gradient, rows = in_blocks(parts, functions), random_gradients(n).double(), random_rows(gac(), n).double()
    where = Coordinates((n,), parts, functions)
    changed = state_of(rule, rows)
    in_place = coupled.step_(rule, gradient, changed, where, 0.3, select("native", "cpu"))
    for change, state in (coupled.step(rule, gradient, state_of(rule, rows), where), (in_place, changed)):
        for function in range(functions):
            mine = owner == function
            expected, after = truth(rule, gradient[mine], rows[:, mine])
            torch.testing.assert_close(change[mine], expected, rtol=1e-13, atol=1e-13)
            torch.testing.assert_close(to_rows(state, n)[:, mine], after, rtol=1e-13, atol=1e-13)


def test_coordinates_go_to_functions_and_back():
    where = Coordinates((20,), (12, 8), 4)
    rows = torch.arange(40.0).view(2, 20)
    functions = where.by_function(rows)
    assert functions.shape == (2, 4, 5)
    assert functions[0, 1].tolist() == [3, 4, 5, 14, 15]
    assert torch.equal(where.flat(functions), rows)
    with pytest.raises(ValueError, match="expected 3 functions with as many coordinates each, got parts of 12, 8"):
        Coordinates((20,), (12, 8), 3)


@pytest.mark.parametrize("tensors", [(5,), (5, 16, 3), (16, 32, 7), (1, 1, 1)])
def test_coordinates_of_several_tensors_lie_in_tiles_of_their_own(tensors):
    where = Coordinates(tensors)
    rows = torch.randn(2, where.numel)
    there = where.tiles(rows)
    apart = torch.cat([tiles(piece, poison=0.0) for piece in rows.split(tensors, 1)])
    assert torch.equal(there, apart)
    poisoned = torch.cat([tiles(piece) for piece in rows.split(tensors, 1)])
    assert torch.equal(where.rows(poisoned), rows)
    torch.testing.assert_close(where.means(poisoned)[:, 0, 0], rows.mean(1))


# The way back


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("averages", AVERAGES)
def test_gradients_are_those_of_the_reference(averages, backend):
    rule, n = gac(averages), 37
    gradients = random_gradients(3, n).double().requires_grad_()
    rows = random_rows(rule, n).double().requires_grad_()
    weigh = torch.randn(n, dtype=F64), torch.randn(rows.shape, dtype=F64)

    def objective(step, state, to_rows):
        total = 0
        for gradient in gradients:
            change, state = step(gradient, state)
            total = total + (change.sin() * weigh[0]).sum()
        return total + (to_rows(state) * weigh[1]).sum()

    leaves = [gradients, rows, *rule.weights()]
    first = differentiable_state(rule, rows)
    mine = objective(lambda g, s: coupled.step(rule, g, s, backend=backend), first, lambda s: to_rows(s, n))
    expected = objective(lambda g, s: truth(rule, g, s), rows, lambda s: s)
    torch.testing.assert_close(mine, expected, rtol=1e-13, atol=1e-13)
    for found, right in zip(torch.autograd.grad(mine, leaves), torch.autograd.grad(expected, leaves), strict=True):
        assert errors(found, right)["largest"] < 1e-12


def differentiable_state(rule, rows):
    padded = torch.nn.functional.pad(rows, (0, -rows.shape[1] % TILE))
    flat = padded.reshape(len(rows), -1, TILE).permute(1, 0, 2)
    return layers_apart(flat.unflatten(1, state_shape(rule, 1)[1:-1]))


def small_step(rule):
    """Two steps as a function of gradient, state and weights."""

    def step(gradient, rows, *weights):
        state, total = differentiable_state(rule, rows), 0
        for _ in range(2):
            change, state = coupled.step(rule, gradient, state, Coordinates((4,), (4,), 2))
            total = total + change
        return total, to_rows(state, 4)

    rows = random_rows(rule, 4).double().requires_grad_()
    gradient = torch.tensor([0.7, -2e-3, 2e-5, -0.4], dtype=F64, requires_grad=True)
    return step, (gradient, rows, *rule.weights())


def test_gradients_are_those_of_differences():
    step, inputs = small_step(gac((1, 2), hidden=3))
    assert torch.autograd.gradcheck(step, inputs, eps=1e-7, atol=1e-5, rtol=1e-4)


def test_second_derivatives_are_those_of_differences():
    step, inputs = small_step(gac((1, 1), "raw", hidden=2))
    assert torch.autograd.gradgradcheck(step, inputs, atol=1e-5, rtol=1e-3, fast_mode=True)


# Trajectories


class Bowl(Problem):
    """Some functions that are not convex, others at every step, in parts."""

    task, uneven = "bowl", False

    def __init__(self, parts=(36,), functions=3):
        generator = torch.Generator().manual_seed(0)
        n = sum(parts)
        self.theta0 = torch.randn(n, generator=generator, dtype=F64)
        self.scale = torch.rand(64, n, generator=generator, dtype=F64) + 0.5
        self.functions = functions
        self.parts = {str(number): part for number, part in enumerate(parts)} if len(parts) > 1 else None
        self.owner = in_blocks(parts, functions)

    def loss(self, theta, step):
        each = (theta * self.scale[step]).sin() + 0.2 * theta.square()
        sums = torch.zeros(self.functions, dtype=F64).index_add(0, self.owner, each)
        return (sums + 0.02 * sums.square()).sum()


def by_autograd(problem, rule, window_weights, second=False):
    """Losses, meta-gradient and last theta of a window, function by function through the reference."""
    theta = problem.theta0.clone().requires_grad_(second)
    owners = [problem.owner == function for function in range(problem.functions)]
    rows = [torch.zeros(rule.config.state_rows, int(mine.sum()), dtype=F64) for mine in owners]
    objective, losses = 0, []
    for step, weight in enumerate(window_weights):
        now = theta if second else theta.detach().requires_grad_()
        (gradient,) = torch.autograd.grad(problem.loss(now, step), now, create_graph=second)
        change = torch.zeros_like(theta)
        for function, mine in enumerate(owners):
            own, rows[function] = truth(rule, gradient[mine], rows[function])
            change = change.index_put((mine.nonzero()[:, 0],), own)
        theta = theta + rule.config.share(step + 1) * change
        loss = problem.loss(theta, step + 1) / problem.functions
        losses.append(loss.detach())
        objective = objective + weight * loss
    found = torch.autograd.grad(objective, rule.weights(), materialize_grads=True)
    return torch.stack(losses), torch.cat([gradient.flatten() for gradient in found]), theta.detach()


@pytest.mark.parametrize("second", [False, True])
@pytest.mark.parametrize("averages", AVERAGES)
@pytest.mark.parametrize("parts", [(36,), (36, 9)])
def test_a_window_has_the_gradient_that_autograd_gives(averages, second, parts):
    rule, problem = gac(averages), Bowl(parts)
    weights = [0.0, 2.0, 0.5, 1.0, 3.0, 0.25]
    trajectory = Trajectory(problem, rule)
    found = trajectory.window(weights, second_derivatives=second)
    losses, gradients, theta = by_autograd(problem, rule, weights, second)
    torch.testing.assert_close(found.losses, losses, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(trajectory.theta, theta, rtol=1e-12, atol=1e-12)
    assert errors(found.gradients, gradients)["largest"] < 1e-11


def test_a_window_of_a_rule_with_a_ramp_has_the_gradient_that_autograd_gives():
    rule, problem = gac((2, 2), ramp=4, decay=5), Bowl()
    found = Trajectory(problem, rule).window([1.0] * 6)
    losses, gradients, _ = by_autograd(problem, rule, [1.0] * 6)
    torch.testing.assert_close(found.losses, losses, rtol=1e-12, atol=1e-12)
    assert errors(found.gradients, gradients)["largest"] < 1e-11


@pytest.mark.parametrize("second", [False, True])
def test_windows_go_on_where_the_last_one_ended(second):
    rule, problem = gac(), Bowl()
    one, two = Trajectory(problem, rule), Trajectory(problem, rule)
    losses = torch.stack([one.advance() for _ in range(6)])
    found = torch.cat([two.window([1.0] * 3, second_derivatives=second).losses for _ in range(2)])
    torch.testing.assert_close(found, losses, rtol=1e-13, atol=1e-13)
    mine, theirs = (to_rows(trajectory.state, problem.theta0.numel()) for trajectory in (one, two))
    torch.testing.assert_close(mine, theirs, rtol=1e-13, atol=1e-13)
    two.restart()
    assert torch.equal(torch.stack([two.advance() for _ in range(6)]), losses)


def test_frozen_weights_have_no_gradient():
    rule = gac()
    rule.weight_out.requires_grad_(False)
    found = Trajectory(Bowl(), rule).window([1.0] * 4)
    sizes = [weight.numel() for weight in rule.weights()]
    for (name, weight), part in zip(rule.named_parameters(), found.gradients.split(sizes), strict=True):
        assert part.any() == weight.requires_grad, name


def test_a_batch_is_its_problems_one_by_one():
    rule, task = gac((2, 2), "raw"), Quadratic(dim=5, batch=1, dtype=F64)
    problems = [task.sample(seed) for seed in range(4)]
    windows = [Trajectory(problem, rule).window([1.0] * 5) for problem in problems]
    together = Trajectory(batch(problems), rule).window([1.0] * 5)
    torch.testing.assert_close(together.losses, torch.stack([one.losses for one in windows]).mean(0))
    expected = torch.stack([one.gradients for one in windows]).mean(0)
    assert errors(together.gradients, expected)["largest"] < 1e-11


def test_each_function_of_a_task_with_many_has_its_own_means(monkeypatch):
    """The quadratic task has 128 functions in a problem, which are not one of 1,280 coordinates."""
    rule, task = gac((2, 2), "raw"), Quadratic(dim=4, batch=3, dtype=F64)
    problem = task.sample(0)
    losses = []
    for function in range(3):
        w, y = problem.w[function : function + 1], problem.y[function : function + 1]
        alone = type(problem)(w, y, problem.theta0.view(3, 4)[function].clone())
        trajectory = Trajectory(alone, rule)
        losses.append(torch.stack([trajectory.loss, *(trajectory.advance() for _ in range(6))]))
    monkeypatch.setattr(Quadratic, "sample", lambda self, seed: problem)
    found = evaluate(task, {"gac": rule}, steps=6, runs=1).losses["gac"][0]
    torch.testing.assert_close(found, torch.stack(losses).mean(0), rtol=1e-12, atol=1e-12)


def test_problems_of_different_sizes_in_a_batch_are_refused_before_anything_is_allocated(monkeypatch):
    problems = [Quadratic(dim=dim, batch=1, dtype=F64).sample(0) for dim in (3, 5)]
    monkeypatch.setattr("fastl2l.tracks.new_state", lambda *_: pytest.fail("allocated"))
    with pytest.raises(ValueError, match="task 'quadratic': expected 2 functions with as many coordinates each"):
        Trajectory(batch(problems), gac())


def test_the_trainer_lowers_the_loss_and_goes_on_to_the_same_bits(tmp_path):
    task = Quadratic(dim=4, batch=4)

    def trainer(checkpoint=None):
        rule = gac((2, 2), "raw", hidden=8, dtype=torch.float32, output_scale=0.1)
        options = {"horizon": 10, "unroll": 5, "trajectories": 8, "batch": 4, "validation_problems": 4}
        return MetaTrainer(rule, task, meta_lr=1e-2, checkpoint=checkpoint, **options)

    whole = trainer()
    history = whole.fit(4, progress=False)
    assert history[-1].validation_loss < 0.7 * history[0].validation_loss
    trainer(tmp_path / "c.pt").fit(2, progress=False)
    again = trainer(tmp_path / "c.pt")
    again.fit(4, progress=False)
    assert again.history == history
    assert again.rule.fingerprint() == whole.rule.fingerprint()


def test_rules_by_part_average_over_their_part_alone():
    problem = Bowl((36, 9))
    rules = {"0": gac(seed=1), "1": gac(seed=2)}
    trajectory = Trajectory(problem, rules)
    gradient = trajectory.gradient.clone()
    before = trajectory.theta.clone()
    trajectory.advance()
    for name, part in (("0", slice(0, 36)), ("1", slice(36, 45))):
        for function in range(3):
            mine = problem.owner[part] == function
            expected, _ = truth(rules[name], gradient[part][mine], torch.zeros(20, int(mine.sum()), dtype=F64))
            torch.testing.assert_close((trajectory.theta - before)[part][mine], expected)


# In an optimizer


def optimizer_of(rule, *shapes, dtype=F64, **options):
    generator = torch.Generator().manual_seed(1)
    params = [torch.randn(shape, generator=generator, dtype=F64).to(dtype).requires_grad_() for shape in shapes]
    return params, FusedLSTMOptimizer(params, rule, **options)


def give(params, seed, scale=1.0):
    generator = torch.Generator().manual_seed(seed)
    for param in params:
        param.grad = (torch.randn(param.shape, generator=generator, dtype=F64) * scale).to(param.dtype)


SHAPES = [(3, 7), (16,), (), (2, 5)]


def loaded(params, optimizer, rule, path):
    """Parameters and an optimizer of a file that these were saved in."""
    torch.save({"params": params, "optimizer": optimizer.state_dict()}, path)
    saved = torch.load(path, weights_only=True)
    others = [param.detach().requires_grad_() for param in saved["params"]]
    other = FusedLSTMOptimizer(others, rule)
    other.load_state_dict(saved["optimizer"])
    return others, other


def go_on_alike(one, other, seeds):
    """Two pairs of parameters and their optimizer, to the bit."""
    for seed in seeds:
        for params, optimizer in (one, other):
            give(params, seed)
            optimizer.step()
    for param, same in zip(one[0], other[0], strict=True):
        assert torch.equal(param, same)


@pytest.mark.parametrize("backend", BACKENDS)
def test_an_optimizer_averages_over_all_parameters_of_a_group(backend):
    rule = gac((2, 3))
    params, optimizer = optimizer_of(rule, *SHAPES, backend=backend, lr=0.5, weight_decay=0.01)
    theta = torch.cat([param.detach().reshape(-1) for param in params])
    rows = torch.zeros(20, theta.numel(), dtype=F64)
    for seed in range(4):
        give(params, seed)
        gradient = torch.cat([param.grad.reshape(-1) for param in params])
        change, rows = truth(rule, gradient, rows)
        theta = (1 - 0.005) * theta + 0.5 * change
        optimizer.step()
        found = torch.cat([param.detach().reshape(-1) for param in params])
        torch.testing.assert_close(found, theta, rtol=1e-12, atol=1e-12)


def test_groups_average_by_themselves():
    rules = [gac(seed=1), gac(seed=2)]
    together, alone = ([torch.randn(5, 3, dtype=F64, generator=torch.Generator().manual_seed(n)).requires_grad_()
                        for n in range(2)] for _ in range(2))  # fmt: skip
    one = FusedLSTMOptimizer([{"params": [param], "rule": rule} for param, rule in zip(together, rules, strict=True)])
    others = [FusedLSTMOptimizer([param], rule) for param, rule in zip(alone, rules, strict=True)]
    for seed in range(3):
        give(together, seed)
        give(alone, seed)
        one.step()
        for other in others:
            other.step()
    for param, same in zip(together, alone, strict=True):
        assert torch.equal(param, same)


@pytest.mark.parametrize("options", [{}, {"relative": True}, {"ramp": 3, "decay": 4}])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_saved_state_goes_on_to_the_same_bits(options, dtype, tmp_path):
    rule = gac(dtype=torch.float32, **options)
    params, optimizer = optimizer_of(rule, *SHAPES, dtype=dtype)
    for seed in range(3):
        give(params, seed)
        optimizer.step()
    others, other = loaded(params, optimizer, rule, tmp_path / "saved.pt")
    go_on_alike((params, optimizer), (others, other), range(3, 6))


def test_parameters_without_a_gradient_are_left_alone_and_out_of_the_means():
    rule = gac()
    params, optimizer = optimizer_of(rule, *SHAPES)
    give(params, 0)
    optimizer.step()
    give(params, 1)
    params[1].grad = None
    before = params[1].detach().clone()
    others = [params[i] for i in (0, 2, 3)]
    rows = torch.cat([to_rows(optimizer.state[param]["lstm_state"], param.numel()) for param in others], 1)
    theta = torch.cat([param.detach().reshape(-1) for param in others])
    change, after = truth(rule, torch.cat([param.grad.reshape(-1) for param in others]), rows)
    optimizer.step()
    assert torch.equal(params[1], before)
    torch.testing.assert_close(torch.cat([param.detach().reshape(-1) for param in others]), theta + change)
    found = torch.cat([to_rows(optimizer.state[param]["lstm_state"], param.numel()) for param in others], 1)
    torch.testing.assert_close(found, after)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_parameters_of_half_precision_are_rounded_once(dtype):
    rule = gac(dtype=torch.float32)
    params, optimizer = optimizer_of(rule, (37,), dtype=dtype)
    give(params, 0)
    expected, _ = truth(rule, params[0].grad.float(), torch.zeros(20, 37))
    expected = (params[0].detach().float() + expected.detach()).to(dtype)
    optimizer.step()
    assert (params[0] == expected).float().mean() > 0.9  # the last bit before rounding differs here and there
    torch.testing.assert_close(params[0].detach(), expected, rtol=1e-2, atol=1e-3)


@pytest.mark.parametrize("shapes", [((3, 7), (0,), (5,)), ((0,), (2, 0))])
def test_parameters_may_be_empty(shapes):
    rule = gac()
    params, optimizer = optimizer_of(rule, *shapes)
    give(params, 0)
    n = sum(param.numel() for param in params)
    theta = torch.cat([param.detach().reshape(-1) for param in params])
    change, _ = truth(rule, torch.cat([param.grad.reshape(-1) for param in params]), torch.zeros(20, n, dtype=F64))
    optimizer.step()
    torch.testing.assert_close(torch.cat([param.detach().reshape(-1) for param in params]), theta + change)


def test_a_trajectory_says_where_a_coordinate_is():
    rule, problem = gac(), Bowl()
    trajectory = Trajectory(problem, rule)
    trajectory.advance()
    its, state = trajectory.at(17)
    assert its is rule
    assert torch.equal(state, to_rows(trajectory.state, 36)[:, 17])


def test_strides_make_no_difference():
    rule = gac()
    (param,), optimizer = optimizer_of(rule, (5, 7))
    other = param.detach().t().contiguous().t().requires_grad_()
    another = FusedLSTMOptimizer([other], rule)
    for seed in range(3):
        give([param, other], seed)
        other.grad = param.grad.t().contiguous().t()
        optimizer.step()
        another.step()
    assert torch.equal(param, other)


@pytest.mark.parametrize("nonfinite", ["raise", "skip"])
def test_a_gradient_that_is_not_finite_changes_nothing(nonfinite):
    params, optimizer = optimizer_of(gac(), *SHAPES, nonfinite=nonfinite)
    give(params, 0)
    optimizer.step()
    before = [copy.deepcopy(optimizer.state_dict()["state"]), [param.detach().clone() for param in params]]
    give(params, 1)
    params[2].grad.fill_(float("nan"))
    if nonfinite == "raise":
        with pytest.raises(FloatingPointError, match="expected finite numbers"):
            optimizer.step()
    else:
        optimizer.step()
        assert optimizer.skipped_steps == 1
    after = [optimizer.state_dict()["state"], [param.detach() for param in params]]
    torch.testing.assert_close(after, before, rtol=0, atol=0)


def test_rows_that_stay_keep_their_state():
    rule = gac()
    (param,), optimizer = optimizer_of(rule, (6, 3))
    for seed in range(2):
        give([param], seed)
        optimizer.step()
    rows = to_rows(optimizer.state[param]["lstm_state"], 18).unflatten(1, (6, 3))[:, 2:].flatten(1)
    fewer = param.detach()[2:].clone().requires_grad_()
    optimizer.replace_parameter(param, fewer, range(2, 6))
    give([fewer], 5)
    expected, after = truth(rule, fewer.grad.reshape(-1), rows)
    theta = fewer.detach().reshape(-1) + expected
    optimizer.step()
    torch.testing.assert_close(fewer.detach().reshape(-1), theta)
    torch.testing.assert_close(to_rows(optimizer.state[fewer]["lstm_state"], 12), after)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"capturable": True, "nonfinite": "skip"}, "capturable: expected False with a rule whose coordinates talk"),
        ({"state_dtype": torch.bfloat16}, "state_dtype: expected None for a rule whose coordinates talk"),
    ],
)
def test_options_that_it_does_not_take_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        FusedLSTMOptimizer([torch.zeros(3, requires_grad=True)], gac(dtype=torch.float32), **options)


def test_averaged_units_may_be_other_ones_later():
    """Which a layer's state does not depend on; a memory, it does: see test_memory.py."""
    params, optimizer = optimizer_of(gac((2, 2)), *SHAPES)
    give(params, 0)
    optimizer.step()
    optimizer.param_groups[0]["rule"] = gac((0, 3))
    give(params, 1)
    optimizer.step()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("first", ["step", "load_state_dict"])
def test_what_is_made_in_inference_mode_is_of_use_outside(backend, first):
    rule = gac(dtype=torch.float32)
    (params, optimizer), (others, other) = (optimizer_of(rule, *SHAPES, dtype=torch.float32) for _ in range(2))
    for seed in range(2):
        give(params, seed)
        give(others, seed)
        optimizer.step()
        with torch.inference_mode((first == "step") and seed == 0):
            other.step()
    with torch.inference_mode(first == "load_state_dict"):
        other.load_state_dict(other.state_dict())
    go_on_alike((params, optimizer), (others, other), range(2, 4))


# What it is made of


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"averages": np.array([1, 2])}, r"averages: expected an integer, or one of each layer, got array"),
        ({"averages": b"\x01\x02"}, "averages: expected an integer, or one of each layer, got b'"),
        ({"averages": 21}, "averages: expected an integer of at least 0 and at most 20, got 21"),
        ({"averages": (1, 21)}, "averages: expected an integer of at least 0 and at most 20, got 21"),
        ({"averages": -1}, "averages: expected an integer of at least 0 and at most 20, got -1"),
        ({"averages": (1, 2, 3)}, r"averages: expected a number for each of 2 layers, got \(1, 2, 3\)"),
        ({"averages": 0}, "averages: expected at least one averaged unit in some layer, got 0"),
        ({"averages": (0, 0)}, "averages: expected at least one averaged unit in some layer"),
        ({"averages": 2.5}, "averages: expected an integer"),
    ],
)
def test_bad_arguments_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        GACRule(**arguments)


@pytest.mark.parametrize("text", ["adam:0.9,0.9,1e-08 lstm:5 linear", "raw:1 elu:3 lstm:5 linear", "raw:1 lstm:5 tanh"])
def test_only_an_lstm_rule_has_averaged_units(text):
    config = RuleConfig.parse(text)
    with pytest.raises(ValueError, match="averages: expected parts such as log_sign, lstm and linear .* got " + text):
        RuleConfig(config.features, config.layers, config.projection, config.output, averages=(1,))


def test_what_goes_coordinate_by_coordinate_refuses_it():
    rule = gac()
    with pytest.raises(ValueError, match="rule: expected one that goes coordinate by coordinate"):
        update(rule, torch.zeros(3, dtype=F64), new_state(rule, 3))


def test_captured_windows_and_looks_inside_refuse_it(monkeypatch):
    task = Quadratic(dim=4, batch=2)
    rule = gac(dtype=torch.float32)
    with pytest.raises(ValueError, match="rule: expected one that goes coordinate by coordinate, to look at some"):
        look(rule, task, steps=3)
    monkeypatch.setitem(capture.RECORDERS, "cpu", lambda work, device: work)
    with pytest.raises(ValueError, match="capture: expected rules that go coordinate by coordinate, got GACRule"):
        MetaTrainer(rule, task, capture=True, trajectories=2)


def test_a_group_of_processes_with_parameters_of_their_own_is_refused():
    rule, param = gac(), torch.zeros(3, requires_grad=True, dtype=F64)
    optimizer = FusedLSTMOptimizer([param], LSTMRule(dtype=F64), group=object())
    with pytest.raises(ValueError, match="group: expected none with a rule whose coordinates talk"):
        optimizer.add_param_group({"params": [torch.zeros(3, requires_grad=True, dtype=F64)], "rule": rule})


def test_a_file_keeps_it(tmp_path):
    rule = gac((2, 3), dtype=torch.float32)
    loaded = load_rule(save_rule(rule, tmp_path / "rule.safetensors"))
    assert isinstance(loaded, GACRule)
    assert loaded.describe() == rule.describe()
    assert loaded.config == rule.config


def test_it_says_what_it_is():
    rule = GACRule(averages=(3, 5))
    assert repr(rule) == "GACRule('log_sign:10 lstm:20,20 linear', output_scale=0.1, averages=(3, 5))"
    assert rule.describe()["config"]["averages"] == [3, 5]
    assert sum(weight.numel() for weight in rule.parameters()) == 5141
    assert [config.text for config in rule.config.chain] == ["log_sign:10 lstm:20 none", "given:20 lstm:20 linear"]


def test_an_objective_of_logs_is_taken_back_too():
    rule, problem = gac(), Bowl(functions=1)
    objective = Objective(step_weights(None, 4), log_floor=5.0)
    first, exact = (Trajectory(problem, rule).window(objective, second_derivatives=s) for s in (False, True))
    torch.testing.assert_close(first.losses, exact.losses)
    assert first.gradients.any()
    assert first.gradients.isfinite().all()


@pytest.mark.parametrize("around", [torch.inference_mode, lambda: FakeTensorMode(allow_non_fake_inputs=True)])
def test_steps_in_other_surroundings_leave_later_ones_as_they_are(around):
    """Nothing that is kept between them is of those."""
    rule = GACRule(hidden_size=5)

    def stepped():
        params = [torch.ones(5, requires_grad=True), torch.ones(9, requires_grad=True)]
        optimizer = FusedLSTMOptimizer(params, rule, nonfinite="propagate")
        for param in params:
            param.grad = torch.ones_like(param)
        optimizer.step()
        return params[0].detach()

    with around():
        stepped()
    found, where = stepped(), Coordinates((5, 9))
    assert (found != 1).all()
    rows = torch.ones(2, 14, requires_grad=True)
    where.tiles(rows).sum().backward()
    assert torch.equal(rows.grad, torch.ones(2, 14))


def test_groups_of_nothing_are_stepped():
    for rule in (GACRule(), NTMRule("matrix", inside=True), NTMRule("pairs", pairs=2)):
        param = torch.empty(0, requires_grad=True)
        param.grad = torch.empty(0)
        FusedLSTMOptimizer([param], rule).step()
