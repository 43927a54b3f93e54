"""Figure 7: what is trained on what, and how accurate the networks are that come of it."""

from __future__ import annotations

import pytest
from helpers import random_rule

from fastl2l import Trajectory, baselines, experiments
from fastl2l.experiments import accuracies, cifar, recipes
from fastl2l.experiments.experiment import Budget, Experiment, Panel
from fastl2l.files import read_record, write_record
from fastl2l.tasks import Digits, Quadratic
from fastl2l.tasks.base import problem_seed

TASK = Digits(hidden=(4,), batch_size=16, split="test")


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("FASTL2L_CACHE", str(tmp_path / "cache"))


def test_lstm_sub_has_not_seen_what_it_is_shown_on():
    for labels in (cifar.FIVE, cifar.TWO):
        assert not set(labels) & set(recipes.OTHER_LABELS)
    sub = recipes.RECIPES["lstm-cifar-sub"]
    assert sub.options["labels"] == sub.init.options["labels"] == recipes.OTHER_LABELS
    assert "--labels 5,6,7,8,9" in sub.commands[0]


def test_networks_are_trained_on_images_that_rules_have_not_seen():
    for experiment in cifar.EXPERIMENTS:
        assert {panel.task.keywords["split"] for panel in experiment.panels} == {"test"}
        assert experiment.rules - {"rnnprop-long"} <= recipes.RECIPES.keys()
    assert all("split" not in recipes.RECIPES[name].options for name in experiments.by_name("fig7").rules)


def test_one_rule_and_two_are_trained_alike_but_for_that():
    pair, one = recipes.RECIPES["lstm-cifar"], recipes.RECIPES["lstm-cifar-one"]
    assert (pair.by_part, pair.init.by_part, one.by_part, one.init.by_part) == (True, True, False, False)
    assert (pair.training, pair.epochs, pair.init.training) == (one.training, one.epochs, one.init.training)
    assert ["--by-part" in command for command in (*pair.commands, *one.commands)] == [True, True, False, False]


def shares(optimizer, runs=2):
    return accuracies.accuracies(TASK, {"it": optimizer}, steps=5, runs=runs)["it"]


def test_accuracy_is_that_of_the_images_that_were_not_trained_on():
    rule = random_rule("log_sign")
    for optimizer, theta in ((rule, None), (baselines.SGD(0.5), 0.5)):
        expected = []
        for number in range(2):
            problem = TASK.sample(problem_seed(1, "test", number))
            if theta is None:
                trajectory = Trajectory(problem, rule)
                for _ in range(5):
                    trajectory.advance()
                final = trajectory.theta
            else:
                final = problem.theta0.clone()
                for step in range(5):
                    leaf = final.detach().requires_grad_()
                    problem.loss(leaf, step).backward()
                    final = final - theta * leaf.grad
            expected.append(problem.accuracy(final, "train"))
        assert shares(optimizer) == pytest.approx(expected, abs=2e-3)


def test_a_network_that_is_lost_has_none():
    assert shares(baselines.SGD(1e38)) == [0.0, 0.0]


def test_what_is_known_is_not_measured_again(monkeypatch):
    rule = random_rule("log_sign")
    first = shares(rule, runs=1)
    monkeypatch.setattr(accuracies, "way", lambda *_: pytest.fail("measured again"))
    assert shares(rule, runs=1) == first


def panel(task=TASK, **options):
    few = Budget(2, 1, piece=1)
    return Panel("one", "a panel", lambda: task, {"lstm": "mine"}, steps=5, baselines=("sgd",), full=few, **options)


def reproduced(tmp_path, **options):
    experiment = Experiment("small", "A small one", "nothing.", [panel(**options)])
    rules = {"mine": random_rule("log_sign")}
    experiments.reproduce(experiment, tmp_path, rules=rules, progress=False)
    return (tmp_path / "small" / "table.md").read_text()


def test_accuracies_stand_below_the_losses(tmp_path):
    told = reproduced(tmp_path, accuracy_runs=2)
    assert "Images not trained on that are classified rightly, mean of 2 networks." in told
    rows = [line.split("|")[1:3] for line in told.splitlines()[-2:]]
    assert {name.strip() for name, _ in rows} == {"lstm", "sgd"}
    assert all(0 < float(share.strip().rstrip("%")) < 100 for _, share in rows)
    assert "classified" not in reproduced(tmp_path)


def test_accuracies_want_images(tmp_path):
    with pytest.raises(TypeError, match="panel 'one': expected a task of images for accuracies, got 'quadratic'"):
        reproduced(tmp_path, task=Quadratic(dim=2, batch=2), accuracy_runs=1)


@pytest.mark.parametrize("share", ["inf", 1.5, "high", None])
def test_a_kept_share_that_is_none_is_measured_anew(share, tmp_path, monkeypatch):
    rule = random_rule("log_sign")
    first = shares(rule, runs=1)
    (path,) = (tmp_path / "cache" / "accuracies").glob("*.json")
    record = read_record(path, accuracies.SHARES.format)
    write_record(path, record | {"share": share})
    with pytest.warns(RuntimeWarning, match="expected a share"):
        assert shares(rule, runs=1) == first
