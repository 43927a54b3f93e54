"""Figures of curves, in the manner of Figure 4 of Andrychowicz et al. 2016: learned optimizers solid, baselines dashed.

Nothing here touches pyplot or leaves a setting of matplotlib changed.
"""

from __future__ import annotations

import io
import math
import os
import textwrap
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from functools import partial
from itertools import cycle
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fastl2l.evaluate import Curves, with_half_width
from fastl2l.files import write_bytes
from fastl2l.meta import Epoch

if TYPE_CHECKING:  # matplotlib is imported where something is drawn: most commands draw nothing, or late
    from matplotlib.artist import Artist
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis
    from matplotlib.container import Container

# Okabe and Ito's colours, which people with any colour vision can tell apart. A name keeps its colour in every figure.
COLOURS = {
    "lstm": "#D55E00",
    "rnnprop": "#CC79A7",
    "adam": "#0072B2",
    "adam-default": "#56B4E9",
    "nag": "#009E73",
    "rmsprop": "#E69F00",
    "sgd": "#7F7F7F",
    "lstm-mnist": "#D55E00",
    "rnnprop-long": "#882255",
    "momentum": "#44AA99",
    "adagrad": "#999933",
    "adadelta": "#332288",
    "lstm, longer": "#8C3D00",
    "lstm+gac": "#E377C2",
    "ntm": "#2CA02C",
    "ntm, longer": "#004D1A",
    "ntm, paper": "#999933",
    "ntm, 5 pairs": "#88CCEE",
    "ntm, 20 pairs": "#332288",
    "bfgs": "#404040",
    "lbfgs": "#7F7F7F",
}
_OTHER_COLOURS = ("#000000", "#117733", "#AA4499", "#661100", "#DDAA33")
_MARKERS = {"adam-default": "D", "nag": "^", "rmsprop": "s"}
_DASHES = {"adam": (6, 2), "nag": (3, 1.5), "rmsprop": (7, 2, 1.5, 2), "sgd": (1.5, 1.5)}
_OTHER_DASHES = (4, 2)

_FORMATS: dict[str, dict[str, Any]] = {  # without dates: the same curves give the same file
    "png": {"dpi": 200},
    "svg": {"metadata": {"Date": None}},
    "pdf": {"metadata": {"CreationDate": None}},
}
_MOST_POINTS, _STRETCHES = 1001, 200
"""A curve of more points is drawn by means over so many stretches: minibatches make a smear of it otherwise."""
_PANEL_HEIGHT = 3.85  # inches of axes and their scales, without titles and legend
_STYLE: dict[Any, Any] = {
    "font.family": "DejaVu Sans",
    "font.size": 9,
    "axes.titlesize": 10.5,
    "axes.titlelocation": "left",
    "axes.titlepad": 10,
    "axes.titlecolor": "#222222",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#444444",
    "axes.labelcolor": "#222222",
    "axes.linewidth": 0.8,
    "xtick.color": "#444444",
    "ytick.color": "#444444",
    "grid.color": "#E6E6E6",
    "grid.linewidth": 0.7,
    "legend.frameon": False,
    "legend.borderpad": 0,
    "legend.handlelength": 3,
    "legend.columnspacing": 1.5,
    "pdf.fonttype": 42,
    "svg.hashsalt": "fastl2l",
}


def plot_curves(curves: Curves, path: str | os.PathLike[str], *, title: str | None = None, log: bool = True) -> Path:
    """Draw the mean loss by step of every optimizer, with its 95% interval, and return the path.

    Args:
        curves: what `evaluate` returned, or `Curves.load` read.
        path: where to; its suffix (.png, .svg or .pdf) says in which format. Written whole or not at all.
        title: above the figure; by default the task and the number of problems.
        log: logarithmic loss axis. Losses that are not all positive get a linear one.

    Raises:
        TypeError, ValueError: curves is none, or the suffix is another.
    """
    if not isinstance(curves, Curves):
        raise TypeError(f"curves: expected what fastl2l.evaluate returns, got {type(curves).__name__}")
    return save_panels(path, [(_title(curves) if title is None else title, lambda axes: _draw(axes, curves, log))])


def plot_panels(panels: Mapping[str, Curves], path: str | os.PathLike[str], *, title: str) -> Path:
    """Draw several curves as by `plot_curves`, side by side, each under its name, and return the path.

    Args:
        panels: curves by the title of their panel, not empty.
        path, title: as for `plot_curves`.

    Raises:
        ValueError: there is no panel, or the suffix is another.
    """
    return save_panels(
        path, [(name, partial(_draw, curves=curves, log=True)) for name, curves in panels.items()], title
    )


