"""What is done to any task's problems to train on them, as one; Lv et al. 2017, section 4.2, above all."""

from __future__ import annotations

from collections.abc import Sequence

from fastl2l.tasks.base import Task
from fastl2l.tasks.convex import WithConvex
from fastl2l.tasks.mixture import Mixture
from fastl2l.tasks.scaled import Scaled
from fastl2l.tasks.spiked import Spiked


def augmented(task: Task, *, scaling: Sequence[float] = (), convex: int = 0, spikes: float = 0.0) -> Task:
    """`task` with scaled coordinates and, beside them, convex functions, and gradients that are too large now and then.

    Args:
        task: what is to be trained on.
        scaling: ranges of random scaling (see `Scaled`); of several, each problem has one, all as likely. None by
            default.
        convex: coordinates of a convex function that is added (see `WithConvex`); 0 for none.
        spikes: share of the steps whose gradients are 100 times too large (see `Spiked`).

    Raises:
        TypeError, ValueError: as by these.
    """
    if scaling:
        scaled = [Scaled(task, r) for r in scaling]
        task = scaled[0] if len(scaled) == 1 else Mixture(scaled)
    task = WithConvex(task, convex) if convex else task
    return Spiked(task, spikes) if spikes else task
