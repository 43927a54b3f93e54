"""What a rule is made of: parts that compose, and the one text that names them.

A rule is the network of one coordinate, from its gradient to its update, and is written as its parts in their order::

    log_sign:10 lstm:20,20 linear                     # Andrychowicz et al. 2016
    adam:0.95,0.95,1e-08 elu:20 lstm:20,20 tanh       # RNNprop, Lv et al. 2017

    [features] [given:rows] [projection:units] lstm:units,... output

A rule whose coordinates talk (``averages``, ``memory``) has such a network for each layer, and what mixes coordinates
lies between them: see ``RuleConfig.chain`` and ops/coupled.py.

This text goes to the operators of every backend (``ops/schema.py``), into rule files and into messages;
csrc/rule_text.h reads it for C++. ``reference.py`` says what each part computes.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import numbers
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from fastl2l.files import shown
from fastl2l.memory_config import MemoryConfig

MOST_UNITS = 1 << 15
MOST_LAYERS = 64
"""Far beyond what is of use, and small enough that no size that is computed from them overflows."""
MOST_STEPS = 1 << 24
"""As far as float32 counts steps."""
MOST_TEXT = 1000
"""Characters of a rule's text."""


def number_text(value: float) -> str:
    """The shortest text that is this number: 10 for 10.0."""
    short = f"{value:g}"
    return short if float(short) == value else repr(value)


def require_int(name: str, value: object, least: int, most: int) -> int:
    """`value` as an int, of any library's kind."""
    if not isinstance(value, numbers.Integral) or isinstance(value, bool) or not least <= int(value) <= most:
        raise ValueError(f"{name}: expected an integer of at least {least} and at most {most}, got {shown(value)}")
    return int(value)


def require_positive(name: str, value: object, below: float = math.inf) -> float:
    """`value` as a float."""
    try:
        number = float(value) if isinstance(value, numbers.Real) and not isinstance(value, bool) else math.nan
    except OverflowError:
        number = math.nan
    if not 0 < number < below:
        limit = "" if below == math.inf else f" below {below:g}"
        raise ValueError(f"{name}: expected a finite positive number{limit}, got {shown(value)}")
    return number


@dataclass(frozen=True)
class _Part:
    """Named numbers, in the order in which the text has them."""

    name: ClassVar[str]

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            object.__setattr__(self, field.name, require_positive(field.name, getattr(self, field.name)))

    def __str__(self) -> str:
        return f"{self.name}:" + ",".join(number_text(value) for value in dataclasses.astuple(self))

    @property
    def constants(self) -> dict[str, float]:
        return dataclasses.asdict(self)


def _require_normal(name: str, p: float) -> None:
    if p > 87:
        raise ValueError(f"{name}: expected at most 87, beyond which exp(-{name}) is no normal float32, got {p!r}")


@dataclass(frozen=True)
class Raw(_Part):
    """The gradient times a constant."""

    name = "raw"
    count: ClassVar[int] = 1
    state_rows: ClassVar[int] = 0
    scale: float = 1.0


@dataclass(frozen=True)
class LogSign(_Part):
    """Logarithm and sign of the gradient (Andrychowicz et al. 2016, App. A)."""

    name = "log_sign"
    count: ClassVar[int] = 2
    state_rows: ClassVar[int] = 0
    p: float = 10.0

    def __post_init__(self) -> None:
        super().__post_init__()
        _require_normal("p", self.p)


@dataclass(frozen=True)
class LogAndSign(_Part):
    """The same without a switch, as that paper's TensorFlow code computes it, for weights that were trained there."""

    name = "log_and_sign"
    count: ClassVar[int] = 2
    state_rows: ClassVar[int] = 0
    k: float = 5.0

    def __post_init__(self) -> None:
        super().__post_init__()
        _require_normal("k", self.k)


