"""MetaTrainer: trains a rule on a task by truncated BPTT (Andrychowicz et al. 2016, section 3)."""

from __future__ import annotations

import contextlib
import copy
import itertools
import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastl2l.build import locked
from fastl2l.files import digest
from fastl2l.heap import Scratch, give_back, tidily
from fastl2l.meta import capture as capture_module
from fastl2l.meta import checkpoint as checkpoint_module
from fastl2l.meta.imitation import Imitation, TaughtTrajectory
from fastl2l.meta.step import meta_step
from fastl2l.ops.dispatch import select
from fastl2l.processes import current
from fastl2l.progress import Progress
from fastl2l.rule_config import require_positive
from fastl2l.rules import Learned, Rule, all_weights, named_weights, rules_by_part
from fastl2l.tasks.base import Problem, Task, as_json, check_start, fingerprint, generator, integer, problem_seed
from fastl2l.tasks.batch import batch as side_by_side
from fastl2l.trajectory import Objective, Trajectory
from fastl2l.trajectory import step_weights as _step_weights

SCHEDULES: dict[str, Callable[[float], float]] = {
    "constant": lambda done: 1.0,
    "cosine": lambda done: 0.5 * (1 + math.cos(math.pi * done)),
}
"""Factor on the meta learning rate by the share of epochs done."""


class Epoch(NamedTuple):
    """What an epoch gave."""

    epoch: int
    train_loss: float
    """Mean loss over all steps of the epoch's trajectories; NaN if none was finite."""
    validation_loss: float
    """Mean final loss on the validation problems, infinite if any of them diverged."""
    meta_lr: float
    skipped: int
    """Windows whose loss or gradient was not finite, and that were left out with the rest of their trajectory.

    A batch's window is one, and is left out for all its problems if one of them is not finite.
    """


