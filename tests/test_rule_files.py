"""Rules come back from files to the bit, and no damage goes unnoticed."""

from __future__ import annotations

import json
import os
import pickle
import random

import pytest
import torch
from helpers import GIVEN, RULES, random_rule, rule_of
from safetensors.torch import save

from fastl2l import LSTMRule, RNNpropRule, Rule, RuleFileError, files, load_rule, save_rule
from fastl2l.rule_files import load_one_rule, read_recipe


def same(one: Rule, other: Rule) -> bool:
    pairs = zip(one.weights(), other.weights(), strict=True)
    return one.config == other.config and all(a.dtype == b.dtype and torch.equal(a, b) for a, b in pairs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("preprocess", "hidden", "layers"), [("raw", 1, 1), ("log_sign", 20, 2), ("raw", 7, 3)])
def test_a_rule_comes_back_to_the_bit(tmp_path, preprocess, hidden, layers, dtype):
    rule = random_rule(preprocess, hidden, layers, dtype=dtype, p=1 / 3, scale=1e-7, output_scale=0.1)
    recipe = {"command": "fastl2l train --task ü", "seed": 3, "scores": [0.1, None], "deep": {"a": True}}
    path = save_rule(rule, tmp_path / "deep" / "mine.safetensors", recipe=recipe)
    loaded = load_rule(path)
    assert same(loaded, rule)
    assert all(weight.requires_grad for weight in loaded.weights())
    assert read_recipe(str(path)) == recipe


def test_weights_of_any_kind_come_back(tmp_path):
    rule = random_rule(hidden=3)
    with torch.no_grad():
        rule.weight_out[:] = torch.tensor([float("nan"), -0.0, 1e-45])
        rule.weight_hh_l0.data = rule.weight_hh_l0.data.T.contiguous().T
    loaded = load_rule(save_rule(rule, tmp_path / "a"))
    assert torch.equal(loaded.weight_out.view(torch.int32), rule.weight_out.view(torch.int32))
    assert torch.equal(loaded.weight_hh_l0, rule.weight_hh_l0)
    assert read_recipe(tmp_path / "a") == {}


def test_a_recipe_of_any_length_leaves_a_readable_file(tmp_path):
    # The header's length is the file's first byte: at 128 it looks like a pickle's, which this must not be taken for.
    rule, starts = random_rule("raw", 1, 1), set()
    for length in range(256):
        path = save_rule(rule, tmp_path / "a", recipe={"x": "y" * length})
        starts.add(path.read_bytes()[0])
        assert same(load_rule(path), rule)
    assert 128 in starts


@pytest.fixture
def whole(tmp_path):
    return save_rule(random_rule(hidden=3), tmp_path / "whole", recipe={"seed": 1}).read_bytes()


def refused(tmp_path, content: bytes, message: str | None = None) -> None:
    path = tmp_path / "damaged"
    path.write_bytes(content)
    for read in (load_rule, read_recipe):
        with pytest.raises(RuleFileError, match=message) as caught:
            read(path)
        assert str(path) in str(caught.value)
    assert path.read_bytes() == content


def test_a_file_that_was_cut_short_is_refused(tmp_path, whole):
    for length in range(0, len(whole), 37):
        refused(tmp_path, whole[:length], "damaged or something else")
    refused(tmp_path, whole + b"\0", "damaged or something else")


def test_every_wrong_bit_is_noticed(tmp_path, whole):
    numbers = random.Random(0)
    for _ in range(500):
        damaged = bytearray(whole)
        damaged[numbers.randrange(len(whole))] ^= 1 << numbers.randrange(8)
        refused(tmp_path, bytes(damaged))


def test_garbage_is_refused(tmp_path):
    numbers = random.Random(0)
    for length in (1, 8, 9, 100, 5000):
        refused(tmp_path, numbers.randbytes(length), "expected a safetensors file")


