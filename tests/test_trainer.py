"""Meta-training improves a rule, and gives the same bits however often it is stopped."""

from __future__ import annotations

import copy
import hashlib
import io
import math
import os
import pickle
import random
import signal
import sys
import textwrap
import time
import zipfile
from dataclasses import dataclass

import forked
import pytest
import torch
from small_training import TASK, Cliff, finished, outcome, seeds, small_rule, trainer

from fastl2l import LSTMRule, MetaTrainer, Trajectory
from fastl2l.meta import checkpoint as checkpoint_module
from fastl2l.meta.checkpoint import CheckpointError
from fastl2l.tasks import Quadratic
from fastl2l.tasks.base import problem_seed

LOSSES = [3.0, 1.0, 2.0, 4.0, 1.0, 5.0]
"""Validation losses. The best weights soon lie behind, so that it shows whether they are kept."""


# Learning


def final_losses(rule, task, reset=False):
    losses = []
    for seed in range(10):
        trajectory = Trajectory(task.sample(problem_seed(0, "test", seed)), rule)
        start = trajectory.loss
        for _ in range(20):
            trajectory.advance()
            if reset:
                trajectory.state.zero_()
        losses.append((trajectory.loss / start).item())
    return sum(losses) / len(losses)


def test_training_makes_a_rule_that_optimizes_new_problems_and_needs_its_state():
    task, rule = Quadratic(dim=5, batch=32), LSTMRule("raw", output_scale=1.0)
    before = final_losses(rule, task)
    trained = MetaTrainer(rule, task, horizon=20, unroll=10, meta_lr=3e-3, trajectories=10, validation_problems=4)
    history = trained.fit(10, progress=False)
    after = final_losses(rule, task)
    assert before > 1  # the untrained rule diverges
    assert after < 0.05
    assert history[-1].train_loss < 0.2 * history[0].train_loss
    # With a state that is reset at every step, as in a widespread fork, it is far worse.
    assert final_losses(rule, task, reset=True) > 2 * after


