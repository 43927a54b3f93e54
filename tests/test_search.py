"""The search of the meta learning rate finds the best of what it tried, and goes on where it was stopped."""

from __future__ import annotations

import math
import multiprocessing
import os
import threading
import time
from pathlib import Path

import pytest
from PIL import Image
from small_training import small_rule, trainer
from typer.testing import CliRunner

from fastl2l import LSTMRule, MetaTrainer, cli
from fastl2l.build import locked
from fastl2l.meta import search as search_module
from fastl2l.meta import search_meta_lr
from fastl2l.tasks import Quadratic


def make_trainer(meta_lr, checkpoint):
    rule = LSTMRule("raw", output_scale=1.0)
    task = Quadratic(dim=2, batch=4)
    sizes = {"horizon": 4, "unroll": 2, "trajectories": 2, "validation_problems": 2}
    return MetaTrainer(rule, task, meta_lr=meta_lr, checkpoint=checkpoint, **sizes)


def search(folder, **options):
    return search_meta_lr(make_trainer, folder, **{"trials": 4, "epochs": 2, "progress": False, **options})


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


@pytest.fixture
def epochs(monkeypatch):
    """Every epoch that is really done; the run is interrupted when as many are as `epochs[0]` says."""
    done, epoch = [None], MetaTrainer._epoch

    def counted(trainer, *args):
        if len(done) - 1 == done[0]:
            raise KeyboardInterrupt
        done.append(trainer.meta_lr)
        return epoch(trainer, *args)

    monkeypatch.setattr(MetaTrainer, "_epoch", counted)
    return done


@pytest.mark.parametrize("stopped_after", range(8))
def test_a_search_that_was_stopped_anywhere_is_the_same_search(tmp_path, epochs, stopped_after):
    expected = search(tmp_path / "whole")
    epochs[:] = [stopped_after]
    with pytest.raises(KeyboardInterrupt):
        search(tmp_path / "cut")
    epochs[0] = None
    assert search(tmp_path / "cut") == expected
    assert len(epochs) - 1 == 8  # none was done twice
    assert search(tmp_path / "cut") == expected
    assert len(epochs) - 1 == 8


fork = multiprocessing.get_context("fork")  # they begin at once, and import nothing


class Searching:
    """A process that searches in a folder, from a working directory."""

    def __init__(self, folder, cwd, storage=None):
        self.answer, sender = fork.Pipe(duplex=False)
        self.process = fork.Process(target=self._search, args=(folder, cwd, storage, sender))
        self.process.start()
        sender.close()
        assert self.answer.recv() == "ready"

    @staticmethod
    def _search(folder, cwd, storage, sender):
        os.chdir(cwd)
        sender.send("ready")
        sender.send(search(folder, trials=6, epochs=20, storage=storage))

    def kill(self):
        self.process.kill()
        self.process.join()

    def found(self):
        assert self.answer.poll(100)
        found = self.answer.recv()
        self.process.join()
        assert self.process.exitcode == 0
        return found


@pytest.mark.slow
def test_searches_that_are_killed_or_share_a_folder_find_the_same(tmp_path):
    expected = search(tmp_path / "alone", trials=6, epochs=20)
    for delay in (0.05, 0.2, 0.4):  # with a relative folder, as on the command line
        killed = Searching("shared", tmp_path)
        time.sleep(delay)
        killed.kill()
    together = [Searching("shared", tmp_path) for _ in range(3)]
    assert [one.found() for one in together] == [expected] * 3


STORAGES = ["trials.journal", "sqlite:///trials.db"]


