"""Draws what torch.profiler sees of one window of MNIST meta-training, and prints its table.

python bench/trace.py docs/images/trace.png
"""

from __future__ import annotations

import sys
from collections.abc import Iterable

import matplotlib
from matplotlib.figure import Figure
from torch.profiler import ProfilerActivity, profile

import fastl2l

UNROLL = 20
COLOURS = {"fastl2l::step_": "#D55E00", "fastl2l::window_backward": "#0072B2", "the optimizee": "#999999"}


def window() -> profile:
    """The profile of a window, after one that warms everything up."""
    trajectory = fastl2l.Trajectory(fastl2l.tasks.MNIST().sample(0), fastl2l.LSTMRule())
    trajectory.window([1.0] * UNROLL)
    with profile(activities=[ProfilerActivity.CPU]) as trace:
        trajectory.window([1.0] * UNROLL)
    return trace


def bars(events: Iterable) -> dict[str, list[tuple[float, float]]]:
    """Start and duration in ms of the operators that no other operator has called, by row of the figure."""
    rows: dict[str, list[tuple[float, float]]] = {name: [] for name in COLOURS}
    outer = [event for event in events if event.cpu_parent is None]
    first = min(event.time_range.start for event in outer)
    for event in outer:
        row = event.name if event.name in rows else "the optimizee"
        rows[row].append(((event.time_range.start - first) / 1e3, event.time_range.elapsed_us() / 1e3))
    return rows


def draw(rows: dict[str, list[tuple[float, float]]], path: str) -> None:
    with matplotlib.rc_context({"font.size": 9, "axes.spines.top": False, "axes.spines.right": False}):
        figure = Figure(figsize=(8, 2.2), layout="constrained")
        axes = figure.add_subplot()
        for height, (name, spans) in enumerate(rows.items()):
            axes.broken_barh(spans, (-height - 0.4, 0.8), color=COLOURS[name])
        labels = [f"{name}  {sum(duration for _, duration in spans):.1f} ms" for name, spans in rows.items()]
        axes.set_yticks([-height for height in range(len(rows))], labels)
        axes.set_xlabel("ms")
        axes.set_title(f"One window of {UNROLL} steps, MNIST, MLP 784-20-10", loc="left")
        figure.savefig(path, dpi=200)


if __name__ == "__main__":
    trace = window()
    print(trace.key_averages().table(sort_by="self_cpu_time_total", row_limit=8, max_name_column_width=40))
    draw(bars(trace.events()), sys.argv[1])
