"""Rules as files: safetensors, with the rule's kind and configuration as metadata. Nothing in a file is executed."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any, NamedTuple

import torch

from fastl2l import files
from fastl2l.rule_config import RuleConfig
from fastl2l.rules import RULES, Rule, make_rule

FORMAT = "fastl2l-rule"
VERSION = 2
_READ = ("1", "2")
"""Versions that are read. The first had configurations of its one kind of rule in place of a text."""
_SHIPPED = Path(__file__).parent / "shipped"
_METADATA = {"format", "format_version", "rule", "config", "recipe", "checksum"}
_DTYPES = {"F32": torch.float32, "F64": torch.float64}


class RuleFileError(ValueError):
    """A file that is not a rule this version can read; the message says what was expected and what came."""


def save_rule(rule: Rule, path: str | os.PathLike[str], *, recipe: dict[str, Any] | None = None) -> Path:
    """Write `rule` to `path`, whole or not at all.

    Args:
        rule: the rule.
        path: file name, usually ending in .safetensors.
        recipe: how it was made (command, seed, scores): anything JSON can hold.

    Raises:
        TypeError: `rule` is not a rule, or `recipe` holds something JSON cannot.
        ValueError: `recipe` is longer or deeper than what would be read.
    """
    if not isinstance(rule, Rule):
        raise TypeError(f"rule: expected a rule, got {type(rule).__name__}")
    metadata = {
        "format": FORMAT,
        "format_version": str(VERSION),
        "rule": rule.kind,
        "config": json.dumps(rule.config.describe()),
        "recipe": json.dumps(recipe or {}),
    }
    files.parse_json(metadata["recipe"], "recipe")
    names = [name for name, _ in rule.config.weight_shapes]
    # Of their own each, though they be tied, and those alone, though the module has others.
    weights = {name: weight.detach().clone() for name, weight in zip(names, rule.weights(), strict=True)}
    return files.write_tensors(path, weights, metadata)


def shipped() -> dict[str, Path]:
    """The trained rules that come with fastl2l, by name."""
    return {path.stem: path for path in sorted(_SHIPPED.glob("*.safetensors"))}


def load_rule(path: str | os.PathLike[str]) -> Rule:
    """Read a rule that :func:`save_rule` wrote, or one that comes with fastl2l.

    Args:
        path: a file, or the name of a shipped rule, such as "lstm-mnist"; `fastl2l rules` lists them.

    Raises:
        FileNotFoundError: there is no such file and no such rule.
        RuleFileError: it is damaged, a pickle, of another format or version, or its weights do not fit its
            configuration.
    """
    kind, config, dtype, _, weights = _read(path)
    try:
        rule = make_rule(kind, config, dtype=dtype)
    except ValueError as error:  # a constant that is no number of this dtype
        raise RuleFileError(f"{path}: {error}") from error
    rule.load_weights(weights)
    return rule


def read_recipe(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The recipe that a rule file or a shipped rule carries. Raises as :func:`load_rule` does."""
    return _read(path).recipe


class _Content(NamedTuple):
    """What a rule file holds, all of it checked."""

    kind: str
    config: RuleConfig
    dtype: torch.dtype
    recipe: dict[str, Any]
    weights: dict[str, torch.Tensor]


def _read(name_or_path: str | os.PathLike[str]) -> _Content:
    path = shipped().get(os.fspath(name_or_path), Path(name_or_path))
    if not path.is_file():
        names = ", ".join(shipped())
        raise FileNotFoundError(f"{path}: expected a rule file or one of {names}, and there is no such file")
    try:
        with files.open_tensors(path) as stored:
            return _checked(stored)
    except files.FileError as error:
        if _is_pickle(path):  # looked at only now: a safetensors file may begin so too
            raise RuleFileError(
                f"{path}: expected a safetensors file, got a pickle, which could run any code; it was not unpickled"
            ) from error
        raise RuleFileError(str(error)) from error


def _checked(stored: files.StoredTensors) -> _Content:
    """The version first, then what the file says of itself, and only then the weights, which may be large."""
    path, metadata, shown = stored.path, stored.metadata, files.shown
    if metadata.get("format") != FORMAT:
        raise RuleFileError(f"{path}: expected format {FORMAT!r}, got {shown(metadata.get('format'))}")
    if metadata.get("format_version") not in _READ:
        version = str(metadata.get("format_version"))[:80]
        raise RuleFileError(f"{path}: expected format version {VERSION}, got {version}")
    if unknown := metadata.keys() - _METADATA:
        raise RuleFileError(f"{path}: is damaged: it holds unknown metadata {shown(sorted(unknown))}")
    kind = metadata.get("rule", "")
    if kind not in (*RULES, Rule.kind):
        raise RuleFileError(f"{path}: expected a rule of kind {', '.join(RULES)} or {Rule.kind}, got {shown(kind)}")
    config = _configuration(stored)
    expected = dict(config.weight_shapes)
    if stored.shapes != expected or len(stored.dtypes) != 1 or not stored.dtypes <= _DTYPES.keys():
        wanted, got = shown(expected), f"{shown(stored.shapes)} of {shown(sorted(stored.dtypes))}"
        raise RuleFileError(f"{path}: expected weights {wanted}, all float32 or all float64, got {got}")
    (dtype,) = stored.dtypes
    weights = stored.load(sealed="checksum" in metadata)
    recipe = files.parse_json(metadata.get("recipe", "{}"), f"{path}: its recipe")
    if not isinstance(recipe, dict):
        raise RuleFileError(f"{path}: expected a recipe with names, got {shown(recipe)}")
    return _Content(kind, config, _DTYPES[dtype], recipe, weights)


def _configuration(stored: files.StoredTensors) -> RuleConfig:
    """What the metadata say of the rule; its sizes are bounded (rule_config.py)."""
    path = stored.path
    try:
        return RuleConfig.from_description(files.parse_json(stored.metadata["config"], "config"))
    except (KeyError, TypeError, ValueError) as error:
        raise RuleFileError(f"{path}: its configuration cannot be used: {str(error)[:400]}") from error


def _is_pickle(path: Path) -> bool:
    with path.open("rb") as file:
        start = file.read(4)
    return start[:1] == b"\x80" or start == b"PK\x03\x04"
