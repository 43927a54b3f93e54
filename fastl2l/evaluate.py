"""Optimizers side by side on fresh problems of a task, learned ones and tuned baselines alike."""

from __future__ import annotations

import csv
import io
import math
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias, TypeGuard

import torch
from rich.table import Table
from rich.text import Text
from torch import Tensor, nn

from fastl2l.baselines import Baseline, curve, descend, tune
from fastl2l.files import open_tensors, read_record, shown, write_record, write_tensors, write_text
from fastl2l.heap import tidily
from fastl2l.ops.dispatch import select
from fastl2l.optim import FusedLSTMOptimizer
from fastl2l.processes import current, versions
from fastl2l.progress import Progress
from fastl2l.rules import Learned, Rule, rules_by_part
from fastl2l.tasks.base import Problem, Task, check_start, fingerprint, integer, problem_seed
from fastl2l.trajectory import Trajectory

FORMAT = 1
"""Of the saved files."""
LARGEST_RESULTS = 2**26
"""Bytes of results.json, which has a number for every run."""
_UNSEALED = {"format", "metadata", "final", "losses"}
"""What is in a results.json from before it had a digest."""

Build = Callable[[list[Tensor]], torch.optim.Optimizer]
Optimizer: TypeAlias = "Learned | Baseline | Build"
"""What is compared: a rule, or one for each part of the problems; a baseline; what makes a torch optimizer."""


