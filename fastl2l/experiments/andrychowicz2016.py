"""The experiments of Andrychowicz et al. 2016, sections 3.1 and 3.2, and what lies just beyond them."""

from __future__ import annotations

from functools import partial

from fastl2l.experiments.experiment import Experiment, Panel, Study
from fastl2l.tasks import MNIST, Digits, FashionMNIST, Quadratic

UNITS = (5, 10, 20, 40, 80)
RULE = {"lstm": "lstm-mnist"}
LAYERS = {1: "one hidden layer", 2: "two hidden layers"}

EXPERIMENTS = (
    Experiment(
        "fig4-quadratic",
        "Figure 4, left: quadratic functions",
        "the LSTM ends at .037, the best of the tuned optimizers at .05 (read off its figure).",
        [Panel("quadratic", "quadratics, 10 coordinates", Quadratic, {"lstm": "lstm-quadratic"})],
    ),
    Experiment(
        "fig4-mnist",
        "Figure 4, middle: MNIST",
        "the LSTM ends at .25, the tuned optimizers between .34 and .45 (read off its figure).",
        [Panel("mnist", "MLP 784-20-10, sigmoid", MNIST, RULE)],
    ),
    Experiment(
        "fig4-mnist-200",
        "Figure 4, right: MNIST, 200 steps",
        "the LSTM, trained for 100 steps, goes on descending beyond them, to .22.",
        [Panel("mnist-200", "MLP 784-20-10, sigmoid", MNIST, RULE, steps=200)],
    ),
    Experiment(
        "fig5",
        "Figure 5: other networks than the rule was trained on",
        "the LSTM stays ahead with 40 units and with two layers, and fails with ReLU.",
        [
            Panel("units-40", "40 hidden units", partial(MNIST, hidden=(40,)), RULE),
            Panel("layers-2", "two hidden layers of 20", partial(MNIST, hidden=(20, 20)), RULE),
            Panel("relu", "ReLU", partial(MNIST, activation="relu"), RULE),
        ],
    ),
    Experiment(
        "fig6",
        "Figure 6: final loss by architecture",
        "the LSTM ends below the tuned optimizers on most architectures, though it was trained on one.",
        [
            Panel(
                f"layers-{layers}-units-{units}",
                title,
                partial(MNIST, hidden=(units,) * layers),
                RULE,
                x=units,
            )
            for layers, title in LAYERS.items()
            for units in UNITS
        ],
        quick=[f"layers-{layers}-units-{units}" for layers in LAYERS for units in (5, 20, 40)],
        study=Study("hidden units a layer", "units", marked=20),
    ),
    Experiment(
        "beyond-data",
        "Beyond the paper: other images",
        "not tried there.",
        [
            Panel("fashion-mnist", "Fashion-MNIST, MLP 784-20-10", FashionMNIST, RULE),
            Panel("digits", "8 x 8 digits, MLP 64-20-10", Digits, RULE),
        ],
    ),
    Experiment(
        "beyond-1000",
        "Beyond the paper: MNIST, 1,000 steps",
        "not tried there; Lv et al. 2017 find that such rules stop descending.",
        [Panel("mnist-1000", "MLP 784-20-10, sigmoid", MNIST, RULE, steps=1000)],
    ),
)
