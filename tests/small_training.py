"""Small meta-training runs, for the tests of the trainer."""

from __future__ import annotations

import math
from dataclasses import dataclass

from fastl2l import LSTMRule, MetaTrainer
from fastl2l.tasks import Quadratic
from fastl2l.tasks.base import problem_seed

SMALL = {"horizon": 8, "unroll": 4, "trajectories": 3, "validation_problems": 2, "meta_lr": 0.01}
TASK = Quadratic(dim=3, batch=4)


def small_rule(**arguments):
    return LSTMRule("raw", **{"output_scale": 1.0, "hidden_size": 4, "num_layers": 1} | arguments)


def trainer(task=TASK, rule=None, validation=None, **changes):
    """A trainer, which finds these validation losses after its epochs if some are given."""
    made = MetaTrainer(rule or small_rule(), task, **SMALL | changes)
    if validation is not None:
        made.validate = lambda: validation[len(made.history)]
    return made


def outcome(trained):
    """All that a run leaves, for comparison to the bit; repr, since NaN is not equal to itself."""
    history = repr([tuple(epoch) for epoch in trained.history])
    return history, trained.best_loss, [weight.tolist() for weight in trained.rule.weights()]


def finished(trained, epochs):
    trained.fit(epochs, progress=False)
    return outcome(trained)


@dataclass(frozen=True)
class Cliff(Quadratic):
    """From step `edge` on, the losses of the problems with these seeds are `value`."""

    edge: int = 0
    seeds: tuple = ()
    value: float = math.nan

    def sample(self, seed):
        problem = super().sample(seed)
        if seed in self.seeds:
            loss = problem.loss
            problem.loss = lambda theta, step: loss(theta, step) * (self.value if step >= self.edge else 1)
        return problem


def seeds(purpose, *indices):
    return tuple(problem_seed(0, purpose, index) for index in indices)
