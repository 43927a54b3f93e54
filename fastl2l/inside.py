"""A look inside a rule (Andrychowicz et al. 2016, appendix B): what it proposes, beside what SGD and Adam would have.

All three see the same gradients, those along the rule's own trajectory, so that they differ in nothing but in what they
make of them.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fastl2l import baselines, files, plots, reference
from fastl2l.evaluate import describe_optimizer, versions
from fastl2l.ops.layout import to_rows
from fastl2l.progress import Progress
from fastl2l.rules import Learned, Rule, rules_by_part
from fastl2l.tasks.base import Problem, Task, generator, integer, problem_seed
from fastl2l.trajectory import Trajectory

if TYPE_CHECKING:
    from matplotlib.axes import Axes

OTHERS = ("sgd", "adam")
RULE = "rule"
SATURATED = 0.9
"""Of |tanh c|: beyond it a cell hardly moves its unit any more."""
_BETAS, _EPSILON = (0.9, 0.999), 1e-8
"""Of torch's Adam."""
_GRID = 201
_LABELS = {"rule": "rule", "sgd": "SGD", "adam": "Adam"}


@dataclass
class Inside:
    """What was seen.

    Attributes:
        coordinates: numbers of the coordinates that were watched.
        gradients: [steps, coordinates], float64: what each step saw of them.
        updates: by "rule", "sgd" and "adam", [steps, coordinates]: what each proposed.
        response_steps: the steps at which responses were asked for.
        responses: by coordinate number and step: "gradient" [201], and by proposer what it would have proposed, had the
            gradient at this step been that one, after the same history.
        actual: by coordinate number and step, the gradient that there really was.
        sizes: by proposer, [steps]: root of the mean square over all coordinates of what it proposed.
        saturation: by layer, [steps]: the share of cells whose |tanh c| is above 0.9, over all coordinates; of rules by
            part, by part and layer.
        losses: [steps + 1].
        metadata: task, rule, rates, seed.
    """

    coordinates: list[int]
    gradients: Tensor
    updates: dict[str, Tensor]
    response_steps: list[int]
    responses: dict[tuple[int, int], dict[str, Tensor]]
    actual: dict[tuple[int, int], float]
    sizes: dict[str, Tensor]
    saturation: dict[str, Tensor]
    losses: Tensor
    metadata: dict[str, Any] = field(default_factory=dict)

    def save(self, folder: str | os.PathLike[str]) -> list[Path]:
        """Write updates.csv, responses.csv, state.csv and inside.json to `folder`, for other programs."""
        place = Path(folder)
        steps = range(len(self.gradients))
        updates = [
            (t, c, self.gradients[t, k].item(), *(self.updates[who][t, k].item() for who in self.updates))
            for k, c in enumerate(self.coordinates)
            for t in steps
        ]
        responses = [
            (c, t, *(curve[name][i].item() for name in ("gradient", *self.updates)))
            for (c, t), curve in self.responses.items()
            for i in range(_GRID)
        ]
        over_time = [
            (t, self.losses[t].item(), *(one[t].item() for one in (*self.sizes.values(), *self.saturation.values())))
            for t in steps
        ]
        sizes = [f"size of {who}" for who in self.sizes]
        return [
            _csv(place / "updates.csv", ["step", "coordinate", "gradient", *self.updates], updates),
            _csv(place / "responses.csv", ["coordinate", "step", "gradient", *self.updates], responses),
            _csv(
                place / "state.csv",
                ["step", "loss", *sizes, *(f"saturated {one}" for one in self.saturation)],
                over_time,
            ),
            files.write_json(place / "inside.json", files.plain(self.metadata)),
        ]

    def draw(self, folder: str | os.PathLike[str], *, title: str) -> list[Path]:
        """All figures: updates.png, state.png and for each coordinate responses-NUMBER.png."""
        place = Path(folder)
        return [
            self.plot_updates(place / "updates.png", title=f"{title}: proposed updates"),
            *(
                self.plot_responses(
                    one,
                    place / f"responses-{one}.png",
                    title=f"{title}: proposed update by gradient, coordinate {one:,}",
                )
                for one in self.coordinates
            ),
            self.plot_state(place / "state.png", title=f"{title}: state and updates"),
        ]

    def plot_updates(self, path: str | os.PathLike[str], *, title: str) -> Path:
        """Draw what was proposed to each coordinate by step (Figure 10), and return the path."""
        return plots.save_panels(
            path,
            [(f"coordinate {c:,}", partial(self._draw_updates, k=k)) for k, c in enumerate(self.coordinates)],
            title,
        )

    def plot_responses(self, coordinate: int, path: str | os.PathLike[str], *, title: str) -> Path:
        """Draw a coordinate's proposed updates against its gradient, a panel a step (Figures 11 to 13)."""
        panels = [(f"step {t}", partial(self._draw_responses, at=(coordinate, t))) for t in self.response_steps]
        return plots.save_panels(path, panels, title)

    def plot_state(self, path: str | os.PathLike[str], *, title: str) -> Path:
        """Draw the size of updates, and how much of the state is saturated, by step."""
        panels = [("size of updates", self._draw_sizes), ("saturated cells, |tanh c| > 0.9", self._draw_saturation)]
        return plots.save_panels(path, panels, title)

    def _draw_updates(self, axes: Axes, k: int) -> None:
        lines = [
            axes.plot(self.updates[who][:, k].numpy(), **_style(who), label=_LABELS[who])[0]
            for who in reversed(self.updates)
        ]
        axes.axhline(0, color="#999999", linewidth=0.7, zorder=1)
        axes.set(xlabel="step", ylabel="proposed update", xlim=(0, max(1, len(self.gradients) - 1)))
        axes.grid(axis="y")
        plots.legend_beneath(axes, lines[::-1])

    def _draw_responses(self, axes: Axes, at: tuple[int, int]) -> None:
        curve = self.responses[at]
        lines = [
            axes.plot(curve["gradient"].numpy(), curve[who].numpy(), **_style(who), label=_LABELS[who])[0]
            for who in reversed(self.updates)
        ]
        lines.insert(0, axes.axvline(self.actual[at], color="#999999", linewidth=1, linestyle=":", label="as it was"))
        axes.set(xlabel="gradient", ylabel="proposed update")
        axes.locator_params(axis="x", nbins=4)
        axes.grid(axis="y")
        plots.legend_beneath(axes, lines[::-1])

    def _draw_sizes(self, axes: Axes) -> None:
        lines = [
            axes.plot(size.numpy(), **_style(who), label=_LABELS[who])[0] for who, size in reversed(self.sizes.items())
        ]
        axes.set(xlabel="step", ylabel="root mean square", yscale="log", xlim=(0, max(1, len(self.gradients) - 1)))
        axes.grid(axis="y")
        plots.legend_beneath(axes, lines[::-1])

    def _draw_saturation(self, axes: Axes) -> None:
        lines = [axes.plot(share.numpy(), label=layer)[0] for layer, share in self.saturation.items()]
        axes.set(xlabel="step", ylabel="share", ylim=(0, 1), xlim=(0, max(1, len(self.gradients) - 1)))
        axes.grid(axis="y")
        plots.legend_beneath(axes, lines)


