"""Problems in a batch take the way that each takes by itself; a rule learns from the mean of their meta-gradients."""

from __future__ import annotations

import math

import pytest
import torch
from helpers import random_rule
from small_training import TASK, Cliff, finished, outcome, seeds, small_rule, trainer
from test_tasks import ALL, blobs
from torch import nn
from torch.nn import functional as F

from fastl2l import Trajectory, tasks
from fastl2l.meta import checkpoint as checkpoint_module
from fastl2l.meta.checkpoint import CheckpointError
from fastl2l.tasks import Problem, batch
from fastl2l.tasks.base import is_pure, parts_of, problem_seed, value_and_grad

F64 = torch.float64


class Own(Problem):
    """Anyone's problem, which says nothing about itself but its loss."""

    task, functions = "own", 3

    def __init__(self, seed):
        generator = torch.Generator().manual_seed(seed)
        self.theta0 = torch.randn(6, generator=generator, dtype=F64)
        self.scale = torch.randn(16, 6, generator=generator, dtype=F64)

    def loss(self, theta, step):
        return (theta * self.scale[step]).sin().sum()


def module(make, **options):
    def in_double():
        return make().double()

    return tasks.from_module(in_double, F.cross_entropy, blobs(dtype=F64), batch_size=16, **options)


def with_numbers_of_its_own():
    """Batch norm writes to its buffers, and every network has others, also among what is not trained."""
    network = nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5), nn.Tanh(), nn.BatchNorm1d(5), nn.Linear(5, 3))
    network[0].bias.requires_grad_(False)
    network[3].eval()
    network[3].running_mean.normal_()
    return network


class TwoParts(Problem):
    """Whose parts have sizes of their own, by the seed."""

    task = "two parts"

    def __init__(self, seed):
        generator = torch.Generator().manual_seed(seed)
        self.parts = {"first": 3 + seed, "second": 2}
        self.theta0 = torch.randn(5 + seed, generator=generator, dtype=F64)

    def loss(self, theta, step):
        return (theta * torch.arange(1, len(theta) + 1)).sin().sum() * (1 + step)


def convolutional():
    layers = nn.Conv1d(1, 2, 3), nn.Flatten(), nn.Linear(8, 5), nn.Tanh(), nn.Unflatten(1, (1, 5)), nn.Conv1d(1, 1, 3)
    return nn.Sequential(nn.Unflatten(1, (1, 6)), *layers, nn.Flatten())


class Recurrent(nn.Module):
    """Nothing that vmap could take."""

    def __init__(self):
        super().__init__()
        self.first, self.last = nn.LSTM(1, 2, batch_first=True), nn.Linear(2, 3)

    def forward(self, x):
        return self.last(self.first(x.unsqueeze(2))[0][:, -1])


class Power(nn.Module):
    """Differs from others in something that is no Tensor, if `highest` is above 1."""

    def __init__(self, highest):
        super().__init__()
        self.layer, self.power = nn.Linear(6, 3), torch.randint(1, highest + 1, ()).item()

    def forward(self, x):
        return self.layer(x).tanh() ** self.power


def hooked():
    """Hooks are numbered through the process, and an object is equal to itself alone."""
    network = nn.Sequential(nn.Linear(6, 3))
    network.register_forward_hook(lambda module, inputs, output: output.tanh())
    network.marker = object()
    return network