class MetaTrainer:
    """Trains a rule by gradient descent on what it does to the problems of a task.

    An epoch is `trajectories` fresh problems of `horizon` steps each, `batch` of them at a time. After every window of
    `unroll` steps the rule takes a step of Adam along the window's meta-gradient, the mean over the batch. After every
    epoch the rule is frozen and run on the same `validation_problems` problems; the weights with the best mean final
    loss are kept, and are what the rule has when :meth:`fit` returns, unless `keep` is ``"last"``.

    Everything random comes from `seed`: two runs with the same arguments give the same bits, on the same machine and
    with the same number of threads for torch's own operations. With a `checkpoint` a run that was killed at any moment
    goes on from its last finished epoch and ends with the same bits as one that was not.

    In a process group of torch.distributed, which every process of it makes the same trainer in, the pieces of a batch
    and the validation problems are dealt out, and the results are the same bits whatever the number of processes. Each
    process ends with the rule; the first one alone writes the checkpoint and the curves, and shows the progress. The
    group's time-out is to be longer than a validation. See docs/scale.md.

    Args:
        rule: trained in place; or a dict of rules by the names of the problems' parts, which are trained together: one
            window, one step, one norm of all their gradients. Weights that do not require grad stay as they are.
        task: gives the problems.
        horizon: steps of a trajectory; or the least and the most, between which each trajectory's number is drawn, log-
            uniformly (rules that meet short and long ways early learn both). Validation takes the most.
        unroll: steps of a window; divides `horizon`, or both.
        meta_lr: learning rate of Adam.
        seed: seed of all problems.
        trajectories: trajectories an epoch.
        batch: trajectories side by side, which share each kernel call and each step of Adam; divides `trajectories`.
            Worth it where problems are small: their evaluation and the kernels' calls cost little more than one's (see
            :func:`fastl2l.tasks.batch`).
        pieces: into how many a batch is cut, each of which is evaluated at once, in one process; divides `batch`, and
            the number of processes divides it. By default 4, or the largest divisor of `batch` that 4 has; with
            `capture` 1. The last bits depend on it, for they do on what is evaluated together, and on nothing else that
            has to do with processes. Small problems are a little faster in 1 piece where there is one process.
        validation_problems: problems that the rule is validated on, of `task.validation()`.
        validation_horizon: steps that it is validated for; by default the (longest) horizon.
        step_weights: weights of the losses in a window's objective: None for 1 everywhere, ``"last"``, or `unroll`
            numbers.
        log_floor, second_minibatch: of the objective, see :class:`fastl2l.trajectory.Objective`. With `log_floor` the
            validation loss is a geometric mean over problems and the last tenth of the steps, of f + log_floor.
        second_derivatives: see :meth:`fastl2l.trajectory.Trajectory.window`.
        imitation: a share of the trajectories is a teacher's: see :class:`fastl2l.meta.Imitation`.
        clip_norm: the meta-gradient's largest norm, or None.
        schedule: ``"constant"``, or ``"cosine"`` to bring the meta learning rate to 0 by the last epoch.
        keep: what :meth:`fit` ends with: ``"best"``, the epoch with the best validation loss, or ``"last"``. With the
            cosine schedule the last weights are an average of sorts, while the best of many epochs is the one that was
            luckiest on these few problems.
        backend: see :class:`fastl2l.FusedLSTMOptimizer`.
        capture: run each window, the meta-step included, as one CUDA graph, recorded once a :meth:`fit`. For a rule on
            a CUDA device, first-order windows and tasks of pure problems (see :class:`fastl2l.tasks.PureProblem`); what
            is computed is the same up to rounding. Validation is not captured. It has not run on a GPU yet.
        checkpoint: file to keep the run's state in after every epoch; if it is there already, the run goes on from it.
        tensorboard: folder for TensorBoard curves (needs the package tensorboard).

    Attributes:
        history: an :class:`Epoch` for every epoch done.
        best_loss: the best validation loss so far.

    Raises:
        TypeError, ValueError: an argument is not as above; `rule` and files are untouched.
        CheckpointError: `checkpoint` is damaged, or of a run with other settings.

    Example::

        trainer = MetaTrainer(rule, fastl2l.tasks.Digits(), seed=0)
        trainer.fit(epochs=50)
        fastl2l.save_rule(rule, "mine.safetensors")
    """

    def __init__(
        self,
        rule: Rule | Mapping[str, Rule],
        task: Task,
        *,
        horizon: int | tuple[int, int] = 100,
        unroll: int = 20,
        meta_lr: float = 1e-3,
        seed: int = 0,
        trajectories: int = 20,
        batch: int = 1,
        pieces: int | None = None,
        validation_problems: int = 20,
        validation_horizon: int | None = None,
        step_weights: Sequence[float] | str | None = None,
        log_floor: float | None = None,
        second_minibatch: bool = False,
        second_derivatives: bool = False,
        imitation: Imitation | None = None,
        clip_norm: float | None = 1.0,
        schedule: str = "constant",
        keep: str = "best",
        backend: str = "auto",
        capture: bool = False,
        checkpoint: str | os.PathLike[str] | None = None,
        tensorboard: str | os.PathLike[str] | None = None,
    ) -> None:
        self.rule = rule
        self._processes = current()

        def take() -> None:
            # In one order, whatever the caller's: what is kept of the meta-optimizer goes by it.
            self._rules = dict(sorted(rules_by_part(rule).items()))
            self.task, self.seed = task, integer("seed", seed, least=0)
            self.horizon, self.unroll = _horizon(horizon), integer("unroll", unroll)
            self.trajectories, self.batch = integer("trajectories", trajectories), integer("batch", batch)
            self.pieces = math.gcd(self.batch, 1 if capture else 4) if pieces is None else integer("pieces", pieces)
            self.validation_problems = integer("validation_problems", validation_problems)
            self.validation_horizon = self._horizons[1]
            if validation_horizon is not None:
                self.validation_horizon = integer("validation_horizon", validation_horizon)
            self.meta_lr, self.clip_norm, self.schedule, self.keep = meta_lr, clip_norm, schedule, keep
            self.second_derivatives, self.backend, self.capture = second_derivatives, backend, capture
            self.log_floor, self.second_minibatch, self.imitation = log_floor, second_minibatch, imitation
            self._check()
            self._validation = task.validation()
            self.step_weights = _step_weights(step_weights, self.unroll)
            self._objective = Objective(self.step_weights, self.log_floor, self.second_minibatch)
            check_start(self._problems("validation", 0, 1))
            Trajectory(self._problems("validation", 0, 1), rule, backend=backend)
            if capture:
                capture_module.check(
                    rule, self._problems("train", 0, self.batch), second_derivatives=second_derivatives
                )

        self._processes.everyone(take)
        self.history: list[Epoch] = []
        self.best_loss = math.inf
        device = next(iter(self._rules.values())).device
        # A graph reads the learning rate from memory, as float32.
        self._lr = torch.tensor(meta_lr, dtype=torch.float32, device=device) if capture else meta_lr
        fused = device.type in ("cpu", "cuda")
        trained = [weight for weight in all_weights(self._rules) if weight.requires_grad]
        self._scratch = Scratch()
        self._adam = torch.optim.Adam(trained, lr=self._lr, fused=fused, capturable=capture)
        self._current = self._best = self._copy_weights()
        self._adam_state = self._copy_adam()
        self._first, self._identity = _fingerprint(self._current), _identity(self._rules)
        self._checkpoint = None if checkpoint is None else Path(checkpoint)
        others = {"keep": keep, "checkpoint": checkpoint is not None, "tensorboard": tensorboard is not None}
        self._processes.check_same(lambda: self.settings() | {"weights": self._first} | others)
        self._take_up()
        self._writer: Any = None
        if tensorboard is not None:
            self._processes.first(partial(self._open_writer, tensorboard))

    def _check(self) -> None:
        weights = all_weights(self._rules)
        if not any(weight.requires_grad for weight in weights):
            raise ValueError("rule: expected weights to train, got none that require grad")
        if len(set(map(id, weights))) < len(weights):
            raise ValueError("rule: expected a tensor for each weight, got one for two of them")
        if not isinstance(self.task, Task):
            raise TypeError(f"task: expected a fastl2l.tasks.Task, got {type(self.task).__name__}")
        for horizon in self._horizons:
            if horizon % self.unroll:
                raise ValueError(f"unroll: expected a divisor of the horizon {horizon}, got {self.unroll}")
        if self.trajectories % self.batch:
            raise ValueError(f"batch: expected a divisor of the trajectories {self.trajectories}, got {self.batch}")
        self._check_pieces()
        if self.log_floor is not None and self.batch > self.pieces:
            raise ValueError(
                f"pieces: expected as many as the batch with log_floor, which lowers the log of each problem's loss, "
                f"where of several at once the sum is known; got a batch of {self.batch} in {self.pieces}"
            )
        if self.schedule not in SCHEDULES:
            raise ValueError(f"schedule: expected one of {', '.join(SCHEDULES)}, got {self.schedule!r}")
        if self.keep not in ("best", "last"):
            raise ValueError(f"keep: expected best or last, got {self.keep!r}")
        self.meta_lr = require_positive("meta_lr", self.meta_lr)
        if self.log_floor is not None:
            self.log_floor = require_positive("log_floor", self.log_floor)
        if self.imitation is not None and not isinstance(self.imitation, Imitation):
            raise TypeError(f"imitation: expected None or an Imitation, got {self.imitation!r}")
        for name in ("second_minibatch", "second_derivatives", "capture"):
            if not isinstance(getattr(self, name), bool):
                raise TypeError(f"{name}: expected True or False, got {getattr(self, name)!r}")
        for name in ("second_minibatch", "imitation"):
            if self.capture and getattr(self, name):
                raise ValueError(f"{name}: expected none in captured windows, got {getattr(self, name)!r}")
        if self.clip_norm is not None:
            self.clip_norm = require_positive("clip_norm", self.clip_norm)

    def _check_pieces(self) -> None:
        size = self._processes.size
        if self.batch % self.pieces:
            raise ValueError(f"pieces: expected a divisor of the batch {self.batch}, got {self.pieces}")
        if self.pieces % size:
            raise ValueError(
                f"batch: expected pieces that {size} processes divide, got a batch of {self.batch} in {self.pieces}; "
                f"take a multiple of {size} as the batch, and pieces={size} where that is not among 1, 2 and 4"
            )
        for name, number in (("pieces", self.pieces), ("processes", size)):
            if self.capture and number > 1:
                raise ValueError(f"{name}: expected 1 with captured windows, got {number}")

    @property
    def first_weights(self) -> str:
        """A fingerprint of the weights that training began with."""
        return self._first

    def settings(self) -> dict[str, Any]:
        """All that decides what this run computes, as JSON would hold it: a checkpoint is good for these alone."""
        names = ["horizon", "unroll", "meta_lr", "seed", "trajectories", "batch", "validation_problems", "step_weights"]
        names += ["pieces", "second_derivatives", "clip_norm", "schedule"]
        settings = {
            "task": self.task.spec(),
            "rule": self._identity,
            "backend": select(self.backend, next(iter(self._rules.values())).device).name,
            **{name: getattr(self, name) for name in names},
        }
        # What a run is without them, it was before they were there: older checkpoints are good.
        later = {
            "log_floor": self.log_floor,
            "second_minibatch": self.second_minibatch,
            "validation_horizon": self.validation_horizon if self.validation_horizon != self._horizons[1] else None,
            "imitation": None if self.imitation is None else self.imitation.describe(),
        }
        settings |= {name: value for name, value in later.items() if value}
        return {name: as_json(name, value) for name, value in settings.items()}

    @property
    def _ordered(self) -> Learned:
        """The rule, or the rules in the order of `_rules`."""
        return self._rules.get("", self._rules)

    @property
    def _horizons(self) -> tuple[int, int]:
        """The least and the most."""
        return self.horizon if isinstance(self.horizon, tuple) else (self.horizon, self.horizon)

    def _windows(self, first: int) -> int:
        """How many windows the trajectory has whose first problem has this number."""
        least, most = self._horizons
        if least == most:
            return least // self.unroll
        u = generator(problem_seed(self.seed, "train", first), "horizon").random()
        return round(least * (most / least) ** u / self.unroll)

    def fit(self, epochs: int, *, patience: int | None = None, progress: bool = True) -> list[Epoch]:
        """Train until `epochs` epochs are done in all, counting those of earlier calls and of the checkpoint.

        With the cosine schedule `epochs` is also its length, so a run that is taken up again names the same number.

        Args:
            epochs: epochs in all.
            patience: stop before that once so many epochs in a row were no better than the best before them.
            progress: show how far it is, with an estimate of the time left.

        Returns:
            ``history``. When it is stopped (Ctrl-C) the rule has the weights that it would have ended with after the
            last finished epoch; another call goes on from there. Not so in a group of processes, which are stopped in
            different places: start them again.

        Raises:
            RuntimeError: another run is at this checkpoint.
            ProcessError: another process has ended, or said nothing for as long as the group's time-out is.
            CheckpointError: another run has been there, with other settings.
            ValueError: the finished epochs followed a schedule of another length, or weights were frozen or thawed.
        """
        self._processes.everyone(lambda: self._check_fit(epochs, patience))
        epochs, done = int(epochs), len(self.history)
        self._processes.check_same(lambda: {"epochs": epochs, "patience": patience, "epochs that are done": done})
        with self._alone():
            self._take_up()
            self._check_schedule(epochs)
            try:
                self._fit(epochs, patience, progress)
            finally:
                self._scratch.clear()
                self._load_weights(self._best if self.keep == "best" else self._current)
        return self.history

    def _check_fit(self, epochs: int, patience: int | None) -> None:
        integer("epochs", epochs, least=0)
        if patience is not None:
            integer("patience", patience)
        if _identity(self._rules) != self._identity:
            raise ValueError(
                f"rule: expected {self._identity} with the same weights to train as when the trainer was made, got "
                f"{_identity(self._rules)}"
            )

    @contextlib.contextmanager
    def _alone(self) -> Iterator[None]:
        """While others are kept from the checkpoint; whether it can be written shows before there is work to lose."""
        if self._checkpoint is None:
            yield
            return
        checkpoint = self._checkpoint

        def lock() -> None:
            try:
                stack.enter_context(locked(Path(os.path.realpath(checkpoint) + ".lock"), wait=False))
            except BlockingIOError as error:
                raise RuntimeError(f"checkpoint: {checkpoint} is another run's at this moment") from error

        with contextlib.ExitStack() as stack:
            self._processes.first(lock)
            yield

    def _fit(self, epochs: int, patience: int | None, progress: bool) -> None:
        # As they were after the last finished epoch: one that was interrupted has left both somewhere else.
        self._load_weights(self._current)
        self._load_adam(self._adam_state)
        train = self._train
        if self.capture and len(self.history) < epochs:
            train = partial(self._train_captured, self._captured())
        shown_here = progress and not self._processes.rank
        with Progress("meta-training", epochs, done=len(self.history), shown=shown_here) as shown:
            for number in range(len(self.history), epochs):
                if patience is not None and self._epochs_since_best() >= patience:
                    break
                epoch = self._epoch(number, epochs, train)
                current, adam_state = self._copy_weights(), self._copy_adam()
                is_best = epoch.validation_loss < self.best_loss
                best_loss, best = (epoch.validation_loss, current) if is_best else (self.best_loss, self._best)
                # At once: whatever stops a run finds it before this epoch or behind it, never in between.
                self.history, self.best_loss, self._best = [*self.history, epoch], best_loss, best
                self._current, self._adam_state = current, adam_state
                self._save()
                shown.advance(f"validation {epoch.validation_loss:.4g}, best {self.best_loss:.4g}")
                give_back()

    def _epochs_since_best(self) -> int:
        losses = [epoch.validation_loss for epoch in self.history]
        return len(losses) - 1 - losses.index(min(losses)) if losses else 0

    @property
    def kept_loss(self) -> float:
        """Validation loss of the weights that :meth:`fit` has ended with; infinite before the first epoch."""
        return self.best_loss if self.keep == "best" or not self.history else self.history[-1].validation_loss

    def _epoch(self, number: int, epochs: int, train: Callable[[Iterable[int]], tuple[Tensor, int]]) -> Epoch:
        meta_lr = self._scheduled_lr(number, epochs)
        self._set_lr(meta_lr)
        losses, skipped = train(range(number * self.trajectories, (number + 1) * self.trajectories, self.batch))
        # Machines of two kinds may differ in the last bits of a meta-step, and would be ever further apart.
        self._processes.check_same(lambda: {"weights": _fingerprint(self._copy_weights())})
        train_loss = losses.mean().item() if len(losses) else math.nan
        epoch = Epoch(number + 1, train_loss, self.validate(), meta_lr, skipped)
        self._processes.first(lambda: self._log(epoch))
        return epoch

    def _scheduled_lr(self, number: int, epochs: int) -> float:
        return self.meta_lr * SCHEDULES[self.schedule](number / epochs)

    def _check_schedule(self, epochs: int) -> None:
        """That the finished epochs are the first of a run of so many; with none to do, all is well."""
        for epoch in self.history if epochs else ():
            meta_lr = self._scheduled_lr(epoch.epoch - 1, epochs)
            if not math.isclose(meta_lr, epoch.meta_lr, rel_tol=1e-12):
                raise ValueError(
                    f"epochs: expected the number that the run began with, the length of its {self.schedule} schedule, "
                    f"got {epochs}: epoch {epoch.epoch} had the rate {epoch.meta_lr:.6g} and would have {meta_lr:.6g}"
                )

    def _train(self, first_problems: Iterable[int]) -> tuple[Tensor, int]:
        """Train along the trajectories whose first problems have these numbers.

        Returns:
            The mean losses of the windows that were finite, and how many trajectories were left at one that was not.
        """
        losses: list[Tensor] = []
        skipped = sum(not self._train_on(first, losses) for first in first_problems)
        return torch.stack(losses) if losses else torch.empty(0), skipped

    def _train_on(self, first: int, losses: list[Tensor]) -> bool:
        """Train along one trajectory; False if it was left because something was not finite."""
        size, mine = self.batch // self.pieces, self._processes.share(self.pieces)
        trajectories: list[Trajectory] = []

        def windows() -> Tensor:
            """Of this process's pieces: the mean loss and the gradient, [pieces, 1 + weights]."""
            if not trajectories:
                trajectories.extend(self._trajectory(first, first + piece * size, size) for piece in mine)
            return torch.stack([self._window(trajectory) for trajectory in trajectories])

        for _ in range(self._windows(first)):
            rows = self._processes.rows(windows)
            mean, gradients = _mean(rows).split([1, rows.shape[1] - 1])
            norm = torch.linalg.vector_norm(gradients)
            if not (math.isfinite(norm) and math.isfinite(mean)):
                return False
            if not isinstance(trajectories[0], TaughtTrajectory):
                losses.append(mean[0])
            meta_step(self._rules, self._adam, gradients, norm, self.clip_norm)
        return True

    def _window(self, trajectory: Trajectory) -> Tensor:
        window = trajectory.window(self._objective, second_derivatives=self.second_derivatives)
        return torch.cat([window.losses.mean().reshape(1), window.gradients])

    def _trajectory(self, batch: int, first: int, size: int) -> Trajectory:
        """Of the problems from number `first` on, a piece of the batch whose first problem is number `batch`."""
        problem = self._problems("train", first, size)
        trajectory = self._imitated(problem, batch) or Trajectory(problem, self._ordered, backend=self.backend)
        trajectory.scratch = self._scratch
        return trajectory

    def _imitated(self, problem: Problem, first: int) -> TaughtTrajectory | None:
        """The trajectory if it is a teacher's."""
        teacher = None if self.imitation is None else self.imitation.teacher(problem_seed(self.seed, "train", first))
        return None if teacher is None else TaughtTrajectory(problem, self._ordered, teacher, backend=self.backend)

    def _captured(self) -> capture_module.CapturedWindow:
        return capture_module.CapturedWindow(
            self._ordered,
            self._adam,
            self._problems("train", 0, self.batch),
            objective=self._objective,
            clip_norm=self.clip_norm,
            backend=self.backend,
        )

    def _train_captured(self, window: capture_module.CapturedWindow, first_problems: Iterable[int]) -> Any:
        """As `_train`."""
        pairs = ((self._problems("train", first, self.batch), self._windows(first)) for first in first_problems)
        return window.train(pairs)

    def validate(self) -> float:
        """The rule, as it is now, on the validation problems; infinite if any diverged.

        That is the mean final loss. With `log_floor` it is the geometric mean, over the problems and the last tenth of
        the steps, of the losses + `log_floor`.
        """
        size = self.batch // self.pieces
        starts = range(0, self.validation_problems, size)
        mine = self._processes.share(len(starts))
        sums = self._processes.everyone(lambda: [self._validate_on(starts[index], size) for index in mine])
        total = sum(itertools.chain.from_iterable(sums), 0.0)
        mean = total / self.validation_problems
        if not math.isfinite(mean):
            return math.inf
        return mean if self.log_floor is None else math.exp(mean)

    def _validate_on(self, first: int, size: int) -> float:
        """The sum over at most `size` validation problems, from number `first` on."""
        count = min(size, self.validation_problems - first)
        trajectory = Trajectory(self._problems("validation", first, count), self._ordered, backend=self.backend)
        losses = [trajectory.advance() for _ in tidily(range(self.validation_horizon))]
        if self.log_floor is None:
            return losses[-1].item() * count
        last = torch.stack(losses[-math.ceil(self.validation_horizon / 10) :]).double()
        return (last.clamp(min=0) + self.log_floor).log().mean().item() * count

    def _problems(self, purpose: str, first: int, count: int) -> Problem:
        seeds = [problem_seed(self.seed, purpose, index) for index in range(first, first + count)]
        task = self._validation if purpose == "validation" else self.task
        return side_by_side([task.sample(seed) for seed in seeds])

    def _copy_weights(self) -> dict[str, Tensor]:
        return {name: weight.detach().clone() for name, weight in named_weights(self._rules).items()}

    @torch.no_grad()
    def _load_weights(self, weights: dict[str, Tensor]) -> None:
        for name, weight in named_weights(self._rules).items():
            weight.copy_(weights[name])

    def _copy_adam(self) -> dict[str, Any]:
        """Adam's state, without how it is run: captured and eager runs take each other's."""
        state = copy.deepcopy(self._adam.state_dict())
        state["param_groups"][0] |= {"lr": self.meta_lr, "capturable": False}
        return state

    def _load_adam(self, state: dict[str, Any]) -> None:
        # How it is run is this run's word, not a file's.
        groups = self._adam.state_dict()["param_groups"]
        self._adam.load_state_dict({"state": copy.deepcopy(state["state"]), "param_groups": groups})
        self._adam.param_groups[0] |= {"lr": self._lr, "capturable": self.capture}

    def _set_lr(self, meta_lr: float) -> None:
        if isinstance(self._lr, Tensor):
            self._lr.fill_(meta_lr)
        else:
            self._adam.param_groups[0]["lr"] = meta_lr

    def _save(self) -> None:
        if self._checkpoint is None:
            return
        state = {
            "first": self._first,
            "history": [tuple(epoch) for epoch in self.history],
            "best_loss": self.best_loss,
            "current": self._current,
            "best": self._best,
            "adam": self._adam_state,
        }
        path = self._checkpoint
        self._processes.first(lambda: checkpoint_module.save(path, self.settings(), state))

    def _take_up(self) -> None:
        """Go on from the checkpoint, if there is one and it is further than this run."""
        state = self._saved()
        if state is None:
            return
        first = state.get("first", self._first)  # older ones do not know
        if self._first not in (first, _fingerprint(state["current"]), _fingerprint(state["best"])):
            raise checkpoint_module.CheckpointError(
                f"{self._checkpoint}: is of a run from other first weights; expected a rule as that began (its seed, "
                "or the rule it was trained from) or as that has left it, or another checkpoint"
            )
        self._first = first
        if len(state["history"]) > len(self.history):
            self.history = [Epoch(*epoch) for epoch in state["history"]]
            self.best_loss, self._current, self._best = state["best_loss"], state["current"], state["best"]
            self._adam_state = state["adam"]

    def _saved(self) -> dict[str, Any] | None:
        """What the checkpoint holds, if it is there; the same in every process."""
        path = self._checkpoint
        if path is None:
            return None
        found: dict[str, Any] = {}

        def read() -> str | None:
            if path.exists():
                found.update(checkpoint_module.load(path, self.settings(), named_weights(self._rules), Epoch))
            return digest(path) if found else None

        seen = self._processes.everyone(read)
        if len(set(seen)) > 1:
            raise checkpoint_module.CheckpointError(
                f"{path}: expected a folder that all {len(seen)} processes see the same file in; of them processes "
                f"{[rank for rank, one in enumerate(seen) if one == seen[0]]} find one thing there, and others another "
                "or nothing"
            )
        return found or None

    def _open_writer(self, folder: str | os.PathLike[str]) -> None:
        self._writer = _summary_writer(folder)

    def _log(self, epoch: Epoch) -> None:
        if self._writer is None:
            return
        for name, value in epoch._asdict().items():
            self._writer.add_scalar(f"meta/{name}", value, epoch.epoch)
        self._writer.flush()