def plot_final_losses(
    groups: Mapping[str, Mapping[int, Curves]],
    path: str | os.PathLike[str],
    *,
    title: str,
    xlabel: str,
    marked: int | None = None,
    log_x: bool = False,
) -> Path:
    """Draw final losses with their intervals against a number, in the manner of Figure 6 of Andrychowicz et al. 2016.

    Args:
        groups: by the title of a panel, curves by the number that they are for.
        path, title: as for `plot_curves`.
        xlabel: what the number is.
        marked: the number that the rule was trained with, if any: a vertical line in the first panel.
        log_x: logarithmic axis of the numbers.

    Raises:
        ValueError: there is no group, or the suffix is another.
    """
    finals = [curves.final(name)[0] for group in groups.values() for curves in group.values() for name in curves.losses]

    def draw(axes: Axes, group: Mapping[int, Curves], first: bool) -> None:
        sample = next(iter(group.values()))
        colours = dict(_colours(sample.losses))
        bars = []
        for name in reversed(sample.ranking()):
            learned = sample.kind(name) == "learned"
            ends = [curves.final(name) if not curves.diverged(name) else (math.nan, 0.0) for curves in group.values()]
            means, halves = zip(*ends, strict=True)
            bar = axes.errorbar(
                list(group),
                means,
                yerr=halves,
                color=colours[name],
                label=name,
                linewidth=2.4 if learned else 1.5,
                marker="o",
                markersize=4,
                capsize=2,
                zorder=4 if learned else 3,
            )
            if not learned:
                bar.lines[0].set_dashes(_DASHES.get(name.lower(), _OTHER_DASHES))
            bars.append(bar)
        if first and marked is not None:
            axes.axvline(marked, color="#999999", linewidth=1, linestyle=":", zorder=1)
        if log_x:
            axes.set_xscale("log")
            axes.minorticks_off()
        axes.set(xlabel=xlabel, ylabel=_final_loss(sample))
        axes.set_xticks(list(group), [f"{x:,}" for x in group])
        _loss_axis(axes, finals)
        legend_beneath(axes, bars[::-1])

    panels = [
        (name, partial(draw, group=group, first=number == 0)) for number, (name, group) in enumerate(groups.items())
    ]
    return save_panels(path, panels, title)


def plot_rates(panels: Mapping[str, Curves], path: str | os.PathLike[str], *, title: str) -> Path:
    """Draw final losses of baselines against their learning rates, those of learned optimizers as lines across.

    What a rate does not bring below the start is left out.

    Args:
        panels: by title, curves in which each baseline was run at many rates; not empty.
        path, title: as for `plot_curves`.

    Raises:
        ValueError: there is no panel, or the suffix is another.
    """

    def draw(axes: Axes, curves: Curves) -> None:
        about = curves.metadata["optimizers"]
        learned = [name for name in curves.losses if curves.kind(name) == "learned"]
        baselines: dict[str, list[tuple[float, float]]] = {}
        for name in curves.losses.keys() - set(learned):
            baselines.setdefault(about[name]["optimizer"], []).append((about[name]["lr"], curves.final(name)[0]))
        colours = dict(_colours([*learned, *baselines]))
        start = max(curves.mean(name)[0].item() for name in curves.losses)
        lines, shown = [], []
        for name in learned:
            mean, half = curves.final(name)
            label = f"{name}  {with_half_width(mean, half)}"
            lines.append(axes.axhline(mean, color=colours[name], linewidth=2.4, label=label, zorder=4))
            if math.isfinite(half):
                axes.axhspan(mean - half, mean + half, color=colours[name], alpha=0.16, linewidth=0, zorder=2)
            shown.append(mean)
        for name in sorted(baselines):
            rates, finals = zip(*sorted(baselines[name]), strict=True)
            below = [loss if loss <= start else math.nan for loss in finals]
            style: dict[str, Any] = {"color": colours[name], "linewidth": 1.5, "marker": "o", "markersize": 3.5}
            (line,) = axes.plot(rates, below, label=name, **style)
            line.set_dashes(_DASHES.get(name, _OTHER_DASHES))
            lines.append(line)
            shown += below
        axes.set(xlabel="learning rate of the baselines", ylabel=_final_loss(curves), xscale="log")
        _loss_axis(axes, shown)
        legend_beneath(axes, lines)

    return save_panels(path, [(name, partial(draw, curves=curves)) for name, curves in panels.items()], title)


