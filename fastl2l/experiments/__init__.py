"""Every figure and table of the papers, one declarative entry each, and the recipes of the rules that they show."""

from fastl2l.experiments import andrychowicz2016, cifar, lv2017, neural_art
from fastl2l.experiments.appendix_d import AppendixD
from fastl2l.experiments.experiment import (
    Experiment,
    Reproducible,
    check_rules,
    folder_name,
    missing,
    reproduce,
    retrain,
)
from fastl2l.experiments.own_networks import OwnNetworks
from fastl2l.experiments.recipes import RECIPES, first_rules, fresh_rule

ALL: dict[str, Reproducible] = {
    experiment.name: experiment
    for experiment in (
        *andrychowicz2016.EXPERIMENTS,
        *cifar.EXPERIMENTS,
        *neural_art.EXPERIMENTS,
        *lv2017.EXPERIMENTS,
        OwnNetworks(),
        AppendixD(),
    )
}
"""By name."""

__all__ = [
    "ALL",
    "RECIPES",
    "Experiment",
    "OwnNetworks",
    "Reproducible",
    "by_name",
    "check_rules",
    "first_rules",
    "folder_name",
    "fresh_rule",
    "missing",
    "reproduce",
    "retrain",
]


def by_name(name: str) -> Reproducible:
    """The experiment called `name`. Raises ValueError for another name, with those there are."""
    if name not in ALL:
        raise ValueError(f"name: expected one of {', '.join(ALL)}, got {name!r}")
    return ALL[name]