@dataclass(frozen=True)
class Adam(_Part):
    """The gradient and its mean over the root of its mean square (Lv et al. 2017, section 4).

    State: both means and the weight that corrects their bias, or two of these where they differ.
    """

    name = "adam"
    count: ClassVar[int] = 2
    beta1: float = 0.95
    beta2: float = 0.95
    epsilon: float = 1e-8

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("beta1", "beta2"):
            require_positive(name, getattr(self, name), below=1)

    @property
    def state_rows(self) -> int:
        return 3 if self.beta1 == self.beta2 else 4


Features = Raw | LogSign | LogAndSign | Adam
FEATURES: dict[str, type[Features]] = {part.name: part for part in (Raw, LogSign, LogAndSign, Adam)}
"""What is made of a gradient, by name."""
PROJECTIONS = ("elu",)
"""What may follow the linear layer between inputs and LSTM."""
OUTPUTS = ("linear", "tanh", "none")
"""From the last layer's h to the update: w . h + b, its tanh, or no update: h is the result."""


@dataclass(frozen=True)
class Projection:
    """A linear layer between the inputs and the LSTM, with an activation."""

    activation: str = "elu"
    units: int = 20

    def __post_init__(self) -> None:
        if self.activation not in PROJECTIONS:
            raise ValueError(f"projection: expected one of {', '.join(PROJECTIONS)}, got {shown(self.activation)}")
        object.__setattr__(self, "units", require_int("projection units", self.units, 1, MOST_UNITS))

    def __str__(self) -> str:
        return f"{self.activation}:{self.units}"


