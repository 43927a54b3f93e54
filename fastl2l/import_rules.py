"""Rules from weights that others trained: with the TensorFlow code of both papers, or with PyTorch's own LSTM modules.

A source reads a file into arrays by name, checks them against the shapes that its layers must have, and renames them to
a rule's weights. Nothing in a file is executed.
"""

from __future__ import annotations

import hashlib
import io
import os
import pickle
import re
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastl2l.array_pickle import read_arrays
from fastl2l.files import shown
from fastl2l.rule_config import Adam, Features, LogAndSign, LogSign, Projection, Raw, RuleConfig, require_positive
from fastl2l.rule_files import RuleFileError
from fastl2l.rules import DTYPES, LSTMRule, RNNpropRule, Rule, make_rule

MOST_BYTES = 1 << 26
"""Of a file: a rule of two layers of 1,000 units has half of that."""

Arrays = dict[str, Tensor]


def import_rule(
    path: str | os.PathLike[str],
    source: str = "tensorflow",
    *,
    features: str | None = None,
    output: str | None = None,
    output_scale: float | None = None,
) -> tuple[Rule, dict[str, Any]]:
    """A rule with the weights that a file holds, and its recipe for `save_rule`.

    A file has no constants. Where they are not given, they are those of the TensorFlow code (its log_and_sign with 5,
    output scale 0.01) or, for torch, those of the papers (10 and 0.1).

    Args:
        path: the file.
        source: "tensorflow" for an .l2l file, with ``lstm_1``, ``lstm_2`` ... and ``linear`` in Sonnet's layout, and
            RNNprop's ``input_projection``; or "torch" for a state_dict of ``nn.LSTM`` or ``nn.LSTMCell`` layers and an
            ``nn.Linear`` to one output, and perhaps an ``nn.Linear`` and ELU before them. Their names are free; LSTM
            layers stand in their order.
        features: what is made of a gradient: by default ``"raw:1"`` or log_sign, by the number of inputs, and with a
            projection before the LSTM ``"adam:0.95,0.95,1e-08"``.
        output: "linear" or "tanh"; by default tanh with a projection.
        output_scale: factor on the update.

    Returns:
        The rule in the file's dtype, and the file's name and SHA-256.

    Raises:
        FileNotFoundError: there is no such file.
        RuleFileError: it is damaged, or holds anything but such layers in finite float32 or float64 numbers.
        ValueError: another argument is out of range; the message names it.
    """
    if source not in SOURCES:
        raise ValueError(f"source: expected one of {', '.join(SOURCES)}, got {shown(source)}")
    part = None if features is None else _features(features)
    if output not in (None, "linear", "tanh"):
        raise ValueError(f"output: expected linear or tanh, got {shown(output)}")
    scale = SOURCES[source].output_scale if output_scale is None else require_positive("output_scale", output_scale)
    data = _read(Path(path))
    try:
        found = SOURCES[source].read(data)
        weights = SOURCES[source].rename(found)
        config = _config(weights, SOURCES[source].log_sign, part, output, scale)
        rule = make_rule(_kind(config), config, dtype=weights["weight_hh_l0"].dtype)
        _require_finite(weights)  # sums of biases may not be
        rule.load_weights(weights)
    except ValueError as error:
        raise RuleFileError(f"{path}: {error}") from error
    origin = {"file": Path(path).name, "sha256": hashlib.sha256(data).hexdigest(), "from": source}
    return rule, {"imported": origin}


def _features(text: str) -> Features:
    try:
        config = RuleConfig.parse(f"{text} lstm:1 linear")
    except ValueError:
        config = None
    if config is None or config.features is None or str(config.features) != config.text.removesuffix(" lstm:1 linear"):
        raise ValueError(
            f"features: expected one part such as raw:1, log_sign:10 or adam:0.95,0.95,1e-08, got {shown(text)}"
        )
    return config.features


def _read(path: Path) -> bytes:
    if not path.is_file():
        raise FileNotFoundError(f"{path}: expected a file of trained weights, and there is no such file")
    with path.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        if size > MOST_BYTES:
            raise RuleFileError(f"{path}: expected at most {MOST_BYTES} bytes, got {size}")
        return file.read(size)


def _config(
    weights: Arrays, log_sign: Features, features: Features | None, output: str | None, output_scale: float
) -> RuleConfig:
    """The configuration that weights of these shapes belong to."""
    projected = "weight_in" in weights
    inputs = weights["weight_in" if projected else "weight_ih_l0"].shape[1]
    if features is None:
        features = Adam() if projected else Raw() if inputs == 1 else log_sign
    if features.count != inputs:
        raise ValueError(f"features: expected {inputs}, as many as the network has inputs, got {features}")
    return RuleConfig(
        features,
        tuple(weight.shape[1] for name, weight in weights.items() if name.startswith("weight_hh")),
        Projection("elu", len(weights["bias_in"])) if projected else None,
        output or ("tanh" if projected else "linear"),
        output_scale=output_scale,
    )


