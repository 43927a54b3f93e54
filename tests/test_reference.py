"""The oracle computes what the paper says, and what PyTorch's own modules compute."""

from __future__ import annotations

import math

import pytest
import torch
from helpers import constants, detached, random_gradients, random_rows, random_rule
from torch import nn

from fastl2l import LSTMRule, reference

F64 = torch.float64
EXACT = {"rtol": 1e-13, "atol": 1e-15}


def log_sign(gradient: float, p: float) -> tuple[float, float]:
    """Andrychowicz et al. 2016, appendix A, in plain Python."""
    if abs(gradient) >= math.exp(-p):
        return math.log(abs(gradient)) / p, math.copysign(1, gradient)
    return -1, math.exp(p) * gradient


@pytest.mark.parametrize("p", [10.0, 5.0, 0.5, 88.0])
def test_log_sign_is_the_papers(p):
    edge = math.exp(-p)
    above, below = edge * (1 + 1e-6), edge * (1 - 1e-6)
    values = [above, -above, below, -below, edge / 3, 0.0, -0.0, 1.0, -7.0, 1e30, -1e-30, 1e-38]
    found = reference.features(torch.tensor(values, dtype=F64), "log_sign", p)
    expected = torch.tensor([log_sign(value, p) for value in values], dtype=F64).T
    torch.testing.assert_close(found, expected, rtol=1e-14, atol=1e-14)


@pytest.mark.parametrize("dtype", [torch.float32, F64])
def test_log_sign_is_continuous_at_the_switch(dtype):
    edge = torch.tensor(math.exp(-10), dtype=F64).to(dtype)
    below, above = torch.nextafter(edge, torch.zeros_like(edge)), torch.nextafter(edge, torch.ones_like(edge))
    found = reference.features(torch.stack([below, edge, above]), "log_sign", 10.0)
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(found, torch.tensor([[-1.0], [1.0]], dtype=dtype).expand(2, 3), rtol=0, atol=8 * eps)
    assert found[0, 0] == -1
    assert found[1, 1] == 1  # the edge itself belongs to the logarithm


def test_what_is_not_finite_is_not_hidden():
    gradient = torch.tensor([math.nan, math.inf, -math.inf])
    first, second = reference.features(gradient, "log_sign", 10.0)
    assert first[0].isnan()
    assert second[0].isnan()
    assert first[1:].tolist() == [math.inf, math.inf]
    assert second[1:].tolist() == [1, -1]
    assert reference.features(gradient, "raw", 2.0)[0].isnan().tolist() == [True, False, False]


def test_raw_is_the_scaled_gradient():
    gradient = torch.tensor([-1.5, 0.0, 4.0])
    assert reference.features(gradient, "raw", 0.5).tolist() == [[-0.75, 0.0, 2.0]]


def test_a_gradient_on_the_other_branch_sends_no_nan_back():
    gradient = torch.tensor([0.0, 1e-30, 1e-3, -2.0], dtype=F64, requires_grad=True)
    reference.features(gradient, "log_sign", 10.0).sum().backward()
    small = math.exp(10)
    torch.testing.assert_close(gradient.grad, torch.tensor([small, small, 100.0, -0.05], dtype=F64))


@pytest.mark.parametrize("preprocess", ["raw", "log_sign"])
@pytest.mark.parametrize("layers", [1, 2, 3])
def test_steps_are_lstm_cells_and_a_linear_layer(preprocess, layers):
    torch.manual_seed(0)
    n, hidden = 11, 6
    features = 1 if preprocess == "raw" else 2
    cells = [nn.LSTMCell(hidden if layer else features, hidden, dtype=F64) for layer in range(layers)]
    output = nn.Linear(hidden, 1, dtype=F64)
    rule = LSTMRule.from_lstm(cells, output, preprocess=preprocess, scale=0.3, p=4.0, output_scale=0.7)
    state = torch.zeros(rule.config.state_rows, n, dtype=F64)
    theirs = [(torch.zeros(n, hidden, dtype=F64),) * 2 for _ in cells]
    for step in range(6):
        gradient = random_gradients(n, seed=step).double()
        x = reference.features(gradient, *constants(rule)[:2]).T
        for layer, cell in enumerate(cells):
            theirs[layer] = cell(x, theirs[layer])
            x = theirs[layer][0]
        update, state = reference.step(gradient, state, rule.weights(), *constants(rule))
        torch.testing.assert_close(update, 0.7 * output(x)[:, 0], **EXACT)
        torch.testing.assert_close(state, torch.cat([part.T for pair in theirs for part in pair]), **EXACT)


def test_a_long_trajectory_is_nn_lstm_s():
    rule = random_rule(dtype=F64)
    lstm = nn.LSTM(2, 20, 2, dtype=F64)
    with torch.no_grad():
        for name, weight in lstm.named_parameters():
            if name.startswith("bias_hh"):
                weight.zero_()
            else:
                weight.copy_(getattr(rule, name.replace("bias_ih", "bias")))
    gradients = random_gradients(300, 5).double()
    x = torch.stack([reference.features(gradient, "log_sign", 10.0).T for gradient in gradients])
    expected = 0.3 * (lstm(x)[0] @ rule.weight_out + rule.bias_out)
    state, updates = torch.zeros(80, 5, dtype=F64), []
    for gradient in gradients:
        update, state = reference.step(gradient, state, rule.weights(), *constants(rule))
        updates.append(update)
    torch.testing.assert_close(torch.stack(updates), expected, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("preprocess", ["raw", "log_sign"])
def test_gradients_are_those_of_differences(preprocess):
    rule = random_rule(preprocess, 3, 2, dtype=F64)
    # On both sides of log_sign's switch at 4.5e-5, far from it as finite differences go.
    gradient = torch.tensor([0.7, -2e-3, 2e-5, -1e-5, 0.0], dtype=F64, requires_grad=True)
    rows = random_rows(rule, 5).double().requires_grad_()
    weights = [weight.requires_grad_() for weight in detached(rule)]

    def step(gradient, rows, *weights):
        return reference.step(gradient, rows, weights, *constants(rule))

    assert torch.autograd.gradcheck(step, (gradient, rows, *weights), eps=1e-7, atol=1e-5, rtol=1e-4)
    if preprocess == "raw":  # log_sign's would need differences far below float64's precision
        assert torch.autograd.gradgradcheck(step, (gradient, rows, *weights))


def test_coordinates_do_not_meet():
    rule = random_rule()
    gradient, rows = random_gradients(7), random_rows(rule, 7)
    update, state = reference.step(gradient, rows, detached(rule), *constants(rule))
    for i in range(7):
        alone, alone_state = reference.step(gradient[i : i + 1], rows[:, i : i + 1], detached(rule), *constants(rule))
        torch.testing.assert_close(alone[0], update[i])
        torch.testing.assert_close(alone_state[:, 0], state[:, i])
