"""What a rule with a memory is made of beside its LSTM (Andrychowicz et al. 2016, appendix D: NTM-BFGS, NTM-L-BFGS)."""

from __future__ import annotations

import dataclasses
import math
import numbers
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from fastl2l.files import shown

KINDS = ("matrix", "pairs")
MOST = 1 << 10
"""Of heads and of pairs."""
SMALLEST, LARGEST = 1e-30, 1e30
"""Numbers that float32 can hold, and some of their products."""
LARGEST_SEEN = 1e15
"""What is more of a gradient that memory is concerned with, or of its change in units of s, counts as this."""
SWITCHES = ("inside", "differences", "multiply")
GRADIENT_AND_DIFFERENCE = 2
"""Reads of a memory whose heads multiply: of the gradient and of what it has changed by."""


@dataclass(frozen=True)
class MemoryConfig:
    """A memory M over the coordinates of a function, and the heads that read M r and write M + a b^T.

    Args:
        kind: "matrix", M itself; or "pairs", the last pairs (a, b), with M = M_0 + sum a b^T.
        pairs: steps whose pairs are kept, one for each write head; 0 for a matrix.
        reads: read heads, each of which gives a vector r over the coordinates and gets M r.
        writes: write heads, each of which gives vectors a and b.
        initial: M_0 is this times the identity.
        inside: whether reads are made within the step, between the first layer and the second; otherwise their results
            are there for the next step, as in the paper.
        differences: whether the first layer sees, beside the gradient, the last update s, the change of the gradient y
            and s y, both in units of the root mean square of s.
        multiply: whether heads multiply: there are two reads, of the gradient and of y, and what is written are
            multiples of s and of M y, which are the network's, and so is a multiple of M g in the update. Otherwise
            heads are linear outputs of the last layer (the first, for reads within the step).
        forget: share of M that goes back to M_0 at every step.
        memory_bound: the most that the Frobenius norm of M may be, over the root of the number of coordinates.
        read_bound: the most that the root mean square of a read, and of y, may be; of M g, relative to that of g.
        update_bound: the most that an update may be, over the output scale.
        scale: factor on the gradients that memory is concerned with.

    Raises:
        ValueError: a number is out of range or two options do not go together; the message names it.
    """

    kind: str = "matrix"
    pairs: int = 0
    reads: int = 1
    writes: int = 3
    initial: float = 1.0
    inside: bool = False
    differences: bool = False
    multiply: bool = False
    forget: float = 0.0
    memory_bound: float | None = None
    read_bound: float | None = None
    update_bound: float | None = None
    scale: float = 1.0

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"memory: expected one of {', '.join(KINDS)}, got {shown(self.kind)}")
        if self.kind == "matrix" and self.pairs != 0:
            raise ValueError(f"pairs: expected none of a matrix, got {shown(self.pairs)}")
        self._count("pairs", int(self.kind == "pairs"), MOST)
        self._count("reads", 1, MOST)
        self._count("writes", 1, MOST)
        for name in SWITCHES:
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"{name}: expected True or False, got {shown(getattr(self, name))}")
        for name in ("initial", "scale", "memory_bound", "read_bound", "update_bound"):
            optional = name.endswith("bound")
            if not (optional and getattr(self, name) is None):
                expected = "None or " * optional + "a number from 1e-30 to 1e30"
                self._number(name, expected, SMALLEST <= _float(getattr(self, name)) <= LARGEST)
        self._number("forget", "a number of at least 0 and below 1", 0 <= _float(self.forget) < 1)
        if self.multiply and not self.differences:
            raise ValueError("differences: expected True with multiply, whose heads multiply them, got False")
        if self.multiply and self.reads != GRADIENT_AND_DIFFERENCE:
            raise ValueError(f"reads: expected 2 with multiply, of the gradient and its change, got {self.reads}")

    def _count(self, name: str, least: int, most: int) -> None:
        """Let it be an int, as JSON knows, or raise a ValueError."""
        value = getattr(self, name)
        if not isinstance(value, numbers.Integral) or isinstance(value, bool) or not least <= int(value) <= most:
            raise ValueError(f"{name}: expected an integer of at least {least} and at most {most}, got {shown(value)}")
        object.__setattr__(self, name, int(value))

    def _number(self, name: str, expected: str, fits: bool) -> None:
        """Let it be a float, or raise a ValueError."""
        if not fits:
            raise ValueError(f"{name}: expected {expected}, got {shown(getattr(self, name))}")
        object.__setattr__(self, name, float(getattr(self, name)))

    def __str__(self) -> str:
        """All that is not as it is by default."""
        changed = [
            f"{field.name} {getattr(self, field.name)}".removesuffix(" True")
            for field in dataclasses.fields(self)
            if field.name != "kind" and getattr(self, field.name) != field.default
        ]
        return ", ".join([f"memory {self.kind}", *changed])

    def inputs(self, layer: int) -> int:
        """Rows that a layer is given beside the features or the units of the layer before it."""
        if layer == 0:
            return 3 * self.differences + self.reads * (not self.inside)
        return self.reads + self.multiply if layer == 1 and self.inside else 0

    @property
    def asks_units_within(self) -> bool:
        """Whether a read is made amidst a step, of what the first layer's units ask for."""
        return self.inside and not self.multiply

    @property
    def rows(self) -> int:
        """Numbers that are kept of a coordinate from step to step beside the memory: g, s, results of reads."""
        return 2 * self.differences + self.reads * (not self.inside)

    @property
    def terms(self) -> int:
        """Of what each written vector is a multiple: of s and of M y, or of nothing."""
        return 2 if self.multiply else 1

    def weight_shapes(self, hidden: int) -> list[tuple[str, tuple[int, ...]]]:
        """Names and shapes of the heads' weights, on a layer of so many units."""
        written = 2 * self.writes * self.terms
        shapes: list[tuple[str, tuple[int, ...]]] = [("weight_write", (written, hidden)), ("bias_write", (written,))]
        if self.multiply:
            return [*shapes, ("weight_step", (hidden,)), ("bias_step", ())]
        return [*shapes, ("weight_read", (self.reads, hidden)), ("bias_read", (self.reads,))]

    def describe(self) -> dict[str, Any]:
        """As JSON holds it."""
        return dataclasses.asdict(self)

    @classmethod
    def from_description(cls, description: object) -> MemoryConfig:
        """The inverse of `describe`.

        Raises:
            ValueError: it is something else.
        """
        names = {field.name for field in dataclasses.fields(cls)}
        if not isinstance(description, Mapping) or description.keys() != names:
            raise ValueError(f"memory: expected {', '.join(sorted(names))}, got {shown(description)}")
        return cls(**description)


