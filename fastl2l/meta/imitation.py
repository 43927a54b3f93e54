"""Imitation of a teacher (Chen et al. 2020, section 4.2): a rule learns from the way that another optimizer takes."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastl2l.baselines import Baseline, LineSearch
from fastl2l.rules import Rule
from fastl2l.tasks.base import Problem, generator
from fastl2l.tasks.identity import identity
from fastl2l.trajectory import Objective, Trajectory, Window

Build = Callable[[list[Tensor]], torch.optim.Optimizer]


@dataclass(frozen=True)
class Imitation:
    """A share of the trajectories of meta-training is a teacher's.

    There the rule is given the gradients that the teacher meets, and what is lowered is the squared distance of its
    updates to the teacher's, relative to the size of these over the window, in place of the problem's loss.

    Args:
        teachers: hand-made optimizers with their learning rates, such as ``fastl2l.baselines.Adam(lr=0.01)``, or
            functions from a list of parameters to a torch optimizer; one is drawn for each trajectory.
        share: of the trajectories, from 0 to 1.

    Raises:
        TypeError: a teacher is no optimizer.
        ValueError: there is none, its learning rate is left to be tuned, or `share` is out of range.
    """

    teachers: Sequence[Baseline | Build]
    share: float = 0.25

    def __post_init__(self) -> None:
        if not isinstance(self.teachers, Sequence) or isinstance(self.teachers, str):
            raise TypeError(f"teachers: expected a sequence of optimizers, got {self.teachers!r}")
        if not self.teachers:
            raise ValueError("teachers: expected at least one, got none")
        object.__setattr__(self, "teachers", tuple(self.teachers))
        for i, teacher in enumerate(self.teachers):
            _check_teacher(f"teachers[{i}]", teacher)
        if isinstance(self.share, bool) or not isinstance(self.share, (int, float, np.number)):
            raise TypeError(f"share: expected a number from 0 to 1, got {self.share!r}")
        if not 0 <= self.share <= 1:
            raise ValueError(f"share: expected a number from 0 to 1, got {self.share}")

    def teacher(self, seed: int) -> Build | None:
        """Whom the trajectory of this seed is left to; None if the rule goes by itself."""
        random = generator(seed, "teacher")
        if random.random() >= self.share:
            return None
        teacher = self.teachers[int(random.integers(len(self.teachers)))]
        return teacher.build if isinstance(teacher, Baseline) else teacher

    def describe(self) -> dict[str, Any]:
        """All of it, as JSON would hold it."""

        def of(teacher: Baseline | Build) -> Any:
            if isinstance(teacher, Baseline):
                return {"name": teacher.name, "lr": teacher.lr, **teacher.options}
            return identity("teacher", teacher)

        return {"teachers": [of(teacher) for teacher in self.teachers], "share": self.share}


class TaughtTrajectory(Trajectory):
    """One problem being optimized by a teacher, while a rule looks on.

    Args:
        problem, rule, backend: as for a trajectory.
        teacher: makes the optimizer that goes along it.
    """

    def __init__(
        self, problem: Problem, rule: Rule | Mapping[str, Rule], teacher: Build, *, backend: str = "auto"
    ) -> None:
        super().__init__(problem, rule, backend=backend)
        self._leaf = self.theta.detach().requires_grad_()  # in the same memory
        self._teacher = teacher([self._leaf])

    def window(self, objective: Objective | Sequence[float], *, second_derivatives: bool = False) -> Window:
        """Follow the teacher, and give the gradient of ``sum_t weights[t-1] * |update_t - the teacher's|^2``.

        It is relative to the mean of the teacher's squared updates. The gradients that the rule is given do not depend
        on its weights, so there are no second derivatives. The losses are the teacher's.
        """
        weights = objective.weights if isinstance(objective, Objective) else objective
        with self._moving():
            return self._window(weights)

    def _window(self, weights: Sequence[float]) -> Window:
        self._begin_window(len(weights))
        grads = self.theta.new_empty(len(weights), self.theta.numel())
        updates, taught, losses = torch.zeros_like(grads), torch.empty_like(grads), []
        for t in range(len(weights)):
            grads[t] = self._gradient
            self._propose(grads[t], updates[t])
            taught[t] = self._follow()
            losses.append(self.loss)
        factors = torch.tensor(weights, dtype=grads.dtype, device=grads.device).mul_(2 / taught.square().sum(1).mean())
        adjoints = (updates - taught) * factors.unsqueeze(1)
        return Window(torch.stack(losses), self._backward(grads, adjoints))

    def _follow(self) -> Tensor:
        """A step of the teacher; returns its update [N]."""
        before = self.theta.clone()
        self._leaf.grad = self._gradient.clone()
        self._teacher.step()
        self.steps += 1
        self.loss = self._evaluate(self._gradient)
        return self.theta - before


def _check_teacher(name: str, teacher: object) -> None:
    expected = "an optimizer such as Adam(lr=0.01), or a function from a list of parameters to a torch optimizer"
    if isinstance(teacher, LineSearch):
        raise TypeError(f"{name}: expected an optimizer that steps without a closure, got {teacher.name}")
    if isinstance(teacher, Baseline):
        if not (isinstance(teacher.lr, float | int) and math.isfinite(teacher.lr)):
            raise ValueError(f'{name}: expected a learning rate, got "{teacher.lr}"; see fastl2l.baselines.tune')
        return
    if not callable(teacher):
        raise TypeError(f"{name}: expected {expected}, got {teacher!r}")
    parameter = torch.zeros(3, requires_grad=True)
    built = teacher([parameter])
    if not isinstance(built, torch.optim.Optimizer):
        raise TypeError(f"{name}: expected {expected}, got a function that returns {built!r}")
    parameter.grad, place = torch.ones(3), parameter.data_ptr()
    try:
        built.step()
    except Exception as error:
        raise TypeError(f"{name}: expected an optimizer that steps without a closure, got {error}") from error
    if parameter.data_ptr() != place:
        raise TypeError(
            f"{name}: expected an optimizer that changes parameters in place, got one that gives them others"
        )
