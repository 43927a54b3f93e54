"""What is seen inside a rule is what happened, and what would have."""

from __future__ import annotations

import copy
import csv
import json

import pytest
import torch
from helpers import random_rule
from PIL import Image
from typer.testing import CliRunner

from fastl2l import RNNpropRule, cli, tasks
from fastl2l.inside import SATURATED, look
from fastl2l.tasks.base import problem_seed, value_and_grad
from fastl2l.trajectory import Trajectory

RATES = {"sgd": 0.05, "adam": 0.03}
TASK = tasks.Quadratic(dim=4, batch=3, dtype=torch.float64)
RULES = {"lstm": random_rule("log_sign", seed=3).double(), "rnnprop": RNNpropRule(seed=4, dtype=torch.float64)}


@pytest.fixture(params=RULES)
def rule(request):
    return RULES[request.param]


def seen(rule, task=TASK, **options):
    return look(rule, task, **({"steps": 8, "rates": RATES, "coordinates": [1, 10], "at": [0, 5]} | options))


def followed(problem, rule, steps):
    """The rule's trajectory, step by step: gradients, updates and trajectories before each step."""
    trajectory, gradients, updates, before = Trajectory(problem, rule), [], [], []
    for step in range(steps):
        gradients.append(value_and_grad(problem, trajectory.theta, step)[1])
        before.append((copy.deepcopy(trajectory.states), trajectory.theta.clone()))
        trajectory.advance()
        updates.append(trajectory.theta - before[-1][1])
    return torch.stack(gradients), torch.stack(updates), before


def test_updates_are_those_of_the_optimizers_on_the_same_iterates(rule):
    found = seen(rule)
    problem = TASK.sample(problem_seed(1, "test", 0))
    gradients, updates, _ = followed(problem, rule, 8)
    torch.testing.assert_close(found.gradients, gradients[:, [1, 10]])
    torch.testing.assert_close(found.updates["rule"], updates[:, [1, 10]])
    theta = torch.zeros(12, dtype=torch.float64, requires_grad=True)
    adam = torch.optim.Adam([theta], lr=RATES["adam"])
    for step in range(8):
        before, theta.grad = theta.detach().clone(), gradients[step]
        adam.step()
        proposed = (theta.detach() - before)[[1, 10]]
        torch.testing.assert_close(found.updates["adam"][step], proposed, rtol=1e-6, atol=1e-12)
        torch.testing.assert_close(found.updates["sgd"][step], -RATES["sgd"] * gradients[step, [1, 10]])
    torch.testing.assert_close(found.sizes["rule"], updates.square().mean(1).sqrt())
    assert len(found.losses) == 9


def test_responses_hold_the_history(rule):
    """What a step would have been with another gradient of this coordinate, and everything before as it was."""
    found = seen(rule)
    problem = TASK.sample(problem_seed(1, "test", 0))
    gradients, _, before = followed(problem, rule, 8)
    for (coordinate, step), curve in found.responses.items():
        assert found.actual[coordinate, step] == pytest.approx(gradients[step, coordinate].item())
        for number in (0, 60, 101, 200):
            trajectory = Trajectory(problem, rule)
            states, theta = before[step]
            trajectory.states[0].copy_(states[0])
            other = gradients[step].clone()
            other[coordinate] = curve["gradient"][number]
            after = theta.clone()
            trajectory._propose(other, after)
            expected = (after - theta)[coordinate]
            torch.testing.assert_close(curve["rule"][number], expected, rtol=1e-7, atol=1e-10)

            x = torch.zeros(1, dtype=torch.float64, requires_grad=True)
            adam = torch.optim.Adam([x], lr=RATES["adam"])
            for earlier in range(step):
                x.grad = gradients[earlier, coordinate, None].clone()
                adam.step()
            start, x.grad = x.detach().clone(), curve["gradient"][number, None].clone()
            adam.step()
            torch.testing.assert_close(curve["adam"][number], (x.detach() - start)[0], rtol=1e-6, atol=1e-12)
    assert set(found.responses) == {(c, t) for c in (1, 10) for t in (0, 5)}


def test_saturation_is_counted_over_all_cells(rule):
    found = seen(rule, steps=3, at=[0])
    trajectory = Trajectory(TASK.sample(problem_seed(1, "test", 0)), rule)
    for step in range(3):
        trajectory.advance()
        rows = trajectory.state.permute(1, 0, 2).flatten(1)[:, :12]
        cells = {"layer 1": rows[20:40], "layer 2": rows[60:80]}
        for layer, c in cells.items():
            assert found.saturation[layer][step].item() == (c.tanh().abs() > SATURATED).double().mean().item()


