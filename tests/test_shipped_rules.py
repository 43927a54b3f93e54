"""The rules that come with fastl2l: whole, described, and as good as their cards say."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest
import torch

from fastl2l import LSTMRule, baselines, evaluate, load_rule, tasks
from fastl2l.experiments import RECIPES, functions
from fastl2l.rule_files import read_recipe, shipped

DOCS = Path(__file__).resolve().parent.parent / "docs"


def test_every_shipped_rule_has_its_recipe():
    assert shipped().keys() <= RECIPES.keys()


@pytest.mark.parametrize("name", shipped())
def test_a_rule_says_where_it_comes_from(name):
    recipe, made = RECIPES[name], read_recipe(name)
    assert made["about"] == recipe.about
    assert made["commands"] == recipe.commands
    assert made["seed"] == recipe.seed
    assert made["epochs"] == recipe.epochs
    assert made["scores"]
    card = (DOCS / "rules" / f"{name}.md").read_text()
    for score in made["scores"].values():
        assert score in card
    assert all(command in card for command in recipe.commands)
    assert all(torch.isfinite(weight).all() for weight in load_rule(name).weights())


# A rival at the best learning rate that tuning found, or Adam as it comes; 10 problems in place of 100 for brevity.
@pytest.mark.parametrize(
    ("name", "task", "best"),
    [
        ("lstm-quadratic", tasks.Quadratic, baselines.Adam(1.468)),
        ("ntm-quadratic", tasks.Quadratic, baselines.Adam(1.468)),
        ("lstm-mnist", tasks.MNIST, baselines.Adam(0.02154)),
        ("rnnprop", tasks.MNIST, baselines.SGD(3.83)),
        ("rnnprop-long", partial(tasks.Table, "diabetes", hidden=(20,), activation="tanh"), baselines.Adam(1e-3)),
    ],
)
def test_a_rule_is_ahead_on_what_it_was_trained_for(name, task, best):
    curves = evaluate(task(), {"lstm": load_rule(name), "best": best}, steps=100, runs=10, seed=3)
    difference, half = curves.difference("lstm", "best")
    assert difference + half < 0, curves.markdown()


@pytest.mark.usefixtures("own_cache")
def test_a_memory_is_worth_its_while_and_safe():
    """On functions one by one: well below the rule without one, and none of 10,000 diverges."""
    found = functions.curves(
        tasks.Quadratic(batch=2500),
        {name: load_rule(name) for name in ("lstm-quadratic", "ntm-quadratic")},
        steps=100,
        problems=4,
    )
    assert found.diverged("ntm-quadratic") == 0
    difference, half = found.difference("ntm-quadratic", "lstm-quadratic")
    assert difference + half < 0, found.markdown()


def test_a_name_is_only_a_name():
    assert isinstance(load_rule("lstm-mnist"), LSTMRule)
    with pytest.raises(FileNotFoundError, match=r"lstm-cifar: expected a rule file or one of lstm-mnist, lstm-neural"):
        load_rule("lstm-cifar")
