"""The command line does what it says, and its errors are one line."""

from __future__ import annotations

import json
import os
import sys
import warnings
from pathlib import Path

import forked
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

import fastl2l
from fastl2l import MetaTrainer, RNNpropRule, cli, experiments, tasks
from fastl2l.build import locked
from fastl2l.cli import app
from fastl2l.experiments.experiment import Experiment, Panel
from fastl2l.memory_config import MemoryConfig
from fastl2l.progress import Progress
from fastl2l.rule_files import load_rule, read_recipe, save_rule
from fastl2l.tasks import Quadratic

SMALL = ["--task", "quadratic", "--horizon", "4", "--unroll", "2", "--trajectories", "2", "--epochs", "2"]


def run(*arguments):
    done = CliRunner().invoke(app, [str(argument) for argument in arguments], catch_exceptions=False)
    return done


@pytest.fixture
def trained(tmp_path, monkeypatch):
    monkeypatch.setenv("FASTL2L_CACHE", str(tmp_path / "cache"))
    assert run("train", *SMALL, "--out", tmp_path / "run").exit_code == 0
    return tmp_path / "run"


def test_train_writes_rule_recipe_checkpoint_and_figure(trained):
    rule = load_rule(trained / "rule.safetensors")
    assert (rule.text, rule.config.output_scale) == (
        "raw:1 lstm:20,20 linear",
        1.0,
    )  # what the paper has for quadratics
    recipe = read_recipe(trained / "rule.safetensors")
    assert recipe["epochs"] == 2
    assert recipe["task"]["name"] == "quadratic"
    assert Image.open(trained / "training.png").width == 1280
    assert (trained / "checkpoint.pt").exists()


def test_train_takes_batches_and_keeps_the_last_weights(tmp_path):
    told = run("train", *SMALL, "--batch", "2", "--keep", "last", "--out", tmp_path)
    assert told.exit_code == 0
    assert "(last epoch)" in told.output
    recipe = read_recipe(tmp_path / "rule.safetensors")
    assert (recipe["batch"], recipe["keep"]) == (2, "last")


def test_train_goes_on_from_its_checkpoint(trained):
    before = (trained / "rule.safetensors").read_bytes()
    again = run("train", *SMALL, "--out", trained)
    assert "going on after epoch 2" in again.stdout
    after = load_rule(trained / "rule.safetensors")
    (trained / "before.safetensors").write_bytes(before)
    assert all(map(lambda a, b: a.equal(b), after.weights(), load_rule(trained / "before.safetensors").weights()))


def test_training_may_start_from_a_rule(trained, tmp_path):
    first, again = trained / "rule.safetensors", tmp_path / "again"
    assert run("train", *SMALL, "--meta-lr", "1e-8", "--init", first, "--out", again).exit_code == 0
    for weight, other in zip(load_rule(first).weights(), load_rule(again / "rule.safetensors").weights(), strict=True):
        torch.testing.assert_close(weight, other, rtol=0, atol=1e-6)
        assert not torch.equal(weight, other)