@pytest.mark.parametrize(
    "change", [{}, {"clip_norm": None}, {"clip_norm": 1e-3}, {"step_weights": "last"}, {"second_derivatives": True}]
)
def test_an_epoch_is_what_the_documentation_says(change):
    trained, twin = trainer(seed=5, **change), small_rule()
    trained.fit(1, progress=False)
    adam, losses = torch.optim.Adam(twin.parameters(), lr=0.01), []
    for index in range(3):
        trajectory = Trajectory(TASK.sample(problem_seed(5, "train", index)), twin)
        for _ in range(2):
            window = trajectory.window(
                [0, 0, 0, 1] if "step_weights" in change else [1] * 4,
                second_derivatives=change.get("second_derivatives", False),
            )
            sizes = [weight.numel() for weight in twin.weights()]
            for weight, grad in zip(twin.weights(), window.gradients.split(sizes), strict=True):
                weight.grad = grad.view_as(weight)
            if (norm := change.get("clip_norm", 1.0)) is not None:
                torch.nn.utils.clip_grad_norm_(twin.parameters(), norm)
            adam.step()
            losses.append(window.losses.mean())
    assert trained.history[0].train_loss == pytest.approx(torch.stack(losses).mean().item(), rel=1e-4)
    for found, expected in zip(trained.rule.weights(), twin.weights(), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    validation = [Trajectory(TASK.sample(problem_seed(5, "validation", index)), trained.rule) for index in range(2)]
    for trajectory in validation:
        for _ in range(8):
            trajectory.advance()
    mean = sum(trajectory.loss.item() for trajectory in validation) / 2
    assert trained.history[0].validation_loss == pytest.approx(mean, rel=1e-6)


def test_the_rule_ends_with_the_last_weights_if_told_so():
    validation = [3.0, 1.0, 2.0]
    best, last = (trainer(validation=validation, keep=keep) for keep in ("best", "last"))
    assert best.kept_loss == last.kept_loss == math.inf
    for trained in (best, last):
        trained.fit(2, progress=False)
        trained.fit(3, progress=False)
    assert (best.kept_loss, last.kept_loss, last.best_loss) == (1.0, 2.0, 1.0)
    assert outcome(best)[0] == outcome(last)[0]
    shorter = trainer(validation=validation, keep="last")
    shorter.fit(2, progress=False)
    assert outcome(shorter)[2] == outcome(best)[2] != outcome(last)[2]


def test_the_rule_ends_with_the_best_weights():
    trained = trainer(validation=LOSSES)
    history = trained.fit(6, progress=False)
    assert [epoch.validation_loss for epoch in history] == LOSSES
    assert trained.best_loss == 1
    assert outcome(trained)[2] == finished(trainer(validation=LOSSES), 2)[2]
    assert outcome(trained)[2] != finished(trainer(validation=[1.0] * 5 + [0.0]), 6)[2]


def test_validation_is_repeatable():
    trained = trainer()
    history = trained.fit(3, progress=False)
    assert trained.best_loss == min(epoch.validation_loss for epoch in history) == trained.validate()


def test_schedules():
    assert [epoch.meta_lr for epoch in trainer().fit(3, progress=False)] == [0.01] * 3
    cosine = [epoch.meta_lr for epoch in trainer(schedule="cosine").fit(4, progress=False)]
    assert cosine == pytest.approx([0.01 * 0.5 * (1 + math.cos(math.pi * epoch / 4)) for epoch in range(4)])


def test_progress_is_shown_unless_not_wanted(capsys):
    trainer().fit(2)
    assert "meta-training" in capsys.readouterr().err
    trainer().fit(2, progress=False)
    assert capsys.readouterr().err == ""


# The same bits


@pytest.mark.parametrize("change", [{}, {"second_derivatives": True}, {"backend": "reference"}])
def test_runs_with_one_seed_have_the_same_bits_and_others_do_not(change):
    torch.manual_seed(1)
    one = finished(trainer(seed=1, **change), 3)
    torch.manual_seed(2)
    assert finished(trainer(seed=1, **change), 3) == one
    assert finished(trainer(seed=2, **change), 3) != one


def test_two_calls_of_fit_are_one():
    whole = finished(trainer(validation=LOSSES), 6)
    parts = trainer(validation=LOSSES)
    for epochs in (0, 2, 2, 5, 6, 3):
        parts.fit(epochs, progress=False)
    assert outcome(parts) == whole


@pytest.mark.parametrize("moment", ["validate", "_copy_weights", "_copy_adam", "_save"])
def test_a_run_that_is_stopped_at_any_moment_goes_on_to_the_same_bits(moment, monkeypatch):
    """Also where an epoch is over and only half of what it gave has been put away."""
    whole = finished(trainer(), 4)
    stopped = trainer()
    stopped.fit(2, progress=False)
    with monkeypatch.context() as patch:
        patch.setattr(stopped, moment, lambda: os.kill(os.getpid(), signal.SIGINT))
        with pytest.raises(KeyboardInterrupt):
            stopped.fit(4, progress=False)
    done = len(stopped.history)
    assert outcome(stopped) == finished(trainer(), done)
    assert finished(stopped, 4) == whole


def test_the_length_of_a_schedule_stays(tmp_path):
    """A cosine of another length behind the first epochs would be a run that no arguments describe."""
    run = trainer(checkpoint=tmp_path / "run", schedule="cosine")
    run.fit(4, progress=False)
    before = outcome(run)
    for epochs in (3, 8):
        with pytest.raises(ValueError, match=rf"epochs: expected .*cosine schedule, got {epochs}: epoch 2 had"):
            run.fit(epochs, progress=False)
    assert outcome(run) == before
    for epochs in (0, 4):
        again = trainer(checkpoint=tmp_path / "run", schedule="cosine")
        again.fit(epochs, progress=False)
        assert outcome(again) == before


@dataclass(frozen=True)
class Interrupted(Quadratic):
    """Interrupts the run that asks for its `stop_at`-th problem."""

    stop_at: int = 0
    asked = [0]  # noqa: RUF012

    def sample(self, seed):
        self.asked[0] += 1
        if self.asked[0] == self.stop_at:
            raise KeyboardInterrupt
        return super().sample(seed)

    def spec(self):
        return TASK.spec()


@pytest.mark.parametrize("stop_at", range(4, 15, 2))
def test_a_run_that_was_interrupted_can_be_taken_up_again(stop_at, tmp_path):
    whole = finished(trainer(validation=LOSSES), 4)
    Interrupted.asked[0] = 0
    stopped = trainer(
        Interrupted(dim=3, batch=4, stop_at=stop_at), checkpoint=tmp_path / "checkpoint", validation=LOSSES
    )
    with pytest.raises(KeyboardInterrupt):
        stopped.fit(4, progress=False)
    assert len(stopped.history) < 4
    assert finished(trainer(checkpoint=tmp_path / "checkpoint", validation=LOSSES), 4) == whole
    (tmp_path / "checkpoint").unlink()
    assert finished(stopped, 4) == whole  # in the same process, as in a notebook


@pytest.mark.parametrize("moment", ["fsync", "replace"])
def test_a_run_that_could_not_be_saved_can_be_taken_up_again(moment, tmp_path, monkeypatch):
    whole = finished(trainer(validation=LOSSES), 4)
    stopped, calls, real = trainer(checkpoint=tmp_path / "checkpoint", validation=LOSSES), [], getattr(os, moment)

    def fail(*arguments):
        calls.append(arguments)
        if len(calls) == 4:
            raise OSError("disk full")
        return real(*arguments)

    monkeypatch.setattr(os, moment, fail)
    with pytest.raises(OSError, match="disk full"):
        stopped.fit(4, progress=False)
    assert finished(trainer(checkpoint=tmp_path / "checkpoint", validation=LOSSES), 4) == whole
    assert finished(stopped, 4) == whole


CHILD = """
    import torch
    from fastl2l import LSTMRule, MetaTrainer
    from fastl2l.tasks import Quadratic

    torch.set_num_threads(1)
    rule = LSTMRule("raw", output_scale=1.0, hidden_size=4, num_layers=1)
    trainer = MetaTrainer(rule, Quadratic(dim=3, batch=4), horizon=8, unroll=4, trajectories=3, validation_problems=2,
                          meta_lr=0.3, schedule="cosine", checkpoint="checkpoint")
    print(len(trainer.history), flush=True)
    trainer.fit(50, progress=False)
    print([tuple(epoch) for epoch in trainer.history], trainer.best_loss, [w.tolist() for w in rule.weights()])
"""


def start(folder):
    folder.mkdir(exist_ok=True)
    return forked.start(textwrap.dedent(CHILD), os.environ, folder, folder)


def written(folder):
    return (folder / forked.OUTPUT).read_text().splitlines()


def killed(folder, saves, delay):
    """How many epochs a run had behind it that was killed `delay` seconds after it had saved so many times."""
    child, last, path = start(folder), None, folder / "checkpoint"
    while saves >= 0:
        now = path.stat().st_ino if path.exists() else None
        saves, last = saves - (now != last), now
        assert child.exitcode is None, "it was over before it was killed"
        time.sleep(0.0005)
    time.sleep(delay)
    child.kill()
    child.join()
    assert child.exitcode == -signal.SIGKILL
    return int(written(folder)[0])


@pytest.mark.slow
def test_a_run_that_is_killed_again_and_again_ends_with_the_same_bits(tmp_path):
    whole, numbers = start(tmp_path / "whole"), random.Random()
    behind = [killed(tmp_path / "killed", saves, numbers.uniform(0, 0.02)) for saves in (1, 10, 15)]
    last = start(tmp_path / "killed")
    for process in (last, whole):
        process.join()
        assert process.exitcode == 0
    first, outcome = written(tmp_path / "killed")
    assert behind[0] == 0
    assert behind[0] < behind[1] < behind[2] < int(first) < 50
    assert outcome == written(tmp_path / "whole")[1]


# Checkpoints


@pytest.fixture
def saved(tmp_path):
    path = tmp_path / "checkpoint"
    trainer(checkpoint=path).fit(2, progress=False)
    return path


def refused(path, message, **changes):
    content = path.read_bytes()
    rule = changes.pop("rule", None) or small_rule()
    before = copy.deepcopy(rule.state_dict())
    with pytest.raises(CheckpointError, match=message) as caught:
        trainer(rule=rule, checkpoint=path, **changes)
    assert str(path) in str(caught.value)
    assert path.read_bytes() == content
    assert all(torch.equal(rule.state_dict()[name], before[name]) for name in before)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"meta_lr": 0.02}, "meta_lr: expected 0.02, got 0.01"),
        ({"seed": 1}, "seed: expected 1, got 0"),
        ({"horizon": 4}, "horizon: expected 4, got 8"),
        ({"schedule": "cosine"}, "schedule: expected 'cosine', got 'constant'"),
        ({"clip_norm": None}, "clip_norm: expected None, got 1.0"),
        ({"step_weights": "last"}, r"step_weights: expected \[0.0, 0.0, 0.0, 1.0\], got \[1.0"),
        ({"second_derivatives": True}, "second_derivatives: expected True, got False"),
        ({"task": Quadratic(dim=4, batch=4)}, "task: expected .*'dim': 4.*got .*'dim': 3"),
        ({"rule": small_rule(hidden_size=5)}, "rule: expected .*lstm:5 .*got .*lstm:4 "),
        ({"meta_lr": 0.02, "seed": 1, "trajectories": 9}, "meta_lr: expected 0.02, got 0.01 .and 2 more"),
    ],
)
def test_a_checkpoint_of_another_run_is_refused(saved, change, message):
    refused(saved, message, **change)


