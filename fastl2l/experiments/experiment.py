"""What an experiment is, and how it becomes figures and tables."""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, NamedTuple, Protocol

from rich.table import Table

from fastl2l import baselines, files, plots
from fastl2l.baselines import Baseline
from fastl2l.evaluate import Curves, comparisons, markdown, with_half_width
from fastl2l.experiments import losses
from fastl2l.experiments.accuracies import accuracies
from fastl2l.experiments.recipes import RECIPES
from fastl2l.processes import current
from fastl2l.progress import Progress
from fastl2l.rule_files import load_rule, shipped
from fastl2l.rules import Learned
from fastl2l.tasks import Task
from fastl2l.tasks.classification import Classification


class Budget(NamedTuple):
    """How much work a panel is."""

    runs: int
    """Test problems."""
    tuning_runs: int
    """Problems that the baselines' learning rates are tuned on."""
    tuning_steps: int | None = None
    """For how many steps at most; None for all."""
    steps: int | None = None
    """How many steps a trajectory has at most; None for all of the panel's."""
    piece: int = 10
    """Test problems that are kept together; divides their number."""

    def describe(self, steps: int) -> str:
        """In words, of a panel of so many steps."""
        text = f"{self.runs} problem{'s' * (self.runs > 1)}"
        if self.tuning_runs:
            text += f", rates tuned on {self.tuning_runs}"
        if self.tuning_steps is not None and steps > self.tuning_steps:
            text += f" for {self.tuning_steps:,} steps"
        return text + (f", {self.steps:,} steps" if self.steps is not None and steps > self.steps else "")


FULL, QUICK = Budget(runs=100, tuning_runs=20), Budget(runs=10, tuning_runs=1, tuning_steps=100)


@dataclass(frozen=True)
class Panel:
    """One set of problems on which learned rules meet the tuned baselines.

    Args:
        name: of its folder.
        title: above it in the figure.
        task: makes the task; called when the experiment runs, since tasks load their data.
        rules: names of rules, by what they are called in the figure.
        steps: optimization steps.
        x: in a study of final losses, where it is on the x axis; panels of one title share their axes.
        baselines: names of the baselines.
        rates: learning rates that each baseline is run at, in place of the one that tuning finds.
        full, quick: how much work it is.
        accuracy_runs: networks whose accuracy is told as well, on the images that they were not trained on; at most
            `full.runs`. Of a quick run there is none.
    """

    name: str
    title: str
    task: Callable[[], Task]
    rules: Mapping[str, str]
    steps: int = 100
    x: int | None = None
    baselines: Sequence[str] = baselines.DEFAULT
    rates: Sequence[float] = ()
    full: Budget = FULL
    quick: Budget = QUICK
    accuracy_runs: int = 0


class Study(NamedTuple):
    """What final losses are drawn against."""

    xlabel: str
    """What a panel's `x` is."""
    unit: str
    """The same, after a number."""
    marked: int | None = None
    """The one that the rules were trained with."""
    log: bool = False
    """Whether the x axis is logarithmic."""


@dataclass(frozen=True)
class Experiment:
    """A figure and its table.

    Args:
        name: what `fastl2l reproduce` calls it.
        title: above the figure.
        claim: what the paper says, in a sentence.
        panels: what is run.
        quick: names of the panels that a quick run is content with; all by default.
        study: of final losses, by the panels' `x`; by default losses are drawn by step.
        last_tenth: whether a final loss is the mean over the last tenth of the steps, not the loss of the last
            minibatch; rates are tuned by it too.
    """

    name: str
    title: str
    claim: str
    panels: Sequence[Panel]
    quick: Sequence[str] = ()
    study: Study | None = None
    last_tenth: bool = False
    more_rules: ClassVar[bool] = False
    reserved: ClassVar[Sequence[str]] = ()

    @property
    def rules(self) -> set[str]:
        """See `Reproducible`."""
        return {name for panel in self.panels for name in panel.rules.values()}

    @property
    def trained(self) -> set[str]:
        """See `Reproducible`."""
        return self.rules

    def run(
        self, out: str | os.PathLike[str], *, rules: Mapping[str, Learned], quick: bool, progress: bool = True
    ) -> list[str | Table]:
        """See `Reproducible`."""
        told: list[str | Table] = [f"The paper: {self.claim}"]
        for panel, curves in reproduce(self, out, rules=rules, quick=quick, progress=progress).items():
            told += [curves.table(panel), *comparisons(curves)]
        return told