class Trap:
    """Unpickling this makes a file."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_pickles_are_refused_and_not_opened(tmp_path, protocol):
    trap = tmp_path / "trap"
    refused(tmp_path, pickle.dumps(Trap(trap), protocol), "got a pickle, which could run any code")
    for zipped in (True, False):
        path = tmp_path / "saved"
        torch.save(Trap(trap), path, pickle_protocol=protocol, _use_new_zipfile_serialization=zipped)
        refused(tmp_path, path.read_bytes(), "got a pickle, which could run any code")
    assert not trap.exists()


OLD = '{"preprocess": "log_sign", "p": 10.0, "scale": 1.0, "output_scale": 0.1, "hidden_size": 20, "num_layers": 2}'
"""A configuration as the first version wrote it."""


def by_hand(made, weights=None, **metadata):
    """A safetensors file as save_rule would write it, but without a checksum and with other metadata."""
    standard = {
        "format": "fastl2l-rule",
        "format_version": "2",
        "rule": made.kind,
        "config": json.dumps(made.config.describe()),
    }
    weights = weights or {name: weight.detach() for name, weight in made.named_parameters()}
    return save(weights, {name: text for name, text in (standard | metadata).items() if text is not None})


def test_a_file_without_checksum_is_read(tmp_path):
    rule = random_rule(hidden=3)
    (tmp_path / "a").write_bytes(by_hand(rule))
    assert same(load_rule(tmp_path / "a"), rule)


def test_a_file_of_the_first_version_is_read(tmp_path):
    rule = random_rule("raw", 7, 3, scale=0.25, output_scale=2.0)
    config = {"preprocess": "raw", "p": 10.0, "scale": 0.25, "output_scale": 2.0, "hidden_size": 7, "num_layers": 3}
    (tmp_path / "a").write_bytes(by_hand(rule, format_version="1", config=json.dumps(config)))
    loaded = load_rule(tmp_path / "a")
    assert same(loaded, rule)
    assert type(loaded) is LSTMRule


@pytest.mark.parametrize("text", RULES + GIVEN)
def test_a_rule_of_any_parts_comes_back_to_the_bit(tmp_path, text):
    rule = rule_of(text)
    loaded = load_rule(save_rule(rule, tmp_path / "a"))
    assert same(loaded, rule)
    assert (type(loaded), loaded.text) == (Rule, text)


def test_rnnprop_comes_back_as_what_it_is(tmp_path):
    rule = RNNpropRule(seed=3)
    loaded = load_rule(save_rule(rule, tmp_path / "a"))
    assert same(loaded, rule)
    assert type(loaded) is RNNpropRule


def pair():
    return {"fc": RNNpropRule(seed=1), "conv": random_rule(hidden=3)}


def test_rules_of_parts_come_back_to_the_bit_in_their_order(tmp_path):
    rules, recipe = pair(), {"seed": 1}
    path = save_rule(rules, tmp_path / "a", recipe=recipe)
    loaded = load_rule(path)
    assert list(loaded) == ["fc", "conv"]
    assert all(same(loaded[part], rule) and type(loaded[part]) is type(rule) for part, rule in rules.items())
    assert read_recipe(path) == recipe
    with pytest.raises(RuleFileError, match="a: expected one rule, got one for each part: fc, conv"):
        load_one_rule(path)


def test_every_wrong_bit_of_rules_of_parts_is_noticed(tmp_path):
    numbers, whole = random.Random(0), save_rule(pair(), tmp_path / "whole").read_bytes()
    for _ in range(200):
        damaged = bytearray(whole)
        damaged[numbers.randrange(len(whole))] ^= 1 << numbers.randrange(8)
        refused(tmp_path, bytes(damaged))


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        (None, "its parts: expected JSON"),
        ("{", "its parts: expected JSON"),
        ("{}", "expected a rule and its configuration by part"),
        ("[1]", "expected a rule and its configuration by part"),
        ('{"": {"rule": "lstm", "config": {}}}', "expected a rule and its configuration by part"),
        ('{"a.b": {"rule": "lstm", "config": {}}}', "expected a rule and its configuration by part"),
        ('{"a": {"rule": "lstm"}}', "expected a rule and its configuration by part"),
        ('{"a": {"rule": "lstm", "config": {}, "more": 1}}', "expected a rule and its configuration by part"),
        ('{"a": {"rule": ["lstm"], "config": {}}}', "expected a rule of kind"),
        ('{"a": {"rule": "lstm", "config": {}}}', "its configuration cannot be used"),
        ('{"a": {"rule": "lstm", "config": {"text": "raw:1 lstm:3 linear", "output_scale": 1}}}', "expected weights"),
    ],
)
def test_parts_that_are_none_are_refused(tmp_path, parts, message):
    (tmp_path / "a").write_bytes(by_hand(random_rule(hidden=3), format_version="3", parts=parts))
    with pytest.raises(RuleFileError, match=message):
        load_rule(tmp_path / "a")


@pytest.mark.parametrize(
    ("rules", "error"), [({}, ValueError), ({"a": 1}, TypeError), ({"a.b": LSTMRule()}, ValueError), (3, TypeError)]
)
def test_what_are_no_rules_of_parts_is_not_written(tmp_path, rules, error):
    with pytest.raises(error, match="rule: expected"):
        save_rule(rules, tmp_path / "a")
    assert not list(tmp_path.iterdir())


def test_a_constant_that_is_no_number_of_the_weights_dtype_is_refused(tmp_path):
    rule = LSTMRule("raw", scale=1e39, dtype=torch.float64)
    weights = {name: weight.detach().float() for name, weight in rule.named_parameters()}
    (tmp_path / "a").write_bytes(by_hand(rule, weights))
    with pytest.raises(RuleFileError, match=r"a: scale: expected a normal number of torch.float32, got 1e\+39"):
        load_rule(tmp_path / "a")


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ({"format": "other"}, "expected format 'fastl2l-rule', got 'other'"),
        ({"format": None}, "expected format 'fastl2l-rule', got None"),
        ({"format_version": "4"}, "expected format version 2 or 3, got 4"),
        ({"rule": "other"}, "expected a rule of kind lstm, rnnprop, gac, ntm or rule, got 'other'"),
        ({"config": None}, "its configuration cannot be used"),
        ({"config": "{"}, "its configuration cannot be used"),
        ({"config": "[]"}, "its configuration cannot be used"),
        (
            {"config": OLD.replace("10.0", "-1")},
            "its configuration cannot be used: p: expected a finite positive number",
        ),
        (
            {"config": '{"text": "raw:1 lstm:3", "output_scale": 1}'},
            "its configuration cannot be used: rule 'raw:1 lstm:3'",
        ),
        ({"config": '{"units": 20}'}, "its configuration cannot be used"),
        ({"config": OLD.replace("20", "30000")}, "expected weights"),
        (
            {"config": OLD.replace("20", "100000000")},
            "hidden_size: expected an integer of at least 1 and at most 32768",
        ),
    ],
)
def test_other_files_and_versions_are_refused(tmp_path, metadata, message):
    (tmp_path / "a").write_bytes(by_hand(random_rule(hidden=3), **metadata))
    with pytest.raises(RuleFileError, match=message):
        load_rule(tmp_path / "a")


def test_nothing_in_a_file_takes_time_memory_or_a_long_message(tmp_path):
    rule, path = random_rule(hidden=3), tmp_path / "a"
    for metadata in (
        {"config": OLD.replace("2}", "1000000000}")},
        {"config": OLD.replace("2}", "1" + "0" * 4000 + "}")},
        {"config": OLD.replace("log_sign", "x" * 10**6)},
        {"config": json.dumps({"text": "x" * 10**6, "output_scale": 1.0})},
        {"config": json.dumps({"text": "raw:1 lstm:1" + ",1" * 10**6 + " linear", "output_scale": 1.0})},
        {"config": "[" * 10**6},
        {"config": json.dumps({"x" * 10**6: 1})},
        {"format": "x" * 10**6},
        {"format_version": "x" * 10**6},
        {"rule": "x" * 10**6},
        {"x" * 10**6: "unknown"},
        {"recipe": "[" * 10**6},
        {"recipe": "[1]"},
        {"recipe": "x"},
    ):
        path.write_bytes(by_hand(rule, **metadata))
        for read in (load_rule, read_recipe):
            with pytest.raises(RuleFileError) as caught:
                read(path)
            assert str(path) in str(caught.value)
            assert len(str(caught.value)) < 1500
    many = {f"weight_{number}": torch.zeros(1) for number in range(10_000)}
    path.write_bytes(by_hand(rule, many))
    with pytest.raises(RuleFileError, match="expected weights") as caught:
        load_rule(path)
    assert len(str(caught.value)) < 1500


def test_weights_are_read_only_when_their_shapes_are_right(tmp_path, monkeypatch):
    path, rows = tmp_path / "a", 10**9
    config = json.dumps({"text": "raw:1 lstm:3 linear", "output_scale": 1.0})
    metadata = {"format": "fastl2l-rule", "format_version": "2", "rule": "lstm", "config": config}
    entry = {"dtype": "F32", "shape": [rows], "data_offsets": [0, 4 * rows]}
    header = json.dumps({"__metadata__": metadata, "weight_out": entry}).encode()
    path.write_bytes(len(header).to_bytes(8, "little") + header)
    os.truncate(path, 8 + len(header) + 4 * rows)  # takes no place on the disk
    monkeypatch.setattr(files.StoredTensors, "load", pytest.fail)
    for read in (load_rule, read_recipe):
        with pytest.raises(RuleFileError, match=r"expected weights .*, got {'weight_out': \(1000000000,\)}"):
            read(path)


def test_a_recipe_that_could_not_be_read_is_not_written(tmp_path):
    deep = {"x": json.loads("[" * 100 + "]" * 100)}
    for recipe, message in (
        (deep, "recipe: expected JSON of at most 64 levels"),
        ({"x": "y" * files.LARGEST_TEXT}, "metadata: expected"),
    ):
        with pytest.raises(ValueError, match=message):
            save_rule(random_rule(hidden=3), tmp_path / "a", recipe=recipe)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "change",
    [
        lambda weights: weights.pop("weight_out"),
        lambda weights: weights.pop("bias_l1"),
        lambda weights: weights.update(more=torch.zeros(3)),
        lambda weights: weights.update(bias_l0=torch.zeros(11)),
        lambda weights: weights.update(weight_hh_l0=weights["weight_hh_l0"].reshape(-1)),
        lambda weights: weights.update(bias_out=torch.zeros(1)),
        lambda weights: weights.update(bias_out=torch.zeros((), dtype=torch.float64)),
        lambda weights: weights.update({name: weight.bfloat16() for name, weight in weights.items()}),
        lambda weights: weights.update({name: weight.int() for name, weight in weights.items()}),
    ],
)
def test_weights_that_do_not_fit_are_refused(tmp_path, change):
    rule = random_rule(hidden=3)
    weights = {name: weight.detach() for name, weight in rule.named_parameters()}
    change(weights)
    (tmp_path / "a").write_bytes(by_hand(rule, weights))
    with pytest.raises(RuleFileError, match=r"expected weights .*'weight_out': \(3,\).*, got "):
        load_rule(tmp_path / "a")


def test_a_file_that_is_not_there_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere: expected a rule file"):
        load_rule(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match="expected a rule file"):
        load_rule(tmp_path)


def test_a_failed_save_leaves_the_old_file(tmp_path, monkeypatch, whole):
    path = tmp_path / "whole"
    with pytest.raises(TypeError, match="rule: expected a rule or a dict of rules by part, got Linear"):
        save_rule(torch.nn.Linear(1, 1), path)
    with pytest.raises(TypeError):
        save_rule(random_rule(hidden=4), path, recipe={"task": object()})

    def fail(*_):
        raise OSError("disk full")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="disk full"):
        save_rule(random_rule(hidden=4), path)
    assert path.read_bytes() == whole
    assert [entry.name for entry in tmp_path.iterdir()] == ["whole"]


def test_rules_with_tied_or_further_weights_come_back(tmp_path):
    rule = random_rule(hidden=3, layers=3)
    rule.weight_hh_l2 = rule.weight_hh_l1
    rule.extra = torch.nn.Parameter(torch.ones(2))
    loaded = load_rule(save_rule(rule, tmp_path / "a"))
    assert same(loaded, rule)
    assert loaded.weight_hh_l2 is not loaded.weight_hh_l1
