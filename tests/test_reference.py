"""The oracle computes what the paper says, and what PyTorch's own modules compute."""

from __future__ import annotations

import math

import pytest
import torch
from helpers import RNNPROP, constants, detached, lstm, random_gradients, random_rows, random_rule, rule_of
from torch import nn

from fastl2l import LSTMRule, reference
from fastl2l.ops import dispatch, update
from fastl2l.ops.layout import from_rows, new_state
from fastl2l.rule_config import Adam, LogAndSign, LogSign, Raw

F64 = torch.float64
EXACT = {"rtol": 1e-13, "atol": 1e-15}


def log_sign(gradient: float, p: float) -> tuple[float, float]:
    """Andrychowicz et al. 2016, appendix A, in plain Python."""
    if abs(gradient) >= math.exp(-p):
        return math.log(abs(gradient)) / p, math.copysign(1, gradient)
    return -1, math.exp(p) * gradient


@pytest.mark.parametrize("p", [10.0, 5.0, 0.5, 87.0])
def test_log_sign_is_the_papers(p):
    edge = math.exp(-p)
    above, below = edge * (1 + 1e-6), edge * (1 - 1e-6)
    values = [above, -above, below, -below, edge / 3, 0.0, -0.0, 1.0, -7.0, 1e30, -1e-30, 1e-38]
    found = reference.log_sign(torch.tensor(values, dtype=F64), LogSign(p))
    expected = torch.tensor([log_sign(value, p) for value in values], dtype=F64).T
    torch.testing.assert_close(found, expected, rtol=1e-14, atol=1e-14)


@pytest.mark.parametrize("dtype", [torch.float32, F64])
def test_log_sign_is_continuous_at_the_switch(dtype):
    edge = torch.tensor(math.exp(-10), dtype=F64).to(dtype)
    below, above = torch.nextafter(edge, torch.zeros_like(edge)), torch.nextafter(edge, torch.ones_like(edge))
    found = reference.log_sign(torch.stack([below, edge, above]), LogSign(10.0))
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(found, torch.tensor([[-1.0], [1.0]], dtype=dtype).expand(2, 3), rtol=0, atol=8 * eps)
    assert found[0, 0] == -1
    assert found[1, 1] == 1  # the edge itself belongs to the logarithm


def test_log_and_sign_is_log_sign_without_a_switch():
    values = torch.tensor([1e-9, -1e-4, 0.3, -7.0, 1e30, 0.0], dtype=F64)
    first, second = reference.log_and_sign(values, LogAndSign(5))
    for value, log, sign in zip(values.tolist(), first.tolist(), second.tolist(), strict=True):
        assert log == pytest.approx(max(math.log(abs(value) + 2**-23) / 5, -1), rel=1e-14)
        assert sign == pytest.approx(min(max(value * math.exp(5), -1), 1), rel=1e-14)
    assert reference.log_and_sign(torch.tensor([math.nan]), LogAndSign(5)).isnan().all()


def test_what_is_not_finite_is_not_hidden():
    gradient = torch.tensor([math.nan, math.inf, -math.inf])
    first, second = reference.log_sign(gradient, LogSign(10.0))
    assert first[0].isnan()
    assert second[0].isnan()
    assert first[1:].tolist() == [math.inf, math.inf]
    assert second[1:].tolist() == [1, -1]
    assert reference.raw(gradient, Raw(2.0))[0].isnan().tolist() == [True, False, False]


def test_raw_is_the_scaled_gradient():
    gradient = torch.tensor([-1.5, 0.0, 4.0])
    assert reference.raw(gradient, Raw(0.5)).tolist() == [[-0.75, 0.0, 2.0]]