def _horizon(horizon: object) -> int | tuple[int, int]:
    if not isinstance(horizon, (tuple, list)):
        return integer("horizon", horizon)
    if len(horizon) != 2:
        raise ValueError(f"horizon: expected a number of steps, or the least and the most, got {horizon!r}")
    least, most = (integer("horizon", steps) for steps in horizon)
    if least > most:
        raise ValueError(f"horizon: expected the least steps, then the most, got {horizon!r}")
    return least, most


def _fingerprint(weights: Mapping[str, Tensor]) -> str:
    return fingerprint(*weights.values())


def _identity(rules: Mapping[str, Rule]) -> Any:
    """What the rules are but for their weights; with the names of the weights that are not trained."""

    def of(rule: Rule) -> dict[str, Any]:
        frozen = [name for name, weight in rule.named_parameters() if not weight.requires_grad]
        known = {"kind": rule.kind, "config": rule.config.describe(), "dtype": str(rule.dtype)}
        return known | ({"frozen": frozen} if frozen else {})

    return of(rules[""]) if "" in rules else {part: of(rule) for part, rule in rules.items()}


def _mean(rows: Tensor) -> Tensor:
    """Over the rows, added in their order."""
    total = rows[0]
    for row in rows[1:]:
        total = total + row
    return total / len(rows)


def _summary_writer(folder: str | os.PathLike[str]) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise ImportError("tensorboard: needs the package tensorboard: pip install fastl2l[tensorboard]") from error
    return SummaryWriter(os.fspath(folder))
