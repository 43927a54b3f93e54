"""Relative rules on problems of one flat theta, where no parameter has a shape of its own."""

from __future__ import annotations

import torch
from torch import Tensor

from fastl2l.rules import Learned, rules_by_part
from fastl2l.tasks.base import Problem, parts_of
from fastl2l.tasks.scaled import scaled
from fastl2l.tasks.wrapped import wrap


def in_units(problem: Problem, rule: Learned) -> Problem:
    """`problem` with theta in the units of its parameters, in the parts whose rule is relative.

    So a plain step there is a relative one of `problem`, up to the epsilon of the rule's features. Of other rules it is
    `problem` itself, as it is of one that is in units already.

    Raises:
        TypeError, ValueError: `rule` is neither a rule nor a dict of rules by part.
    """
    relative = {part: one.config.relative for part, one in rules_by_part(rule).items()}
    if not any(relative.values()) or problem.units is None:
        return problem
    units = problem.units
    if not all(relative.values()):
        sizes = parts_of(problem)
        pieces = zip(sizes, units.split(list(sizes.values())), strict=True)
        units = torch.cat([own if relative.get(part) else torch.ones_like(own) for part, own in pieces])
    return wrap(problem, scaled, problem.theta0 / units, (units,), problem.parts, _none)


def _none(_: Tensor) -> None:
    return None
