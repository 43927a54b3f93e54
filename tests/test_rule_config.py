"""A rule's text: what it says, that both readers of it agree, and what is refused."""

from __future__ import annotations

import dataclasses
import itertools
import math
import random

import pytest
import torch
from helpers import GIVEN, RNNPROP, RULES

from fastl2l import LSTMRule, RNNpropRule
from fastl2l.ops import dispatch
from fastl2l.rule_config import MOST_LAYERS, MOST_UNITS, Adam, LogSign, Projection, Raw, RuleConfig, lstm_config

WRONG = {
    "": "expected parts such as",
    " log_sign:10 lstm:20 linear": "expected parts such as",
    "log_sign:10 lstm:20 linear ": "expected parts such as",
    "log_sign:10  lstm:20 linear": "expected parts such as",
    "log_sign:10\tlstm:20 linear": "expected parts such as",
    "log_sign:10 lstm:20 linear\n": "expected parts such as",
    "log_sign:10 lstm:20 linear x": "expected the parts",
    "log_sign:10 lstm:20 linear linear": "expected the parts",
    "lstm:20 log_sign:10 linear": "expected the parts",
    "log_sign:10 lstm:20": "expected the parts",
    "log_sign:10 linear": "expected the parts",
    "lstm:20 linear": "got neither",
    "sign:10 lstm:20 linear": "expected the parts",
    "log_sign lstm:20 linear": "log_sign: expected 1 numbers, got 0",
    "log_sign:0,5 lstm:20 linear": "log_sign: expected 1 numbers, got 2",
    "log_sign:10; lstm:20 linear": "expected parts such as",
    "log_sign:10,5 lstm:20 linear": "log_sign: expected 1 numbers, got 2",
    "log_sign:88 lstm:20 linear": "p: expected at most 87",
    "log_and_sign:88 lstm:20 linear": "k: expected at most 87",
    "log_sign:-1 lstm:20 linear": "expected parts such as",
    "log_sign:+1 lstm:20 linear": "expected parts such as",
    "log_sign:.5 lstm:20 linear": "expected parts such as",
    "log_sign:5. lstm:20 linear": "expected parts such as",
    "log_sign:5.e1 lstm:20 linear": "expected parts such as",
    "log_sign:0x5 lstm:20 linear": "expected parts such as",
    "log_sign:1e lstm:20 linear": "expected parts such as",
    "log_sign:inf lstm:20 linear": "expected parts such as",
    "log_sign:nan lstm:20 linear": "expected parts such as",
    "raw:0 lstm:20 linear": "scale: expected a finite positive number",
    "raw:1e999 lstm:20 linear": "scale: expected a finite positive number",
    "raw:1e-999 lstm:20 linear": "scale: expected a finite positive number",
    "adam:1,0.9,1e-8 lstm:20 linear": "beta1: expected a finite positive number below 1",
    "adam:0.9,1.5,1e-8 lstm:20 linear": "beta2: expected a finite positive number below 1",
    "adam:0.9,0.9 lstm:20 linear": "adam: expected 3 numbers, got 2",
    "adam:0.9,0.9,0 lstm:20 linear": "epsilon: expected a finite positive number",
    "raw:1 elu lstm:20 linear": "elu: expected 1 numbers, got 0",
    "raw:1 elu:0 lstm:20 linear": "projection units: expected an integer of at least 1",
    "raw:1 elu:2.5 lstm:20 linear": "elu: expected whole numbers of units, got 2.5",
    "raw:1 elu:1e1 lstm:20 linear": "elu: expected whole numbers of units, got 1e1",
    "raw:1 elu:3,3 lstm:20 linear": "elu: expected 1 numbers, got 2",
    "raw:1 given:0 lstm:20 linear": "given: expected an integer of at least 1",
    "raw:1 elu:3 given:2 lstm:20 linear": "expected the parts",
    "raw:1 lstm linear": "layers: expected 1 to 64 numbers of units",
    "raw:1 lstm: linear": "expected parts such as",
    "raw:1 lstm:0 linear": "units: expected an integer of at least 1",
    "raw:1 lstm:20,10 linear": "as many units in every layer",
    "raw:1 lstm:20,,20 linear": "expected parts such as",
    "raw:1 lstm:40000 linear": "units: expected an integer of at least 1 and at most 32768, got 40000",
    "raw:1 lstm:0000000020 none": "lstm: expected whole numbers of units, got 0000000020",
    "lstm:" + "１," * 60: "expected parts such as",
    "raw:1 lstm:99999999999999999999 linear": "lstm: expected whole numbers of units",
    "raw:1 lstm:1" + ",1" * 64 + " linear": "layers: expected 1 to 64",
    "raw:1 lstm:20 linear:1": "linear: expected 0 numbers, got 1",
    "raw:1 lstm:20 linear" + " " * 1000: "expected a text of at most 1000 characters",
}


