"""The papers' rules as others would write them: PyTorch's own modules, eager and compiled, and JAX if installed.

Each competitor is a pair of functions of one rule and N coordinates: `step` (one update of all coordinates, without
gradient) and `meta_gradient` (T steps on given gradients, and the gradient of sum(adjoints * updates) with respect to
the rule's weights). Every competitor is checked against fastl2l before it is timed. All but JAX run on any device.
"""

from __future__ import annotations

import importlib.util
import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fastl2l.ops.dispatch import select
from fastl2l.ops.layout import new_state
from fastl2l.rule_config import Adam, LogSign
from fastl2l.rules import LSTMRule, RNNpropRule, Rule

RULES: dict[str, type[Rule]] = {"lstm": LSTMRule, "rnnprop": RNNpropRule}
PER_STEP = {"lstm": 4980, "rnnprop": 6460}
"""Multiply-adds a coordinate, by rule."""


def multiply_adds(what: str, kind: str = "lstm") -> int:
    """Of a coordinate and step.

    For the meta-gradient they are those of the step, its recomputation, and the way back to inputs and to weights.
    """
    return PER_STEP[kind] * (1 if what == "step" else 4)


STATE_BYTES = 2 * 80 * 4
"""A coordinate and step: the state, read and written in float32."""
BYTES = {"step": STATE_BYTES + 12, "meta-gradient": STATE_BYTES + 12 + 8 + 320 / 20}
"""A coordinate and step: state in and out, gradient and parameter; gradients and adjoints again, first state once."""


@dataclass
class Workload:
    """What is timed: T gradients and adjoints of N coordinates, and a rule.

    Steps take `turns` states in turn, each with its parameter and gradient: together more than a cache holds, they are
    in memory as they are between two steps of training.
    """

    rule: Rule
    gradients: Tensor
    adjoints: Tensor
    turns: int = 1

    @classmethod
    def of(
        cls, numel: int, steps: int, device: torch.device | str = "cpu", turns: int = 1, kind: str = "lstm"
    ) -> Workload:
        random = torch.Generator(device).manual_seed(numel)
        gradients, adjoints = (torch.randn(steps, numel, generator=random, device=device) for _ in range(2))
        return cls(RULES[kind](seed=0).to(device), gradients.mul_(1e-2), adjoints, turns)

    @property
    def numel(self) -> int:
        return self.gradients.shape[1]

    def parameters(self) -> list[Tensor]:
        return [torch.zeros_like(self.gradients[0]) for _ in range(self.turns)]

    def in_turn(self) -> Callable[[], tuple[int, Tensor]]:
        """A function that gives the number of the next state and its gradient."""
        cycle = itertools.cycle([(turn, self.gradients[turn % len(self.gradients)]) for turn in range(self.turns)])
        return lambda: next(cycle)


@dataclass
class Runner:
    """A competitor ready to run: `step()` -> parameter [N], `meta_gradient()` -> flat gradient of the weights."""

    step: Callable[[], Tensor]
    meta_gradient: Callable[[], Tensor]


