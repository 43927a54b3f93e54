"""Figure 7 of Andrychowicz et al. 2016, section 3.3: a convolutional network on CIFAR-10, and two rules for it.

One rule has the convolutions, the other all else, and both are trained together. Meta-training sees CIFAR-10's training
images, and networks of the figure are trained on its test images. By estimate, from what a step takes, a run of 1,000
steps is a minute and more of a core, and all of the figure some 16 hours: it has not been run in full yet. What is done
is kept.
"""

from __future__ import annotations

from functools import partial

from fastl2l.experiments.experiment import Budget, Experiment, Panel
from fastl2l.tasks import CIFAR10

FIVE, TWO = (0, 1, 2, 3, 4), (0, 1)
"""Labels of CIFAR-5 (airplane, automobile, bird, cat, deer) and CIFAR-2; none of `recipes.OTHER_LABELS`."""

PAIR = {"lstm": "lstm-cifar"}
SUB = {"lstm-sub": "lstm-cifar-sub"}

_panel = partial(
    Panel, steps=1000, full=Budget(30, 1, piece=1), quick=Budget(1, 1, tuning_steps=5, steps=50, piece=1),
    accuracy_runs=5,
)  # fmt: skip
_held_out = partial(CIFAR10, split="test")

EXPERIMENTS = (
    Experiment(
        "fig7",
        "Figure 7: a convolutional network on CIFAR-10",
        "the two LSTM rules, and on CIFAR-5 and CIFAR-2 those that were trained on the other labels alone, learn much "
        "more quickly than tuned optimizers.",
        [
            _panel("cifar10", "CIFAR-10", _held_out, PAIR),
            _panel("cifar5", "CIFAR-5", partial(_held_out, labels=FIVE), PAIR | SUB),
            _panel("cifar2", "CIFAR-2", partial(_held_out, labels=TWO), PAIR | SUB),
        ],
        quick=["cifar2"],
        last_tenth=True,
    ),
    Experiment(
        "fig7-one-rule",
        "Beyond Figure 7: one rule for all parameters",
        "one rule was not enough for both kinds of parameters.",
        [
            _panel(
                "cifar10",
                "CIFAR-10",
                _held_out,
                {"two rules": "lstm-cifar", "one rule": "lstm-cifar-one", "rnnprop-long": "rnnprop-long"},
                baselines=("adam",),
            )
        ],
        last_tenth=True,
    ),
)
