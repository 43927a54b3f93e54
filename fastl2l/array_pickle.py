"""Arrays out of a pickle that is not trusted, without unpickling it.

The TensorFlow code of learned optimizers saves ``{layer: {name: numpy array}}`` by dill. Such a file needs few of
pickle's instructions and no code: `read_arrays` carries them out itself and refuses all others. What a pickle would
import is a name here, and what it would call is answered below; neither pickle nor dill runs. An instruction makes one
value, which is never copied, so that memory and time are in proportion to the file.
"""

from __future__ import annotations

import math
import pickletools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from fastl2l.files import shown

MOST_INSTRUCTIONS = 1 << 16
"""Ten times what a rule of most layers takes."""


@dataclass(frozen=True)
class _Name:
    """Stands for what a pickle would import."""

    name: str


class _Dtype:
    """A dtype, whose byte order comes after it."""

    def __init__(self, code: str) -> None:
        self.code, self.order = code, "="


class _Array:
    """An array, whose content comes after it."""

    content: np.ndarray | None = None


_CALLABLES = {
    f"{module} {name}": _Name(f"{module}.{name}")
    for module, name in (
        ("collections", "defaultdict"),
        ("numpy", "ndarray"),
        ("numpy", "dtype"),
        ("_codecs", "encode"),
        ("dill._dill", "_load_type"),
        ("dill._dill", "_import_module"),
        ("dill._dill", "_get_attr"),
    )
}
"""All that may be named, as `pickletools` writes it."""
_MODULE = "numpy.core._multiarray_umath"
_RECONSTRUCT = _Name(f"{_MODULE}._reconstruct")
_CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False, "EMPTY_TUPLE": ()}
_VALUES = {"BINUNICODE", "SHORT_BINUNICODE", "BINBYTES", "SHORT_BINBYTES", "BININT", "BININT1", "BININT2"}
_MARK = object()


def read_arrays(data: bytes) -> dict[str, dict[str, np.ndarray]]:
    """The arrays that a pickle holds, by layer and name: read-only views of its bytes.

    Args:
        data: a pickle of protocol 2 to 4.

    Raises:
        ValueError: it is damaged, or holds anything but dicts of dicts of float32 or float64 arrays; the message says
            what.
    """
    found = _Reader(data).read()
    if not isinstance(found, dict) or not all(isinstance(layer, dict) for layer in found.values()):
        raise ValueError("expected a dict of layers, each a dict of arrays, and it is something else")
    arrays = {layer: {name: _content(value) for name, value in inner.items()} for layer, inner in found.items()}
    if sum(array.nbytes for inner in arrays.values() for array in inner.values()) > len(data):
        raise ValueError("expected arrays with a content of their own, and several share one")
    return arrays


def _content(value: object) -> np.ndarray:
    if not isinstance(value, _Array) or value.content is None:
        raise ValueError(f"expected arrays in each layer, got {_type(value)}")
    return value.content