def plot_ratios(
    groups: Mapping[str, Mapping[str, Mapping[str, float]]],
    path: str | os.PathLike[str],
    *,
    title: str,
    xlabel: str,
    learned: Collection[str],
) -> Path:
    """Draw a row of marks for each problem, one an optimizer, on a logarithmic axis, and return the path.

    Args:
        groups: by the title of a panel and the name of a problem, the ratio of each optimizer to what they are compared
            with. Those below a tenth or above 10 are drawn at the edge; so are infinite ones.
        path, title: as for `plot_curves`.
        xlabel: what the ratio is.
        learned: names of the optimizers that are to stand out.

    Raises:
        ValueError: there is no group, or the suffix is another.
    """
    problems = list(dict.fromkeys(problem for group in groups.values() for problem in group))
    names = list(dict.fromkeys(name for group in groups.values() for row in group.values() for name in row))
    colours = dict(_colours(names))
    offsets = {name: 0.56 * (number / max(1, len(names) - 1) - 0.5) for number, name in enumerate(names)}
    low, high = 0.1, 10.0

    def draw(axes: Axes, group: Mapping[str, Mapping[str, float]], first: bool) -> None:
        marks = []
        for name in reversed(names):
            rows = [
                (min(max(row[name], low), high), problems.index(problem) + offsets[name])
                for problem, row in group.items()
            ]
            (mark,) = axes.plot(
                *zip(*rows, strict=True),
                linestyle="none",
                marker=_MARKERS.get(name, "o"),
                markersize=6 if name in learned else 4.5,
                markerfacecolor=colours[name] if name in learned else "none",
                markeredgecolor=colours[name],
                alpha=0.9,
                label=name,
                clip_on=False,
                zorder=4 if name in learned else 3,
            )
            marks.append(mark)
        axes.axvline(1, color=COLOURS["adam"], linewidth=1.2, zorder=2)
        axes.grid(axis="both")
        axes.set(xscale="log", xlim=(low, high), xlabel=xlabel, ylim=(len(problems) - 0.5, -0.5))
        axes.set_yticks(range(len(problems)), problems if first else [""] * len(problems))
        _number(axes.xaxis, (1, 2, 5))
        if first:
            legend_beneath(axes, marks[::-1])

    panels = [
        (name, partial(draw, group=group, first=not number)) for number, (name, group) in enumerate(groups.items())
    ]
    return save_panels(path, panels, title)


def plot_history(
    history: Sequence[Epoch],
    path: str | os.PathLike[str],
    *,
    title: str = "meta-training",
    log_floor: float | None = None,
) -> Path:
    """Draw how a meta-training run went, and return the path.

    Args:
        history: what `MetaTrainer.fit` returned.
        path, title: as for `plot_curves`.
        log_floor: that of the trainer, whose validation is of other losses with it.

    Raises:
        ValueError: history is empty, or the path's suffix is not one that `plot_curves` knows.
    """
    if not history:
        raise ValueError("history: expected at least one epoch, got none")

    def draw(axes: Axes) -> None:
        epochs = [epoch.epoch for epoch in history]
        training = [epoch.train_loss for epoch in history]
        validation = [epoch.validation_loss for epoch in history]
        best = min(history, key=lambda epoch: epoch.validation_loss)
        label = f"best, {best.validation_loss:.4g}"
        validated = "last step" if log_floor is None else f"geometric mean of the last steps + {log_floor:g}"
        lines = [
            *axes.plot(epochs, training, color="#999999", label="training, mean over all steps"),
            *axes.plot(epochs, validation, color=COLOURS["lstm"], linewidth=2, label=f"validation, {validated}"),
            *axes.plot(best.epoch, best.validation_loss, "o", color="#222222", markersize=5, zorder=5, label=label),
        ]
        axes.set(xlabel="epoch", ylabel="loss")
        _loss_axis(axes, training + validation)
        legend_beneath(axes, lines)

    return save_panels(path, [(title, draw)])


