"""Windows of truncated BPTT give the gradients that autograd gives, and trajectories go on from one to the next."""

from __future__ import annotations

import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import constants, detached, errors, lstm, random_rule, rule_of

from fastl2l import GACRule, LSTMRule, NTMRule, Trajectory, reference
from fastl2l.ops.layout import to_rows
from fastl2l.tasks import IllConditioned, Problem, Quadratic, Spiked, batch
from fastl2l.tasks.base import SECOND_MINIBATCHES
from fastl2l.trajectory import Objective, step_weights

F64 = torch.float64


class Waves(Problem):
    """Three functions that are not convex, another one at every step; counts its evaluations."""

    task, functions = "waves", 3

    def __init__(self, n=6, dtype=F64):
        generator = torch.Generator().manual_seed(0)
        self.theta0 = torch.randn(self.functions * n, generator=generator, dtype=F64).to(dtype)
        self.scale = torch.randn(64, self.functions * n, generator=generator, dtype=F64).to(dtype)
        self.steps = []

    def loss(self, theta, step):
        self.steps.append(step)
        return ((theta * self.scale[step]).sin() + 0.1 * theta.roll(1) * theta.square()).sum()


class Sum(Problem):
    """Its gradient is an expanded tensor, all of whose numbers are one in memory."""

    task, functions = "sum", 1
    theta0 = torch.zeros(40)

    def loss(self, theta, step):
        return theta.sum()


PROBLEMS = {"waves": Waves, "quadratic": lambda: Quadratic(dim=3, batch=4, dtype=F64).sample(0)}


def by_autograd(problem, rule, window_weights, second=False, state=None, first_step=0, theta=None, judge=None):
    """Losses and meta-gradient of a window by autograd through all of it; with detached gradients unless `second`."""
    theta = (problem.theta0 if theta is None else theta).clone().requires_grad_(second)
    rows = torch.zeros(rule.config.state_rows, theta.numel(), dtype=F64) if state is None else state
    objective, losses = 0, []
    for step, weight in enumerate(window_weights, first_step):
        now = theta if second else theta.detach().requires_grad_()
        (gradient,) = torch.autograd.grad(problem.loss(now, step), now, create_graph=second)
        change, rows = reference.step(gradient, rows, rule.weights(), *constants(rule))
        theta = theta + change
        loss = problem.loss(theta, step + 1) / problem.functions
        losses.append(loss.detach())
        objective = objective + weight * (loss if judge is None else judge(problem, theta, step + 1))
    gradients = torch.autograd.grad(objective, rule.weights(), materialize_grads=True)
    return torch.stack(losses), torch.cat([gradient.flatten() for gradient in gradients]), rows.detach(), theta.detach()


def assert_same_window(found, losses, gradients):
    torch.testing.assert_close(found.losses, losses, rtol=1e-12, atol=1e-12)
    assert found.gradients.shape == gradients.shape
    assert errors(found.gradients, gradients)["largest"] < 1e-11


TEXTS = [lstm("raw", 5, 2), lstm("log_sign", 5, 2), "adam:0.9,0.99,1e-06 elu:4 lstm:5,5 tanh"]
WEIGHTS = {
    "all": step_weights(None, 8),
    "last": step_weights("last", 8),
    "some": [0.0, 2.0, 0.0, 0.5, 1.0, 3.0, 0.25, 0.0],
    "first": [1.0] + [0.0] * 7,
    "one step": [1.5],
}


@pytest.mark.parametrize("backend", ["native", "reference"])
@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("window_weights", WEIGHTS)
@pytest.mark.parametrize("problem", PROBLEMS)
def test_first_order_windows_are_autograd_s_with_detached_gradients(problem, window_weights, text, backend):
    problem, window_weights = PROBLEMS[problem](), WEIGHTS[window_weights]
    rule = rule_of(text, dtype=F64)
    found = Trajectory(problem, rule, backend=backend).window(window_weights)
    assert_same_window(found, *by_autograd(problem, rule, window_weights)[:2])