def test_a_damaged_checkpoint_is_refused(saved):
    numbers, whole = random.Random(0), saved.read_bytes()
    damaged = [whole[:length] for length in range(0, len(whole), 501)]
    damaged += [numbers.randbytes(length) for length in (1, 30, 1000, 9000)]
    for _ in range(100):
        wrong = bytearray(whole)
        wrong[numbers.randrange(len(wrong))] ^= 1 << numbers.randrange(8)
        damaged.append(bytes(wrong))
    for content in damaged:
        saved.write_bytes(content)
        refused(saved, "expected a checkpoint, and it is damaged or something else")


def test_other_files_are_refused(saved, monkeypatch):
    for other in ({}, [1], torch.zeros(3), {"version": 1, "settings": {}, "state": {}}):
        torch.save(other, saved)
        refused(saved, "expected a checkpoint, and it is damaged or something else")
    saved.unlink()
    with monkeypatch.context() as later:
        later.setattr(checkpoint_module, "VERSION", 99)
        trainer(checkpoint=saved).fit(1, progress=False)
    refused(saved, "expected checkpoint version 2, got 99")


def sealed(path, content, line=b"fastl2l checkpoint 2\n"):
    """A checkpoint as save writes it, of any content."""
    if not isinstance(content, bytes):
        buffer = io.BytesIO()
        torch.save(content, buffer)
        content = buffer.getvalue()
    path.write_bytes(line + hashlib.sha256(content).digest() + content)


