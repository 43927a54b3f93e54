"""Random search of the meta learning rate (Andrychowicz et al. 2016, section 3), by optuna."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from fastl2l.meta.checkpoint import BEFORE
from fastl2l.meta.trainer import MetaTrainer
from fastl2l.progress import Progress
from fastl2l.tasks.base import integer


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

    Args:
        make_trainer: a fresh trainer of this learning rate, which keeps its checkpoint in this file.
        folder: for the optuna study (study.journal) and the checkpoints. A search that was killed goes on from them, in
            the middle of a trial too.
        trials: learning rates in all, counting those of an earlier search in `folder`.
        epochs: of each.
        low, high: bounds of the learning rate.
        seed: of the rates.
        progress: show how far it is.

    Raises:
        ImportError: optuna is not installed.
        TypeError, ValueError: an argument is not as above, or `folder` holds a search with other settings.
    """
    optuna = _optuna()
    integer("trials", trials)
    integer("epochs", epochs)
    if not 0 < low < high:
        raise ValueError(f"low, high: expected 0 < low < high, got {low} and {high}")
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    backend = optuna.storages.journal.JournalFileBackend(str(folder / "study.journal"))
    study = optuna.create_study(
        study_name="meta_lr", storage=optuna.storages.JournalStorage(backend), load_if_exists=True
    )
    settings = make_trainer(low, folder / "none.pt").settings() | {"meta_lr": [low, high], "epochs": epochs}
    if BEFORE | study.user_attrs.get("settings", settings) != settings:
        raise ValueError(f"folder: {folder} holds a search with other settings: {study.user_attrs['settings']}")
    study.set_user_attr("settings", settings)
    _enqueue_unfinished(study)
    # By the number of trials so far: a sampler that begins anew would draw the first rates again.
    study.sampler = optuna.samplers.RandomSampler(seed=seed + len(study.trials))
    states = optuna.trial.TrialState
    finished = len(study.get_trials(states=[states.COMPLETE]))
    with Progress("searching the meta learning rate", trials, done=min(finished, trials), shown=progress) as shown:

        def objective(trial: Any) -> float:
            meta_lr = trial.suggest_float("meta_lr", low, high, log=True)
            shown.note(f"{meta_lr:.3g}")
            trainer = make_trainer(meta_lr, folder / f"{meta_lr:.6g}.pt")
            trainer.fit(epochs, progress=False)
            shown.advance(f"{meta_lr:.3g}: {trainer.best_loss:.4g}")
            return trainer.best_loss

        study.optimize(objective, n_trials=max(0, trials - finished))
    done = study.get_trials(states=[states.COMPLETE])
    return sorted((Trial(one.params["meta_lr"], one.value) for one in done), key=lambda trial: trial.validation_loss)


def _enqueue_unfinished(study: Any) -> None:
    """Once more, with their rates, for the trials in whose middle an earlier search was stopped."""
    states = _optuna().trial.TrialState
    for trial in study.get_trials(states=[states.RUNNING]):  # killed: nobody has said that they failed
        study.tell(trial.number, state=states.FAIL)
    settled = [trial.params for trial in study.get_trials(states=[states.COMPLETE])]
    settled += [trial.system_attrs["fixed_params"] for trial in study.get_trials(states=[states.WAITING])]
    for trial in study.get_trials(states=[states.FAIL]):
        if trial.params and trial.params not in settled:
            study.enqueue_trial(trial.params)
            settled.append(trial.params)


def _optuna() -> Any:
    try:
        import optuna
    except ImportError as error:
        raise ImportError("the search needs optuna: pip install fastl2l[tune]") from error
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    return optuna
