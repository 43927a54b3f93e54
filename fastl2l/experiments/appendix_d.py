"""The rules of Andrychowicz et al. 2016, appendix D, whose coordinates talk, beside one whose coordinates do not.

The mean of final losses is that of a few functions that are hard, so the median, the 99th percentile and how many
diverged are told with it: each run is one function.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import ClassVar

from rich.table import Table

from fastl2l import files
from fastl2l.evaluate import Curves, markdown
from fastl2l.experiments.experiment import Budget, Experiment, Panel, folder_name, reproduce
from fastl2l.processes import current
from fastl2l.rules import Learned
from fastl2l.tasks import MNIST, IllConditioned, Quadratic, Task

OF_QUADRATICS = {
    "lstm": "lstm-quadratic",
    "gac": "gac-quadratic",
    "ntm, paper": "ntm-paper-quadratic",
    "ntm": "ntm-quadratic",
    "ntm, 5 pairs": "ntm-pairs-quadratic",
}
OF_ILL_CONDITIONED = {label: name.replace("quadratic", "ill-conditioned") for label, name in OF_QUADRATICS.items()}
FULL, QUICK = Budget(runs=2000, tuning_runs=200, piece=100), Budget(runs=20, tuning_runs=5)
"""In functions, of which each is a problem."""
BASELINES = ("adam", "lbfgs")


def _panel(name: str, title: str, task: Callable[[], Task], rules: Mapping[str, str]) -> Panel:
    return Panel(name, title, task, rules, baselines=BASELINES, full=FULL, quick=QUICK)


@dataclass(frozen=True)
class AppendixD:
    """As an `Experiment`, and how final losses are distributed over functions."""

    name: str = "appendix-d"
    title: str = "Appendix D: rules whose coordinates talk"
    more_rules: ClassVar[bool] = False
    reserved: ClassVar[Sequence[str]] = ()

    @property
    def experiment(self) -> Experiment:
        """What is run."""
        ill = "ill-conditioned quadratics, {} coordinates"
        return Experiment(
            self.name,
            self.title,
            "such rules can carry out L2 clipping and BFGS; no numbers are given.",
            [
                _panel("quadratic", "quadratics, 10 coordinates", partial(Quadratic, batch=1), OF_QUADRATICS),
                _panel("ill-10", ill.format(10), partial(IllConditioned, batch=1), OF_ILL_CONDITIONED),
                _panel("ill-50", ill.format(50), partial(IllConditioned, dim=50, batch=1), OF_ILL_CONDITIONED),
                Panel("mnist", "MLP 784-20-10 on MNIST", MNIST, {"lstm": "lstm-mnist-1", "gac": "gac-mnist"}),
            ],
            quick=["quadratic", "ill-10"],
        )

    @property
    def rules(self) -> set[str]:
        """See `Reproducible`."""
        return self.experiment.rules

    def run(
        self, out: str | os.PathLike[str], *, rules: Mapping[str, Learned], quick: bool, progress: bool = True
    ) -> list[str | Table]:
        """See `Reproducible`."""
        experiment, told = self.experiment, list[str | Table]()
        found = reproduce(experiment, out, rules=rules, quick=quick, progress=progress)
        tables = {panel: distribution(curves) for panel, curves in found.items()}
        for panel, curves in found.items():
            told += [curves.table(panel), markdown(tables[panel])]
        text = "\n\n".join(f"## {panel}\n\n{markdown(rows)}" for panel, rows in tables.items())
        path = Path(out) / folder_name(experiment, quick) / "distribution.md"
        current().first(lambda: files.write_text(path, f"# Final losses, run by run\n\n{text}\n"))
        return told


def distribution(curves: Curves) -> list[list[str]]:
    """Of final losses over runs, a row for each optimizer, the lowest median first; what diverged counts as inf."""
    rows = []
    for name, losses in curves.losses.items():
        final = losses[:, -1]
        middle, late = (final.quantile(share, interpolation="higher").item() for share in (0.5, 0.99))
        share = curves.diverged(name) / curves.runs
        rows.append((middle, [name, *(f"{number:.3g}" for number in (final.mean(), middle, late)), f"{share:.2%}"]))
    header = ["optimizer", "mean", "median", "99th percentile", "diverged"]
    return [header, *(row for _, row in sorted(rows))]
