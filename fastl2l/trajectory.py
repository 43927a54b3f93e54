"""A trajectory of an optimizee under a rule, and windows of truncated BPTT along it.

Andrychowicz et al. 2016, section 2.1: the rule is trained on L = sum of w_t f_t(theta_t) over a window of `unroll`
steps; state and theta go on from window to window, gradients do not.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastl2l import reference
from fastl2l.heap import Scratch
from fastl2l.ops.dispatch import select
from fastl2l.ops.layout import TILE
from fastl2l.rules import Rule, all_weights, rules_by_part
from fastl2l.tasks.base import SECOND_MINIBATCHES, Problem, parts_of, value_and_grad
from fastl2l.tracks import Track, make_track


class Objective(NamedTuple):
    """What a window is trained on: the sum over its steps of ``weights[t-1] * loss_t``.

    Args:
        weights: one a step, see :func:`step_weights`.
        log_floor: None for loss_t = f_t(theta_t); a number for log(f_t(theta_t) + log_floor), with which every halving
            of a loss counts the same, so that problems of all scales, and late steps, are worth as much. f_t is the
            mean over the problem's functions, and what of it is below 0 counts as 0.
        second_minibatch: f_t is of a minibatch that the rule does not see, which tells apart what is learned of the
            problem from what is learned of a minibatch. It takes another evaluation a step; the same function again for
            problems that do not depend on the step.
    """

    weights: Sequence[float]
    log_floor: float | None = None
    second_minibatch: bool = False

    @property
    def is_of_what_the_rule_sees(self) -> bool:
        """Whether loss_t is the very loss whose gradient the rule is given."""
        return self.log_floor is None and not self.second_minibatch


class Window(NamedTuple):
    """What a window gave."""

    losses: Tensor
    """[unroll]: f_t(theta_t) after each step, the mean over the problem's functions."""
    gradients: Tensor
    """[weights]: gradient of the window's objective with respect to the rule's weights, flat, in their order; of
    several rules, one after the other. Of weights that do not require grad it is 0."""


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
    if isinstance(weights, str) and weights == "last":
        return [0.0] * (unroll - 1) + [1.0]
    if isinstance(weights, str) or not isinstance(weights, Iterable):
        raise ValueError(f"step_weights: expected None, 'last' or {unroll} numbers, got {weights!r}")
    numbers = [float(weight) for weight in weights]
    if len(numbers) != unroll or not all(0 <= weight < float("inf") for weight in numbers) or not any(numbers):
        raise ValueError(f"step_weights: expected {unroll} finite numbers >= 0, not all 0, got {numbers}")
    return numbers