def test_a_gradient_on_the_other_branch_sends_no_nan_back():
    gradient = torch.tensor([0.0, 1e-30, 1e-3, -2.0], dtype=F64, requires_grad=True)
    reference.log_sign(gradient, LogSign(10.0)).sum().backward()
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
        x = reference.features(gradient, state[:0], rule.config.features)[0].T
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
    x = torch.stack([reference.log_sign(gradient, LogSign(10.0)).T for gradient in gradients])
    expected = 0.3 * (lstm(x)[0] @ rule.weight_out + rule.bias_out)
    state, updates = torch.zeros(80, 5, dtype=F64), []
    for gradient in gradients:
        update, state = reference.step(gradient, state, rule.weights(), *constants(rule))
        updates.append(update)
    torch.testing.assert_close(torch.stack(updates), expected, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("text", [lstm("raw", 3, 2), lstm("log_sign", 3, 2), "adam:0.9,0.99,1e-06 elu:4 lstm:3,3 tanh"])
def test_gradients_are_those_of_differences(text):
    rule = rule_of(text, dtype=F64)
    # On both sides of log_sign's switch at 4.5e-5, far from it as finite differences go.
    gradient = torch.tensor([0.7, -2e-3, 2e-5, -1e-5, 0.0], dtype=F64, requires_grad=True)
    rows = random_rows(rule, 5).double().requires_grad_()
    weights = [weight.requires_grad_() for weight in detached(rule)]

    def step(gradient, rows, *weights):
        return reference.step(gradient, rows, weights, *constants(rule))

    assert torch.autograd.gradcheck(step, (gradient, rows, *weights), eps=1e-7, atol=1e-5, rtol=1e-4)
    if not text.startswith("log_sign"):  # whose would need differences far below float64's precision
        assert torch.autograd.gradgradcheck(step, (gradient, rows, *weights))


@pytest.mark.parametrize("betas", [(0.95, 0.95), (0.9, 0.999)])
def test_adam_s_features_are_those_of_torch_s_adam(betas):
    """Its step is -lr * m / (sqrt(v) + eps); the rule may begin in the middle of a run, with means of its own."""
    generator = torch.Generator().manual_seed(0)
    gradients = torch.randn(30, 7, generator=generator, dtype=F64) * torch.logspace(-6, 3, 7, dtype=F64)
    gradients[3:, 0] = 0
    param = torch.zeros(7, dtype=F64, requires_grad=True)
    theirs = torch.optim.Adam([param], lr=1.0, betas=betas, eps=1e-8)
    part = Adam(*betas, 1e-8)
    rows = torch.zeros(part.state_rows, 7, dtype=F64)
    for gradient in gradients:
        before, param.grad = param.detach().clone(), gradient
        theirs.step()
        (first, second), rows = reference.adam(gradient, rows, part)
        torch.testing.assert_close(first, before - param.detach(), rtol=1e-10, atol=1e-12)
        torch.testing.assert_close(second * first.sign(), gradient * (first / (rows[0] / rows[2])).abs() * first.sign())


def test_adam_s_features_of_nothing_are_nothing_and_send_back_no_nan():
    part = Adam()
    gradient, rows = torch.zeros(3, dtype=F64, requires_grad=True), torch.zeros(3, 3, dtype=F64, requires_grad=True)
    found, new = reference.adam(gradient, rows, part)
    assert not found.any()
    torch.testing.assert_close(new[2], torch.full((3,), 0.05, dtype=F64))
    for part in torch.autograd.grad(found.sum() + new.sum(), [gradient, rows]):
        assert part.isfinite().all()


@pytest.mark.parametrize("backend", ["native", "reference"])
def test_rnnprop_is_its_modules(backend):
    """Lv et al. 2017, section 4, by torch's own: Linear, ELU, two LSTMCells, Linear, tanh."""
    rule = rule_of(RNNPROP, dtype=F64)
    project, cells, output = nn.Linear(2, 20), [nn.LSTMCell(20, 20), nn.LSTMCell(20, 20)], nn.Linear(20, 1)
    modules = nn.ModuleList([project, *cells, output]).double()
    with torch.no_grad():
        for cell in cells:
            cell.bias_hh.zero_()
        theirs = [p for name, p in modules.named_parameters() if "bias_hh" not in name]
        order = [0, 1, 2, 3, 4, 5, 6, 7, 8, 9]
        for mine, its in zip(order, theirs, strict=True):
            its.copy_(rule.weights()[mine].view_as(its))
    step = dispatch.select(backend, "cpu").step_
    states, mine, adam = [(torch.zeros(9, 20, dtype=F64),) * 2] * 2, new_state(rule, 9), torch.zeros(3, 9, dtype=F64)
    for seed in range(5):
        gradient = random_gradients(9, seed=seed).double()
        features, adam = reference.adam(gradient, adam, Adam())
        x = torch.nn.functional.elu(project(features.T))
        for layer, cell in enumerate(cells):
            states[layer] = cell(x, states[layer])
            x = states[layer][0]
        update = torch.zeros(9, dtype=F64)
        step([update], [gradient], [mine], detached(rule), *constants(rule), 1.0)
        torch.testing.assert_close(update, 0.3 * output(x)[:, 0].tanh(), rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("device", ["cpu"])
def test_autocast_changes_nothing(device):
    for text in (lstm(), RNNPROP):
        rule, gradient = rule_of(text), random_gradients(7)
        rows = random_rows(rule, 7)
        leaves = rule.weights()
        exact = reference.step(gradient, rows, leaves, *constants(rule))
        derivative = torch.autograd.grad(exact[0].sum(), leaves)
        with torch.autocast(device, dtype=torch.bfloat16):
            found = reference.step(gradient, rows, leaves, *constants(rule))
            for name in ("native", "reference"):
                change, _ = update(rule, gradient, from_rows(rows), backend=name)
                torch.testing.assert_close(change, exact[0], rtol=1e-5, atol=1e-6)
                theirs = torch.autograd.grad(change.sum(), leaves)
                for one, other in zip(theirs, derivative, strict=True):
                    torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
        assert torch.equal(found[0], exact[0])
        assert torch.equal(found[1], exact[1])


def test_coordinates_do_not_meet():
    rule = random_rule()
    gradient, rows = random_gradients(7), random_rows(rule, 7)
    update, state = reference.step(gradient, rows, detached(rule), *constants(rule))
    for i in range(7):
        alone, alone_state = reference.step(gradient[i : i + 1], rows[:, i : i + 1], detached(rule), *constants(rule))
        torch.testing.assert_close(alone[0], update[i])
        torch.testing.assert_close(alone_state[:, 0], state[:, i])