@dataclass(frozen=True)
class RuleConfig:
    """Everything about a rule that is not meta-trained.

    Args:
        features: what is made of a gradient, or None.
        layers: LSTM units of each layer, all alike.
        projection: before the LSTM, or None.
        output: "linear", "tanh" or "none".
        given: rows of input that come from outside of the rule.
        output_scale: factor on the update.
        relative: whether updates are in units of the size that each parameter had at first (units.py).
        ramp: steps in which updates rise to their full size, evenly: the first is 1 / ramp of it. 0 for none. At its
            first steps a rule has seen signs of gradients alone.
        decay: steps after which updates fall again, at step t to decay / t of their full size. 0 for never. A rule does
            not know how long a way is, and what has been trained for some time wants ever smaller steps.
        averages: of each layer, how many of its units, the first ones, are global averaging cells: their h is the mean
            over all coordinates. Empty where coordinates know nothing of each other.
        memory: that coordinates read from and write to, or None. It goes with averages, which may be 0.

    Raises:
        ValueError: the parts do not go together or a number is out of range; the message names it.
    """

    features: Features | None
    layers: tuple[int, ...]
    projection: Projection | None = None
    output: str = "linear"
    given: int = 0
    output_scale: float = 1.0
    relative: bool = False
    ramp: int = 0
    decay: int = 0
    averages: tuple[int, ...] = ()
    memory: MemoryConfig | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.features, (*FEATURES.values(), type(None))):
            raise ValueError(f"features: expected one of {', '.join(FEATURES)}, got {shown(self.features)}")
        if not isinstance(self.layers, tuple) or not 1 <= len(self.layers) <= MOST_LAYERS:
            raise ValueError(f"layers: expected 1 to {MOST_LAYERS} numbers of units, got {shown(self.layers)}")
        object.__setattr__(self, "layers", tuple(require_int("units", units, 1, MOST_UNITS) for units in self.layers))
        if len(set(self.layers)) > 1:
            raise ValueError(f"layers: expected as many units in every layer, got {self.layers}")
        if self.output not in OUTPUTS:
            raise ValueError(f"output: expected one of {', '.join(OUTPUTS)}, got {shown(self.output)}")
        object.__setattr__(self, "given", require_int("given", self.given, 0, MOST_UNITS))
        if self.features is None and self.given == 0:
            raise ValueError("features: expected features of the gradient, given rows or both, got neither")
        object.__setattr__(self, "output_scale", require_positive("output_scale", self.output_scale))
        if not isinstance(self.relative, bool):
            raise ValueError(f"relative: expected True or False, got {shown(self.relative)}")
        for name in ("ramp", "decay"):
            object.__setattr__(self, name, require_int(name, getattr(self, name), 0, MOST_STEPS))
        if 0 < self.decay < self.ramp:
            raise ValueError(f"decay: expected at least as many steps as the ramp's {self.ramp}, got {self.decay}")
        object.__setattr__(self, "averages", self._checked_averages())
        self._check_memory()

    def _checked_averages(self) -> tuple[int, ...]:
        if not isinstance(self.averages, (tuple, list)) or len(self.averages) not in (0, self.num_layers):
            raise ValueError(f"averages: expected a number for each of {self.num_layers} layers, got {self.averages!r}")
        averages = tuple(require_int("averages", count, 0, self.hidden_size) for count in self.averages)
        plain = self.output == "linear" and self.projection is None and not self.given
        if averages and (not plain or self.feature_count == 0 or self.lstm_rows < self.state_rows):
            raise ValueError(f"averages: expected parts such as log_sign, lstm and linear with them, got {self.text}")
        return averages

    def _check_memory(self) -> None:
        if self.memory is None:
            return
        if not isinstance(self.memory, MemoryConfig):
            raise ValueError(f"memory: expected a MemoryConfig, got {shown(self.memory)}")
        if not self.averages:
            object.__setattr__(self, "averages", (0,) * self.num_layers)
            self._checked_averages()
        if self.memory.inside and self.num_layers < 2:
            raise ValueError("inside: expected a second layer, which sees what is read after the first, got one layer")
        if self.relative or self.ramp or self.decay:
            raise ValueError("memory: expected updates as they are, which it is told of, got relative, ramp or decay")

    @functools.cached_property
    def text(self) -> str:
        """The rule's text, in its one canonical form; output scale, units, ramp and decay are not in it."""
        parts = [str(part) for part in (self.features,) if part is not None]
        parts += [f"given:{self.given}"] if self.given else []
        parts += [str(self.projection)] if self.projection is not None else []
        return " ".join([*parts, "lstm:" + ",".join(map(str, self.layers)), self.output])

    @classmethod
    def parse(cls, text: str) -> RuleConfig:
        """The configuration that a text names, with an output scale of 1.

        Raises:
            ValueError: it is no rule's text; the message holds the text and what is wrong with it.
        """
        if not isinstance(text, str) or len(text) > MOST_TEXT:
            raise ValueError(f"rule: expected a text of at most {MOST_TEXT} characters, got {shown(text)}")
        return _parse(text)

    @property
    def feature_count(self) -> int:
        """Numbers that are made of one gradient."""
        return 0 if self.features is None else self.features.count

    @property
    def inputs(self) -> int:
        """Numbers that the network of a coordinate reads: features, then given rows."""
        return self.feature_count + self.given

    @property
    def hidden_size(self) -> int:
        """LSTM units of a layer."""
        return self.layers[0]

    @property
    def num_layers(self) -> int:
        """LSTM layers."""
        return len(self.layers)

    @property
    def lstm_rows(self) -> int:
        """Floats of state per coordinate that are h and c of the layers; they come first."""
        return 2 * self.num_layers * self.hidden_size

    @property
    def state_rows(self) -> int:
        """Floats of state per coordinate: h and c of every layer, then the features' own."""
        return self.lstm_rows + (0 if self.features is None else self.features.state_rows)

    @property
    def counts_steps(self) -> bool:
        """Whether updates, or the place that is written next, depend on how many steps there have been."""
        return bool(self.ramp or self.decay or self.memory is not None)

    def share(self, step: int) -> float:
        """Of its full size, what the update of this step, counted from 1, has."""
        risen = step / self.ramp if self.ramp else 1.0
        return min(1.0, risen, self.decay / step if self.decay else 1.0)

    @property
    def takes_bfloat16_state(self) -> bool:
        """Whether the state may be rounded to bfloat16: not means, whose cost has not been measured."""
        return self.state_rows == self.lstm_rows and not self.coupled

    @property
    def coupled(self) -> bool:
        """Whether coordinates talk to each other, so that no kernel does all of a step: see `chain`."""
        return bool(self.averages)

    def _remembered(self, layer: int) -> int:
        """Rows that a layer is given of a memory."""
        return 0 if self.memory is None else self.memory.inputs(layer)

    @functools.cached_property
    def chain(self) -> list[RuleConfig]:
        """Of a coupled rule, the network of a coordinate between two means: one a layer, the last with the output."""
        hidden, last = self.hidden_size, self.num_layers - 1
        return [
            RuleConfig(
                None if layer else self.features,
                (hidden,),
                output=self.output if layer == last else "none",
                given=(hidden if layer else 0) + self._remembered(layer),
                output_scale=self.output_scale,
            )
            for layer in range(self.num_layers)
        ]

    @functools.cached_property
    def weight_shapes(self) -> list[tuple[str, tuple[int, ...]]]:
        """Names and shapes of the weights, in the order in which every operator takes them."""
        hidden, width = self.hidden_size, self.inputs
        shapes: list[tuple[str, tuple[int, ...]]] = []
        if self.projection is not None:
            shapes += [("weight_in", (self.projection.units, width)), ("bias_in", (self.projection.units,))]
            width = self.projection.units
        for layer in range(self.num_layers):
            shapes += [
                (f"weight_ih_l{layer}", (4 * hidden, width + self._remembered(layer))),
                (f"weight_hh_l{layer}", (4 * hidden, hidden)),
                (f"bias_l{layer}", (4 * hidden,)),
            ]
            width = hidden
        heads = [] if self.memory is None else self.memory.weight_shapes(hidden)
        return shapes if self.output == "none" else [*shapes, ("weight_out", (hidden,)), ("bias_out", ()), *heads]

    @property
    def network_weights(self) -> int:
        """How many of the weights are those of layers and output; those of a memory's heads come after them."""
        return len(self.weight_shapes) - (
            0 if self.memory is None else len(self.memory.weight_shapes(self.hidden_size))
        )

    @property
    def constants(self) -> dict[str, float]:
        """The constants that a rule computes with in its own dtype, by name."""
        own = {} if self.features is None else self.features.constants
        return {**own, "output_scale": self.output_scale}

    def describe(self) -> dict[str, Any]:
        """As JSON holds it: for files, from which `from_description` reads it."""
        steps = {"relative": self.relative, "ramp": self.ramp, "decay": self.decay, "averages": list(self.averages)}
        given = {name: value for name, value in steps.items() if value}  # older versions read what has none of them
        memory = {} if self.memory is None else {"memory": self.memory.describe()}
        return {"text": self.text, "output_scale": self.output_scale, **given, **memory}

    @classmethod
    def from_description(cls, description: Mapping[str, Any]) -> RuleConfig:
        """The inverse of `describe`, which also reads what fastl2l 0.1 wrote of its one kind of rule.

        Raises:
            ValueError: it is neither; the message says what is wrong.
        """
        description = dict(description)
        if description.keys() == {"preprocess", "p", "scale", "output_scale", "hidden_size", "num_layers"}:
            return lstm_config(**description)
        if description.keys() - {"relative", "ramp", "decay", "averages", "memory"} != {"text", "output_scale"}:
            raise ValueError(f"expected text and output_scale, got {shown(sorted(map(str, description)))}")
        if "memory" in description:
            description["memory"] = MemoryConfig.from_description(description["memory"])
        return dataclasses.replace(cls.parse(description.pop("text")), **description)