@dataclass
class Curves:
    """What `evaluate` saw.

    Attributes:
        losses: by optimizer, the loss of each run (each a problem of its own, the same for every optimizer) at steps
            0 .. steps: float64 [runs, steps + 1]. inf from the first non-finite loss on.
        metadata: task, seed, versions; under "optimizers", by name: "kind" ("learned", "baseline" or "other") and
            what is known of it, such as the learning rate of a baseline; and under "last", if it is not 1, how many
            losses, the last ones of a run, are averaged to its final loss.
    """

    losses: dict[str, Tensor]
    metadata: dict[str, Any] = field(default_factory=dict)

    @property
    def runs(self) -> int:
        """Number of problems."""
        return next(iter(self.losses.values())).shape[0]

    @property
    def steps(self) -> int:
        """Number of optimization steps."""
        return next(iter(self.losses.values())).shape[1] - 1

    @property
    def last(self) -> int:
        """How many losses, the last ones of a run, are averaged to its final loss."""
        last: int = self.metadata.get("last", 1)
        return last

    def mean(self, name: str) -> Tensor:
        """Mean loss over the runs, float64 [steps + 1]; inf where a run has diverged."""
        return self.losses[name].mean(0)

    def interval(self, name: str) -> tuple[Tensor, Tensor]:
        """Both ends of the 95% confidence interval of `mean` (Student's t), float64 [steps + 1] each.

        Where a run has diverged, or there is only one run, nothing is known: -inf and inf.
        """
        mean, half = _mean_and_half_width(self.losses[name])
        return torch.where(half < math.inf, mean - half, -math.inf), torch.where(half < math.inf, mean + half, math.inf)

    def final(self, name: str, last: int | None = None) -> tuple[float, float]:
        """Mean final loss, or mean over the `last` losses, and half the width of its 95% interval."""
        mean, half = _mean_and_half_width(self._finals(name, last))
        return mean.item(), half.item()

    def difference(self, a: str, b: str) -> tuple[float, float]:
        """Mean of (final loss of a - final loss of b) over the runs, and half the width of its 95% interval.

        The difference is taken run by run, on the same problem and minibatches, which tells optimizers apart that
        their own intervals would not. It is NaN where both diverged in the same run.
        """
        mean, half = _mean_and_half_width(self._finals(a) - self._finals(b))
        return mean.item(), half.item()

    def diverged(self, name: str) -> int:
        """Number of runs that ended in a non-finite loss."""
        return int(self.losses[name][:, -1].isinf().sum())

    def kind(self, name: str) -> str:
        """Either "learned", "baseline" or "other"."""
        return self._about(name).get("kind", "other")

    def ranking(self) -> list[str]:
        """Names from the lowest final loss to the highest."""
        return sorted(self.losses, key=lambda name: self.final(name)[0])

    def only(self, names: Iterable[str]) -> Curves:
        """The curves of these optimizers alone."""
        losses = {name: self.losses[name] for name in names}
        return Curves(losses, self.metadata | {"optimizers": {name: self._about(name) for name in losses}})

    def table(self, title: str | None = None) -> Table:
        """Final losses, the lowest first, for a rich console; titled by the task. Learned optimizers stand out."""
        header, *rows = self._rows()
        task = title or self.metadata.get("task", {}).get("name")
        caption = f"mean over {self.runs} problems after {self.steps} steps, 95% intervals"
        table = Table(*header, title=task, caption=caption)
        for name, row in zip(self.ranking(), rows, strict=True):
            table.add_row(*map(Text, row), style="bold" if self.kind(name) == "learned" else None)
        return table

    def markdown(self) -> str:
        """The same table as plain text."""
        return markdown(self._rows())

    def save(self, folder: str | os.PathLike[str]) -> Path:
        """Write the curves to `folder`, from which `load` reads them, and return it.

        curves.csv (step, optimizer, mean, low, high) is for people and plots, losses.safetensors holds every loss, and
        results.json all else, with the final loss of every run. Each file appears whole or not at all, results.json
        last; it names the losses that it belongs to, so that `load` never mixes two evaluations.
        """
        path = Path(folder)
        write_tensors(path / "losses.safetensors", self.losses)
        write_text(path / "curves.csv", self._csv())
        write_record(path / "results.json", self._results())
        return path

    @classmethod
    def load(cls, folder: str | os.PathLike[str]) -> Curves:
        """The curves that `save` wrote to `folder`.

        Raises:
            FileNotFoundError: a file is missing.
            ValueError: the files are damaged, of another format, or of two evaluations. The message names the file.
        """
        path = Path(folder)
        try:
            results = read_record(path / "results.json", FORMAT, largest=LARGEST_RESULTS, unsealed=_UNSEALED)
            metadata, shape = results["metadata"], results.get("shape")
            names = list(metadata["optimizers"])
            if not all(isinstance(about, dict) for about in metadata["optimizers"].values()):
                raise TypeError(f"optimizers are {shown(metadata['optimizers'])}")
            with open_tensors(path / "losses.safetensors") as stored:
                if stored.shapes.keys() != set(names):
                    raise ValueError(f"expected losses of {shown(names)}, got {shown(stored.shapes)}")
                if shape is not None and any(list(found) != shape for found in stored.shapes.values()):
                    raise ValueError(f"expected losses of shape {shown(shape)}, got {shown(stored.shapes)}")
                losses = stored.load(sealed=shape is not None)
            losses = {name: losses[name] for name in names}
            if fingerprint(*losses.values()) != results["losses"]:
                raise ValueError("losses.safetensors is not the one that results.json was written with")
        except (AttributeError, KeyError, TypeError) as error:
            reason = f"other content in results.json: {error}"
            raise ValueError(f"folder: expected curves saved by fastl2l in {path}, got {reason}") from error
        except ValueError as error:
            raise ValueError(f"folder: expected curves saved by fastl2l in {path}, got: {error}") from error
        return cls(losses, metadata)

    def _about(self, name: str) -> dict[str, Any]:
        return self.metadata.get("optimizers", {}).get(name, {})

    def _finals(self, name: str, last: int | None = None) -> Tensor:
        return self.losses[name][:, -(last or self.last) :].mean(1)

    def _rows(self) -> list[list[str]]:
        judges = {"final loss": 1} if self.last == 1 else {f"mean of the last {self.last:,}": self.last, "last loss": 1}
        rows = [["optimizer", "kind", "learning rate", *judges, "diverged"]]
        for name in self.ranking():
            losses = [with_half_width(*self.final(name, last)) for last in judges.values()]
            lr = self._about(name).get("lr")
            rows.append([name, self.kind(name), "" if lr is None else f"{lr:.3g}", *losses, str(self.diverged(name))])
        return rows

    def _csv(self) -> str:
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(["step", "optimizer", "mean", "low", "high"])
        for name in self.losses:
            columns = (self.mean(name).tolist(), *(end.tolist() for end in self.interval(name)))
            writer.writerows((step, name, *numbers) for step, numbers in enumerate(zip(*columns, strict=True)))
        return text.getvalue()

    def _results(self) -> dict[str, Any]:
        final = {
            name: {
                "mean": json_number(self.final(name)[0]),
                "half_width_95": json_number(self.final(name)[1]),
                "diverged": self.diverged(name),
                "runs": [json_number(loss) for loss in self._finals(name).tolist()],
            }
            for name in self.losses
        }
        metadata = self.metadata | {"optimizers": {name: self._about(name) for name in self.losses}}
        return {
            "format": FORMAT,
            "metadata": metadata,
            "final": final,
            "losses": fingerprint(*self.losses.values()),
            "shape": [self.runs, self.steps + 1],
        }


