"""What an object is, as text that is the same in every process: part of the keys of caches and checkpoints.

`repr` does not do: it holds addresses, and leaves out most of what an object is.
"""

from __future__ import annotations

import copyreg
import hashlib
import sys
import weakref
from collections.abc import Iterable
from types import CellType, CodeType, FunctionType, MethodType, ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fastl2l.tasks.base import fingerprint

_SHOWN = (type(None), bool, int, float, complex, str, bytes)
"""Types whose repr says all."""
_OPERATORS = (torch._ops.OpOverload, torch._ops.OpOverloadPacket)
_TOLD_APART = {"_parameters", "_buffers", "_modules"}
_BY_COMPILE = {"_compiled_call_impl", "_is_torch_compile"}


def identity(name: str, value: object, *, by_shape: Iterable[Tensor] = ()) -> str:
    """What `value` is: equal texts for equal things, whatever the process, and no addresses.

    Modules are told by the types, attributes, parameters and buffers of all their parts; functions by their names where
    these can be imported, else (lambdas, local functions, those of `__main__`) by their code, defaults and what they
    enclose; all else by what pickle would save of it.

    Args:
        name: of the argument that `value` is, for messages.
        value: anything.
        by_shape: Tensors whose shape and dtype count, and not their numbers.

    Raises:
        TypeError: `value` holds something that cannot be told, such as a lock or an open file. The message says where.
    """
    try:
        return _Teller(by_shape).tell(name, value)
    except RecursionError:
        raise TypeError(f"{name}: cannot tell what this {_name(type(value))} is, it is nested too deeply") from None


