"""Weights that others trained become rules that compute what theirs did; nothing in their files runs."""

from __future__ import annotations

import collections
import hashlib
import io
import os
import pickle
import pickletools
import random
import struct
import sys
import time
import tracemalloc
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from typer.testing import CliRunner

from fastl2l import FusedLSTMOptimizer, LSTMRule, RNNpropRule, RuleFileError, array_pickle, load_rule, reference
from fastl2l.cli import app
from fastl2l.import_rules import import_rule
from fastl2l.rule_files import read_recipe

ANCHORS = Path(__file__).resolve().parents[2] / "shared" / "anchors"
with_anchors = pytest.mark.skipif(not ANCHORS.is_dir(), reason=f"{ANCHORS} is not there")


# Files in the format of the TensorFlow code, without dill


class Global:
    """What a pickle is to import, by name."""

    def __init__(self, module, name):
        self.text = f"c{module}\n{name}\n".encode()

    def __call__(self):
        """Nothing: pickle wants what is called to be callable."""


class Call(Global):
    """What a pickle is to call, and then to give a state or items."""

    def __init__(self, function, *arguments, state=None, items=()):
        self.parts = (function, arguments, state, None, iter(items) if items else None)


LOAD_TYPE, IMPORT, GET_ATTR = (Global("dill._dill", name) for name in ("_load_type", "_import_module", "_get_attr"))
DICT = Call(LOAD_TYPE, "dict")
RECONSTRUCT = Call(GET_ATTR, Call(IMPORT, "numpy.core._multiarray_umath"), "_reconstruct")
NDARRAY, DTYPE = Global("numpy", "ndarray"), Global("numpy", "dtype")
EMPTY = b"b"


class Pickler(pickle._Pickler):
    """Writes `Global` and `Call` as the instructions that they stand for, without anything that has these names."""

    def save(self, obj, save_persistent_id=True):
        if not isinstance(obj, Global) or id(obj) in self.memo:
            super().save(obj, save_persistent_id)
        elif isinstance(obj, Call):
            self.save_reduce(*obj.parts, obj=obj)
        else:
            self.write(obj.text)
            self.memoize(obj)


def dumped(obj, protocol=3) -> bytes:
    file = io.BytesIO()
    Pickler(file, protocol).dump(obj)
    return file.getvalue()


def dtype_of(code, order="<"):
    return Call(DTYPE, code, 0, 1, state=(3, order, None, None, None, -1, -1, 0))


FLOAT32 = dtype_of("f4")


def array_of(shape, dtype, content, fortran=False):
    return Call(RECONSTRUCT, NDARRAY, (0,), EMPTY, state=(1, shape, dtype, fortran, content))


def numpy_array(array):
    array = np.asarray(array)
    dtype = FLOAT32 if array.dtype == np.float32 else dtype_of(array.dtype.str[1:], array.dtype.str[0])
    return array_of(array.shape, dtype, array.tobytes())


def l2l(layers, protocol=3) -> bytes:
    """What the TensorFlow code writes of {layer: {name: array}}."""
    made = {layer: {name: numpy_array(array) for name, array in inner.items()} for layer, inner in layers.items()}
    return dumped(Call(Global("collections", "defaultdict"), DICT, items=made.items()), protocol)


def layers_of(inputs=2, units=5, count=2, projection=None, dtype=np.float32, seed=0):
    """Random weights as the TensorFlow code names and shapes them."""
    numbers, made, width = np.random.default_rng(seed), {}, inputs
    if projection is not None:
        made["input_projection"] = {"w": (inputs, projection), "b": (projection,)}
        width = projection
    for layer in range(1, count + 1):
        made[f"lstm_{layer}"] = {"w_gates": (width + units, 4 * units), "b_gates": (4 * units,)}
        width = units
    made["linear"] = {"w": (units, 1), "b": (1,)}
    return {
        layer: {name: numbers.normal(0, 0.5, shape).astype(dtype) for name, shape in shapes.items()}
        for layer, shapes in made.items()
    }


@pytest.fixture
def written(tmp_path):
    """Writes a file and returns its path."""

    def write(content: bytes) -> Path:
        path = tmp_path / "weights.l2l"
        path.write_bytes(content)
        return path

    return write


@pytest.fixture
def refused(written, monkeypatch):
    """The file is refused with its name and a message, cheaply, and nothing is imported."""

    def forbidden(*_, **__):
        raise AssertionError("imported or executed")

    def check(content, message, **options):
        path = written(content)
        with monkeypatch.context() as patch:
            if options.get("source") != "torch":
                for target in ("builtins.eval", "builtins.exec", "os.system", "pickle.loads"):
                    patch.setattr(target, forbidden)
            modules = set(sys.modules)
            tracemalloc.start()
            start = time.process_time()
            with pytest.raises(RuleFileError) as caught:
                import_rule(path, **options)
            took, memory = time.process_time() - start, tracemalloc.get_traced_memory()[1]
            tracemalloc.stop()
            assert set(sys.modules) == modules or options.get("source") == "torch"
        assert str(caught.value).startswith(f"{path}: ")
        assert message in str(caught.value)
        assert len(str(caught.value)) < 1000
        assert took < 5
        assert memory < 20e6 + 20 * len(content)

    return check


