"""The oracle: every rule in plain PyTorch, in any floating dtype, differentiable any number of times.

Slow and obvious on purpose. Kernels are right when they agree with this file evaluated in float64.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fastl2l.memory_config import LARGEST_SEEN, MemoryConfig
from fastl2l.rule_config import Adam, Features, LogAndSign, LogSign, Raw, RuleConfig


def exact(device: torch.device) -> contextlib.AbstractContextManager[object]:
    """No autocast, in which plain PyTorch that stands for a kernel would compute in half precision."""
    known = torch.amp.is_autocast_available(device.type)
    return torch.autocast(device.type, enabled=False) if known else contextlib.nullcontext()


def raw(gradient: Tensor, part: Raw) -> Tensor:
    """``scale * g``: [N] -> [1, N]."""
    return (part.scale * gradient).unsqueeze(0)


def log_sign(gradient: Tensor, part: LogSign) -> Tensor:
    """Andrychowicz et al. 2016, App. A: [N] -> [2, N].

    ``(log|g| / p, sign g)`` where ``|g| >= exp(-p)``, else ``(-1, exp(p) * g)``.
    """
    threshold = torch.tensor(math.exp(-part.p), dtype=gradient.dtype, device=gradient.device)
    large = gradient.abs() >= threshold  # rounded as the gradients are
    # The branch that is not taken must not send NaN back through autograd: feed it a harmless 1.
    log = torch.where(large, gradient, 1.0).abs().log() / part.p
    # NaN compares false, so it takes the linear branch; the first feature must not hide it.
    first = torch.where(large, log, torch.where(gradient.isnan(), gradient, -1.0))
    second = torch.where(large, gradient.sign(), gradient * math.exp(part.p))
    return torch.stack([first, second])


def log_and_sign(gradient: Tensor, part: LogAndSign) -> Tensor:
    """The same as TensorFlow code has it: ``max(log(|g| + 2^-23) / k, -1), clip(exp(k) g, -1, 1)``: [N] -> [2, N]."""
    log = (gradient.abs() + 2.0**-23).log() / part.k
    return torch.stack([log.clamp(min=-1), (gradient * math.exp(part.k)).clamp(-1, 1)])


def adam(gradient: Tensor, rows: Tensor, part: Adam) -> tuple[Tensor, Tensor]:
    """Lv et al. 2017, section 4: ``(m, g) / (sqrt(v) + epsilon)`` with bias-corrected means: [2, N], and new rows.

    Rows are the means of g and of g^2 from zero on, and the weight that a mean of ones would have by now, once if both
    betas are the same; what divides by it corrects the bias, whatever step each coordinate is at. Where v is 0, no
    gradient goes through its root.
    """
    betas = (part.beta1, part.beta2)[: len(rows) - 2]
    m = part.beta1 * rows[0] + (1 - part.beta1) * gradient
    v = part.beta2 * rows[1] + (1 - part.beta2) * gradient * gradient
    ages = [beta * age + (1 - beta) for beta, age in zip(betas, rows[2:], strict=True)]
    v_hat = v / ages[-1]
    root = torch.where(v_hat == 0, 0.0, torch.where(v_hat == 0, 1.0, v_hat).sqrt())
    found = torch.stack([m / ages[0], gradient]) / (root + part.epsilon)
    return found, torch.stack([m, v, *ages])


def features(gradient: Tensor, rows: Tensor, part: Features | None) -> tuple[Tensor, Tensor]:
    """What a rule makes of gradients.

    Args:
        gradient: [N].
        rows: [part.state_rows, N], the features' own state.
        part: which.

    Returns:
        [features, N], and the new rows.
    """
    if isinstance(part, Adam):
        return adam(gradient, rows, part)
    if isinstance(part, LogSign):
        return log_sign(gradient, part), rows
    if isinstance(part, LogAndSign):
        return log_and_sign(gradient, part), rows
    if isinstance(part, Raw):
        return raw(gradient, part), rows
    return gradient.new_empty(0, len(gradient)), rows


def lstm_cell(x: Tensor, h: Tensor, c: Tensor, w_ih: Tensor, w_hh: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    """One LSTM layer for all coordinates: x [inputs, N], h and c [hidden, N] -> new h and c."""
    i, f, g, o = (w_ih @ x + w_hh @ h + bias.unsqueeze(1)).chunk(4)
    c = f.sigmoid() * c + i.sigmoid() * g.tanh()
    return o.sigmoid() * c.tanh(), c


def step(
    gradient: Tensor,
    state: Tensor,
    weights: Sequence[Tensor],
    rule: str,
    update_scale: float | Tensor,
    given: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """One step of a rule for all coordinates, in their dtype in autocast too.

    Args:
        gradient: [N].
        state: [state_rows, N]; for each layer its h rows, then its c rows, then the features' own.
        weights: in the order of ``RuleConfig.weight_shapes``.
        rule: its text.
        update_scale: factor on the update.
        given: [rows, N], for a rule that has such inputs.

    Returns:
        update [N], to be added to the parameters (zeros if the rule's output is none), and the new state, shaped as
        ``state``.
    """
    with exact(gradient.device):
        return _step(RuleConfig.parse(rule), gradient, state, list(weights), update_scale, given)


def _step(
    config: RuleConfig,
    gradient: Tensor,
    state: Tensor,
    weights: list[Tensor],
    update_scale: float | Tensor,
    given: Tensor | None,
) -> tuple[Tensor, Tensor]:
    lstm_rows = config.lstm_rows
    x, feature_rows = features(gradient, state[lstm_rows:], config.features)
    if given is not None:
        x = torch.cat([x, given])
    if config.projection is not None:
        w, b, *weights = weights
        x = torch.nn.functional.elu(w @ x + b.unsqueeze(1))
    rows = state[:lstm_rows].reshape(config.num_layers, 2, config.hidden_size, -1)
    new_rows = []
    for layer in range(config.num_layers):
        x, c = lstm_cell(x, rows[layer, 0], rows[layer, 1], *weights[3 * layer : 3 * layer + 3])
        new_rows += [x, c]
    new_state = torch.cat([*new_rows, feature_rows])
    if config.output == "none":
        return torch.zeros_like(gradient), new_state
    w_out, b_out = weights[-2:]
    out = w_out @ x + b_out
    return update_scale * (out.tanh() if config.output == "tanh" else out), new_state


# Rules whose coordinates talk


def coupled_step(
    gradient: Tensor, state: Tensor, weights: Sequence[Tensor], config: RuleConfig, update_scale: float | Tensor
) -> tuple[Tensor, Tensor]:
    """One step of a rule with averaged units, for all coordinates of one function.

    Args:
        gradient: [N].
        state: [state_rows, N]; for each layer its h rows, the first of which are means, then its c rows.
        weights: in the order of ``RuleConfig.weight_shapes``.
        config: the rule.
        update_scale: factor on the update.

    Returns:
        As for :func:`step`.
    """
    with exact(gradient.device):
        x, _ = features(gradient, state[:0], config.features)
        _, h, new_state = _averaging_layers(config, x, state, weights, lambda h: h[:0])
        return update_scale * (weights[-2] @ h + weights[-1]), new_state


def averaged(h: Tensor, count: int) -> Tensor:
    """Andrychowicz et al. 2016, App. D: the first rows of h [hidden, N] replaced by their means over coordinates."""
    return torch.cat([h[:count].mean(1, keepdim=True).expand(-1, h.shape[1]), h[count:]])


def _averaging_layers(
    config: RuleConfig,
    x: Tensor,
    state: Tensor,
    weights: Sequence[Tensor],
    between: Callable[[Tensor], Tensor],
) -> tuple[Tensor, Tensor, Tensor]:
    """From inputs to h of the first layer and of the last, and the new state; the second layer sees `between` too."""
    rows = state.reshape(config.num_layers, 2, config.hidden_size, -1)
    all_h, new_rows = [], []
    for layer, count in enumerate(config.averages):
        x = torch.cat([x, between(x)]) if layer == 1 else x
        h, c = lstm_cell(x, rows[layer, 0], rows[layer, 1], *weights[3 * layer : 3 * layer + 3])
        x = averaged(h, count)
        all_h.append(x)
        new_rows += [x, c]
    return all_h[0], all_h[-1], torch.cat(new_rows)


class Remembering(NamedTuple):
    """What a rule with a memory knows of one function's coordinates.

    Attributes:
        lstm: [state_rows, N].
        gradient, update: [N], of the step before, the gradient times ``MemoryConfig.scale``.
        reads: [reads, N], results that came too late for that step.
        writes: all that has been written so far, [steps, 2, writes, N].
        matrix: M, [N, N]; of pairs it is what their sum is.
    """

    lstm: Tensor
    gradient: Tensor
    update: Tensor
    reads: Tensor
    writes: Tensor
    matrix: Tensor

    @classmethod
    def first(cls, config: RuleConfig, memory: MemoryConfig, n: int) -> Remembering:
        """At the start of a trajectory, in float64."""
        zero = torch.zeros(n, dtype=torch.float64)
        identity = memory.initial * torch.eye(n, dtype=torch.float64)
        reads, writes = zero.expand(memory.reads, n), zero.expand(0, 2, memory.writes, n)
        return cls(zero.expand(config.state_rows, n), zero, zero, reads, writes, identity)


def remembering_step(
    gradient: Tensor,
    state: Remembering,
    weights: Mapping[str, Tensor],
    config: RuleConfig,
    memory: MemoryConfig,
    update_scale: float,
) -> tuple[Tensor, Remembering]:
    """One step of a rule with a memory, for all coordinates of one function; weights are by name."""
    n, size = len(gradient), _rms(state.update)
    g = (memory.scale * gradient).clamp(-LARGEST_SEEN, LARGEST_SEEN)
    s, y = (vector / size if size > 0 else 0.0 * vector for vector in (state.update, g - state.gradient))
    y = _within(y.clamp(-LARGEST_SEEN, LARGEST_SEEN), memory.read_bound)

    def read(h: Tensor, matrix: Tensor) -> Tensor:
        vectors = torch.stack([g, y]) if memory.multiply else _heads(weights, "read", h)
        most: list[float | Tensor | None] = [memory.read_bound] * memory.reads
        if memory.multiply and memory.read_bound is not None:
            most[0] = memory.read_bound * _rms(g)
        return torch.stack([_within(matrix @ r, bound) for r, bound in zip(vectors, most, strict=True)])

    seen, result = [], state.reads
    x, _ = features(gradient, state.lstm[:0], config.features)
    seen += [s, y, s * y] if memory.differences else []
    seen += [] if memory.inside else list(state.reads)

    def between(h: Tensor) -> Tensor:
        nonlocal result
        if not memory.inside:
            return h[:0]
        result = read(h, state.matrix)
        return torch.cat([result, (y * result[1])[None]]) if memory.multiply else result

    _, h, lstm = _averaging_layers(config, torch.cat([x, *(one[None] for one in seen)]), state.lstm,
                                   list(weights.values()), between)  # fmt: skip
    out = weights["weight_out"] @ h + weights["bias_out"]
    if memory.multiply:
        out = out + (weights["weight_step"] @ h + weights["bias_step"]) * result[0]
    if memory.update_bound is not None:
        out = out.clamp(-memory.update_bound, memory.update_bound)
    written = _heads(weights, "write", h).view(2, memory.writes, memory.terms, n)
    if memory.multiply:
        written = written * torch.stack([s, result[1]])
    written = written.sum(2) * torch.tensor([0.1, 1.0], dtype=h.dtype).view(2, 1, 1) / math.sqrt(n)
    writes = torch.cat([state.writes, written[None]])
    matrix = memory_matrix(memory, state.matrix, writes)
    late = state.reads if memory.inside else read(h, matrix)
    update = update_scale * out
    return update, Remembering(lstm, g, update, late, writes, matrix)


def memory_matrix(memory: MemoryConfig, before: Tensor, writes: Tensor) -> Tensor:
    """M after the last of these writes [steps, 2, writes, N], of what it was before it."""
    n, kept = before.shape[0], 1 - memory.forget
    identity = memory.initial * torch.eye(n, dtype=before.dtype)
    if memory.kind == "matrix":
        new = kept * before + memory.forget * identity + writes[-1, 0].T @ writes[-1, 1]
        bound = None if memory.memory_bound is None else memory.memory_bound * math.sqrt(n)
        return new if bound is None or new.norm() <= bound else new * (bound / new.norm())
    total, norms = torch.zeros_like(before), 0.0
    for age, (left, right) in enumerate(writes.flip(0)[: memory.pairs]):
        total = total + kept**age * left.T @ right
        norms = norms + kept**age * (left.norm(dim=1) * right.norm(dim=1)).sum()
    if memory.memory_bound is not None and norms > memory.memory_bound * math.sqrt(n):
        total = total * (memory.memory_bound * math.sqrt(n) / norms)
    return identity + total


def _heads(weights: Mapping[str, Tensor], name: str, h: Tensor) -> Tensor:
    return weights[f"weight_{name}"] @ h + weights[f"bias_{name}"].unsqueeze(1)


def _rms(vector: Tensor) -> Tensor:
    return vector.square().mean().sqrt()


def _within(vector: Tensor, most: float | Tensor | None) -> Tensor:
    """As it is, or shorter, so that its root mean square is at most this."""
    return vector if most is None or _rms(vector) <= most else vector * (most / _rms(vector))
