"""A rule is its configuration and its weights: what is checked, drawn and taken over from PyTorch's modules."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import nn

from fastl2l import LSTMRule, reference
from fastl2l.rules import RULES, RNNpropRule, Rule, make_rule


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"preprocess": "log"}, "preprocess: expected one of raw, log_sign, got 'log'"),
        ({"p": 0}, "p: expected a finite positive number, got 0"),
        ({"p": math.nan}, "p: expected a finite positive number, got nan"),
        ({"p": 88.0}, "p: expected at most 87, beyond which exp\\(-p\\) is no normal float32, got 88.0"),
        ({"scale": 1e39, "preprocess": "raw"}, "scale: expected a normal number of torch.float32, got 1e\\+39"),
        ({"output_scale": 1e-40}, "output_scale: expected a normal number of torch.float32, got 1e-40"),
        ({"output_scale": 10**400}, "output_scale: expected a finite positive number, got 1000"),
        ({"scale": math.inf}, "scale: expected a finite positive number, got inf"),
        ({"scale": True}, "scale: expected a finite positive number, got True"),
        ({"output_scale": -1.0}, "output_scale: expected a finite positive number, got -1.0"),
        ({"output_scale": "1"}, "output_scale: expected a finite positive number, got '1'"),
        ({"hidden_size": 0}, "hidden_size: expected an integer of at least 1 and at most 32768, got 0"),
        ({"hidden_size": 20.0}, "hidden_size: expected an integer of at least 1 and at most 32768, got 20.0"),
        ({"num_layers": True}, "num_layers: expected an integer of at least 1 and at most 64, got True"),
        ({"dtype": torch.float16}, "dtype: expected torch.float32 or torch.float64, got torch.float16"),
    ],
)
def test_bad_arguments_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        LSTMRule(**arguments)


def test_a_configuration_cannot_be_changed():
    with pytest.raises(AttributeError):
        LSTMRule().config.output_scale = 5.0


def test_the_papers_rule_has_the_papers_size():
    rule = LSTMRule()
    assert sum(weight.numel() for weight in rule.parameters()) == 5141
    assert rule.config.state_rows == 80
    assert rule.dtype == torch.float32
    assert all(weight.requires_grad for weight in rule.weights())


@pytest.mark.parametrize("layers", [1, 3])
@pytest.mark.parametrize("preprocess", ["raw", "log_sign"])
def test_weights_are_named_and_shaped_as_nn_lstm_s(preprocess, layers):
    rule = LSTMRule(preprocess, hidden_size=6, num_layers=layers)
    lstm = nn.LSTM(rule.config.inputs, 6, layers)
    shapes = dict(rule.config.weight_shapes)
    assert rule.config.inputs == {"raw": 1, "log_sign": 2}[preprocess]
    for layer in range(layers):
        for name in (f"weight_ih_l{layer}", f"weight_hh_l{layer}"):
            assert shapes.pop(name) == getattr(lstm, name).shape
        assert shapes.pop(f"bias_l{layer}") == getattr(lstm, f"bias_ih_l{layer}").shape
    assert shapes == {"weight_out": (6,), "bias_out": ()}
    assert [name for name, _ in rule.config.weight_shapes] == [name for name, _ in rule.named_parameters()]
    assert all(one is other for one, other in zip(rule.weights(), rule.parameters(), strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_initial_weights_are_sonnet_s(dtype):
    rule = LSTMRule(hidden_size=100, seed=3, dtype=dtype)
    for name, weight in rule.named_parameters():
        assert weight.dtype == dtype
        if name == "bias_out":
            assert weight == 0
            continue
        fan_in = {"weight_out": 100}.get(name, 102 if name.endswith("_l0") else 200)
        centred = weight.detach().clone()
        if name.startswith("bias_l"):
            centred[100:200] -= 1  # the forget gate
        std = 1 / math.sqrt(fan_in)
        assert centred.abs().max() <= 2 * std + 1e-6
        # A normal cut at two standard deviations has a standard deviation of 0.88 and a mean of 0.
        samples = centred.numel() ** 0.5
        assert centred.std().item() == pytest.approx(0.8796 * std, rel=2.5 / samples)
        assert abs(centred.mean().item()) < 4 * std / samples


def test_weights_follow_the_seed_and_leave_global_random_numbers_alone():
    before = torch.get_rng_state()
    one, same, other = LSTMRule(seed=1), LSTMRule(seed=1), LSTMRule(seed=2)
    assert torch.equal(before, torch.get_rng_state())
    assert torch.equal(one.weight_hh_l1, same.weight_hh_l1)
    assert not torch.equal(one.weight_hh_l1, other.weight_hh_l1)
    other.reset_parameters(1)
    assert all(torch.equal(a, b) for a, b in zip(one.weights(), other.weights(), strict=True))


def test_a_rule_is_an_ordinary_module():
    rule = LSTMRule(hidden_size=3)
    twin = copy.deepcopy(rule)
    assert twin.config == rule.config
    assert twin.weight_out is not rule.weight_out
    twin.load_state_dict(rule.state_dict())
    assert rule.double().dtype == torch.float64
    assert repr(rule) == "LSTMRule('log_sign:10 lstm:3,3 linear', output_scale=0.1)"


def cells(*sizes, bias=True, dtype=torch.float64):
    return [nn.LSTMCell(inputs, hidden, bias=bias, dtype=dtype) for inputs, hidden in sizes]


@pytest.mark.parametrize("bias", [True, False])
def test_from_lstm_computes_what_the_modules_do(bias):
    torch.manual_seed(0)
    modules, output = cells((1, 4), (4, 4), bias=bias), nn.Linear(4, 1, bias=bias, dtype=torch.float64)
    rule = LSTMRule.from_lstm(modules, output, preprocess="raw", scale=0.5, output_scale=2.0)
    assert rule.dtype == torch.float64
    assert (rule.text, rule.config.output_scale) == ("raw:0.5 lstm:4,4 linear", 2.0)
    gradient = torch.randn(9, dtype=torch.float64)
    state = torch.zeros(16, 9, dtype=torch.float64)
    x, zeros = 0.5 * gradient[:, None], torch.zeros(9, 4, dtype=torch.float64)
    for cell in modules:
        x, _ = cell(x, (zeros, zeros))
    update, _ = reference.step(gradient, state, rule.weights(), rule.text, 2.0)
    torch.testing.assert_close(update, 2 * output(x)[:, 0], rtol=1e-13, atol=1e-15)


@pytest.mark.parametrize(
    ("modules", "output", "message"),
    [
        ([], nn.Linear(4, 1), "cells: expected at least one"),
        (cells((1, 4)), nn.Linear(4, 1), r"weight_ih_l0: expected shape \(16, 2\), got \(16, 1\)"),
        (cells((2, 4), (4, 5)), nn.Linear(4, 1), r"weight_ih_l1: expected shape \(16, 4\), got \(20, 4\)"),
        (cells((2, 4)), nn.Linear(5, 1), r"weight_out: expected shape \(4,\), got \(5,\)"),
        (cells((2, 4)), nn.Linear(4, 2), r"output: expected nn.Linear\(hidden_size, 1\), got 2 outputs"),
    ],
)
def test_from_lstm_names_the_module_that_does_not_fit(modules, output, message):
    with pytest.raises(ValueError, match=message):
        LSTMRule.from_lstm(modules, output)


def test_rnnprop_is_made_of_its_parts():
    rule = RNNpropRule(beta1=0.9, beta2=0.999, epsilon=1e-6, projection_size=3, hidden_size=5, num_layers=1, seed=2)
    assert rule.text == "adam:0.9,0.999,1e-06 elu:3 lstm:5 tanh"
    assert [name for name, _ in rule.named_parameters()][:3] == ["weight_in", "bias_in", "weight_ih_l0"]
    assert rule.weight_in.shape == (3, 2)
    assert rule.weight_in.any()
    assert not rule.bias_in.any()
    assert rule.config.output_scale == 0.1
    with pytest.raises(ValueError, match="beta1: expected a finite positive number below 1, got 1"):
        RNNpropRule(beta1=1)
    with pytest.raises(ValueError, match="projection_size: expected an integer of at least 1"):
        RNNpropRule(projection_size=0)
    with pytest.raises(ValueError, match=r"epsilon: expected a normal number of torch.float32, got 1e-40"):
        RNNpropRule(epsilon=1e-40)
    assert RNNpropRule(epsilon=1e-40, dtype=torch.float64).dtype == torch.float64


@pytest.mark.parametrize("kind", [*RULES, "rule"])
def test_a_rule_is_made_again_from_what_it_is(kind):
    rule = RULES.get(kind, lambda: Rule(RNNpropRule().config))()
    twin = make_rule(rule.kind, rule.config)
    assert type(twin) is type(rule)
    assert (twin.kind, twin.describe()) == (kind, rule.describe())
    twin.load_weights({name: weight + 1 for name, weight in rule.named_parameters()})
    assert torch.equal(twin.weight_hh_l0, rule.weight_hh_l0 + 1)
    assert twin.fingerprint() != rule.fingerprint()
    with pytest.raises(ValueError, match="kind: expected one of lstm, rnnprop, gac, ntm, rule, got 'other'"):
        make_rule("other", rule.config)


def test_weights_that_do_not_fit_are_named_and_change_nothing():
    rule = RNNpropRule(hidden_size=3)
    weights, before = {name: weight + 1 for name, weight in rule.named_parameters()}, rule.fingerprint()
    for wrong, message in (
        ({"more": torch.zeros(1)}, "more is missing or too many"),
        ({"bias_out": torch.zeros(1)}, r"bias_out: expected shape \(\), got \(1,\)"),
    ):
        with pytest.raises(ValueError, match=message):
            rule.load_weights(weights | wrong)
        assert rule.fingerprint() == before


@pytest.mark.parametrize("convert", [nn.Module.half, nn.Module.bfloat16, lambda rule: rule.to(torch.float16)])
def test_a_rule_cannot_be_converted_to_half_precision(convert):
    rule = LSTMRule(hidden_size=3)
    before = rule.fingerprint()
    with pytest.raises(TypeError, match=r"dtype: expected torch.float32 or torch.float64 for a rule, got torch"):
        convert(rule)
    assert rule.fingerprint() == before
    assert rule.double().float().dtype == torch.float32


def test_constants_of_float64_do_not_become_infinite_in_float32():
    rule = LSTMRule("raw", scale=1e39, dtype=torch.float64)
    with pytest.raises(ValueError, match=r"scale: expected a normal number of torch.float32"):
        rule.float()
    assert rule.dtype == torch.float64


@pytest.mark.parametrize("default", ["meta"])
def test_rules_are_made_on_the_cpu_whatever_the_default_device(default):
    expected = RNNpropRule(seed=3).fingerprint()
    modules, output = cells((2, 4), bias=False, dtype=torch.float32), nn.Linear(4, 1, bias=False)
    with torch.device(default):
        rule = RNNpropRule(seed=3)
        assert LSTMRule.from_lstm(modules, output).device.type == "cpu"
    assert rule.device.type == "cpu"
    assert rule.fingerprint() == expected
