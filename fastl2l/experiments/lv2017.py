"""The experiments of Lv, Jiang, Li 2017, section 5: RNNprop on other networks, and for longer, than it was trained on.

All of it together is about three hours of one core; what a problem costs decides how many there are of it.
Every rate is tuned, and every loss compared, by the mean over the last tenth of the steps, for which a few problems do.
"""

from __future__ import annotations

from functools import partial

from fastl2l import baselines, tasks
from fastl2l.experiments.experiment import Budget, Experiment, Panel, Study

RULES = {name: name for name in ("rnnprop", "rnnprop-long", "lstm-mnist")}
"""The paper's rule, the one that fastl2l recommends, and the first paper's rule, in every figure."""

_short = partial(Panel, full=Budget(runs=100, tuning_runs=10))
_deep = partial(Panel, full=Budget(runs=50, tuning_runs=5))
_2000 = partial(Panel, steps=2000, full=Budget(20, 4, piece=5), quick=Budget(2, 1, tuning_steps=100, piece=1))
_10000 = partial(
    Panel, steps=10_000, full=Budget(5, 2, piece=1), quick=Budget(2, 1, tuning_steps=100, steps=3000, piece=1)
)
_long = partial(Panel, steps=1000, baselines=("adam",), full=Budget(20, 4, piece=5), quick=Budget(2, 1, piece=1))
_sine = partial(Panel, full=Budget(runs=100, tuning_runs=4))
_cnn = partial(Panel, quick=Budget(2, 1, tuning_steps=10, piece=1))

BASE = "MLP 784-20-10, sigmoid"
ACTIVATIONS = {"relu": "ReLU", "elu": "ELU", "tanh": "tanh"}
DEPTHS = range(2, 11)
RATES = tuple(float(f"{10 ** (number / 3):.2g}") for number in range(-12, 7))
"""Three a decade, from 1e-4 to 100."""

TRICKS = {
    "rnnprop, both": "rnnprop-tricks",
    "rnnprop, no scaling": "rnnprop-no-scaling",
    "rnnprop, no convex": "rnnprop-no-convex",
    "rnnprop, neither": "rnnprop-no-tricks",
    "lstm, both": "lstm-tricks",
    "lstm, no scaling": "lstm-no-scaling",
    "lstm, no convex": "lstm-no-convex",
    "lstm, neither": "lstm-no-tricks",
}
"""Rules that were trained with random scaling, with the convex function, with both and with neither."""
ITERATIONS = (100, 200, 400, 800, 1600)
"""Trajectories that the rules of `CONVEX` were trained for."""
CONVEX = {"with the convex function": "rnnprop-convex", "without": "rnnprop-no-convex"}


WAYS = {
    "plain": "training-plain",
    "last step": "training-last-step",
    "logs": "training-logs",
    "unseen": "training-unseen",
    "exact": "training-exact",
    "teacher": "training-teacher",
    "horizons": "training-horizons",
    "curriculum": "training-curriculum",
    "all": "training-all",
}
"""Rules that were trained for as many steps in other ways (Chen et al. 2020, and what else is tried since)."""


def _mlp(layers: int) -> partial[tasks.MNIST]:
    return partial(tasks.MNIST, hidden=(20,) * layers)