TOGETHER = {
    "quadratic": lambda: tasks.Quadratic(dim=3, batch=4, dtype=F64).sample,
    "digits": lambda: tasks.Digits(hidden=(5,), batch_size=16, dtype=F64).sample,
    "digits, two layers": lambda: tasks.Digits(hidden=(5, 4), activation="tanh", batch_size=16, dtype=F64).sample,
    "module": lambda: module(with_numbers_of_its_own).sample,
    "same functions": lambda: module(lambda: Power(1)).sample,
    "parts": lambda: module(convolutional, parts=tasks.conv_and_fc).sample,
    "hooks": lambda: module(hooked).sample,
}
ALONE = {
    "own": lambda: Own,
    "own parts": lambda: TwoParts,
    "parts, not for vmap": lambda: module(Recurrent, parts={"head": ["last"], "body": ["first"]}).sample,
    "dropout": lambda: module(lambda: nn.Sequential(nn.Dropout(0.5), nn.Linear(6, 3))).sample,
    "not for vmap": lambda: module(Recurrent).sample,
    "other functions": lambda: module(lambda: Power(100)).sample,
    "other sizes": lambda: lambda seed: tasks.Quadratic(dim=3 + seed, batch=4, dtype=F64).sample(seed),
    "other data": lambda: (
        lambda seed: tasks.Digits(hidden=(5,), batch_size=16, split=("train", "test")[seed % 2], dtype=F64).sample(seed)
    ),
    "other minibatches": lambda: lambda seed: tasks.Digits(hidden=(5,), batch_size=16 + seed, dtype=F64).sample(seed),
    "a loss of its own": lambda: lambda seed: with_a_loss_of_its_own(tasks.Quadratic(dim=3, batch=4, dtype=F64), seed),
}


def with_a_loss_of_its_own(task, seed):
    problem = task.sample(seed)
    loss = problem.loss
    problem.loss = lambda theta, step: loss(theta, step) * (1 + step)
    return problem


KINDS = TOGETHER | ALONE


def split(together, problems):
    """What of theta belongs to each problem, taken part by part."""
    found, start = [[] for _ in problems], 0
    for part in parts_of(problems[0]):
        for pieces, problem in zip(found, problems, strict=True):
            size = parts_of(problem)[part]
            pieces.append(together[start : start + size])
            start += size
    assert start == len(together)
    return [torch.cat(pieces) for pieces in found]


def join(thetas, problems):
    """The inverse."""
    pieces = [theta.split(list(parts_of(problem).values())) for theta, problem in zip(thetas, problems, strict=True)]
    return torch.cat([piece for of_part in zip(*pieces, strict=True) for piece in of_part])


@pytest.mark.parametrize("kind", KINDS)
def test_problems_that_differ_in_numbers_alone_are_evaluated_at_once(kind):
    sample = KINDS[kind]()
    assert is_pure(batch([sample(0), sample(1), sample(2)])) == (kind in TOGETHER)


@pytest.mark.parametrize("kind", KINDS)
def test_losses_and_gradients_are_the_single_ones(kind):
    sample = KINDS[kind]()
    problems = [sample(seed) for seed in range(3)]
    together = batch(problems)
    assert together.functions == sum(problem.functions for problem in problems)
    for step in (3, 0, 70):
        if kind == "own" and step == 70:
            continue
        theta = together.theta0 + 0.1 * step
        loss, gradient = value_and_grad(together, theta, step)
        parts = [
            value_and_grad(problem, part, step) for problem, part in zip(problems, split(theta, problems), strict=True)
        ]
        torch.testing.assert_close(loss, sum(part[0] for part in parts), rtol=1e-13, atol=0)
        torch.testing.assert_close(gradient, join([part[1] for part in parts], problems), rtol=1e-12, atol=1e-14)
    fresh = [sample(seed) for seed in range(3)]  # nothing was written to
    assert torch.equal(together.theta0, join([problem.theta0 for problem in fresh], fresh))


