"""Networks of one's own: the problems, what is kept of them, the tuning, and what is told."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from helpers import random_rule
from PIL import Image
from torch import nn
from typer.testing import CliRunner

from fastl2l import baselines, cli, experiments, save_rule
from fastl2l.evaluate import builder
from fastl2l.experiments import own_networks, own_networks_losses, own_networks_problems
from fastl2l.experiments.own_networks import Effort, OwnNetworks
from fastl2l.experiments.own_networks_losses import descend, tuned, whole_losses
from fastl2l.experiments.own_networks_problems import PROBLEMS, OwnNetwork
from fastl2l.files import read_record
from fastl2l.tasks.base import fingerprint, problem_seed

SMALL = {
    name: OwnNetwork(f"a {name} one", lambda: nn.Linear(3, 1), F.mse_loss, lambda: (torch.eye(3), torch.ones(3, 1)), 2)
    for name in ("first", "second")
}
RULES = {"mine": random_rule("raw", seed=1), "lstm-mnist": random_rule("raw", seed=2)}


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("FASTL2L_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def descended(monkeypatch):
    """The horizons of every run that is really made."""
    made, descend = [], own_networks_losses.descend

    def spy(problem, build, at):
        made.append(at)
        return descend(problem, build, at)

    monkeypatch.setattr(own_networks_losses, "descend", spy)
    return made


@pytest.fixture
def small(monkeypatch):
    efforts = {3: Effort(runs=2, tuning_runs=1, rates=range(-8, 1, 4), refined=True), 6: Effort(runs=1, tuning_runs=1)}
    for module in (own_networks, own_networks_problems):
        monkeypatch.setattr(module, "PROBLEMS", SMALL)
    monkeypatch.setattr(own_networks, "FULL", efforts)
    monkeypatch.setattr(own_networks, "QUICK", {3: efforts[3]._replace(runs=1, problems=["first"])})
    monkeypatch.setattr(own_networks_losses, "HORIZONS", (3, 6))


# The problems


@pytest.mark.parametrize("name", PROBLEMS)
def test_a_problem_can_be_trained_and_looked_at_whole(name):
    task = PROBLEMS[name].task(name)
    problem = task.sample(1)
    start = problem.whole_loss(problem.theta0).item()
    (after,) = descend(problem, baselines.Adam(3e-3).build, [60])
    assert 0 < after < start < 20
    assert problem.theta0.numel() < 30_000
    assert task.spec()["data"] == fingerprint(*PROBLEMS[name].data())


def test_problems_are_many_and_none_of_the_digits():
    assert len(own_networks_problems.own_networks()) == len(PROBLEMS) >= 14
    assert not any(
        inputs.shape[1:] in {(64,), (1, 8, 8)} and targets.dtype == torch.int64
        for inputs, targets in (problem.data() for problem in PROBLEMS.values())
    )


def test_standardised_numbers_do_not_depend_on_how_they_are_summed():
    x = torch.rand(500_001)
    shuffled = torch.randperm(len(x) - 1)
    for dim in (0, None):
        expected = own_networks_problems.standardised(x[1:], dim)
        assert abs(expected.mean()) < 1e-4
        assert abs(expected.std() - 1) < 1e-4
        assert torch.equal(own_networks_problems.standardised(x[1:][shuffled], dim), expected[shuffled])


def test_a_text_is_the_one_it_should_be(monkeypatch):
    inputs, targets = own_networks_problems.text(own_networks_problems.zen, 10, 1)
    assert torch.equal(inputs[1:], targets[:-1])
    monkeypatch.setitem(own_networks_problems._TEXTS, own_networks_problems.zen, "0" * 64)
    with pytest.raises(ValueError, match=r"zen: expected a text of SHA-256 000.*, got one of e250"):
        own_networks_problems.text(own_networks_problems.zen, 10, 1)


# Runs


def test_losses_are_those_of_the_whole_data_set():
    task = SMALL["first"].task("first")
    problem = task.sample(problem_seed(1, "test", 4))
    theta = problem.theta0.clone().requires_grad_()
    optimizer = torch.optim.SGD([theta], lr=0.1)
    for step in range(3):
        optimizer.zero_grad()
        problem.loss(theta, step).backward()
        optimizer.step()
    assert whole_losses(task, baselines.SGD(0.1), 3, [4]) == [problem.whole_loss(theta).item()]
    assert whole_losses(task, baselines.SGD(0.1), 3, [5]) != whole_losses(task, baselines.SGD(0.1), 3, [4])
    assert whole_losses(task, baselines.SGD(0.1), 3, [4], "tune") != whole_losses(task, baselines.SGD(0.1), 3, [4])


def test_a_run_that_diverges_is_inf_from_there_on():
    problem = SMALL["first"].task("first").sample(0)
    early, *late = descend(problem, baselines.SGD(1e9).build, [1, 100, 200])
    assert early < math.inf
    assert late == [math.inf, math.inf]


def test_what_was_computed_is_kept_at_every_horizon(descended):
    task, rule = SMALL["first"].task("first"), random_rule("raw")
    (long,) = whole_losses(task, rule, 1000, [0])
    (short,) = whole_losses(task, rule, 100, [0])
    assert descended == [[100, 1000]]
    assert short == descend(task.sample(problem_seed(1, "test", 0)), builder("", rule), [100])[0]
    assert whole_losses(SMALL["first"].task("first"), rule, 1000, [0]) == [long]
    assert len(descended) == 1
    whole_losses(task, random_rule("raw", seed=3), 100, [0])
    whole_losses(task, rule, 100, [1])
    whole_losses(SMALL["first"].task("other"), rule, 100, [0])
    assert len(descended) == 4


def test_a_damaged_file_is_computed_anew(tmp_path, descended):
    task = SMALL["first"].task("first")
    for rate in (0.1, 1e9):
        losses = whole_losses(task, baselines.SGD(rate), 100, [0])
        (path,) = (tmp_path / "cache" / "own-networks").iterdir()
        good = path.read_bytes()
        for damaged in (b"", good[:-9], good.replace(b'"steps": 100', b'"steps": 101'), b"[" * 10**5):
            assert damaged != good
            path.write_bytes(damaged)
            with pytest.warns(RuntimeWarning, match=f"{path.name}: .*; it is computed anew"):
                assert whole_losses(task, baselines.SGD(rate), 100, [0]) == losses
            assert path.read_bytes() == good
        assert whole_losses(task, baselines.SGD(rate), 100, [0]) == losses
        path.unlink()
    assert len(descended) == 10


# Tuning


@pytest.mark.parametrize(("best", "tried"), [(-6, {*range(-8, 1, 2), -7, -5}), (-11, {*range(-14, 1, 2), -13, -11})])
def test_tuning_goes_beyond_an_end_and_between(best, tried, monkeypatch):
    finals = {own_networks_losses.rate(number): 1 + abs(number - best) for number in range(-40, 41)}
    monkeypatch.setattr(
        own_networks_losses, "whole_losses", lambda task, one, steps, runs, purpose: [finals[one.lr]] * len(runs)
    )
    found, seen = tuned(SMALL["first"].task("first"), baselines.NAG(), 10, range(-8, 1, 2), runs=2)
    assert found == baselines.NAG(own_networks_losses.rate(best))
    assert set(seen) == {own_networks_losses.rate(number) for number in tried}
    assert seen[found.lr] == 1


def test_tuning_says_when_nothing_works(monkeypatch):
    monkeypatch.setattr(own_networks_losses, "whole_losses", lambda *_: [math.inf])
    with pytest.raises(ValueError, match="task 'first': nag diverges at every learning rate"):
        tuned(SMALL["first"].task("first"), baselines.NAG(), 10, [0], runs=1)


# What is told


def run(tmp_path, rules=RULES, **options):
    return OwnNetworks().run(tmp_path, rules=rules, progress=False, **{"quick": False} | options)


@pytest.mark.usefixtures("small")
def test_everything_is_written(tmp_path):
    told = run(tmp_path)
    folder = tmp_path / "own-networks"
    assert any(line.startswith("mine, 6 steps, 2 problems: mean ratio ") for line in told)
    assert any(line.startswith("3 steps: mean of 2 starts; tuned on 1 other: 3 rates from 0.01 to 1") for line in told)
    assert Image.open(folder / "figure.png").width == 2 * 920
    table = (folder / "table.md").read_text()
    for words in ("| second  | 6     |", "a second one", "| mine ", "below lstm-mnist", "gradient"):
        assert words in table
    record = read_record(folder / "results.json", own_networks.FORMAT)
    assert len(record["results"]) == 4
    first = record["results"][0]
    task = SMALL["first"].task("first")
    assert first["losses"]["mine"] == whole_losses(task, RULES["mine"], 3, range(2))
    assert first["losses"]["adam"] == whole_losses(task, baselines.Adam(first["rates"]["adam"]), 3, range(2))
    assert len(first["tried"]["nag"]) >= 5


@pytest.mark.usefixtures("small")
def test_a_quick_run_has_its_own_folder_and_says_so(tmp_path):
    run(tmp_path, quick=True)
    assert "a quick look" in (tmp_path / "own-networks-quick" / "table.md").read_text()
    assert not (tmp_path / "own-networks").exists()


@pytest.mark.usefixtures("small")
def test_another_rule_runs_alone_and_a_stopped_run_goes_on(tmp_path, monkeypatch, descended):
    run(tmp_path)
    before = len(descended)
    run(tmp_path, rules=RULES | {"another": random_rule("raw", seed=5)})
    assert descended[before:] == [[3], [3], [3, 6]] * 2
    spied = own_networks_losses.descend
    monkeypatch.setenv("FASTL2L_CACHE", str(tmp_path / "second cache"))
    done = len(descended)

    def stopped(*args):
        if len(descended) == done + 10:
            raise KeyboardInterrupt
        return spied(*args)

    monkeypatch.setattr(own_networks_losses, "descend", stopped)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path)
    assert len(descended) - done == 10
    monkeypatch.setattr(own_networks_losses, "descend", spied)
    run(tmp_path)
    assert len(descended) - done == before


@pytest.mark.usefixtures("small")
def test_rules_that_diverge_are_told_of(tmp_path):
    wild = random_rule("raw", seed=1, output_scale=1e30)
    told = run(tmp_path, rules={"wild": wild})
    assert any(line.startswith("wild, 3 steps") and "mean ratio inf" in line for line in told)
    assert "| diverged" in (tmp_path / "own-networks" / "table.md").read_text()


@pytest.mark.usefixtures("small")
def test_names_of_optimizers_are_not_those_of_rules(tmp_path):
    with pytest.raises(
        ValueError, match="rules: expected other names than adam, nag, rmsprop, adam-default, got 'nag'"
    ):
        run(tmp_path, rules={"nag": RULES["mine"]})
    assert list(tmp_path.iterdir()) == []


@pytest.mark.usefixtures("small")
def test_the_command_takes_rules_of_any_name(tmp_path):
    save_rule(RULES["mine"], tmp_path / "mine.safetensors")
    words = ["reproduce", "own-networks", "--rule", f"my-own={tmp_path / 'mine.safetensors'}", "--out", str(tmp_path)]
    done = CliRunner().invoke(cli.app, words, catch_exceptions=False)
    assert done.exit_code == 0
    assert "my-own, 6 steps, 2 problems" in done.stdout


def test_rules_that_are_shipped_are_compared():
    assert "lstm-mnist" in experiments.by_name("own-networks").rules <= set(own_networks.RULES)


def test_losses_of_0_and_runs_that_diverged_have_a_ratio():
    def result(adam, mine):
        return own_networks.Result("a", 1, 3, {"adam": [adam], "mine": [mine]}, {}, {"adam": 0.1})

    pairs = [(0.0, 0.0), (0.0, 1.0), (1.0, 0.0), (math.inf, 1.0), (1.0, math.inf), (math.inf, math.inf)]
    assert [result(*pair).ratio("mine") for pair in pairs] == [1, math.inf, 0, 0, math.inf, 1]
    told = own_networks._summary([result(1.0, 0.0), result(1.0, 4.0)], [])
    assert told[1][:6] == ["mine", "3", "2", "0", "4", "1"]
    assert own_networks._summary([result(math.inf, math.inf)], [])[1][-1] == "1"