def plot_search(trials: Sequence[tuple[float, float]], path: str | os.PathLike[str], *, title: str) -> Path:
    """Draw the validation losses of a search of the meta learning rate, and return the path.

    Args:
        trials: pairs of a learning rate and the loss that it gave; infinite ones are drawn at the top.
        path, title: as for `plot_curves`.

    Raises:
        ValueError: there is no trial, or the suffix is another.
    """
    if not trials:
        raise ValueError("trials: expected at least one, got none")

    def draw(axes: Axes) -> None:
        finite = [(lr, loss) for lr, loss in trials if math.isfinite(loss)]
        highest = max((loss for _, loss in finite), default=1.0)
        failed = [lr for lr, loss in trials if not math.isfinite(loss)]
        axes.plot([lr for lr, _ in finite], [loss for _, loss in finite], "o", color=COLOURS["lstm"])
        axes.set(xlabel="meta learning rate", ylabel="validation loss, last step", xscale="log")
        _loss_axis(axes, [loss for _, loss in trials])
        if failed:
            legend_beneath(axes, axes.plot(failed, [highest] * len(failed), "x", color="#777777", label="diverged"))

    return save_panels(path, [(title, draw)])


def plot_matrices(rows: Mapping[str, Mapping[str, Tensor]], path: str | os.PathLike[str], *, title: str) -> Path:
    """Draw matrices as pictures, a row of them under each name, and return the path.

    Every picture has a scale of its own, from minus to plus its largest entry: blue is below 0, red above.

    Args:
        rows: in each row as many, by what is written above them; [n, n].
        path, title: as for `plot_curves`.
    """
    suffix = _suffix(path)
    picture = io.BytesIO()
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    with rc_context(_STYLE):
        columns = max(len(row) for row in rows.values())
        figure = Figure(figsize=(2.3 * columns, 2.5 * len(rows) + 0.6), layout="constrained")
        grid = figure.subplots(len(rows), columns, squeeze=False)
        for axes_of_row, (name, row) in zip(grid, rows.items(), strict=True):
            for axes, (what, matrix) in zip(axes_of_row, row.items(), strict=True):
                largest = matrix.abs().max().item() or 1.0
                axes.imshow(matrix.cpu().numpy(), cmap="RdBu_r", vmin=-largest, vmax=largest)
                axes.set(xticks=[], yticks=[])
                axes.set_title(what, fontsize=9)
            axes_of_row[0].set_ylabel(name, fontsize=9)
        figure.suptitle(_wrapped(title, int(26 * columns)), x=0.01, ha="left", fontsize=11)
        figure.savefig(picture, format=suffix, **_FORMATS[suffix])
    return write_bytes(path, picture.getvalue())


def save_panels(
    path: str | os.PathLike[str], panels: Sequence[tuple[str, Callable[[Axes], None]]], title: str | None = None
) -> Path:
    """Draw panels side by side, each a title and what draws it, under a common title if there is one.

    The figure is as much higher as titles and legends (`legend_beneath`) are: the axes keep their size.
    """
    suffix = _suffix(path)
    if not panels:
        raise ValueError("panels: expected at least one, got none")
    picture = io.BytesIO()
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    with rc_context(_STYLE):
        width = 6.4 if len(panels) == 1 else 4.6 * len(panels)
        figure = Figure(figsize=(width, _PANEL_HEIGHT), layout="constrained")
        titles = []
        for axes, (name, draw) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
            draw(axes)
            titles.append(axes.set_title(_wrapped(name, int(8 * width / len(panels)))))
        legends = [legend for axes in figure.axes if (legend := axes.get_legend())]
        above = []
        if title is not None:
            above.append(figure.suptitle(_wrapped(title, int(8 * width)), x=0.01, ha="left", fontsize=12))
        written = [max((one.get_window_extent().height for one in row), default=0) for row in (above, titles, legends)]
        figure.set_figheight(_PANEL_HEIGHT + sum(written) / figure.dpi)
        figure.savefig(picture, format=suffix, **_FORMATS[suffix])
    return write_bytes(path, picture.getvalue())


def _suffix(path: str | os.PathLike[str]) -> str:
    suffix = Path(path).suffix.lower().removeprefix(".")
    if suffix not in _FORMATS:
        raise ValueError(f"path: expected a name that ends in .{', .'.join(_FORMATS)}, got {os.fspath(path)!r}")
    return suffix


def legend_beneath(axes: Axes, handles: Sequence[Artist | Container], title: str | None = None) -> None:
    """A legend beneath the axes and all that is written there, where no curve can run, in as many columns as fit.

    To be called when the axes are finished: it is placed by what is there.
    """
    from matplotlib.transforms import ScaledTranslation

    figure = axes.figure
    box = axes.get_window_extent()
    written = axes.get_tightbbox() or box
    below = (box.y0 - written.y0) / figure.dpi + 0.12
    labels = [str(handle.get_label()).replace("$", r"\$") for handle in handles]  # names are no mathematics
    for columns, letters in [(columns, 40) for columns in range(min(len(handles), 4), 0, -1)] + [(1, 20)]:
        legend = axes.legend(
            handles,
            [_wrapped(label, letters) for label in labels],
            title=title,
            ncols=columns,
            alignment="left",
            loc="upper left",
            borderaxespad=0,
            bbox_to_anchor=(0, 0),
            bbox_transform=axes.transAxes + ScaledTranslation(0, -below, figure.dpi_scale_trans),
        )
        if legend.get_window_extent().width <= box.width:
            break