@pytest.mark.parametrize("backend", ["native", "reference"])
@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("window_weights", WEIGHTS)
@pytest.mark.parametrize("problem", PROBLEMS)
def test_exact_windows_are_autograd_s_through_everything(problem, window_weights, text, backend):
    problem, window_weights = PROBLEMS[problem](), WEIGHTS[window_weights]
    rule = rule_of(text, dtype=F64)
    found = Trajectory(problem, rule, backend=backend).window(window_weights, second_derivatives=True)
    assert_same_window(found, *by_autograd(problem, rule, window_weights, second=True)[:2])
    first_order = by_autograd(problem, rule, window_weights)[1]
    # Up to the first loss no gradient depends on the rule.
    assert (errors(found.gradients, first_order)["rms"] > 1e-5) == any(window_weights[1:])


class Positive(Waves):
    """Above 0, and another function at the steps that no rule sees."""

    def loss(self, theta, step):
        return (super().loss(theta, step % 61 + (step >= SECOND_MINIBATCHES)).square() + 0.5).sum()


def of_log(problem, theta, step):
    return (problem.loss(theta, step) / problem.functions + 1e-2).log()


def of_second(problem, theta, step):
    return problem.loss(theta, SECOND_MINIBATCHES + step) / problem.functions


def of_both(problem, theta, step):
    return (of_second(problem, theta, step) + 1e-2).log()


JUDGES = {
    "log": ({"log_floor": 1e-2}, of_log),
    "second": ({"second_minibatch": True}, of_second),
    "both": ({"log_floor": 1e-2, "second_minibatch": True}, of_both),
}


@pytest.mark.parametrize("judge", JUDGES)
@pytest.mark.parametrize("second_derivatives", [False, True])
@pytest.mark.parametrize("text", TEXTS)
def test_objectives_in_logs_and_on_second_minibatches_are_autograd_s(text, second_derivatives, judge):
    options, judge = JUDGES[judge]
    problem, rule, window_weights = Positive(), rule_of(text, dtype=F64), WEIGHTS["some"]
    objective = Objective(window_weights, **options)
    found = Trajectory(problem, rule).window(objective, second_derivatives=second_derivatives)
    truth = by_autograd(problem, rule, window_weights, second=second_derivatives, judge=judge)
    assert_same_window(found, *truth[:2])
    plain = Trajectory(problem, rule).window(window_weights, second_derivatives=second_derivatives)
    assert torch.equal(found.losses, plain.losses)  # what is reported, and the way, are the same
    assert errors(found.gradients, plain.gradients)["rms"] > 1e-3


def test_losses_below_zero_do_not_turn_a_log_objective_around():
    class Below(Problem):
        task, theta0 = "below", torch.ones(3, dtype=F64)

        def loss(self, theta, step):
            return theta.sum() - 10

    rule = random_rule(hidden=5, dtype=F64)
    for second_derivatives in (False, True):
        window = Trajectory(Below(), rule).window(Objective([1.0] * 3, 0.1), second_derivatives=second_derivatives)
        assert not window.gradients.any()


def test_the_papers_rule_in_float32_is_close():
    problem = Quadratic().sample(1)
    rule = LSTMRule("raw", output_scale=0.1)
    found = Trajectory(problem, rule).window([1.0] * 20)
    exact = Quadratic(dtype=F64).sample(1)
    losses, gradients, _, _ = by_autograd(exact, rule.double(), [1.0] * 20)
    torch.testing.assert_close(found.losses.double(), losses, rtol=1e-4, atol=0)
    assert errors(found.gradients, gradients)["rms"] < 1e-4


def ends(trajectory):
    state = to_rows(trajectory.state, trajectory.theta.numel())
    return [trajectory.theta, state, trajectory.loss, trajectory._gradient, torch.tensor(trajectory.steps)]