def _kind(config: RuleConfig) -> str:
    """The name of the class whose arguments say all of this."""
    if config.projection is not None:
        return RNNpropRule.kind if isinstance(config.features, Adam) and config.output == "tanh" else Rule.kind
    return LSTMRule.kind if not isinstance(config.features, Adam) and config.output == "linear" else Rule.kind


# What a file must hold


def _require(found: Arrays, expected: dict[str, tuple[int, ...]]) -> None:
    """Raises ValueError where a file's arrays are not exactly these, all in one dtype that rules have, and finite."""
    for name in [*expected, *found]:
        if name not in found or name not in expected:
            wrong = "missing" if name in expected else "too many"
            raise ValueError(f"expected {shown(', '.join(expected))}, and {shown(name)} is {wrong}")
    for name, shape in expected.items():
        if tuple(found[name].shape) != shape:
            raise ValueError(f"{name}: expected shape {shape}, got {tuple(found[name].shape)}")
    dtypes = {array.dtype for array in found.values()}
    if dtypes not in [{dtype} for dtype in DTYPES]:
        got = " and ".join(sorted(map(str, dtypes)))
        raise ValueError(f"expected arrays that are all float32 or all float64, got {got}")
    _require_finite(found)


def _require_finite(arrays: Arrays) -> None:
    for name, array in arrays.items():
        if not array.isfinite().all():
            raise ValueError(f"{name}: expected finite numbers, got NaN or an infinity")


def _matrix(found: Arrays, name: str) -> tuple[int, int]:
    """Rows and columns of an array on whose shape others depend."""
    if name not in found:
        raise ValueError(f"expected {name} among its arrays, got {shown(', '.join(found))}")
    if found[name].dim() != 2 or found[name].numel() == 0:
        raise ValueError(f"{name}: expected a matrix, got shape {tuple(found[name].shape)}")
    return found[name].shape[0], found[name].shape[1]


# TensorFlow: inputs and h in one matrix, from the left, gates in the order i, g, f, o


def _read_l2l(data: bytes) -> Arrays:
    return {
        f"{layer}.{name}": torch.from_numpy(array.astype(array.dtype.newbyteorder("=")))
        for layer, arrays in read_arrays(data).items()
        for name, array in arrays.items()
    }


def _rename_l2l(found: Arrays) -> Arrays:
    lstms = [name.removesuffix(".w_gates") for name in found if re.fullmatch(r"lstm_[0-9]+\.w_gates", name)]
    lstms = [f"lstm_{layer + 1}" for layer in range(max(1, len(lstms)))]
    rows, columns = _matrix(found, "lstm_1.w_gates")
    width = rows - columns // 4
    if width < 1:
        raise ValueError(f"lstm_1.w_gates: expected shape (inputs + units, 4 units), got {(rows, columns)}")
    expected: dict[str, tuple[int, ...]] = {}
    projected = any(name.startswith("input_projection.") for name in found)
    if projected:
        inputs, _ = _matrix(found, "input_projection.w")
        expected |= {"input_projection.w": (inputs, width), "input_projection.b": (width,)}
    for lstm in lstms:
        units = _matrix(found, f"{lstm}.w_gates")[1] // 4
        expected |= {f"{lstm}.w_gates": (width + units, 4 * units), f"{lstm}.b_gates": (4 * units,)}
        width = units
    _require(found, expected | {"linear.w": (width, 1), "linear.b": (1,)})

    weights = {"weight_in": found["input_projection.w"].T, "bias_in": found["input_projection.b"]} if projected else {}
    for layer, lstm in enumerate(lstms):
        w, b = _gates(found[f"{lstm}.w_gates"]), _gates(found[f"{lstm}.b_gates"], forget=1.0)
        units = len(b) // 4
        weights |= {f"weight_ih_l{layer}": w[:-units].T, f"weight_hh_l{layer}": w[-units:].T, f"bias_l{layer}": b}
    return weights | {"weight_out": found["linear.w"].reshape(-1), "bias_out": found["linear.b"].reshape(())}


def _gates(array: Tensor, forget: float = 0.0) -> Tensor:
    """In PyTorch's order. Sonnet adds 1 to the forget gate when it runs; here its bias has it."""
    i, g, f, o = array.chunk(4, dim=-1)
    return torch.cat([i, f + forget, g, o], dim=-1)


# PyTorch: a state_dict of modules that may have any name

_LSTM = re.compile(r"((?:.*\.)?)(?:weight|bias)_(?:ih|hh)((?:_l[0-9]+)?)")
_LINEAR = re.compile(r"((?:.*\.)?)(?:weight|bias)")