@pytest.mark.parametrize("text", RULES + GIVEN)
def test_a_text_is_read_and_written_as_it_is(text):
    config = RuleConfig.parse(text)
    assert config.text == text
    assert RuleConfig.from_description(config.describe()) == dataclasses.replace(config, output_scale=1.0)


@pytest.mark.parametrize("text", WRONG)
def test_a_wrong_text_is_refused_by_both_readers(text, native):
    with pytest.raises(ValueError, match=WRONG[text]) as error:
        RuleConfig.parse(text)
    assert len(str(error.value)) < 500
    with pytest.raises(RuntimeError, match="rule '") as error:
        torch.ops.fastl2l.describe_rule(text)
    assert len(str(error.value)) < 500


def described(config: RuleConfig) -> str:
    """As csrc/cpu/operators.cpp has it."""
    shapes = " ".join(str(list(shape)) for _, shape in config.weight_shapes)
    constants = [] if config.features is None else list(config.features.constants.values())
    constants = [float(x) for x in constants] + [0.0] * (3 - len(constants))
    return (
        f"{config.state_rows} rows, {config.feature_count}+{config.given} inputs, weights {shapes}, constants",
        constants,
    )


def test_both_readers_make_the_same_of_every_text(native):
    features = [
        "",
        "raw:0.7 ",
        "raw:1e-30 ",
        "log_sign:0.1 ",
        "log_sign:87 ",
        "adam:0.9,0.999,1e-08 ",
        "adam:0.5,0.5,2 ",
    ]
    given, projections = ["", "given:1 ", "given:17 "], ["", "elu:1 ", "elu:20 "]
    layers, outputs = ["lstm:1 ", "lstm:20,20 ", "lstm:7,7,7 "], ["linear", "tanh", "none"]
    texts = ["".join(parts) for parts in itertools.product(features, given, projections, layers, outputs)]
    texts += RULES + GIVEN + ["raw:12345.678901234567e-3 lstm:00020 linear"]
    read = 0
    for text in texts:
        if text.startswith(("lstm", "elu")):
            continue
        mine, numbers = described(RuleConfig.parse(text))
        theirs, _, their_numbers = torch.ops.fastl2l.describe_rule(text).partition(", constants")
        assert theirs + ", constants" == mine
        assert [float(number) for number in their_numbers.split()] == numbers
        read += 1
    assert read > 400


def test_readers_agree_on_texts_with_random_changes(native):
    chance = random.Random(0)
    agreed = {True: 0, False: 0}
    for _ in range(3000):
        text = list(chance.choice(RULES + GIVEN))
        for _ in range(chance.randint(0, 2)):
            at = chance.randrange(len(text))
            text[at : at + chance.randint(0, 1)] = [chance.choice("0123456789.,:e+- abelmnrstuxgiv")]
        text = "".join(text)
        outcomes = []
        for read in (RuleConfig.parse, torch.ops.fastl2l.describe_rule):
            try:
                read(text)
                outcomes.append(True)
            except (ValueError, RuntimeError):
                outcomes.append(False)
        assert outcomes[0] == outcomes[1], text
        agreed[outcomes[0]] += 1
    assert min(agreed.values()) > 300


