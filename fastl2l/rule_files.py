"""Rules as files: safetensors, with the rule's kind and configuration as metadata. Nothing in a file is executed."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch

from fastl2l import files
from fastl2l.rule_config import RuleConfig
from fastl2l.rules import RULES, Rule, make_rule, rules_by_part

FORMAT = "fastl2l-rule"
VERSION = 2
OF_PARTS = 3
"""Version of files that hold several rules, by the part of a problem that each is for."""
_READ = ("1", "2", "3")
"""Versions that are read. The first had configurations of its one kind of rule in place of a text."""
_SHIPPED = Path(__file__).parent / "shipped"
_METADATA = {"format", "format_version", "rule", "config", "parts", "recipe", "checksum"}
_DTYPES = {"F32": torch.float32, "F64": torch.float64}


class RuleFileError(ValueError):
    """A file that is not a rule this version can read; the message says what was expected and what came."""


def save_rule(
    rule: Rule | Mapping[str, Rule], path: str | os.PathLike[str], *, recipe: dict[str, Any] | None = None
) -> Path:
    """Write `rule` to `path`, whole or not at all.

    Args:
        rule: the rule, or a dict of rules by the names of a problem's parts.
        path: file name, usually ending in .safetensors.
        recipe: how it was made (command, seed, scores): anything JSON can hold.

    Raises:
        TypeError: `rule` is neither a rule nor a dict of some, or `recipe` holds something JSON cannot.
        ValueError: `recipe` is longer or deeper than what would be read; or see `fastl2l.rules.rules_by_part`.
    """
    rules = {"": rule} if isinstance(rule, Rule) else rules_by_part(rule)
    described = {part: {"rule": one.kind, "config": one.config.describe()} for part, one in rules.items()}
    if isinstance(rule, Rule):
        about = {"rule": rule.kind, "config": json.dumps(rule.config.describe())}
    else:
        about = {"parts": json.dumps(described)}
    metadata = {
        "format": FORMAT,
        "format_version": str(VERSION if isinstance(rule, Rule) else OF_PARTS),
        **about,
        "recipe": json.dumps(recipe or {}),
    }
    files.parse_json(metadata["recipe"], "recipe")
    # Of their own each, though they be tied, and those alone, though the module has others.
    weights = {
        _stored_name(part, name): weight.detach().clone()
        for part, one in rules.items()
        for (name, _), weight in zip(one.config.weight_shapes, one.weights(), strict=True)
    }
    return files.write_tensors(path, weights, metadata)


def _stored_name(part: str, name: str) -> str:
    """What a file calls the weight `name` of the rule for `part`, in which there is no point; "" is for all."""
    return f"{part}.{name}" if part else name


def shipped() -> dict[str, Path]:
    """The trained rules that come with fastl2l, by name."""
    return {path.stem: path for path in sorted(_SHIPPED.glob("*.safetensors"))}


def load_rule(path: str | os.PathLike[str]) -> Any:
    """Read what :func:`save_rule` wrote, or a rule that comes with fastl2l.

    Args:
        path: a file, or the name of a shipped rule, such as "lstm-mnist"; `fastl2l rules` lists them.

    Returns:
        The `Rule`, or, of a file that holds several, a dict of rules by part.

    Raises:
        FileNotFoundError: there is no such file and no such rule.
        RuleFileError: it is damaged, a pickle, of another format or version, or its weights do not fit its
            configuration.
    """
    rules = {part: _made(path, described) for part, described in _read(path).rules.items()}
    return rules.get("", rules)


def load_one_rule(path: str | os.PathLike[str]) -> Rule:
    """As :func:`load_rule`, of what wants one rule for everything.

    Raises:
        FileNotFoundError, RuleFileError: as there, or the file holds rules by part.
    """
    found = load_rule(path)
    if not isinstance(found, Rule):
        raise RuleFileError(f"{path}: expected one rule, got one for each part: {', '.join(found)}")
    return found


def _made(path: str | os.PathLike[str], found: _Described) -> Rule:
    try:
        rule = make_rule(found.kind, found.config, dtype=found.dtype)
    except ValueError as error:  # a constant that is no number of this dtype
        raise RuleFileError(f"{path}: {error}") from error
    rule.load_weights(found.weights)
    return rule


def read_recipe(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The recipe that a rule file or a shipped rule carries. Raises as :func:`load_rule` does."""
    return _read(path).recipe