@pytest.mark.parametrize("backend", ["native", "reference"])
@pytest.mark.parametrize("dtype", [torch.float32, F64], ids=str)
def test_windows_end_where_steps_end_to_the_bit(backend, dtype):
    rule = random_rule(hidden=5, dtype=dtype)

    def run(*lengths, second_derivatives=False):
        trajectory, losses = Trajectory(Waves(dtype=dtype), rule, backend=backend), []
        for length in lengths:
            losses.append(trajectory.window([1.0] * length, second_derivatives=second_derivatives).losses)
        return [*ends(trajectory), torch.cat(losses)]

    stepped = Trajectory(Waves(dtype=dtype), rule, backend=backend)
    losses = torch.stack([stepped.advance().clone() for _ in range(10)])
    expected = [*ends(stepped), losses]
    for found in (run(10), run(5, 5), run(1, 2, 3, 4), run(5, 5, second_derivatives=True)):
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("second", [False, True])
def test_the_next_window_goes_on_from_the_state_with_the_weights_of_its_time(second):
    rule, problem = random_rule(hidden=5, dtype=F64), Waves()
    trajectory = Trajectory(problem, rule)
    trajectory.window([1.0] * 4, second_derivatives=second)
    _, _, state, theta = by_autograd(problem, rule, [1.0] * 4)
    with torch.no_grad():
        for weight in rule.weights():
            weight.mul_(1.3)
    found = trajectory.window([1.0] * 4, second_derivatives=second)
    expected = by_autograd(problem, rule, [1.0] * 4, second, state, 4, theta)
    assert_same_window(found, *expected[:2])
    reset = by_autograd(problem, rule, [1.0] * 4, second, None, 4, theta)
    assert errors(found.gradients, reset[1])["rms"] > 1e-2


def test_a_reset_state_goes_elsewhere():
    # The trap of a widespread fork: with its state reset at every step a rule sees no more than the last gradient.
    rule, problem = random_rule(dtype=F64), Quadratic(dim=4, batch=3, dtype=F64).sample(0)
    kept, reset = Trajectory(problem, rule), Trajectory(problem, rule)
    theta, rows = problem.theta0, torch.zeros(80, 12, dtype=F64)
    for step in range(30):
        kept.advance()
        reset.advance()
        reset.state.zero_()
        leaf = theta.detach().requires_grad_()
        (gradient,) = torch.autograd.grad(problem.loss(leaf, step), leaf)
        change, rows = reference.step(gradient, rows, detached(rule), *constants(rule))
        theta = theta + change
    torch.testing.assert_close(kept.theta, theta, rtol=1e-9, atol=1e-9)
    assert (reset.theta - theta).abs().max() > 0.1


def test_every_function_of_the_sequence_is_evaluated_once():
    problem = Waves()
    trajectory = Trajectory(problem, random_rule(hidden=3, dtype=F64))
    trajectory.window([1.0] * 3)
    trajectory.advance()
    trajectory.window([1.0] * 2)
    assert problem.steps == list(range(7))
    assert trajectory.steps == 6
    assert torch.equal(trajectory.loss, problem.loss(trajectory.theta, 6) / 3)


def test_a_trajectory_touches_nothing_else_and_keeps_no_graph():
    problem, rule = Waves(), random_rule(hidden=3, dtype=F64)
    start, weights = problem.theta0.clone(), detached(rule)
    trajectory = Trajectory(problem, rule)
    for second in (False, True):
        window = trajectory.window([1.0] * 3, second_derivatives=second)
        tensors = [*window, trajectory.theta, trajectory.state, trajectory.loss]
        assert not any(tensor.requires_grad for tensor in tensors)
    assert torch.equal(problem.theta0, start)
    assert all(torch.equal(a, b) for a, b in zip(rule.weights(), weights, strict=True))
    assert all(weight.grad is None and weight.requires_grad for weight in rule.weights())


@pytest.mark.parametrize("backend", ["native", "reference"])
def test_expanded_gradients_are_taken(backend):
    rule = random_rule()
    stepped, windows, exact = (Trajectory(Sum(), rule, backend=backend) for _ in range(3))
    losses = torch.stack([stepped.advance() for _ in range(3)])
    assert torch.equal(windows.window([1.0] * 3).losses, losses)
    assert torch.equal(exact.window([1.0] * 3, second_derivatives=True).losses, losses)


@pytest.mark.parametrize("second", [False, True])
def test_what_is_not_finite_comes_out(second):
    problem = Waves()
    problem.scale[2, 0] = float("inf")
    window = Trajectory(problem, random_rule(hidden=3, dtype=F64)).window([1.0] * 4, second_derivatives=second)
    assert window.losses.isfinite().tolist() == [True, False, False, False]
    assert not window.gradients.isfinite().all()