def test_the_papers_rules_have_the_papers_sizes():
    for rule, weights, rows in ((LSTMRule(), 5141, 80), (RNNpropRule(), 6641, 83)):
        assert sum(math.prod(shape) for _, shape in rule.config.weight_shapes) == weights
        assert rule.config.state_rows == rows
    assert RNNpropRule().text == RNNPROP
    assert RuleConfig(Adam(0.9, 0.999), (20,)).state_rows == 44  # two ages


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"features": "raw"}, "features: expected one of raw, log_sign, log_and_sign, adam, got 'raw'"),
        ({"features": None}, "got neither"),
        ({"layers": []}, "layers: expected 1 to 64 numbers of units"),
        ({"layers": (20, 10)}, "layers: expected as many units in every layer"),
        ({"layers": (20.0,)}, "units: expected an integer"),
        ({"layers": (True,)}, "units: expected an integer"),
        ({"output": "relu"}, "output: expected one of linear, tanh, none, got 'relu'"),
        ({"given": -1}, "given: expected an integer of at least 0"),
        ({"output_scale": 0}, "output_scale: expected a finite positive number, got 0"),
        ({"output_scale": 10**400}, "output_scale: expected a finite positive number"),
        ({"output_scale": "1"}, "output_scale: expected a finite positive number, got '1'"),
    ],
)
def test_parts_that_do_not_go_together_are_named(arguments, message):
    with pytest.raises(ValueError, match=message) as error:
        RuleConfig(**{"features": Raw(), "layers": (20,)} | arguments)
    assert len(str(error.value)) < 300


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: LogSign(88), "p: expected at most 87"),
        (lambda: LogSign(10**400), "p: expected a finite positive number"),
        (lambda: Raw(math.nan), "scale: expected a finite positive number, got nan"),
        (lambda: Adam(beta1=1.0), "beta1: expected a finite positive number below 1, got 1.0"),
        (lambda: Projection("relu", 3), "projection: expected one of elu, got 'relu'"),
        (lambda: Projection("elu", 0), "projection units: expected an integer of at least 1"),
        (lambda: lstm_config("adam", 10, 1, 1, 20, 2), "preprocess: expected one of raw, log_sign, got 'adam'"),
        (lambda: lstm_config("raw", 10, 1, 1, 20, 10**9), f"num_layers: .* at most {MOST_LAYERS}, got 1000000000"),
        (lambda: lstm_config("raw", 10, 1, 1, 10**9, 2), f"hidden_size: .* at most {MOST_UNITS}, got 1000000000"),
    ],
)
def test_a_part_with_a_wrong_number_is_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_what_the_first_version_wrote_is_read():
    old = {"preprocess": "raw", "p": 10.0, "scale": 0.5, "output_scale": 2.0, "hidden_size": 7, "num_layers": 3}
    config = RuleConfig.from_description(old)
    assert (config.text, config.output_scale) == ("raw:0.5 lstm:7,7,7 linear", 2.0)
    for wrong in ({}, {"text": "raw:1 lstm:2 none"}, old | {"more": 1}, {"text": 5, "output_scale": 1.0}):
        with pytest.raises(ValueError, match="expected"):
            RuleConfig.from_description(wrong)


def test_a_name_and_its_backend_do_not_depend_on_the_locale(native):
    import locale

    before = locale.setlocale(locale.LC_NUMERIC)
    commas = [name for name in ("de_DE.UTF-8", "fr_FR.UTF-8", "de_DE") if _has_locale(locale, name)]
    try:
        for name in (*commas, "C"):
            locale.setlocale(locale.LC_NUMERIC, name)
            for text in RULES:
                assert RuleConfig.parse(text).text == text
                assert (
                    float(torch.ops.fastl2l.describe_rule("raw:0.7 lstm:1 none").split("constants ")[1].split()[0])
                    == 0.7
                )
    finally:
        locale.setlocale(locale.LC_NUMERIC, before)
    assert dispatch.select("native", "cpu") is native


def _has_locale(locale, name: str) -> bool:
    try:
        locale.setlocale(locale.LC_NUMERIC, name)
    except locale.Error:
        return False
    return True