EXPERIMENTS = (
    Experiment(
        "lv-mlp-100",
        "The base MLP, 100 steps",
        "RNNprop, which has no learning rate, ends below every tuned optimizer.",
        [_short("sigmoid", BASE, tasks.MNIST, RULES, baselines=baselines.FIRST_ORDER)],
        last_tenth=True,
    ),
    Experiment(
        "lv-mlp-2000",
        "The base MLP, 2,000 steps",
        "RNNprop is level with the best tuned optimizers, where the LSTM rule has stopped descending.",
        [_2000("sigmoid-2000", BASE, tasks.MNIST, RULES)],
        last_tenth=True,
    ),
    Experiment(
        "lv-mlp-10000",
        "The base MLP, 10,000 steps",
        "RNNprop, trained for 100 steps, is still falling after 10,000, a little behind the best tuned optimizers; "
        "Chen et al. 2020 find it at exp(-6) there, and at exp(-10.3) when it is trained on longer horizons.",
        [_10000("sigmoid-10000", BASE, tasks.MNIST, RULES)],
        last_tenth=True,
    ),
    Experiment(
        "lv-learning-rates",
        "Final loss of the base MLP by learning rate, 100 steps",
        "hand-made optimizers are run at many rates; RNNprop, which has none to tune, is to be level with the best or "
        "below.",
        [
            Panel(
                "rates",
                BASE,
                tasks.MNIST,
                RULES,
                baselines=baselines.FIRST_ORDER,
                rates=RATES,
                full=Budget(runs=20, tuning_runs=0),
                quick=Budget(runs=2, tuning_runs=0, piece=1),
            )
        ],
        last_tenth=True,
    ),
    Experiment(
        "lv-activations",
        "Other activations, 100 steps",
        "RNNprop, trained on the sigmoid, ends below every tuned optimizer with ReLU, ELU and tanh.",
        [
            _short(name, f"MLP 784-20-10, {title}", partial(tasks.MNIST, activation=name), RULES)
            for name, title in ACTIVATIONS.items()
        ],
        quick=["relu"],
        last_tenth=True,
    ),
    Experiment(
        "lv-deep",
        "Deep sigmoid MLPs, 100 steps",
        "RNNprop, trained on one hidden layer, ends below every tuned optimizer as long as any of them moves.",
        [_deep(f"layers-{layers}", "20 hidden units a layer", _mlp(layers), RULES, x=layers) for layers in DEPTHS],
        quick=[f"layers-{layers}" for layers in (2, 5)],
        study=Study("hidden layers", "layers"),
        last_tenth=True,
    ),
    Experiment(
        "lv-deep-curve",
        "A deep sigmoid MLP, 100 steps",
        "one loss curve of a deep network, beside the final losses by depth.",
        [_deep("layers-5", "five hidden layers of 20", _mlp(5), RULES)],
        last_tenth=True,
    ),
    Experiment(
        "lv-cnn",
        "Convolutional networks, 100 steps",
        "RNNprop ends below every tuned optimizer on c-c-p-f on MNIST; the best rates of Adam in its code are .0156, "
        ".0078, .0055 and .0039.",
        [
            _cnn(
                f"{name}-{size}",
                f"{title} on {shown}",
                partial(data, convolutions=convolutions, hidden=hidden, activation="relu"),
                RULES,
                full=Budget(runs, tuning_runs=1, piece=1),
            )
            for size, title, convolutions, hidden, runs in (
                ("small", "c-c-p-f", (2,), (), 10),
                ("large", "c-c-p-c-c-p-f-f", (2, 2), (64,), 5),
            )
            for name, shown, data in (
                ("mnist", "MNIST", tasks.MNIST),
                ("cifar10", "CIFAR-10", partial(tasks.CIFAR10, kernel=3, widening=2, batch_norm=False)),
            )
        ],
        quick=["mnist-small"],
        last_tenth=True,
    ),
    Experiment(
        "lv-sine",
        "An LSTM that predicts a sine, 100 steps",
        "a table of final losses; of the tuned optimizers Adagrad at .5 is the best with one layer, Adam with two (at "
        ".022) and with less noise (at .031; the rates are in its code).",
        [
            _sine(name, title, partial(tasks.Sine, **options), RULES, baselines=(*baselines.DEFAULT, "adagrad"))
            for name, title, options in (
                ("one-layer", "one layer", {}),
                ("two-layers", "two layers", {"layers": 2}),
                ("less-noise", "one layer, noise 0.01", {"noise": 0.01}),
            )
        ],
        quick=["one-layer"],
        last_tenth=True,
    ),
    Experiment(
        "lv-tricks",
        "Rules trained with and without each trick",
        "rules are trained without random scaling, without the convex function and without both, to show what each "
        "is worth.",
        [
            _deep("sigmoid", BASE, tasks.MNIST, TRICKS, baselines=("adam",)),
            _deep("relu", "ReLU", partial(tasks.MNIST, activation="relu"), TRICKS, baselines=("adam",)),
            _10000("sigmoid-1000", "sigmoid, 1,000 steps", tasks.MNIST, TRICKS, steps=1000, baselines=("adam",)),
        ],
        quick=["sigmoid", "relu"],
        last_tenth=True,
    ),
    Experiment(
        "lv-training",
        "RNNprop trained in other ways, on 8 x 8 digits",
        "not tried there; Chen et al. 2020 find that a curriculum of horizons and imitation make rules that last.",
        [
            _deep("digits-100", "MLP 64-20-10, sigmoid", tasks.Digits, WAYS, baselines=("adam",)),
            _long("digits-1000", "sigmoid, 1,000 steps", tasks.Digits, WAYS),
            _long("relu-1000", "ReLU, 1,000 steps", partial(tasks.Digits, activation="relu"), WAYS),
            _deep("mnist-100", "MNIST, MLP 784-20-10, sigmoid", tasks.MNIST, WAYS, baselines=("adam",)),
        ],
        quick=["digits-100"],
        last_tenth=True,
    ),
    Experiment(
        "lv-convex-iterations",
        "RNNprop with and without the convex function, by the length of its training",
        "both are shown by how long they were trained.",
        [
            _deep(
                f"{name}-{iterations}",
                title,
                partial(tasks.MNIST, activation=name),
                {label: f"{rule}-{iterations}" for label, rule in CONVEX.items()},
                x=iterations,
                baselines=("adam",),
            )
            for name, title in (("sigmoid", BASE), ("relu", "MLP 784-20-10, ReLU"))
            for iterations in ITERATIONS
        ],
        study=Study("trajectories of the training", "trajectories", log=True),
        last_tenth=True,
    ),
)