@pytest.mark.slow
@pytest.mark.parametrize("storage", STORAGES)
def test_machines_that_share_a_storage_and_no_folder_find_the_same(storage, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    expected = search("alone", trials=6, epochs=20)
    killed = Searching("killed", tmp_path, storage)
    time.sleep(0.3)
    killed.kill()
    together = [Searching(folder, tmp_path, storage) for folder in ("one", "other")]
    assert [one.found() for one in together] == [expected] * 2
    assert search("late", trials=6, epochs=20, storage=storage) == expected
    assert not list(Path("late").glob("*.pt"))  # all was there


@pytest.mark.parametrize("storage", STORAGES)
def test_what_one_machine_has_finished_no_other_begins(storage, tmp_path, epochs, monkeypatch):
    monkeypatch.chdir(tmp_path)
    epochs[:] = [5]
    with pytest.raises(KeyboardInterrupt):
        search("one", storage=storage)
    epochs[0] = None
    found = search("other", storage=storage)
    assert len(epochs) - 1 == 5 + 4  # two trials were finished
    assert search("third", storage=storage) == found == search("alone")
    assert search("fourth", storage=storage, seed=1, trials=2) != found[:2]


@pytest.mark.parametrize("storage", STORAGES)
def test_trials_that_diverged_are_kept_in_a_storage(storage, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(
        MetaTrainer, "validate", lambda trainer: math.inf if trainer.meta_lr < 0.01 else trainer.meta_lr
    )
    found = search("one", storage=storage)
    assert {trial.validation_loss == math.inf for trial in found} == {True, False}
    monkeypatch.setattr(MetaTrainer, "fit", None)
    assert search("other", storage=storage) == found


@pytest.mark.parametrize("storage", STORAGES)
def test_trials_in_a_storage_are_of_their_first_weights(storage, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    found = []
    for folder, seed, kept in (("a", 0, storage), ("b", 1, storage), ("c", 1, None)):
        found.append(
            search_meta_lr(
                lambda lr, path, seed=seed: trainer(rule=small_rule(seed=seed), meta_lr=lr, checkpoint=path),
                folder, trials=2, epochs=1, storage=kept, progress=False,
            )
        )  # fmt: skip
    assert found[1] == found[2] != found[0]


def study_of_a_new_database(storage, barrier, answers):
    barrier.wait()
    try:
        answers.put(search_module._study(storage, {}).study_name)
    except ValueError as error:
        answers.put(str(error))


def test_machines_may_begin_with_a_new_database_at_once(tmp_path):
    barrier, answers = fork.Barrier(3), fork.Queue()
    arguments = f"sqlite:///{tmp_path}/trials.db", barrier, answers
    begun = [fork.Process(target=study_of_a_new_database, args=arguments) for _ in range(3)]
    for one in begun:
        one.start()
    names = {answers.get(timeout=60) for _ in begun}
    for one in begun:
        one.join()
    assert names == {search_module._study(f"sqlite:///{tmp_path}/trials.db", {}).study_name}


@pytest.mark.parametrize("storage", ["sqlite:////nowhere/trials.db", "nosuch://host/name"])
def test_storages_that_are_none_are_named(storage, tmp_path, monkeypatch):
    monkeypatch.setattr(search_module, "WAITS", (0.01,))
    with pytest.raises(ValueError, match="storage: expected a database's URL or a journal file, got"):
        search(tmp_path, storage=storage)


def test_searches_at_once_share_the_trials(tmp_path, epochs):
    with locked(tmp_path / "trial-0.lock"):  # somebody else is at it
        other = threading.Thread(target=search, args=(tmp_path,))
        other.start()
        while len(epochs) - 1 < 6:
            time.sleep(0.01)
            assert other.is_alive()
        assert {path.name for path in tmp_path.glob("*.pt")} == {f"trial-{number}.pt" for number in (1, 2, 3)}
    other.join()
    assert len(epochs) - 1 == 8
    assert len(search(tmp_path)) == 4
    assert len(epochs) - 1 == 8


def test_a_damaged_settings_file_is_named_with_the_cure(tmp_path):
    found, path = search(tmp_path, trials=1), tmp_path / "search.json"
    whole = path.read_text()
    for damaged in ("", "[" * 10**6, whole.replace('"epochs": 2', '"epochs": 3'), whole[:99]):
        path.write_text(damaged)
        with pytest.raises(ValueError, match=r"folder: .*search.json: .*; remove it to go on"):
            search(tmp_path, trials=1)
    path.unlink()
    assert search(tmp_path, trials=1) == found


def test_what_an_older_version_left_is_named_and_not_read(tmp_path):
    (tmp_path / "study.journal").write_text('{"op_code": 0, "work')  # cut
    (tmp_path / "study.journal.lock").symlink_to("nowhere/study.journal")
    with pytest.warns(RuntimeWarning, match="study.journal is of an older version's search"):
        found = search(tmp_path, trials=1)
    assert search(tmp_path, trials=1) == found


def test_more_trials_may_be_asked_for(tmp_path):
    first = search(tmp_path, trials=2)
    more = search(tmp_path, trials=3)
    assert len(more) == 3
    assert set(first) < set(more)
    assert search(tmp_path, trials=2) == first


@pytest.mark.parametrize(
    ("other", "message"),
    [
        ({"epochs": 3}, "epochs: expected 3, got 2"),
        ({"high": 0.2}, r"meta_lr: expected \[0.0001, 0.2\], got \[0.0001, 0.1\]"),
        ({"seed": 1}, "search_seed: expected 1, got 0"),
    ],
)
def test_a_search_with_other_settings_is_refused(tmp_path, other, message):
    search(tmp_path, trials=1)
    with pytest.raises(ValueError, match=f"folder: .* holds a search with other settings; {message}"):
        search(tmp_path, trials=1, **other)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"trials": 0}, "trials: expected an integer >= 1, got 0"),
        ({"epochs": 0}, "epochs: expected an integer >= 1, got 0"),
        ({"low": 0.1, "high": 0.01}, "low, high: expected 0 < low < high, got 0.1 and 0.01"),
        ({"high": float("inf")}, "high: expected a finite number, got inf"),
        ({"high": float("nan")}, "low, high: expected 0 < low < high, got 0.0001 and nan"),
        ({"seed": 2**32}, r"seed: expected an integer below 2\^32, got 4294967296"),
        ({"seed": -1}, "seed: expected an integer >= 0, got -1"),
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
    assert Image.open(tmp_path / "search.png").width == 1280
