"""Baselines are torch's optimizers, followed faithfully, and their tuned learning rates are the best of those tried."""

from __future__ import annotations

import copy
import json
import math

import pytest
import torch

from fastl2l import baselines, bfgs
from fastl2l.baselines import BFGS, LBFGS, NAG, SGD, Adadelta, Adagrad, Adam, Momentum, RMSprop, descend, tune
from fastl2l.files import write_record
from fastl2l.meta import Imitation
from fastl2l.tasks import Quadratic
from fastl2l.tasks.base import Problem, Task, problem_seed, value_and_grad


class Parabola(Task):
    """f(x) = curvature * x^2 / 2 of one number, from 1: SGD multiplies it by (1 - lr * curvature) at every step."""

    name = "parabola"

    def __init__(self, curvature: float) -> None:
        self.curvature = curvature
        self.seeds: list[int] = []

    def spec(self):
        return {"name": self.name, "curvature": self.curvature}

    def sample(self, seed):
        self.seeds.append(seed)
        return ParabolaProblem(self.curvature)


class ParabolaProblem(Problem):
    task = "parabola"

    def __init__(self, curvature):
        self.theta0, self.curvature = torch.ones(1, dtype=torch.float64), curvature

    def loss(self, theta, step):
        return self.curvature * theta.square().sum() / 2


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("FASTL2L_CACHE", str(tmp_path))
    return tmp_path / "tuning"


# Baselines


@pytest.mark.parametrize(
    ("baseline", "kind", "settings"),
    [
        (SGD(0.5), torch.optim.SGD, {"lr": 0.5, "momentum": 0, "nesterov": False}),
        (NAG(0.5), torch.optim.SGD, {"lr": 0.5, "momentum": 0.9, "nesterov": True}),
        (Momentum(0.5), torch.optim.SGD, {"lr": 0.5, "momentum": 0.9, "nesterov": False}),
        (Adagrad(0.5), torch.optim.Adagrad, {"lr": 0.5, "lr_decay": 0, "eps": 1e-10}),
        (Adadelta(0.5), torch.optim.Adadelta, {"lr": 0.5, "rho": 0.9, "eps": 1e-6}),
        (RMSprop(0.5), torch.optim.RMSprop, {"lr": 0.5, "alpha": 0.99, "eps": 1e-8, "momentum": 0}),
        (Adam(0.5), torch.optim.Adam, {"lr": 0.5, "betas": (0.9, 0.999), "eps": 1e-8, "amsgrad": False}),
    ],
)
def test_baselines_are_torch_s_own(baseline, kind, settings):
    optimizer = baseline.build([torch.ones(2, requires_grad=True)])
    assert type(optimizer) is kind
    assert settings.items() <= optimizer.param_groups[0].items()


def test_learning_rates_are_checked():
    assert Adam().lr == "tune"
    assert Adam().with_lr(0.1) == Adam(lr=0.1)
    assert Adam(0.1) != SGD(0.1)
    with pytest.raises(ValueError, match="lr of adam: expected a number"):
        Adam().build([torch.ones(1, requires_grad=True)])
    for bad in (0.0, -1.0, math.inf, math.nan):
        with pytest.raises(ValueError, match='lr: expected "tune" or a finite number > 0'):
            SGD(lr=bad)
    for bad in ("tuned", None, True):
        with pytest.raises(TypeError, match='lr: expected "tune" or a number'):
            SGD(lr=bad)


# Descending


def test_descend_follows_the_optimizer_by_hand():
    problem = Quadratic(dim=3, batch=4, dtype=torch.float64).sample(0)
    start = problem.theta0.clone()
    theta, expected = start.clone(), []
    for step in range(6):
        loss, grad = value_and_grad(problem, theta, step)
        expected.append(loss / 4)
        theta -= 0.01 * grad
    torch.testing.assert_close(descend(problem, SGD(0.01).build, 5), torch.stack(expected), rtol=1e-12, atol=0)
    assert torch.equal(problem.theta0, start)


def test_descend_counts_the_steps():
    class Moving(ParabolaProblem):
        def loss(self, theta, step):
            return super().loss(theta, step) + 10**step

    assert descend(Moving(1.0), SGD(1.0).build, 3).tolist() == [1.5, 10.0, 100.0, 1000.0]


def test_divergence_is_inf_from_there_on():
    losses = descend(ParabolaProblem(1.0), SGD(1e60).build, 10)
    assert losses[:2].isfinite().all()
    assert losses[-1] == math.inf  # not NaN, which inf - inf would be
    first = int(losses.isinf().nonzero()[0])
    assert losses[first:].isinf().all()


