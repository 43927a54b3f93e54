"""Rules as files: safetensors, with the rule's kind and configuration as metadata. Nothing in a file is executed."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from fastl2l import files
from fastl2l.rule_config import RuleConfig
from fastl2l.rules import Rule, make_rule

FORMAT = "fastl2l-rule"
VERSION = 1
_SHIPPED = Path(__file__).parent / "shipped"
_METADATA = {"format", "format_version", "rule", "config", "recipe", "checksum"}


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
    weights = {name: weight.detach().cpu().contiguous() for name, weight in rule.named_parameters()}
    metadata["checksum"] = _checksum(metadata, weights)
    return files.write_bytes(path, save(weights, metadata))


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
    metadata, weights = _read(path)
    try:
        config = RuleConfig.from_description(json.loads(metadata["config"]))
    except (KeyError, TypeError, ValueError) as error:
        raise RuleFileError(f"{path}: its configuration cannot be used: {error}") from error
    # Before a rule is made: a wrong size in the configuration could ask for any amount of memory.
    expected = dict(config.weight_shapes)
    found = {name: tuple(weight.shape) for name, weight in weights.items()}
    dtypes = {weight.dtype for weight in weights.values()}
    if found != expected or dtypes not in ({torch.float32}, {torch.float64}):
        got = " and ".join(sorted(map(str, dtypes)))
        raise RuleFileError(f"{path}: expected weights {expected}, all float32 or all float64, got {found} of {got}")
    try:
        rule = make_rule(metadata.get("rule", ""), config, dtype=dtypes.pop())
    except ValueError as error:
        raise RuleFileError(f"{path}: {error}") from error
    rule.load_weights(weights)
    return rule


def read_recipe(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The recipe that a rule file or a shipped rule carries. Raises as :func:`load_rule` does."""
    recipe: dict[str, Any] = json.loads(_read(path)[0].get("recipe", "{}"))
    return recipe


def _read(name_or_path: str | os.PathLike[str]) -> tuple[dict[str, str], dict[str, torch.Tensor]]:
    path = shipped().get(os.fspath(name_or_path), Path(name_or_path))
    if not path.is_file():
        names = ", ".join(shipped())
        raise FileNotFoundError(f"{path}: expected a rule file or one of {names}, and there is no such file")
    with path.open("rb") as file:
        start = file.read(4)
    try:
        with safe_open(str(path), framework="pt") as file:
            metadata = file.metadata() or {}
            weights = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  (not a dict)
    except (SafetensorError, OSError) as error:
        if start[:1] == b"\x80" or start == b"PK\x03\x04":  # looked at only now: a safetensors file may begin so too
            raise RuleFileError(
                f"{path}: expected a safetensors file, got a pickle, which could run any code; it was not unpickled"
            ) from error
        raise RuleFileError(
            f"{path}: expected a safetensors file, and it is damaged or something else: {error}"
        ) from error
    if metadata.get("format") != FORMAT:
        raise RuleFileError(f"{path}: expected format {FORMAT!r}, got {metadata.get('format')!r}")
    if metadata.get("format_version") != str(VERSION):
        raise RuleFileError(f"{path}: expected format version {VERSION}, got {metadata.get('format_version')}")
    expected = _checksum(metadata, weights)
    if metadata.get("checksum", expected) != expected or not metadata.keys() <= _METADATA:
        raise RuleFileError(f"{path}: is damaged: its content does not match its checksum")
    return metadata, weights


def _checksum(metadata: dict[str, str], weights: dict[str, torch.Tensor]) -> str:
    """Of all that a file holds. Safetensors has none of its own, and a wrong bit in a weight is not seen otherwise."""
    digest = hashlib.sha256()
    for name in sorted(metadata.keys() - {"checksum"}):
        digest.update(f"{name} {metadata[name]}\n".encode())
    for name in sorted(weights):
        digest.update(f"{name} {weights[name].dtype} {list(weights[name].shape)}\n".encode())
        digest.update(weights[name].reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