class PyTorchRule(nn.Module):
    """The rule of nn.Linear and nn.LSTMCell, coordinates as the batch."""

    def __init__(self, rule: Rule) -> None:
        super().__init__()
        config = rule.config
        self.part, self.output_scale, self.tanh = config.features, config.output_scale, config.output == "tanh"
        width = config.inputs
        self.projection = None
        if config.projection is not None:
            self.projection, width = nn.Linear(width, config.projection.units), config.projection.units
        self.cells = nn.ModuleList(
            nn.LSTMCell(config.hidden_size if layer else width, config.hidden_size)
            for layer in range(config.num_layers)
        )
        self.output = nn.Linear(config.hidden_size, 1)
        with torch.no_grad():
            for mine, theirs in zip(self._weights(), rule.weights(), strict=True):
                mine.copy_(theirs.view_as(mine))
            for cell in self.cells:
                cell.bias_hh.zero_()

    def _weights(self) -> list[Tensor]:
        """In the order of RuleConfig.weight_shapes."""
        first = [] if self.projection is None else [self.projection.weight, self.projection.bias]
        cells = [weight for cell in self.cells for weight in (cell.weight_ih, cell.weight_hh, cell.bias_ih)]
        return [*first, *cells, self.output.weight, self.output.bias]

    def state(self, numel: int) -> list[tuple[Tensor, ...]]:
        zeros = self.output.weight.new_zeros
        cells = [(zeros(numel, cell.hidden_size), zeros(numel, cell.hidden_size)) for cell in self.cells]
        means = [(zeros(numel), zeros(numel), zeros(()))] if isinstance(self.part, Adam) else []
        return [*cells, *means]

    def features(self, gradient: Tensor) -> Tensor:
        """Of log_sign, [...] -> [..., 2]."""
        large = gradient.abs() >= torch.e**-self.part.p
        return torch.stack(
            [
                torch.where(large, gradient.abs().clamp_min(1e-38).log() / self.part.p, -1.0),
                torch.where(large, gradient.sign(), gradient * torch.e**self.part.p),
            ],
            -1,
        )

    def moments(self, gradient: Tensor, means: tuple[Tensor, ...]) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Of adam, [N] -> [N, 2] and the new means."""
        m, v, age = means
        m = torch.lerp(gradient, m, self.part.beta1)
        v = torch.lerp(gradient.square(), v, self.part.beta2)
        age = 1 - self.part.beta1 * (1 - age)
        unit = (v / age).sqrt() + self.part.epsilon
        return torch.stack([m / age / unit, gradient / unit], -1), (m, v, age)

    def forward(
        self, gradient: Tensor, state: list[tuple[Tensor, ...]]
    ) -> tuple[Tensor, list[tuple[Tensor, ...]]]:  # fmt: skip
        means: list[tuple[Tensor, ...]] = []
        if isinstance(self.part, Adam):
            x, new_means = self.moments(gradient, state[-1])
            means = [new_means]
        else:
            x = self.features(gradient)
        if self.projection is not None:
            x = nn.functional.elu(self.projection(x))
        new_state: list[tuple[Tensor, ...]] = []
        for cell, before in zip(self.cells, state, strict=False):
            x, c = cell(x, before)
            new_state.append((x, c))
        out = self.output(x).squeeze(1)
        return self.output_scale * (out.tanh() if self.tanh else out), [*new_state, *means]

    def flat_gradient(self) -> Tensor:
        """In the order of RuleConfig.weight_shapes."""
        return torch.cat([weight.grad.flatten() for weight in self._weights()])


def fastl2l(work: Workload, backend: str = "native", state_dtype: torch.dtype = torch.float32) -> Runner:
    chosen, rule = select(backend, work.gradients.device), work.rule
    arguments = [weight.detach() for weight in rule.weights()], rule.text, rule.config.output_scale
    thetas, next_turn = work.parameters(), work.in_turn()

    def fresh() -> Tensor:
        return new_state(work.rule, work.numel, work.gradients.device, state_dtype)

    states = [fresh() for _ in thetas]

    def step() -> Tensor:
        turn, gradient = next_turn()
        chosen.step_([thetas[turn]], [gradient], [states[turn]], *arguments, 1.0)
        return thetas[turn]

    def meta_gradient() -> Tensor:
        now, first = fresh(), fresh()
        for gradient in work.gradients:
            chosen.step_([thetas[0]], [gradient], [now], *arguments, 1.0)
        return chosen.window_backward(first, work.gradients, work.adjoints, *arguments, None, False, False)[0]

    return Runner(step, meta_gradient)


def eager(work: Workload) -> Runner:
    return _pytorch(work, lambda function: function)


def compiled(work: Workload, **options: Any) -> Runner:
    return _pytorch(work, lambda function: torch.compile(function, **options))


def _pytorch(work: Workload, prepare: Callable[[Any], Any]) -> Runner:
    module = PyTorchRule(work.rule).to(work.gradients.device)
    forward = prepare(module)
    thetas, next_turn = work.parameters(), work.in_turn()
    states = [module.state(work.numel) for _ in thetas]

    def step() -> Tensor:
        turn, gradient = next_turn()
        with torch.no_grad():
            update, states[turn] = forward(gradient, states[turn])
            return thetas[turn].add_(update)

    def meta_gradient() -> Tensor:
        module.zero_grad()
        now, loss = module.state(work.numel), work.adjoints.new_zeros(())
        for gradient, adjoint in zip(work.gradients, work.adjoints, strict=True):
            update, now = forward(gradient, now)
            loss = loss + adjoint @ update
        loss.backward()
        return module.flat_gradient()

    return Runner(step, meta_gradient)


def whole_lstm(work: Workload) -> Runner:
    """nn.LSTM, which is cuDNN's on a GPU, for the LSTM rule.

    It gets more than the others: the features have been computed already, and the meta-gradient sees all gradients at
    once, as no optimizer does.
    """
    module, device = PyTorchRule(work.rule).to(work.gradients.device), work.gradients.device
    config = work.rule.config
    lstm = nn.LSTM(config.inputs, config.hidden_size, config.num_layers, device=device)
    with torch.no_grad():
        for layer, cell in enumerate(module.cells):
            for name, weight in cell.named_parameters():
                getattr(lstm, f"{name}_l{layer}").copy_(weight)
        features = module.features(work.gradients)
    thetas, next_turn = work.parameters(), work.in_turn()

    def fresh() -> tuple[Tensor, Tensor]:
        zeros = work.gradients.new_zeros
        shape = config.num_layers, work.numel, config.hidden_size
        return zeros(shape), zeros(shape)

    states = [fresh() for _ in thetas]

    def step() -> Tensor:
        turn, _ = next_turn()
        with torch.no_grad():
            h, states[turn] = lstm(features[turn % len(features)].unsqueeze(0), states[turn])
            return thetas[turn].add_(module.output(h[0]).squeeze(1), alpha=config.output_scale)

    def meta_gradient() -> Tensor:
        module.zero_grad()
        lstm.zero_grad()
        h, _ = lstm(features, fresh())
        (config.output_scale * module.output(h).squeeze(-1) * work.adjoints).sum().backward()
        names = ("weight_ih", "weight_hh", "bias_ih")
        parts = [getattr(lstm, f"{name}_l{layer}").grad for layer in range(config.num_layers) for name in names]
        return torch.cat([part.flatten() for part in (*parts, module.output.weight.grad, module.output.bias.grad)])

    return Runner(step, meta_gradient)


def jax(work: Workload) -> Runner:
    import jax
    import jax.numpy as jnp

    config = work.rule.config
    hidden, scale, part = config.hidden_size, config.output_scale, config.features
    weights = [jnp.asarray(weight.detach().numpy()) for weight in work.rule.weights()]
    gradients, adjoints = jnp.asarray(work.gradients.numpy()), jnp.asarray(work.adjoints.numpy())

    def features(means: Any, gradient: Any) -> Any:
        if isinstance(part, LogSign):
            large = jnp.abs(gradient) >= jnp.exp(-part.p)
            first = jnp.where(large, jnp.log(jnp.where(large, jnp.abs(gradient), 1.0)) / part.p, -1.0)
            return means, jnp.stack([first, jnp.where(large, jnp.sign(gradient), gradient * jnp.exp(part.p))], 1)
        m, v, age = means
        m = part.beta1 * m + (1 - part.beta1) * gradient
        v = part.beta2 * v + (1 - part.beta2) * gradient**2
        age = part.beta1 * age + (1 - part.beta1)
        unit = jnp.sqrt(v / age) + part.epsilon
        return (m, v, age), jnp.stack([m / age / unit, gradient / unit], 1)

    def one_step(weights: Any, state: Any, gradient: Any) -> Any:
        means, cells = state
        means, x = features(means, gradient)
        if config.projection is not None:
            w, b, *weights = weights
            x = jax.nn.elu(x @ w.T + b)
        new = []
        for layer, (h, c) in enumerate(cells):
            w_ih, w_hh, bias = weights[3 * layer : 3 * layer + 3]
            i, f, g, o = jnp.split(x @ w_ih.T + h @ w_hh.T + bias, 4, axis=1)
            c = jax.nn.sigmoid(f) * c + jax.nn.sigmoid(i) * jnp.tanh(g)
            x = jax.nn.sigmoid(o) * jnp.tanh(c)
            new.append((x, c))
        out = x @ weights[-2] + weights[-1]
        return (means, new), scale * (jnp.tanh(out) if config.output == "tanh" else out)

    def fresh() -> Any:
        zeros = jnp.zeros((gradients.shape[1], hidden))
        mean = jnp.zeros(gradients.shape[1])
        means = () if isinstance(part, LogSign) else (mean, mean, jnp.zeros(()))
        return means, [(zeros, zeros) for _ in range(config.num_layers)]

    def objective(weights: Any, gradients: Any, adjoints: Any) -> Any:
        _, updates = jax.lax.scan(lambda state, gradient: one_step(weights, state, gradient), fresh(), gradients)
        return (adjoints * updates).sum()

    fast_step = jax.jit(lambda weights, state, theta, g: (lambda s, u: (s, theta + u))(*one_step(weights, state, g)))
    fast_gradient = jax.jit(jax.grad(objective))
    kept = {"state": fresh(), "theta": jnp.zeros(gradients.shape[1])}

    def step() -> Any:
        kept["state"], kept["theta"] = fast_step(weights, kept["state"], kept["theta"], gradients[0])
        return jax.block_until_ready(kept["theta"])

    def meta_gradient() -> Tensor:
        parts = jax.block_until_ready(fast_gradient(weights, gradients, adjoints))
        return torch.cat([torch.tensor(part).flatten() for part in parts])

    return Runner(step, meta_gradient)


COMPETITORS: dict[str, Callable[[Workload], Runner]] = {"fastl2l": fastl2l, "eager": eager, "compile": compiled}
if importlib.util.find_spec("jax"):
    COMPETITORS["jax"] = jax
