"""Draws what torch.profiler sees of one window of MNIST meta-training, and prints its table.

python bench/trace.py docs/images/trace.png
"""

from __future__ import annotations

import io
import sys
from collections.abc import Iterable
from typing import Any

import matplotlib
from matplotlib.figure import Figure
from torch.profiler import ProfilerActivity, profile

import fastl2l
from fastl2l.files import write_bytes

UNROLL = 20
COLOURS = {"fastl2l::step_": "#D55E00", "fastl2l::window_backward": "#0072B2", "the optimizee": "#7F7F7F"}


def profiled_window() -> profile:
    """The profile of a window, after one that warms everything up."""
    trajectory = fastl2l.Trajectory(fastl2l.tasks.MNIST().sample(0), fastl2l.LSTMRule())
    trajectory.window([1.0] * UNROLL)
    with profile(activities=[ProfilerActivity.CPU]) as trace:
        trajectory.window([1.0] * UNROLL)
    return trace


def spans(events: Iterable[Any]) -> dict[str, list[tuple[float, float]]]:
    """Start and duration in ms of the operators that no other operator has called, by row of the figure."""
    outer = [event for event in events if event.cpu_parent is None]
    first = min(event.time_range.start for event in outer)
    rows: dict[str, list[tuple[float, float]]] = {name: [] for name in COLOURS}
    for event in outer:
        row = rows.get(event.name, rows["the optimizee"])
        row.append(((event.time_range.start - first) / 1e3, event.time_range.elapsed_us() / 1e3))
    return rows


def draw(rows: dict[str, list[tuple[float, float]]]) -> bytes:
    picture = io.BytesIO()
    with matplotlib.rc_context({"font.size": 9, "axes.spines.top": False, "axes.spines.right": False}):
        figure = Figure(figsize=(8, 2.2), layout="constrained")
        axes = figure.add_subplot()
        for height, (name, bars) in enumerate(rows.items()):
            axes.broken_barh(bars, (-height - 0.4, 0.8), color=COLOURS[name])
        labels = [f"{name}: {sum(duration for _, duration in bars):.1f} ms" for name, bars in rows.items()]
        axes.set_yticks([-height for height in range(len(rows))], labels)
        axes.set_xlabel("ms")
        axes.set_title(f"One window of {UNROLL} steps: MNIST, MLP 784-20-10", loc="left")
        figure.savefig(picture, format="png", dpi=200)
    return picture.getvalue()


if __name__ == "__main__":
    trace = profiled_window()
    print(trace.key_averages().table(sort_by="self_cpu_time_total", row_limit=8, max_name_column_width=40))
    print(write_bytes(sys.argv[1], draw(spans(trace.events()))))