# Several rules, and weights that are not trained


class Parted(Waves):
    """Theta in three parts, of sizes that fill no tile."""

    def __init__(self, parts=None):
        super().__init__()
        self.parts = {"left": 5, "middle": 11, "right": 2} if parts is None else parts


def pair_of_rules():
    """In another order than the problem's parts."""
    return {
        "right": rule_of(lstm("raw", 3, 1), dtype=F64, seed=1),
        "left": rule_of("adam:0.9,0.9,1e-06 elu:4 lstm:5 tanh", dtype=F64, seed=2),
        "middle": rule_of(lstm("log_sign", 5, 2), dtype=F64, seed=3),
    }


def by_parts(problem, rules, window_weights, second):
    """The same as by_autograd, for several rules."""
    slices, end = {}, 0
    for name, size in problem.parts.items():
        slices[name], end = slice(end, end + size), end + size
    theta = problem.theta0.clone().requires_grad_(second)
    rows = {name: torch.zeros(rule.config.state_rows, problem.parts[name], dtype=F64) for name, rule in rules.items()}
    objective, losses = 0, []
    for step, weight in enumerate(window_weights):
        now = theta if second else theta.detach().requires_grad_()
        (gradient,) = torch.autograd.grad(problem.loss(now, step), now, create_graph=second)
        changes = {}
        for name, rule in rules.items():
            part = gradient[slices[name]]
            changes[name], rows[name] = reference.step(part, rows[name], rule.weights(), *constants(rule))
        theta = theta + torch.cat([changes[name] for name in problem.parts])
        loss = problem.loss(theta, step + 1) / problem.functions
        losses.append(loss.detach())
        objective = objective + weight * loss
    weights = [weight for rule in rules.values() for weight in rule.weights()]
    gradients = torch.autograd.grad(objective, weights, materialize_grads=True)
    return torch.stack(losses), torch.cat([gradient.flatten() for gradient in gradients]), theta.detach()


@pytest.mark.parametrize("backend", ["native", "reference"])
@pytest.mark.parametrize("second", [False, True])
def test_each_part_is_stepped_by_its_rule(second, backend):
    problem, rules = Parted(), pair_of_rules()
    trajectory = Trajectory(problem, rules, backend=backend)
    window = trajectory.window(WEIGHTS["some"], second_derivatives=second)
    losses, gradients, theta = by_parts(problem, rules, WEIGHTS["some"], second)
    assert_same_window(window, losses, gradients)
    torch.testing.assert_close(trajectory.theta, theta, rtol=1e-11, atol=1e-12)
    stepped = Trajectory(Parted(), rules, backend=backend)
    for expected in losses:
        torch.testing.assert_close(stepped.advance(), expected, rtol=1e-11, atol=1e-12)
    assert [len(state) for state in stepped.states] == [1, 1, 1]


def test_windows_of_several_rules_go_on_and_start_anew():
    rules = pair_of_rules()
    whole, parts = Trajectory(Parted(), rules), Trajectory(Parted(), rules)
    together = whole.window([1.0] * 6).losses
    again = [parts.window([1.0] * 2).losses, parts.window([1.0] * 4, second_derivatives=True).losses]
    torch.testing.assert_close(torch.cat(again), together, rtol=1e-11, atol=1e-12)
    parts.restart()
    assert torch.equal(parts.window([1.0] * 6).losses, together)


def test_one_rule_does_for_all_parts():
    rule = random_rule(hidden=3, dtype=F64)
    assert torch.equal(Trajectory(Parted(), rule).window([1.0]).losses, Trajectory(Waves(), rule).window([1.0]).losses)