def _read_state_dict(data: bytes) -> Arrays:
    expected = "expected a state_dict that torch.save wrote, of dense tensors by name"
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            if sum(entry.file_size for entry in archive.infolist()) > len(data):  # torch packs nothing
                raise ValueError("it unpacks to more than it is")
        found = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except Exception as error:  # whatever the readers make of a damaged file
        raise ValueError(f"{expected}, and it is damaged or something else: {_reason(error)}") from error
    if not isinstance(found, dict):
        raise ValueError(f"{expected}, got {type(found).__name__}")
    for name, value in found.items():
        if not isinstance(name, str) or not isinstance(value, Tensor):
            raise ValueError(f"{expected}, got {type(value).__name__} for {shown(name)}")
        if value.layout != torch.strided or value.device.type != "cpu":
            raise ValueError(f"{expected}, got {value.layout} on {value.device} for {shown(name)}")
    if sum(value.numel() * value.element_size() for value in found.values()) > len(data):
        raise ValueError(f"{expected}, and some share their content")
    return {name: value.detach() for name, value in found.items()}


def _reason(error: Exception) -> str:
    """What torch.load found, without its advice to run the file."""
    refused = re.search(r"GLOBAL (\S+)", str(error))
    if refused:
        return f"got {shown(refused[1])}, which was refused"
    return "its pickle cannot be read" if isinstance(error, pickle.UnpicklingError) else str(error)[:200]


def _rename_state_dict(found: Arrays) -> Arrays:
    """Weights of a chain of modules: LSTM layers as they stand, a projection and an output wherever they do."""
    lstms = list(dict.fromkeys(match.groups() for match in map(_LSTM.fullmatch, found) if match)) or [("lstm.", "_l0")]
    linears = list(dict.fromkeys(match[1] for match in map(_LINEAR.fullmatch, found) if match))
    width = _matrix(found, "{}weight_ih{}".format(*lstms[0]))[1]
    units = _matrix(found, "{}weight_hh{}".format(*lstms[-1]))[1]
    outputs = [name for name in linears if _matrix(found, f"{name}weight") == (1, units)]
    if not outputs or len(linears) > 2:
        got = shown([f"{name}weight" for name in linears])
        raise ValueError(f"expected nn.Linear({units}, 1) and at most one other nn.Linear, got {got}")
    output = outputs[-1]
    projection = next((name for name in linears if name != output), None)

    expected = _optional(found, {f"{output}bias": (1,)}) | {f"{output}weight": (1, units)}
    if projection is not None:
        inputs = _matrix(found, f"{projection}weight")[1]
        expected |= {f"{projection}weight": (width, inputs)} | _optional(found, {f"{projection}bias": (width,)})
    for module, layer in lstms:
        units = _matrix(found, f"{module}weight_hh{layer}")[1]
        expected |= {f"{module}weight_ih{layer}": (4 * units, width), f"{module}weight_hh{layer}": (4 * units, units)}
        expected |= _optional(found, {f"{module}bias_{name}{layer}": (4 * units,) for name in ("ih", "hh")})
        width = units
    _require(found, expected)

    def bias(name: str, shape: tuple[int, ...]) -> Tensor:
        return found[name].reshape(shape) if name in found else found[f"{output}weight"].new_zeros(shape)

    weights: Arrays = {}
    if projection is not None:
        matrix = found[f"{projection}weight"]
        weights |= {"weight_in": matrix, "bias_in": bias(f"{projection}bias", (len(matrix),))}
    for index, (module, layer) in enumerate(lstms):
        weights[f"weight_ih_l{index}"] = found[f"{module}weight_ih{layer}"]
        weights[f"weight_hh_l{index}"] = matrix = found[f"{module}weight_hh{layer}"]
        both = [bias(f"{module}bias_{name}{layer}", (len(matrix),)) for name in ("ih", "hh")]
        weights[f"bias_l{index}"] = both[0] + both[1]
    return weights | {"weight_out": found[f"{output}weight"].reshape(-1), "bias_out": bias(f"{output}bias", ())}


def _optional(found: Arrays, shapes: dict[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
    """All of these or none."""
    return shapes if found.keys() & shapes.keys() else {}


@dataclass(frozen=True)
class _Source:
    """How a kind of file becomes a rule's weights, and the constants that belong to it."""

    read: Callable[[bytes], Arrays]
    rename: Callable[[Arrays], Arrays]
    log_sign: Features
    output_scale: float


SOURCES = {
    "tensorflow": _Source(_read_l2l, _rename_l2l, LogAndSign(5), 0.01),
    "torch": _Source(_read_state_dict, _rename_state_dict, LogSign(10), 0.1),
}
"""Whose files can be imported, by name."""