class _Described(NamedTuple):
    """What a file holds of one rule."""

    kind: str
    config: RuleConfig
    dtype: torch.dtype
    weights: dict[str, torch.Tensor]


class _Content(NamedTuple):
    """What a rule file holds, all of it checked."""

    rules: dict[str, _Described]
    """By part; "" is for all."""
    recipe: dict[str, Any]


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
        raise RuleFileError(f"{path}: expected format version {VERSION} or {OF_PARTS}, got {version}")
    if unknown := metadata.keys() - _METADATA:
        raise RuleFileError(f"{path}: is damaged: it holds unknown metadata {shown(sorted(unknown))}")
    configurations = _configurations(stored)
    expected = {
        _stored_name(part, name): shape
        for part, (_, config) in configurations.items()
        for name, shape in config.weight_shapes
    }
    if stored.shapes != expected or len(stored.dtypes) != 1 or not stored.dtypes <= _DTYPES.keys():
        wanted, got = shown(expected), f"{shown(stored.shapes)} of {shown(sorted(stored.dtypes))}"
        raise RuleFileError(f"{path}: expected weights {wanted}, all float32 or all float64, got {got}")
    (dtype,) = stored.dtypes
    weights = stored.load(sealed="checksum" in metadata)
    recipe = files.parse_json(metadata.get("recipe", "{}"), f"{path}: its recipe")
    if not isinstance(recipe, dict):
        raise RuleFileError(f"{path}: expected a recipe with names, got {shown(recipe)}")
    rules = {
        part: _Described(
            kind, config, _DTYPES[dtype], {name: weights[_stored_name(part, name)] for name, _ in config.weight_shapes}
        )
        for part, (kind, config) in configurations.items()
    }
    return _Content(rules, recipe)


def _configurations(stored: files.StoredTensors) -> dict[str, tuple[str, RuleConfig]]:
    """Kind and configuration by part, as the metadata say; sizes are bounded (rule_config.py)."""
    path, metadata, shown = stored.path, stored.metadata, files.shown
    if metadata["format_version"] != str(OF_PARTS):
        return {"": _configuration(path, metadata.get("rule", ""), lambda: _parsed(metadata["config"]))}
    described = files.parse_json(metadata.get("parts", ""), f"{path}: its parts")
    named = isinstance(described, dict) and described and all(part and "." not in part for part in described)
    if not named or not all(isinstance(one, dict) and one.keys() == {"rule", "config"} for one in described.values()):
        raise RuleFileError(f"{path}: expected a rule and its configuration by part, got {shown(described)}")
    return {
        part: _configuration(path, one["rule"], lambda one=one: one["config"])  # type: ignore[misc]
        for part, one in described.items()
    }


def _parsed(text: str) -> Any:
    return files.parse_json(text, "config")


def _configuration(path: Path, kind: Any, description: Callable[[], Any]) -> tuple[str, RuleConfig]:
    if kind not in (*RULES, Rule.kind):
        expected = f"{', '.join(RULES)} or {Rule.kind}"
        raise RuleFileError(f"{path}: expected a rule of kind {expected}, got {files.shown(kind)}")
    try:
        return kind, RuleConfig.from_description(description())
    except (KeyError, TypeError, ValueError) as error:
        raise RuleFileError(f"{path}: its configuration cannot be used: {str(error)[:400]}") from error


def _is_pickle(path: Path) -> bool:
    with path.open("rb") as file:
        start = file.read(4)
    return start[:1] == b"\x80" or start == b"PK\x03\x04"