def evaluate(
    task: Task,
    optimizers: Mapping[str, Optimizer],
    *,
    steps: int = 100,
    runs: int = 100,
    seed: int = 1,
    progress: bool = False,
    backend: str = "auto",
) -> Curves:
    """Run every optimizer on the same fresh problems and minibatches, and record all losses.

        curves = evaluate(task, {"lstm": rule, "adam": baselines.Adam(lr="tune")})
        print(curves.markdown())

    Args:
        task: the distribution of problems.
        optimizers: by name: an update rule, or a dict of rules by the parts of the problems; a baseline, whose rate is
            tuned first (on other problems) if it is "tune"; or a function from a list of parameters, one for each part,
            to a torch optimizer. Those are vectors: a relative rule in an optimizer of such a function has units of 1.
        steps: optimization steps a run.
        runs: number of problems: number 0 .. runs - 1 of purpose "test" of this seed.
        seed: see runs.
        progress: show how far it is, with an estimate of the time left.
        backend: of FusedLSTMOptimizer, for update rules.

    In a process group the runs are dealt out, and every process returns all of them: see docs/scale.md.

    Returns:
        The losses of every run at steps 0 .. steps. A run that diverges is inf from there on, and counts as such.

    Raises:
        TypeError, ValueError: an argument is not as above, or the task's first problem breaks the contract of Problem.
    """
    processes = current()
    processes.everyone(lambda: check(task, optimizers, steps=steps, runs=runs, seed=seed, backend=backend))
    processes.check_same(
        lambda: describe(task, optimizers, steps=steps, runs=runs, seed=seed, backend=backend) | kernels(backend)
    )
    tuned = _tuned(task, optimizers, steps, progress)
    metadata = describe(task, tuned, steps=steps, runs=runs, seed=seed, backend=backend)
    mine = processes.share(runs)

    def losses_of(name: str, advance: Callable[[], None]) -> Tensor:
        about: dict[str, Any] = {"seed": seed, "backend": backend, "name": f"optimizers[{name!r}]"}
        return follow(task, tuned[name], steps, mine, **about, advance=advance)

    with Progress(f"evaluating on {task.name}", len(mine) * len(tuned), shown=progress and not processes.rank) as shown:
        losses = {name: processes.rows(partial(losses_of, name, shown.advance)) for name in tuned}
    return Curves(losses, metadata)


def check(task: Task, optimizers: Mapping[str, Optimizer], *, steps: int, runs: int, seed: int, backend: str) -> None:
    """Raise what is wrong with arguments of `evaluate` before there is work to lose: every optimizer takes a step."""
    if not isinstance(task, Task):
        raise TypeError(f"task: expected a fastl2l Task, got {type(task).__name__}")
    _check_optimizers(optimizers)
    integer("steps", steps)
    integer("runs", runs)
    integer("seed", seed, least=0)
    first = task.sample(problem_seed(seed, "test", 0))
    check_start(first)
    for name, optimizer in optimizers.items():
        if not (isinstance(optimizer, Baseline) and optimizer.lr == "tune"):
            _descend(first, optimizer, 1, backend, f"optimizers[{name!r}]")


def follow(
    task: Task,
    optimizer: Optimizer,
    steps: int,
    numbers: Iterable[int],
    *,
    seed: int = 1,
    backend: str = "auto",
    advance: Callable[[], None] = lambda: None,
    name: str = "optimizer",
) -> Tensor:
    """Losses of one optimizer on the test problems of these numbers: float64 [problems, steps + 1].

    `advance` is called after each of them, and errors speak of `name`; everything else is as for `evaluate`.
    """
    losses = []
    for number in numbers:
        problem = task.sample(problem_seed(seed, "test", number))
        losses.append(_descend(problem, optimizer, steps, backend, name))
        advance()
    return torch.stack(losses) if losses else torch.empty(0, steps + 1, dtype=torch.float64)