class Halves(tasks.Quadratic):
    """Quadratics whose coordinates are two parts."""

    def sample(self, seed):
        problem = super().sample(seed)
        problem.parts = {"first": 5, "rest": 7}
        return problem


def test_rules_by_part_are_seen_each(tmp_path):
    rules = {"rest": RULES["lstm"], "first": RULES["rnnprop"]}  # in another order than the parts
    task = Halves(dim=4, batch=3, dtype=torch.float64)
    found = seen(rules, task, coordinates=[4, 6])
    assert set(found.saturation) == {f"{part}, layer {n}" for part in rules for n in (1, 2)}
    problem = task.sample(problem_seed(1, "test", 0))
    trajectory = Trajectory(problem, rules)
    for coordinate, part in ((4, "first"), (6, "rest")):
        assert trajectory.at(coordinate)[0] is rules[part]
        curve = found.responses[coordinate, 0]
        gradient = torch.zeros(12, dtype=torch.float64)
        gradient[coordinate] = curve["gradient"][150]
        after = torch.zeros_like(gradient)
        Trajectory(problem, rules)._propose(gradient, after)
        assert curve["rule"][150].item() == pytest.approx(after[coordinate].item(), rel=1e-7)
    found.draw(tmp_path, title="parts")


def test_defaults_and_tuned_rates(tmp_path, monkeypatch):
    monkeypatch.setenv("FASTL2L_CACHE", str(tmp_path))
    found = look(RULES["lstm"], TASK, steps=40, rates={"adam": 0.03})
    assert len(found.coordinates) == 3
    assert found.response_steps == [1, 4, 10, 20, 39]
    assert found.metadata["rates"]["adam"] == 0.03
    assert 1e-4 < found.metadata["rates"]["sgd"] < 1
    single = look(RULES["lstm"], tasks.Quadratic(dim=1, batch=2, dtype=torch.float64), steps=1, rates=RATES)
    assert single.coordinates == [0, 1]
    assert single.response_steps == [0]


def test_the_command_draws_and_writes(tmp_path):
    words = ["inspect", "--rule", "lstm-quadratic", "--task", "quadratic", "--steps", "6", "--coordinates", "3,700"]
    words += ["--at", "1,4", "--sgd-lr", "0.01", "--adam-lr", "0.1", "--out", str(tmp_path)]
    told = CliRunner().invoke(cli.app, words, catch_exceptions=False)
    assert told.exit_code == 0
    names = ["updates.png", "responses-3.png", "responses-700.png", "state.png"]
    assert all(Image.open(tmp_path / name).width > 900 for name in names)
    assert all(name in told.stdout for name in names)
    rows = list(csv.reader((tmp_path / "responses.csv").open()))
    assert rows[0] == ["coordinate", "step", "gradient", "rule", "sgd", "adam"]
    assert len(rows) == 1 + 2 * 2 * 201
    assert len(list(csv.reader((tmp_path / "state.csv").open()))) == 1 + 6
    assert json.loads((tmp_path / "inside.json").read_text())["rates"] == {"sgd": 0.01, "adam": 0.1}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"steps": 0}, "steps: expected an integer >= 1, got 0"),
        ({"coordinates": [12]}, r"coordinates: expected some of 0 to 11, each once, got \[12\]"),
        ({"coordinates": [1, 1]}, "coordinates: expected some of 0 to 11, each once"),
        ({"coordinates": [-1]}, "coordinates: expected an integer >= 0, got -1"),
        ({"at": [8]}, r"at: expected some of the steps 0 to 7, got \[8\]"),
        ({"rates": {"nag": 1.0}}, "rates: expected some of sgd, adam, got 'nag'"),
        ({"rates": {"sgd": -1.0}}, "lr: expected"),
        ({"task": 3}, "task: expected a fastl2l Task, got int"),
    ],
)
def test_bad_input_is_named(options, message):
    with pytest.raises((ValueError, TypeError), match=message):
        seen(RULES["lstm"], **options)


def test_a_rule_that_diverges_is_an_error():
    wild = RNNpropRule(output_scale=1e300, seed=1, dtype=torch.float64)
    with pytest.raises(ValueError, match="rule: expected one that stays finite, got a loss of"):
        seen(wild)