def content(path):
    return torch.load(io.BytesIO(path.read_bytes().split(b"\n", 1)[1][32:]))


def test_a_checkpoint_of_the_first_version_is_read_on(saved):
    sealed(saved, {"version": 1} | content(saved), b"fastl2l checkpoint\n")
    assert finished(trainer(checkpoint=saved), 4) == finished(trainer(), 4)


def test_the_version_is_looked_at_before_anything_else(saved):
    saved.write_bytes(b"fastl2l checkpoint 3\nof another kind")
    refused(saved, "expected checkpoint version 2, got 3")
    sealed(saved, {"version": 7, "settings": {}, "state": {}}, b"fastl2l checkpoint\n")
    refused(saved, "got other content .*version 7")


@pytest.mark.parametrize(
    "change",
    [
        lambda one: [],
        lambda one: {},
        lambda one: 3,
        lambda one: one | {"settings": 3},
        lambda one: {"settings": one["settings"]},
        lambda one: one | {"state": None},
        lambda one: one | {"state": {}},
        lambda one: one | {"state": one["state"] | {"history": 3}},
        lambda one: one | {"state": one["state"] | {"history": [3]}},
        lambda one: one | {"state": one["state"] | {"history": [(1, 2)]}},
        lambda one: one | {"state": one["state"] | {"history": [("1", 2, 3, 4, 5)]}},
        lambda one: one | {"state": one["state"] | {"best_loss": "1"}},
        lambda one: one | {"state": one["state"] | {"current": {}}},
        lambda one: one | {"state": one["state"] | {"best": one["state"]["best"] | {"more": torch.zeros(1)}}},
        lambda one: one | {"state": one["state"] | {"best": dict.fromkeys(one["state"]["best"], torch.zeros(7))}},
        lambda one: one | {"state": one["state"] | {"best": dict.fromkeys(one["state"]["best"], 1.0)}},
        lambda one: one | {"state": one["state"] | {"adam": {}}},
        lambda one: one | {"state": one["state"] | {"adam": {"state": {0: {}}, "param_groups": [{}]}}},
        lambda one: one | {"state": one["state"] | {"adam": {"state": {0: 1}, "param_groups": [{}]}}},
        lambda one: with_adam(one, lambda entries: {0: entries[1], 1: entries[0]}),
        lambda one: with_adam(one, lambda entries: dict.fromkeys(entries, entries[0])),
        lambda one: with_adam(one, lambda entries: entries | {len(entries): entries[0]}),
        lambda one: one | {"state": "x" * 10**6},
        lambda one: one | {"settings": one["settings"] | {"seed": "x" * 10**6}},
        lambda one: one | {"settings": one["settings"] | {"seed": torch.zeros(3)}},
        lambda one: b"",
        lambda one: b"x" * 1000,
        lambda one: pickle.dumps(one["settings"]),
        lambda one: deflated(one),
    ],
)
def test_sealed_checkpoints_of_other_content_are_refused(saved, change):
    sealed(saved, change(content(saved)))
    refused(saved, "checkpoint: ")


