"""A curriculum of horizons (Chen et al. 2020, section 4.1)."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

from fastl2l.meta.trainer import Epoch, MetaTrainer
from fastl2l.rules import Rule
from fastl2l.tasks.base import Task, integer

HORIZONS = (100, 200, 500, 1000, 1500, 2000, 2500, 3000)
"""The paper's."""


class Stage(NamedTuple):
    """What a stage of a curriculum gave."""

    horizon: int
    history: list[Epoch]


def train_by_curriculum(
    rule: Rule | Mapping[str, Rule],
    task: Task,
    folder: str | os.PathLike[str],
    *,
    horizons: Sequence[int] = HORIZONS,
    epochs: int = 50,
    patience: int = 5,
    progress: bool = True,
    **options: Any,
) -> list[Stage]:
    """Train `rule`, in place, with longer and longer trajectories.

    It is trained with each horizon in turn and validated with the next, until that has not become better for
    `patience` epochs; then it goes on from the best weights so far. Short trajectories are cheap and their gradients
    tame, and a rule that has learned them gets somewhere along the longer ones.

    Args:
        rule, task: as for :class:`fastl2l.MetaTrainer`.
        folder: for a checkpoint a stage. A run that was killed at any moment goes on from there, to the same bits, if
            `rule` is as it was at first, not as it was left.
        horizons: steps of the trajectories, in rising order, each a number of whole windows.
        epochs: of a stage at most.
        patience: epochs without progress that end a stage.
        progress: show how far it is.
        options: all others of :class:`fastl2l.MetaTrainer`, the same for all stages.

    Returns:
        The stages.

    Raises:
        TypeError, ValueError: the horizons do not rise or do not divide into windows, or as by `MetaTrainer`; before
            anything is done.
    """
    horizons = _rising(horizons)
    integer("epochs", epochs)
    integer("patience", patience)
    for name in ("horizon", "validation_horizon", "checkpoint"):
        if name in options:
            raise ValueError(f"{name}: expected none, it is the curriculum's, got {options[name]!r}")
    unroll = integer("unroll", options.get("unroll", 20))
    for horizon in horizons:
        if horizon % unroll:
            raise ValueError(f"horizons: expected whole windows of {unroll} steps, got {horizon} steps")
    stages = []
    for horizon, following in zip(horizons, [*horizons[1:], horizons[-1]], strict=True):
        checkpoint = Path(folder) / f"horizon-{horizon}.pt"
        trainer = MetaTrainer(
            rule, task, horizon=horizon, validation_horizon=following, checkpoint=checkpoint, **options
        )
        stages.append(Stage(horizon, trainer.fit(epochs, patience=patience, progress=progress)))
    return stages


def _rising(horizons: object) -> tuple[int, ...]:
    if not isinstance(horizons, Sequence) or isinstance(horizons, str) or not horizons:
        raise TypeError(f"horizons: expected a sequence of rising numbers of steps, got {horizons!r}")
    steps = tuple(integer("horizons", horizon) for horizon in horizons)
    if any(later <= earlier for earlier, later in pairwise(steps)):
        raise ValueError(f"horizons: expected rising numbers of steps, got {list(steps)}")
    return steps
