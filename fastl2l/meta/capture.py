"""Windows of meta-training as one CUDA graph, recorded once and replayed for every window of every trajectory.

A window of small problems is hundreds of short kernels, and launching them one by one takes longer than running them.
A graph launches them all at once. It reads and writes the same memory at every replay, so whatever changes is copied
there beforehand: a trajectory's theta_0 and constants, and what is drawn for the steps of a window (for all steps and
problems in one transfer). Nothing in a window asks the device for a number: one that is not finite raises a flag, at
which the meta-optimizer changes nothing for the rest of the trajectory, and the host sees the flags once an epoch.

This has not run on a GPU yet; all but `record` and pinned memory is tested on the CPU.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Mapping

import torch
from torch import Tensor

from fastl2l.meta.step import meta_step
from fastl2l.rules import Rule, rules_by_part
from fastl2l.tasks.base import Problem, PureProblem, is_pure
from fastl2l.tasks.batch import alike
from fastl2l.trajectory import Objective, Trajectory

Work = Callable[[], None]


def record(work: Work, device: torch.device) -> Work:
    """`work` as a CUDA graph: what is returned launches it on the current stream."""
    with torch.cuda.device(device):
        # What is done at first alone, such as choosing algorithms and allocating states, must not be in the graph.
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side), warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*capturable=True")  # of steps outside of a graph
            for _ in range(3):
                work()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            work()

    def replay() -> None:
        with torch.cuda.device(device):
            graph.replay()

    return replay


RECORDERS: dict[str, Callable[[Work, torch.device], Work]] = {"cuda": record}
"""By the type of device, what makes a graph of work that has no arguments."""


def check(rule: Rule | Mapping[str, Rule], problem: Problem, *, second_derivatives: bool) -> None:
    """Raise a ValueError unless windows of `rule` on problems like this one can be captured."""
    device = next(iter(rules_by_part(rule).values())).device
    if device.type not in RECORDERS:
        raise ValueError(f"capture: expected a rule on a {' or '.join(RECORDERS)} device, got one on {device}")
    if second_derivatives:
        raise ValueError("capture: expected first-order windows, got second_derivatives=True")
    for part in rules_by_part(rule).values():
        if part.config.coupled:
            raise ValueError(f"capture: expected rules that go coordinate by coordinate, got {part}")
        if part.config.counts_steps or part.config.relative:
            raise ValueError(f"capture: expected rules without ramp, decay and units of parameters, got {part}")
    _pure(problem)


class CapturedWindow:
    """A window of meta-training, in fixed memory.

    Args:
        rule: the rule, or the rules by part, trained in place.
        adam: steps on its weights: fused and capturable, with a Tensor as learning rate, which may be filled with
            another number between trajectories. Its states are not to be replaced.
        problem: one like those to come.
        objective: of a window; not of second minibatches.
        clip_norm, backend: see :class:`fastl2l.MetaTrainer`.
    """

    def __init__(
        self,
        rule: Rule | Mapping[str, Rule],
        adam: torch.optim.Adam,
        problem: Problem,
        *,
        objective: Objective,
        clip_norm: float | None,
        backend: str,
    ) -> None:
        self._rules, self._adam = rules_by_part(rule), adam
        first = next(iter(self._rules.values()))
        device = first.device
        self._objective, self._clip_norm = objective, clip_norm
        self._problem = _Slots(_pure(problem), len(objective.weights) + 1)
        self._trajectory = Trajectory(self._problem, rule, backend=backend)
        # Up until a trajectory begins: recording must change neither rule nor meta-optimizer.
        self._stopped = torch.ones((), device=device)
        self._adam.found_inf = self._stopped  # type: ignore[attr-defined]  # as torch.amp.GradScaler tells it
        self._outcome = torch.zeros(2, dtype=first.dtype, device=device)
        self._replay = RECORDERS[device.type](self._window, device)

    def train(self, trajectories: Iterable[tuple[Problem, int]]) -> tuple[Tensor, int]:
        """Train along trajectories: problems, and how many windows each goes on for.

        Returns:
            The mean losses of the windows that were finite, and how many trajectories were left at one that was not.
        """
        outcomes = [self._train_on(_pure(problem), windows) for problem, windows in trajectories]
        losses, stopped = torch.cat(outcomes).cpu().unbind(-1)
        ends = torch.tensor([len(outcome) for outcome in outcomes]).cumsum(0) - 1
        return losses[stopped == 0], int(stopped[ends].sum())

    def _train_on(self, problem: PureProblem, windows: int) -> Tensor:
        unroll, outcomes = len(self._objective.weights), []
        self._problem.load(problem)
        self._problem.draw(problem, 0)
        self._trajectory.restart()
        self._stopped.zero_()
        for index in range(windows):
            if index:
                self._problem.draw(problem, index * unroll)
            self._replay()
            outcomes.append(self._outcome.clone())
        return torch.stack(outcomes)

    def _window(self) -> None:
        """What is captured."""
        self._trajectory.steps = 0  # the slot of the step before the window
        window = self._trajectory.window(self._objective)
        norm, loss = torch.linalg.vector_norm(window.gradients), window.losses.mean()
        self._stopped.masked_fill_(~(norm.isfinite() & loss.isfinite()), 1.0)
        meta_step(self._rules, self._adam, window.gradients, norm, self._clip_norm)
        self._outcome[0] = loss
        self._outcome[1] = self._stopped


class _Slots(PureProblem):
    """A problem in fixed memory, with slots for what is drawn for a few steps; the numbers are other problems'."""

    def __init__(self, problem: PureProblem, slots: int) -> None:
        self.task, self.functions, self.function = problem.task, problem.functions, problem.function
        self.theta0, self.parts = problem.theta0.clone(), problem.parts
        self.constants = tuple(constant.clone() for constant in problem.constants)
        self._drawn = [drawn.to(self.theta0.device) for drawn in _draw(problem, range(slots))]
        self._slots = slots

    def inputs(self, step: int, device: torch.device) -> tuple[Tensor, ...]:
        return tuple(drawn[step] for drawn in self._drawn)

    def load(self, problem: PureProblem) -> None:
        """Take over theta_0 and constants of a problem like this one."""
        if not alike(problem, self):
            raise ValueError(
                f"capture: task {problem.task!r}: expected problems that differ in numbers alone, got one of another "
                "function or shape"
            )
        for mine, theirs in zip((self.theta0, *self.constants), (problem.theta0, *problem.constants), strict=True):
            mine.copy_(theirs)

    def draw(self, problem: PureProblem, first: int) -> None:
        """Fill the slots with what `problem` draws for the steps from `first` on."""
        for mine, theirs in zip(self._drawn, _draw(problem, range(first, first + self._slots)), strict=True):
            # From pinned memory, the host need not wait; torch keeps it until it has been read.
            mine.copy_(theirs.pin_memory() if mine.is_cuda else theirs, non_blocking=True)


def _draw(problem: PureProblem, steps: range) -> list[Tensor]:
    """What `problem` draws for these steps, on the CPU, [steps, ...]."""
    drawn = [problem.inputs(step, torch.device("cpu")) for step in steps]
    return [torch.stack(tensors) for tensors in zip(*drawn, strict=True)]


def _pure(problem: Problem) -> PureProblem:
    if not (isinstance(problem, PureProblem) and is_pure(problem)):
        raise ValueError(
            f"capture: task {problem.task!r}: expected problems that say what is drawn for a step (tasks.PureProblem), "
            "got one with a loss of its own"
        )
    return problem