def describe(
    task: Task,
    optimizers: Mapping[str, Optimizer],
    *,
    steps: int,
    runs: int,
    seed: int,
    backend: str,
    last: int = 1,
) -> dict[str, Any]:
    """The metadata of `Curves`: all that decides what the losses are, and the versions that made them."""
    return ({"last": last} if last > 1 else {}) | {
        "task": task.spec(),
        "steps": steps,
        "runs": runs,
        "seed": seed,
        "backend": backend,
        "versions": versions(),
        "optimizers": {name: describe_optimizer(optimizer) for name, optimizer in optimizers.items()},
    }


def kernels(backend: str) -> dict[str, str]:
    """What a backend is on this machine's CPU: for a comparison of processes."""
    return {"kernels": select(backend, torch.device("cpu")).name}


def markdown(rows: Sequence[Sequence[str]]) -> str:
    """A table as plain text; the first row is its header."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    header, *others = rows
    return "\n".join(
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) + " |"
        for line in (header, ["-" * width for width in widths], *others)
    )


def comparisons(curves: Curves) -> list[str]:
    """A line for each learned optimizer and each other one: by how much its final loss is lower, problem by problem."""
    learned = [name for name in curves.ranking() if curves.kind(name) == "learned"]
    others = [name for name in curves.ranking() if name not in learned]
    return [_comparison(curves, name, other) for name in learned for other in others]


def _comparison(curves: Curves, name: str, other: str) -> str:
    mean, half = curves.difference(other, name)
    size = with_half_width(abs(mean), half)
    if not math.isfinite(mean) or math.isinf(half):
        return (
            f"{name} against {other}: difference unknown, {curves.diverged(name)} and {curves.diverged(other)} diverged"
        )
    if abs(mean) <= half:
        return f"{name} ends level with {other}: they differ by {size}"
    return f"{name} ends {'below' if mean > 0 else 'above'} {other}, by {size}"


def _check_optimizers(optimizers: object) -> None:
    if not isinstance(optimizers, Mapping) or not optimizers:
        raise TypeError(f"optimizers: expected a dict of name: optimizer, not empty, got {optimizers!r}")
    for name, optimizer in optimizers.items():
        if not isinstance(name, str):
            raise TypeError(f"optimizers: expected strings as names, got {name!r}")
        if not name.isprintable() or name in ("", "__metadata__"):  # files of safetensors have another use for that
            raise ValueError(f"optimizers: expected names that can be printed and saved, got {name!r}")
        if isinstance(optimizer, Mapping):
            rules_by_part(optimizer)
            continue
        is_class = isinstance(optimizer, type) and not issubclass(optimizer, torch.optim.Optimizer)
        is_module = isinstance(optimizer, nn.Module) and not isinstance(optimizer, Rule)
        if is_class or is_module or not (isinstance(optimizer, Baseline) or callable(optimizer)):
            raise TypeError(
                f"optimizers[{name!r}]: expected an update rule or a dict of some, a Baseline such as Adam(), or a "
                f"function from a list of parameters to a torch optimizer, got {optimizer!r}"
            )


def _tuned(task: Task, optimizers: Mapping[str, Any], steps: int, progress: bool) -> dict[str, Any]:
    """The optimizers, with their learning rates found for the baselines that leave theirs open."""
    left_open = [name for name, one in optimizers.items() if isinstance(one, Baseline) and one.lr == "tune"]
    found = dict(optimizers)
    with Progress("tuning learning rates", len(left_open), shown=progress and not current().rank) as shown:
        for name in left_open:

            def report(lr: float, loss: float, name: str = name) -> None:
                shown.note(f"{name}: {lr:.3g} ends at {loss:.3g}")

            lr = tune(task, optimizers[name], steps, report=report)
            found[name] = optimizers[name].with_lr(lr)
            shown.advance(f"{name}: {lr:.3g}")
    return found


def builder(name: str, optimizer: Optimizer, backend: str = "auto", *, parts: Mapping[str, int] | None = None) -> Build:
    """What makes the torch optimizer of any of the kinds for a list of parameters, which are `parts`.

    Raises:
        ValueError: there are rules by part, and of other parts. It speaks of `name`.
    """
    if isinstance(optimizer, Baseline):
        return optimizer.build
    if isinstance(optimizer, Rule):
        return lambda params: FusedLSTMOptimizer(params, optimizer, nonfinite="propagate", backend=backend)
    if isinstance(optimizer, Mapping):
        names = list(parts or ())
        if set(names) != optimizer.keys():
            got = f"rules for {', '.join(optimizer)}"
            raise ValueError(
                f"{name}: expected a rule for each part ({', '.join(names) or 'there are none'}), got {got}"
            )
        rules = [optimizer[part] for part in names]

        def of_parts(params: list[Tensor]) -> torch.optim.Optimizer:
            groups = [{"params": [param], "rule": rule} for param, rule in zip(params, rules, strict=True)]
            return FusedLSTMOptimizer(groups, nonfinite="propagate", backend=backend)

        return of_parts

    def build(params: list[Tensor]) -> torch.optim.Optimizer:
        built = optimizer(params)
        if not isinstance(built, torch.optim.Optimizer):
            raise TypeError(f"{name}: expected it to return a torch optimizer, got {built!r}")
        return built

    return build


def wants_trajectory(optimizer: Optimizer) -> TypeGuard[Learned]:
    """Whether it is a rule, or has one for a part, whose steps depend on which tensors or functions theta is made of.

    Those are followed by a `Trajectory`, which knows that of the problem; a torch optimizer is given theta as vectors.
    """
    if not isinstance(optimizer, Rule | Mapping):
        return False
    return any(rule.config.relative or rule.config.coupled for rule in rules_by_part(optimizer).values())


def _descend(problem: Problem, optimizer: Optimizer, steps: int, backend: str, name: str) -> Tensor:
    """As `baselines.descend`, of any of the kinds; errors speak of `name`."""
    if not wants_trajectory(optimizer):
        return descend(problem, builder(name, optimizer, backend, parts=problem.parts), steps)
    trajectory = Trajectory(problem, optimizer, backend=backend)
    return curve([trajectory.loss, *(trajectory.advance() for _ in tidily(range(steps)))])


def describe_optimizer(optimizer: Any) -> dict[str, Any]:
    """What is known of an optimizer: its kind, and the learning rate of a baseline or the hash of a rule's weights."""
    if isinstance(optimizer, Baseline):
        return {"kind": "baseline", "optimizer": optimizer.name, "lr": optimizer.lr, **optimizer.options}
    if isinstance(optimizer, Mapping):
        parts = {part: describe_optimizer(rule) for part, rule in optimizer.items()}
        return {"kind": "learned", "parts": parts}
    if isinstance(optimizer, Rule):
        return {"kind": "learned", "rule": optimizer.config.describe(), "weights": fingerprint(*optimizer.weights())}
    return {"kind": "other"}