def look(
    rule: Learned,
    task: Task,
    *,
    steps: int = 100,
    coordinates: Sequence[int] | None = None,
    at: Sequence[int] | None = None,
    rates: Mapping[str, float] | None = None,
    seed: int = 1,
    progress: bool = False,
) -> Inside:
    """Follow a rule on one problem, and see what it proposes.

    Args:
        rule: a rule, or one for each part of the task's problems.
        task: gives the problem: number 0 of purpose "test" of `seed`.
        steps: of the trajectory.
        coordinates: of theta, to be watched: three at random by default.
        at: steps, from 0 on, at which to ask what other gradients would have brought: by default five,
            from early to late.
        rates: learning rates of "sgd" and "adam"; those that are left out are tuned on two problems of the task.
        seed: see `task`.
        progress: show how far it is.

    Raises:
        TypeError, ValueError: an argument is not as above, or the loss or an update is not finite at some step.
    """
    integer("steps", steps)
    integer("seed", seed, least=0)
    if not isinstance(task, Task):
        raise TypeError(f"task: expected a fastl2l Task, got {type(task).__name__}")
    for one in rules_by_part(rule).values():
        if one.config.coupled:
            raise ValueError(f"rule: expected one that goes coordinate by coordinate, to look at some, got {one}")
    problem = task.sample(problem_seed(seed, "test", 0))
    watched = _coordinates(coordinates, problem, seed)
    asked = _asked(at, steps)
    trajectory = Trajectory(problem, rule)
    lrs = _rates(rates or {}, task, steps, progress)
    seen = _Seen(trajectory, watched, asked, lrs)
    with Progress("following the rule", steps, shown=progress) as shown:
        for step in range(steps):
            seen.step(step)
            shown.advance(f"loss {trajectory.loss.item():.4g}")
    about = {"task": task.spec(), "rule": describe_optimizer(rule), "steps": steps, "seed": seed, "rates": lrs}
    return seen.inside(about | {"versions": versions()})


