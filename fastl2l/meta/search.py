"""Random search of the meta learning rate (Andrychowicz et al. 2016, section 3), by optuna.

A search is its settings: optuna's sampler draws the same rates by number from the same seed, so that a search which is
taken up again, or shared by several processes, tries the same ones. What a trial has found is in its checkpoint, and
in a study of optuna's if there is a storage: of finished trials alone, so that no killed process leaves one locked, cut
or at odds with the checkpoints.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
import math
import os
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from fastl2l import files
from fastl2l.build import locked
from fastl2l.meta.checkpoint import difference
from fastl2l.meta.trainer import MetaTrainer
from fastl2l.processes import alone, current
from fastl2l.progress import Progress
from fastl2l.tasks.base import integer

FORMAT = 1
"""Of search.json."""
WAITS = (0.1, 0.3, 1.0, 3.0)
"""Seconds between attempts at a database."""


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
    storage: str | None = None,
    progress: bool = True,
) -> list[Trial]:
    """Train with random learning rates, log-uniform from `low` to `high`; the best validation loss comes first.

    Trial number n tries the same rate whatever has happened before. Processes that search in one folder at once share
    the trials, and all of them return all. So do those of a process group of torch.distributed, each of which begins
    with trials of its own; and, with a `storage`, machines that see no folder in common: what one has finished no other
    begins.

    Args:
        make_trainer: a fresh trainer of this learning rate, which keeps its checkpoint in this file.
        folder: for the checkpoints, one a trial, and search.json, the settings. A search that was killed goes on from
            them, in the middle of a trial too.
        trials: learning rates in all, counting those of an earlier search in `folder`.
        epochs: of each.
        low, high: bounds of the learning rate.
        seed: of the rates.
        storage: what keeps the finished trials for other machines, as optuna names it: the URL of a database, such as
            ``"postgresql://host/name"``, or a file for optuna's journal, which may be on a network file system.
        progress: show how far it is.

    Raises:
        ImportError: optuna is not installed.
        TypeError, ValueError: an argument is not as above, or `folder` holds a search with other settings.
    """
    processes = current()
    processes.everyone(lambda: _check(trials, epochs, low, high, seed))
    rates = _rates(trials, low, high, seed)
    folder = Path(folder)

    def search() -> dict[int, Trial]:
        with alone():  # each trial is one process's
            made = make_trainer(rates[0], folder / "none.pt")
            settings = made.settings() | {"meta_lr": [low, high], "epochs": epochs, "search_seed": seed}
            _claim(folder, settings)
            # In a folder checkpoints know what the first weights were.
            study = None if storage is None else _study(storage, settings | {"weights": made.first_weights})
            begin = processes.share(trials).start
            order = [*range(begin, trials), *range(begin)]
            return _search(make_trainer, folder, rates, order, epochs, study, progress and not processes.rank)

    # All come back with all trials: what others have done they find in the folder or in the storage.
    found = processes.everyone(search)[processes.rank]
    return sorted(found.values(), key=lambda trial: trial.validation_loss)


def _check(trials: int, epochs: int, low: float, high: float, seed: int) -> None:
    integer("trials", trials)
    integer("epochs", epochs)
    if integer("seed", seed, least=0) >= 2**32:
        raise ValueError(f"seed: expected an integer below 2^32, got {seed}")
    if not 0 < low < high:
        raise ValueError(f"low, high: expected 0 < low < high, got {low} and {high}")
    if high == math.inf:
        raise ValueError(f"high: expected a finite number, got {high}")


def _search(
    make_trainer: Callable[[float, Path], MetaTrainer],
    folder: Path,
    rates: list[float],
    order: list[int],
    epochs: int,
    study: Any,
    progress: bool,
) -> dict[int, Trial]:
    """All trials by number; those that nobody else has done or is at are begun in this order."""
    found: dict[int, Trial] = {}
    with Progress("searching the meta learning rate", len(rates), shown=progress) as shown:
        # First those that nobody else is at; then the others, which are finished by now or left in the middle.
        for wait, number in itertools.product((False, True), order):
            if number in found:
                continue
            if (loss := _finished(study).get(number)) is not None:
                found[number] = Trial(rates[number], loss)
                shown.advance(f"{rates[number]:.3g}: {loss:.4g}")
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
                _tell(study, number, found[number])
                shown.advance(f"{rates[number]:.3g}: {trainer.best_loss:.4g}")
    return dict(sorted(found.items()))


def _study(storage: str, settings: dict[str, Any]) -> Any:
    """The study of searches with these settings in a storage."""
    optuna = _optuna()
    text = json.dumps(files.plain(settings), sort_keys=True)
    name = f"fastl2l-{hashlib.blake2b(text.encode(), digest_size=12).hexdigest()}"
    kept: Any = storage
    if "://" not in storage:
        from optuna.storages import JournalStorage
        from optuna.storages.journal import JournalFileBackend

        Path(storage).parent.mkdir(parents=True, exist_ok=True)
        kept = JournalStorage(JournalFileBackend(storage))
    try:
        return _patiently(lambda: optuna.create_study(storage=kept, study_name=name, load_if_exists=True))
    except (ImportError, MemoryError):
        raise
    except Exception as error:  # whatever the database's driver raises
        reason = str(error)[:200]
        raise ValueError(f"storage: expected a database's URL or a journal file, got {storage!r}: {reason}") from error


def _patiently(make: Callable[[], Any]) -> Any:
    """What `make` makes in a database; again where that fails, as it does while others make the tables of a new one."""
    for wait in WAITS:
        try:
            return make()
        except Exception as error:
            if not hasattr(error, "orig"):  # not what the database itself has said
                raise
            time.sleep(wait)
    return make()


def _finished(study: Any) -> dict[int, float]:
    """Validation losses by the numbers of the trials that are in the storage."""
    if study is None:
        return {}
    about = [trial.user_attrs for trial in study.get_trials(deepcopy=False)]
    return {one["number"]: float(one["validation_loss"]) for one in about if "validation_loss" in one}


def _tell(study: Any, number: int, trial: Trial) -> None:
    """Put a finished trial into the storage. A database may have no infinity: there it is a text beside."""
    if study is None or number in _finished(study):
        return
    optuna, loss = _optuna(), trial.validation_loss
    lr = {"meta_lr": trial.meta_lr}
    study.add_trial(
        optuna.trial.create_trial(
            params=lr,
            distributions={"meta_lr": optuna.distributions.FloatDistribution(trial.meta_lr, trial.meta_lr)},
            user_attrs={"number": number, "validation_loss": repr(loss)},
            value=loss if math.isfinite(loss) else None,
            state=getattr(optuna.trial.TrialState, "COMPLETE" if math.isfinite(loss) else "FAIL"),
        )
    )


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
