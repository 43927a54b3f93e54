"""Stage "figure": time by N beside the memory's floor, share of the copy bandwidth, and how much slower the others are.

python bench/gpu/picture.py results.json speed.png --out found.json --device cuda --seconds 10
"""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

from harness import Findings, arguments
from marks import LARGE, Results, share_of_copy
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import LogLocator, NullLocator

# isort: split
from competitors import BYTES
from figure import COLOURS, LABELS

from fastl2l.files import write_bytes

STYLES = {
    "native": ("CUDA C++", COLOURS["fastl2l"]),
    "triton": ("Triton", "#E69F00"),
    "eager": (LABELS["eager"], COLOURS["eager"]),
    "compile": (LABELS["compile"], COLOURS["compile"]),
    "lstm": ("nn.LSTM, features given", "#CC79A7"),
}
SHARES = {"float32": ("-", 0.85), "bfloat16": ("--", 0.75)}
"""Of each state: the line, and the share to reach."""

Row = dict[str, Any]


def finished(stages: dict[str, Any]) -> list[Row]:
    """All rows of the speed stages that have a time."""
    rows = [row for stage in stages.values() for row in (stage.get("found") or {}).get("rows", [])]
    return [row for row in rows if "failed" not in row]


def fastest(rows: list[Row], what: str, who: str, state: str = "float32") -> dict[int, Row]:
    """By N: with launches or in a graph, whichever is faster."""
    best: dict[int, Row] = {}
    for row in rows:
        if (row["what"], row["who"], row["state"]) == (what, who, state):
            before = best.get(row["coordinates"])
            if before is None or row["median_s"] < before["median_s"]:
                best[row["coordinates"]] = row
    return dict(sorted(best.items()))


def style(axes: Axes, **settings: Any) -> None:
    axes.set(xlabel="coordinates", **settings)
    axes.title.set_fontsize(10)
    axes.grid(axis="y", color="#E6E6E6")
    axes.spines[["top", "right"]].set_visible(False)
    if settings.get("yscale") == "log":
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_locator(NullLocator())


def label(axes: Axes, height: float, text: str) -> None:
    """A text beside the axes, where no line can run."""
    axes.text(1.01, height, text, transform=axes.get_yaxis_transform(), fontsize=8, va="bottom")


def draw_times(axes: Axes, what: str, rows: list[Row], copy: float | None) -> None:
    """A line for everyone, and the floor."""
    for who, (_, colour) in STYLES.items():
        mine = fastest(rows, what, who)
        if mine:
            times = [row["ns_per_coordinate_step"] for row in mine.values()]
            axes.plot(list(mine), times, "o-", color=colour, markersize=4)
    if copy:
        floor = BYTES[what] / copy
        axes.axhline(floor, color="black", linewidth=1, linestyle=":")
        label(axes, floor, f"copying\nas many\nbytes:\n{floor:.3g} ns")
    style(axes, xscale="log", yscale="log", ylabel="ns a coordinate and step", title=what)


def draw_shares(axes: Axes, rows: list[Row], copy: float | None) -> None:
    """How much of the copy bandwidth the steps' states take."""
    for state, (line, mark) in SHARES.items():
        for who in ("native", "triton"):
            mine = fastest(rows, "step", who, state)
            if mine and copy:
                shares = [100 * share_of_copy(row, copy) for row in mine.values()]
                axes.plot(list(mine), shares, "o" + line, color=STYLES[who][1], markersize=4)
        axes.hlines(100 * mark, LARGE, 1e8, color="black", linewidth=1, linestyle=line)
        label(axes, 100 * mark, "to reach")
    title = "step: state moved (solid float32, broken bfloat16)"
    style(axes, xscale="log", ylabel="% of the copy bandwidth", ylim=(0, 110), title=title)


def draw_ratios(axes: Axes, rows: list[Row], ours: str) -> None:
    """Times of the others in units of ours."""
    for what, line in (("step", "-"), ("meta-gradient", "--")):
        mine = fastest(rows, what, ours)
        for who, (_, colour) in STYLES.items():
            if who in ("native", "triton"):
                continue
            theirs = fastest(rows, what, who)
            both = [numel for numel in theirs if numel in mine]
            if both:
                ratios = [theirs[numel]["median_s"] / mine[numel]["median_s"] for numel in both]
                axes.plot(both, ratios, "o" + line, color=colour, markersize=4)
    axes.axhline(1, color="black", linewidth=1)
    title = "beside the others (solid step, broken meta-gradient)"
    style(axes, xscale="log", yscale="log", ylabel=f"times the time of {STYLES[ours][0]}", title=title)


def draw(results: dict[str, Any]) -> bytes:
    stages, rows = results["stages"], finished(results["stages"])
    machine = stages.get("machine", {}).get("found") or {}
    copy = machine.get("copy", {}).get("bytes_per_ns")
    figure = Figure(figsize=(10, 7.6), layout="constrained")
    (step, window), (shares, ratios) = figure.subplots(2, 2)
    draw_times(step, "step", rows, copy)
    draw_times(window, "meta-gradient", rows, copy)
    draw_shares(shares, rows, copy)
    draw_ratios(ratios, rows, Results(stages).backend)
    lines = [Line2D([], [], color=colour, marker="o", markersize=4, label=label) for label, colour in STYLES.values()]
    figure.legend(handles=lines, loc="outside lower center", ncols=len(lines), frameon=False)
    about = results["about"]
    bandwidth = f"copies {copy / 1e3:.2f} TB/s" if copy else "copy bandwidth not measured"
    dry = "; a dry run, whose numbers mean nothing" if about["quick"] else ""
    figure.suptitle(f"{about['device']}, {bandwidth}, commit {about['commit']}{dry}", fontsize=10)
    picture = io.BytesIO()
    figure.savefig(picture, format="png", dpi=160)
    return picture.getvalue()


def main() -> int:
    args = arguments("results", "picture")
    findings = Findings(args.out)
    write_bytes(args.picture, draw(json.loads(Path(args.results).read_text())))
    findings.update(picture=Path(args.picture).name)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
