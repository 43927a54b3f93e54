"""Experiments: what they compute is what `evaluate` says, nothing is computed twice, and a stop loses little."""

from __future__ import annotations

import itertools
import shlex
from functools import partial

import pytest
import safetensors.torch
import torch
from helpers import random_rule
from PIL import Image
from typer.testing import CliRunner

from fastl2l import GACRule, MetaTrainer, NTMRule, Trajectory, baselines, cli, evaluate, experiments, files, tasks
from fastl2l.evaluate import Curves
from fastl2l.experiments import andrychowicz2016, appendix_d, experiment, functions, losses, neural_art, recipes
from fastl2l.experiments.experiment import Budget, Experiment, Panel, Study
from fastl2l.meta import Epoch
from fastl2l.rules import all_weights, rules_by_part
from fastl2l.tasks import Digits, Quadratic
from fastl2l.tasks.base import problem_seed
from fastl2l.tasks.datasets import data_folder

REAL_MNIST = data_folder() / "MNIST"
SMALL = Quadratic(dim=2, batch=3)
RULES = {"lstm-quadratic": random_rule("raw")}


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("FASTL2L_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def followed(monkeypatch):
    """Every group of problems that is really computed."""
    calls, follow = [], losses.follow

    def spy(task, optimizer, steps, numbers, **options):
        calls.append((task, optimizer, steps, numbers))
        return follow(task, optimizer, steps, numbers, **options)

    monkeypatch.setattr(losses, "follow", spy)
    return calls


@pytest.fixture
def tuned(monkeypatch):
    """Steps, and losses that count, of every search of a learning rate."""
    calls, tune = [], baselines.tune

    def spy(task, baseline, steps, **options):
        calls.append((steps, options["last"]))
        return tune(task, baseline, steps, **options)

    monkeypatch.setattr(baselines, "tune", spy)
    return calls


LOOK = Budget(runs=10, tuning_runs=1)


def small(*names, units=None, study=None, last_tenth=False, look=LOOK, **options):
    options = {"steps": 3, "full": Budget(20, 1), "quick": look, "rules": {"lstm": "lstm-quadratic"}} | options
    panels = [
        Panel(name, f"panel {name}", lambda: SMALL, x=units and units[number], **options)
        for number, name in enumerate(names)
    ]
    return Experiment("small", "A small one", "nothing.", panels, names[:1], study, last_tenth)


def run(*names, tmp_path, quick=False, rules=RULES, **options):
    return experiments.reproduce(small(*names, **options), tmp_path / "out", rules=rules, quick=quick, progress=False)


def test_losses_are_those_of_evaluate(tmp_path):
    optimizers = {"lstm": RULES["lstm-quadratic"], "sgd": baselines.SGD(0.02)}
    found = losses.curves(SMALL, optimizers, steps=4, runs=20, tuning_runs=1)
    expected = evaluate(SMALL, optimizers, steps=4, runs=20)
    assert found.losses.keys() == expected.losses.keys()
    assert all(torch.equal(found.losses[name], expected.losses[name]) for name in optimizers)
    assert found.metadata == expected.metadata


def test_everything_is_written(tmp_path):
    results = run("one", "two", tmp_path=tmp_path)
    folder = tmp_path / "out" / "small"
    assert list(results) == ["one", "two"]
    assert results["one"].runs == 20
    assert set(results["one"].losses) == {"lstm", *baselines.DEFAULT}
    saved = Curves.load(folder / "two")
    assert all(torch.equal(saved.losses[name], results["two"].losses[name]) for name in saved.losses)
    table = (folder / "table.md").read_text()
    assert "## panel two" in table
    assert "| lstm" in table
    assert "lstm ends" in table
    assert Image.open(folder / "figure.png").width == 2 * 920  # two panels


def test_a_quick_run_says_so_and_has_its_own_folder(tmp_path):
    results = run("one", "two", tmp_path=tmp_path, quick=True)
    assert [results[name].runs for name in results] == [10]
    assert "quick: 10 problems" in (tmp_path / "out" / "small-quick" / "table.md").read_text()
    assert not (tmp_path / "out" / "small").exists()


def test_a_quick_run_tunes_for_fewer_steps_than_it_takes(tmp_path, tuned):
    results = run("one", tmp_path=tmp_path, quick=True, look=Budget(10, 1, tuning_steps=2))
    assert tuned == [(2, 1)] * len(baselines.DEFAULT)
    assert results["one"].losses["sgd"].shape == (10, 3 + 1)
    assert "rates tuned on 1 for 2 steps" in (tmp_path / "out" / "small-quick" / "table.md").read_text()


def test_what_was_computed_is_not_computed_again(tmp_path, followed):
    first = run("one", tmp_path=tmp_path, quick=True)
    assert len(followed) == 5
    figure = (tmp_path / "out" / "small-quick" / "figure.png").read_bytes()
    again = run("one", tmp_path=tmp_path, quick=True)
    assert len(followed) == 5
    assert (tmp_path / "out" / "small-quick" / "figure.png").read_bytes() == figure
    assert all(torch.equal(first["one"].losses[name], again["one"].losses[name]) for name in first["one"].losses)
    run("one", tmp_path=tmp_path)
    assert [list(numbers) for *_, numbers in followed[5:]] == [list(range(10, 20))] * 5


@pytest.mark.parametrize("other", [{"steps": 5}, {"seed": 2}])
def test_other_losses_are_computed(followed, other):
    optimizers, options = {"sgd": baselines.SGD(0.02)}, {"steps": 4, "runs": 10, "tuning_runs": 1}
    losses.curves(SMALL, optimizers, **options)
    for changed in ({}, other):
        losses.curves(SMALL, optimizers, **{**options, **changed})
    losses.curves(SMALL, {"sgd": baselines.SGD(0.03)}, **options)
    losses.curves(Quadratic(dim=2, batch=4), optimizers, **options)
    losses.curves(SMALL, {"a": random_rule("raw", seed=1)}, **options)
    losses.curves(SMALL, {"a": random_rule("raw", seed=2)}, **options)
    assert len(followed) == 6


def test_a_run_that_was_stopped_goes_on_where_it_was(tmp_path, monkeypatch):
    expected = run("one", "two", tmp_path=tmp_path / "whole")
    monkeypatch.setenv("FASTL2L_CACHE", str(tmp_path / "second cache"))
    follow, count = losses.follow, []

    def stopped(*args, **options):
        if len(count) == 7:
            raise KeyboardInterrupt
        count.append(1)
        return follow(*args, **options)

    monkeypatch.setattr(losses, "follow", stopped)
    with pytest.raises(KeyboardInterrupt):
        run("one", "two", tmp_path=tmp_path)
    monkeypatch.setattr(losses, "follow", lambda *args, **options: count.append(1) or follow(*args, **options))
    found = run("one", "two", tmp_path=tmp_path)
    assert len(count) == 10  # the panels are alike, so the second takes all from the cache
    assert all(torch.equal(found["two"].losses[name], expected["two"].losses[name]) for name in found["two"].losses)


def test_a_damaged_file_is_computed_anew(tmp_path, followed):
    optimizers, options = {"sgd": baselines.SGD(0.02)}, {"steps": 4, "runs": 10, "tuning_runs": 1}
    first = losses.curves(SMALL, optimizers, **options)
    (path,) = (tmp_path / "cache" / "losses").iterdir()
    good = path.read_bytes()
    flipped = bytearray(good)
    flipped[-3] ^= 1  # of a loss
    deep = safetensors.torch.save({"losses": first.losses["sgd"]}, {"request": "[" * 10**6})
    other = good.replace(b'\\"steps\\": 4', b'\\"steps\\": 9')
    for damaged in (b"", good[:-9], b"x" * 100, other, bytes(flipped), deep):
        assert damaged != good
        path.write_bytes(damaged)
        with pytest.warns(RuntimeWarning, match=f"{path.name}: .*; it is computed anew"):
            again = losses.curves(SMALL, optimizers, **options)
        assert torch.equal(again.losses["sgd"], first.losses["sgd"])
        assert path.read_bytes() == good
    assert len(followed) == 7


def test_kept_losses_that_are_no_numbers_are_not_taken(tmp_path, followed):
    """A loss that is not finite is inf, from where it diverged on."""
    optimizers, options = {"sgd": baselines.SGD(0.02)}, {"steps": 4, "runs": 10, "tuning_runs": 1}
    losses.curves(SMALL, optimizers, **options)
    (path,) = (tmp_path / "cache" / "losses").iterdir()
    with files.open_tensors(path) as stored:
        request, kept = {"request": stored.metadata["request"]}, stored.load()
    kept["losses"][3, 2] = float("nan")
    files.write_tensors(path, kept, request)
    with pytest.warns(RuntimeWarning, match="expected losses, got NaN; it is computed anew"):
        losses.curves(SMALL, optimizers, **options)
    assert len(followed) == 2


def test_kept_losses_of_another_size_are_not_read(tmp_path, followed, monkeypatch):
    optimizers, options = {"sgd": baselines.SGD(0.02)}, {"steps": 4, "runs": 10, "tuning_runs": 1}
    losses.curves(SMALL, optimizers, **options)
    (path,) = (tmp_path / "cache" / "losses").iterdir()
    with files.open_tensors(path) as stored:
        request = {"request": stored.metadata["request"]}
    files.write_tensors(path, {"losses": torch.zeros(10, 50, dtype=torch.float64)}, request)
    monkeypatch.setattr(files.StoredTensors, "load", pytest.fail)
    with pytest.warns(RuntimeWarning, match="expected float64"):
        losses.curves(SMALL, optimizers, **options)
    assert len(followed) == 2


def test_runs_come_in_pieces():
    with pytest.raises(ValueError, match="runs: expected a multiple of 10, got 15"):
        losses.curves(SMALL, {"sgd": baselines.SGD(0.1)}, steps=1, runs=15, tuning_runs=1)


def test_pieces_change_no_loss(followed):
    optimizers, options = {"sgd": baselines.SGD(0.02)}, {"steps": 4, "runs": 6, "tuning_runs": 1}
    expected = evaluate(SMALL, optimizers, steps=4, runs=6)
    for piece in (6, 2):
        found = losses.curves(SMALL, optimizers, piece=piece, **options)
        assert torch.equal(found.losses["sgd"], expected.losses["sgd"])
    assert [list(numbers) for *_, numbers in followed] == [[0, 1, 2, 3, 4, 5], [0, 1], [2, 3], [4, 5]]


def test_a_study_is_drawn_by_its_numbers(tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(experiment.plots, "plot_final_losses", lambda *args, **options: drawn.append((args, options)))
    results = run("one", "two", tmp_path=tmp_path, units=[5, 20], study=Study("hidden units", "units", marked=20))
    ((groups, _), options) = drawn[0]
    assert groups == {"panel one": {5: results["one"]}, "panel two": {20: results["two"]}}
    assert options == {"title": "A small one", "xlabel": "hidden units", "marked": 20, "log_x": False}
    assert "## panel two, 20 units" in (tmp_path / "out" / "small" / "table.md").read_text()


def test_a_panel_has_rules_and_baselines_of_its_own(tmp_path):
    rules = {"a": RULES["lstm-quadratic"], "b": random_rule("raw", seed=5)}
    panels = small("one", rules={"first": "a", "second": "b"}, baselines=("momentum",))
    results = experiments.reproduce(panels, tmp_path, rules=rules, progress=False)
    expected = evaluate(SMALL, {"first": rules["a"], "second": rules["b"]}, steps=3, runs=20)
    assert list(results["one"].losses) == ["first", "second", "momentum"]
    assert all(torch.equal(results["one"].losses[name], expected.losses[name]) for name in expected.losses)


def test_a_final_loss_may_be_that_of_the_last_tenth(tmp_path, tuned):
    curves = run("one", tmp_path=tmp_path, steps=30, last_tenth=True)["one"]
    assert tuned == [(30, 3)] * len(baselines.DEFAULT)
    assert curves.final("sgd")[0] == pytest.approx(curves.losses["sgd"][:, -3:].mean().item())
    table = (tmp_path / "out" / "small" / "table.md").read_text()
    assert "tuned on other problems, by the mean of the last 3 losses" in table
    assert "| mean of the last 3 | last loss" in table
    again = Curves.load(tmp_path / "out" / "small" / "one")
    assert again.last == 3
    assert again.final("sgd") == curves.final("sgd")


def test_a_look_takes_a_like_share_of_fewer_steps(tmp_path, tuned):
    look = Budget(runs=2, tuning_runs=1, tuning_steps=20, steps=40, piece=1)
    curves = run("one", tmp_path=tmp_path, quick=True, steps=50, last_tenth=True, look=look)["one"]
    assert tuned == [(20, 2)] * len(baselines.DEFAULT)
    assert (curves.runs, curves.steps, curves.last) == (2, 40, 4)
    note = "quick: 2 problems, rates tuned on 1 for 20 steps, 40 steps"
    assert note in (tmp_path / "out" / "small-quick" / "table.md").read_text()


def test_baselines_at_many_rates(tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(experiment.plots, "plot_rates", lambda panels, path, **options: drawn.append(panels))
    monkeypatch.setattr(baselines, "tune", pytest.fail)
    rates = (0.001, 0.01, 0.1)
    told = run("one", tmp_path=tmp_path, baselines=("sgd", "adam"), rates=rates, last_tenth=True)["one"]
    curves = drawn[0]["panel one"]
    expected = evaluate(SMALL, {f"adam {rate:g}": baselines.Adam(rate) for rate in rates}, steps=3, runs=20)
    assert list(curves.losses) == ["lstm", *(f"{name} {rate:g}" for name in ("sgd", "adam") for rate in rates)]
    assert all(torch.equal(curves.losses[name], expected.losses[name]) for name in expected.losses)
    learned, _, adam = told.losses
    assert (learned, adam) == ("lstm", expected.ranking()[0])
    table = (tmp_path / "out" / "small" / "table.md").read_text()
    assert table.count("lstm ends") + table.count("lstm against") == 2
    assert "Compared by the mean of the last 1 losses." in table
    assert "| learning rate | sgd" in table
    assert "| 0.001 " in table


def test_rules_that_are_not_there_are_named_before_anything_is_done(tmp_path, followed):
    unknown = small("one", rules={"lstm": "lstm-quadratic", "mine": "rule-of-mine"})
    assert experiments.missing(unknown) == ["rule-of-mine"]
    message = "rule: expected rule-of-mine, which small shows and which do not come with fastl2l, .*, got other"
    with pytest.raises(ValueError, match=message):
        experiments.reproduce(unknown, tmp_path / "out", rules={"other": RULES["lstm-quadratic"]}, progress=False)
    with pytest.raises(ValueError, match="small: expected rules that have recipes, got rule-of-mine"):
        experiments.retrain(unknown, tmp_path / "out")
    assert followed == []
    assert not (tmp_path / "out").exists()


# The entries


@pytest.mark.parametrize(
    "one",
    [one for one in experiments.ALL.values() if isinstance(one, Experiment)],
    ids=lambda one: one.name,
)
def test_entries_are_whole(one, tmp_path, cifar10, pictures, tiny_vgg):
    for name in ("MNIST", "FashionMNIST"):  # whose files are alike
        (tmp_path / name).symlink_to(REAL_MNIST)
    names = [panel.name for panel in one.panels]
    assert len(set(names)) == len(names)
    assert set(one.quick) <= set(names)
    for panel in one.panels:
        assert (panel.x is not None) == (one.study is not None)
        assert panel.task().sample(0).theta0.numel() >= 10
        assert set(panel.baselines) <= baselines.ALL.keys()
        assert not set(panel.rules) & baselines.ALL.keys()
        for budget in (panel.full, panel.quick):
            assert budget.runs % budget.piece == 0
            assert budget.tuning_runs >= 1 or panel.rates


@pytest.mark.parametrize("one", andrychowicz2016.EXPERIMENTS, ids=lambda one: one.name)
def test_rules_that_come_with_fastl2l_have_recipes(one):
    assert one.rules <= recipes.RECIPES.keys()


def test_what_was_kept_of_the_mlp_is_found():
    """A network of more options is another entry of the cache only where it uses them."""
    base = {"hidden": [20], "activation": "sigmoid", "batch_size": 128, "split": "train"}
    base |= {"init_std": 0.1, "dtype": "float32"}
    assert Digits().spec() == {"name": "digits"} | base


def test_names_are_checked():
    assert experiments.by_name("fig5").panels[2].title == "ReLU"
    with pytest.raises(ValueError, match=r"name: expected one of fig4-quadratic, .*, got 'fig3'"):
        experiments.by_name("fig3")


# Neural art


@pytest.fixture
def small_art(monkeypatch, pictures, tiny_vgg):
    """Pictures of 16 x 16 and five steps; a stand-in for the rule."""
    for name in ("_QUICK_STEPS", "_QUICK_TUNING"):
        monkeypatch.setattr(neural_art, name, 5)
    monkeypatch.setattr(neural_art, "TRAINED", neural_art.TRAINED._replace(size=16))
    return {neural_art.RULE: random_rule("log_sign", seed=3)}


def test_a_sheet_has_the_pictures_of_each_optimizer(small_art, tmp_path):
    told = experiments.by_name("fig9").run(tmp_path, rules=small_art, quick=True, progress=False)
    assert any("trained.png" in str(one) for one in told)
    assert Image.open(tmp_path / "fig9-quick" / "trained.png").width == 5 * 16 + 4 * 2
    table = (tmp_path / "fig9-quick" / "table.md").read_text()
    assert [word.strip() for word in table.splitlines()[-3].split("|")[1:-1]] == ["photograph", "lstm", "adam", "lbfgs"]


@pytest.mark.parametrize("name", ["fig10", "fig12"])
def test_a_look_inside_the_rule_of_neural_art(small_art, tmp_path, name):
    experiments.by_name(name).run(tmp_path, rules=small_art, quick=True, progress=False)
    panels = 2 if name == "fig10" else 4
    assert Image.open(tmp_path / f"{name}-quick" / "figure.png").width == panels * 920
    assert (tmp_path / f"{name}-quick" / "updates.csv").exists()


@pytest.mark.parametrize("name", ["fig8", "fig9", "fig10", "fig13"])
def test_neural_art_wants_its_rule(name, tmp_path, monkeypatch):
    """Where it does not come with fastl2l."""
    monkeypatch.setattr(experiment, "shipped", dict)
    message = f"rule: expected lstm-neural-art.*, which {name} shows and which do not come"
    with pytest.raises(ValueError, match=message):
        experiments.by_name(name).run(tmp_path, rules={}, quick=True, progress=False)


# Recipes


SHIPPED = ["lstm-mnist", "lstm-quadratic", "rnnprop", "rnnprop-long"]
ABLATIONS = ["rnnprop-tricks", "lstm-no-tricks", "rnnprop-no-convex-100"]
OF_CIFAR = ["lstm-cifar", "lstm-cifar-sub", "lstm-cifar-one"]
WAYS = ["training-last-step", "training-teacher", "training-curriculum", "training-all"]
TALKING = ["gac-quadratic-1", "ntm-quadratic", "ntm-paper-ill-conditioned-0", "ntm-20-pairs-spiked-0"]


def test_the_recipe_of_neural_art_is_the_papers(tmp_path, monkeypatch, pictures, tiny_vgg):
    test_the_commands_of_a_recipe_do_what_the_recipe_does("lstm-neural-art", tmp_path, monkeypatch, None)
    rule = recipes.fresh_rule("lstm", "neural-art")
    assert (rule.text, rule.config.output_scale) == ("log_sign:10 lstm:20,20 linear", 1.0)


def test_rules_whose_coordinates_talk_have_recipes():
    assert appendix_d.AppendixD().trained <= recipes.RECIPES.keys()
    assert appendix_d.AppendixD().rules == {"lstm-quadratic", "ntm-quadratic"}


@pytest.fixture
def little(tmp_path, monkeypatch):
    """Appendix D on a few small functions."""
    monkeypatch.setenv("FASTL2L_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(appendix_d, "STEPS", 5)
    monkeypatch.setattr(appendix_d, "FULL", appendix_d.Effort(2, 1, 10))
    quadratic, ill_conditioned = (partial(kind, dim=3, batch=4) for kind in (tasks.Quadratic, tasks.IllConditioned))
    small = quadratic, quadratic, ill_conditioned, ill_conditioned, tasks.Digits
    settings = {
        name: setting._replace(task=task)
        for (name, setting), task in zip(appendix_d.SETTINGS.items(), small, strict=True)
    }
    monkeypatch.setattr(appendix_d, "SETTINGS", settings)
    return appendix_d.AppendixD()


def test_appendix_d_shows_the_rules_that_there_are(little, tmp_path):
    """Function by function, those of several seeds together."""
    rule = NTMRule("pairs", pairs=3, preprocess="raw", hidden_size=4)
    averages = dict.fromkeys(("gac-ill-conditioned-0", "gac-on-mnist-1", "gac-on-mnist-2"), GACRule("raw", averages=2))
    given = {f"ntm-5-pairs-quadratic-{seed}": rule for seed in (0, 2)} | averages
    told = little.run(tmp_path, rules=given, quick=False, progress=False)
    folder = tmp_path / "appendix-d"
    written = (folder / "table.md").read_text()
    assert told[1] in written
    assert "spiked" not in written
    found = {name: Curves.load(folder / name) for name in ("quadratic-0", "quadratic-2", "mnist-1", "mnist-2")}
    assert set(found["quadratic-0"].losses) == {
        "lstm, longer", "ntm, longer", "ntm, 5 pairs", "adam", "lbfgs", "bfgs"
    }  # fmt: skip
    assert list(found["quadratic-2"].losses) == ["ntm, 5 pairs"]
    assert found["quadratic-0"].runs == 8
    assert "lstm+gac" in Curves.load(folder / "ill-conditioned-0").losses
    assert (list(found["mnist-1"].losses), found["mnist-1"].runs) == (["lstm+gac", "adam"], 10)
    assert list(found["mnist-2"].losses) == ["lstm+gac"]
    rows = {row[0]: row for row in appendix_d.distribution({0: found["quadratic-0"], 2: found["quadratic-2"]})}
    final = found["quadratic-0"].losses["ntm, 5 pairs"][:, -1]
    assert rows["ntm, 5 pairs"][-1] == f"{final.mean():.3g}, {final.mean():.3g}"
    assert Image.open(folder / "figure.png").width == 4 * 920
    assert (folder / "memory.png").exists()


def test_appendix_d_goes_on_where_it_was(little, tmp_path, monkeypatch):
    """Problem by problem; what is another optimizer's or task's is its own."""
    rule, done = NTMRule("pairs", pairs=3, preprocess="raw", hidden_size=4), []
    follow = functions._follow

    def killed_at(number, problem, *arguments):
        if len(done) == number:
            raise KeyboardInterrupt
        done.append(problem)
        return follow(problem, *arguments)

    monkeypatch.setattr(functions, "_follow", partial(killed_at, 5))
    given = {"ntm-5-pairs-quadratic-0": rule}
    with pytest.raises(KeyboardInterrupt):
        little.run(tmp_path / "out", rules=given, quick=False, progress=False)
    assert not (tmp_path / "out").exists()
    monkeypatch.setattr(functions, "_follow", partial(killed_at, 12))
    told = little.run(tmp_path / "out", rules=given, quick=False, progress=False)
    assert len(done) == 2 * 6  # two problems of six optimizers, none twice
    monkeypatch.setattr(functions, "_follow", partial(killed_at, 12))
    assert little.run(tmp_path / "again", rules=given, quick=False, progress=False)[1] == told[1]
    monkeypatch.setenv("FASTL2L_CACHE", str(tmp_path / "other cache"))
    monkeypatch.setattr(functions, "_follow", follow)
    assert little.run(tmp_path / "anew", rules=given, quick=False, progress=False)[1] == told[1]


def test_appendix_d_tells_how_final_losses_are_distributed():
    losses = {"good": torch.arange(1.0, 101.0).double().view(-1, 1), "lost": torch.ones(100, 1).double()}
    losses["lost"][7] = float("inf")
    rows = appendix_d.distribution({0: Curves(losses)})
    assert rows[0] == ["optimizer", "mean", "median", "99th percentile", "diverged", "mean of each seed"]
    assert rows[1] == ["lost", "inf", "1", "inf", "1.00%", ""]
    assert rows[2] == ["good", "50.5", "51", "100", "0.00%", ""]


def test_appendix_d_refuses_rules_that_it_does_not_know(little, tmp_path):
    gac = GACRule("raw", averages=2)
    with pytest.raises(ValueError, match=r"rules: expected some of gac-ill-conditioned-0, .*, got mine"):
        little.run(tmp_path, rules={"mine": gac}, quick=False, progress=False)
    with pytest.raises(ValueError, match="rule: expected ntm-quadratic to be ntm matrix, got gac"):
        little.run(tmp_path, rules={"ntm-quadratic": gac}, quick=False, progress=False)
    with pytest.raises(ValueError, match="rule: expected ntm-5-pairs-spiked-0 to be ntm pairs, got ntm matrix"):
        little.run(tmp_path, rules={"ntm-5-pairs-spiked-0": NTMRule()}, quick=False, progress=False)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["lstm", "gac", "ntm", "adam", "lbfgs", "bfgs"])
@pytest.mark.parametrize("spiked", [False, True])
@pytest.mark.usefixtures("own_cache")
def test_functions_side_by_side_go_their_own_ways(name, spiked):
    """Each as `evaluate` has it by itself."""
    made = {"gac": GACRule("raw", averages=2), "ntm": NTMRule(preprocess="raw"), "lstm": RULES["lstm-quadratic"]}
    optimizer = made.get(name) or baselines.by_name(name, 0.1 if name == "adam" else "tune")
    task = tasks.Quadratic(dim=4, batch=3)
    task = tasks.Spiked(task, 0.3, 5.0) if spiked else task
    found = functions.curves(task, {"one": optimizer}, steps=6, problems=2).losses["one"]
    assert found.shape == (6, 7)
    problems = [task.sample(problem_seed(1, "test", number)) for number in range(2)]
    for one_by_step, (problem, number) in zip(found, itertools.product(problems, range(3)), strict=True):
        one = problem.alone(number)
        if isinstance(optimizer, baselines.Baseline):
            expected = baselines.descend(one, optimizer.build, 6)
        else:
            trajectory = Trajectory(one, optimizer)
            expected = torch.stack([trajectory.loss, *(trajectory.advance() for _ in range(6))]).double()
        torch.testing.assert_close(one_by_step, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", [*SHIPPED, *ABLATIONS, *WAYS, *TALKING, *OF_CIFAR])
def test_the_commands_of_a_recipe_do_what_the_recipe_does(name, tmp_path, monkeypatch, request):
    recipe, made = recipes.RECIPES[name], []
    if name in OF_CIFAR:
        request.getfixturevalue("cifar10")

    def fit(trainer, epochs, **options):
        rules = rules_by_part(trainer.rule)
        made.append((trainer.settings(), epochs, [weight.detach().clone() for weight in all_weights(rules)]))
        trainer.history = [Epoch(1, 1.0, 1.0, 0.1, 0)]
        with torch.no_grad():
            for rule in rules.values():
                rule.weight_out += len(trainer.history)
        return trainer.history

    monkeypatch.setattr(MetaTrainer, "fit", fit)
    recipe.train(tmp_path / "one", progress=False)
    by_recipe, made = made, []
    monkeypatch.chdir(tmp_path)
    for command in recipe.commands:
        words = shlex.split(command)
        assert words[0] == "fastl2l"
        CliRunner().invoke(cli.app, words[1:], catch_exceptions=False)
    assert len(made) == len(by_recipe) == len(recipe.commands)
    assert by_recipe[-1][1] == recipe.epochs
    for one, other in zip(by_recipe, made, strict=True):
        assert one[:2] == other[:2]
        assert all(map(torch.equal, one[2], other[2]))


def test_retraining_takes_the_recipe_and_goes_on(tmp_path, monkeypatch):
    sizes = {"horizon": 4, "unroll": 2, "trajectories": 1}
    first = recipes.Recipe("first", "", "quadratic", epochs=20, training=sizes)
    recipe = recipes.Recipe("lstm-quadratic", "", "quadratic", epochs=20, training=sizes, seed=1, init=first)
    monkeypatch.setitem(recipes.RECIPES, "lstm-quadratic", recipe)
    trained = experiments.retrain(small("one"), tmp_path, quick=True)["lstm-quadratic"]
    assert not torch.equal(trained.weight_out, RULES["lstm-quadratic"].weight_out)
    epochs = []
    monkeypatch.setattr(MetaTrainer, "_epoch", lambda *args: epochs.append(1))
    again = experiments.retrain(small("one"), tmp_path, quick=True)["lstm-quadratic"]
    assert epochs == []
    assert torch.equal(trained.weight_out, again.weight_out)
    assert {path.name for path in (tmp_path / "rules").iterdir()} == {"first-quick.pt", "lstm-quadratic-quick.pt"}