def lstm_config(
    preprocess: str, p: float, scale: float, output_scale: float, hidden_size: int, num_layers: int
) -> RuleConfig:
    """The configuration of an `LSTMRule`, whose arguments these are."""
    if preprocess not in (Raw.name, LogSign.name):
        raise ValueError(f"preprocess: expected one of raw, log_sign, got {shown(preprocess)}")
    features = LogSign(p), Raw(scale)  # both are checked
    return RuleConfig(
        features[0] if preprocess == LogSign.name else features[1],
        _alike(hidden_size, num_layers),
        output_scale=output_scale,
    )


def rnnprop_config(
    beta1: float,
    beta2: float,
    epsilon: float,
    output_scale: float,
    projection_size: int,
    hidden_size: int,
    num_layers: int,
) -> RuleConfig:
    """The configuration of an `RNNpropRule`, whose arguments these are."""
    require_int("projection_size", projection_size, 1, MOST_UNITS)
    return RuleConfig(
        Adam(beta1, beta2, epsilon),
        _alike(hidden_size, num_layers),
        Projection("elu", projection_size),
        "tanh",
        output_scale=output_scale,
    )


def _alike(hidden_size: int, num_layers: int) -> tuple[int, ...]:
    require_int("hidden_size", hidden_size, 1, MOST_UNITS)
    return (hidden_size,) * require_int("num_layers", num_layers, 1, MOST_LAYERS)