# What others' code computes


def sonnet(layers, gradients, k, scale):
    """Updates of the TensorFlow code's LSTM rule, written from its description, in float64."""
    log = np.maximum(np.log(np.abs(gradients) + np.finfo(np.float32).eps) / k, -1)
    features = np.stack([log, np.clip(gradients * np.exp(k), -1, 1)], -1)
    return sonnet_network(layers, features, scale)


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def sonnet_network(layers, features, scale):
    """From features [steps, coordinates, inputs] to updates [steps, coordinates]."""
    lstms = [layers[f"lstm_{k}"] for k in range(1, 1 + sum(name.startswith("lstm") for name in layers))]
    states = [[np.zeros((features.shape[1], len(lstm["b_gates"]) // 4))] * 2 for lstm in lstms]
    updates = []
    for x in features:
        if "input_projection" in layers:
            x = x @ layers["input_projection"]["w"] + layers["input_projection"]["b"]
            x = np.where(x > 0, x, np.expm1(x))
        for index, lstm in enumerate(lstms):
            h, c = states[index]
            i, j, f, o = np.split(np.concatenate([x, h], -1) @ lstm["w_gates"] + lstm["b_gates"], 4, -1)
            c = sigmoid(f + 1) * c + sigmoid(i) * np.tanh(j)
            x = sigmoid(o) * np.tanh(c)
            states[index] = [x, c]
        out = (x @ layers["linear"]["w"] + layers["linear"]["b"])[:, 0]
        updates.append(scale * (np.tanh(out) if "input_projection" in layers else out))
    return np.stack(updates)


def ours(rule, gradients):
    """The rule's updates on gradients [steps, coordinates], by the reference in float64."""
    rule = rule.double()
    state = torch.zeros(rule.config.state_rows, gradients.shape[1], dtype=torch.float64)
    weights, updates = [weight.detach() for weight in rule.weights()], []
    for gradient in torch.as_tensor(gradients, dtype=torch.float64):
        update, state = reference.step(gradient, state, weights, rule.text, rule.config.output_scale)
        updates.append(update)
    return torch.stack(updates).numpy()


def gradients_of(steps=6, coordinates=40, seed=0):
    numbers = np.random.default_rng(seed)
    return 10 ** numbers.uniform(-5, 1, (steps, coordinates)) * numbers.choice([-1, 1], (steps, coordinates))


@pytest.mark.parametrize("protocol", [2, 3, 4])
@pytest.mark.parametrize("dtype", [np.float32, np.float64, ">f8"])
@pytest.mark.parametrize("count", [1, 2, 3])
def test_an_lstm_rule_computes_what_it_did_in_tensorflow(written, protocol, dtype, count):
    layers = layers_of(count=count, dtype=dtype)
    rule, _ = import_rule(written(l2l(layers, protocol)), features="log_sign:4", output_scale=0.03)
    assert isinstance(rule, LSTMRule)
    assert rule.text == f"log_sign:4 lstm:{','.join(['5'] * count)} linear"
    assert rule.dtype == (torch.float32 if dtype == np.float32 else torch.float64)
    gradients = gradients_of()
    # Their logarithm is of |g| + 1.2e-7, which is up to 1.6e-6 of a feature away from ours at k = 4.
    np.testing.assert_allclose(ours(rule, gradients), sonnet(layers, gradients, 4, 0.03), rtol=0, atol=1e-6)


def test_rnnprop_computes_what_it_did_in_tensorflow(written):
    layers, gradients = layers_of(projection=7), gradients_of()
    rule, _ = import_rule(written(l2l(layers)))
    assert isinstance(rule, RNNpropRule)
    assert (rule.text, rule.config.output_scale) == ("adam:0.95,0.95,1e-08 elu:7 lstm:5,5 tanh", 0.01)
    m = v = 0
    features = []
    for step, gradient in enumerate(gradients, 1):
        m, v = 0.95 * m + 0.05 * gradient, 0.95 * v + 0.05 * gradient**2
        root = np.sqrt(v / (1 - 0.95**step)) + 1e-8
        features.append(np.stack([m / (1 - 0.95**step) / root, gradient / root], -1))
    np.testing.assert_allclose(ours(rule, gradients), sonnet_network(layers, np.stack(features), 0.01), atol=1e-8)


def test_the_published_constants_are_the_defaults(written):
    path = written(l2l(layers_of()))
    rule, recipe = import_rule(path)
    assert (rule.text, rule.config.output_scale) == ("log_and_sign:5 lstm:5,5 linear", 0.01)
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    assert recipe == {"imported": {"file": "weights.l2l", "sha256": digest, "from": "tensorflow"}}
    rule, _ = import_rule(written(l2l(layers_of(inputs=1))))
    assert rule.text == "raw:1 lstm:5,5 linear"
    rule, _ = import_rule(written(l2l(layers_of())), features="adam:0.9,0.99,1e-06", output="tanh")
    assert (rule.kind, rule.text) == ("rule", "adam:0.9,0.99,1e-06 lstm:5,5 tanh")


# The published weights


def quadratics(rule, steps, backend):
    """Mean loss of three seeds on random quadratics, at each of some steps."""
    draws = [np.random.default_rng(seed) for seed in range(3)]
    x, w, y = (
        torch.tensor(np.stack(drawn))
        for drawn in zip(
            *[(r.normal(0, 0.01, (128, 10)), r.random((128, 10, 10)), r.random((128, 10))) for r in draws], strict=True
        )
    )
    x.requires_grad_()
    optimizer = FusedLSTMOptimizer([x], rule.double(), backend=backend)
    found = []
    for step in range(max(steps) + 1):
        optimizer.zero_grad()
        losses = (torch.einsum("sbij,sbj->sbi", w, x) - y).square().sum(-1).mean(-1)
        if step in steps:
            found.append(losses.mean().item())
        losses.sum().backward()
        optimizer.step()
    return found


@with_anchors
def test_published_rnnprop_weights_do_what_they_did():
    rule, _ = import_rule(ANCHORS / "rnnprop.l2l")
    assert rule.text == "adam:0.95,0.95,1e-08 elu:20 lstm:20,20 tanh"
    found = quadratics(rule, (0, 100, 300, 1000, 2000), "auto")
    assert found == pytest.approx([3.386, 0.264, 0.053, 0.020, 0.015], abs=5e-4)


@with_anchors
@pytest.mark.parametrize("backend", ["native", "reference"])
def test_published_lstm_weights_do_what_they_did(backend):
    rule, _ = import_rule(ANCHORS / "dm.l2l")
    assert rule.text == "log_and_sign:5 lstm:20,20 linear"
    assert quadratics(rule, (0, 100), backend) == pytest.approx([3.386, 0.267], abs=5e-4)


@with_anchors
@pytest.mark.parametrize("name", ["dm", "rnnprop"])
def test_these_tests_write_the_published_format(name):
    content = (ANCHORS / f"{name}.l2l").read_bytes()
    again = l2l(array_pickle.read_arrays(content))
    used = [{(opcode.name, argument) for opcode, argument, _ in pickletools.genops(data)} for data in (content, again)]
    differ = {
        instruction for instruction in used[0] ^ used[1] if "PUT" not in instruction[0] and "GET" not in instruction[0]
    }
    assert not differ


# Hostile and damaged files


def global_file(module, name, *arguments):
    return dumped(Call(Global(module, name), *arguments))


@pytest.mark.parametrize(
    ("module", "name", "arguments"),
    [
        ("os", "system", ("true",)),
        ("posix", "system", ("true",)),
        ("builtins", "eval", ("1",)),
        ("builtins", "getattr", ("", "__class__")),
        ("builtins", "dict", ()),
        ("collections", "OrderedDict", ()),
        ("collections.defaultdict", "__class__", ()),
        ("numpy", "load", ("x",)),
        ("numpy.core.multiarray", "scalar", ()),
        ("numpy", "ndarray.tofile", ()),
        ("dill._dill", "_create_function", ()),
        ("dill", "_dill", ()),
        ("", "", ()),
    ],
)
@pytest.mark.parametrize("protocol", [0, 2, 3, 4])
def test_other_globals_are_refused_by_name(refused, module, name, arguments, protocol):
    refused(dumped(Call(Global(module, name), *arguments), protocol), f"got '{module}.{name}', which was refused")
    if protocol:
        refused(dumped({"lstm_1": {"w": Global(module, name)}}, protocol), f"got '{module}.{name}', which was refused")


def test_names_on_the_stack_are_refused_as_well(refused):
    content = b"\x80\x04\x8c\x02os\x8c\x06system\x93\x8c\x04true\x85R."
    refused(content, "got 'os.system', which was refused")
    refused(content.replace(b"\x8c\x06system", b"K\x06"), "expected names, got a int")


@pytest.mark.parametrize(
    ("made", "message"),
    [
        (Call(LOAD_TYPE, "object"), "refused a call of dill._dill._load_type"),
        (Call(LOAD_TYPE, "dict", "dict"), "refused a call of dill._dill._load_type"),
        (Call(IMPORT, "os"), "refused a call of dill._dill._import_module"),
        (Call(IMPORT, "numpy.core"), "refused a call of dill._dill._import_module"),
        (
            Call(GET_ATTR, Call(IMPORT, "numpy.core._multiarray_umath"), "fromfile"),
            "refused a call of dill._dill._get_attr",
        ),
        (Call(GET_ATTR, NDARRAY, "_reconstruct"), "refused a call of dill._dill._get_attr"),
        (Call(GET_ATTR, Call(GET_ATTR, NDARRAY, "__class__"), "mro"), "refused a call of dill._dill._get_attr"),
        (Call(GET_ATTR, "text", "format"), "refused a call of dill._dill._get_attr"),
        (Call(Global("collections", "defaultdict"), Global("numpy", "ndarray")), "refused a call of collections"),
        (Call(NDARRAY, (1 << 30,)), "refused a call of numpy.ndarray"),
        (Call(RECONSTRUCT, NDARRAY, (1 << 30,), EMPTY), "refused a call of numpy.core._multiarray_umath._reconstruct"),
        (Call(RECONSTRUCT, DTYPE, (0,), EMPTY), "refused a call of numpy.core._multiarray_umath._reconstruct"),
        (Call(DTYPE, "O8", 0, 1), "expected arrays of dtype float32 (f4) or float64 (f8), got 'O8'"),
        (Call(DTYPE, "f2", 0, 1), "got 'f2'"),
        (Call(DTYPE, "i4", 0, 1), "got 'i4'"),
        (Call(DTYPE, "V1000000000", 0, 1), "got 'V1000000000'"),
        (Call(DTYPE, [("a", "O")], 0, 1), "the instruction EMPTY_LIST"),
        (Call(Global("_codecs", "encode"), "x", "zlib"), "refused a call of _codecs.encode"),
        (Call(Global("_codecs", "encode"), "€", "latin1"), "codec can't encode"),
        (dtype_of("f4", "@"), "refused to change a dtype"),
        (array_of(((1 << 31) - 1, (1 << 31) - 1), FLOAT32, b""), "numbers of"),
        (array_of(((1 << 31) - 1, 0), FLOAT32, b"1234"), "numbers of float32, got 4 bytes"),
        (array_of((2,), FLOAT32, b"1234"), "expected (2,) numbers of float32, got 4 bytes"),
        (array_of((-1,), FLOAT32, b""), "expected arrays of one or two dimensions"),
        (array_of((True,), FLOAT32, b"1234"), "expected arrays of one or two dimensions"),
        (array_of((1,) * 40, FLOAT32, b"1234"), "expected arrays of one or two dimensions"),
        (array_of("text", FLOAT32, b"1234"), "refused to change a array"),
        (array_of((1,), "f4", b"1234"), "refused to change a array"),
        (array_of((1,), FLOAT32, "1234"), "refused to change a array"),
        (Call(RECONSTRUCT, NDARRAY, (0,), EMPTY), "expected arrays in each layer, got a array"),
        (NDARRAY, "expected arrays in each layer, got numpy.ndarray"),
        (3, "expected arrays in each layer, got a int"),
        ({}, "expected arrays in each layer, got a dict"),
        (1 << 80, "the instruction LONG1"),
        (1.5, "the instruction BINFLOAT"),
        ({1: 2}, "expected names, got a int"),
        ({(): 2}, "expected names, got a tuple"),
        (Call(Global("numpy", "ndarray"), state={"__class__": 1}), "refused a call of numpy.ndarray"),
    ],
)
def test_only_what_such_files_do_is_done(refused, made, message):
    refused(dumped({"lstm_1": {"w_gates": made}}), message)


def nested(depth):
    """A tuple of itself twice, and so on: to hash or to print it would take forever."""
    return b"\x80\x03" + b")" + b"q\x00h\x00\x86" * depth


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is damaged or no pickle of arrays"),
        (b"PK\x03\x04", "is damaged or no pickle of arrays"),
        (b"\x80\x03.", "expected one value at the end, got 0"),
        (b"\x80\x03}}.", "expected one value at the end, got 2"),
        (b"\x80\x03}.}", "expected its end after 4 bytes, got 5"),
        (b"\x80\x03K\x01.", "expected a dict of layers"),
        (b"\x80\x03}\x8c\x01aK\x01s.", "expected a dict of layers"),
        (b"\x80\x03R.", "uses a value that is not there"),
        (b"\x80\x03b.", "uses a value that is not there"),
        (b"\x80\x03u.", "uses a value that is not there"),
        (b"\x80\x03h\x07.", "uses a value that is not there"),
        (b"\x80\x03q\x07.", "uses a value that is not there"),
        (b"\x80\x03K\x01\x85\x87.", "uses a value that is not there"),
        (b"\x80\x03}(K\x01u.", "items of something that is no dict"),
        (b"\x80\x03K\x01(K\x01K\x01u.", "items of something that is no dict"),
        (b"\x80\x03}}b.", "refused to change a dict"),
        (b"\x80\x03cnumpy\nndarray\n}b.", "refused to change numpy.ndarray"),
        (b"\x80\x03})R.", "refused a call of a dict"),
        (b"\x80\x03X\x01\x00\x00\x00a)R.", "refused a call of a str"),
        (b"\x80\x03Pid\n.", "the instruction PERSID"),
        (b"\x80\x03\x82\x01.", "the instruction EXT1"),
        (b"\x80\x03(ios\nsystem\n.", "the instruction INST"),
        (b"\x80\x03(cnumpy\nndarray\no.", "the instruction OBJ"),
        (b"\x80\x03cnumpy\nndarray\n)\x81.", "the instruction NEWOBJ"),
        (b"\x80\x032.", "the instruction DUP"),
        (b"I" + b"9" * 1000 + b"\n.", "the instruction INT"),
        (b"\x80\x04B\xff\xff\xff\xffx.", "is damaged or no pickle of arrays"),
        (b"\x80\x04\x8e" + struct.pack("<Q", 1 << 40) + b"x.", "is damaged or no pickle of arrays"),
        (b"\x80\x04\x8e" + struct.pack("<Q", (1 << 64) - 1) + b"x.", "is damaged or no pickle of arrays"),
        (b"\x80\x05\x96" + struct.pack("<Q", 1 << 40) + b"x.", "is damaged or no pickle of arrays"),
        (b"\x80\x04\x95" + struct.pack("<Q", 1 << 60) + b"K\x01.", "expected a dict of layers"),
        (b"\x80\x03\x8b" + struct.pack("<i", (1 << 31) - 1) + b"x.", "is damaged or no pickle of arrays"),
        (b"\x80\x03\x8b" + struct.pack("<i", 900) + b"\x7f" * 900 + b".", "the instruction LONG4"),
        (b"\x80\x03}r\xff\xff\xff\xff.", "expected lstm_1.w_gates among its arrays"),
        (b"\x80\x03" + b")" + b"\x85" * 60_000 + b".", "expected a dict of layers"),
        (nested(60) + b".", "expected a dict of layers"),
        (nested(60) + b"q\x01}h\x01K\x01s.", "expected names, got a tuple"),
        (nested(60) + b"q\x01cos\n_exit\nh\x01R.", "got 'os._exit', which was refused"),
        (nested(60) + b"q\x01cnumpy\ndtype\nh\x01R.", "refused a call of numpy.dtype"),
        (nested(60) + b"q\x01h\x01h\x01R.", "refused a call of a tuple"),
        (b"\x80\x03" + b"(" * 100_000 + b".", "more than 65536 instructions"),
        (b"\x80\x03" + b"N0" * 100_000 + b".", "the instruction POP"),
        (b"\x80\x03}q\x00\x8c\x01ah\x00s.", "expected arrays in each layer, got a dict"),
    ],
)
def test_damaged_and_hostile_pickles_are_refused_cheaply(refused, content, message):
    refused(content, message)


def test_content_that_is_shared_does_not_multiply(refused):
    content = b"\0" * 1000
    many = {f"w{i}": array_of((250,), FLOAT32, content) for i in range(2000)}
    refused(dumped({"lstm_1": many}), "several share one")
    text = "x" * 1000
    encode = Global("_codecs", "encode")
    refused(dumped({"lstm_1": {f"w{i}": Call(encode, text, "latin1") for i in range(2000)}}), "several share one")


def changed(change, **sizes):
    layers = layers_of(**sizes)
    change(layers)
    return l2l(layers)


def put(layer, name, value):
    return lambda layers: layers.setdefault(layer, {}).update({name: value})


ZEROS = np.zeros((3, 4), np.float32)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda layers: layers.pop("linear"), "'linear.w' is missing"),
        (lambda layers: layers.pop("lstm_1"), "expected lstm_1.w_gates among its arrays, got"),
        (lambda layers: layers.update(lstm_3=layers.pop("lstm_2")), "expected lstm_2.w_gates among its arrays"),
        (lambda layers: layers["lstm_2"].pop("b_gates"), "'lstm_2.b_gates' is missing"),
        (put("lstm_1", "peephole", ZEROS), "'lstm_1.peephole' is too many"),
        (put("batch_norm", "w", ZEROS), "'batch_norm.w' is too many"),
        (put("input_projection", "w", np.zeros((2, 2), np.float32)), "'input_projection.b' is missing"),
        (put("lstm_1", "w_gates", np.zeros((7, 19), np.float32)), "lstm_1.w_gates: expected shape"),
        (put("lstm_1", "w_gates", np.zeros((7, 3), np.float32)), "expected shape"),
        (put("lstm_1", "w_gates", np.zeros((5, 20), np.float32)), "lstm_1.w_gates: expected shape (inputs + units,"),
        (put("lstm_1", "w_gates", np.zeros((140,), np.float32)), "lstm_1.w_gates: expected a matrix, got shape (140,)"),
        (
            put("lstm_1", "w_gates", np.zeros((0, 20), np.float32)),
            "lstm_1.w_gates: expected a matrix, got shape (0, 20)",
        ),
        (put("lstm_1", "w_gates", np.zeros((8, 20), np.float32)), "features: expected 3, as many as the network has"),
        (
            put("lstm_2", "w_gates", np.zeros((9, 20), np.float32)),
            "lstm_2.w_gates: expected shape (10, 20), got (9, 20)",
        ),
        (put("lstm_2", "w_gates", np.zeros((9, 16), np.float32)), "lstm_2.b_gates: expected shape (16,), got (20,)"),
        (put("linear", "w", np.zeros((5, 2), np.float32)), "linear.w: expected shape (5, 1), got (5, 2)"),
        (put("linear", "b", np.zeros((1, 1), np.float32)), "linear.b: expected shape (1,), got (1, 1)"),
        (put("linear", "b", np.zeros(1, np.float64)), "expected arrays that are all float32 or all float64, got torch"),
        (put("linear", "b", np.full(1, np.nan, np.float32)), "linear.b: expected finite numbers, got NaN"),
        (put("lstm_1", "b_gates", np.full(20, -np.inf, np.float32)), "lstm_1.b_gates: expected finite numbers"),
    ],
)
def test_layers_that_do_not_fit_are_named(refused, change, message):
    refused(changed(change), message)