class _Teller:
    """One text. What comes again in it is told by a number, so that circles end."""

    def __init__(self, by_shape: Iterable[Tensor]) -> None:
        self._by_shape = {id(tensor) for tensor in by_shape}
        self._seen: dict[int, str] = {}
        self._kept: list[object] = []  # what has been told lives on, or another object could get its address

    def tell(self, path: str, value: Any) -> str:
        if type(value) in _SHOWN:
            return repr(value)
        if type(value) is tuple:
            return f"({self._items(path, value)})"
        if isinstance(value, (type, ModuleType)):
            return _name(value)
        if isinstance(value, _OPERATORS):
            return str(value)
        if id(value) not in self._seen:
            self._seen[id(value)] = f"#{len(self._seen)}"
            self._kept.append(value)
            return self._first(path, value)
        return self._seen[id(value)]

    def _first(self, path: str, value: Any) -> str:
        if type(value) is list:
            return f"[{self._items(path, value)}]"
        if type(value) is dict:
            return f"{{{self._pairs(path, value)}}}"
        if type(value) in (set, frozenset):
            return f"{{{', '.join(sorted(identity(path, item) for item in value))}}}"
        if isinstance(value, Tensor):
            return self._tensor(path, value)
        if isinstance(value, nn.Module):
            return self._module(path, value)
        if isinstance(value, FunctionType):
            return self._function(path, value)
        if isinstance(value, MethodType):
            return f"{self.tell(path, value.__self__)}.{self.tell(path, value.__func__)}"
        if isinstance(value, CodeType):
            return self._code(path, value)
        if isinstance(value, CellType):
            return self._items(path, _contents(value))
        if isinstance(value, weakref.ref):
            return self.tell(path, value())
        if isinstance(value, np.ndarray) and not value.dtype.hasobject:
            return f"{value.dtype.str}{list(value.shape)} {_digest(value.tobytes())}"
        if isinstance(value, torch.jit.ScriptFunction):
            return str(value.code)
        if isinstance(value, torch.fx.Graph):
            return value.python_code("self").src
        return self._as_pickled(path, value)

    def _items(self, path: str, values: Iterable[Any]) -> str:
        return ", ".join(self.tell(f"{path}[{i}]", value) for i, value in enumerate(values))

    def _pairs(self, path: str, pairs: dict[Any, Any]) -> str:
        return ", ".join(f"{self.tell(path, key)}: {self.tell(f'{path}[{key!r}]', pairs[key])}" for key in pairs)

    def _attributes(self, path: str, attributes: dict[str, Any]) -> str:
        return ", ".join(f"{name}={self.tell(f'{path}.{name}', attributes[name])}" for name in attributes)

    def _tensor(self, path: str, tensor: Tensor) -> str:
        dtype = str(tensor.dtype).removeprefix("torch.")
        about = f"{dtype}{list(tensor.shape)}" + " trainable" * tensor.requires_grad
        if id(tensor) in self._by_shape:
            return about
        if tensor.layout != torch.strided or tensor.is_meta:
            raise _untold(path, tensor)
        return f"{about} {fingerprint(tensor)}"

    def _module(self, path: str, module: nn.Module) -> str:
        if isinstance(module, torch.jit.ScriptModule):
            return f"{module.code}{self.tell(path, dict(module.state_dict()))}"
        if isinstance(compiled := getattr(module, "_orig_mod", None), nn.Module):  # by torch.compile
            return self.tell(path, compiled)
        usual = vars(nn.Module())
        special = {
            # Hooks are kept by numbers that count those of the whole process.
            name: list(value.values()) if isinstance(usual.get(name), dict) else value
            for name, value in vars(module).items()
            if name not in _TOLD_APART | _BY_COMPILE and not (name in usual and _is_usual(value, usual[name]))
        }
        held = {**module._parameters, **module._buffers, **module._modules}
        return f"{_name(type(module))}({self._attributes(path, held | special)})"

    def _function(self, path: str, function: FunctionType) -> str:
        if compiled := getattr(function, "_torchdynamo_orig_callable", None):
            return self.tell(path, compiled)
        if _is_importable(function):
            return _name(function)
        known = self._items(path, (function.__defaults__, function.__kwdefaults__))
        enclosed = dict(zip(function.__code__.co_freevars, function.__closure__ or (), strict=True))
        return f"function({self.tell(path, function.__code__)}, {known}, {self._attributes(path, enclosed)})"

    def _code(self, path: str, code: CodeType) -> str:
        kinds = code.co_argcount, code.co_posonlyargcount, code.co_kwonlyargcount, code.co_flags
        names = code.co_names, code.co_varnames, code.co_freevars, code.co_cellvars
        constants = tuple(identity(path, constant) for constant in code.co_consts)
        return f"code {_digest(repr((code.co_code, kinds, names, constants)).encode())}"

    def _as_pickled(self, path: str, value: Any) -> str:
        try:
            known = copyreg.dispatch_table.get(type(value))
            reduced = known(value) if known else value.__reduce_ex__(4)
        except Exception as error:  # of anyone's __reduce__ or __getstate__
            raise _untold(path, value) from error
        if isinstance(reduced, str):
            return f"{getattr(value, '__module__', None) or _name(type(value))}.{reduced}"
        make, arguments, state, items, pairs = (*reduced, None, None, None)[:5]
        if make is copyreg.__newobj__:  # type: ignore[attr-defined]
            make, *arguments = arguments
        text = f"{self.tell(path, make)}({self._items(path, arguments)})"
        if state is not None:
            text += f" {self._attributes(path, state) if type(state) is dict else self.tell(path, state)}"
        if items is not None:
            text += f" [{self._items(path, items)}]"
        if pairs is not None:
            text += f" {{{self._pairs(path, dict(pairs))}}}"
        return text


def _is_usual(value: object, usual: object) -> bool:
    return type(value) is type(usual) and bool(value == usual)


def _is_importable(function: FunctionType) -> bool:
    found: object = sys.modules.get(function.__module__ or "")
    for part in function.__qualname__.split("."):
        found = getattr(found, part, None)
    return found is function and function.__module__ != "__main__"


def _contents(cell: CellType) -> tuple[Any, ...]:
    try:
        return (cell.cell_contents,)
    except ValueError:  # empty
        return ()


def _name(value: Any) -> str:
    if isinstance(value, ModuleType):
        return value.__name__
    return f"{value.__module__}.{value.__qualname__}".removeprefix("builtins.")


def _digest(data: bytes) -> str:
    return hashlib.blake2b(data, digest_size=16).hexdigest()


def _untold(path: str, value: object) -> TypeError:
    return TypeError(
        f"{path}: cannot tell what this {_name(type(value))} is, and so not when another is the same (for checkpoints "
        "and caches); leave it out, or out of what pickle would save (__getstate__)"
    )