class _Reader:
    """A stack, and a memo of what is used again, as pickle has them."""

    def __init__(self, data: bytes) -> None:
        self.data = data
        self.stack: list[Any] = []
        self.memo: dict[int, Any] = {}
        self.encoded = 0

    def read(self) -> object:
        """What the pickle is of, with `_Array` for arrays."""
        try:
            for name, argument in _instructions(self.data):
                self.carry_out(name, argument)
        except (IndexError, KeyError) as error:  # a value that is not on the stack or in the memo
            raise ValueError("is damaged: an instruction uses a value that is not there") from error
        if len(self.stack) != 1:
            raise ValueError(f"is damaged: expected one value at the end, got {len(self.stack)}")
        return self.stack[0]

    def carry_out(self, name: str, argument: Any) -> None:
        stack, memo = self.stack, self.memo
        match name:
            case "PROTO" | "FRAME" | "STOP":
                pass
            case "MARK":
                stack.append(_MARK)
            case "EMPTY_DICT":
                stack.append({})
            case "TUPLE":
                stack.append(tuple(self.since_mark()))
            case "TUPLE1" | "TUPLE2" | "TUPLE3":
                stack.append(tuple([stack.pop() for _ in range(int(name[-1]))][::-1]))
            case "BINPUT" | "LONG_BINPUT":
                memo[argument] = stack[-1]
            case "MEMOIZE":
                memo[len(memo)] = stack[-1]
            case "BINGET" | "LONG_BINGET":
                stack.append(memo[argument])
            case "GLOBAL":
                stack.append(_named(argument))
            case "STACK_GLOBAL":
                attribute, module = stack.pop(), stack.pop()
                stack.append(_named(f"{_text(module)} {_text(attribute)}"))
            case "SETITEM":
                value, key = stack.pop(), stack.pop()
                self.set_items([key, value])
            case "SETITEMS":
                self.set_items(self.since_mark())
            case "REDUCE":
                arguments, function = stack.pop(), stack.pop()
                stack.append(self.call(function, arguments))
            case "BUILD":
                state = stack.pop()
                _build(stack[-1], state)
            case _ if name in _CONSTANTS:
                stack.append(_CONSTANTS[name])
            case _ if name in _VALUES:
                stack.append(argument)
            case _:
                raise ValueError(
                    f"expected dicts and arrays only, got the instruction {name}, which was not carried out"
                )

    def since_mark(self) -> list[Any]:
        """Takes off the stack what came after the last mark, and the mark."""
        found = []
        while (value := self.stack.pop()) is not _MARK:
            found.append(value)
        return found[::-1]

    def set_items(self, items: list[Any]) -> None:
        target = self.stack[-1]
        if not isinstance(target, dict) or len(items) % 2:
            raise ValueError("is damaged: items of something that is no dict, or a key without value")
        for key, value in zip(items[::2], items[1::2], strict=True):
            target[_text(key)] = value

    def call(self, function: object, arguments: object) -> object:
        """The answer to each call that such files make. Patterns look no deeper than they are written."""
        match function, arguments:
            case _Name("dill._dill._load_type"), ("dict",):
                return _Name("dict")
            case _Name("collections.defaultdict"), (_Name("dict"),):
                return {}
            case _Name("dill._dill._import_module"), (str(module),) if module == _MODULE:
                return _Name(_MODULE)
            case _Name("dill._dill._get_attr"), (_Name(module), "_reconstruct") if module == _MODULE:
                return _RECONSTRUCT
            case _Name(name), (_Name("numpy.ndarray"), (0,), bytes()) if name == _RECONSTRUCT.name:
                return _Array()
            case _Name("numpy.dtype"), (str(code), 0 | False, 1 | True):
                if code not in ("f4", "f8"):
                    raise ValueError(f"expected arrays of dtype float32 (f4) or float64 (f8), got {shown(code)}")
                return _Dtype(code)
            case _Name("_codecs.encode"), (str(text), "latin1"):
                self.encoded += len(text)  # a text may come from the memo any number of times
                if self.encoded > len(self.data):
                    raise ValueError("expected arrays with a content of their own, and several share one")
                return text.encode("latin1")
            case _Name(name), _:
                raise ValueError(f"refused a call of {name} with arguments that no such file has")
        raise ValueError(f"refused a call of {_type(function)}")


def _instructions(data: bytes) -> Iterator[tuple[str, Any]]:
    """Name and argument of each, up to the end, which must be the end of the data."""
    position = 0
    try:
        for count, (opcode, argument, where) in enumerate(pickletools.genops(data)):
            if count == MOST_INSTRUCTIONS:
                raise ValueError(f"more than {MOST_INSTRUCTIONS} instructions")
            position = where or 0
            yield opcode.name, argument
    except ValueError as error:  # of pickletools, which takes no more than there is
        raise ValueError(f"is damaged or no pickle of arrays: {str(error)[:100]}") from error
    if position + 1 != len(data):
        raise ValueError(f"is damaged: expected its end after {position + 1} bytes, got {len(data)}")


def _named(text: str) -> _Name:
    if text not in _CALLABLES:
        raise ValueError(f"expected dicts and arrays only, got {shown(text.replace(' ', '.', 1))}, which was refused")
    return _CALLABLES[text]


def _text(value: object) -> str:
    if not isinstance(value, str):
        raise ValueError(f"expected names, got {_type(value)}")
    return value


def _type(value: object) -> str:
    """For messages. A hostile value itself may be too deep, or too long, to print."""
    return value.name if isinstance(value, _Name) else f"a {type(value).__name__.strip('_').lower()}"


def _build(target: object, state: object) -> None:
    """Gives a dtype its byte order, an array its content."""
    match target, state:
        case _Dtype(), (3, "<" | ">" | "=" as order, None, None, None, -1, -1, 0):
            target.order = order
        case _Array(), (1, tuple(shape), _Dtype() as dtype, bool() | 0 | 1 as fortran, bytes(content)):
            target.content = _view(shape, np.dtype(dtype.order + dtype.code), "F" if fortran else "C", content)
        case _:
            raise ValueError(f"refused to change {_type(target)} in a way that no such file has")


def _view(shape: tuple[object, ...], dtype: np.dtype, order: Literal["F", "C"], content: bytes) -> np.ndarray:
    sizes = [size for size in shape if type(size) is int and size >= 0]
    if len(sizes) != len(shape) or len(shape) > 2:
        raise ValueError("expected arrays of one or two dimensions")
    if math.prod(sizes) * dtype.itemsize != len(content):
        raise ValueError(f"expected {tuple(sizes)} numbers of {dtype}, got {len(content)} bytes")
    return np.frombuffer(content, dtype).reshape(sizes, order=order)
