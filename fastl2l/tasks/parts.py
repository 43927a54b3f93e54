"""Which parameters of a network belong together, for rules of their own (Andrychowicz et al. 2016, section 3.3)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from fnmatch import fnmatchcase

from torch import nn

Parts = Callable[[str, nn.Parameter, nn.Module], str] | Mapping[str, Sequence[str]]
"""See `from_module`."""

_CONVOLUTIONAL = (
    nn.modules.conv._ConvNd,
    nn.BatchNorm2d,
    nn.BatchNorm3d,
    nn.InstanceNorm2d,
    nn.InstanceNorm3d,
    nn.GroupNorm,
)


def conv_and_fc(name: str, parameter: nn.Parameter, module: nn.Module) -> str:
    """For `from_module(..., parts=conv_and_fc)`: "conv" for convolutions and the norms of their channels, else "fc".

    That is by the type of the module alone: `nn.BatchNorm1d` and `nn.LayerNorm` count as "fc".
    """
    return "conv" if isinstance(module, _CONVOLUTIONAL) else "fc"


def check(parts: object) -> None:
    """Raise a TypeError or ValueError unless `parts` is as `from_module` says, as far as it can be seen by itself."""
    if callable(parts):
        return
    if not isinstance(parts, Mapping):
        raise TypeError(f"parts: expected a function or a dict of part: [names], got {type(parts).__name__}")
    if not parts:
        raise ValueError("parts: expected at least one part, got none")
    for part, names in parts.items():
        if not isinstance(part, str) or not part:
            raise TypeError(f"parts: expected non-empty strings as names of parts, got {part!r}")
        if isinstance(names, str) or not isinstance(names, Sequence) or not all(isinstance(n, str) for n in names):
            raise TypeError(f"parts[{part!r}]: expected a list of names of modules, got {names!r}")


def names_by_part(module: nn.Module, trainable: Sequence[str], parts: Parts) -> dict[str, list[str]]:
    """The names of `trainable`, parameters of `module`, by part.

    Raises:
        TypeError, ValueError: a parameter belongs to no part, or to two; a part has none; a name is not one of
            `module`. The message says which.
    """
    if not isinstance(parts, Mapping):
        found: dict[str, list[str]] = {}
        for name in trainable:
            part = parts(name, module.get_parameter(name), _owner(module, name))
            if not isinstance(part, str) or not part:
                raise TypeError(f"parts: expected the name of a part for {name}, got {part!r}")
            found.setdefault(part, []).append(name)
        return found
    prefixes = {part: _matching(module, part, patterns) for part, patterns in parts.items()}
    found = {part: [] for part in parts}
    names: dict[nn.Parameter, list[str]] = {}  # several where weights are tied
    for name, parameter in module.named_parameters(remove_duplicate=False):
        names.setdefault(parameter, []).append(name)
    for name in trainable:
        tied = names[module.get_parameter(name)]
        of = [part for part in parts if any(_within(one, prefix) for one in tied for prefix in prefixes[part])]
        if len(of) != 1:
            got = " and ".join(map(repr, of)) or "none"
            raise ValueError(f"parts: expected every parameter in one part, got {got} for {' = '.join(tied)}")
        found[of[0]].append(name)
    for part in found:
        if not found[part]:
            raise ValueError(f"parts[{part!r}]: expected some trainable parameters, got none in {list(parts[part])}")
    return found


def _matching(module: nn.Module, part: str, patterns: Sequence[str]) -> list[str]:
    """The modules and parameters that the patterns name."""
    modules = [name for name, _ in module.named_modules(remove_duplicate=False)]
    known = [*modules, *(name for name, _ in module.named_parameters(remove_duplicate=False))]
    found = []
    for pattern in patterns:
        matching = [name for name in known if fnmatchcase(name, pattern)]
        if not matching:
            some = ", ".join(name for name, _ in module.named_children())
            raise ValueError(f"parts[{part!r}]: expected names of modules such as {some}, got {pattern!r}")
        found += matching
    return found


def _within(name: str, prefix: str) -> bool:
    return not prefix or name == prefix or name.startswith(f"{prefix}.")


def _owner(module: nn.Module, name: str) -> nn.Module:
    """The module that holds a parameter; for one of a parametrization, that which is parametrized."""
    path, parametrized, _ = f".{name}".partition(".parametrizations.")
    return module.get_submodule((path if parametrized else path.rpartition(".")[0]).removeprefix("."))