class Reproducible(Protocol):
    """What `fastl2l reproduce` runs."""

    @property
    def name(self) -> str:
        """What the command calls it."""

    @property
    def title(self) -> str:
        """Above what it tells."""

    @property
    def rules(self) -> set[str]:
        """Names of the rules that it shows."""

    @property
    def trained(self) -> set[str]:
        """Names of those that `retrain` trains: these, and some that are shown where they are given."""

    @property
    def more_rules(self) -> bool:
        """Whether it also shows rules of any other name that it is given."""

    @property
    def reserved(self) -> Sequence[str]:
        """Names that those must not have."""

    def run(
        self, out: str | os.PathLike[str], *, rules: Mapping[str, Learned], quick: bool, progress: bool = True
    ) -> list[str | Table]:
        """Do it, write figures and tables to a folder of its name in `out`, and say what there is to tell.

        Args:
            out: the folder.
            rules: rules to take in place of the shipped ones of the same names, or beside them.
            quick: a look in two or three minutes, which says of itself that it is one.
            progress: show how far it is.
        """


def missing(experiment: Reproducible, given: Collection[str] = ()) -> list[str]:
    """Names of the rules that an experiment shows, but that do not come with fastl2l and are not `given`."""
    return sorted(experiment.rules - shipped().keys() - set(given))


def check_rules(experiment: Reproducible, given: Collection[str] = ()) -> None:
    """Raise ValueError if rules are `missing`, or have names that are `reserved`."""
    for name in set(experiment.reserved) & set(given):
        raise ValueError(f"rules: expected other names than {', '.join(experiment.reserved)}, got {name!r}")
    if absent := missing(experiment, given):
        raise ValueError(
            f"rule: expected {', '.join(absent)}, which {experiment.name} shows and which do not come with fastl2l, as "
            f"NAME=FILE, got {', '.join(sorted(given)) or 'none'}"
        )