def test_rules_whose_coordinates_talk_are_trained_and_described(tmp_path):
    assert run("train", *SMALL, "--rule", "gac", "--averages", "2,3", "--out", tmp_path / "gac").exit_code == 0
    assert "the mean of 2 and 3 units by layer" in run("rules", tmp_path / "gac" / "rule.safetensors").stdout
    options = "pairs,pairs=4,inside,differences,multiply,reads=2,forget=0.05"
    told = run("train", *SMALL, "--rule", "ntm", "--memory", options, "--averages", "1", "--out", tmp_path / "ntm")
    assert told.exit_code == 0
    memory = load_rule(tmp_path / "ntm" / "rule.safetensors").config.memory
    expected = {"pairs": 4, "inside": True, "differences": True, "multiply": True, "reads": 2, "forget": 0.05}
    assert memory == MemoryConfig("pairs", **expected)
    assert str(memory) in run("rules", tmp_path / "ntm" / "rule.safetensors").stdout


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--rule", "ntm", "--memory", "matrix,sizes=3"], "memory: expected options such as pairs, reads, writes"),
        (["--rule", "ntm", "--memory", "matrix,forget=half"], "forget: expected a number such as 2 or 0.5, got 'half'"),
        (["--rule", "ntm", "--memory", "tape"], "memory: expected one of matrix, pairs, got 'tape'"),
        (["--memory", "matrix"], "memory: expected options of lstm"),
        (["--rule", "gac", "--averages", "few"], "averages: expected numbers such as 5 or 2,5, got 'few'"),
        (["--rule", "gac", "--averages", "21"], "averages: expected an integer of at least 0 and at most 20, got 21"),
    ],
)
def test_bad_options_of_such_rules_are_named(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        run("train", *SMALL, *options, "--out", tmp_path)


class Halves(Quadratic):
    """Quadratics whose coordinates are two parts."""

    name = "quadratic"

    def sample(self, seed):
        problem = super().sample(seed)
        problem.parts = {"first": 480, "rest": 800}
        return problem


def test_a_rule_for_each_part_is_trained_evaluated_and_described(tmp_path, monkeypatch):
    monkeypatch.setenv("FASTL2L_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(tasks, "by_name", lambda name: Halves())
    assert run("train", *SMALL, "--by-part", "--out", tmp_path / "run").exit_code == 0
    file = tmp_path / "run" / "rule.safetensors"
    rules = load_rule(file)
    assert list(rules) == ["first", "rest"]
    assert not torch.equal(rules["first"].weight_out, rules["rest"].weight_out)
    again = tmp_path / "again"
    assert run("train", *SMALL, "--init", file, "--out", again).exit_code == 0
    assert list(load_rule(again / "rule.safetensors")) == ["first", "rest"]
    shown = run(
        "evaluate", "--task", "quadratic", "--rule", f"pair={file}", "--steps", "3", "--runs", "2", "--out", again
    )
    assert shown.exit_code == 0
    assert "pair" in shown.stdout
    assert "rest: " in run("rules", file).stdout


def test_rules_are_relative_if_asked_to_be_and_say_so(tmp_path):
    assert run("train", *SMALL, "--rule", "rnnprop", "--out", tmp_path / "plain").exit_code == 0
    file = tmp_path / "plain" / "rule.safetensors"
    assert not load_rule(file).config.relative
    steps = ["--relative", "--ramp", "3", "--decay", "9"]
    assert run("train", *SMALL, "--init", file, *steps, "--out", tmp_path / "run").exit_code == 0
    file = tmp_path / "run" / "rule.safetensors"
    assert load_rule(file).config.relative
    shown = run("rules", file).stdout
    for what in (
        "in units of each parameter's size at first",
        "in 3 steps to their full size",
        "from step 9 on falling",
    ):
        assert what in shown
    assert "step_weights: [1.0, 1.0]" in shown


def test_what_is_known_of_a_rule_is_told_briefly(tmp_path):
    steps = ["--horizon", "8", "--unroll", "8"]
    assert run("train", *SMALL, *steps, "--out", tmp_path).exit_code == 0
    assert "step_weights: 1.0, 8 times" in run("rules", tmp_path / "rule.safetensors").stdout


def test_a_share_for_teachers_wants_teachers(tmp_path):
    with pytest.raises(ValueError, match=r"imitation_share: expected none without --imitate, got 0\.5"):
        run("train", *SMALL, "--imitation-share", "0.5", "--out", tmp_path)


def test_a_rule_for_each_part_wants_parts(tmp_path):
    failed = CliRunner().invoke(app, ["train", *SMALL, "--by-part", "--out", str(tmp_path / "run")])
    assert "by_part: expected a task whose problems have parts, such as cifar10, got 'quadratic'" in str(
        failed.exception
    )


def test_a_run_is_as_long_as_its_recipe_says(trained):
    """Neither fewer epochs than are done, nor a cosine of another length behind the first ones."""
    before = (trained / "rule.safetensors").read_bytes()
    for epochs, message in ((1, "epochs: expected at least the 2 that are done"), (3, "the length of its cosine")):
        with pytest.raises(ValueError, match=message):
            run("train", *SMALL, "--epochs", epochs, "--out", trained)
    assert (trained / "rule.safetensors").read_bytes() == before


def test_names_and_paths_are_printed_as_they_are(tmp_path, capsys):
    out = tmp_path / "a[bold]folder:cat:[of a name that is longer than most terminals are wide, 80 columns and more]"
    assert str(out / "rule.safetensors") in run("train", *SMALL, "--out", out).stdout
    names = ["--rule", "[red]:cat:=lstm-quadratic", "--task", "quadratic", "--baseline", "none"]
    done = run("evaluate", *names, "--steps", 1, "--runs", 1, "--out", out)
    assert "[red]:cat:" in done.stdout
    assert f"numbers: {out}" in done.stdout
    with Progress("[b]title", 1) as shown:
        shown.advance("[b]:cat:")
    assert "[b]title: 1/1, 0 s left; [b]:cat:" in capsys.readouterr().err


def test_evaluate_prints_a_table_and_writes_everything(trained, tmp_path):
    out = tmp_path / "evaluation"
    rule = f"mine={trained / 'rule.safetensors'}"
    options = ["--task", "quadratic", "--steps", 3, "--runs", 4, "--baseline", "sgd", "--out", out]
    done = run("evaluate", "--rule", rule, *options)
    assert done.exit_code == 0
    assert "mine" in done.stdout
    assert "sgd" in done.stdout
    assert set(json.loads((out / "results.json").read_text())["final"]) == {"mine", "sgd"}
    assert "| sgd" in (out / "table.md").read_text()
    assert Image.open(out / "curves.png").width == 1280


def test_reproduce_prints_the_claim_and_the_table(tmp_path, monkeypatch):
    monkeypatch.setenv("FASTL2L_CACHE", str(tmp_path / "cache"))
    small = Panel("tiny", "tiny", lambda: Quadratic(dim=2, batch=2), {"lstm": "lstm-quadratic"}, steps=2)
    monkeypatch.setitem(experiments.ALL, "fig4-quadratic", Experiment("tiny", "A figure", "it works.", [small]))
    done = run("reproduce", "fig4-quadratic", "--quick", "--out", tmp_path)
    assert done.exit_code == 0
    for words in ("A figure", "The paper: it works.", "lstm ends"):
        assert words in done.stdout
    assert (tmp_path / "tiny-quick" / "figure.png").exists()
    assert "in place of" not in done.stdout
    save_rule(load_rule("lstm-mnist"), tmp_path / "mine.safetensors")
    mine = f"lstm-quadratic={tmp_path / 'mine.safetensors'}"
    done = run("reproduce", "fig4-quadratic", "--quick", "--rule", mine, "--out", tmp_path)
    assert f"lstm-quadratic is {tmp_path / 'mine.safetensors'} here, in place of" in done.stdout


def test_reproduce_has_its_folder_to_itself(tmp_path, monkeypatch):
    monkeypatch.setattr(experiments, "reproduce", lambda *_, **__: {})
    with (
        locked(tmp_path / "fig5-quick" / ".lock"),
        pytest.raises(ValueError, match=r"out: .*fig5-quick is another command's at this moment"),
    ):
        run("reproduce", "fig4-quadratic", "fig5", "--quick", "--out", tmp_path)


def test_all_experiments_are_those_whose_rules_there_are(tmp_path, monkeypatch):
    done, small = [], Panel("tiny", "tiny", Quadratic, {"mine": "rule-of-mine"})
    chosen = {"fig5": experiments.by_name("fig5"), "odd": Experiment("odd", "A figure", "it works.", [small])}
    monkeypatch.setattr(experiments, "ALL", chosen)
    monkeypatch.setattr(Experiment, "run", lambda experiment, *_, **__: done.append(experiment.name) or [])
    told = run("reproduce", "all", "--out", tmp_path)
    assert done == ["fig5"]
    assert "without odd, for which --rule NAME=FILE must give rule-of-mine" in told.stdout
    run("reproduce", "all", "--rule", "rule-of-mine=lstm-quadratic", "--out", tmp_path)
    assert done == ["fig5", "fig5", "odd"]
    with pytest.raises(ValueError, match="rule: expected rule-of-mine, which odd shows and which do not come with"):
        run("reproduce", "fig5", "odd", "--out", tmp_path)
    assert len(done) == 3


def test_rules_are_listed_with_what_they_are_good_for():
    done = run("rules")
    assert done.exit_code == 0
    for words in ("lstm-mnist", "lstm-quadratic", "quadratic functions", "fastl2l rules NAME"):
        assert words in " ".join(done.stdout.split())
    assert len(done.stdout.splitlines()) < 20


def test_a_rule_is_described_with_how_it_was_trained(trained):
    told = run("rules", "lstm-mnist").stdout
    assert "log_sign:10 lstm:20,20 linear, output scale 0.1, 5,141 weights" in told
    assert told.count("fastl2l train --task mnist") >= 4
    own = run("rules", trained / "rule.safetensors").stdout
    assert "raw:1 lstm:20,20 linear" in own
    assert "validation_loss: " in own


def test_options_of_tasks_are_those_of_their_classes():
    assert cli._task("digits", hidden="", convolutions="2,1", activation="relu", table=None) == tasks.Digits(
        hidden=(), convolutions=(2, 1), activation="relu"
    )
    assert cli._task("table", hidden="8", table="wine", batch_size=4) == tasks.Table("wine", hidden=(8,), batch_size=4)


def test_rnnprop_is_trained_tuned_and_evaluated_like_any_rule(tmp_path, monkeypatch):
    monkeypatch.setenv("FASTL2L_CACHE", str(tmp_path / "cache"))
    assert run("train", *SMALL, "--rule", "rnnprop", "--hidden-size", 5, "--out", tmp_path / "run").exit_code == 0
    rule = load_rule(tmp_path / "run" / "rule.safetensors")
    assert type(rule) is RNNpropRule
    assert rule.text == "adam:0.95,0.95,1e-08 elu:20 lstm:5,5 tanh"
    search = ["tune", "--task", "quadratic", "--rule", "rnnprop", "--trials", 1, "--epochs", 1, "--trajectories", 1]
    assert run(*search, "--out", tmp_path / "search").exit_code == 0
    both = ["--rule", tmp_path / "run" / "rule.safetensors", "--rule", "lstm-quadratic"]
    options = ["--task", "quadratic", "--steps", 3, "--runs", 2, "--baseline", "none", "--out", tmp_path / "both"]
    done = run("evaluate", *both, *options)
    assert done.exit_code == 0
    assert set(json.loads((tmp_path / "both" / "results.json").read_text())["final"]) == {"rnnprop", "lstm"}


def test_a_file_may_have_an_equals_sign_in_its_name(trained, tmp_path):
    path = tmp_path / "lr=0.1.safetensors"
    path.write_bytes((trained / "rule.safetensors").read_bytes())
    options = ["--task", "quadratic", "--steps", 2, "--runs", 2, "--baseline", "none", "--out", tmp_path / "e"]
    for entry, name in ((path, "lstm"), (f"mine={path}", "mine")):
        assert run("evaluate", "--rule", entry, *options).exit_code == 0
        assert set(json.loads((tmp_path / "e" / "results.json").read_text())["final"]) == {name}


def test_a_folder_is_one_command_s_at_a_time(trained, tmp_path):
    with locked(trained / ".lock"):
        done = program(tmp_path, "train", *SMALL, "--out", trained)
        assert done.returncode == 1
        assert "is another command's at this moment" in done.stderr
    assert program(tmp_path, "train", *SMALL, "--out", trained).returncode == 0


def test_a_run_is_of_its_first_weights(trained, tmp_path):
    """Another --init does not give the weights and the recipe of the run that is there."""
    before = (trained / "rule.safetensors").read_bytes()
    for changed in (["--init", "lstm-quadratic"], ["--backend", "reference"]):
        done = program(tmp_path, "train", *SMALL, *changed, "--out", trained)
        assert done.returncode == 1
        assert "checkpoint.pt: is of a run" in done.stderr
    assert (trained / "rule.safetensors").read_bytes() == before


def test_ctrl_c_says_how_to_go_on(tmp_path, monkeypatch):
    epochs = []

    def interrupted(self, *_):
        epochs.append(self)
        if len(epochs) > 1:
            raise KeyboardInterrupt
        return whole(self, *_)

    whole = MetaTrainer._epoch
    monkeypatch.setattr(MetaTrainer, "_epoch", interrupted)
    done = run("train", *SMALL, "--out", tmp_path)
    assert done.exit_code == 130
    assert "stopped after epoch 1; the same command goes on from there" in done.stdout
    monkeypatch.undo()
    assert "going on after epoch 1" in run("train", *SMALL, "--out", tmp_path).stdout


def test_env_names_backends_and_folders():
    done = run("env")
    assert done.exit_code == 0
    for word in ("torch", "native", "reference", "instruction set", "threads", "FASTL2L_DATA"):
        assert word in done.stdout


@pytest.fixture
def main(tmp_path, monkeypatch, capsys):
    """What the command tells of an error, in `tmp_path` and in this process, since a new one takes seconds to start."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(warnings, "showwarning", warnings.showwarning)

    def told(*arguments):
        monkeypatch.setattr(sys, "argv", ["fastl2l", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        assert ended.value.code == 1
        return capsys.readouterr().err

    return told


@pytest.mark.parametrize("command", ["train", "evaluate", "tune", "reproduce", "rules", "env"])
def test_help_shows_an_example(command):
    assert f"Example: fastl2l {command}" in run(command, "--help").stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train", "--task", "nothing"], "expected one of quadratic"),
        (["train", "--task", "quadratic", "--unroll", "7"], "unroll: expected a divisor of the horizon 100, got 7"),
        (["train", "--task", "quadratic", "--batch", "3"], "batch: expected a divisor of the trajectories 20, got 3"),
        (["train", "--task", "quadratic", "--keep", "first"], "keep: expected best or last, got 'first'"),
        (["train", "--task", "quadratic", "--hidden", "20"], "options of task 'quadratic'"),
        (["train", "--init", "missing"], "missing: expected a rule file or one of lstm-mnist"),
        (["train", "--init", "lstm-mnist", "--layers", "3"], "num_layers: expected none beside init"),
        (["train", "--task", "digits", "--hidden", "twenty"], "hidden: expected numbers such as 40,40, got 'twenty'"),
        (
            ["train", "--task", "digits", "--convolutions", "2;2"],
            "convolutions: expected numbers such as 40,40, got '2;2'",
        ),
        (["train", "--task", "digits", "--convolutions", "2,2,2,2"], "convolutions: expected at most 3 stages"),
        (["train", "--task", "digits", "--table", "wine"], "options of task 'digits'"),
        (["train", "--task", "table", "--table", "boston"], "table: expected one of diabetes"),
        (["reproduce", "fig3"], "name: expected one of fig4-quadratic"),
        (["reproduce", "fig5", "--rule", "mine.safetensors"], "rule: expected NAME=FILE, got 'mine.safetensors'"),
        (["reproduce", "fig5", "--rule", "lstm-mnist=missing"], "missing: expected a rule file or one of lstm-mnist"),
        (["tune", "--task", "quadratic", "--low", "2", "--high", "1"], "low, high: expected 0 < low < high, got 2.0"),
        (["evaluate", "--rule", "missing.safetensors"], "missing.safetensors: expected a rule file"),
        (
            ["evaluate", "--rule", "lstm-mnist", "--rule", "lstm-quadratic"],
            "expected another name for each, got 'lstm'",
        ),
        (["evaluate", "--rule", "a=lstm-mnist", "--rule", "a=lstm-mnist"], "expected another name for each, got 'a'"),
        (["evaluate", "--rule", "adam=lstm-mnist"], "rule and baseline: expected another name for each, got 'adam'"),
        (["evaluate", "--rule", "lstm-mnist", "--baseline", "adam,adam"], "expected another name for each, got 'adam'"),
        (["reproduce", "fig5", *["--rule", "lstm-mnist=lstm-mnist"] * 2], "rule: expected another name for each"),
        (["train", "--task", "quadratic", "--epochs", "0"], "epochs: expected an integer >= 1, got 0"),
        (["train", "--task", "quadratic", "--rule", "other"], "rule: expected one of lstm, rnnprop, gac, ntm, got"),
        (
            ["train", "--task", "quadratic", "--rule", "rnnprop", "--preprocess", "raw"],
            "preprocess: expected options of",
        ),
        (["train", "--init", "lstm-mnist", "--rule", "rnnprop"], "rule: expected none beside init"),
        (
            ["train", "--task", "quadratic", "--seed", str(10**30)],
            "seed: expected an integer of at least 0 and at most",
        ),
        (
            ["train", "--task", "quadratic", "--hidden-size", str(10**9)],
            "hidden_size: expected an integer of at least 1",
        ),
        (["train", "--task", "digits", "--hidden", str(10**12)], ""),
        (["train", "--task", "digits", "--batch-size", str(10**15)], ""),
        (["tune", "--task", "quadratic", "--high", "inf"], "high: expected a finite number, got inf"),
        (["train", "--task", "quadratic", *["--horizon", str(10**12), "--unroll", str(10**12)]], "no memory for such"),
        (["evaluate", "--rule", "=lstm-mnist"], "optimizers: expected names that can be printed and saved, got ''"),
        (["evaluate", "--rule", "__metadata__=lstm-mnist"], "names that can be printed and saved, got '__metadata__'"),
        (["evaluate", "--rule", "runs/lr=0.1/rule.safetensors"], "runs/lr=0.1/rule.safetensors: expected a rule file"),
        (["evaluate", "--rule", "lstm-mnist", "--runs", "0"], "runs: expected an integer >= 1, got 0"),
        (["evaluate", "--rule", "lstm-mnist", "--backend", "fast"], "backend: expected one of auto"),
        (["reproduce", "fig5", "--rule", "lstm-quadratic=lstm-quadratic"], "rule: expected some of lstm-mnist, which"),
        (["reproduce", "fig5", "--rule", "mine=lstm-mnist"], "rule: expected some of lstm-mnist, which are shown, got"),
        (["reproduce", "own-networks", "--rule", "adam=lstm-mnist"], "rules: expected other names than adam, nag"),
        (["reproduce", "fig5", "--retrain", "--rule", "lstm-mnist=lstm-mnist"], "rule: expected none beside retrain"),
        (["tune", "--task", "quadratic", "--seed", str(10**30)], "seed: expected an integer below 2^32"),
    ],
)
def test_errors_are_one_line_and_write_nothing(arguments, message, tmp_path, main):
    told = main(*arguments, "--out", "out")
    assert message in told
    assert told.startswith("fastl2l: ")
    assert told.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "command", [["train", *SMALL], ["evaluate", "--rule", "lstm-quadratic"], ["tune"], ["reproduce", "fig4-quadratic"]]
)
@pytest.mark.parametrize("out", ["file", "file/below"])
def test_a_folder_that_cannot_be_is_noticed_before_the_work(command, out, tmp_path, main):
    (tmp_path / "file").write_text("mine")
    assert f"out: expected a folder, new or to be written to, got {out}, where" in main(*command, "--out", out)
    assert (tmp_path / "file").read_text() == "mine"


def program(folder, *arguments):
    """The command as a process of its own in `folder`."""
    words = ["fastl2l", *map(str, arguments)]
    code = f"import runpy, sys; sys.argv = {words!r}; runpy.run_module('fastl2l.cli', run_name='__main__')"
    variables = {**os.environ, "PYTHONPATH": str(Path(fastl2l.__file__).parents[1])}
    return forked.run(code, variables, folder, folder, 100)
