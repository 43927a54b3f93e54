"""What an experiment is, and how it becomes figures and tables."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, NamedTuple, Protocol

from rich.table import Table

from fastl2l import baselines, files, plots
from fastl2l.baselines import Baseline
from fastl2l.evaluate import Curves, comparisons
from fastl2l.experiments import losses
from fastl2l.experiments.recipes import RECIPES
from fastl2l.progress import Progress
from fastl2l.rule_files import load_rule
from fastl2l.rules import Rule
from fastl2l.tasks import Task


@dataclass(frozen=True)
class Panel:
    """One set of problems on which a learned rule meets the tuned baselines.

    Args:
        name: of its folder.
        title: above it in the figure.
        task: makes the task; called when the experiment runs, since tasks load their data.
        rule: name of a shipped rule.
        steps: optimization steps.
        units: of a study of final losses, where it is on the x axis; panels of one title share their axes.
    """

    name: str
    title: str
    task: Callable[[], Task]
    rule: str
    steps: int = 100
    units: int | None = None


@dataclass(frozen=True)
class Experiment:
    """A figure and its table.

    Args:
        name: what `fastl2l reproduce` calls it.
        title: above the figure.
        claim: what the paper says, in a sentence.
        panels: what is run.
        quick: names of the panels that a quick run is content with; all by default.
    """

    name: str
    title: str
    claim: str
    panels: Sequence[Panel]
    quick: Sequence[str] = ()
    more_rules: ClassVar[bool] = False

    @property
    def rules(self) -> set[str]:
        """See `Reproducible`."""
        return {panel.rule for panel in self.panels}

    def run(
        self, out: str | os.PathLike[str], *, rules: Mapping[str, Rule], quick: bool, progress: bool = True
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
        """Names of the shipped rules that it shows."""

    @property
    def more_rules(self) -> bool:
        """Whether it also shows rules of any other name that it is given."""

    def run(
        self, out: str | os.PathLike[str], *, rules: Mapping[str, Rule], quick: bool, progress: bool = True
    ) -> list[str | Table]:
        """Do it, write figures and tables to a folder of its name in `out`, and say what there is to tell.

        Args:
            out: the folder.
            rules: rules to take in place of the shipped ones of the same names, or beside them.
            quick: a look in two or three minutes, which says of itself that it is one.
            progress: show how far it is.
        """


class Budget(NamedTuple):
    """How much work an experiment is."""

    runs: int
    """Test problems."""
    tuning_runs: int
    """Problems that the baselines' learning rates are tuned on."""
    tuning_steps: int | None = None
    """For how many steps at most; None for all."""


FULL, QUICK = Budget(runs=100, tuning_runs=20), Budget(runs=10, tuning_runs=1, tuning_steps=100)


def reproduce(
    experiment: Experiment,
    out: str | os.PathLike[str],
    *,
    rules: Mapping[str, Rule] | None = None,
    quick: bool = False,
    progress: bool = True,
) -> dict[str, Curves]:
    """Run an experiment, or what of it is not in the cache yet, and write its figure, table and curves.

    Args:
        experiment: one of `fastl2l.experiments.ALL`.
        out: the folder; everything goes to a folder in it that is named for the experiment.
        rules: rules to take in place of the shipped ones of the same names.
        quick: 10 problems in place of 100, and less tuning; the figure says so. About two minutes for the longest.
        progress: show how far it is.

    Returns:
        The curves by panel.
    """
    folder = Path(out) / folder_name(experiment, quick)
    budget = QUICK if quick else FULL
    panels = [
        panel for panel in experiment.panels if not quick or not experiment.quick or panel.name in experiment.quick
    ]
    rules = {**{name: load_rule(name) for name in {panel.rule for panel in panels} - set(rules or {})}, **(rules or {})}
    pieces = len(panels) * (1 + len(baselines.ALL)) * budget.runs // losses.PROBLEMS
    results = {}
    with Progress(experiment.name, pieces, shown=progress) as shown:
        for panel in panels:
            optimizers: dict[str, Rule | Baseline] = {"lstm": rules[panel.rule]}
            optimizers |= {name: baselines.by_name(name) for name in baselines.ALL}
            results[panel.name] = losses.curves(
                panel.task(),
                optimizers,
                steps=panel.steps,
                runs=budget.runs,
                tuning_runs=budget.tuning_runs,
                tuning_steps=budget.tuning_steps,
                note=shown.note,
                advance=shown.advance,
            )
            results[panel.name].save(folder / panel.name)
    note = ""
    if quick:
        note = f"quick: {budget.runs} problems, rates tuned on {budget.tuning_runs}"
        if budget.tuning_steps is not None and any(panel.steps > budget.tuning_steps for panel in panels):
            note += f" for {budget.tuning_steps} steps"
    _draw(panels, results, folder / "figure.png", f"{experiment.title}\n{note}" if quick else experiment.title)
    files.write_text(folder / "table.md", _table(experiment, panels, results, note))
    return results


def folder_name(experiment: Reproducible, quick: bool) -> str:
    """Where `reproduce` writes, in its folder."""
    return experiment.name + "-quick" * quick


def _draw(panels: Sequence[Panel], results: Mapping[str, Curves], path: Path, title: str) -> None:
    if panels[0].units is None:
        plots.plot_panels({panel.title: results[panel.name] for panel in panels}, path, title=title)
        return
    groups: dict[str, dict[int, Curves]] = {}
    for panel in panels:
        groups.setdefault(panel.title, {})[panel.units or 0] = results[panel.name]
    plots.plot_final_losses(groups, path, title=title, xlabel="hidden units a layer", marked=20)


def _table(experiment: Experiment, panels: Sequence[Panel], results: Mapping[str, Curves], note: str) -> str:
    parts = [f"# {experiment.title}", f"The paper: {experiment.claim}"] + ([f"({note})"] if note else [])
    for panel in panels:
        curves, units = results[panel.name], "" if panel.units is None else f", {panel.units} units"
        parts.append(f"## {panel.title}{units}")
        parts.append(f"Mean loss after {panel.steps} steps on {curves.runs} problems, 95% intervals.")
        parts.append(curves.markdown())
        parts.append("\n".join(f"- {line}" for line in comparisons(curves)))
    return "\n\n".join(parts) + "\n"


def retrain(experiment: Reproducible, out: str | os.PathLike[str], *, quick: bool = False) -> dict[str, Rule]:
    """Train the rules of an experiment from their recipes, for `reproduce`; a tenth of the epochs if `quick`.

    Checkpoints are kept in `out`/rules: a run that was killed goes on, one that was finished is only loaded.
    """
    return {name: RECIPES[name].train(Path(out) / "rules", quick=quick) for name in sorted(experiment.rules)}
