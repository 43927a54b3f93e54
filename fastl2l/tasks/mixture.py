"""Several tasks as one."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from fastl2l.tasks.base import Problem, Task, generator
from fastl2l.tasks.wrapped import check_coordinates, check_task, stream


@dataclass(frozen=True)
class Mixture(Task):
    """Problems of several tasks: each is of one of them, drawn with probabilities proportional to `weights`.

    Nothing is sampled but the problem that is asked for, so one of a mixture costs what it costs by itself.

    Args:
        tasks: at least one; their problems have coordinates of one dtype, on one device, and parts of the same names.
        weights: a finite number > 0 for each; by default all are as likely.

    Raises:
        TypeError, ValueError: an argument is not as above.
    """

    tasks: Sequence[Task]
    weights: Sequence[float] | None = None
    name = "mixture"

    def __post_init__(self) -> None:
        if isinstance(self.tasks, str) or not isinstance(self.tasks, Iterable):
            raise TypeError(f"tasks: expected a sequence of tasks, got {self.tasks!r}")
        object.__setattr__(self, "tasks", tuple(map(check_task, self.tasks)))
        if not self.tasks:
            raise ValueError("tasks: expected at least one, got none")
        object.__setattr__(self, "weights", _weights(self.weights, len(self.tasks)))
        self._check_alike([task.sample(0) for task in self.tasks])

    def _check_alike(self, problems: Sequence[Problem]) -> None:
        for problem in problems:
            check_coordinates(problem)
        kinds = {}
        for task, problem in zip(self.tasks, problems, strict=True):
            parts = f", parts {', '.join(problem.parts)}" if problem.parts else ""
            kinds[f"{problem.theta0.dtype} on {problem.theta0.device}{parts}"] = task.name
        if len(kinds) > 1:
            got = " and ".join(f"{kind} in {name!r}" for kind, name in kinds.items())
            raise ValueError(f"tasks: expected coordinates of one dtype, device and parts of the same names, got {got}")

    def spec(self) -> dict[str, Any]:
        return {"name": self.name, "tasks": [task.spec() for task in self.tasks], "weights": list(self.weights or ())}

    def validation(self) -> Task:
        return replace(self, tasks=tuple(task.validation() for task in self.tasks))

    def sample(self, seed: int) -> Problem:
        chosen = generator(seed, stream("mixture", self)).choice(len(self.tasks), p=self.weights)
        return self.tasks[chosen].sample(seed)


def _weights(weights: object, tasks: int) -> tuple[float, ...]:
    """As probabilities."""
    if weights is None:
        return (1 / tasks,) * tasks
    if isinstance(weights, str) or not isinstance(weights, Iterable):
        raise TypeError(f"weights: expected None or {tasks} numbers > 0, got {weights!r}")
    try:
        numbers = [float(weight) for weight in weights]
    except (TypeError, ValueError) as error:
        raise TypeError(f"weights: expected None or {tasks} numbers > 0, got {weights!r}") from error
    if len(numbers) != tasks or not all(0 < number < math.inf for number in numbers):
        raise ValueError(f"weights: expected {tasks} finite numbers > 0, got {numbers}")
    shares = [number / max(numbers) for number in numbers]  # whose sum is finite
    return tuple(share / sum(shares) for share in shares)
