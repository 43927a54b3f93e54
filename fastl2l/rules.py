"""Update rules: what a learned optimizer is made of, its configuration and its weights.

A rule holds no optimizer state and does no stepping; it is a plain ``nn.Module`` whose weights are meta-trained.
``reference.py`` says what a rule computes, ``ops`` computes it fast, ``optim.py`` applies it to a model.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass

import torch
from torch import Tensor, nn

PREPROCESSORS = {"raw": 1, "log_sign": 2}
"""Name of each gradient preprocessing, and the number of features it makes of one gradient."""


def _require_int(name: str, value: object, least: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise ValueError(f"{name}: expected an integer of at least {least}, got {value!r}")


def _require_positive(name: str, value: object) -> None:
    if not isinstance(value, (int, float)) or isinstance(value, bool) or not (0 < value < math.inf):
        raise ValueError(f"{name}: expected a finite positive number, got {value!r}")


@dataclass(frozen=True)
class LSTMConfig:
    """Configuration of an :class:`LSTMRule`; everything about it that is not meta-trained.

    Raises ``ValueError`` naming the field, what was expected and what came.
    """

    preprocess: str = "log_sign"
    p: float = 10.0
    """``log_sign`` only: gradients below ``exp(-p)`` are passed on linearly (Andrychowicz et al. 2016, App. A).

    At most 88: ``exp(p)`` is infinite in float32 beyond, and a gradient of 0 would become NaN.
    """
    scale: float = 1.0
    """``raw`` only: the feature is ``scale * gradient``."""
    output_scale: float = 0.1
    hidden_size: int = 20
    num_layers: int = 2

    def __post_init__(self) -> None:
        if self.preprocess not in PREPROCESSORS:
            raise ValueError(f"preprocess: expected one of {', '.join(PREPROCESSORS)}, got {self.preprocess!r}")
        for name in ("p", "scale", "output_scale"):
            _require_positive(name, getattr(self, name))
        if self.p > 88:
            raise ValueError(f"p: expected at most 88, got {self.p!r}")
        _require_int("hidden_size", self.hidden_size, 1)
        _require_int("num_layers", self.num_layers, 1)

    @property
    def features(self) -> int:
        """Inputs of the first layer, per coordinate."""
        return PREPROCESSORS[self.preprocess]

    @property
    def state_rows(self) -> int:
        """Floats of state per coordinate: h and c of every layer."""
        return 2 * self.num_layers * self.hidden_size

    @property
    def preprocess_constant(self) -> float:
        """The one constant of the chosen preprocessing: ``p`` for log_sign, ``scale`` for raw."""
        return self.p if self.preprocess == "log_sign" else self.scale

    @property
    def weight_shapes(self) -> list[tuple[str, tuple[int, ...]]]:
        """Names and shapes of the weights, in the order in which every operator takes them."""
        gates, shapes = 4 * self.hidden_size, []
        for layer in range(self.num_layers):
            inputs = self.features if layer == 0 else self.hidden_size
            shapes += [
                (f"weight_ih_l{layer}", (gates, inputs)),
                (f"weight_hh_l{layer}", (gates, self.hidden_size)),
                (f"bias_l{layer}", (gates,)),
            ]
        return [*shapes, ("weight_out", (self.hidden_size,)), ("bias_out", ())]


class LSTMRule(nn.Module):
    """The per-coordinate LSTM of Andrychowicz et al. 2016, section 2.1 and appendix A.

    Every coordinate of the optimizee runs the same small LSTM on its own gradient, with its own state::

        features  = preprocess(gradient)                     # 1 (raw) or 2 (log_sign) numbers
        h, c      = LSTM(features, h, c)                     # num_layers layers of hidden_size units
        parameter = parameter + output_scale * (weight_out . h + bias_out)

    Weights are named and shaped as in ``torch.nn.LSTM`` (gates in the order i, f, g, o), with one bias a layer that
    stands for ``bias_ih + bias_hh``; ``weight_out`` has shape [hidden_size] and ``bias_out`` has shape [].

    Args:
        preprocess: ``"log_sign"`` (2 features) or ``"raw"`` (1 feature).
        p: constant of log_sign; 10 in the paper.
        scale: constant of raw.
        output_scale: factor on the update; 0.1 for MNIST and 1 for quadratics and neural art in the paper.
        hidden_size: LSTM units a layer.
        num_layers: LSTM layers.
        seed: seed of the initial weights; the global random state is not touched.
        dtype: ``torch.float32`` or ``torch.float64``: what the rule computes in, whatever the parameters' dtype.

    Raises:
        ValueError: an argument is out of range; the message names it.
    """

    weight_out: Tensor
    bias_out: Tensor

    def __init__(
        self,
        preprocess: str = "log_sign",
        *,
        p: float = 10.0,
        scale: float = 1.0,
        output_scale: float = 0.1,
        hidden_size: int = 20,
        num_layers: int = 2,
        seed: int = 0,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__()
        self.config = LSTMConfig(preprocess, p, scale, output_scale, hidden_size, num_layers)
        if dtype not in (torch.float32, torch.float64):
            raise ValueError(f"dtype: expected torch.float32 or torch.float64, got {dtype}")
        for name, shape in self.config.weight_shapes:
            self.register_parameter(name, nn.Parameter(torch.empty(shape, dtype=dtype, device="cpu")))
        self.reset_parameters(seed)

    @torch.no_grad()
    def reset_parameters(self, seed: int = 0) -> None:
        """Draw fresh weights: truncated normal of std 1/sqrt(fan in), and +1 on the forget gates' bias."""
        generator = torch.Generator().manual_seed(seed)
        hidden = self.config.hidden_size
        for name, weight in self.named_parameters():
            if name == "bias_out":
                weight.zero_()
                continue
            layer_inputs = self.config.features if name.endswith("_l0") else hidden
            std = 1 / math.sqrt(hidden if name == "weight_out" else layer_inputs + hidden)
            fresh = torch.empty(weight.shape, dtype=weight.dtype, device="cpu")
            nn.init.trunc_normal_(fresh, std=std, a=-2 * std, b=2 * std, generator=generator)
            weight.copy_(fresh)
            if name.startswith("bias_l"):
                weight[hidden : 2 * hidden] += 1

    def weights(self) -> list[Tensor]:
        """The weights in the order of ``config.weight_shapes``."""
        return [getattr(self, name) for name, _ in self.config.weight_shapes]

    @property
    def dtype(self) -> torch.dtype:
        """What the rule computes in."""
        return self.weight_out.dtype

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
        with torch.no_grad():
            for name, shape in rule.config.weight_shapes:
                if tuple(found[name].shape) != shape:
                    raise ValueError(f"{name}: expected shape {shape}, got {tuple(found[name].shape)}")
                getattr(rule, name).copy_(found[name])
        return rule

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={value!r}" for name, value in asdict(self.config).items())


RULES: dict[str, type[LSTMRule]] = {"lstm": LSTMRule}
"""Kinds of rules by the name that rule files carry."""