def with_adam(one, change):
    """Adam's two means of other weights than theirs, or of some alone: it writes to as many numbers as a weight has."""
    state = one["state"]
    entries = state["adam"]["state"]
    return one | {"state": state | {"adam": state["adam"] | {"state": entries | change(entries)}}}


def test_how_adam_is_run_is_not_a_checkpoint_s_word(saved):
    one = content(saved)
    one["state"]["adam"]["param_groups"][0] |= {
        "maximize": True,
        "weight_decay": 0.5,
        "betas": (0.1, 0.2),
        "amsgrad": True,
    }
    sealed(saved, one)
    assert finished(trainer(checkpoint=saved), 4) == finished(trainer(), 4)


def deflated(one):
    """What torch.save makes of `one` and of 100 MB of zeros, packed."""
    buffer, packed = io.BytesIO(), io.BytesIO()
    torch.save(one | {"more": torch.zeros(25_000_000)}, buffer)
    with zipfile.ZipFile(buffer) as before, zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as after:
        for entry in before.infolist():
            after.writestr(entry.filename, before.read(entry))
    assert len(packed.getvalue()) < 1_000_000
    return packed.getvalue()


def test_messages_do_not_grow_with_a_checkpoint(saved):
    one = content(saved)
    for other in (one | {"state": "x" * 10**6}, one | {"settings": one["settings"] | {"seed": "x" * 10**6}}):
        sealed(saved, other)
        with pytest.raises(CheckpointError) as caught:
            trainer(checkpoint=saved)
        assert len(str(caught.value)) < 1500


def test_a_checkpoint_larger_than_its_run_is_not_read(saved):
    os.truncate(saved, 2**40)  # takes no place on the disk
    with pytest.raises(CheckpointError, match=r"checkpoint: expected at most \d+ bytes, got more"):
        trainer(checkpoint=saved)