class _Seen:
    """What is seen on the way."""

    def __init__(
        self, trajectory: Trajectory, watched: list[int], response_steps: list[int], rates: Mapping[str, float]
    ) -> None:
        self._trajectory, self._watched, self._at, self._rates = trajectory, watched, response_steps, rates
        self._gradients: list[Tensor] = []
        self._updates: dict[str, list[Tensor]] = {who: [] for who in (RULE, *OTHERS)}
        self._sizes: dict[str, list[float]] = {who: [] for who in self._updates}
        self._saturation: dict[str, list[float]] = {}
        self._responses: dict[tuple[int, int], dict[str, Tensor]] = {}
        self._actual: dict[tuple[int, int], float] = {}
        self._losses = [trajectory.loss.item()]
        self._moments = torch.zeros(2, trajectory.theta.numel(), dtype=torch.float64)

    def step(self, step: int) -> None:
        """One step of the trajectory."""
        gradient = self._trajectory.gradient.to("cpu", torch.float64, copy=True)
        if step in self._at:
            self._ask(step, gradient)
        before = self._trajectory.theta.clone()
        self._moments = _moments(self._moments, gradient)
        proposed = {"sgd": -self._rates["sgd"] * gradient, "adam": _adam(self._moments, step, self._rates["adam"])}
        loss = self._trajectory.advance().item()
        proposed[RULE] = (self._trajectory.theta - before).cpu().double()
        if not math.isfinite(loss) or not proposed[RULE].isfinite().all():
            raise ValueError(f"rule: expected one that stays finite, got a loss of {loss} after step {step + 1}")
        self._losses.append(loss)
        self._gradients.append(gradient[self._watched])
        for who, update in proposed.items():
            self._updates[who].append(update[self._watched])
            self._sizes[who].append(update.square().mean().sqrt().item())
        for layer, share in _saturation(self._trajectory):
            self._saturation.setdefault(layer, []).append(share)

    def _ask(self, step: int, gradient: Tensor) -> None:
        """What each would propose to each watched coordinate, had it another gradient now."""
        for coordinate in self._watched:
            actual = gradient[coordinate].item()
            widest = max([abs(actual), *(abs(one[self._watched.index(coordinate)].item()) for one in self._gradients)])
            grid = torch.linspace(-1, 1, _GRID, dtype=torch.float64) * (1.5 * widest or 1.0)
            moments = _moments(self._moments[:, coordinate, None].expand(2, _GRID), grid)
            self._responses[coordinate, step] = {
                "gradient": grid,
                RULE: _response(*self._trajectory.at(coordinate), step, grid),
                "sgd": -self._rates["sgd"] * grid,
                "adam": _adam(moments, step, self._rates["adam"]),
            }
            self._actual[coordinate, step] = actual

    def inside(self, metadata: dict[str, Any]) -> Inside:
        return Inside(
            self._watched,
            torch.stack(self._gradients),
            {who: torch.stack(updates) for who, updates in self._updates.items()},
            self._at,
            self._responses,
            self._actual,
            {who: torch.tensor(sizes, dtype=torch.float64) for who, sizes in self._sizes.items()},
            {layer: torch.tensor(share, dtype=torch.float64) for layer, share in self._saturation.items()},
            torch.tensor(self._losses, dtype=torch.float64),
            metadata,
        )


