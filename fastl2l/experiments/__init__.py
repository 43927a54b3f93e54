"""Every figure and table of the papers, one declarative entry each, and the recipes of the rules that they show."""

from fastl2l.experiments.andrychowicz2016 import EXPERIMENTS
from fastl2l.experiments.experiment import Experiment, Reproducible, folder_name, reproduce, retrain
from fastl2l.experiments.own_networks import OwnNetworks
from fastl2l.experiments.recipes import RECIPES, fresh_rule

ALL: dict[str, Reproducible] = {experiment.name: experiment for experiment in (*EXPERIMENTS, OwnNetworks())}
"""By name."""

__all__ = [
    "ALL",
    "RECIPES",
    "Experiment",
    "OwnNetworks",
    "Reproducible",
    "by_name",
    "folder_name",
    "fresh_rule",
    "reproduce",
    "retrain",
]


def by_name(name: str) -> Reproducible:
    """The experiment called `name`. Raises ValueError for another name, with those there are."""
    if name not in ALL:
        raise ValueError(f"name: expected one of {', '.join(ALL)}, got {name!r}")
    return ALL[name]