def test_a_checkpoint_that_came_later_is_looked_at(tmp_path):
    """By a trainer that was made before: it goes on from its own run's, and leaves another's alone."""
    path, whole = tmp_path / "run", finished(trainer(), 3)
    early, behind = trainer(checkpoint=path), trainer(checkpoint=path)
    others = trainer(checkpoint=path, meta_lr=0.02), trainer(checkpoint=path, rule=small_rule(seed=1))
    trainer(checkpoint=path).fit(2, progress=False)
    content = path.read_bytes()
    for other, message in zip(others, ("meta_lr: expected 0.02, got 0.01", "other first weights"), strict=True):
        with pytest.raises(CheckpointError, match=message):
            other.fit(1, progress=False)
    assert path.read_bytes() == content
    assert len(behind.fit(1, progress=False)) == 2
    assert path.read_bytes() == content
    assert finished(early, 3) == whole


# What is not finite


@pytest.mark.parametrize("second_derivatives", [False, True])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_windows_that_are_not_finite_are_skipped_and_counted(value, second_derivatives):
    change = {"second_derivatives": second_derivatives}
    cliff = Cliff(3, 4, edge=6, seeds=seeds("train", 1, 4), value=value)
    history = (trained := trainer(cliff, **change)).fit(3, progress=False)
    assert [epoch.skipped for epoch in history] == [1, 1, 0]
    assert all(math.isfinite(epoch.train_loss) and math.isfinite(epoch.validation_loss) for epoch in history)
    assert all(weight.isfinite().all() for weight in trained.rule.weights())
    # The first window of such a trajectory counts, and nothing of the second.
    one = finished(trainer(Cliff(3, 4, edge=6, seeds=seeds("train", 0), value=value), trajectories=1, **change), 1)
    short = trainer(trajectories=1, horizon=4, **change)
    short.fit(1, progress=False)
    assert one[2] == outcome(short)[2]


@dataclass(frozen=True)
class Kink(Quadratic):
    """Its last loss is finite and has no gradient."""

    def sample(self, seed):
        problem = super().sample(seed)
        loss = problem.loss
        problem.loss = lambda theta, step: loss(theta, step) + ((theta.sum() * 0).abs().sqrt() if step == 8 else 0)
        return problem


def test_a_finite_loss_with_a_gradient_that_is_not_finite_is_skipped():
    trained = trainer(Kink(3, 4))
    (epoch,) = trained.fit(1, progress=False)
    assert epoch.skipped == 3
    assert math.isfinite(epoch.validation_loss)
    assert all(weight.isfinite().all() for weight in trained.rule.weights())


def test_an_epoch_without_any_finite_window_changes_nothing():
    trained = trainer(Cliff(3, 4, edge=1, seeds=seeds("train", 0, 1, 2)))
    history = trained.fit(1, progress=False)
    assert history[0].skipped == 3
    assert math.isnan(history[0].train_loss)
    assert outcome(trained)[2] == [weight.tolist() for weight in small_rule().weights()]


def test_diverged_validation_is_infinite_and_never_the_best():
    trained = trainer(Cliff(3, 4, edge=3, seeds=seeds("validation", 1)))
    history = trained.fit(2, progress=False)
    assert [epoch.validation_loss for epoch in history] == [math.inf] * 2
    assert trained.best_loss == math.inf
    assert outcome(trained)[2] == [weight.tolist() for weight in small_rule().weights()]


def test_a_loss_that_is_not_finite_at_the_start_is_refused():
    with pytest.raises(ValueError, match="task 'quadratic': loss at theta0: expected a finite number, got nan"):
        trainer(Cliff(3, 4, seeds=seeds("validation", 0)))


@dataclass(frozen=True)
class Vector(Quadratic):
    """Its losses are no scalars from step `edge` on."""

    edge: int = 0

    def sample(self, seed):
        problem = super().sample(seed)
        loss = problem.loss
        problem.loss = lambda theta, step: loss(theta, step).expand(2) if step >= self.edge else loss(theta, step)
        return problem


def test_a_loss_that_is_no_scalar_is_refused():
    with pytest.raises(ValueError, match=r"task 'quadratic': loss.*got a Tensor of shape \[2\]; take its mean or sum"):
        trainer(Vector(3, 4))
    with pytest.raises(ValueError, match=r"task 'quadratic': loss.*got a Tensor of shape \[2\]; take its mean or sum"):
        trainer(Vector(3, 4, edge=3)).fit(1, progress=False)


