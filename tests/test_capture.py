"""Captured windows train as eager ones do. Where there is no GPU, a tape of the operations stands in for the graph."""

from __future__ import annotations

import math
from dataclasses import dataclass

import pytest
import torch
from small_training import TASK, outcome, seeds, small_rule, trainer
from test_tasks import blobs
from torch import nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fastl2l import tasks
from fastl2l.baselines import Adam
from fastl2l.meta import Imitation, capture
from fastl2l.tasks import Quadratic
from fastl2l.tasks.quadratic import QuadraticProblem

LR = 2.0**-7
"""A graph reads the learning rate as float32, so that only such a number gives the same bits as an eager run."""


class Tape(TorchDispatchMode):
    """Like a CUDA graph: repeats operations on the memory they were recorded with, and runs no Python in between."""

    refused = ("_local_scalar_dense", "nonzero", "equal", "is_nonzero", "masked_select", "lift_fresh")
    """What would have the host wait for the device, or bring a number from the host."""

    def __init__(self):
        super().__init__()
        self.operations = []

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        if operator._schema.name.removeprefix("aten::") in self.refused:
            raise AssertionError(f"{operator} in what is captured")
        kwargs = kwargs or {}
        result = operator(*args, **kwargs)
        # What only marks traces, or makes another view of the same memory, is done.
        views = torch.Tag.inplace_view in operator.tags or (
            not operator._schema.is_mutable and any(value.alias_info for value in operator._schema.returns)
        )
        if operator.namespace != "profiler" and not views:
            self.operations.append((operator, args, kwargs, [tensor.detach() for tensor in tensors(result)]))
        return result

    @torch.no_grad()
    def replay(self):
        for operator, args, kwargs, results in self.operations:
            found = operator(*args, **kwargs)
            if not operator._schema.is_mutable:
                for mine, theirs in zip(results, tensors(found), strict=True):
                    mine.copy_(theirs)


def tensors(result):
    return [leaf for leaf in tree_leaves(result) if isinstance(leaf, torch.Tensor)]


def by_tape(work, device):
    for _ in range(3):
        work()
    with (tape := Tape()):
        work()
    return tape.replay


@pytest.fixture(params=["tape", "eager"])
def stand_in(request, monkeypatch):
    recorders = {"tape": by_tape, "eager": lambda work, device: work}
    monkeypatch.setitem(capture.RECORDERS, "cpu", recorders[request.param])


def both(task=TASK, epochs=3, rule=small_rule, **changes):
    """What a captured run leaves, and an eager one."""
    runs = [trainer(task, rule(), meta_lr=LR, capture=captured, **changes) for captured in (True, False)]
    for run in runs:
        run.fit(epochs, progress=False)
    return [outcome(run) for run in runs]


def with_buffers():
    return nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5), nn.Tanh(), nn.Linear(5, 3))


CASES = {
    "quadratic": {},
    "a batch": {"batch": 3, "validation_problems": 4},
    "digits": {"task": tasks.Digits(hidden=(3,), batch_size=8), "horizon": 72, "unroll": 36},
    "a batch of digits": {"task": tasks.Digits(hidden=(3,), batch_size=8), "batch": 3},
    "own network": {"task": tasks.from_module(with_buffers, F.cross_entropy, blobs(), batch_size=8)},
    "a batch of own networks": {
        "task": tasks.from_module(with_buffers, F.cross_entropy, blobs(), batch_size=8),
        "batch": 3,
    },
    "own networks of two parts": {
        "task": tasks.from_module(
            with_buffers, F.cross_entropy, blobs(), batch_size=8, parts={"last": ["3"], "first": ["[01]"]}
        ),
        "batch": 3,
    },
    "reference": {"backend": "reference"},
    "last step": {"step_weights": "last"},
    "in logs": {"log_floor": 1e-2},
    "horizons in a range": {"horizon": (4, 16)},
    "scaled, with convex functions": {"task": tasks.WithConvex(tasks.Scaled(TASK), 2), "batch": 3},
    "not clipped": {"clip_norm": None},
    "clipped": {"clip_norm": 1e-3},
    "one window": {"unroll": 8},
    "double": {"task": Quadratic(3, 4, torch.float64), "rule": lambda: small_rule(dtype=torch.float64)},
}


@pytest.mark.parametrize("case", CASES)
def test_captured_runs_have_the_bits_of_eager_ones(case, stand_in):
    captured, eager = both(**CASES[case])
    assert captured == eager
    assert captured[2] != [weight.tolist() for weight in small_rule().weights()]


def test_schedules(stand_in):
    rules = [small_rule(dtype=torch.float64) for _ in range(2)]
    task = Quadratic(3, 4, torch.float64)
    runs = [trainer(task, rule, schedule="cosine", capture=rule is rules[0]) for rule in rules]
    for run in runs:
        run.fit(4, progress=False)
    for epoch, eager in zip(runs[0].history, runs[1].history, strict=True):
        assert epoch.meta_lr == eager.meta_lr
        assert tuple(epoch) == pytest.approx(tuple(eager), rel=1e-5)
    for weight, eager in zip(*(rule.weights() for rule in rules), strict=True):
        torch.testing.assert_close(weight, eager, rtol=1e-5, atol=1e-7)


# What is not finite


class CliffProblem(QuadraticProblem):
    """Its losses are multiplied by `value` from step `edge` on."""

    def __init__(self, whole, edge, value):
        super().__init__(whole.w, whole.y, whole.theta0)
        self.edge, self.value = edge, value

    def inputs(self, step, device):
        return (torch.tensor(self.value if step >= self.edge else 1.0, device=device),)

    @staticmethod
    def function(theta, w, y, factor):
        return QuadraticProblem.function(theta, w, y) * factor


