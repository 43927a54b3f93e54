"""The same LSTM rule as others would write it: PyTorch's own modules, eager and compiled, and JAX if installed.

Each competitor is a pair of functions of one rule and N coordinates: `step` (one update of all coordinates, without
gradient) and `meta_gradient` (T steps on given gradients, and the gradient of sum(adjoints * updates) with respect to
the rule's weights). Every competitor is checked against fastl2l before it is timed.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fastl2l.ops.dispatch import select
from fastl2l.ops.layout import new_state
from fastl2l.rules import LSTMRule


@dataclass
class Workload:
    """What is timed: T gradients and adjoints of N coordinates, and a rule."""

    rule: LSTMRule
    gradients: Tensor
    adjoints: Tensor

    @classmethod
    def of(cls, numel: int, steps: int) -> Workload:
        random = torch.Generator().manual_seed(numel)
        gradients, adjoints = (torch.randn(steps, numel, generator=random) for _ in range(2))
        return cls(LSTMRule(seed=0), gradients * 1e-2, adjoints)


@dataclass
class Runner:
    """A competitor ready to run: `step()` -> update [N], `meta_gradient()` -> flat gradient of the weights."""

    step: Callable[[], Tensor]
    meta_gradient: Callable[[], Tensor]


class PyTorchRule(nn.Module):
    """The rule of nn.LSTMCell and nn.Linear, coordinates as the batch."""

    def __init__(self, rule: LSTMRule) -> None:
        super().__init__()
        config = rule.config
        self.p, self.output_scale = config.p, config.output_scale
        self.cells = nn.ModuleList(
            nn.LSTMCell(config.features if layer == 0 else config.hidden_size, config.hidden_size)
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
        return [(torch.zeros(numel, cell.hidden_size), torch.zeros(numel, cell.hidden_size)) for cell in self.cells]

    def forward(
        self, gradient: Tensor, state: list[tuple[Tensor, Tensor]]
    ) -> tuple[Tensor, list[tuple[Tensor, Tensor]]]:
        large = gradient.abs() >= torch.e**-self.p
        x = torch.stack(
            [
                torch.where(large, gradient.abs().clamp_min(1e-38).log() / self.p, -1.0),
                torch.where(large, gradient.sign(), gradient * torch.e**self.p),
            ],
            1,
        )
        new_state = []
        for cell, before in zip(self.cells, state, strict=True):
            x, c = cell(x, before)
            new_state.append((x, c))
        return self.output_scale * self.output(x).squeeze(1), new_state

    def flat_gradient(self) -> Tensor:
        """In the order of LSTMConfig.weight_shapes."""
        parts = [p.grad for cell in self.cells for p in (cell.weight_ih, cell.weight_hh, cell.bias_ih)]
        return torch.cat([part.flatten() for part in (*parts, self.output.weight.grad, self.output.bias.grad)])


def fastl2l(work: Workload) -> Runner:
    backend, config = select("native", "cpu"), work.rule.config
    arguments = (
        [weight.detach() for weight in work.rule.weights()],
        config.preprocess,
        config.preprocess_constant,
        config.output_scale,
    )
    numel = work.gradients.shape[1]
    theta, state = torch.zeros(numel), new_state(work.rule, numel)

    def step() -> Tensor:
        backend.step_([theta], [work.gradients[0]], [state], *arguments, 1.0)
        return theta

    def meta_gradient() -> Tensor:
        now, first = new_state(work.rule, numel), new_state(work.rule, numel)
        for gradient in work.gradients:
            backend.step_([theta], [gradient], [now], *arguments, 1.0)
        return backend.window_backward(first, work.gradients, work.adjoints, *arguments, None, False, False)[0]

    return Runner(step, meta_gradient)


def eager(work: Workload) -> Runner:
    return _pytorch(work, lambda function: function)


def compiled(work: Workload) -> Runner:
    return _pytorch(work, torch.compile)


def _pytorch(work: Workload, prepare: Callable[[Any], Any]) -> Runner:
    module, numel = PyTorchRule(work.rule), work.gradients.shape[1]
    forward = prepare(module)
    theta, state = torch.zeros(numel), module.state(numel)

    def step() -> Tensor:
        with torch.no_grad():
            update, new = forward(work.gradients[0], state)
            for old, fresh in zip(state, new, strict=True):
                old[0].copy_(fresh[0])
                old[1].copy_(fresh[1])
            return theta.add_(update)

    def meta_gradient() -> Tensor:
        module.zero_grad()
        now, loss = module.state(numel), torch.zeros(())
        for gradient, adjoint in zip(work.gradients, work.adjoints, strict=True):
            update, now = forward(gradient, now)
            loss = loss + adjoint @ update
        loss.backward()
        return module.flat_gradient()

    return Runner(step, meta_gradient)


def jax(work: Workload) -> Runner:
    import jax
    import jax.numpy as jnp

    config = work.rule.config
    hidden, p, scale = config.hidden_size, config.p, config.output_scale
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