class Trajectory:
    """One problem being optimized by one rule, or by one for each of its parts.

    Args:
        problem: the optimizee; its theta_0 is in the rule's dtype and on its device.
        rule: the rule, or a dict of rules by the names of the problem's parts. Their weights are read at every step, so
            they may change between windows.
        backend: see :class:`fastl2l.FusedLSTMOptimizer`.

    Attributes:
        theta: [N], where the optimizee is.
        rules: by part; the one rule of all of it is that of "".
        states: the rules' states (see ops/layout.py and ops/coupled.py), in the order of `rule`.
        steps: steps done, counted from the problem's first.
        loss: 0-d Tensor, f(theta) of the minibatch of step ``steps``, the mean over the problem's functions.
        scratch: memory for windows, which trajectories whose windows are one after the other may share.

    Raises:
        TypeError, ValueError: dtypes or devices differ, or a part has no rule or a rule no part.
    """

    def __init__(self, problem: Problem, rule: Rule | Mapping[str, Rule], *, backend: str = "auto") -> None:
        self.rules = rules_by_part(rule)
        self.problem = problem
        theta0, first = problem.theta0, next(iter(self.rules.values()))
        if theta0.dtype != first.dtype or theta0.device != first.device:
            raise ValueError(
                f"problem: expected theta_0 in {first.dtype} on {first.device} as the rule is, "
                f"got {theta0.dtype} on {theta0.device}"
            )
        self.scratch = Scratch()
        chosen = select(backend, theta0.device)
        self._tracks: list[Track] = [
            make_track(problem, name, self.rules[name], part, chosen)
            for name, part in _slices(problem, self.rules).items()
        ]
        self.theta, self._gradient = torch.empty_like(theta0), torch.empty_like(theta0)
        self.restart()

    @property
    def states(self) -> list[Any]:
        return [track.state for track in self._tracks]

    @property
    def state(self) -> Any:
        """The state of the only rule."""
        (state,) = self.states
        return state

    @property
    def gradient(self) -> Tensor:
        """[N], that of f at theta, which the next step will see. Not to be written to."""
        return self._gradient

    def numels(self) -> list[int]:
        """How many coordinates each rule steps, in the order of `rules`."""
        return [track.part.stop - track.part.start for track in self._tracks]

    def at(self, coordinate: int) -> tuple[Rule, Tensor]:
        """The rule of a coordinate of theta, and a copy of its state [rows], but for a memory's."""
        track = next(one for one in self._tracks if one.part.start <= coordinate < one.part.stop)
        tile, lane = divmod(coordinate - track.part.start, TILE)
        return track.rule, track.state[tile, ..., lane].flatten().clone()

    def restart(self) -> None:
        """Start anew at the problem's theta_0, as it is now, in the same memory."""
        self._torn = True
        self.theta.copy_(self.problem.theta0)
        for track in self._tracks:
            track.begin()
        self.steps = 0
        self.loss = self._evaluate(self._gradient)
        self._torn = False

    @contextlib.contextmanager
    def _moving(self) -> Iterator[None]:
        """What goes on from where the trajectory is; an exception leaves some of it there and some further on.

        Raises:
            RuntimeError: one has, and nothing but `restart` mends it.
        """
        if self._torn:
            raise RuntimeError("trajectory: expected restart() after a step or a window that ended in an exception")
        self._torn = True
        yield
        self._torn = False

    def advance(self) -> Tensor:
        """One step; returns the loss after it (0-d)."""
        with self._moving():
            self._step(self._gradient)
            self.loss = self._evaluate(self._gradient)
        return self.loss

    def window(self, objective: Objective | Sequence[float], *, second_derivatives: bool = False) -> Window:
        """Go on for as many steps as `objective` has weights, and give the objective's gradient.

        First-order (Andrychowicz et al. 2016, figure 2 without the dashed edges): since theta_{t+1} = theta_t + u_t,
        dL/du_t is the sum of w_s grad f_s(theta_s) over s > t, which the forward pass has computed already; one kernel
        takes it back through the LSTM. No graph is kept and the optimizee is not evaluated again. It takes 480 bytes
        a coordinate at 20 steps, plus a fixed workspace a thread; of a rule whose coordinates talk, a state and more a
        step (see ops/coupled.py).

        With `second_derivatives` the dependence of the gradients on the rule's weights is kept: exact, through
        Hessian-vector products of the optimizee, at the price of its graphs and of a state a step.

        Args:
            objective: what to give the gradient of; numbers are weights of the steps' losses.
            second_derivatives: see above.

        Raises:
            RuntimeError: an earlier step or window has ended in an exception; `restart` begins anew.
        """
        if not isinstance(objective, Objective):
            objective = Objective(objective)
        run = self._exact_window if second_derivatives else self._first_order_window
        with self._moving():
            losses, gradients = run(objective)
        return Window(torch.stack(losses), gradients / self.problem.functions)

    def _first_order_window(self, objective: Objective) -> tuple[list[Tensor], Tensor]:
        weights, unroll = objective.weights, len(objective.weights)
        self._begin_window(unroll)
        grads = self.theta.new_empty(unroll + 1, self.theta.numel())
        grads[0] = self._gradient
        as_seen = objective.is_of_what_the_rule_sees
        judged = grads[1:] if as_seen else torch.empty_like(grads[1:])
        losses = []
        for t in range(unroll):
            self._step(grads[t])
            self.loss = self._evaluate(grads[t + 1])
            losses.append(self.loss)
            if not as_seen:
                self._judge(objective, grads[t + 1], judged[t])
        adjoints = torch.empty_like(judged)
        torch.mul(judged[-1], weights[-1], out=adjoints[-1])
        for t in range(unroll - 2, -1, -1):
            torch.add(adjoints[t + 1], judged[t], alpha=weights[t], out=adjoints[t])
        self._gradient.copy_(grads[unroll])
        return losses, self._backward(grads[:unroll], adjoints)

    def _judge(self, objective: Objective, gradient: Tensor, judged: Tensor) -> None:
        """Write the gradient of the objective's loss at theta to `judged`; `gradient` is that of what the rule sees."""
        loss = self.loss
        if objective.second_minibatch:
            loss, gradient = value_and_grad(self.problem, self.theta, SECOND_MINIBATCHES + self.steps)
            loss = loss / self.problem.functions
        if objective.log_floor is None:
            judged.copy_(gradient)
        else:
            torch.mul(gradient, (loss >= 0) / (loss.clamp(min=0) + objective.log_floor), out=judged)

    def _begin_window(self, steps: int) -> None:
        for track in self._tracks:
            track.begin_window(steps, self.scratch)

    def _backward(self, grads: Tensor, adjoints: Tensor) -> Tensor:
        """The gradient with respect to all rules' weights, of the window that ends here.

        Args:
            grads: what the rules were given, [unroll, N].
            adjoints: dL/dupdate, [unroll, N].
        """
        steps = range(self.steps - len(grads) + 1, self.steps + 1)
        found = [track.window_backward(grads, adjoints, steps) for track in self._tracks]
        return torch.cat(found) if len(found) > 1 else found[0]

    def _exact_window(self, to_lower: Objective) -> tuple[list[Tensor], Tensor]:
        functions, losses, rule_weights = self.problem.functions, [], all_weights(self.rules)
        trained = [weight for weight in rule_weights if weight.requires_grad]
        in_theta = sorted(range(len(self._tracks)), key=lambda i: self._tracks[i].part.start)
        with torch.enable_grad():
            theta, gradient = self.theta, self._gradient
            states = [track.state_of_window(len(to_lower.weights)) for track in self._tracks]
            objective = theta.new_zeros(())
            for weight in to_lower.weights:
                changes = [track.update(gradient, state) for track, state in zip(self._tracks, states, strict=True)]
                states = [state for _, state in changes]
                self.steps += 1
                now = range(self.steps, self.steps + 1)
                moves = [self._tracks[i].multiplied(changes[i][0], now).view(-1) for i in in_theta]
                theta = theta + torch.cat(moves)
                if not theta.requires_grad:  # the rules' first updates may depend on nothing that is trained
                    theta.requires_grad_()
                loss = self.problem.loss(theta, self.steps)
                (gradient,) = torch.autograd.grad(loss, theta, create_graph=True)
                objective = objective + weight * self._judged(to_lower, theta, loss)
                losses.append(loss.detach() / functions)
            with reference.exact(theta.device):
                found = iter(torch.autograd.grad(objective, trained, materialize_grads=True))
        self.theta, self.loss = theta.detach(), losses[-1]
        for track, state in zip(self._tracks, states, strict=True):
            track.state = state.detach()
        self._gradient.copy_(gradient.detach())
        dweights = [next(found) if weight.requires_grad else torch.zeros_like(weight) for weight in rule_weights]
        return losses, torch.cat([part.reshape(-1) for part in dweights])

    def _judged(self, objective: Objective, theta: Tensor, loss: Tensor) -> Tensor:
        """The objective's loss at theta, a sum over functions; `loss` is that of what the rule sees."""
        if objective.second_minibatch:
            loss = self.problem.loss(theta, SECOND_MINIBATCHES + self.steps)
        if objective.log_floor is None:
            return loss
        functions = self.problem.functions
        return functions * torch.log((loss / functions).clamp(min=0) + objective.log_floor)

    def _step(self, gradient: Tensor) -> None:
        self._propose(gradient, self.theta)
        self.steps += 1

    def _propose(self, gradient: Tensor, theta: Tensor) -> None:
        """Add the rules' next updates to `theta`, and bring their states forward."""
        for track in self._tracks:
            track.propose(gradient, theta, self.steps + 1)

    def _evaluate(self, gradient: Tensor) -> Tensor:
        """The loss at theta, whose gradient is written to `gradient`."""
        loss, found = value_and_grad(self.problem, self.theta, self.steps)
        gradient.copy_(found)
        return loss / self.problem.functions


def _slices(problem: Problem, rules: Mapping[str, Rule]) -> dict[str, slice]:
    """By the name of each rule, in their order, which coordinates of theta it steps."""
    if rules.keys() == {""}:  # one rule for all parts
        return {"": slice(0, problem.theta0.numel())}
    parts = parts_of(problem) if problem.parts else {}
    for part in sorted(parts.keys() ^ rules.keys()):
        what = "a rule for every part" if part in parts else "rules for parts of the problem alone"
        got = "none" if part in parts else "one"
        raise ValueError(f"rule: expected {what} ({', '.join(parts) or 'it has none'}), got {got} for {part!r}")
    ends = dict(zip(parts, itertools.accumulate(parts.values()), strict=True))
    return {name: slice(ends[name] - parts[name], ends[name]) for name in rules}