class KinkProblem(CliffProblem):
    """Where `value` is 0, its losses are finite and have no gradient from step `edge` on."""

    @staticmethod
    def function(theta, w, y, factor):
        return QuadraticProblem.function(theta, w, y) + ((theta.sum() * 0).abs() + factor).sqrt()


@dataclass(frozen=True)
class PureCliff(Quadratic):
    """The problems with these seeds are not finite from step `edge` on."""

    edge: int = 0
    seeds: tuple = ()
    value: float = math.nan
    problem: type = CliffProblem

    def sample(self, seed):
        return self.problem(super().sample(seed), self.edge if seed in self.seeds else math.inf, self.value)


@pytest.mark.parametrize("size", [1, 3])
@pytest.mark.parametrize("edge", [0, 1, 4, 6, 8])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_windows_that_are_not_finite_change_nothing_for_the_rest_of_their_trajectory(edge, value, size, stand_in):
    cliff = PureCliff(3, 4, edge=edge, seeds=seeds("train", 1, 4), value=value)
    captured, eager = both(cliff, epochs=3, batch=size)
    assert captured == eager


def test_skipped_windows_are_counted(stand_in):
    trained = trainer(PureCliff(3, 4, edge=6, seeds=seeds("train", 0, 1, 2, 4)), capture=True)
    history = trained.fit(3, progress=False)
    assert [epoch.skipped for epoch in history] == [3, 1, 0]
    assert all(weight.isfinite().all() for weight in trained.rule.weights())


def test_a_finite_loss_with_a_gradient_that_is_not_finite_is_skipped(stand_in):
    kink = PureCliff(3, 4, edge=8, seeds=seeds("train", 0, 2), value=0.0, problem=KinkProblem)
    captured, eager = both(kink, epochs=1)
    assert captured == eager
    (epoch,) = trainer(kink, capture=True).fit(1, progress=False)
    assert epoch.skipped == 2
    assert math.isfinite(epoch.train_loss)


def test_an_epoch_without_any_finite_window_changes_nothing(stand_in):
    trained = trainer(PureCliff(3, 4, edge=1, seeds=seeds("train", 0, 1, 2)), capture=True)
    (epoch,) = trained.fit(1, progress=False)
    assert epoch.skipped == 3
    assert math.isnan(epoch.train_loss)
    assert outcome(trained)[2] == [weight.tolist() for weight in small_rule().weights()]


# Runs in parts


def test_runs_can_be_taken_up_again_captured_or_not(tmp_path, stand_in):
    change = {"meta_lr": LR, "batch": 3, "trajectories": 6}
    whole = trainer(**change)
    whole.fit(5, progress=False)
    for epochs, captured in ((1, True), (2, True), (3, False), (5, True)):
        parts = trainer(checkpoint=tmp_path / "checkpoint", capture=captured, **change)
        parts.fit(epochs, progress=False)
    assert outcome(parts) == outcome(whole)
    again = trainer(capture=True, **change)
    for epochs in (0, 2, 2, 5):
        again.fit(epochs, progress=False)
    assert outcome(again) == outcome(whole)


def test_recording_changes_neither_rule_nor_meta_optimizer(monkeypatch):
    rule, before = small_rule(), small_rule()
    monkeypatch.setitem(capture.RECORDERS, "cpu", by_tape)
    trained = trainer(rule=rule, capture=True)
    trained._captured()
    assert all(torch.equal(a, b) for a, b in zip(rule.weights(), before.weights(), strict=True))
    assert all(not tensor.any() for state in trained._adam.state.values() for tensor in state.values())


# Without a word to the host


def test_the_tape_refuses_what_makes_the_host_wait():
    numbers = torch.ones(3)
    for ask in (lambda: numbers.sum().item(), lambda: bool(numbers[0] > 0), lambda: float(numbers[0]), numbers.nonzero):
        with pytest.raises(AssertionError, match="in what is captured"), Tape():
            ask()


def test_the_tape_repeats_what_was_done_on_the_same_memory():
    numbers, total = torch.ones(3), torch.zeros(())
    with (tape := Tape()):
        total.add_((numbers * 2).view(3)[1:].sum())
    numbers.fill_(10.0)
    tape.replay()
    assert total == 4 + 40


# Arguments


class Alone(nn.Module):
    """Its minibatch decides what it does, which neither vmap nor a graph can follow."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(6, 3)

    def forward(self, x):
        return self.layer(x if x.sum() > 0 else -x)


def test_the_cpu_has_no_graphs():
    with pytest.raises(ValueError, match="capture: expected a rule on a cuda device, got one on cpu"):
        trainer(capture=True)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"second_derivatives": True}, "capture: expected first-order windows, got second_derivatives=True"),
        (
            {"task": tasks.from_module(Alone, F.cross_entropy, blobs(), batch_size=8)},
            "capture: task 'custom': expected problems that say what is drawn .*, got one with a loss of its own",
        ),
        ({"second_minibatch": True}, "second_minibatch: expected none in captured windows, got True"),
        ({"imitation": Imitation([Adam(lr=0.1)])}, "imitation: expected none in captured windows, got Imitation"),
    ],
)
def test_what_cannot_be_captured_is_named_at_once(change, message, stand_in):
    with pytest.raises(ValueError, match=message):
        trainer(capture=True, **change)


@dataclass(frozen=True)
class Growing(Quadratic):
    """Its problems are of different sizes."""

    def sample(self, seed):
        second = seed in seeds("train", 1)
        return Quadratic(self.dim + second, self.batch).sample(seed)


def test_problems_of_another_shape_are_named(stand_in):
    trained = trainer(Growing(3, 4), capture=True)
    with pytest.raises(ValueError, match="capture: task 'quadratic': expected problems that differ in numbers alone"):
        trained.fit(1, progress=False)