# Arguments


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"rule": torch.nn.Linear(1, 1)}, TypeError, "rule: expected a rule or a dict of rules by part, got Linear"),
        ({"task": "quadratic"}, TypeError, "task: expected a fastl2l.tasks.Task, got str"),
        ({"task": Quadratic(dtype=torch.float64)}, ValueError, "problem: expected theta_0 in torch.float32"),
        ({"unroll": 3}, ValueError, "unroll: expected a divisor of the horizon 8, got 3"),
        ({"unroll": 16}, ValueError, "unroll: expected a divisor of the horizon 8, got 16"),
        ({"unroll": 0}, ValueError, "unroll: expected an integer >= 1, got 0"),
        ({"horizon": 8.0}, TypeError, "horizon: expected an integer >= 1, got 8.0"),
        ({"trajectories": 0}, ValueError, "trajectories: expected an integer >= 1, got 0"),
        ({"validation_problems": "2"}, TypeError, "validation_problems: expected an integer >= 1, got '2'"),
        ({"seed": "a"}, TypeError, "seed: expected an integer >= 0, got 'a'"),
        ({"second_minibatch": 1}, TypeError, "second_minibatch: expected True or False, got 1"),
        ({"second_derivatives": "no"}, TypeError, "second_derivatives: expected True or False, got 'no'"),
        ({"capture": None}, TypeError, "capture: expected True or False, got None"),
        ({"seed": -1}, ValueError, "seed: expected an integer >= 0, got -1"),
        ({"meta_lr": 0}, ValueError, "meta_lr: expected a finite positive number, got 0"),
        ({"meta_lr": "1"}, ValueError, "meta_lr: expected a finite positive number, got '1'"),
        ({"meta_lr": None}, ValueError, "meta_lr: expected a finite positive number, got None"),
        ({"clip_norm": -1.0}, ValueError, "clip_norm: expected a finite positive number, got -1.0"),
        ({"keep": "first"}, ValueError, "keep: expected best or last, got 'first'"),
        ({"schedule": "linear"}, ValueError, "schedule: expected one of constant, cosine, got 'linear'"),
        ({"step_weights": [1, 1]}, ValueError, "step_weights: expected 4 finite numbers"),
        ({"step_weights": 1.0}, ValueError, "step_weights: expected None, 'last' or 4 numbers, got 1.0"),
        ({"backend": "fast"}, ValueError, "backend: expected one of auto, reference, native, triton, got 'fast'"),
    ],
)
def test_bad_arguments_are_named(change, error, message, tmp_path):
    paths = {"checkpoint": tmp_path / "checkpoint", "tensorboard": tmp_path / "curves"}
    with pytest.raises(error, match=message):
        trainer(**paths, **change)
    assert not list(tmp_path.iterdir())


def test_epochs_are_counted():
    with pytest.raises(TypeError, match=r"epochs: expected an integer >= 0, got 1.5"):
        trainer().fit(1.5)
    with pytest.raises(ValueError, match="epochs: expected an integer >= 0, got -1"):
        trainer().fit(-1)
    assert trainer().fit(0) == []


# TensorBoard