# Tuning


@pytest.mark.parametrize(("curvature", "best"), [(1.0, 1.0), (1e-5, 1e5), (1e6, 1e-6)])
def test_tuning_finds_the_best_rate_also_beyond_the_grid(curvature, best):
    tried = {}
    lr = tune(Parabola(curvature), SGD(), 7, runs=1, report=tried.__setitem__)
    assert lr == pytest.approx(best, rel=1e-6)
    assert tried[lr] == min(tried.values())
    rates = sorted(tried)
    around = rates.index(lr)
    for neighbour in (rates[around - 1], rates[around + 1]):
        assert max(neighbour / lr, lr / neighbour) == pytest.approx(10 ** (1 / 12), rel=1e-3)


def test_a_default_device_does_not_change_the_rate():
    expected = tune(Quadratic(dim=2, batch=1), SGD(), 2, runs=2, cache=False)
    with torch.device("meta"):
        assert tune(Quadratic(dim=2, batch=1), SGD(), 2, runs=2, cache=False) == expected


def test_tuning_stops_above_a_rate_that_is_hopeless():
    tried = {}
    tune(Parabola(1.0), SGD(), 7, runs=1, report=tried.__setitem__)
    assert 2 < max(tried) < 10


def test_tuning_uses_problems_of_its_own_and_the_same_for_every_rate():
    task = Parabola(1.0)
    tried = []
    tune(task, SGD(), 3, runs=2, seed=9, report=lambda lr, loss: tried.append(loss))
    own = [problem_seed(9, "tune", index) for index in (0, 1)]
    assert task.seeds == own[:1] + own * len(tried)


def test_tuning_beats_every_coarse_rate_on_quadratics():
    tried = {}
    task = Quadratic(dim=4, batch=16)
    lr = tune(task, Adam(), 15, runs=2, report=tried.__setitem__)
    for rate, loss in tried.items():
        again = [descend(task.sample(problem_seed(0, "tune", i)), Adam(rate).build, 15)[-1].item() for i in (0, 1)]
        assert loss == pytest.approx(sum(again) / 2)
    assert 0.1 < lr < 10


def test_tuning_by_the_mean_of_the_last_losses():
    tried = {}
    task = Quadratic(dim=4, batch=16)
    lr = tune(task, Adam(), 15, runs=2, last=5, report=tried.__setitem__)
    for rate, loss in tried.items():
        again = [descend(task.sample(problem_seed(0, "tune", i)), Adam(rate).build, 15)[-5:].mean() for i in (0, 1)]
        assert loss == pytest.approx(sum(again).item() / 2)
    assert tried[lr] == min(tried.values())


def test_a_rate_that_was_kept_when_only_the_last_loss_counted_is_found(cache):
    tune(Parabola(1.0), SGD(), 3, runs=1)
    (file,) = cache.iterdir()
    assert "last" not in json.loads(file.read_text())
    assert tune(Parabola(1.0), SGD(), 3, runs=1, last=1, report=pytest.fail)


def test_rates_are_kept_and_damage_is_repaired(cache):
    calls = []
    arguments = {"runs": 1, "report": lambda lr, loss: calls.append(lr)}
    lr = tune(Parabola(1.0), SGD(), 3, **arguments)
    (file,) = cache.iterdir()
    whole = file.read_text()
    record = json.loads(whole)
    assert record["lr"] == lr
    assert sorted(calls) == [entry["lr"] for entry in record["tried"]]
    calls.clear()
    assert tune(Parabola(1.0), SGD(), 3, **arguments) == lr
    assert calls == []
    del record["digest"]
    others = [record | change for change in ({"lr": -1.0}, {"lr": "1"}, {"lr": [1]}, {"steps": 9}, {"tried": []})]
    sealed = [write_record(cache / "other", other).read_text() for other in others[:-1]]
    (cache / "other").unlink()
    unsealed = [json.dumps(other) for other in others]
    flipped = whole.replace(f'"lr": {lr}', f'"lr": {lr * 2}')
    for damaged in ("", "{}", "[]", whole[:50], "[" * 10**6, flipped, *sealed, *unsealed):
        assert damaged != whole
        file.write_text(damaged)
        with pytest.warns(RuntimeWarning, match=f"{file.name}: .*; it is computed anew"):
            assert tune(Parabola(1.0), SGD(), 3, **arguments) == lr
        assert file.read_text() == whole


