"""Tasks that are made of other tasks: scaled coordinates, convex functions beside, mixtures."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import dataclass

import pytest
import torch
from torch import nn

from fastl2l import RNNpropRule, Trajectory
from fastl2l.tasks import (
    Digits,
    Mixture,
    Problem,
    Quadratic,
    RandomNetworks,
    Scaled,
    Spiked,
    Task,
    WithConvex,
    batch,
    from_module,
)
from fastl2l.tasks.base import SECOND_MINIBATCHES, check_start, is_pure, parts_of, problem_seed, value_and_grad

F64 = torch.float64
QUADRATIC = Quadratic(3, 4, dtype=F64)
DIGITS = Digits(hidden=(4,), batch_size=8, dtype=F64)


def in_parts(dtype=F64) -> Task:
    x, y = torch.randn(20, 3, dtype=dtype, generator=torch.Generator().manual_seed(0)), torch.arange(20) % 2
    make = lambda: nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).to(dtype)  # noqa: E731
    return from_module(make, nn.functional.cross_entropy, (x, y), parts={"first": ["0"], "last": ["2"]})


@dataclass(frozen=True)
class Impure(Task):
    """One whose loss is its own, and depends on the step."""

    name = "impure"
    dtype: torch.dtype = F64

    def sample(self, seed):
        problem = Problem.__new__(ImpureProblem)
        problem.task, problem.theta0 = self.name, torch.full((3,), 1.0 + seed % 5).to(self.dtype)
        return problem


class ImpureProblem(Problem):
    def loss(self, theta, step):
        return (theta**2).sum() * (1 + step % 3)


TASKS = {"quadratic": QUADRATIC, "digits": DIGITS, "parts": in_parts(), "impure": Impure()}


# Scaling


@pytest.mark.parametrize("task", TASKS)
def test_scaling_changes_the_units_and_nothing_else(task):
    task = TASKS[task]
    plain, scaled = task.sample(3), Scaled(task, 2.0).sample(3)
    factors = plain.theta0 / scaled.theta0
    assert is_pure(scaled) == is_pure(plain)
    assert scaled.parts == plain.parts
    moved = plain.theta0 + 0.1
    loss, gradient = value_and_grad(plain, moved, 5)
    scaled_loss, scaled_gradient = value_and_grad(scaled, moved / factors, 5)
    torch.testing.assert_close(scaled_loss, loss)
    torch.testing.assert_close(scaled_gradient, gradient * factors)


def test_scales_are_log_uniform_a_coordinate_and_a_problem():
    task = Quadratic(10, 500, dtype=F64)
    one, other = ((task.sample(seed).theta0 / Scaled(task, 3.0).sample(seed).theta0).log() for seed in (0, 1))
    assert one.min() > -3
    assert one.max() < 3
    assert abs(one.mean()) < 0.1
    assert one.std() == pytest.approx(3 / 3**0.5, rel=0.05)
    assert not torch.equal(one, other)
    torch.testing.assert_close(Scaled(task, 0.0).sample(0).theta0, task.sample(0).theta0)


# Convex functions


@pytest.mark.parametrize("task", TASKS)
def test_a_convex_function_is_added_with_coordinates_of_its_own(task):
    task = TASKS[task]
    plain, longer = task.sample(3), WithConvex(task, 5, r=0.0).sample(3)
    parts = len(parts_of(plain))
    assert longer.theta0.numel() == plain.theta0.numel() + 5 * plain.functions * parts
    assert sum(parts_of(longer).values()) == longer.theta0.numel()
    assert longer.functions == plain.functions
    base, _ = value_and_grad(plain, plain.theta0, 2)
    loss, gradient = value_and_grad(longer, longer.theta0, 2)
    assert 0 < (loss - base) / plain.functions < 1  # the mean of a^2, from x = 0
    # Newton's step of the extra coordinates brings theirs to 0, and leaves the problem's alone.
    hessian = 2 / (5 * parts)
    extra = torch.cat(
        [
            torch.arange(size).view(plain.functions, -1)[:, -5:].flatten() + before
            for size, before in zip(parts_of(longer).values(), [0, *parts_of(longer).values()], strict=False)
        ]
    )
    assert not longer.theta0[extra].any()
    theta = longer.theta0.clone()
    theta[extra] -= gradient[extra] / hessian
    torch.testing.assert_close(value_and_grad(longer, theta, 2)[0], base)
    assert theta[extra].abs().max() <= 1


def test_convex_functions_are_solved_by_a_rule_s_trajectory_beside_the_problem():
    problem = WithConvex(QUADRATIC, 2).sample(0)
    trajectory = Trajectory(problem, RNNpropRule(dtype=F64))
    assert trajectory.advance().isfinite()


def test_the_loss_on_the_whole_data_set_is_that_of_the_wrapped_problem():
    plain, wrapped = DIGITS.sample(0), WithConvex(Scaled(DIGITS, 1.0), 5, r=0.0).sample(0)
    convex = wrapped.loss(wrapped.theta0, 3) - plain.loss(
        plain.theta0, 3
    )  # at the start, where scaling changes nothing
    torch.testing.assert_close(wrapped.whole_loss(wrapped.theta0), plain.whole_loss(plain.theta0) + convex)


# Mixtures


def test_a_mixture_gives_the_problems_of_its_tasks_as_often_as_it_should():
    task = Mixture([Quadratic(3, 2), Quadratic(5, 2)], weights=[3, 1])
    sizes = [task.sample(seed).theta0.numel() for seed in range(400)]
    assert set(sizes) == {6, 10}
    assert 260 < sizes.count(6) < 340
    seed = sizes.index(10)
    assert torch.equal(task.sample(seed).theta0, Quadratic(5, 2).sample(seed).theta0)


@pytest.mark.parametrize("task", [Scaled(DIGITS), WithConvex(Scaled(DIGITS)), Mixture([DIGITS, Scaled(DIGITS)])])
def test_wrapped_problems_lie_side_by_side(task):
    problems = [task.sample(seed) for seed in range(4)]
    together = batch(problems)
    loss, gradient = value_and_grad(together, together.theta0, 1)
    alone = [value_and_grad(problem, problem.theta0, 1) for problem in problems]
    torch.testing.assert_close(loss, sum(loss for loss, _ in alone))
    torch.testing.assert_close(gradient, torch.cat([gradient for _, gradient in alone]))


def test_specs_tell_wrapped_tasks_apart():
    tasks = [
        QUADRATIC,
        Scaled(QUADRATIC, 1),
        Scaled(QUADRATIC, 2),
        WithConvex(QUADRATIC),
        WithConvex(QUADRATIC, 5),
        WithConvex(QUADRATIC, 20, 2),
        WithConvex(Scaled(QUADRATIC, 1)),
        Mixture([QUADRATIC, DIGITS]),
        Mixture([QUADRATIC, DIGITS], [1, 2]),
    ]
    assert len({json.dumps(task.spec(), sort_keys=True) for task in tasks}) == len(tasks)


class Whole(Task):
    name = "whole"

    def sample(self, seed):
        problem = ImpureProblem()
        problem.task, problem.theta0 = self.name, torch.arange(3)
        return problem


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: Scaled(Whole()), TypeError, "task: expected one whose theta_0 is a floating Tensor, got a Tensor of"),
        (lambda: WithConvex(Whole()), TypeError, "task: expected one whose theta_0 is a floating Tensor"),
        (lambda: Scaled("mnist"), TypeError, "task: expected a fastl2l.tasks.Task, got str"),
        (lambda: Scaled(QUADRATIC, -1), ValueError, "r: expected a number from 0 to 40, got -1"),
        (lambda: Scaled(QUADRATIC, float("nan")), ValueError, "r: expected a number from 0 to 40, got nan"),
        (lambda: Scaled(QUADRATIC, "3"), TypeError, "r: expected a number from 0 to 40, got '3'"),
        (lambda: WithConvex(QUADRATIC, 0), ValueError, "dim: expected an integer >= 1, got 0"),
        (lambda: Mixture([]), ValueError, "tasks: expected at least one"),
        (lambda: Mixture(QUADRATIC), TypeError, "tasks: expected a sequence of tasks"),
        (lambda: Mixture([QUADRATIC, Quadratic()]), ValueError, "float64 on cpu.*and.*float32 on cpu"),
        (lambda: Mixture([QUADRATIC, in_parts()]), ValueError, "parts first, last"),
        (lambda: Mixture([QUADRATIC], [1, 2]), ValueError, "weights: expected 1 finite numbers > 0"),
        (lambda: Mixture([QUADRATIC], [0]), ValueError, "weights: expected 1 finite numbers > 0"),
        (lambda: Mixture([QUADRATIC], ["a"]), TypeError, "weights: expected"),
        (lambda: RandomNetworks(kinds=("mlp",)), ValueError, "kinds: expected some of image-mlp"),
        (lambda: RandomNetworks(kinds="image-mlp"), TypeError, "kinds: expected a sequence"),
    ],
)
def test_bad_arguments_are_named(make, error, message):
    with pytest.raises(error, match=message):
        make()


def test_mixtures_in_mixtures_choose_anew_at_each_level():
    few = [Quadratic(dim=dim, batch=1) for dim in (2, 3, 4, 5)]
    nested = Mixture([Mixture(few[:2]), Scaled(Mixture(few[2:]), 1.0)])
    found = Counter(nested.sample(problem_seed(0, "train", i)).theta0.numel() for i in range(800))
    assert all(140 < found[dim] < 260 for dim in (2, 3, 4, 5))


def test_wrappers_in_wrappers_of_their_kind_draw_anew():
    seed, alone = 3, Quadratic(dim=4, batch=1)
    start = alone.sample(seed).theta0
    once, twice = (task.sample(seed).theta0 for task in (Scaled(alone, 1), Scaled(Scaled(alone, 1), 1)))
    assert not torch.allclose(start / once, once / twice)
    problem = WithConvex(WithConvex(alone, 3), 3).sample(seed)
    theta = problem.theta0.clone().requires_grad_()
    gradient = value_and_grad(problem, theta, 0)[1]
    assert not torch.equal(gradient[4:7], gradient[7:])


def test_scales_that_a_dtype_cannot_hold_are_refused():
    task = Scaled(Digits(hidden=(2,), dtype=torch.float16), 20)
    with pytest.raises(ValueError, match=r"r: expected scales that torch\.float16 can hold, got 20"):
        task.sample(0)


# Spikes


@pytest.mark.parametrize("task", TASKS)
def test_spikes_multiply_gradients_at_some_steps_and_nothing_else(task):
    """Second derivatives too; losses are the same to the bit."""
    task = TASKS[task]
    plain, spiked = task.sample(3), Spiked(task, 0.3, 7.0).sample(3)
    assert is_pure(spiked) == is_pure(plain)
    assert spiked.parts == plain.parts
    found = []
    for step in range(200):
        (loss, gradient), (spiked_loss, spiked_gradient) = (
            value_and_grad(problem, plain.theta0, step) for problem in (plain, spiked)
        )
        assert torch.equal(loss, spiked_loss)
        factor = 7.0 if spiked_gradient.norm() > 2 * gradient.norm() else 1.0
        torch.testing.assert_close(spiked_gradient, factor * gradient, rtol=1e-12, atol=1e-14)
        found.append(factor)
    assert 0.2 < sum(factor == 7 for factor in found) / 200 < 0.4
    step = found.index(7.0)
    direction = torch.ones_like(plain.theta0)
    curvature, steeper = (
        torch.autograd.functional.hvp(lambda theta, one=one: one.loss(theta, step), plain.theta0, direction)[1]
        for one in (plain, spiked)
    )
    torch.testing.assert_close(steeper, 7 * curvature)


def test_spikes_differ_from_problem_to_problem_and_spare_second_minibatches():
    def hits(task, seed, first):
        problem = task.sample(seed)
        gradients = [value_and_grad(problem, problem.theta0, first + step)[1] for step in range(100)]
        return [(gradient / gradients[0]).abs().mean().item() for gradient in gradients]

    task = Spiked(QUADRATIC, 0.5, 100.0)
    assert hits(task, 0, 0) == hits(task, 0, 0) != hits(task, 1, 0)
    assert set(hits(task, 0, SECOND_MINIBATCHES)) == {1.0}
    assert hits(Spiked(task, 0.5, 100.0), 0, 0) != hits(task, 0, 0)  # of the outer one, other steps


def test_spiked_problems_go_side_by_side():
    task = Spiked(QUADRATIC, 0.5)
    alone = [task.sample(seed) for seed in (0, 1)]
    together = batch(alone)
    assert is_pure(together)
    for step in range(5):
        gradients = [value_and_grad(one, one.theta0, step)[1] for one in alone]
        found = value_and_grad(together, together.theta0, step)[1]
        torch.testing.assert_close(found, torch.cat(gradients))


@pytest.mark.parametrize(
    ("options", "kind", "message"),
    [
        ({"share": 1.5}, ValueError, "share: expected a number from 0 to 1, got 1.5"),
        ({"share": float("nan")}, ValueError, "share: expected a number from 0 to 1, got nan"),
        ({"share": "0.1"}, TypeError, "share: expected a number from 0 to 1, got '0.1'"),
        ({"factor": 0.0}, ValueError, "factor: expected a number > 0 and at most 1e30, got 0.0"),
        ({"factor": float("inf")}, ValueError, "factor: expected a number > 0 and at most 1e30, got inf"),
    ],
)
def test_spikes_that_make_no_sense_are_refused(options, kind, message):
    with pytest.raises(kind, match=message):
        Spiked(QUADRATIC, **options)


# Random networks


@pytest.mark.parametrize("kind", RandomNetworks().kinds)
def test_random_networks_of_every_kind_keep_the_contract_and_can_be_learned(kind):
    task = RandomNetworks(kinds=(kind,))
    sizes = set()
    for seed in range(4):
        problem = task.sample(seed)
        check_start(problem)
        again = task.sample(seed)
        assert torch.equal(problem.theta0, again.theta0)
        assert torch.equal(*(value_and_grad(one, one.theta0, 3)[0] for one in (problem, again)))
        sizes.add(problem.theta0.numel())
    assert len(sizes) > 1
    theta = problem.theta0.clone().requires_grad_()
    optimizer = torch.optim.Adam([theta], lr=0.01)
    losses = []
    for step in range(200):
        loss, theta.grad = value_and_grad(problem, theta, step)
        losses.append(loss)
        optimizer.step()
    assert sum(losses[-20:]) < 0.95 * sum(losses[:20])


@pytest.mark.parametrize("kind", RandomNetworks().kinds)
def test_random_networks_are_the_same_in_all_surroundings(kind):
    task = RandomNetworks(kinds=(kind,))
    expected = task.sample(1)
    before = torch.get_default_dtype()
    try:
        torch.set_default_dtype(torch.float64)
        with torch.autocast("cpu", torch.bfloat16), torch.device("meta"):
            problem = task.sample(1)
    finally:
        torch.set_default_dtype(before)
    assert torch.equal(problem.theta0, expected.theta0)
    assert torch.equal(value_and_grad(problem, problem.theta0, 2)[1], value_and_grad(expected, expected.theta0, 2)[1])


def test_random_networks_leave_torch_s_random_numbers_alone():
    before = torch.get_rng_state()
    RandomNetworks().sample(0)
    assert torch.equal(before, torch.get_rng_state())