def test_curves_are_written_for_tensorboard(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    history = trainer(tensorboard=tmp_path / "curves").fit(3, progress=False)
    events = EventAccumulator(str(tmp_path / "curves"))
    events.Reload()
    for name in ("train_loss", "validation_loss", "meta_lr", "skipped"):
        found = events.Scalars(f"meta/{name}")
        assert [event.step for event in found] == [1, 2, 3]
        assert [event.value for event in found] == pytest.approx([getattr(epoch, name) for epoch in history])


def test_a_missing_tensorboard_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(ImportError, match=r"pip install fastl2l\[tensorboard\]"):
        trainer(tensorboard=tmp_path)


# Whose run it is


def test_a_run_goes_on_with_the_weights_that_it_began_with_or_has_left(tmp_path):
    path = tmp_path / "run.pt"
    whole = finished(trainer(), 3)
    finished(trainer(checkpoint=path), 1)
    again = trainer(checkpoint=path)
    finished(again, 2)
    left = again.rule  # as the run has left it
    assert finished(trainer(rule=left, checkpoint=path), 3) == whole
    with pytest.raises(CheckpointError, match="is of a run from other first weights; expected a rule as that began"):
        trainer(rule=small_rule(seed=1), checkpoint=path)


def test_another_backend_is_another_run(tmp_path):
    finished(trainer(checkpoint=tmp_path / "run.pt"), 1)
    with pytest.raises(CheckpointError, match="backend: expected 'reference', got 'native'"):
        trainer(checkpoint=tmp_path / "run.pt", backend="reference")
    assert len(trainer(checkpoint=tmp_path / "run.pt", backend="native").history) == 1  # which is what auto took


def test_a_checkpoint_from_before_runs_had_first_weights_is_taken(tmp_path):
    path = tmp_path / "run.pt"
    made = trainer(checkpoint=path)
    whole = finished(made, 2)
    settings = {name: value for name, value in made.settings().items() if name != "backend"}
    settings["rule"] |= {
        "config": {
            "preprocess": "raw", "p": 10.0, "scale": 1.0, "output_scale": 1.0, "hidden_size": 4, "num_layers": 1,
        }
    }  # fmt: skip
    state = {
        "history": [tuple(epoch) for epoch in made.history], "best_loss": made.best_loss, "current": made._current,
        "best": made._best, "adam": made._adam_state,
    }  # fmt: skip
    checkpoint_module.save(path, settings, state)
    assert finished(trainer(checkpoint=path), 2) == whole


def test_two_at_once_do_not_share_a_checkpoint(tmp_path):
    one, other = trainer(checkpoint=tmp_path / "run.pt"), trainer(checkpoint=tmp_path / "run.pt")
    one._epoch = lambda *_: other.fit(1, progress=False)
    with pytest.raises(RuntimeError, match=r"checkpoint: .*run.pt is another run's at this moment"):
        one.fit(1, progress=False)
    del one._epoch
    one.fit(1, progress=False)


@pytest.mark.parametrize("keep", ["best", "last"])
@pytest.mark.parametrize("stop", [KeyboardInterrupt, ZeroDivisionError])
def test_a_run_that_is_stopped_leaves_the_weights_of_its_last_epoch_and_goes_on(keep, stop, monkeypatch):
    whole, expected = trainer(keep=keep), []
    for epochs in (1, 2, 3):
        expected.append(finished(whole, epochs))
    stopped = trainer(keep=keep)
    stopped.fit(2, progress=False)

    def fail(*_, **__):
        stopped.rule.weight_out.data += 1  # in the middle of an epoch
        raise stop

    monkeypatch.setattr(stopped, "validate", fail)
    with pytest.raises(stop):
        stopped.fit(3, progress=False)
    assert outcome(stopped) == expected[1]
    monkeypatch.undo()
    assert finished(stopped, 3) == expected[2]


def test_weights_that_are_tied_or_thawed_are_refused():
    tied = LSTMRule("raw", hidden_size=4)
    tied.weight_hh_l1 = tied.weight_hh_l0
    with pytest.raises(ValueError, match="rule: expected a tensor for each weight, got one for two of them"):
        trainer(rule=tied)
    made = trainer()
    made.rule.weight_out.requires_grad_(False)
    with pytest.raises(ValueError, match="with the same weights to train as when the trainer was made"):
        made.fit(1, progress=False)


def test_a_checkpoint_is_one_file_s_by_whatever_name(tmp_path):
    (tmp_path / "other.pt").symlink_to(tmp_path / "run.pt")
    one, other = trainer(checkpoint=tmp_path / "run.pt"), trainer(checkpoint=tmp_path / "other.pt")
    one._epoch = lambda *_: other.fit(1, progress=False)
    with pytest.raises(RuntimeError, match=r"checkpoint: .*other.pt is another run's at this moment"):
        one.fit(1, progress=False)
