"""Memory that is free is given back in long runs."""

from __future__ import annotations

import copy
import gc
import pickle
import weakref

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from fastl2l import GACRule, MetaTrainer, RNNpropRule, Trajectory, baselines, heap
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
    scratch, like = heap.Scratch(), torch.zeros(1)
    memories = [scratch.borrow((4, 6), like), scratch.borrow((2,), like)]
    for memory in memories:
        scratch.keep(memory)
    again = scratch.borrow((6, 4), like)
    assert (again.data_ptr(), again.shape) == (memories[0].data_ptr(), (6, 4))
    assert scratch.borrow((2,), like).data_ptr() == memories[1].data_ptr()
    assert scratch.borrow((6, 4), like).data_ptr() != memories[0].data_ptr()


@pytest.mark.parametrize(
    ("shape", "dtype"), [((4, 7), torch.float32), ((2, 6), torch.float32), ((4, 6), torch.float64)]
)
def test_what_is_kept_is_not_lent_to_who_wants_something_else(shape, dtype):
    scratch = heap.Scratch()
    memory = scratch.borrow((4, 6), torch.zeros(1))
    scratch.keep(memory)
    other = scratch.borrow(shape, torch.zeros(1, dtype=dtype))
    assert (other.shape, other.dtype) == (shape, dtype)
    assert other.data_ptr() != memory.data_ptr()


def test_only_plain_tensors_are_kept_and_lent():
    scratch, like = heap.Scratch(), torch.zeros(1)
    with torch.inference_mode():
        scratch.keep(scratch.borrow((4, 6), like))
    scratch.keep(torch.zeros(24, requires_grad=True))
    with FakeTensorMode() as mode:
        fake = torch.zeros(1)
        scratch.keep(scratch.borrow((4, 6), fake))
    assert not scratch._kept
    scratch.keep(scratch.borrow((4, 6), like))
    with mode:
        assert isinstance(scratch.borrow((4, 6), fake), FakeTensor)


def test_copies_have_memory_of_their_own():
    scratch = heap.Scratch()
    scratch.keep(memory := scratch.borrow((4, 6), torch.zeros(1)))
    for other in (copy.deepcopy(scratch), pickle.loads(pickle.dumps(scratch))):
        assert other.borrow((4, 6), memory).data_ptr() != memory.data_ptr()


def test_a_trajectory_s_memory_goes_with_it_and_a_training_s_with_its_end():
    trajectory = Trajectory(Quadratic(dim=4, batch=1).sample(0), GACRule(averages=2))
    trajectory.window([1.0] * 4)
    kept = weakref.ref(trajectory.scratch._kept[0])
    trajectory.window([1.0] * 4)
    assert trajectory.scratch._kept[0].data_ptr() == kept().data_ptr()
    del trajectory
    gc.collect()
    assert kept() is None

    trainer = MetaTrainer(GACRule(averages=2), Quadratic(dim=4, batch=1), horizon=8, unroll=4, trajectories=1)
    lent = []
    trainer._scratch.keep = lent.append
    trainer.fit(1, progress=False)
    assert len(lent) == 2
    assert not trainer._scratch._kept


def test_windows_do_not_share_their_states():
    """Two that are open at once, one of them in memory of a window that is done, are what each is alone."""
    torch.manual_seed(0)
    rule, where, backend = GACRule(averages=2), Coordinates((20,)), dispatch.select("auto", "cpu")
    gradients, adjoints = torch.randn(2, 3, 20), torch.randn(3, 20)

    def run(*seen):
        recordings = [coupled_window.record(rule, coupled.begin(rule, where), 3, where, backend, scratch) for _ in seen]
        for step in range(3):
            for recording, of_each in zip(recordings, seen, strict=True):
                recording.step(of_each[step])
        states = [recording.state for recording in recordings]
        found = [recording.backward(of_each, adjoints) for recording, of_each in zip(recordings, seen, strict=True)]
        return list(zip(found, states, strict=True))

    alone, scratch = [], heap.Scratch()
    for of_each in gradients:
        alone += run(of_each)
    torch.testing.assert_close(run(*gradients), alone, rtol=0, atol=0)
