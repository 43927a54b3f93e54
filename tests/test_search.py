"""The search of the meta learning rate finds the best of what it tried, and goes on where it was stopped."""

from __future__ import annotations

import optuna
import pytest
from PIL import Image
from typer.testing import CliRunner

from fastl2l import LSTMRule, MetaTrainer, cli
from fastl2l.meta import search_meta_lr
from fastl2l.tasks import Quadratic


def make_trainer(meta_lr, checkpoint):
    rule = LSTMRule("raw", output_scale=1.0)
    task = Quadratic(dim=2, batch=4)
    sizes = {"horizon": 4, "unroll": 2, "trajectories": 2, "validation_problems": 2}
    return MetaTrainer(rule, task, meta_lr=meta_lr, checkpoint=checkpoint, **sizes)


def search(folder, **options):
    return search_meta_lr(make_trainer, folder, **{"trials": 4, "epochs": 2, "progress": False, **options})


set_state = optuna.storages.JournalStorage.set_trial_state_values


def only_running(storage, trial_id, state, values=None):
    return state == optuna.trial.TrialState.FAIL or set_state(storage, trial_id, state, values)


def test_the_best_comes_first_and_is_what_training_gives(tmp_path):
    found = search(tmp_path / "a")
    assert len(found) == 4
    assert len({trial.meta_lr for trial in found}) == 4
    assert all(1e-4 <= trial.meta_lr <= 1e-1 for trial in found)
    assert [trial.validation_loss for trial in found] == sorted(trial.validation_loss for trial in found)
    trainer = make_trainer(found[0].meta_lr, tmp_path / "alone.pt")
    trainer.fit(2, progress=False)
    assert trainer.best_loss == found[0].validation_loss
    assert search(tmp_path / "b") == found
    assert search(tmp_path / "c", seed=9) != found


@pytest.mark.parametrize("way", ["interrupted", "killed"])
def test_a_search_goes_on_in_the_middle_of_a_trial(tmp_path, monkeypatch, way):
    expected = search(tmp_path / "whole")
    epochs, epoch = [], MetaTrainer._epoch

    def stopped(trainer, *args):
        if len(epochs) == 5:
            raise KeyboardInterrupt
        epochs.append(1)
        return epoch(trainer, *args)

    monkeypatch.setattr(MetaTrainer, "_epoch", stopped)
    with monkeypatch.context() as patch:
        if way == "killed":  # then nobody tells the study that the trial has failed
            patch.setattr(optuna.storages.JournalStorage, "set_trial_state_values", only_running)
        with pytest.raises(KeyboardInterrupt):
            search(tmp_path / "cut")
    monkeypatch.setattr(MetaTrainer, "_epoch", lambda *args: epochs.append(1) or epoch(*args))
    found = search(tmp_path / "cut")
    assert len(epochs) == 8  # none was done twice
    assert len(found) == 4
    assert {trial.meta_lr for trial in expected[:2]} & {trial.meta_lr for trial in found}
    assert search(tmp_path / "cut") == found
    assert len(epochs) == 8


def test_more_trials_may_be_asked_for(tmp_path):
    first = search(tmp_path, trials=2)
    more = search(tmp_path, trials=3)
    assert len(more) == 3
    assert set(first) < set(more)


@pytest.mark.parametrize("other", [{"epochs": 3}, {"high": 0.2}])
def test_a_search_with_other_settings_is_refused(tmp_path, other):
    search(tmp_path, trials=1)
    with pytest.raises(ValueError, match=r"folder: .* holds a search with other settings: .*'epochs': 2"):
        search(tmp_path, trials=1, **other)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"trials": 0}, "trials: expected an integer >= 1, got 0"),
        ({"epochs": 0}, "epochs: expected an integer >= 1, got 0"),
        ({"low": 0.1, "high": 0.01}, "low, high: expected 0 < low < high, got 0.1 and 0.01"),
    ],
)
def test_bad_arguments_are_named_and_nothing_is_written(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        search(tmp_path / "new", **options)
    assert list(tmp_path.iterdir()) == []


def test_the_command_prints_and_draws(tmp_path):
    options = ["--task", "quadratic", "--trials", "2", "--epochs", "1", "--trajectories", "1", "--out", str(tmp_path)]
    done = CliRunner().invoke(cli.app, ["tune", *options], catch_exceptions=False)
    assert done.exit_code == 0
    assert "the best: --meta-lr" in done.stdout
    assert Image.open(tmp_path / "search.png").size == (1280, 800)