@pytest.mark.parametrize("second_derivatives", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_the_meta_gradient_is_the_mean_of_the_single_ones(kind, second_derivatives):
    sample, rule, window_weights = KINDS[kind](), random_rule(hidden=5, dtype=F64), [1.0, 0.0, 2.0, 1.0]
    problems = [sample(seed) for seed in range(3)]
    alone, together = [Trajectory(problem, rule) for problem in problems], Trajectory(batch(problems), rule)
    for _ in range(2):
        singles = [one.window(window_weights, second_derivatives=second_derivatives) for one in alone]
        found = together.window(window_weights, second_derivatives=second_derivatives)
        losses, gradients = (torch.stack([window[i] for window in singles]).mean(0) for i in (0, 1))
        torch.testing.assert_close(found.losses, losses, rtol=1e-11, atol=0)
        torch.testing.assert_close(found.gradients, gradients, rtol=1e-9, atol=1e-11 * gradients.abs().max())
    torch.testing.assert_close(together.theta, join([one.theta for one in alone], problems), rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("name", ALL)
def test_every_task_can_be_batched(name):
    task = ALL[name]()
    problems = [task.sample(seed) for seed in range(2)]
    loss, gradient = value_and_grad(batch(problems), batch(problems).theta0, 1)
    singles = [value_and_grad(problem, problem.theta0, 1) for problem in problems]
    torch.testing.assert_close(loss, singles[0][0] + singles[1][0])
    torch.testing.assert_close(gradient, join([single[1] for single in singles], problems), rtol=1e-4, atol=1e-6)


def test_batches_of_batches_are_batches():
    task = tasks.Quadratic(dim=3, batch=2, dtype=F64)
    problems = [task.sample(seed) for seed in range(4)]
    flat, nested = batch(problems), batch([batch(problems[:2]), batch(problems[2:])])
    assert is_pure(nested)
    for a, b in zip(value_and_grad(flat, flat.theta0, 0), value_and_grad(nested, flat.theta0, 0), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-13, atol=0)


@pytest.mark.parametrize("kind", ["parts", "own parts", "parts, not for vmap"])
def test_a_part_of_a_batch_is_in_one_piece(kind):
    problems = [KINDS[kind]()(seed) for seed in range(4)]
    together = batch(problems)
    assert together.parts == {part: sum(problem.parts[part] for problem in problems) for part in problems[0].parts}
    for part, theta in zip(together.parts, together.theta0.split(list(together.parts.values())), strict=True):
        own = [split(problem.theta0, [problem])[0].split(list(problem.parts.values())) for problem in problems]
        assert torch.equal(theta, torch.cat([pieces[list(together.parts).index(part)] for pieces in own]))
    nested = batch([batch(problems[:2]), batch(problems[2:])])
    assert nested.parts == together.parts
    assert torch.equal(nested.theta0, together.theta0)
    for a, b in zip(value_and_grad(nested, nested.theta0, 1), value_and_grad(together, nested.theta0, 1), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-14)


def test_problems_without_parts_make_a_batch_without():
    assert batch([TASK.sample(0), TASK.sample(1)]).parts is None
    assert batch([Own(0), Own(1)]).parts is None


def test_one_problem_is_its_own_batch():
    problem = TASK.sample(0)
    assert batch([problem]) is problem


def test_bad_batches_are_named():
    with pytest.raises(ValueError, match="problems: expected at least one, all of as many functions, got none"):
        batch([])
    with pytest.raises(ValueError, match=r"problems: .*all of as many functions, got \[3, 4\] functions"):
        batch([TASK.sample(0), Own(0)])
    one, other = TwoParts(0), TwoParts(1)
    other.parts = {"second": 2, "first": 4}
    with pytest.raises(ValueError, match=r"problems: expected all of the same parts .*got first, second and second, f"):
        batch([one, other])
    other.parts = {"first": 2, "second": 2}
    with pytest.raises(ValueError, match="task 'two parts': parts: expected sizes that add up to the 6 coordinates"):
        batch([one, other])


# Training


def test_an_epoch_of_batches_is_what_the_documentation_says():
    task = tasks.Quadratic(dim=3, batch=4, dtype=F64)
    trained = trainer(task, small_rule(dtype=F64), seed=5, trajectories=4, batch=2, validation_problems=3)
    trained.fit(1, progress=False)
    twin, losses = small_rule(dtype=F64), []
    adam = torch.optim.Adam(twin.parameters(), lr=0.01)
    for first in (0, 2):
        pair = [Trajectory(task.sample(problem_seed(5, "train", first + i)), twin) for i in range(2)]
        for _ in range(2):
            windows = [trajectory.window([1.0] * 4) for trajectory in pair]
            gradients = (windows[0].gradients + windows[1].gradients) / 2
            for weight, part in zip(
                twin.weights(), gradients.split([weight.numel() for weight in twin.weights()]), strict=True
            ):
                weight.grad = part.view_as(weight)
            torch.nn.utils.clip_grad_norm_(twin.parameters(), 1.0)
            adam.step()
            losses += [window.losses.mean() for window in windows]
    (epoch,) = trained.history
    assert epoch.train_loss == pytest.approx(torch.stack(losses).mean().item(), rel=1e-6)
    for found, expected in zip(trained.rule.weights(), twin.weights(), strict=True):
        # clip_grad_norm_ divides by the norm plus 1e-6.
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-7)
    single = trainer(task, trained.rule, seed=5, validation_problems=3)
    assert epoch.validation_loss == pytest.approx(single.validate(), rel=1e-12)


def test_runs_of_batches_can_be_taken_up_again(tmp_path):
    change = {"batch": 3, "trajectories": 6, "validation_problems": 4}
    whole = finished(trainer(**change), 4)
    assert finished(trainer(**change), 4) == whole
    assert finished(trainer(**change | {"batch": 2}), 4) != whole
    for epochs in (1, 3, 4):
        resumed = trainer(checkpoint=tmp_path / "checkpoint", **change)
        resumed.fit(epochs, progress=False)
    assert outcome(resumed) == whole


def test_a_checkpoint_of_another_batch_is_refused_and_one_from_before_there_were_any_is_taken(tmp_path, monkeypatch):
    path = tmp_path / "checkpoint"
    trainer(checkpoint=path).fit(1, progress=False)
    with pytest.raises(CheckpointError, match="batch: expected 3, got 1"):
        trainer(checkpoint=path, batch=3)
    save = checkpoint_module.save

    def save_as_before(path, settings, state):
        save(path, {name: value for name, value in settings.items() if name != "batch"}, state)

    path.unlink()
    with monkeypatch.context() as before:
        before.setattr(checkpoint_module, "save", save_as_before)
        trainer(checkpoint=path).fit(1, progress=False)
    assert finished(trainer(checkpoint=path), 2) == finished(trainer(), 2)
    with pytest.raises(CheckpointError, match="batch: expected 3, got 1"):
        trainer(checkpoint=path, batch=3)


@pytest.mark.parametrize("second_derivatives", [False, True])
def test_a_window_is_skipped_for_the_whole_batch(second_derivatives):
    change = {"trajectories": 4, "batch": 2, "second_derivatives": second_derivatives}
    cliff = Cliff(3, 4, edge=6, seeds=seeds("train", 1, 4, 5))
    history = (trained := trainer(cliff, **change)).fit(3, progress=False)
    assert [epoch.skipped for epoch in history] == [1, 1, 0]
    assert all(math.isfinite(epoch.train_loss) and math.isfinite(epoch.validation_loss) for epoch in history)
    assert all(weight.isfinite().all() for weight in trained.rule.weights())


@pytest.mark.parametrize(
    ("size", "error", "message"),
    [
        (2, ValueError, "batch: expected a divisor of the trajectories 3, got 2"),
        (6, ValueError, "batch: expected a divisor of the trajectories 3, got 6"),
        (0, ValueError, "batch: expected an integer >= 1, got 0"),
        (1.0, TypeError, "batch: expected an integer >= 1, got 1.0"),
    ],
)
def test_bad_sizes_are_named(size, error, message):
    with pytest.raises(error, match=message):
        trainer(batch=size)