class Wide(Parabola):
    """Says what it is with a tuple, which JSON does not have."""

    def spec(self):
        return {"name": self.name, "hidden": (20, 20)}


def test_rates_of_a_task_with_a_tuple_in_its_spec_are_found():
    tune(Wide(1.0), SGD(), 3, runs=1)
    tune(Wide(1.0), SGD(), 3, runs=1, report=pytest.fail)


def test_every_part_of_the_request_has_a_file_of_its_own(cache):
    tune(Parabola(1.0), SGD(), 3, runs=1)
    for other in (
        lambda: tune(Parabola(2.0), SGD(), 3, runs=1),
        lambda: tune(Parabola(1.0), NAG(), 3, runs=1),
        lambda: tune(Parabola(1.0), SGD(), 4, runs=1),
        lambda: tune(Parabola(1.0), SGD(), 3, runs=2),
        lambda: tune(Parabola(1.0), SGD(), 3, runs=1, seed=1),
        lambda: tune(Parabola(1.0), SGD(), 3, runs=1, last=2),
    ):
        before = len(list(cache.iterdir()))
        other()
        assert len(list(cache.iterdir())) == before + 1


def test_without_cache_nothing_is_written(cache):
    tune(Parabola(1.0), SGD(), 3, runs=1, cache=False)
    assert not cache.exists()


def test_a_task_on_which_everything_diverges_is_named(cache):
    with pytest.raises(ValueError, match="'parabola': sgd diverges at every learning rate"):
        tune(Parabola(1e150), SGD(), 7, runs=1)
    assert not cache.exists()


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"task": "mnist"}, TypeError, "task: expected a fastl2l Task, got str"),
        ({"baseline": Adam}, TypeError, "baseline: expected a Baseline"),
        ({"steps": 0}, ValueError, "steps: expected an integer >= 1, got 0"),
        ({"runs": 2.0}, TypeError, "runs: expected an integer >= 1, got 2.0"),
        ({"seed": -1}, ValueError, "seed: expected an integer >= 0, got -1"),
        ({"last": 0}, ValueError, "last: expected an integer >= 1, got 0"),
        ({"last": 4}, ValueError, "last: expected at most the 3 steps, got 4"),
    ],
)
def test_bad_input_is_named(change, error, message, cache):
    arguments = {"task": Parabola(1.0), "baseline": SGD(), "steps": 3} | change
    with pytest.raises(error, match=message):
        tune(**arguments)
    assert not cache.exists()


def test_all_baselines_have_a_name():
    assert baselines.by_name("adam") == Adam("tune")
    assert baselines.by_name("sgd", 0.5) == SGD(0.5)
    with pytest.raises(ValueError, match=r"name: expected one of sgd, rmsprop, nag, adam, .*, got 'lion'"):
        baselines.by_name("lion")
    others = {"momentum": Momentum, "adagrad": Adagrad, "adadelta": Adadelta, "lbfgs": LBFGS, "bfgs": BFGS}
    assert {"sgd": SGD, "rmsprop": RMSprop, "nag": NAG, "adam": Adam} | others == baselines.ALL
    assert baselines.DEFAULT == ("sgd", "rmsprop", "nag", "adam")
    assert set(baselines.FIRST_ORDER) == baselines.ALL.keys() - {"lbfgs", "bfgs"}


# L-BFGS and BFGS


class Counted(ParabolaProblem):
    """Rosenbrock's function, with what it was asked."""

    def __init__(self):
        self.theta0, self.asked = torch.tensor([-1.2, 1.0], dtype=torch.float64), []

    def loss(self, theta, step):
        loss = 100 * (theta[1] - theta[0] ** 2) ** 2 + (1 - theta[0]) ** 2
        self.asked.append((step, loss.item()))
        return loss


@pytest.mark.parametrize("baseline", [LBFGS, BFGS])
def test_what_searches_along_lines_is_counted_by_evaluations(baseline):
    """Those of its line search included; a curve has the lowest loss so far."""
    problem = Counted()
    curve = descend(problem, baseline().build, 60)
    assert [step for step, _ in problem.asked] == list(range(61))
    asked = torch.tensor([loss for _, loss in problem.asked], dtype=torch.float64)
    torch.testing.assert_close(curve, asked.cummin(0).values, rtol=0, atol=0)
    assert (asked.diff() > 0).any()  # a trial of the line search that went too far
    assert curve[-1] < 1e-3 * curve[0]