def test_layers_of_unlike_units_are_refused(refused):
    layers = layers_of()
    layers |= {"lstm_2": {"w_gates": np.zeros((9, 16), np.float32), "b_gates": np.zeros(16, np.float32)}}
    layers["linear"]["w"] = np.zeros((4, 1), np.float32)
    refused(l2l(layers), "layers: expected as many units in every layer, got (5, 4)")


def test_a_file_that_was_cut_short_or_went_on_is_refused(refused):
    whole = l2l(layers_of())
    for length in range(0, len(whole), 61):
        refused(whole[:length], "is damaged")
    refused(whole + b"\0", "expected its end after")
    refused(whole + whole, "expected its end after")


@pytest.mark.parametrize("source", ["tensorflow", "torch"])
def test_wrong_bits_are_refused_or_leave_finite_weights(written, source):
    numbers, whole = (
        random.Random(0),
        l2l(layers_of(projection=3, units=2)) if source == "tensorflow" else saved(network()),
    )
    outcomes = collections.Counter()
    for _ in range(500):
        damaged = bytearray(whole)
        for _ in range(numbers.choice([1, 1, 8])):
            damaged[numbers.randrange(len(whole))] ^= 1 << numbers.randrange(8)
        try:
            rule, _ = import_rule(written(bytes(damaged)), source)
        except RuleFileError:
            outcomes["refused"] += 1
        else:
            outcomes["read"] += 1
            assert all(weight.isfinite().all() for weight in rule.weights())
    assert min(outcomes["refused"], outcomes["read"]) > 50