def reproduce(
    experiment: Experiment,
    out: str | os.PathLike[str],
    *,
    rules: Mapping[str, Learned] | None = None,
    quick: bool = False,
    progress: bool = True,
) -> dict[str, Curves]:
    """Run an experiment, or what of it is not in the cache yet, and write its figure, table and curves.

    Args:
        experiment: one of `fastl2l.experiments.ALL`.
        out: the folder; everything goes to a folder in it that is named for the experiment.
        rules: rules to take in place of the shipped ones of the same names, or that are not shipped.
        quick: fewer problems, and less tuning; the figure says so. Two or three minutes for the longest.
        progress: show how far it is.

    Returns:
        The curves by panel; where baselines are run at many rates, those of the best of each.

    Raises:
        ValueError: a rule that it shows is neither shipped nor given.
    """
    rules = dict(rules or {})
    check_rules(experiment, rules)
    rules |= {name: load_rule(name) for name in experiment.rules - rules.keys()}
    folder = Path(out) / folder_name(experiment, quick)
    panels = [
        panel for panel in experiment.panels if not quick or not experiment.quick or panel.name in experiment.quick
    ]
    work = [(panel, panel.quick if quick else panel.full, _optimizers(panel, rules)) for panel in panels]
    pieces = sum(len(optimizers) * budget.runs // budget.piece for _, budget, optimizers in work)
    results, processes = dict[str, Curves](), current()
    shares: dict[str, dict[str, list[float]]] = {}
    with Progress(experiment.name, pieces, shown=progress and not processes.rank) as shown:
        for panel, budget, optimizers in work:
            steps = min(panel.steps, budget.steps or panel.steps)
            results[panel.name] = losses.curves(
                panel.task(),
                optimizers,
                steps=steps,
                runs=budget.runs,
                tuning_runs=budget.tuning_runs,
                tuning_steps=budget.tuning_steps,
                piece=budget.piece,
                last=max(1, steps // 10) if experiment.last_tenth else 1,
                note=shown.note,
                advance=shown.advance,
            )
            processes.first(lambda panel=panel: results[panel.name].save(folder / panel.name))  # type: ignore[misc]
            if panel.accuracy_runs and not quick:
                shown.note(f"{panel.title}: accuracy")
                shares[panel.name] = _accuracies(panel, optimizers, results[panel.name])
    note = f"quick: {'; '.join(dict.fromkeys(budget.describe(panel.steps) for panel, budget, _ in work))}" * quick

    def write() -> None:
        _draw(experiment, panels, results, folder / "figure.png", f"{experiment.title}\n{note}".strip())
        files.write_text(folder / "table.md", _table(experiment, panels, results, shares, note))

    processes.first(write)
    return {panel.name: _told(panel, results[panel.name]) for panel in panels}


def folder_name(experiment: Reproducible, quick: bool) -> str:
    """Where `reproduce` writes, in its folder."""
    return experiment.name + "-quick" * quick


def _optimizers(panel: Panel, rules: Mapping[str, Learned]) -> dict[str, Learned | Baseline]:
    learned: dict[str, Learned | Baseline] = {label: rules[name] for label, name in panel.rules.items()}
    if panel.rates:
        return learned | {
            _at(name, rate): baselines.by_name(name, rate) for name in panel.baselines for rate in panel.rates
        }
    return learned | {name: baselines.by_name(name) for name in panel.baselines}


def _at(name: str, rate: float) -> str:
    """What a baseline is called that is run at many rates."""
    return f"{name} {rate:g}"


def _told(panel: Panel, curves: Curves) -> Curves:
    """Those that are compared: of a baseline that was run at many rates the best."""
    if not panel.rates:
        return curves
    place = {name: number for number, name in enumerate(curves.ranking())}
    best = [min((_at(name, rate) for rate in panel.rates), key=place.__getitem__) for name in panel.baselines]
    return curves.only([*panel.rules, *best])


def _draw(
    experiment: Experiment, panels: Sequence[Panel], results: Mapping[str, Curves], path: Path, title: str
) -> None:
    if panels[0].rates:
        plots.plot_rates({panel.title: results[panel.name] for panel in panels}, path, title=title)
    elif experiment.study is None:
        plots.plot_panels({panel.title: results[panel.name] for panel in panels}, path, title=title)
    else:
        groups: dict[str, dict[int, Curves]] = {}
        for panel in panels:
            groups.setdefault(panel.title, {})[panel.x or 0] = results[panel.name]
        xlabel, _, marked, log = experiment.study
        plots.plot_final_losses(groups, path, title=title, xlabel=xlabel, marked=marked, log_x=log)


def _table(
    experiment: Experiment,
    panels: Sequence[Panel],
    results: Mapping[str, Curves],
    shares: Mapping[str, Mapping[str, Sequence[float]]],
    note: str,
) -> str:
    parts = [f"# {experiment.title}", f"The paper: {experiment.claim}"] + ([f"({note})"] if note else [])
    for panel in panels:
        curves = results[panel.name]
        parts.append(f"## {panel.title}" + (f", {panel.x} {experiment.study.unit}" if experiment.study else ""))
        parts.append(f"Mean loss after {curves.steps} steps on {curves.runs} problems, 95% intervals.")
        if experiment.last_tenth:
            tuned = "" if panel.rates else ", and tuned on other problems,"
            parts[-1] += f" Compared{tuned} by the mean of the last {curves.last:,} losses."
        told = _told(panel, curves)
        parts.append(told.markdown())
        parts.append("\n".join(f"- {line}" for line in comparisons(told)))
        if panel.rates:
            parts.append(markdown(_rates(panel, curves)))
        if panel.name in shares:
            parts.append(f"Images not trained on that are classified rightly, mean of {panel.accuracy_runs} networks.")
            parts.append(markdown(_shares(shares[panel.name])))
    return "\n\n".join(parts) + "\n"


def _rates(panel: Panel, curves: Curves) -> list[list[str]]:
    """Final losses of the baselines, a row for each rate."""
    rows = [["learning rate", *panel.baselines]]
    for rate in panel.rates:
        finals = [curves.final(_at(name, rate)) for name in panel.baselines]
        rows.append([f"{rate:g}", *(with_half_width(*one) for one in finals)])
    return rows


def _accuracies(
    panel: Panel, optimizers: Mapping[str, Learned | Baseline], curves: Curves
) -> dict[str, list[float]]:  # fmt: skip
    """Of each optimizer, at the rate that its curves have."""
    about = curves.metadata["optimizers"]
    tuned = {
        name: one.with_lr(about[name]["lr"]) if isinstance(one, Baseline) else one for name, one in optimizers.items()
    }
    task = panel.task()
    if not isinstance(task, Classification):
        raise TypeError(f"panel {panel.name!r}: expected a task of images for accuracies, got {task.name!r}")
    return accuracies(task, tuned, steps=curves.steps, runs=panel.accuracy_runs)


def _shares(shares: Mapping[str, Sequence[float]]) -> list[list[str]]:
    """The most accurate first."""
    means = sorted(((sum(of_runs) / len(of_runs), name) for name, of_runs in shares.items()), reverse=True)
    return [["optimizer", "accuracy"], *([name, f"{mean:.1%}"] for mean, name in means)]


def retrain(experiment: Reproducible, out: str | os.PathLike[str], *, quick: bool = False) -> dict[str, Learned]:
    """Train the rules of an experiment from their recipes, for `reproduce`; a tenth of the epochs if `quick`.

    Checkpoints are kept in `out`/rules: a run that was killed goes on, one that was finished is only loaded.

    Raises:
        ValueError: a rule has no recipe.
    """
    if unknown := sorted(experiment.trained - RECIPES.keys()):
        raise ValueError(f"{experiment.name}: expected rules that have recipes, got {', '.join(unknown)}")
    return {name: RECIPES[name].train(Path(out) / "rules", quick=quick) for name in sorted(experiment.trained)}
