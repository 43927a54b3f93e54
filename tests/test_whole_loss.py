"""The loss on a whole data set: every example once, in bounded memory."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fastl2l.tasks import Digits, Quadratic, from_module
from fastl2l.tasks.base import Minibatches

X, Y = torch.randn(103, 4, generator=torch.Generator().manual_seed(1)), torch.arange(103) % 3


def task(make_module, **options):
    return from_module(make_module, F.cross_entropy, (X, Y), **{"batch_size": 10} | options)


def test_every_row_comes_once_in_even_minibatches():
    parts = list(Minibatches(5, 103, 10).whole(torch.device("cpu")))
    assert [len(part) for part in parts] == [10] * 4 + [9] * 7
    assert sorted(torch.cat(parts).tolist()) == list(range(103))
    assert any(part.tolist() != sorted(part.tolist()) for part in parts)  # mixed, though data may be sorted by class
    others = Minibatches(6, 103, 10).whole(torch.device("cpu"))
    assert all(map(torch.equal, parts, others))


@pytest.mark.parametrize("batch_size", [1, 10, 103, 500])
def test_it_is_the_mean_over_all_examples(batch_size):
    problem = task(lambda: nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)), batch_size=batch_size).sample(1)
    found = problem.whole_loss(problem.theta0)
    assert found.dtype == torch.float64
    assert not found.requires_grad
    torch.testing.assert_close(found.item(), F.cross_entropy(problem.module(X), Y).item(), rtol=1e-6, atol=0)


def test_that_of_classification_is_over_its_split():
    for split in ("train", "test"):
        digits = Digits(hidden=(5,), batch_size=100, split=split)
        problem = digits.sample(2)
        images, labels, _ = digits.data(split)
        expected = F.cross_entropy(problem.logits(problem.theta0, images.flatten(1)), labels)
        torch.testing.assert_close(problem.whole_loss(problem.theta0).item(), expected.item(), rtol=1e-6, atol=0)


def test_batch_norm_sees_minibatches_and_remembers_nothing():
    problem = task(lambda: nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3)), batch_size=52).sample(1)
    first, second = Minibatches(1, 103, 52).whole(torch.device("cpu"))
    found = problem.whole_loss(problem.theta0)
    assert torch.equal(found, problem.whole_loss(problem.theta0))
    losses = [len(rows) * F.cross_entropy(problem.module(X[rows]), Y[rows]).item() for rows in (first, second)]
    torch.testing.assert_close(found.item(), sum(losses) / 103, rtol=1e-6, atol=0)


def test_dropout_is_drawn_by_the_seed_alone():
    dropout = task(lambda: nn.Sequential(nn.Linear(4, 30), nn.Dropout(), nn.Linear(30, 3)))
    state = torch.get_rng_state()
    problem = dropout.sample(1)
    found = problem.whole_loss(problem.theta0)
    assert torch.equal(state, torch.get_rng_state())
    torch.rand(3)
    assert torch.equal(found, dropout.sample(1).whole_loss(problem.theta0))
    assert not torch.equal(found, dropout.sample(2).whole_loss(problem.theta0))


def test_a_problem_without_examples_says_so():
    problem = Quadratic().sample(0)
    with pytest.raises(
        NotImplementedError, match="task 'quadratic': whole_loss: expected a problem with a set of exam"
    ):
        problem.whole_loss(problem.theta0)
