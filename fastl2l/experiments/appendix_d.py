"""The rules of Andrychowicz et al. 2016, appendix D, whose coordinates talk, beside one whose coordinates do not.

Each run is one function. The mean of final losses is that of a few functions that are hard, so the median, the 99th
percentile and how many diverged are told with it.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, NamedTuple

import torch
from rich.table import Table
from torch import Tensor

from fastl2l import baselines, files, plots
from fastl2l.baselines import Baseline
from fastl2l.evaluate import Curves, markdown
from fastl2l.experiments import functions, losses
from fastl2l.experiments.experiment import check_rules, folder_name
from fastl2l.experiments.recipes import RECIPES, SEEDS
from fastl2l.processes import current
from fastl2l.progress import Progress
from fastl2l.rule_files import load_rule, shipped
from fastl2l.rules import Learned, Rule
from fastl2l.tasks import MNIST, IllConditioned, Quadratic, Spiked, Task
from fastl2l.tasks.base import problem_seed
from fastl2l.trajectory import Trajectory

KINDS = {
    "lstm": "lstm",
    "lstm+gac": "gac",
    "ntm, paper": "ntm-paper",
    "ntm": "ntm",
    "ntm, 5 pairs": "ntm-5-pairs",
    "ntm, 20 pairs": "ntm-20-pairs",
}
"""What is compared, each trained on 400 trajectories: names of recipes, without task and seed."""
LONGER = {"lstm, longer": "lstm-quadratic", "ntm, longer": "ntm-quadratic"}
"""The same of as many more trajectories as their recipes have: those that come with fastl2l."""
WITHOUT_MEMORY = {label: KINDS[label] for label in ("lstm", "lstm+gac")}
BASELINES = ("adam", "lbfgs", "bfgs")
STEPS, SIDE_BY_SIDE, PIECE = 100, 100, 10
REMEMBERED = (0, 20, 50, 100)
"""Steps after which a memory is drawn."""


class Setting(NamedTuple):
    """A kind of functions, and the optimizers that are shown on it.

    Attributes:
        title: of its figure and table.
        task: what is minimized.
        trained_on: the middle of its rules' names.
        longer: further rules, which have one seed.
        kinds: of rules; a part of `KINDS`.
        baselines: names.
        alone: whether a problem is one function, and its last loss that of a minibatch; else they are many.
    """

    title: str
    task: Callable[[], Task]
    trained_on: str
    longer: Mapping[str, str] = {}
    kinds: Mapping[str, str] = KINDS
    baselines: Sequence[str] = BASELINES
    alone: bool = False

    def rules(self) -> dict[str, dict[int, str]]:
        """Names of rules by seed, by what they are called."""
        named = {label: {0: name} for label, name in self.longer.items()}
        return named | {
            label: {seed: f"{name}-{self.trained_on}-{seed}" for seed in SEEDS} for label, name in self.kinds.items()
        }


SETTINGS = {
    "quadratic": Setting("quadratics, 10 coordinates", lambda: Quadratic(batch=SIDE_BY_SIDE), "quadratic", LONGER),
    "spiked": Setting(
        "quadratics, gradients 100 times too large at a tenth of the steps",
        lambda: Spiked(Quadratic(batch=SIDE_BY_SIDE)),
        "spiked",
    ),
    "ill-conditioned": Setting(
        "ill-conditioned quadratics, 10 coordinates", lambda: IllConditioned(batch=SIDE_BY_SIDE), "ill-conditioned"
    ),
    "ill-conditioned-50": Setting(
        "ill-conditioned quadratics, 50 coordinates",
        lambda: IllConditioned(dim=50, batch=SIDE_BY_SIDE),
        "ill-conditioned",
    ),
    "mnist": Setting(
        "MLP 784-20-10 on MNIST", MNIST, "on-mnist", kinds=WITHOUT_MEMORY, baselines=("adam",), alone=True
    ),
}


class Effort(NamedTuple):
    """How much is done."""

    problems: int
    """Of 100 functions each."""
    tuning_problems: int
    alone: int
    """Functions, of settings whose problems are one each."""

    def pieces(self, setting: Setting) -> int:
        """What an optimizer is followed in."""
        return self.alone // PIECE if setting.alone else self.problems


FULL, QUICK = Effort(20, 2, 100), Effort(1, 1, 10)


@dataclass(frozen=True)
class AppendixD:
    """What has been trained of it: rules that do not come with fastl2l are shown where they are given."""

    name: str = "appendix-d"
    title: str = "Appendix D: rules whose coordinates talk"
    more_rules: ClassVar[bool] = True
    reserved: ClassVar[Sequence[str]] = BASELINES

    @property
    def rules(self) -> set[str]:
        """Of those that are compared, the ones that this version has."""
        return self.trained & shipped().keys()

    @property
    def trained(self) -> set[str]:
        """All that are compared."""
        return {name for setting in SETTINGS.values() for names in setting.rules().values() for name in names.values()}

    def run(
        self, out: str | os.PathLike[str], *, rules: Mapping[str, Learned], quick: bool, progress: bool = True
    ) -> list[str | Table]:
        """See `Reproducible`."""
        check_rules(self, rules)
        if unknown := sorted(rules.keys() - self.trained):
            raise ValueError(f"rules: expected some of {', '.join(sorted(self.trained))}, got {', '.join(unknown)}")
        for name, rule in rules.items():
            _check_kind(name, rule)
        rules = {name: load_rule(name) for name in self.rules - rules.keys()} | dict(rules)
        effort, folder, processes = QUICK if quick else FULL, Path(out) / folder_name(self, quick), current()
        work = {name: compared for name, setting in SETTINGS.items() if (compared := _compared(setting, rules))}
        pieces = sum(
            effort.pieces(SETTINGS[name]) * len(learned)
            for name, compared in work.items()
            for learned in compared.values()
        )
        with Progress(self.name, pieces, shown=progress and not processes.rank) as shown:
            found = {name: _curves(SETTINGS[name], compared, effort, shown) for name, compared in work.items()}
        processes.first(lambda: _write(folder, self.title, found, rules))
        told: list[str | Table] = []
        for name, of_seeds in found.items():
            told += [SETTINGS[name].title, markdown(distribution(of_seeds))]
        return told


def _check_kind(name: str, rule: Learned) -> None:
    """Raise a ValueError unless the rule is of the kind that its name says."""
    recipe = RECIPES[name]
    expected = f"{recipe.kind} {recipe.made_of.get('memory', '').partition(',')[0]}".rstrip()
    memory = rule.config.memory if isinstance(rule, Rule) else None
    got = f"{rule.kind} {memory.kind if memory else ''}".rstrip() if isinstance(rule, Rule) else "rules by part"
    if got != expected:
        raise ValueError(f"rule: expected {name} to be {expected}, got {got}")


def _compared(setting: Setting, rules: Mapping[str, Learned]) -> dict[int, dict[str, Learned | Baseline]]:
    """By seed of training; the first that has rules has what has no seeds as well."""
    found: dict[int, dict[str, Learned | Baseline]] = {}
    for seed in SEEDS:
        learned: dict[str, Learned | Baseline] = {
            label: rules[names[seed]] for label, names in setting.rules().items() if names.get(seed) in rules
        }
        if learned and not found:
            learned |= {name: baselines.by_name(name) for name in setting.baselines}
        if learned:
            found[seed] = learned
    return found


def _curves(
    setting: Setting, compared: Mapping[int, Mapping[str, Learned | Baseline]], effort: Effort, shown: Progress
) -> dict[int, Curves]:
    follow = _alone if setting.alone else _side_by_side
    return {seed: follow(setting.task(), optimizers, effort, shown) for seed, optimizers in compared.items()}


def _side_by_side(task: Task, optimizers: Mapping[str, Learned | Baseline], effort: Effort, shown: Progress) -> Curves:
    shown.note(f"{task.name}: tuning")
    tuned = {name: _tuned(task, optimizer, effort) for name, optimizer in optimizers.items()}
    return functions.curves(task, tuned, steps=STEPS, problems=effort.problems, advance=shown.advance)


def _tuned(task: Task, optimizer: Learned | Baseline, effort: Effort) -> Learned | Baseline:
    if not isinstance(optimizer, Baseline) or optimizer.lr != "tune":
        return optimizer
    return optimizer.with_lr(baselines.tune(task, optimizer, STEPS, runs=effort.tuning_problems))


def _alone(task: Task, optimizers: Mapping[str, Learned | Baseline], effort: Effort, shown: Progress) -> Curves:
    runs, tuning = effort.alone, max(1, effort.alone // 5)
    return losses.curves(
        task,
        optimizers,
        steps=STEPS,
        runs=runs,
        tuning_runs=tuning,
        piece=PIECE,
        note=shown.note,
        advance=shown.advance,
    )


# What is told of it


def distribution(of_seeds: Mapping[int, Curves]) -> list[list[str]]:
    """Of final losses over functions, and seeds of training, a row for each optimizer, the lowest median first.

    What diverged counts as inf.
    """
    rows = []
    for name in dict.fromkeys(name for curves in of_seeds.values() for name in curves.losses):
        finals = [curves.losses[name][:, -1] for curves in of_seeds.values() if name in curves.losses]
        final = torch.cat(finals)
        middle, late = (final.quantile(share, interpolation="higher").item() for share in (0.5, 0.99))
        numbers = [f"{number:.3g}" for number in (final.mean(), middle, late)]
        means = ", ".join(f"{one.mean():.3g}" for one in finals) if len(finals) > 1 else ""
        rows.append((middle, [name, *numbers, f"{final.isinf().double().mean().item():.2%}", means]))
    header = ["optimizer", "mean", "median", "99th percentile", "diverged", "mean of each seed"]
    return [header, *(row for _, row in sorted(rows))]


def _write(
    folder: Path,
    title: str,
    found: Mapping[str, Mapping[int, Curves]],
    rules: Mapping[str, Learned],
) -> None:
    panels = {}
    for name, of_seeds in found.items():
        one = of_seeds[min(of_seeds)]
        panels[f"{SETTINGS[name].title}\n{one.runs:,} functions, rules of seed {min(of_seeds)}"] = one
    for name, of_seeds in found.items():
        for seed, curves in of_seeds.items():
            curves.save(folder / f"{name}-{seed}")
    if panels:
        plots.plot_panels(panels, folder / "figure.png", title=title)
    parts = [
        f"# {title}",
        "Final losses, function by function, after 100 steps (of lbfgs and bfgs: evaluations; on MNIST: a minibatch).",
    ]
    for name, of_seeds in found.items():
        one = of_seeds[min(of_seeds)]
        parts += [f"## {SETTINGS[name].title}", f"{one.runs:,} functions.", markdown(distribution(of_seeds))]
    if "ntm-quadratic" in rules:
        remembered = memories(rules["ntm-quadratic"])
        parts += ["## What ntm-quadratic remembers", markdown(cosines(remembered))]
        title = "What ntm-quadratic remembers of three functions; each picture has its own scale"
        plots.plot_matrices(_pictures(remembered), folder / "memory.png", title=title)
    files.write_text(folder / "table.md", "\n\n".join(parts) + "\n")


class Memories(NamedTuple):
    """Of test functions, float64 [functions, 10, 10].

    Attributes:
        after: M after so many steps.
        inverse: the inverse Hessians.
        conditions: of the Hessians, [functions].
    """

    after: dict[int, Tensor]
    inverse: Tensor
    conditions: Tensor

    def cosine(self, step: int) -> Tensor:
        """Of M with the inverse Hessian, [functions]: 1 where one is a multiple of the other."""
        memory = self.after[step]
        return (memory * self.inverse).sum((1, 2)) / memory.norm(dim=(1, 2)) / self.inverse.norm(dim=(1, 2))


def memories(rule: Learned) -> Memories:
    """What the rule, which has a matrix, remembers of the first test functions."""
    problem = Quadratic(batch=SIDE_BY_SIDE).sample(problem_seed(1, "test", 0))
    hessian = 2 * problem.w.double().mT @ problem.w.double()
    trajectory, after = Trajectory(problem, rule), dict[int, Tensor]()
    for step in range(max(REMEMBERED) + 1):
        if step in REMEMBERED:
            after[step] = trajectory.state.memory.double().mT.clone()
        trajectory.advance()
    return Memories(after, torch.linalg.inv(hessian), torch.linalg.cond(hessian))


def cosines(memories: Memories) -> list[list[str]]:
    """How the cosines with inverse Hessians are distributed over functions, a row for each step."""
    shares = (0.05, 0.25, 0.5, 0.75, 0.95)
    rows = [["cosine of M with the inverse Hessian", *(f"{share:.0%} are below" for share in shares)]]
    for step in memories.after:
        quantiles = (memories.cosine(step).quantile(share).item() for share in shares)
        rows.append([f"after {step} steps", *(f"{quantile:.2f}" for quantile in quantiles)])
    return rows


def _pictures(memories: Memories, number: int = 3) -> dict[str, dict[str, Tensor]]:
    """Of the first functions a row each; above M is its cosine."""
    found = {}
    for index in range(number):
        row = {
            f"M after {step} steps ({memories.cosine(step)[index]:.2f})": memory[index]
            for step, memory in memories.after.items()
        }
        found[f"condition {memories.conditions[index]:.0f}"] = row | {"inverse Hessian": memories.inverse[index]}
    return found