def test_a_file_that_is_too_large_or_none_is_refused(tmp_path):
    large = tmp_path / "large"
    with large.open("wb") as file:
        file.truncate(1 << 33)
    with pytest.raises(RuleFileError, match="large: expected at most 67108864 bytes"):
        import_rule(large)
    for path in (tmp_path / "missing", tmp_path):
        with pytest.raises(FileNotFoundError, match="expected a file of trained weights"):
            import_rule(path)
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(FileNotFoundError):
        import_rule(tmp_path / "pipe")


# PyTorch


class Network(nn.Module):
    """LSTM layers of any kind between linear ones."""

    def __init__(self, layers, units=5, inputs=2, projection=None, bias=True, dtype=torch.float32):
        super().__init__()
        torch.manual_seed(0)
        self.out = nn.Linear(units, 1, bias=bias)  # before the others, as in some people's code
        width = inputs
        if projection is not None:
            self.first = nn.Linear(inputs, projection, bias=bias)
            width = projection
        if isinstance(layers, int):
            self.cells = nn.ModuleList(
                nn.LSTMCell(units if layer else width, units, bias=bias) for layer in range(layers)
            )
        else:
            self.rnn = nn.LSTM(width, units, num_layers=len(layers), bias=bias)
        self.to(dtype)

    def updates(self, features):
        """[steps, coordinates, inputs] -> [steps, coordinates]."""
        x = nn.functional.elu(self.first(features)) if hasattr(self, "first") else features
        if hasattr(self, "rnn"):
            x = self.rnn(x)[0]
        else:
            for cell in self.cells:
                state, outputs = None, []
                for step in x:
                    state = cell(step, state)
                    outputs.append(state[0])
                x = torch.stack(outputs)
        x = self.out(x).squeeze(-1)
        return x.tanh() if hasattr(self, "first") else x


