"""The same LSTM rule as others would write it: PyTorch's own modules, eager and compiled, and JAX if installed.

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
from fastl2l.rules import LSTMRule

MULTIPLY_ADDS = {"step": 4980, "meta-gradient": 4 * 4980}
"""A coordinate and step: the step; and for the meta-gradient the step, its recomputation, and the backward to the
inputs and to the weights."""
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

    rule: LSTMRule
    gradients: Tensor
    adjoints: Tensor
    turns: int = 1

    @classmethod
    def of(cls, numel: int, steps: int, device: torch.device | str = "cpu", turns: int = 1) -> Workload:
        random = torch.Generator(device).manual_seed(numel)
        gradients, adjoints = (torch.randn(steps, numel, generator=random, device=device) for _ in range(2))
        return cls(LSTMRule(seed=0).to(device), gradients.mul_(1e-2), adjoints, turns)

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
    """The rule of nn.LSTMCell and nn.Linear, coordinates as the batch."""

    def __init__(self, rule: LSTMRule) -> None:
        super().__init__()
        config = rule.config
        self.p, self.output_scale = config.features.p, config.output_scale
        self.cells = nn.ModuleList(
            nn.LSTMCell(config.feature_count if layer == 0 else config.hidden_size, config.hidden_size)
            for layer in range(config.num_layers)
        )
        self.output = nn.Linear(config.hidden_size, 1)
        with torch.no_grad():
            for layer, cell in enumerate(self.cells):
                cell.weight_ih.copy_(getattr(rule, f"weight_ih_l{layer}"))
                cell.weight_hh.copy_(getattr(rule, f"weight_hh_l{layer}"))
                cell.bias_ih.copy_(getattr(rule, f"bias_l{layer}"))
                cell.bias_hh.zero_()
            self.output.weight.copy_(rule.weight_out.unsqueeze(0))
            self.output.bias.copy_(rule.bias_out)

    def state(self, numel: int) -> list[tuple[Tensor, Tensor]]:
        zeros = self.output.weight.new_zeros
        return [(zeros(numel, cell.hidden_size), zeros(numel, cell.hidden_size)) for cell in self.cells]

    def features(self, gradient: Tensor) -> Tensor:
        """[...] -> [..., 2]."""
        large = gradient.abs() >= torch.e**-self.p
        return torch.stack(
            [
                torch.where(large, gradient.abs().clamp_min(1e-38).log() / self.p, -1.0),
                torch.where(large, gradient.sign(), gradient * torch.e**self.p),
            ],
            -1,
        )

    def forward(
        self, gradient: Tensor, state: list[tuple[Tensor, Tensor]]
    ) -> tuple[Tensor, list[tuple[Tensor, Tensor]]]:
        x, new_state = self.features(gradient), []
        for cell, before in zip(self.cells, state, strict=True):
            x, c = cell(x, before)
            new_state.append((x, c))
        return self.output_scale * self.output(x).squeeze(1), new_state

    def flat_gradient(self) -> Tensor:
        """In the order of RuleConfig.weight_shapes."""
        parts = [p.grad for cell in self.cells for p in (cell.weight_ih, cell.weight_hh, cell.bias_ih)]
        return torch.cat([part.flatten() for part in (*parts, self.output.weight.grad, self.output.bias.grad)])


def fastl2l(work: Workload, backend: str = "native", state_dtype: torch.dtype = torch.float32) -> Runner:
    chosen = select(backend, work.gradients.device)
    arguments = [weight.detach() for weight in work.rule.weights()], work.rule.text, work.rule.config.output_scale
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
    """nn.LSTM, which is cuDNN's on a GPU.

    It gets more than the others: the features have been computed already, and the meta-gradient sees all gradients at
    once, as no optimizer does.
    """
    module, device = PyTorchRule(work.rule).to(work.gradients.device), work.gradients.device
    config = work.rule.config
    lstm = nn.LSTM(config.feature_count, config.hidden_size, config.num_layers, device=device)
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
    hidden, p, scale = config.hidden_size, config.features.p, config.output_scale
    weights = [jnp.asarray(weight.detach().numpy()) for weight in work.rule.weights()]
    gradients, adjoints = jnp.asarray(work.gradients.numpy()), jnp.asarray(work.adjoints.numpy())

    def one_step(weights: Any, state: Any, gradient: Any) -> Any:
        large = jnp.abs(gradient) >= jnp.exp(-p)
        first = jnp.where(large, jnp.log(jnp.where(large, jnp.abs(gradient), 1.0)) / p, -1.0)
        x = jnp.stack([first, jnp.where(large, jnp.sign(gradient), gradient * jnp.exp(p))], 1)
        new = []
        for layer, (h, c) in enumerate(state):
            w_ih, w_hh, bias = weights[3 * layer : 3 * layer + 3]
            i, f, g, o = jnp.split(x @ w_ih.T + h @ w_hh.T + bias, 4, axis=1)
            c = jax.nn.sigmoid(f) * c + jax.nn.sigmoid(i) * jnp.tanh(g)
            x = jax.nn.sigmoid(o) * jnp.tanh(c)
            new.append((x, c))
        return new, scale * (x @ weights[-2] + weights[-1])

    def fresh() -> Any:
        zeros = jnp.zeros((gradients.shape[1], hidden))
        return [(zeros, zeros) for _ in range(config.num_layers)]

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