# From a text to its parts

_NUMBER = r"[0-9]+(?:\.[0-9]+)?(?:e[+-]?[0-9]+)?"
_PART = re.compile(rf"([a-z_]+)(?::({_NUMBER}(?:,{_NUMBER})*))?")


@functools.lru_cache(maxsize=256)
def _parse(text: str) -> RuleConfig:
    try:
        return _compose([_part(word) for word in text.split(" ")])
    except ValueError as error:
        raise ValueError(f"rule {text!r}: {error}") from None


def _part(word: str) -> tuple[str, list[str]]:
    match = _PART.fullmatch(word)
    if match is None:
        raise ValueError(f"expected parts such as log_sign:10 or lstm:20,20, one space between them, got {word!r}")
    name, numbers = match.groups()
    return name, numbers.split(",") if numbers else []


def _compose(parts: list[tuple[str, list[str]]]) -> RuleConfig:
    """The parts in their order; each is taken off the front."""
    left = list(parts)

    def take(names: object) -> tuple[str, list[str]] | None:
        return left.pop(0) if left and left[0][0] in names else None  # type: ignore[operator]

    features = take(FEATURES)
    given = take(("given",))
    projection = take(PROJECTIONS)
    lstm = take(("lstm",))
    output = take(OUTPUTS)
    if left or lstm is None or output is None:
        expected = f"[{'|'.join(FEATURES)}] [given] [{'|'.join(PROJECTIONS)}] lstm {'|'.join(OUTPUTS)}"
        raise ValueError(f"expected the parts {expected}, got {' '.join(name for name, _ in parts)}")
    _count(output, 0)
    return RuleConfig(
        None if features is None else _features(features),
        tuple(_integers(lstm)),
        None if projection is None else Projection(projection[0], *_integers(_count(projection, 1))),
        output[0],
        0 if given is None else require_int("given", _integers(_count(given, 1))[0], 1, MOST_UNITS),
    )


def _features(part: tuple[str, list[str]]) -> Features:
    kind = FEATURES[part[0]]
    _count(part, len(dataclasses.fields(kind)))
    return kind(*map(float, part[1]))


def _count(part: tuple[str, list[str]], count: int) -> tuple[str, list[str]]:
    if len(part[1]) != count:
        raise ValueError(f"{part[0]}: expected {count} numbers, got {len(part[1])}")
    return part


def _integers(part: tuple[str, list[str]]) -> list[int]:
    for number in part[1]:
        if not number.isdecimal() or len(number) > 9:
            raise ValueError(f"{part[0]}: expected whole numbers of units, got {number}")
    return [int(number) for number in part[1]]