@pytest.mark.parametrize(
    ("problem", "change", "error", "message"),
    [
        (
            Parted,
            lambda rules: rules.pop("left"),
            ValueError,
            r"a rule for every part \(left, middle, right\), got none for",
        ),
        (Parted, lambda rules: rules.update(up=random_rule(dtype=F64)), ValueError, "parts of the problem alone.*'up'"),
        (Waves, lambda rules: None, ValueError, r"parts of the problem alone \(it has none\), got one for 'left'"),
        (Parted, lambda rules: rules.clear(), ValueError, "expected at least one part.*got none"),
        (Parted, lambda rules: rules.update(left=rules["right"]), ValueError, "another rule for each"),
        (Parted, lambda rules: rules.update(left=random_rule()), ValueError, "the same dtype and device for all parts"),
        (Parted, lambda rules: rules.update({"": rules.pop("left")}), ValueError, "names of parts without a point"),
        (Parted, lambda rules: rules.update({"a.b": rules.pop("left")}), ValueError, "names of parts without a point"),
        (Parted, lambda rules: rules.update(left=torch.nn.Linear(1, 1)), TypeError, "rules by the names of parts"),
        (Parted, lambda rules: rules.update({3: rules.pop("left")}), TypeError, "rules by the names of parts"),
    ],
)
def test_rules_and_parts_must_belong_together(problem, change, error, message):
    rules = pair_of_rules()
    change(rules)
    with pytest.raises(error, match=message):
        Trajectory(problem(), rules)


@pytest.mark.parametrize("second", [False, True])
def test_frozen_weights_have_a_meta_gradient_of_zero_and_the_others_theirs(second):
    rule = rule_of(TEXTS[2], dtype=F64)
    expected = Trajectory(Waves(), rule).window(WEIGHTS["all"], second_derivatives=second)
    frozen = ("weight_in", "bias_l0", "bias_out")
    for name in frozen:
        rule.get_parameter(name).requires_grad_(False)
    found = Trajectory(Waves(), rule).window(WEIGHTS["all"], second_derivatives=second)
    assert torch.equal(found.losses, expected.losses)
    sizes = [weight.numel() for weight in rule.weights()]
    names = [name for name, _ in rule.config.weight_shapes]
    for name, one, other in zip(names, found.gradients.split(sizes), expected.gradients.split(sizes), strict=True):
        if name in frozen:
            assert not one.any()
        else:
            torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-14)
            assert other.any()


def test_dtypes_must_agree():
    with pytest.raises(ValueError, match=r"problem: expected theta_0 in torch.float32 .*, got torch.float64"):
        Trajectory(Waves(), random_rule(hidden=3))
    with pytest.raises(ValueError, match="backend: expected one of auto, reference, native, triton, got 'fast'"):
        Trajectory(Waves(), random_rule(hidden=3, dtype=F64), backend="fast")


@pytest.mark.parametrize(
    ("weights", "expected"),
    [
        (None, [1.0, 1.0, 1.0]),
        ("last", [0.0, 0.0, 1.0]),
        ((0, 1, 2), [0.0, 1.0, 2.0]),
        (np.array([0, 1, 2]), [0.0, 1.0, 2.0]),
        (iter([3.0, 0.0, 0.5]), [3.0, 0.0, 0.5]),
    ],
)
def test_step_weights_are_of_any_kind(weights, expected):
    assert step_weights(weights, 3) == expected


@pytest.mark.parametrize(
    "weights",
    ["first", [1.0], [1.0] * 4, [0.0] * 3, [1.0, -1.0, 1.0], [1.0, float("nan"), 1.0], [1.0, float("inf"), 1.0], 3],
)
def test_bad_step_weights_are_named(weights):
    with pytest.raises(ValueError, match="step_weights: expected"):
        step_weights(weights, 3)


MEASURE = """
    import sys
    import fastl2l
    import torch
    from fastl2l import Trajectory
    from fastl2l.tasks import Problem

    class Bowl(Problem):
        task, functions = "bowl", 1
        def __init__(self, n):
            self.theta0 = torch.ones(n)
        def loss(self, theta, step):
            return theta.dot(theta)

    def resident(name):  # VmRSS: now, VmHWM: the most since it was last asked for to start again
        with open("/proc/self/status") as file:
            return next(int(line.split()[1]) * 1024 for line in file if line.startswith(name))

    torch.set_num_threads(1)
    n, steps, second = map(int, sys.argv[2:])
    rule = getattr(fastl2l, sys.argv[1])()
    Trajectory(Bowl(64), rule).window([1.0] * steps, second_derivatives=bool(second))
    trajectory = Trajectory(Bowl(n), rule)
    trajectory.advance()
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")
    before = resident("VmRSS")
    trajectory.window([1.0] * steps, second_derivatives=bool(second))
    print((resident("VmHWM") - before) / n)
"""


