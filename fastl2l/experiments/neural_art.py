"""Neural art and a look inside its rule (Andrychowicz et al. 2016, section 3.4 and appendix B).

Photographs are those of images/content in FASTL2L_DATA, of which the rule saw others; styles are in images/style there.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import ClassVar, NamedTuple

import torch
from PIL import Image
from rich.table import Table
from torch import Tensor

from fastl2l import baselines, files, images, inside
from fastl2l.baselines import Baseline
from fastl2l.evaluate import Build, builder, markdown
from fastl2l.experiments.experiment import (
    Budget,
    Experiment,
    Panel,
    Reproducible,
    check_rules,
    folder_name,
)
from fastl2l.processes import current
from fastl2l.progress import Progress
from fastl2l.rule_files import load_rule
from fastl2l.rules import Learned
from fastl2l.tasks import NeuralArt
from fastl2l.tasks.base import problem_seed
from fastl2l.tasks.neural_art import ArtProblem

RULE = "lstm-neural-art"
TRAINING_STYLE, OTHER_STYLE = "starry-night", "wassily-kandinsky-composition-viii-1923"
STEPS = 128
_SEED = 1
_QUICK_STEPS, _QUICK_TUNING = 32, 16
_QUICK = Budget(runs=2, tuning_runs=1, tuning_steps=_QUICK_TUNING, steps=_QUICK_STEPS, piece=1)


class _Setting(NamedTuple):
    name: str
    title: str
    style: str
    size: int
    full: Budget

    def task(self) -> NeuralArt:
        return NeuralArt(style=self.style, size=self.size, split="test")

    def tuned(self, name: str, quick: bool, note: Progress) -> Baseline:
        """A baseline at the rate that figure 8 has for it."""
        steps, runs = (_QUICK_TUNING, _QUICK.tuning_runs) if quick else (STEPS, self.full.tuning_runs)
        baseline = baselines.by_name(name)
        if baseline.lr != "tune":
            return baseline

        def report(lr: float, loss: float) -> None:
            note.note(f"tuning {name}: {lr:.3g} ends at {loss:.3g}")

        return baseline.with_lr(baselines.tune(self.task(), baseline, steps, runs=runs, report=report))


TRAINED = _Setting(
    "trained",
    "the training style, 64 x 64",
    TRAINING_STYLE,
    64,
    Budget(runs=20, tuning_runs=1, piece=5),
)
NEW = _Setting("new", "another style, 128 x 128", OTHER_STYLE, 128, Budget(runs=10, tuning_runs=1, piece=1))


def _panel(setting: _Setting) -> Panel:
    return Panel(
        setting.name,
        setting.title,
        partial(NeuralArt, style=setting.style, size=setting.size, split="test"),
        {"lstm": RULE, "rnnprop": "rnnprop-long"},
        steps=STEPS,
        baselines=(*baselines.DEFAULT, "lbfgs"),
        full=setting.full,
        quick=_QUICK,
    )


FIG8 = Experiment(
    "fig8",
    "Figure 8: neural art (L-BFGS by evaluations of the function)",
    "the LSTM is ahead of the tuned optimizers throughout, for the training style and, at twice the size, a new one.",
    [_panel(TRAINED), _panel(NEW)],
    quick=[TRAINED.name],
)


class _OfRule:
    """What experiments that show the one rule have in common; see `Reproducible`."""

    more_rules: ClassVar[bool] = False
    reserved: ClassVar[Sequence[str]] = ()

    @property
    def rules(self) -> set[str]:
        return {RULE}

    trained = rules

    def _rule(self, given: Mapping[str, Learned]) -> Learned:
        check_rules(self, given)  # type: ignore[arg-type]
        return given[RULE] if RULE in given else load_rule(RULE)


@dataclass(frozen=True)
class Sheet(_OfRule):
    """Figure 9: pictures that the rule painted, beside those of Adam and L-BFGS at the same cost.

    Args:
        photographs: of each setting.
    """

    photographs: int = 4
    name: ClassVar[str] = "fig9"
    title: ClassVar[str] = "Figure 9: pictures painted in 128 steps"

    def run(
        self, out: str | os.PathLike[str], *, rules: Mapping[str, Learned], quick: bool, progress: bool = True
    ) -> list[str | Table]:
        """See `Reproducible`."""
        rule, folder, processes = self._rule(rules), Path(out) / folder_name(self, quick), current()
        settings, count = ((TRAINED,), 1) if quick else ((TRAINED, NEW), self.photographs)
        steps = _QUICK_STEPS if quick else STEPS
        told: list[str | Table] = ["The paper: examples of styled pictures, of the training style and of a new one."]
        text = [f"# {self.title}", f"{steps} steps, or evaluations of L-BFGS; f a pixel of the picture shown."]
        with Progress(self.name, 3 * count * len(settings), shown=progress and not processes.rank) as shown:
            for setting in settings:
                optimizers = {
                    "lstm": builder("lstm", rule),
                    **{name: setting.tuned(name, quick, shown).build for name in ("adam", "lbfgs")},
                }
                pictures, rows = [], [["photograph", *optimizers]]
                for number in range(count):
                    problem = setting.task().sample(problem_seed(_SEED, "test", number))
                    row, losses = [images.picture(problem.content), _style(setting)], []
                    for name, build in optimizers.items():
                        picture, loss = _painted(problem, build, steps)
                        row.append(picture)
                        losses.append(f"{loss:.4g}")
                        shown.advance(f"{setting.name}: {name}")
                    pictures.append(row)
                    rows.append([str(number), *losses])
                captions = ["content", "style", *optimizers]
                sheet, place = images.sheet(pictures, captions), folder / f"{setting.name}.png"
                file = processes.first(partial(images.write, place, sheet))
                text += [f"## {setting.title}", f"![{setting.title}]({file.name})", markdown(rows)]
                told.append(f"{setting.title}: {file}")
        processes.first(lambda: files.write_text(folder / "table.md", "\n\n".join(text) + "\n"))
        return told


def _style(setting: _Setting) -> Image.Image:
    (style,) = setting.task().style  # type: ignore[misc]
    return images.square(images.read("style", style), setting.size)


def _painted(problem: ArtProblem, build: Build, steps: int) -> tuple[Image.Image, float]:
    """The picture of the lowest loss, and that loss a pixel."""
    best: list[tuple[float, Tensor]] = []

    def visit(loss: Tensor, theta: Tensor) -> None:
        if not best or loss.item() < best[0][0]:
            best[:] = [(loss.item(), theta.detach().clone())]

    baselines.evaluations(problem, build, steps + 1, visit)
    loss, theta = best[0]
    return images.picture(problem.pixels(theta)), loss / (problem.function.height * problem.function.width)


@dataclass(frozen=True)
class InsideFigure(_OfRule):
    """Figures 10 to 13: what the rule proposes to single coordinates, beside SGD and Adam on the same iterates.

    Args:
        name: what the command calls it.
        title: above it.
        claim: what the paper says.
        watched: which of the coordinates that are drawn at random: for updates by step some, for responses one.
        responses: whether proposed updates are drawn against the gradient, else by step.
    """

    name: str
    title: str
    claim: str
    watched: tuple[int, ...]
    responses: bool

    def run(
        self, out: str | os.PathLike[str], *, rules: Mapping[str, Learned], quick: bool, progress: bool = True
    ) -> list[str | Table]:
        """See `Reproducible`."""
        rule, task, processes = self._rule(rules), TRAINED.task(), current()
        folder, progress = Path(out) / folder_name(self, quick), progress and not processes.rank
        steps = _QUICK_STEPS if quick else STEPS
        with Progress("tuning", len(inside.OTHERS), shown=progress) as shown:
            rates = {}
            for name in inside.OTHERS:
                rates[name] = float(TRAINED.tuned(name, quick, shown).lr)
                shown.advance(name)
        random = torch.Generator().manual_seed(_SEED)
        drawn = torch.randperm(3 * task.size**2, generator=random)[: max(self.watched) + 1].tolist()
        chosen = [drawn[number] for number in self.watched]
        seen = inside.look(rule, task, steps=steps, coordinates=chosen, rates=rates, seed=_SEED, progress=progress)
        title = f"{self.title}\nneural art, {TRAINED.title}"

        def write() -> Path:
            seen.save(folder)
            if self.responses:
                return seen.plot_responses(chosen[0], folder / "figure.png", title=title)
            return seen.plot_updates(folder / "figure.png", title=title)

        file = processes.first(write)
        return [f"The paper: {self.claim}", f"figure: {file}"]


_RESPONSES = "the LSTM's response to a gradient is often step-like, as Adam's, and sometimes of the other direction."
EXPERIMENTS: tuple[Reproducible, ...] = (
    FIG8,
    Sheet(),
    InsideFigure(
        "fig10",
        "Figure 10: updates proposed to two coordinates",
        "the LSTM makes larger updates than SGD and Adam, with a kind of momentum of shorter memory.",
        (0, 1),
        responses=False,
    ),
    *(
        InsideFigure(
            f"fig{11 + number}",
            f"Figure {11 + number}: proposed update as a function of the gradient, coordinate {number + 1}",
            _RESPONSES,
            (number,),
            responses=True,
        )
        for number in range(3)
    ),
)
