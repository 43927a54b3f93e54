"""Memory that is free is given back in long runs."""

from __future__ import annotations

import pytest

from fastl2l import RNNpropRule, baselines, heap
from fastl2l.evaluate import follow
from fastl2l.experiments.own_networks_losses import whole_losses
from fastl2l.tasks import Digits, Quadratic


@pytest.fixture
def given_back(monkeypatch, tmp_path):
    times = []
    monkeypatch.setenv("FASTL2L_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(heap, "give_back", lambda: times.append(1))
    return times


def test_steps_come_one_by_one(given_back):
    steps = heap.tidily(iter(range(600)))
    assert next(steps) == 0
    assert list(steps) == list(range(1, 600))
    assert len(given_back) == 2


@pytest.mark.parametrize(
    "optimizer", [RNNpropRule(hidden_size=2), RNNpropRule(hidden_size=2, relative=True), baselines.SGD(1e-3)]
)
def test_memory_is_given_back_in_long_runs(optimizer, given_back):
    follow(Quadratic(dim=2, batch=1), optimizer, heap.EVERY + 1, range(1))
    assert len(given_back) == 1
    whole_losses(Digits(hidden=(2,)), optimizer, heap.EVERY + 1, range(1))
    assert len(given_back) == 2


def test_what_is_given_back_is_not_what_is_in_use():
    kept = [bytes([number]) * 100_000 for number in range(50)]
    heap.give_back()
    assert all(set(one) == {number} for number, one in enumerate(kept))