@pytest.mark.parametrize("baseline", [LBFGS, BFGS])
def test_what_searches_along_lines_goes_on_to_the_last_evaluation_even_at_a_minimum(baseline):
    assert descend(ParabolaProblem(1.0), baseline().build, 30).tolist()[-1] == 0
    assert len(descend(ParabolaProblem(1.0), baseline().build, 30)) == 31


@pytest.mark.parametrize("baseline", [LBFGS, BFGS])
def test_what_searches_along_lines_has_no_rate_to_tune(baseline):
    assert baseline() == baseline(1.0) == baselines.by_name(baseline.name)


def test_bfgs_solves_a_quadratic_of_many_parameters():
    """As it does in n iterations of exact arithmetic; parameters keep their shapes and dtypes."""
    made = torch.randn(8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    matrix = made @ made.T + torch.eye(8, dtype=torch.float64)
    params = [torch.ones(2, 3, dtype=torch.float64, requires_grad=True), torch.ones(2, requires_grad=True)]
    optimizer = BFGS().build(params)

    def closure():
        optimizer.zero_grad()
        theta = torch.cat([param.flatten().double() for param in params])
        loss = theta @ matrix @ theta / 2
        loss.backward()
        return loss

    assert optimizer.step(closure) < 1e-12
    assert params[0].abs().max() < 1e-5
    assert (params[0].shape, params[1].dtype) == ((2, 3), torch.float32)


@pytest.mark.parametrize(
    ("params", "lr", "message"),
    [
        ([torch.ones(100, 101)], 1.0, "params: expected at most 10,000 coordinates for BFGS, got 10,100"),
        ([torch.ones(2)], 0.0, "lr: expected a finite number > 0, got 0.0"),
        ([torch.ones(2)], math.inf, "lr: expected a finite number > 0, got inf"),
        ([{"params": [torch.ones(2)]}, {"params": [torch.ones(2)]}], 1.0, "params: expected one group for BFGS, got"),
    ],
)
def test_what_bfgs_cannot_take_is_refused(params, lr, message):
    with pytest.raises(ValueError, match=message):
        bfgs.BFGS(params, lr)


def test_bfgs_takes_no_further_group():
    optimizer = bfgs.BFGS([torch.ones(2)])
    with pytest.raises(ValueError, match="params: expected one group for BFGS, got another"):
        optimizer.add_param_group({"params": [torch.ones(2)]})
    assert len(optimizer.param_groups) == 1


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
def test_bfgs_is_left_at_the_lowest_finite_loss(dtype):
    """Whatever a line search meets; a copy in mid-run goes on by itself, also without gradients around it."""
    param = torch.zeros(3, dtype=dtype, requires_grad=True)
    optimizer = copy.deepcopy(bfgs.BFGS([param]))
    (own,) = optimizer.param_groups[0]["params"]
    seen = []

    def closure():
        own.grad = None
        loss = (own - 1e6).square().sum()
        loss.backward()
        seen.append(loss.item())
        return loss

    with torch.no_grad():
        found = optimizer.step(closure)
    finite = [loss for loss in seen if math.isfinite(loss)]
    assert param.tolist() == [0, 0, 0]
    assert own.isfinite().all()
    if finite:
        assert found == min(finite)
        assert (own.detach() - 1e6).square().sum().item() == found
    else:
        assert own.tolist() == [0, 0, 0]


def test_bfgs_wants_a_loss():
    with pytest.raises(TypeError, match="closure: expected one that gives the loss, got None"):
        bfgs.BFGS([torch.ones(2)]).step(lambda: None)


def test_evaluations_of_others_are_steps():
    """The same way as `descend` goes."""
    seen = []
    baselines.evaluations(ParabolaProblem(1.0), SGD(0.3).build, 5, lambda loss, theta: seen.append(loss.item()))
    assert seen == descend(ParabolaProblem(1.0), SGD(0.3).build, 4).tolist()


class Replacing(torch.optim.SGD):
    """Gives parameters other data."""

    def step(self, closure=None):
        for group in self.param_groups:
            for param in group["params"]:
                param.data = param.data - 0.01 * param.grad


def test_optimizers_that_replace_data_are_refused():
    with pytest.raises(TypeError, match=r"optimizer: expected one that changes parameters in place"):
        descend(ParabolaProblem(1.0), lambda params: Replacing(params, lr=0.1), 3)
    with pytest.raises(TypeError, match=r"teachers\[0\]: expected an optimizer that changes parameters in place"):
        Imitation([lambda params: Replacing(params, lr=0.1)])