def _wrapped(text: str, width: int) -> str:
    return "\n".join(textwrap.fill(line, width) for line in text.splitlines())


def _draw(axes: Axes, curves: Curves, log: bool) -> None:
    colours = dict(_colours(curves.losses))
    points = curves.steps + 1 if curves.steps < _MOST_POINTS else _STRETCHES
    steps = [stretch.mean().item() for stretch in torch.arange(curves.steps + 1.0).tensor_split(points)]
    smooth = Curves({name: _stretches(losses, points) for name, losses in curves.losses.items()})
    lines = []
    for name in reversed(curves.ranking()):  # the best on top
        learned = curves.kind(name) == "learned"
        (line,) = axes.plot(
            steps,
            smooth.mean(name).numpy(),
            color=colours[name],
            linewidth=2.4 if learned else 1.5,
            zorder=4 if learned else 3,
            label=_label(curves, name),
            solid_capstyle="round",
        )
        if not learned:
            line.set_dashes(_DASHES.get(name.lower(), _OTHER_DASHES))
        lines.append(line)
        low_end, high_end = smooth.interval(name)
        known = high_end.isfinite().numpy()
        axes.fill_between(steps, low_end, high_end, where=known, color=colours[name], alpha=0.16, linewidth=0, zorder=2)
    axes.set(xlabel="step", ylabel="loss", xlim=(0, curves.steps))
    _loss_axis(axes, _limits(smooth), log)
    legend_beneath(axes, lines[::-1], title=f"{_final_loss(curves)}, 95% interval")


def _stretches(losses: Tensor, points: int) -> Tensor:
    return torch.stack([stretch.mean(1) for stretch in losses.tensor_split(points, dim=1)], dim=1)


def _final_loss(curves: Curves) -> str:
    return "final loss" if curves.last == 1 else f"mean of the last {curves.last:,} losses"


def _colours(names: Iterable[str]) -> Iterator[tuple[str, str]]:
    others = cycle(_OTHER_COLOURS)
    for name in names:
        yield name, COLOURS.get(name.lower()) or next(others)


def _limits(curves: Curves) -> tuple[float, ...]:
    """The range of losses to show, if any: all means, except that what climbs far above every start is cut off."""
    means = torch.stack([curves.mean(name) for name in curves.losses])
    shown = means[means.isfinite()]
    if not len(shown):
        return ()
    lowest, highest, start = shown.min().item(), shown.max().item(), means[:, 0].max().item()
    return lowest, min(highest, start + 2 * abs(start))


def _loss_axis(axes: Axes, losses: Iterable[float], log: bool = True) -> None:
    """From the lowest finite loss to the highest: logarithmic if asked for and if all are positive."""
    finite = [loss for loss in losses if math.isfinite(loss)] or [0.0, 1.0]
    low, high = min(finite), max(finite)
    axes.grid(axis="y")
    if not log or low <= 0:
        margin = 0.04 * (high - low) or 1.0
        axes.set_ylim(low - margin, high + margin)
        return
    axes.set_yscale("log")
    axes.set_ylim(low / 1.25, high * 1.25)
    decades = math.log10(high) - math.log10(low)
    labelled = (1, 2, 3, 5, 7) if decades < 1.2 else (1, 2, 5) if decades < 3 else (1,)
    _number(axes.yaxis, labelled)


def _number(axis: Axis, labelled: Sequence[int]) -> None:
    """Of an axis in logarithms: these multiples of the powers of ten are marked and written out, and no others."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter, NullLocator

    axis.set_major_locator(LogLocator(subs=labelled))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_locator(NullLocator())
    axis.set_minor_formatter(NullFormatter())


def _label(curves: Curves, name: str) -> str:
    if diverged := curves.diverged(name):
        return f"{name}  diverged in {diverged} of {curves.runs}"
    return f"{name}  {with_half_width(*curves.final(name))}"


def _title(curves: Curves) -> str:
    task = curves.metadata.get("task", {}).get("name")
    problems = f"mean of {curves.runs} problems" if curves.runs > 1 else "one problem"
    return f"{task}, {problems}" if task else problems
