"""Gradients with a graph are those without one, and can be differentiated again."""

from __future__ import annotations

import pytest
import torch
from helpers import RNNPROP, random_gradients, rule_of
from test_averaged_native import gac, ntm

from fastl2l import reference
from fastl2l.ops import coupled
from fastl2l.ops.coordinates import Coordinates
from fastl2l.ops.functional import update
from fastl2l.ops.layout import new_state

F64 = torch.float64
N, STEPS = 5, 3
HELPS = {"inside": True, "differences": True, "multiply": True, "reads": 2}
COUPLED = {
    "averages": lambda: gac(preprocess="raw"),
    "averages, three layers": lambda: gac((1, 0, 5), "raw"),
    "paper": lambda: ntm("matrix"),
    "pairs": ntm,
    "what helps": lambda: ntm("matrix", **HELPS),
    "pairs with what helps": lambda: ntm(**HELPS),
    "reads within": lambda: ntm("matrix", inside=True),
}


def of_coupled(rule, backend):
    """A loss of several steps, each of whose gradients depends on the steps before."""

    def loss(theta):
        state, where = coupled.begin(rule, Coordinates((N,))), Coordinates((N,))
        for _ in range(STEPS):
            change, state = coupled.step(rule, theta.sin(), state, where, backend=backend)
            theta = theta + change
        return theta.square().sum()

    return loss


def of_plain(rule, backend):
    def loss(theta):
        state = new_state(rule, N)
        for _ in range(STEPS):
            change, state = update(rule, theta.sin(), state, backend=backend)
            theta = theta + change
        return theta.square().sum()

    return loss


def derivatives(loss, theta, weights):
    """The gradient without a graph, with one, and the gradient of what it is along a direction."""
    inputs = [theta, *weights]
    without = torch.autograd.grad(loss(theta), inputs, materialize_grads=True)
    with_graph = torch.autograd.grad(loss(theta), inputs, create_graph=True, materialize_grads=True)
    along = sum((one * torch.linspace(-1, 1, one.numel(), dtype=F64).view_as(one)).sum() for one in with_graph)
    return without, with_graph, torch.autograd.grad(along, inputs, materialize_grads=True)


def along_by_differences(loss, theta, weights, step=1e-5):
    """The derivative of the gradient along a direction, the Hessian being symmetric."""
    inputs = [theta, *weights]
    directions = [torch.linspace(-1, 1, one.numel(), dtype=F64).view_as(one) for one in inputs]
    found = []
    for sign in (1, -1):
        with torch.no_grad():
            for one, direction in zip(inputs, directions, strict=True):
                one.add_(direction, alpha=sign * step)
        found.append(torch.autograd.grad(loss(theta), inputs, materialize_grads=True))
        with torch.no_grad():
            for one, direction in zip(inputs, directions, strict=True):
                one.add_(direction, alpha=-sign * step)
    return [(one - other) / (2 * step) for one, other in zip(*found, strict=True)]


def check(loss, weights):
    theta = random_gradients(N).to(F64).requires_grad_()
    without, with_graph, second = derivatives(loss, theta, weights)
    for one, other in zip(without, with_graph, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-12)
    for one, other in zip(second, along_by_differences(loss, theta, weights), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("backend", ["native", "reference"])
@pytest.mark.parametrize("way", COUPLED)
def test_of_several_steps_of_rules_whose_coordinates_talk(way, backend):
    rule = COUPLED[way]()
    check(of_coupled(rule, backend), rule.weights())


@pytest.mark.parametrize("backend", ["native", "reference"])
@pytest.mark.parametrize("text", ["raw:0.7 lstm:5,5 linear", "log_and_sign:5 lstm:3 linear", RNNPROP])
def test_of_several_steps_of_plain_rules(text, backend):
    rule = rule_of(text, dtype=F64)
    check(of_plain(rule, backend), rule.weights())


def test_the_reference_s_own_derivatives_are_the_same():
    """By torch alone, without any Function of fastl2l's."""
    rule = gac()
    theta = torch.linspace(-1, 1, N, dtype=F64, requires_grad=True)

    def loss(theta):
        rows = torch.zeros(rule.config.state_rows, N, dtype=F64)
        for _ in range(STEPS):
            change, rows = reference.coupled_step(theta.sin(), rows, rule.weights(), rule.config, 0.3)
            theta = theta + change
        return theta.square().sum()

    expected = derivatives(loss, theta, rule.weights())
    for found, true in zip(derivatives(of_coupled(rule, "native"), theta, rule.weights()), expected, strict=True):
        for one, other in zip(found, true, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-11)
