"""How the shipped rules are trained."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

from fastl2l import tasks
from fastl2l.meta import MetaTrainer
from fastl2l.rules import LSTMRule

RULE_OPTIONS: Mapping[str, Mapping[str, Any]] = MappingProxyType(
    {"quadratic": MappingProxyType({"preprocess": "raw", "output_scale": 1.0})}
)
"""By task, what its rule is where that is not the default (Andrychowicz et al. 2016, section 3.1 and appendix A)."""


@dataclass(frozen=True)
class Recipe:
    """How a rule is trained, from nothing: all arguments of `LSTMRule` and `MetaTrainer` that are not defaults.

    Args:
        name: the rule's.
        about: one sentence on what it is good for.
        task: name of the task.
        epochs: of 20 trajectories each.
        training: arguments of `MetaTrainer`.
        seed: of the first weights and of all problems.
    """

    name: str
    about: str
    task: str
    epochs: int
    training: Mapping[str, Any] = field(default_factory=dict)
    seed: int = 0

    @property
    def command(self) -> str:
        """The command that does the same."""
        options = {"task": self.task, "epochs": self.epochs, **self.training, "seed": self.seed}
        words = [
            f"--{name.replace('_', '-')}" + ("" if value is True else f" {value}") for name, value in options.items()
        ]
        return " ".join(["fastl2l train", *words, f"--out runs/{self.name}"])

    def train(self, folder: str | os.PathLike[str], *, epochs: int | None = None, progress: bool = True) -> LSTMRule:
        """The rule, trained; a run that was killed goes on from the checkpoint in `folder`.

        Args:
            folder: for the checkpoint.
            epochs: fewer than the recipe's, for a quick look.
            progress: show how far it is.
        """
        rule = LSTMRule(**RULE_OPTIONS.get(self.task, {}), seed=self.seed)
        checkpoint = Path(folder) / "checkpoint.pt"
        task = tasks.by_name(self.task)
        trainer = MetaTrainer(rule, task, seed=self.seed, checkpoint=checkpoint, **self.training)
        trainer.fit(self.epochs if epochs is None else epochs, progress=progress)
        return rule


RECIPES = {
    recipe.name: recipe
    for recipe in (
        Recipe(
            "lstm-mnist",
            "Small sigmoid networks on images: trained on an MLP 784-20-10 on MNIST for 100 steps.",
            task="mnist",
            epochs=40,
            training=MappingProxyType({"meta_lr": 3e-3, "schedule": "cosine", "second_derivatives": True}),
        ),
        Recipe(
            "lstm-quadratic",
            "Random quadratic functions of 10 coordinates, for 100 steps.",
            task="quadratic",
            epochs=60,
            training=MappingProxyType({"meta_lr": 3e-3, "schedule": "cosine", "second_derivatives": True}),
        ),
    )
}
"""By name of the rule (Andrychowicz et al. 2016, sections 3.1 and 3.2)."""