# Statistics


def _mean_and_half_width(losses: Tensor) -> tuple[Tensor, Tensor]:
    """Mean over the runs (dimension 0) and half the width of its 95% interval; inf where that is unknown."""
    runs = len(losses)
    mean = losses.mean(0)
    if runs < 2:
        return mean, torch.full_like(mean, math.inf)
    from scipy.special import stdtrit  # quantile of Student's t distribution; slow to import

    half = losses.std(0) * (stdtrit(runs - 1, 0.975) / math.sqrt(runs))
    return mean, half.nan_to_num(nan=math.inf)


_MOST_DECIMALS = 6


def with_half_width(mean: float, half: float) -> str:
    """A mean and half the width of its interval as text: 0.0661 ± 0.0049, or (6.6 ± 2.2)e-15 of what is small.

    The mean alone where the width is unknown.
    """
    if not 0 < half < math.inf:
        return f"{mean:.4g}"
    decimals = max(0, 1 - math.floor(math.log10(half)))
    if decimals > _MOST_DECIMALS:
        power = math.floor(math.log10(max(abs(mean), half)))
        return f"({mean / 10**power:.{decimals + power}f} ± {half / 10**power:.{decimals + power}f})e{power}"
    return f"{mean:.{decimals}f} ± {half:.{decimals}f}"


def json_number(value: float) -> float | str:
    """JSON has no infinity and no NaN: they become "inf" and "nan", which float() understands."""
    return value if math.isfinite(value) else str(value)
