"""A trajectory of an optimizee under a rule, and windows of truncated BPTT along it.

Andrychowicz et al. 2016, section 2.1: the rule is trained on L = sum of w_t f_t(theta_t) over a window of `unroll`
steps; state and theta go on from window to window, gradients do not.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fastl2l.ops.dispatch import select
from fastl2l.ops.functional import update
from fastl2l.ops.layout import new_state
from fastl2l.rules import Rule
from fastl2l.tasks.base import Problem, value_and_grad


class Window(NamedTuple):
    """What a window gave."""

    losses: Tensor
    """[unroll]: f_t(theta_t) after each step, the mean over the problem's functions."""
    gradients: Tensor
    """[weights]: gradient of the window's objective with respect to the rule's weights, flat, in their order."""


def step_weights(weights: Sequence[float] | str | None, unroll: int) -> list[float]:
    """The weights w_1 ... w_unroll of a window's objective.

    Args:
        weights: None for 1 everywhere, ``"last"`` for the last step only, or one number >= 0 a step.
        unroll: steps in a window.

    Raises:
        ValueError: the weights are not as above.
    """
    if weights is None:
        return [1.0] * unroll
    if weights == "last":
        return [0.0] * (unroll - 1) + [1.0]
    if isinstance(weights, str) or not isinstance(weights, Iterable):
        raise ValueError(f"step_weights: expected None, 'last' or {unroll} numbers, got {weights!r}")
    numbers = [float(weight) for weight in weights]
    if len(numbers) != unroll or not all(0 <= weight < float("inf") for weight in numbers) or not any(numbers):
        raise ValueError(f"step_weights: expected {unroll} finite numbers >= 0, not all 0, got {numbers}")
    return numbers


class Trajectory:
    """One problem being optimized by one rule.

    Args:
        problem: the optimizee; its theta_0 is in the rule's dtype and on its device.
        rule: the rule. Its weights are read at every step, so they may change between windows.
        backend: see :class:`fastl2l.FusedLSTMOptimizer`.

    Attributes:
        theta: [N], where the optimizee is.
        state: the rule's state, [tiles, rows, 16].
        steps: steps done, counted from the problem's first.
        loss: 0-d Tensor, f(theta) of the minibatch of step ``steps``, the mean over the problem's functions.

    Raises:
        ValueError: dtypes or devices differ.
    """

    def __init__(self, problem: Problem, rule: Rule, *, backend: str = "auto") -> None:
        theta0 = problem.theta0
        if theta0.dtype != rule.dtype or theta0.device != rule.device:
            raise ValueError(
                f"problem: expected theta_0 in {rule.dtype} on {rule.device} as the rule is, "
                f"got {theta0.dtype} on {theta0.device}"
            )
        self.problem, self.rule = problem, rule
        self._backend_name, self._backend = backend, select(backend, theta0.device)
        self.theta, self._gradient = torch.empty_like(theta0), torch.empty_like(theta0)
        self.state = new_state(rule, theta0.numel(), theta0.device)
        self.restart()

    def restart(self) -> None:
        """Start anew at the problem's theta_0, as it is now, in the same memory."""
        self.theta.copy_(self.problem.theta0)
        self.state.zero_()
        self.steps = 0
        self.loss = self._evaluate(self._gradient)

    def advance(self) -> Tensor:
        """One step; returns the loss after it (0-d)."""
        self._step(self._gradient)
        self.loss = self._evaluate(self._gradient)
        return self.loss

    def window(self, weights: Sequence[float], *, second_derivatives: bool = False) -> Window:
        """Go on for ``len(weights)`` steps and give the gradient of ``sum_t weights[t-1] * f_t(theta_t)``.

        First-order (Andrychowicz et al. 2016, figure 2 without the dashed edges): since theta_{t+1} = theta_t + u_t,
        dL/du_t is the sum of w_s grad f_s(theta_s) over s > t, which the forward pass has computed already; one kernel
        takes it back through the LSTM. No graph is kept and the optimizee is not evaluated again. It takes 480 bytes
        a coordinate at 20 steps, plus a fixed workspace a thread.

        With `second_derivatives` the dependence of the gradients on the rule's weights is kept: exact, through
        Hessian-vector products of the optimizee, at the price of its graphs and of a state a step.
        """
        run = self._exact_window if second_derivatives else self._first_order_window
        losses, gradients = run(weights)
        return Window(torch.stack(losses), gradients / self.problem.functions)

    def _first_order_window(self, weights: Sequence[float]) -> tuple[list[Tensor], Tensor]:
        unroll, first_state = len(weights), self.state.clone()
        grads = self.theta.new_empty(unroll + 1, self.theta.numel())
        grads[0] = self._gradient
        losses = []
        for t in range(unroll):
            self._step(grads[t])
            self.loss = self._evaluate(grads[t + 1])
            losses.append(self.loss)
        adjoints = torch.empty_like(grads[1:])
        torch.mul(grads[unroll], weights[-1], out=adjoints[-1])
        for t in range(unroll - 2, -1, -1):
            torch.add(adjoints[t + 1], grads[t + 1], alpha=weights[t], out=adjoints[t])
        self._gradient.copy_(grads[unroll])
        dweights, *_ = self._backend.window_backward(
            first_state, grads[:unroll], adjoints, *self._rule_arguments(), None, False, False
        )
        return losses, dweights

    def _exact_window(self, weights: Sequence[float]) -> tuple[list[Tensor], Tensor]:
        functions, losses = self.problem.functions, []
        with torch.enable_grad():
            theta, state, gradient = self.theta, self.state, self._gradient
            objective = theta.new_zeros(())
            for weight in weights:
                change, state = update(self.rule, gradient, state, backend=self._backend_name)
                theta = theta + change
                self.steps += 1
                loss = self.problem.loss(theta, self.steps)
                (gradient,) = torch.autograd.grad(loss, theta, create_graph=True)
                objective = objective + weight * loss
                losses.append(loss.detach() / functions)
            dweights = torch.autograd.grad(objective, self.rule.weights())
        self.theta, self.state, self.loss = theta.detach(), state.detach(), losses[-1]
        self._gradient.copy_(gradient.detach())
        return losses, torch.cat([part.reshape(-1) for part in dweights])

    def _step(self, gradient: Tensor) -> None:
        self._backend.step_([self.theta], [gradient], [self.state], *self._rule_arguments(), 1.0)
        self.steps += 1

    def _rule_arguments(self) -> tuple[list[Tensor], str, float]:
        weights = [weight.detach() for weight in self.rule.weights()]
        return weights, self.rule.text, self.rule.config.output_scale

    def _evaluate(self, gradient: Tensor) -> Tensor:
        """The loss at theta, whose gradient is written to `gradient`."""
        loss, found = value_and_grad(self.problem, self.theta, self.steps)
        gradient.copy_(found)
        return loss / self.problem.functions
