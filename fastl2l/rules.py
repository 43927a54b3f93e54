"""Update rules: a configuration (``rule_config.py``) and its weights.

A rule holds no optimizer state and does no stepping; it is a plain ``nn.Module`` whose weights are meta-trained.
``reference.py`` says what a rule computes, ``ops`` computes it fast, ``optim.py`` applies it to a model.
"""

from __future__ import annotations

import copy
import dataclasses
import hashlib
import math
import numbers
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, TypeAlias

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, unset_fake_temporarily

from fastl2l.files import shown
from fastl2l.memory_config import MemoryConfig
from fastl2l.rule_config import RuleConfig, lstm_config, require_int, rnnprop_config

DTYPES = (torch.float32, torch.float64)
"""What rules compute in."""


class Rule(nn.Module):
    """An update rule of any parts. Every coordinate of the optimizee runs the same small network, with its own state.

    Weights are named and shaped as in ``torch.nn.LSTM`` (gates in the order i, f, g, o), with one bias a layer that
    stands for ``bias_ih + bias_hh``; before them ``weight_in`` [units, inputs] and ``bias_in`` [units] where the rule
    has a projection, and behind them ``weight_out`` [hidden_size] and ``bias_out`` [] where it has an output.

    Args:
        config: the parts and constants.
        seed: seed of the initial weights, below 2^64; the global random state is not touched.
        dtype: ``torch.float32`` or ``torch.float64``: what the rule computes in, whatever the parameters' dtype.

    Raises:
        ValueError: an argument is out of range, or a constant is no normal number of `dtype`; the message names it.
    """

    kind: ClassVar[str] = "rule"
    """The name of the class in files and on the command line."""

    def __init__(self, config: RuleConfig, *, seed: int = 0, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        if dtype not in DTYPES:
            raise ValueError(f"dtype: expected torch.float32 or torch.float64, got {dtype}")
        _check_constants(config, dtype)
        require_int("seed", seed, 0, 2**64 - 1)
        self.config = config
        self.text = config.text  # asked for at every step
        for name, shape in config.weight_shapes:
            self.register_parameter(name, nn.Parameter(torch.empty(shape, dtype=dtype, device="cpu")))
        self.reset_parameters(seed)

    @torch.no_grad()
    def reset_parameters(self, seed: int = 0) -> None:
        """Draw fresh weights: truncated normal of std 1/sqrt(fan in), and +1 on the forget gates' bias."""
        generator = torch.Generator("cpu").manual_seed(seed)
        hidden = self.config.hidden_size
        widths = {name: shape[-1] for name, shape in self.config.weight_shapes if name.startswith("weight_ih")}
        for name, weight in self.named_parameters():
            if name in ("bias_in", "bias_out", "bias_read"):
                weight.zero_()
                continue
            if name in _FIRST_BIASES:
                weight.fill_(_FIRST_BIASES[name])
                continue
            if not name.startswith(("weight_ih", "weight_hh", "bias_l")):
                fan_in = weight.shape[-1]
            else:
                fan_in = widths[f"weight_ih_l{name.rpartition('_l')[2]}"] + hidden
            std = 1 / math.sqrt(fan_in)
            fresh = torch.empty(weight.shape, dtype=weight.dtype, device="cpu")
            nn.init.trunc_normal_(fresh, std=std, a=-2 * std, b=2 * std, generator=generator)
            weight.copy_(fresh)
            if name.startswith("bias_l"):
                weight[hidden : 2 * hidden] += 1
        if (memory := self.config.memory) is not None:
            for name in ("weight_write", "bias_write"):  # no left vectors, so that M stays as it is at first
                self.get_parameter(name)[: memory.writes * memory.terms] = 0

    def weights(self) -> list[Tensor]:
        """The weights in the order of ``config.weight_shapes``."""
        return [getattr(self, name) for name, _ in self.config.weight_shapes]

    @property
    def dtype(self) -> torch.dtype:
        """What the rule computes in."""
        return self.weight_hh_l0.dtype  # type: ignore[return-value]

    @property
    def device(self) -> torch.device:
        """Where its weights are."""
        return self.weight_hh_l0.device  # type: ignore[return-value]

    @torch.no_grad()
    def load_weights(self, weights: Mapping[str, Tensor]) -> None:
        """Take over weights by name, converted to the rule's dtype and device.

        Raises:
            ValueError: one is missing, too many or of another shape. Nothing has been changed then.
        """
        shapes = dict(self.config.weight_shapes)
        if weights.keys() != shapes.keys():
            wrong = sorted(weights.keys() ^ shapes.keys())[0]
            raise ValueError(f"weights: expected {', '.join(shapes)}, and {wrong} is missing or too many")
        for name, shape in shapes.items():
            if tuple(weights[name].shape) != shape:
                raise ValueError(f"{name}: expected shape {shape}, got {tuple(weights[name].shape)}")
        for name in shapes:
            self.get_parameter(name).copy_(weights[name])

    def check_alone(self) -> None:
        """Raise a ValueError if it needs rows from outside or has no update: it cannot step parameters by itself."""
        if self.config.given or self.config.output == "none":
            raise ValueError(
                f"rule: expected one with an update and no given rows, got {self.text}, which fastl2l.ops.update steps"
            )

    def describe(self) -> dict[str, Any]:
        """What it is, as JSON holds it: kind, configuration, dtype, and a fingerprint of the weights (SHA-256)."""
        return {
            "kind": self.kind,
            "config": self.config.describe(),
            "dtype": str(self.dtype),
            "fingerprint": self.fingerprint(),
        }

    def fingerprint(self) -> str | None:
        """SHA-256 of the weights' bytes; None where they have none, on meta or as fake tensors."""
        digest, weights = hashlib.sha256(), self.weights()
        if any(weight.is_meta or isinstance(weight, FakeTensor) for weight in weights):
            return None
        with unset_fake_temporarily():
            for weight in weights:
                digest.update(weight.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
        return digest.hexdigest()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Rule:
        """Every conversion of a module goes through here: to a dtype that rules have, or nothing is converted."""
        dtype = fn(torch.empty(0, dtype=self.dtype, device=self.device)).dtype
        if dtype not in DTYPES:
            raise TypeError(
                f"dtype: expected torch.float32 or torch.float64 for a rule, got {dtype}; parameters may be of any "
                "floating dtype all the same, and states of torch.bfloat16 (state_dtype)"
            )
        _check_constants(self.config, dtype)
        return super()._apply(fn, recurse)

    def extra_repr(self) -> str:
        return f"{self.text!r}, output_scale={self.config.output_scale:g}" + _beside_text(self.config)


class LSTMRule(Rule):
    """The per-coordinate LSTM of Andrychowicz et al. 2016, section 2.1 and appendix A.

    Every coordinate runs this, with its own state::

        features  = preprocess(gradient)                     # 1 (raw) or 2 (log_sign) numbers
        h, c      = LSTM(features, h, c)                     # num_layers layers of hidden_size units
        parameter = parameter + output_scale * (weight_out . h + bias_out)

    Args:
        preprocess: ``"log_sign"`` (2 features) or ``"raw"`` (1 feature).
        p: constant of log_sign; 10 in the paper, at most 87.
        scale: constant of raw.
        output_scale: factor on the update; 0.1 for MNIST and 1 for quadratics and neural art in the paper.
        relative: whether updates are in units of the size that each parameter had at first; see `fastl2l.units`.
        ramp: steps in which updates rise to their full size; 0 for none.
        decay: steps after which they fall, to decay / t of it at step t; 0 for never.
        hidden_size: LSTM units a layer.
        num_layers: LSTM layers.
        seed, dtype: as for :class:`Rule`.

    Raises:
        ValueError: an argument is out of range; the message names it.
    """

    kind = "lstm"

    def __init__(
        self,
        preprocess: str = "log_sign",
        *,
        p: float = 10.0,
        scale: float = 1.0,
        output_scale: float = 0.1,
        relative: bool = False,
        ramp: int = 0,
        decay: int = 0,
        hidden_size: int = 20,
        num_layers: int = 2,
        seed: int = 0,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        config = lstm_config(preprocess, p, scale, output_scale, hidden_size, num_layers)
        super().__init__(dataclasses.replace(config, relative=relative, ramp=ramp, decay=decay), seed=seed, dtype=dtype)

    @classmethod
    def from_lstm(
        cls, cells: Sequence[nn.LSTMCell], output: nn.Linear, *, preprocess: str = "log_sign", **constants: float
    ) -> LSTMRule:
        """A rule with the weights of PyTorch's own modules.

        Args:
            cells: one ``nn.LSTMCell`` a layer, from the gradient up.
            output: ``nn.Linear(hidden_size, 1)``.
            preprocess, constants: as for :class:`LSTMRule` (p, scale, output_scale).

        Raises:
            ValueError: a module's sizes do not fit; the message names it.
        """
        if not cells:
            raise ValueError("cells: expected at least one nn.LSTMCell, got none")
        if output.out_features != 1:
            raise ValueError(f"output: expected nn.Linear(hidden_size, 1), got {output.out_features} outputs")
        hidden = cells[0].hidden_size
        rule = cls(preprocess, hidden_size=hidden, num_layers=len(cells), dtype=output.weight.dtype, **constants)  # type: ignore[arg-type]
        found: dict[str, Tensor] = {}
        for layer, cell in enumerate(cells):
            bias = cell.bias_ih + cell.bias_hh if cell.bias else torch.zeros(4 * cell.hidden_size, device="cpu")
            found |= {f"weight_ih_l{layer}": cell.weight_ih, f"weight_hh_l{layer}": cell.weight_hh}
            found[f"bias_l{layer}"] = bias
        found["weight_out"] = output.weight.reshape(-1)
        found["bias_out"] = output.bias.reshape(()) if output.bias is not None else torch.zeros((), device="cpu")
        rule.load_weights(found)
        return rule


class RNNpropRule(Rule):
    """RNNprop (Lv et al. 2017, section 4), whose LSTM sees Adam's direction and the gradient in Adam's units.

    Every coordinate runs this, with its own state::

        m, v      = means of the gradient and its square, their bias corrected
        features  = m / (sqrt(v) + epsilon), gradient / (sqrt(v) + epsilon)
        h, c      = LSTM(elu(weight_in . features + bias_in), h, c)
        parameter = parameter + output_scale * tanh(weight_out . h + bias_out)

    An update is at most `output_scale`, and does not depend on the scale of the loss. Of a relative rule, both are
    in each parameter's unit.

    Args:
        beta1, beta2: of the means of the gradient and of its square.
        epsilon: as above.
        output_scale: factor on the update.
        relative, ramp, decay: as for :class:`LSTMRule`.
        projection_size: units of the layer before the LSTM.
        hidden_size, num_layers: of the LSTM.
        seed, dtype: as for :class:`Rule`.

    Raises:
        ValueError: an argument is out of range; the message names it.
    """

    kind = "rnnprop"

    def __init__(
        self,
        *,
        beta1: float = 0.95,
        beta2: float = 0.95,
        epsilon: float = 1e-8,
        output_scale: float = 0.1,
        relative: bool = False,
        ramp: int = 0,
        decay: int = 0,
        projection_size: int = 20,
        hidden_size: int = 20,
        num_layers: int = 2,
        seed: int = 0,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        config = rnnprop_config(beta1, beta2, epsilon, output_scale, projection_size, hidden_size, num_layers)
        super().__init__(dataclasses.replace(config, relative=relative, ramp=ramp, decay=decay), seed=seed, dtype=dtype)


class GACRule(Rule):
    """The LSTM with global averaging cells (LSTM+GAC) of Andrychowicz et al. 2016, appendix D.

    As :class:`LSTMRule`, but for the first units of each layer: their h is replaced by its mean over all coordinates of
    the function that is optimized (all parameters of a group that have a gradient), and the mean is what the next layer
    and the next step see. The cell c stays each coordinate's own. So coordinates can agree on a number, such as the
    norm of the gradient.

    Args:
        averages: averaged units of each layer; one number for all of them.
        preprocess, p, scale, output_scale, relative, ramp, decay, hidden_size, num_layers, seed, dtype: as for
            :class:`LSTMRule`.

    Raises:
        ValueError: an argument is out of range; the message names it.
    """

    kind = "gac"

    def __init__(
        self,
        preprocess: str = "log_sign",
        *,
        averages: int | Sequence[int] = 5,
        p: float = 10.0,
        scale: float = 1.0,
        output_scale: float = 0.1,
        relative: bool = False,
        ramp: int = 0,
        decay: int = 0,
        hidden_size: int = 20,
        num_layers: int = 2,
        seed: int = 0,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        config = lstm_config(preprocess, p, scale, output_scale, hidden_size, num_layers)
        steps: dict[str, Any] = {"relative": relative, "ramp": ramp, "decay": decay}
        units = _of_layers(averages, num_layers)
        if not any(units):
            raise ValueError(f"averages: expected at least one averaged unit in some layer, got {averages!r}")
        super().__init__(dataclasses.replace(config, **steps, averages=units), seed=seed, dtype=dtype)


def _of_layers(averages: int | Sequence[int], num_layers: int) -> tuple[int, ...]:
    """One number a layer."""
    if isinstance(averages, Sequence) and not isinstance(averages, str | bytes):
        return tuple(averages)
    if not isinstance(averages, numbers.Integral):
        raise ValueError(f"averages: expected an integer, or one of each layer, got {shown(averages)}")
    return (averages,) * num_layers


class NTMRule(Rule):
    """LSTM+GAC with a memory: NTM-BFGS and NTM-L-BFGS of Andrychowicz et al. 2016, appendix D.

    The coordinates of a function share a memory M. A read head gives each coordinate a number, so all of them a vector
    r, and gets M r, a number for each; a write head gives two vectors, and M becomes M + a b^T. One read head, three
    write heads and two averaged units are what BFGS takes. With the options as they are by default it is the paper's
    architecture: linear heads on the last layer, and what is read is there for the next step, the writes of this one
    included. See docs/coupled.md for what helps.

    Args:
        memory: ``"matrix"``, of N x N numbers and at most 2 GiB; or ``"pairs"``, the last vectors a and b.
        pairs: of pairs: steps whose vectors are kept, of each write head; 20 unless it is given.
        reads, writes: heads.
        initial: M_0 is this times the identity.
        inside, differences, multiply, forget, memory_bound, read_bound, update_bound: see
            :class:`fastl2l.memory_config.MemoryConfig`.
        averages: averaged units of each layer, which may be 0; one number for all of them.
        preprocess, p, output_scale, hidden_size, num_layers, seed, dtype: as for :class:`LSTMRule`.
        scale: constant of raw, and of the gradients that the memory is concerned with.

    Raises:
        ValueError: an argument is out of range; the message names it.
    """

    kind = "ntm"

    def __init__(
        self,
        memory: str = "matrix",
        *,
        pairs: int | None = None,
        reads: int = 1,
        writes: int = 3,
        initial: float = 1.0,
        inside: bool = False,
        differences: bool = False,
        multiply: bool = False,
        forget: float = 0.0,
        memory_bound: float | None = None,
        read_bound: float | None = None,
        update_bound: float | None = None,
        averages: int | Sequence[int] = 2,
        preprocess: str = "log_sign",
        p: float = 10.0,
        scale: float = 1.0,
        output_scale: float = 0.1,
        hidden_size: int = 20,
        num_layers: int = 2,
        seed: int = 0,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        config = lstm_config(preprocess, p, scale, output_scale, hidden_size, num_layers)
        if pairs is None:
            pairs = PAIRS if memory == "pairs" else 0
        remembers = MemoryConfig(
            memory, pairs, reads, writes, initial, inside, differences, multiply, forget, memory_bound, read_bound,
            update_bound, scale,
        )  # fmt: skip
        averages = _of_layers(averages, num_layers)
        super().__init__(dataclasses.replace(config, averages=averages, memory=remembers), seed=seed, dtype=dtype)


PAIRS = 20
"""As many as are kept by default."""
_FIRST_BIASES = {"bias_write": 0.5, "bias_step": -0.3}
"""Of heads: of right vectors, and of how far to go along M g."""
RULES: dict[str, type[Rule]] = {kind.kind: kind for kind in (LSTMRule, RNNpropRule, GACRule, NTMRule)}
"""Rules that have a name, by it. All others are plain `Rule`."""


def make_rule(
    kind: str, config: RuleConfig, *, seed: int = 0, dtype: torch.dtype = torch.float32
) -> Rule:  # fmt: skip
    """A rule of this kind and configuration: of the class that has this name.

    Raises:
        ValueError: there is no such kind.
    """
    if kind not in (*RULES, Rule.kind):
        raise ValueError(f"kind: expected one of {', '.join(RULES)}, {Rule.kind}, got {kind!r}")
    rule = Rule.__new__(RULES.get(kind, Rule))
    Rule.__init__(rule, config, seed=seed, dtype=dtype)
    return rule


def stepping(rule: Rule, *, relative: bool | None = None, ramp: int | None = None, decay: int | None = None) -> Rule:
    """A copy of `rule`, weights and all, whose updates are made into steps otherwise; None for as it is.

    Args:
        rule: the rule.
        relative, ramp, decay: as for :class:`LSTMRule`.

    Raises:
        TypeError, ValueError: it is no rule; ramp or decay is out of range.
    """
    if not isinstance(rule, Rule):
        raise TypeError(f"rule: expected an update rule, got {type(rule).__name__}")
    asked = {"relative": relative, "ramp": ramp, "decay": decay}
    changed: dict[str, Any] = {name: value for name, value in asked.items() if value is not None}
    made = copy.deepcopy(rule)
    made.config = dataclasses.replace(rule.config, **changed)
    made.weights()  # after which the configuration has their shapes: torch.compile cannot find them
    return made


def _beside_text(config: RuleConfig) -> str:
    numbers = "".join(f", {name}={getattr(config, name)}" for name in ("ramp", "decay") if getattr(config, name))
    averages = f", averages={config.averages}" * bool(config.averages)
    averages += f", {config.memory}" * (config.memory is not None)
    return averages + ", relative" * config.relative + numbers


def rules_by_part(rule: Rule | Mapping[str, Rule]) -> dict[str, Rule]:
    """Rules by the part of the problem that each of them steps: the one rule of all of it has the name "".

    Raises:
        TypeError: it is neither a rule nor a dict of rules by name.
        ValueError: there is none, one stands for two parts, or they differ in dtype or device.
    """
    if isinstance(rule, Rule):
        rule.check_alone()
        return {"": rule}
    if not isinstance(rule, Mapping):
        raise TypeError(f"rule: expected a rule or a dict of rules by part, got {type(rule).__name__}")
    for part, one in rule.items():
        if not isinstance(part, str) or not isinstance(one, Rule):
            raise TypeError(f"rule: expected rules by the names of parts, got {part!r}: {type(one).__name__}")
        if not part or "." in part:
            raise ValueError(f"rule: expected names of parts without a point in them, got {part!r}")
        one.check_alone()
    if not rule or len({id(one) for one in rule.values()}) < len(rule):
        raise ValueError(
            f"rule: expected at least one part, and another rule for each, got {', '.join(rule) or 'none'}"
        )
    if len({(one.dtype, one.device) for one in rule.values()}) > 1:
        got = ", ".join(f"{part}: {one.dtype} on {one.device}" for part, one in rule.items())
        raise ValueError(f"rule: expected the same dtype and device for all parts, got {got}")
    return dict(rule)


def named_weights(rules: Mapping[str, Rule]) -> dict[str, Tensor]:
    """The weights of all rules by name, with the part's name and a point before it where there are parts."""
    return {
        f"{part}.{name}" if part else name: weight
        for part, rule in rules.items()
        for name, weight in rule.named_parameters()
    }


Learned: TypeAlias = "Rule | Mapping[str, Rule]"
"""A rule, or one for each part of a problem, by its name."""


def all_weights(rules: Mapping[str, Rule]) -> list[Tensor]:
    """The weights of all rules, one after the other: the order of a meta-gradient."""
    return [weight for rule in rules.values() for weight in rule.weights()]


def upgraded(description: Mapping[str, Any]) -> dict[str, Any]:
    """What `Rule.describe` gave, in the form that it has today; one that cannot be read stays as it is."""
    try:
        config = RuleConfig.from_description(description["config"])
    except (KeyError, TypeError, ValueError):
        return dict(description)
    return {**description, "config": config.describe()}


def _check_constants(config: RuleConfig, dtype: torch.dtype) -> None:
    limits = torch.finfo(dtype)
    for name, value in config.constants.items():
        if not limits.tiny <= value <= limits.max:
            raise ValueError(f"{name}: expected a normal number of {dtype}, got {value!r}")