def _response(rule: Rule, state: Tensor, step: int, grid: Tensor) -> Tensor:
    """Updates of a coordinate in this state [rows] to gradients [n] at a step, from 0: float64, by the reference."""
    weights = [weight.detach().cpu().double() for weight in rule.weights()]
    states = state.detach().cpu().double()[:, None].expand(-1, len(grid))
    update, _ = reference.step(grid, states, weights, rule.text, rule.config.output_scale)
    return update * rule.config.share(step + 1)


def _moments(before: Tensor, gradient: Tensor) -> Tensor:
    """Adam's means of the gradient and of its square, [2, n]."""
    return torch.stack(
        [
            beta * mean + (1 - beta) * new
            for beta, mean, new in zip(_BETAS, before, (gradient, gradient.square()), strict=True)
        ]
    )


def _adam(moments: Tensor, step: int, lr: float) -> Tensor:
    """The update that Adam makes of its means at this step, counted from 0."""
    m, v = (mean / (1 - beta ** (step + 1)) for mean, beta in zip(moments, _BETAS, strict=True))
    return -lr * m / (v.sqrt() + _EPSILON)


def _saturation(trajectory: Trajectory) -> Iterator[tuple[str, float]]:
    """The share of saturated cells of each layer."""
    numels = trajectory.numels()
    for (part, rule), state, numel in zip(trajectory.rules.items(), trajectory.states, numels, strict=True):
        config = rule.config
        rows = to_rows(state.detach(), numel)[: config.lstm_rows].view(config.num_layers, 2, config.hidden_size, -1)
        for layer in range(config.num_layers):
            share = (rows[layer, 1].tanh().abs() > SATURATED).double().mean().item()
            yield f"{part}, " * bool(part) + f"layer {layer + 1}", share


def _coordinates(given: Sequence[int] | None, problem: Problem, seed: int) -> list[int]:
    numel = problem.theta0.numel()
    if given is None:
        return sorted(generator(seed, "coordinates").choice(numel, size=min(3, numel), replace=False).tolist())
    found = [integer("coordinates", one, least=0) for one in given]
    if not found or len(set(found)) < len(found) or max(found) >= numel:
        raise ValueError(f"coordinates: expected some of 0 to {numel - 1}, each once, got {list(given)}")
    return found


def _asked(given: Sequence[int] | None, steps: int) -> list[int]:
    if given is None:
        return sorted({round(share * (steps - 1)) for share in (0.03, 0.1, 0.25, 0.5, 1.0)})
    found = [integer("at", one, least=0) for one in given]
    if not found or max(found) >= steps:
        raise ValueError(f"at: expected some of the steps 0 to {steps - 1}, got {list(given)}")
    return sorted(set(found))


def _rates(given: Mapping[str, float], task: Task, steps: int, progress: bool) -> dict[str, float]:
    for name in given:
        if name not in OTHERS:
            raise ValueError(f"rates: expected some of {', '.join(OTHERS)}, got {name!r}")
    fixed = {name: baselines.by_name(name, lr).lr for name, lr in given.items()}
    found = {}
    with Progress("tuning learning rates", len(OTHERS), shown=progress) as shown:
        for name in OTHERS:

            def report(lr: float, loss: float, name: str = name) -> None:
                shown.note(f"{name}: {lr:.3g} ends at {loss:.3g}")

            lr = fixed.get(name, "tune")
            found[name] = (
                baselines.tune(task, baselines.by_name(name), steps, runs=2, report=report) if lr == "tune" else lr
            )
            shown.advance(f"{name}: {found[name]:.3g}")
    return found


def _style(who: str) -> dict[str, Any]:
    colour = plots.COLOURS["lstm" if who == RULE else who]
    return {"color": colour, "linewidth": 2.2 if who == RULE else 1.4, "zorder": 4 if who == RULE else 3}


def _csv(path: Path, header: Sequence[str], rows: Sequence[Sequence[float]]) -> Path:
    lines = [",".join(header), *(",".join(f"{value:.9g}" for value in row) for row in rows)]
    return files.write_text(path, "\n".join(lines) + "\n")
