"""Networks of the kind that people bring, trained by rules and by tuned optimizers, at three horizons."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import torch
from rich.table import Table

from fastl2l import baselines, plots
from fastl2l.baselines import Baseline
from fastl2l.evaluate import builder, describe_optimizer, json_number, markdown
from fastl2l.experiments.experiment import check_rules, folder_name
from fastl2l.experiments.own_networks_losses import rate, tuned, whole_losses
from fastl2l.experiments.own_networks_problems import PROBLEMS
from fastl2l.files import write_record, write_text
from fastl2l.processes import current, versions
from fastl2l.progress import Progress
from fastl2l.rule_files import load_rule, shipped
from fastl2l.rules import Learned, Rule
from fastl2l.tasks.base import Task, problem_seed, value_and_grad

FORMAT = 1
"""Of results.json."""
RULES = ("rnnprop", "rnnprop-long", "lstm-mnist")
"""Shipped rules that are compared."""
TUNED = ("adam", "nag", "rmsprop")
DEFAULT = "adam-default"
"""What Adam is called at the rate that torch gives it."""
LEVEL = 1.01
"""What a ratio may be to count as level: many a problem ends where no optimizer gets any further."""


class Effort(NamedTuple):
    """How much is done for a horizon."""

    runs: int
    """Of each optimizer on each problem."""
    tuning_runs: int
    """Of each learning rate, on other networks and minibatches."""
    rates: Sequence[int] | None = None
    """Tried at first, as for `tuned`; None for the best at the horizon before and those half a decade beside it."""
    refined: bool = False
    """Whether rates a quarter of a decade beside the best are tried as well."""
    problems: Sequence[str] | None = None
    """Those that are run; None for all."""

    def describe(self, steps: int) -> str:
        """In a sentence."""
        rates = "the best rate of the horizon before, and half a decade beside it"
        if self.rates is not None:
            rates = f"{len(self.rates)} rates from {rate(self.rates[0]):g} to {rate(self.rates[-1]):g}"
        more = ", then a quarter of a decade beside the best" * self.refined
        starts = f"{self.runs} start{'s' * (self.runs > 1)}"
        return f"{steps:,} steps: mean of {starts}; tuned on {self.tuning_runs} other: {rates}, and on beyond{more}."


FULL = {
    100: Effort(runs=4, tuning_runs=2, rates=range(-16, 1, 2), refined=True),
    1000: Effort(runs=3, tuning_runs=2, rates=range(-16, 1, 2), refined=True),
    10_000: Effort(runs=2, tuning_runs=1),
}
QUICK = {
    100: Effort(runs=1, tuning_runs=1, rates=range(-16, 1, 4)),
    1000: Effort(runs=1, tuning_runs=1, problems=("logistic-cancer", "relu-wine", "tanh-diabetes")),
}


# The comparison


@dataclass(frozen=True)
class Result:
    """What became of a problem by a number of steps.

    Attributes:
        parameters: how many are trained.
        losses: on all examples, of each run, by the optimizer's name.
        tried: by the name of each that was tuned, the mean loss by learning rate.
        rates: the best of them.
    """

    problem: str
    parameters: int
    steps: int
    losses: Mapping[str, Sequence[float]]
    tried: Mapping[str, Mapping[float, float]]
    rates: Mapping[str, float]

    def mean(self, name: str) -> float:
        """Mean loss; inf if a run has diverged."""
        return sum(self.losses[name]) / len(self.losses[name])

    def ratio(self, name: str) -> float:
        """To the mean loss of tuned Adam; 1 where both are 0, or both diverged."""
        mine, adam = self.mean(name), self.mean("adam")
        if mine == adam:
            return 1.0
        return mine / adam if adam else math.inf


def compare(rules: Mapping[str, Rule], efforts: Mapping[int, Effort], progress: bool) -> list[Result]:
    """Every problem at every horizon, from the shortest to the longest."""
    work = {steps: _work(effort, len(rules)) * max(1, steps // 100) for steps, effort in efforts.items()}
    chosen = [(name, steps) for name in PROBLEMS for steps, effort in efforts.items() if name in _problems(effort)]
    results = []
    with Progress(
        "own-networks", sum(work[steps] for _, steps in chosen), shown=progress and not current().rank
    ) as shown:
        best: dict[str, Baseline] = {}
        for name, steps in chosen:
            shown.note(f"{name}, {steps:,} steps")
            result, best = _result(name, rules, steps, efforts[steps], best)
            results.append(result)
            shown.advance(f"{name}, {steps:,} steps", pieces=work[steps])
    return results


def _problems(effort: Effort) -> Sequence[str]:
    return list(PROBLEMS) if effort.problems is None else effort.problems


def _work(effort: Effort, rules: int) -> int:
    """About how many runs it is."""
    rates = 3 if effort.rates is None else len(effort.rates)
    return len(TUNED) * (rates + 2 * effort.refined) * effort.tuning_runs + (rules + len(TUNED) + 1) * effort.runs


def _result(
    name: str, rules: Mapping[str, Rule], steps: int, effort: Effort, before: Mapping[str, Baseline]
) -> tuple[Result, dict[str, Baseline]]:
    task, best, tried = PROBLEMS[name].task(name), {}, {}
    for baseline in TUNED:
        rates = effort.rates
        if rates is None:
            centre = round(4 * math.log10(float(before[baseline].lr)))
            rates = (centre - 2, centre, centre + 2)
        best[baseline], tried[baseline] = tuned(
            task, baselines.by_name(baseline), steps, rates, effort.tuning_runs, refined=effort.refined
        )
    optimizers: dict[str, Rule | Baseline] = {**rules, DEFAULT: baselines.Adam(1e-3), **best}
    losses = {name: whole_losses(task, optimizer, steps, range(effort.runs)) for name, optimizer in optimizers.items()}
    return Result(
        name, task.sample(0).theta0.numel(), steps, losses, tried, {one: float(best[one].lr) for one in TUNED}
    ), best


def step_times(task: Task, optimizers: Mapping[str, Rule | Baseline], steps: int) -> dict[str, float]:
    """Milliseconds that a step of each optimizer takes, and under "gradient" the loss and its gradient."""
    problem = task.sample(problem_seed(1, "test", 0))
    _, gradient = value_and_grad(problem, problem.theta0, 0)
    times = {"gradient": _milliseconds(lambda step: value_and_grad(problem, problem.theta0, step), steps)}
    for name, optimizer in optimizers.items():
        theta = problem.theta0.clone().requires_grad_()
        built = builder(name, optimizer)([theta])
        theta.grad = gradient
        times[name] = _milliseconds(lambda step, built=built: built.step(), steps)  # type: ignore[misc]
    return times


def _milliseconds(call: Callable[[int], object], steps: int) -> float:
    """The mean of `steps` calls, the best of three times."""
    best = math.inf
    for _ in range(3):
        start = time.perf_counter()
        for step in range(steps):
            call(step)
        best = min(best, 1000 * (time.perf_counter() - start) / steps)
    return best


# What is told of it


class OwnNetworks:
    """Shipped rules, and any others, on the problems of `own_networks_problems`; a `Reproducible`."""

    name: ClassVar[str] = "own-networks"
    title: ClassVar[str] = "Networks of one's own"
    claim: ClassVar[str] = (
        "Rules, which have no rate to tune, on networks that none of the shipped ones was trained on (two are on "
        "images of MNIST, which rnnprop and lstm-mnist have seen in another network); beside them Adam at its "
        "default rate, and Adam, NAG and RMSprop tuned for each problem and number of steps. Losses are means over "
        "all examples of a data set, ratios are to tuned Adam."
    )
    more_rules: ClassVar[bool] = True
    reserved: ClassVar[Sequence[str]] = (*TUNED, DEFAULT)

    @property
    def rules(self) -> set[str]:
        """Of those that are compared, the ones that this version has."""
        return set(RULES) & shipped().keys()

    trained = rules

    def run(
        self, out: str | os.PathLike[str], *, rules: Mapping[str, Learned], quick: bool, progress: bool = True
    ) -> list[str | Table]:
        """See `Reproducible`.

        Raises:
            ValueError: a rule is called as an optimizer that it is compared with, or there is one for each part.
        """
        check_rules(self, rules)
        mine = {name: load_rule(name) for name in RULES if name in self.rules - rules.keys()}
        compared, efforts = {**mine, **_single(rules)}, QUICK if quick else FULL
        results = compare(compared, efforts, progress)
        times = _all_times(results, compared, 20 if quick else 100)
        folder = Path(out) / folder_name(self, quick)
        groups: dict[str, dict[str, dict[str, float]]] = {}
        for result in results:
            ratios = {name: result.ratio(name) for name in result.losses if name != "adam"}
            groups.setdefault(f"{result.steps:,} steps", {})[result.problem] = ratios
        title = self.title + ", a quick look" * quick
        told = [self.claim, *(effort.describe(steps) for steps, effort in efforts.items())]
        summary = _summary(results, [DEFAULT, *compared])

        def write() -> None:
            xlabel = "loss, ratio to tuned Adam's"
            plots.plot_ratios(groups, folder / "figure.png", title=title, xlabel=xlabel, learned=compared)
            write_text(folder / "table.md", _page(title, told, summary, results, times))
            write_record(folder / "results.json", _record(results, times, compared))

        current().first(write)
        return [*told, *_sentences(summary, compared)]


def _single(rules: Mapping[str, Learned]) -> dict[str, Rule]:
    """`rules`, if each of them is one for all of a network."""
    single = {}
    for name, rule in rules.items():
        if not isinstance(rule, Rule):
            raise ValueError(f"rules[{name!r}]: expected one rule for all of a network, got {', '.join(rule)}")
        single[name] = rule
    return single


Rows = list[list[str]]
_COLUMNS = (
    f"The mean ratio is the geometric one. The other columns say on how many problems an optimizer is level with tuned "
    f"Adam (at most {LEVEL:g} times its loss), below it, diverged, and below others."
)


def _all_times(results: Sequence[Result], rules: Mapping[str, Rule], steps: int) -> dict[str, dict[str, float]]:
    """Of each problem that was run, by optimizer."""
    optimizers: dict[str, Rule | Baseline] = {**rules, **{name: baselines.by_name(name, 1e-3) for name in TUNED}}
    names = dict.fromkeys(result.problem for result in results)
    return {name: step_times(PROBLEMS[name].task(name), optimizers, steps) for name in names}


def _summary(results: Sequence[Result], rivals: Sequence[str]) -> Rows:
    """For each optimizer and horizon, how it compares with tuned Adam, and on how many problems it is below others."""
    rows = [["optimizer", "steps", "problems", "mean ratio", "highest", "level", "below", "diverged"]]
    rows[0] += [f"below {rival}" for rival in rivals]
    for name in results[0].losses:
        for steps in dict.fromkeys(result.steps for result in results):
            here = [result for result in results if result.steps == steps]
            ratios = [result.ratio(name) for result in here]
            mean = math.exp(sum(math.log(ratio) if ratio else -math.inf for ratio in ratios) / len(ratios))
            counts = [
                sum(ratio <= LEVEL for ratio in ratios),
                sum(ratio <= 1 for ratio in ratios),
                sum(result.mean(name) == math.inf for result in here),
                *(sum(result.mean(name) < result.mean(rival) for result in here) for rival in rivals),
            ]
            rows.append([name, f"{steps:,}", str(len(here)), f"{mean:.3g}", f"{max(ratios):.3g}", *map(str, counts)])
    return [row for row in rows if row[0] != "adam"]


def _sentences(summary: Rows, rules: Collection[str]) -> list[str]:
    """What the summary says of rules."""
    header, *rows = summary
    sentences = []
    for name, steps, problems, *numbers in rows:
        if name in rules:
            told = ", ".join(f"{what} {number}" for what, number in zip(header[3:], numbers, strict=True))
            sentences.append(f"{name}, {steps} steps, {problems} problems: {told}")
    return sentences


def _page(
    title: str, told: Sequence[str], summary: Rows, results: Sequence[Result], times: Mapping[str, Mapping[str, float]]
) -> str:
    parts = [
        f"# {title}",
        *told,
        "## Summary",
        _COLUMNS,
        markdown(summary),
        "## Losses",
        "Of tuned Adam the loss and its rate, of the others the ratio to it.",
        markdown(_ratios(results)),
        "## Problems",
        markdown([["problem", "what it is"], *([name, one.about] for name, one in PROBLEMS.items())]),
        "## Time",
        f"Milliseconds of a step, beside those of the loss and its gradient; threads: {torch.get_num_threads()}.",
        markdown(_times(results, times)),
    ]
    return "\n\n".join(parts) + "\n"


def _ratios(results: Sequence[Result]) -> Rows:
    others = [name for name in results[0].losses if name != "adam"]
    rows = [["problem", "steps", "adam", "rate", *others]]
    for result in results:
        rows.append([result.problem, f"{result.steps:,}", f"{result.mean('adam'):.4g}", f"{result.rates['adam']:.2g}"])
        rows[-1] += ["diverged" if math.isinf(result.ratio(name)) else f"{result.ratio(name):.3g}" for name in others]
    return rows


def _times(results: Sequence[Result], times: Mapping[str, Mapping[str, float]]) -> Rows:
    header = ["problem", "parameters", *next(iter(times.values()))]
    sizes = {result.problem: f"{result.parameters:,}" for result in results}
    return [header, *([name, sizes[name], *(f"{ms:.3f}" for ms in row.values())] for name, row in times.items())]


def _record(
    results: Sequence[Result], times: Mapping[str, Mapping[str, float]], rules: Mapping[str, Rule]
) -> dict[str, Any]:
    return {
        "format": FORMAT,
        "versions": versions(),
        "rules": {name: describe_optimizer(rule) for name, rule in rules.items()},
        "milliseconds": times,
        "results": [
            {
                "problem": result.problem,
                "parameters": result.parameters,
                "steps": result.steps,
                "losses": {name: list(map(json_number, losses)) for name, losses in result.losses.items()},
                "rates": result.rates,
                "tried": {
                    name: {f"{rate:g}": json_number(loss) for rate, loss in tried.items()}
                    for name, tried in result.tried.items()
                },
            }
            for result in results
        ],
    }