def bytes_a_coordinate(rule, n, steps, second):
    arguments = [sys.executable, "-c", textwrap.dedent(MEASURE), rule, str(n), str(steps), str(int(second))]
    folder = Path(__file__).resolve().parents[1]
    done = subprocess.run(arguments, capture_output=True, text=True, cwd=folder, check=False)
    assert done.returncode == 0, done.stderr
    return float(done.stdout)


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="memory is measured as Linux shows it")
@pytest.mark.parametrize("rule", ["LSTMRule", "RNNpropRule"])
def test_a_window_takes_little_memory(rule):
    # 320 or 332 for the first state, 84 for gradients and 80 for adjoints, 4 or so for the optimizee.
    first_order = bytes_a_coordinate(rule, 200_000, 20, second=False)
    assert 400 < first_order < 560
    # The measurement can fail: the exact window keeps a state a step.
    assert bytes_a_coordinate(rule, 20_000, 20, second=True) > 6400


# Exceptions


class Failing(Waves):
    """Raises at a step."""

    fails_at = None

    def loss(self, theta, step):
        if step == self.fails_at:
            raise FloatingPointError("now")
        return super().loss(theta, step)


@pytest.mark.parametrize("kind", ["lstm", "gac", "ntm"])
@pytest.mark.parametrize("second_derivatives", [False, True])
def test_a_trajectory_that_an_exception_has_torn_goes_on_from_its_start_alone(kind, second_derivatives):
    rule = {"lstm": LSTMRule, "gac": GACRule, "ntm": NTMRule}[kind](hidden_size=5, dtype=F64)
    problem, whole = Failing(), Trajectory(Waves(), rule)
    trajectory = Trajectory(problem, rule)
    trajectory.advance()
    problem.fails_at = 4
    for work in (lambda: trajectory.window([1.0] * 5, second_derivatives=second_derivatives), trajectory.advance):
        if work == trajectory.advance:
            trajectory.restart()
            for _ in range(3):
                trajectory.advance()
        with pytest.raises(FloatingPointError):
            work()
        for further in (trajectory.advance, lambda: trajectory.window([1.0])):
            with pytest.raises(RuntimeError, match="trajectory: expected restart"):
                further()
    problem.fails_at = None
    trajectory.restart()
    windows = [one.window([1.0] * 3, second_derivatives=second_derivatives) for one in (trajectory, whole)]
    assert all(map(torch.equal, *windows))


@pytest.mark.parametrize("kind", ["gac", "ntm"])
def test_exact_windows_know_nothing_of_autocast(kind):
    rule = {"gac": GACRule, "ntm": NTMRule}[kind](hidden_size=5)
    trajectories = [Trajectory(Waves(dtype=torch.float32), rule) for _ in range(2)]
    outside = trajectories[0].window([1.0] * 3, second_derivatives=True)
    with torch.autocast("cpu", torch.bfloat16):
        inside = trajectories[1].window([1.0] * 3, second_derivatives=True)
    assert all(map(torch.equal, outside, inside))


# Losses of functions


@pytest.mark.parametrize(
    "task",
    [Quadratic(3, 4, dtype=F64), IllConditioned(3, batch=4, dtype=F64), Spiked(Quadratic(3, 4, dtype=F64))],
    ids=lambda task: task.name,
)
def test_losses_of_functions_add_up_to_that_of_the_problem(task):
    alone = [task.sample(seed) for seed in range(2)]
    for problem in (alone[0], batch(alone)):
        theta = problem.theta0 + 0.5
        found = problem.losses(theta, 1)
        assert found.shape == (problem.functions,)
        torch.testing.assert_close(found.sum(), problem.loss(theta, 1))
    start = alone[0].theta0
    torch.testing.assert_close(alone[0].alone(2).loss(start.view(4, 3)[2], 0), alone[0].losses(start, 0)[2])


def test_problems_that_know_a_sum_alone_say_so():
    with pytest.raises(NotImplementedError, match=r"task 'waves': losses: expected one that tells its functions apart"):
        Waves().losses(Waves().theta0, 0)
