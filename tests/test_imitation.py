"""Meta-training on the way of a teacher, and with horizons that are drawn or rise."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from helpers import errors, rule_of
from small_training import SMALL, TASK, finished, outcome, small_rule, trainer
from test_trajectory import TEXTS, Waves

from fastl2l import MetaTrainer, Trajectory, reference, tasks
from fastl2l.baselines import BFGS, Adam, descend
from fastl2l.meta import Imitation, train_by_curriculum
from fastl2l.meta.imitation import TaughtTrajectory
from fastl2l.tasks.base import problem_seed, value_and_grad

F64 = torch.float64


def sgd(params):
    return torch.optim.SGD(params, lr=0.01, momentum=0.5)


# Imitation


@pytest.mark.parametrize("text", TEXTS)
def test_what_is_lowered_is_the_distance_to_the_teacher_s_updates(text):
    problem, rule = Waves(), rule_of(text, dtype=F64)
    trajectory = TaughtTrajectory(problem, rule, sgd)
    weights = [1.0, 0.0, 2.0, 1.0]
    windows = [trajectory.window(weights) for _ in range(2)]
    losses = descend(problem, sgd, 8)
    torch.testing.assert_close(torch.cat([window.losses for window in windows]), losses[1:])

    theta = problem.theta0.clone().requires_grad_()
    teacher, state = sgd([theta]), torch.zeros(rule.config.state_rows, theta.numel(), dtype=F64)
    for window in range(2):
        distances, sizes = [], []
        for step in range(4 * window, 4 * window + 4):
            before = theta.detach().clone()
            _, theta.grad = value_and_grad(problem, theta, step)
            update, state = reference.step(theta.grad.clone(), state, rule.weights(), text, rule.config.output_scale)
            teacher.step()
            taught = theta.detach() - before
            distances.append((update - taught).square().sum())
            sizes.append(taught.square().sum())
        objective = sum(w * d for w, d in zip(weights, distances, strict=True)) / (sum(sizes) / 4)
        gradients = torch.autograd.grad(objective, rule.weights(), materialize_grads=True)
        truth = torch.cat([gradient.flatten() for gradient in gradients])
        assert errors(windows[window].gradients, truth)["largest"] < 1e-9
        state = state.detach()


def test_a_rule_can_learn_its_teacher():
    rule = small_rule(hidden_size=8)
    imitation = Imitation([sgd], share=1.0)
    options = {"trajectories": 20, "horizon": 16, "unroll": 8, "imitation": imitation, "keep": "last"}

    def distance():
        total = 0.0
        for seed in range(5):
            problem = TASK.sample(problem_seed(0, "test", seed))
            trajectory = TaughtTrajectory(problem, rule, sgd)
            before = trajectory.theta.clone()
            update = torch.zeros_like(before)
            trajectory._propose(trajectory._gradient, update)
            taught = trajectory._follow()
            total += ((update - taught).norm() / taught.norm()).item() / 5
        return total

    before = distance()
    trained = MetaTrainer(rule, TASK, **SMALL | options | {"meta_lr": 3e-3})
    trained.fit(15, progress=False)
    assert distance() < 0.3 * before
    assert all(epoch.train_loss != epoch.train_loss for epoch in trained.history)  # no trajectory was the rule's own


def test_a_share_of_the_trajectories_is_taught():
    imitation = Imitation([Adam(lr=0.1), sgd], share=0.25)
    teachers = [imitation.teacher(problem_seed(0, "train", i)) for i in range(400)]
    assert 70 < sum(teacher is not None for teacher in teachers) < 130
    assert 25 < sum(teacher is sgd for teacher in teachers) < 75
    assert Imitation([sgd], share=0).teacher(0) is None


def test_imitation_goes_on_to_the_same_bits_and_is_part_of_a_run_s_settings(tmp_path):
    options = {"imitation": Imitation([Adam(lr=0.1)], 0.5), "horizon": (4, 16)}
    whole = finished(trainer(**options), 3)
    for epochs in (1, 3):
        parts = trainer(checkpoint=tmp_path / "run.pt", **options)
        parts.fit(epochs, progress=False)
    assert outcome(parts) == whole
    settings = [trainer(**change).settings() for change in ({}, options, {"imitation": Imitation([sgd])})]
    assert len({json.dumps(setting, sort_keys=True) for setting in settings}) == 3
    with pytest.raises(ValueError, match="settings"):
        trainer(checkpoint=tmp_path / "run.pt", horizon=(4, 16))


def test_numpy_numbers_in_settings_leave_a_checkpoint_that_is_read(tmp_path):
    task = tasks.WithConvex(TASK, np.int64(3), np.float64(0.5))
    options = {"imitation": Imitation([Adam(lr=np.float64(0.01))], np.float64(0.5)), "checkpoint": tmp_path / "run.pt"}
    for epochs in (1, 2):
        rising = MetaTrainer(small_rule(), task, **SMALL, **options)
        rising.fit(epochs, progress=False)
    assert len(rising.history) == 2


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (([],), ValueError, "teachers: expected at least one"),
        (("adam",), TypeError, "teachers: expected a sequence of optimizers"),
        (([0.1],), TypeError, r"teachers\[0\]: expected an optimizer"),
        (([sgd, lambda params: params],), TypeError, r"teachers\[1\]: expected an optimizer.*returns"),
        (([Adam()],), ValueError, r"teachers\[0\]: expected a learning rate, got .tune."),
        (([torch.optim.LBFGS],), TypeError, r"teachers\[0\]: expected an optimizer that steps without a closure"),
        (([BFGS()],), TypeError, r"teachers\[0\]: expected an optimizer that steps without a closure, got bfgs"),
        (([sgd], 1.5), ValueError, "share: expected a number from 0 to 1, got 1.5"),
        (([sgd], "half"), TypeError, "share: expected a number from 0 to 1, got 'half'"),
    ],
)
def test_bad_teachers_are_named(arguments, error, message):
    with pytest.raises(error, match=message):
        Imitation(*arguments)


# Horizons


def test_horizons_are_drawn_log_uniformly_in_whole_windows():
    drawn = [4 * trainer(horizon=(4, 400))._windows(i) for i in range(600)]
    assert min(drawn) >= 4
    assert max(drawn) <= 400
    assert all(steps % 4 == 0 for steps in drawn)
    below = sum(steps < 40 for steps in drawn)
    assert 240 < below < 360


def test_objectives_in_logs_are_validated_by_the_geometric_mean_of_the_last_steps():
    run = trainer(log_floor=1e-2, horizon=20)
    losses = []
    for index in range(2):
        problem = TASK.sample(problem_seed(0, "validation", index))
        trajectory = Trajectory(problem, run.rule)
        losses.append(torch.stack([trajectory.advance() for _ in range(20)])[-2:])
    expected = (torch.stack(losses).double() + 1e-2).log().mean().exp()
    assert run.validate() == pytest.approx(expected.item(), rel=1e-6)


def test_training_stops_when_it_has_not_become_better_for_a_while():
    run = trainer(validation=[3.0, 2.0, 2.5, 1.0, 1.5, 1.0, 0.5, 0.1])
    assert len(run.fit(8, patience=2, progress=False)) == 6
    assert len(run.fit(8, patience=2, progress=False)) == 6  # as after a restart
    assert len(run.fit(8, patience=3, progress=False)) == 8


def test_a_curriculum_goes_through_its_horizons_and_on_from_where_it_was_killed(tmp_path, monkeypatch):
    options = SMALL | {"horizons": (4, 8, 16), "epochs": 3, "patience": 2, "progress": False}
    del options["horizon"]
    whole, parts = small_rule(), small_rule()
    stages = train_by_curriculum(whole, TASK, tmp_path / "whole", **options)
    assert [stage.horizon for stage in stages] == [4, 8, 16]

    validate, calls = MetaTrainer.validate, []

    def stopping(self):
        calls.append(self.validation_horizon)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return validate(self)

    monkeypatch.setattr(MetaTrainer, "validate", stopping)
    with pytest.raises(KeyboardInterrupt):
        train_by_curriculum(parts, TASK, tmp_path / "parts", **options)
    parts = small_rule()
    again = train_by_curriculum(parts, TASK, tmp_path / "parts", **options)
    assert repr(again) == repr(stages)
    assert all(map(torch.equal, parts.weights(), whole.weights()))
    assert set(calls) == {8, 16}


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"horizons": (8, 8)}, ValueError, r"horizons: expected rising numbers of steps, got \[8, 8\]"),
        ({"horizons": (16, 8)}, ValueError, "horizons: expected rising"),
        ({"horizons": (8, 10)}, ValueError, "horizons: expected whole windows of 4 steps, got 10"),
        ({"horizons": ()}, TypeError, "horizons: expected a sequence of rising"),
        ({"horizons": 8}, TypeError, "horizons: expected a sequence"),
        ({"unroll": 0}, ValueError, "unroll: expected an integer >= 1"),
        ({"horizons": (8,), "patience": 0}, ValueError, "patience: expected an integer >= 1"),
        ({"horizons": (8,), "horizon": 8}, ValueError, "horizon: expected none"),
    ],
)
def test_bad_curricula_are_named_before_anything_is_done(change, error, message, tmp_path):
    options = {name: value for name, value in SMALL.items() if name != "horizon"} | change
    with pytest.raises(error, match=message):
        train_by_curriculum(small_rule(), TASK, tmp_path, **options)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"horizon": (8,)}, ValueError, "horizon: expected a number of steps, or the least and the most"),
        ({"horizon": (16, 8)}, ValueError, "horizon: expected the least steps, then the most"),
        ({"horizon": (4, 10)}, ValueError, "unroll: expected a divisor of the horizon 10, got 4"),
        ({"log_floor": 0.0}, ValueError, "log_floor: expected"),
        (
            {"log_floor": 1e-3, "batch": 3, "pieces": 1},
            ValueError,
            "pieces: expected as many as the batch with log_floor",
        ),
        ({"validation_horizon": 0}, ValueError, "validation_horizon: expected an integer >= 1"),
        ({"imitation": sgd}, TypeError, "imitation: expected None or an Imitation"),
    ],
)
def test_bad_options_of_training_are_named(change, error, message):
    with pytest.raises(error, match=message):
        trainer(**change)