def network():
    return Network(2, units=3).state_dict()


def saved(obj, **options) -> bytes:
    file = io.BytesIO()
    torch.save(obj, file, **options)
    return file.getvalue()


@pytest.mark.parametrize("layers", [1, 2, 3, ["nn.LSTM"], ["nn.LSTM"] * 3])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("projection", [None, 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_state_dict_computes_what_its_modules_do(written, layers, bias, projection, dtype):
    made = Network(layers, bias=bias, projection=projection, dtype=dtype)
    rule, recipe = import_rule(written(saved(made.state_dict())), "torch", output_scale=0.5)
    assert rule.dtype == dtype
    assert recipe["imported"]["from"] == "torch"
    parts = ("adam:0.95,0.95,1e-08 elu:4", "tanh") if projection else ("log_sign:10", "linear")
    depth = layers if isinstance(layers, int) else len(layers)
    assert rule.text == f"{parts[0]} lstm:{','.join(['5'] * depth)} {parts[1]}"
    gradients = torch.tensor(gradients_of())
    state, features = torch.zeros(4, gradients.shape[1], dtype=torch.float64), []
    rows = state[: rule.config.features.state_rows]
    for gradient in gradients:
        x, rows = reference.features(gradient, rows, rule.config.features)
        features.append(x.T)
    with torch.no_grad():
        truth = 0.5 * made.double().updates(torch.stack(features))
    np.testing.assert_allclose(ours(rule, gradients.numpy()), truth.numpy(), rtol=0, atol=1e-6)


def test_names_of_modules_are_free(written):
    state = Network(["nn.LSTM"] * 2).state_dict()
    plain, _ = import_rule(written(saved(state)), "torch")
    for prefix in ("module.", "", "a.b.weight.", "{}."):
        renamed = {prefix + name.removeprefix("rnn."): value for name, value in state.items()}
        rule, _ = import_rule(written(saved(renamed)), "torch")
        assert rule.fingerprint() == plain.fingerprint()


def test_torch_has_the_papers_constants_by_default(written):
    rule, _ = import_rule(written(saved(Network(2).state_dict())), "torch")
    assert (rule.text, rule.config.output_scale) == ("log_sign:10 lstm:5,5 linear", 0.1)
    rule, _ = import_rule(written(saved(Network(2, inputs=1).state_dict())), "torch", features="raw:0.25")
    assert rule.text == "raw:0.25 lstm:5,5 linear"


def without(*names):
    return {name: value for name, value in Network(2).state_dict().items() if name not in names}


@pytest.mark.parametrize(
    ("made", "message"),
    [
        (nn.Linear(2, 2), "got 'torch.nn.modules.linear.Linear', which was refused"),
        ([torch.zeros(2)], "expected a state_dict that torch.save wrote, of dense tensors by name, got list"),
        ({"model": Network(2).state_dict()}, "got OrderedDict for 'model'"),
        ({"epoch": 3}, "got int for 'epoch'"),
        ({3: torch.zeros(2)}, "got Tensor for 3"),
        ({}, "expected lstm.weight_ih_l0 among its arrays"),
        (without("out.weight"), "expected out.weight among its arrays"),
        (without("out.weight", "out.bias"), "expected nn.Linear(5, 1) and at most one other nn.Linear, got []"),
        (without("cells.0.weight_hh"), "expected cells.0.weight_hh among its arrays"),
        (without("cells.1.bias_hh"), "'cells.1.bias_hh' is missing"),
        (without() | {"more": torch.zeros(2)}, "'more' is too many"),
        (without() | {"norm.weight": torch.zeros(2)}, "norm.weight: expected a matrix, got shape (2,)"),
        (
            without() | {"a.weight": torch.zeros(5, 2), "b.weight": torch.zeros(5, 5)},
            "at most one other nn.Linear, got",
        ),
        (without() | {"out.weight": torch.zeros(2, 5)}, "expected nn.Linear(5, 1)"),
        (without() | {"out.bias": torch.zeros(2)}, "out.bias: expected shape (1,), got (2,)"),
        (
            without() | {"cells.1.weight_ih": torch.zeros(20, 4)},
            "cells.1.weight_ih: expected shape (20, 5), got (20, 4)",
        ),
        (
            without() | {"cells.0.weight_ih": torch.zeros(20, 3)},
            "features: expected 3, as many as the network has inputs",
        ),
        (without() | {"first.weight": torch.zeros(4, 2)}, "first.weight: expected shape (2, 2), got (4, 2)"),
        ({name: value.half() for name, value in without().items()}, "all float32 or all float64, got torch.float16"),
        (without() | {"out.bias": torch.zeros(1).double()}, "got torch.float32 and torch.float64"),
        (without() | {"out.bias": torch.tensor([float("nan")])}, "out.bias: expected finite numbers"),
        (
            without() | {f"cells.0.bias_{name}": torch.full((20,), 3e38) for name in ("ih", "hh")},
            "bias_l0: expected finite numbers",
        ),
        (without() | {"out.bias": torch.zeros(1, device="meta")}, "on meta for 'out.bias'"),
        (without() | {"out.bias": torch.zeros(1).to_sparse()}, "got torch.sparse_coo on cpu for 'out.bias'"),
        (without() | {"out.bias": torch.zeros(1).expand(1 << 40)}, "some share their content"),
        (
            nn.LSTM(2, 5, bidirectional=True).state_dict() | {"weight": torch.zeros(1, 5)},
            "weight_ih_l0_reverse' is too many",
        ),
        (nn.LSTM(2, 5, proj_size=3).state_dict(), "expected nn.Linear"),
    ],
)
def test_other_state_dicts_are_refused(refused, made, message):
    refused(saved(made), message, source="torch")


def test_other_files_are_no_state_dict(refused, written):
    expected = "expected a state_dict that torch.save wrote"
    whole = saved(network())
    refused(b"", expected, source="torch")
    refused(whole[: len(whole) // 2], expected, source="torch")
    refused(l2l(layers_of()), expected, source="torch")
    refused(saved(network(), _use_new_zipfile_serialization=False), expected, source="torch")
    bomb = io.BytesIO()
    with zipfile.ZipFile(bomb, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", b"\0" * 10_000_000)
    refused(bomb.getvalue(), "it unpacks to more than it is", source="torch")


class Trap:
    """Unpickling this makes a file."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


def test_a_trap_is_not_sprung(refused, tmp_path):
    trap = Trap(tmp_path / "trap")
    for protocol in range(6):
        refused(pickle.dumps({"lstm_1": {"w_gates": trap}}, protocol), "expected dicts and arrays only, got")
    refused(saved({"out.weight": trap}), "got 'posix.mkdir', which was refused", source="torch")
    assert not (tmp_path / "trap").exists()


# Arguments, and the command


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"source": "jax"}, "source: expected one of tensorflow, torch, got 'jax'"),
        ({"features": "log_sign"}, "features: expected one part such as raw:1"),
        ({"features": "log_sign:-1"}, "features: expected one part"),
        ({"features": "log_sign:5,0"}, "features: expected one part"),
        ({"features": "log_sign:5 given:3"}, "features: expected one part"),
        ({"features": "given:2"}, "features: expected one part"),
        ({"features": "raw:1 elu:3"}, "features: expected one part"),
        ({"features": ""}, "features: expected one part"),
        ({"output": "none"}, "output: expected linear or tanh, got 'none'"),
        ({"output_scale": 0}, "output_scale: expected a finite positive number, got 0"),
        ({"output_scale": float("nan")}, "output_scale: expected a finite positive number, got nan"),
        ({"features": "raw:1"}, "weights.l2l: features: expected 2, as many as the network has inputs, got raw:1"),
    ],
)
def test_arguments_out_of_range_are_named(written, options, message):
    path = written(l2l(layers_of()))
    with pytest.raises(ValueError) as caught:  # noqa: PT011  (the message is compared below)
        import_rule(path, **options)
    assert message in str(caught.value)


def test_the_command_writes_a_rule_file_that_says_where_it_came_from(written, tmp_path):
    path, out = written(l2l(layers_of())), tmp_path / "rule.safetensors"
    arguments = ["import", str(path), "--out", str(out), "--features", "log_sign:7", "--output-scale", "0.2"]
    done = CliRunner().invoke(app, arguments, catch_exceptions=False)
    assert done.exit_code == 0
    assert "log_sign:7 lstm:5,5 linear, output scale 0.2" in done.stdout
    rule, recipe = import_rule(path, features="log_sign:7", output_scale=0.2)
    assert load_rule(out).describe() == rule.describe()
    assert read_recipe(out) == recipe
    torch_file = written(saved(Network(2).state_dict()))
    assert CliRunner().invoke(app, ["import", str(torch_file), "--out", str(out), "--from", "torch"]).exit_code == 0
    assert load_rule(out).text == "log_sign:10 lstm:5,5 linear"


def test_a_refused_file_leaves_what_was_there(written, tmp_path):
    path, out = written(b"cos\nsystem\n."), tmp_path / "rule.safetensors"
    out.write_bytes(b"old")
    done = CliRunner().invoke(app, ["import", str(path), "--out", str(out)])
    assert isinstance(done.exception, RuleFileError)
    assert "os.system" in str(done.exception)
    assert out.read_bytes() == b"old"


def test_help_shows_an_example():
    assert "Example: fastl2l import" in CliRunner().invoke(app, ["import", "--help"]).stdout
