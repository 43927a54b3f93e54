"""Memory that is free is given back in long runs."""

from __future__ import annotations

import threading

import pytest
import torch

from fastl2l import GACRule, RNNpropRule, baselines, heap
from fastl2l.evaluate import follow
from fastl2l.experiments.own_networks_losses import whole_losses
from fastl2l.ops import coupled, coupled_window, dispatch
from fastl2l.ops.coordinates import Coordinates
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


def test_what_is_kept_is_lent_once_to_who_wants_as_much():
    like = torch.zeros(1)
    memory = heap.borrow((4, 6), like)
    heap.keep(memory)
    again = heap.borrow((6, 4), like)
    assert (again.data_ptr(), again.shape) == (memory.data_ptr(), (6, 4))
    assert heap.borrow((6, 4), like).data_ptr() != memory.data_ptr()


@pytest.mark.parametrize(
    ("shape", "dtype"), [((4, 7), torch.float32), ((2, 6), torch.float32), ((4, 6), torch.float64)]
)
def test_what_is_kept_is_not_lent_to_who_wants_something_else(shape, dtype):
    memory = heap.borrow((4, 6), torch.zeros(1))
    heap.keep(memory)
    other = heap.borrow(shape, torch.zeros(1, dtype=dtype))
    assert (other.shape, other.dtype) == (shape, dtype)
    assert other.data_ptr() != memory.data_ptr()


def test_what_is_kept_is_its_thread_s_until_it_is_given_back():
    memory, elsewhere = heap.borrow((4, 6), torch.zeros(1)), []
    heap.keep(memory)
    other = threading.Thread(target=lambda: elsewhere.append(heap.borrow((4, 6), torch.zeros(1))))
    other.start()
    other.join()
    assert elsewhere[0].data_ptr() != memory.data_ptr()
    heap.give_back()
    assert heap.borrow((4, 6), torch.zeros(1)).data_ptr() != memory.data_ptr()


def test_what_is_made_in_inference_mode_is_not_kept_for_others():
    with torch.inference_mode():
        memory = heap.borrow((4, 6), torch.zeros(1))
    heap.keep(memory)
    assert heap.borrow((4, 6), torch.zeros(1)).data_ptr() != memory.data_ptr()


def test_windows_do_not_share_their_states():
    """Two that are open at once, one of them in memory of a window that is done, are what each is alone."""
    torch.manual_seed(0)
    rule, where, backend = GACRule(averages=2), Coordinates((20,)), dispatch.select("auto", "cpu")
    gradients, adjoints = torch.randn(2, 3, 20), torch.randn(3, 20)

    def run(*seen):
        recordings = [coupled_window.record(rule, coupled.begin(rule, where), 3, where, backend) for _ in seen]
        for step in range(3):
            for recording, of_each in zip(recordings, seen, strict=True):
                recording.step(of_each[step])
        states = [recording.state for recording in recordings]
        found = [recording.backward(of_each, adjoints) for recording, of_each in zip(recordings, seen, strict=True)]
        return list(zip(found, states, strict=True))

    alone = []
    for of_each in gradients:
        heap.give_back()
        alone += run(of_each)
    torch.testing.assert_close(run(*gradients), alone, rtol=0, atol=0)