def memory_options(text: str) -> dict[str, Any]:
    """Arguments of `NTMRule` from a text such as matrix,inside,reads=2,forget=0.05: a kind, switches and numbers.

    Raises:
        ValueError: there is no such option, or it is no number.
    """
    known = [field.name for field in dataclasses.fields(MemoryConfig) if field.name != "kind"]
    kind, *words = (word.strip() for word in text.split(","))
    found: dict[str, Any] = {"memory": kind}
    for name, equals, value in (word.partition("=") for word in words):
        if name not in known:
            raise ValueError(f"memory: expected options such as {', '.join(known)}, got {name!r}")
        if name in SWITCHES and equals:
            raise ValueError(f"{name}: expected no value, {name} alone switches it on, got {value!r}")
        if name in found:
            raise ValueError(f"memory: expected each option once, got {name} twice")
        try:
            found[name] = (int(value) if value.isdecimal() else float(value)) if equals else True
        except ValueError:
            raise ValueError(f"{name}: expected a number such as 2 or 0.5, got {value!r}") from None
    return found


def _float(value: object) -> float:
    """A number as float; NaN, which is in no range, for anything else."""
    if not isinstance(value, numbers.Real) or isinstance(value, bool):
        return math.nan
    try:
        return float(value)
    except OverflowError:
        return math.nan
