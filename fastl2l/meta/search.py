"""Random search of the meta learning rate (Andrychowicz et al. 2016, section 3), by optuna.

A search is its settings: optuna's sampler draws the same rates by number from the same seed, so that a search which is
taken up again, or shared by several processes, tries the same ones. What a trial has found is in its checkpoint, and
nothing else is kept: no study that a killed process could leave locked, cut or at odds with the checkpoints.
"""

from __future__ import annotations

import contextlib
import itertools
import math
import os
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from fastl2l import files
from fastl2l.build import locked
from fastl2l.meta.checkpoint import difference
from fastl2l.meta.trainer import MetaTrainer
from fastl2l.progress import Progress
from fastl2l.tasks.base import integer

FORMAT = 1
"""Of search.json."""


class Trial(NamedTuple):
    """A learning rate that was tried."""

    meta_lr: float
    validation_loss: float
    """The best of its epochs; infinite if all diverged."""


def search_meta_lr(
    make_trainer: Callable[[float, Path], MetaTrainer],
    folder: str | os.PathLike[str],
    *,
    trials: int = 10,
    epochs: int = 20,
    low: float = 1e-4,
    high: float = 1e-1,
    seed: int = 0,
    progress: bool = True,
) -> list[Trial]:
    """Train with random learning rates, log-uniform from `low` to `high`; the best validation loss comes first.

    Trial number n tries the same rate whatever has happened before. Processes that search in one folder at once share
    the trials, and all of them return all.

    Args:
        make_trainer: a fresh trainer of this learning rate, which keeps its checkpoint in this file.
        folder: for the checkpoints, one a trial, and search.json, the settings. A search that was killed goes on from
            them, in the middle of a trial too.
        trials: learning rates in all, counting those of an earlier search in `folder`.
        epochs: of each.
        low, high: bounds of the learning rate.
        seed: of the rates.
        progress: show how far it is.

    Raises:
        ImportError: optuna is not installed.
        TypeError, ValueError: an argument is not as above, or `folder` holds a search with other settings.
    """
    integer("trials", trials)
    integer("epochs", epochs)
    if integer("seed", seed, least=0) >= 2**32:
        raise ValueError(f"seed: expected an integer below 2^32, got {seed}")
    if not 0 < low < high:
        raise ValueError(f"low, high: expected 0 < low < high, got {low} and {high}")
    if high == math.inf:
        raise ValueError(f"high: expected a finite number, got {high}")
    rates = _rates(trials, low, high, seed)
    folder = Path(folder)
    settings = make_trainer(rates[0], folder / "none.pt").settings()
    _claim(folder, settings | {"meta_lr": [low, high], "epochs": epochs, "search_seed": seed})
    found: dict[int, Trial] = {}
    with Progress("searching the meta learning rate", trials, shown=progress) as shown:
        # First those that nobody else is at; then the others, which are finished by now or left in the middle.
        for wait, number in itertools.product((False, True), range(trials)):
            if number in found:
                continue
            with contextlib.ExitStack() as stack:
                try:
                    stack.enter_context(locked(folder / f"trial-{number}.lock", wait=wait))
                except BlockingIOError:
                    continue
                shown.note(f"{rates[number]:.3g}")
                trainer = make_trainer(rates[number], folder / f"trial-{number}.pt")
                trainer.fit(epochs, progress=False)
                found[number] = Trial(rates[number], trainer.best_loss)
                shown.advance(f"{rates[number]:.3g}: {trainer.best_loss:.4g}")
    return sorted(found.values(), key=lambda trial: trial.validation_loss)


def _rates(trials: int, low: float, high: float, seed: int) -> list[float]:
    optuna = _optuna()
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=seed))
    return [study.ask().suggest_float("meta_lr", low, high, log=True) for _ in range(trials)]


def _claim(folder: Path, settings: dict[str, Any]) -> None:
    """Make `folder` that of a search with these settings, unless it is one's with others."""
    path, settings = folder / "search.json", files.plain(settings)
    with locked(folder / "search.lock"):
        if not path.exists():
            if (folder / "study.journal").exists():
                message = f"{folder}: study.journal is of an older version's search, which begins anew"
                warnings.warn(message, RuntimeWarning, stacklevel=3)
            files.write_record(path, {"format": FORMAT, "settings": settings})
        try:
            found = dict(files.read_record(path, FORMAT)["settings"])
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"folder: {error}; remove it to go on with the settings it was made with") from error
    if different := difference(settings, found):
        raise ValueError(f"folder: {folder} holds a search with other settings; {different}")


def _optuna() -> Any:
    try:
        import optuna
    except ImportError as error:
        raise ImportError("the search needs optuna: pip install fastl2l[tune]") from error
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    return optuna
