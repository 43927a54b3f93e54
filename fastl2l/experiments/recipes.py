"""How the shipped rules are trained."""

from __future__ import annotations

import inspect
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

from fastl2l import baselines, tasks
from fastl2l.memory_config import memory_options
from fastl2l.meta import Imitation, MetaTrainer
from fastl2l.rules import RULES, GACRule, Learned, LSTMRule, NTMRule, RNNpropRule, Rule, stepping
from fastl2l.tasks.random_networks import KINDS

RULE_OPTIONS: Mapping[str, Mapping[str, Any]] = MappingProxyType(
    {
        "quadratic": MappingProxyType({"preprocess": "raw", "output_scale": 1.0}),
        "ill-conditioned": MappingProxyType({"preprocess": "raw", "output_scale": 1.0}),
        "neural-art": MappingProxyType({"output_scale": 1.0}),
    }
)
"""By task, what its LSTM rule is where that is not the default (Andrychowicz et al. 2016, sections 3.1, 3.4 and A)."""


def fresh_rule(kind: str, task: str, *, seed: int = 0, **options: Any) -> Rule:
    """An untrained rule of this kind for this task.

    Args:
        kind: a name in `fastl2l.rules.RULES`.
        task: the task's name.
        seed: of the weights.
        options: of the kind's class, in place of what the papers have for the task.

    Raises:
        ValueError: there is no such kind, it has no such option, or an option is out of range.
    """
    if kind not in RULES:
        raise ValueError(f"rule: expected one of {', '.join(RULES)}, got {kind!r}")
    known = inspect.signature(RULES[kind]).parameters
    for option in options:
        if option not in known:
            raise ValueError(f"{option}: expected options of {kind} ({', '.join(known)}), got one of another kind's")
    papers = RULE_OPTIONS.get(task, {}) if kind in (LSTMRule.kind, GACRule.kind, NTMRule.kind) else {}
    return RULES[kind](**{**papers, **options}, seed=seed)


def first_rules(
    task: tasks.Task,
    *,
    kind: str = LSTMRule.kind,
    by_part: bool = False,
    init: Learned | None = None,
    relative: bool | None = None,
    ramp: int | None = None,
    decay: int | None = None,
    seed: int = 0,
    **options: Any,
) -> Rule | dict[str, Rule]:
    """What training on `task` starts from: a rule, or one for each part of the task's problems.

    Args:
        task: what is trained on.
        kind, options: of fresh rules, as for `fresh_rule`.
        by_part: whether each part has a rule of its own.
        init: in place of fresh rules; for a part each, a copy of it.
        relative, ramp, decay: how updates are made into steps (see `LSTMRule`); None for as `init` does.
        seed: of the weights of the first rule; those of the next parts have the next seeds.

    Raises:
        ValueError: as for `fresh_rule`; or by_part, of a task whose problems have no parts.
    """
    asked: dict[str, Any] = {"relative": relative, "ramp": ramp, "decay": decay}
    if isinstance(init, Mapping):
        return {part: stepping(one, **asked) for part, one in init.items()}
    options |= {name: value for name, value in asked.items() if value is not None}
    parts = list(task.sample(seed).parts or ()) if by_part else [""]
    if not parts:
        raise ValueError(f"by_part: expected a task whose problems have parts, such as cifar10, got {task.name!r}")
    rules = {
        part: fresh_rule(kind, task.name, seed=seed + number, **options) if init is None else stepping(init, **asked)
        for number, part in enumerate(parts)
    }
    return rules if by_part else rules[""]


@dataclass(frozen=True)
class Recipe:
    """How a rule is trained: all that is not a default.

    Args:
        name: the rule's.
        about: one sentence on what it is good for.
        task: name of the task.
        epochs: of 20 trajectories each, unless `training` has another number.
        training: arguments of `MetaTrainer`.
        kind: the rule's, a name in `fastl2l.rules.RULES`.
        augmentation: arguments of `fastl2l.tasks.augmented`.
        options: of the task.
        seed: of the first weights and of all problems.
        init: how the rule is trained that this one starts from; fresh weights by default.
        steps: relative, ramp and decay, as for `first_rules`.
        rule: arguments of the rule's class, with those of a memory as one text (`memory_options`).
        by_part: whether each part of the task's problems has a rule of its own.
    """

    name: str
    about: str
    task: str
    epochs: int
    training: Mapping[str, Any] = field(default_factory=dict)
    kind: str = LSTMRule.kind
    augmentation: Mapping[str, Any] = field(default_factory=dict)
    options: Mapping[str, Any] = field(default_factory=dict)
    seed: int = 0
    init: Recipe | None = None
    steps: Mapping[str, Any] = field(default_factory=dict)
    rule: Mapping[str, Any] = field(default_factory=dict)
    by_part: bool = False

    @property
    def commands(self) -> list[str]:
        """The commands that do the same, one after the other."""
        options = {
            "task": self.task,
            **self.options,
            **self.augmentation,
            "epochs": self.epochs,
            **self.training,
            "seed": self.seed,
        }
        if (imitation := options.pop("imitation", None)) is not None:
            options["imitate"] = ",".join(f"{teacher.name}:{teacher.lr:g}" for teacher in imitation.teachers)
            options["imitation_share"] = imitation.share
        if self.init is not None:
            options["init"] = f"runs/{self.init.name}/rule.safetensors"
        elif self.kind != LSTMRule.kind:
            options["rule"] = self.kind
        if self.by_part:
            options["by_part"] = True
        options |= {**self.rule, **self.steps}
        options["out"] = f"runs/{self.name}"
        words = [_option(name, value) for name, value in options.items()]
        return [*(self.init.commands if self.init is not None else []), " ".join(["fastl2l train", *words])]

    @property
    def made_of(self) -> Mapping[str, Any]:
        """What the first stage's rule was made with."""
        return self.rule if self.init is None else self.init.made_of

    def train(
        self, folder: str | os.PathLike[str], *, quick: bool = False, progress: bool = True
    ) -> Rule | dict[str, Rule]:
        """The rule, or those of the parts, trained; a run that was killed goes on from the checkpoints in `folder`.

        Args:
            folder: for the checkpoints.
            quick: a tenth of the epochs, for a quick look.
            progress: show how far it is.
        """
        before = None if self.init is None else self.init.train(folder, quick=quick, progress=progress)
        checkpoint = Path(folder) / f"{self.name}{'-quick' * quick}.pt"
        task = tasks.by_name(self.task, **self.options)
        own = dict(self.rule)
        own |= memory_options(own.pop("memory")) if "memory" in own else {}
        asked = {**self.steps, **own}
        rule = first_rules(task, kind=self.kind, by_part=self.by_part, init=before, seed=self.seed, **asked)
        task = tasks.augmented(task, **self.augmentation)
        trainer = MetaTrainer(rule, task, seed=self.seed, checkpoint=checkpoint, **self.training)
        trainer.fit(max(1, self.epochs // 10) if quick else self.epochs, progress=progress)
        return rule


def _option(name: str, value: Any) -> str:
    """As the command line has it: --name, with numbers in a row as 1,2,3."""
    word = f"--{name.replace('_', '-')}"
    if value is True:
        return word
    if isinstance(value, tuple):
        value = ",".join(item if isinstance(item, str) else f"{item:g}" for item in value)
    return f"{word} {value}"


def _then(before: Recipe, name: str, about: str, *, training: Mapping[str, Any], **changes: Any) -> Recipe:
    """A further stage, which starts from the rule of the one before and is like it but for `changes`."""
    return replace(before, name=name, about=about, training=MappingProxyType(dict(training)), init=before, **changes)


def _lstm_mnist_first() -> Recipe:
    return Recipe(
        "lstm-mnist-1",
        "The first stage of lstm-mnist.",
        task="mnist",
        epochs=100,
        training=MappingProxyType({"meta_lr": 3e-3, "schedule": "cosine"}),
    )


def _lstm_mnist() -> Recipe:
    """In four stages, each of which starts from the one before: longer windows see further, but need a rule that works.

    Windows of 20 steps, first-order and then exact, then trajectories of 200 steps in windows of 100 and in one.
    """
    first = _lstm_mnist_first()

    def then(before: Recipe, name: str, about: str, epochs: int, seed: int, **training: float) -> Recipe:
        exact = {"schedule": "cosine", "keep": "last", "second_derivatives": True}
        return _then(before, name, about, training={**training, **exact}, epochs=epochs, seed=seed)

    second = then(first, "lstm-mnist-2", "The second stage of lstm-mnist.", 100, seed=1, meta_lr=1e-3)
    third = then(
        second, "lstm-mnist-3", "The third stage of lstm-mnist.", 24, seed=5, horizon=200, unroll=100, meta_lr=2e-4
    )
    about = "Small sigmoid networks on images: trained on an MLP 784-20-10 on MNIST for 100, then 200 steps."
    return then(third, "lstm-mnist", about, 20, seed=6, horizon=200, unroll=200, meta_lr=3e-4)


def _rnnprop() -> Recipe:
    """Lv et al. 2017: the base MLP in other units, with convex functions beside."""
    first = Recipe(
        "rnnprop-1",
        "The first stage of rnnprop.",
        task="mnist",
        epochs=13,
        training=MappingProxyType({"meta_lr": 1e-3, "schedule": "constant", "keep": "last"}),
        kind=RNNpropRule.kind,
        augmentation=MappingProxyType({"scaling": (3.0,), "convex": 20}),
    )
    return _then(
        first,
        "rnnprop",
        "Small networks on images, of any activation: trained as the second paper's rule is, on an MLP on MNIST.",
        training={"meta_lr": 1e-3, "schedule": "cosine", "keep": "last", "validation_problems": 2},
        epochs=35,
        seed=1,
    )


def _rnnprop_long() -> Recipe:
    """Random networks of many kinds, in five stages.

    Longer ways and windows in the second, and a falling rate in the third; then exact meta-gradients, on kinds of
    networks whose second derivatives are cheap, of a rule that is relative, and in the last has a ramp and a decay too.
    """
    common = {
        "trajectories": 50,
        "validation_problems": 8,
        "validation_horizon": 500,
        "second_minibatch": True,
        "keep": "last",
    }
    first = Recipe(
        "rnnprop-long-1",
        "The first stage of rnnprop-long.",
        task="random-networks",
        epochs=17,
        training=MappingProxyType(
            {"horizon": (40, 500), "meta_lr": 1e-3, "schedule": "constant", "log_floor": 1e-3, **common}
        ),
        kind=RNNpropRule.kind,
        augmentation=MappingProxyType({"scaling": (0.0, 1.0, 3.0), "convex": 20}),
    )

    def then(before: Recipe, number: str, training: Mapping[str, Any], **changes: Any) -> Recipe:
        name, about = f"rnnprop-long-{number}", f"Stage {number} of rnnprop-long."
        return _then(before, name, about, training=training, **changes)

    longer = {**common, "horizon": (50, 2000), "unroll": 50, "log_floor": 1e-5}
    second = then(first, "2", {**longer, "meta_lr": 8e-4, "schedule": "constant"}, epochs=36, seed=1)
    third = then(second, "3", {**longer, "meta_lr": 6e-4, "schedule": "cosine"}, epochs=18, seed=2)
    exact = {**longer, "horizon": (50, 1500), "second_derivatives": True}
    slow = ("sequence", "attention", "language")
    fourth = then(
        third,
        "4",
        {**exact, "meta_lr": 5e-4, "schedule": "constant"},
        epochs=21,
        seed=4,
        augmentation=MappingProxyType({"scaling": (0.0, 0.0, 1.0), "convex": 20}),
        options=MappingProxyType({"kinds": tuple(kind for kind in KINDS if kind not in slow)}),
        steps=MappingProxyType({"relative": True}),
    )
    return _then(
        fourth,
        "rnnprop-long",
        "Networks of your own, for some thousand steps: trained on small networks of many kinds.",
        training={**exact, "meta_lr": 4e-4, "schedule": "cosine"},
        epochs=27,
        seed=6,
        steps=MappingProxyType({"ramp": 20, "decay": 1000}),
    )


def _lstm_neural_art() -> Recipe:
    """Andrychowicz et al. 2016, section 3.4: one style, 128 steps in windows of 32; first at 32 x 32, then at 64 x 64.

    A coordinate's gradient is of the same size at every size of picture, and small pictures are cheap. The paper has
    1,800 photographs; random crops, turned over at random, make as many of fewer. In logs of the loss late
    steps count.
    """
    common = {"horizon": 128, "unroll": 32, "batch": 2, "log_floor": 1.0}
    first = Recipe(
        "lstm-neural-art-1",
        "The first stage of lstm-neural-art.",
        task="neural-art",
        epochs=14,
        options=MappingProxyType({"style": "starry-night", "size": 32}),
        training=MappingProxyType(
            {
                "trajectories": 32,
                "validation_problems": 4,
                "meta_lr": 3e-3,
                "schedule": "constant",
                "keep": "last",
                **common,
            }
        ),
    )
    return _then(
        first,
        "lstm-neural-art",
        "Neural art: pictures of 64 x 64 and more from white noise in 128 steps, trained on one style.",
        training={"trajectories": 16, "validation_problems": 2, "meta_lr": 1e-3, "schedule": "cosine", **common},
        epochs=6,
        options=MappingProxyType({"style": "starry-night", "size": 64}),
        seed=1,
    )


OTHER_LABELS = (5, 6, 7, 8, 9)
"""Of CIFAR-10: dog, frog, horse, ship and truck, which LSTM-sub is trained on and CIFAR-5 and CIFAR-2 do not have."""


def _cifar() -> Iterator[Recipe]:
    """Andrychowicz et al. 2016, section 3.3: a rule for convolutions and one for all else, trained together.

    First for 100 steps, then for up to as many as figure 7 has.
    """
    common = {"trajectories": 16, "validation_problems": 2, "keep": "last"}
    for name, about, options, by_part in (
        ("lstm-cifar", "A batch-normalized convolutional network on CIFAR-10, a rule for each kind", {}, True),
        ("lstm-cifar-sub", "The same, trained on five labels", {"labels": OTHER_LABELS}, True),
        ("lstm-cifar-one", "The same, one rule for all parameters", {}, False),
    ):
        first = Recipe(
            f"{name}-1",
            f"The first stage of {name}.",
            task="cifar10",
            epochs=14,
            training=MappingProxyType({"meta_lr": 3e-3, "schedule": "constant", **common}),
            options=MappingProxyType(options),
            by_part=by_part,
        )
        longer = {"horizon": (100, 1000), "validation_horizon": 200, "meta_lr": 1e-3, "schedule": "cosine", **common}
        yield _then(first, name, f"{about}.", training=longer, epochs=8, seed=1)


EXACT = MappingProxyType({"meta_lr": 3e-3, "schedule": "cosine", "second_derivatives": True})
"""How rules for quadratics are trained."""


def _talking(scale: float) -> dict[str, tuple[str, dict[str, Any]]]:
    """Kinds and arguments of what appendix D of the first paper is compared on (docs/coupled.md), by name.

    `scale` brings gradients of the task to about 1, where a memory is concerned with them.
    """
    helps = f"inside,differences,multiply,reads=2,forget=0.05,update_bound=3,scale={scale:g}"
    ntm = NTMRule.kind
    return {
        "lstm": (LSTMRule.kind, {}),
        "gac": (GACRule.kind, {"averages": 5}),
        "ntm-paper": (ntm, {"averages": 2, "memory": f"matrix,scale={scale:g}"}),
        "ntm": (ntm, {"averages": 2, "memory": f"matrix,{helps},memory_bound=20,read_bound=5"}),
        "ntm-5-pairs": (ntm, {"averages": 2, "memory": f"pairs,pairs=5,{helps},memory_bound=10,read_bound=3"}),
        "ntm-20-pairs": (ntm, {"averages": 2, "memory": f"pairs,pairs=20,{helps},memory_bound=10,read_bound=3"}),
    }


def _quadratic() -> Iterator[Recipe]:
    about = "Random quadratic functions of 10 coordinates, for 100 steps"
    plain = Recipe("lstm-quadratic-first", "The first stage of lstm-quadratic.", "quadratic", 60, EXACT)
    yield _then(plain, "lstm-quadratic", f"{about}.", epochs=100, seed=1, training=EXACT)
    kind, rule = _talking(0.02)["ntm"]
    first = Recipe(
        "ntm-quadratic-first",
        "The first stage of ntm-quadratic.",
        "quadratic",
        60,
        EXACT,
        kind,
        rule=MappingProxyType(rule),
    )
    same: dict[str, Any] = {"training": EXACT, "rule": MappingProxyType({})}
    last = first
    for seed, number in enumerate(("second", "third"), 1):
        about_it = f"The {number} stage of ntm-quadratic."
        last = _then(last, f"ntm-quadratic-{number}", about_it, epochs=44, seed=seed, **same)
    about = "Random quadratic functions of 10 coordinates, with a memory over these."
    yield _then(last, "ntm-quadratic", about, epochs=36, seed=3, **same)


SEEDS = (0, 1, 2)
"""Of the training of what appendix D's comparison compares."""


def _appendix_d() -> Iterator[Recipe]:
    """Rules that differ in what their coordinates know of each other alone, at 400 trajectories.

    Each of 128 functions, or of a network on MNIST; with all of `SEEDS`.
    """
    spikes = {"spikes": 0.1}
    of_tasks: dict[str, tuple[str, dict[str, Any], dict[str, Any], float]] = {
        "quadratic": ("quadratic", {}, {}, 0.02),
        "ill-conditioned": ("ill-conditioned", {}, {}, 0.5),
        "spiked": ("quadratic", spikes, {"second_minibatch": True}, 0.02),
    }
    for name, (task, augmentation, training, scale) in of_tasks.items():
        for made, (kind, rule) in _talking(scale).items():
            for seed in SEEDS:
                yield Recipe(
                    f"{made}-{name}-{seed}",
                    f"Of appendix D's comparison, {name}, seed {seed}: {made}.",
                    task,
                    20,
                    MappingProxyType({**EXACT, **training}),
                    kind,
                    MappingProxyType(augmentation),
                    rule=MappingProxyType(rule),
                    seed=seed,
                )
    for made in ("lstm", "gac"):
        kind, rule = _talking(1.0)[made]
        for seed in SEEDS:
            yield replace(
                _lstm_mnist_first(),
                name=f"{made}-on-mnist-{seed}",
                about=f"Of appendix D's comparison, MNIST, seed {seed}: {made}.",
                epochs=20,
                kind=kind,
                rule=MappingProxyType(rule),
                seed=seed,
            )


def _ablations() -> Iterator[Recipe]:
    """Rules that differ in how they are trained alone (Lv et al. 2017, section 5): with and without each trick."""
    tricks: dict[str, dict[str, Any]] = {
        "tricks": {"scaling": (3.0,), "convex": 20},
        "no-scaling": {"convex": 20},
        "no-convex": {"scaling": (3.0,)},
        "no-tricks": {},
    }
    training = MappingProxyType({"meta_lr": 1e-3, "schedule": "cosine", "keep": "last", "validation_problems": 2})
    for kind in (RNNpropRule.kind, LSTMRule.kind):
        for name, augmentation in tricks.items():
            about = f"{kind}, 800 trajectories on MNIST: {name.replace('-', ' ')}."
            yield Recipe(f"{kind}-{name}", about, "mnist", 40, training, kind, MappingProxyType(augmentation))
    for trajectories in (100, 200, 400, 800, 1600):
        for name, trick in (("convex", "tricks"), ("no-convex", "no-convex")):
            about = f"rnnprop, {trajectories} trajectories on MNIST: scaling, {name.replace('-', ' ')}."
            epochs, tried = trajectories // 20, MappingProxyType(tricks[trick])
            yield Recipe(f"rnnprop-{name}-{trajectories}", about, "mnist", epochs, training, "rnnprop", tried)


def _ways_of_training() -> Iterator[Recipe]:
    """RNNprop on 8 x 8 digits, 40,000 steps of meta-training each, that differ in how these are used alone.

    Horizons: of 100 steps, drawn up to 1,000, or longer and longer; what is lowered; exact meta-gradients; a teacher.
    """
    plain = Recipe(
        "training-plain",
        "Trained on 400 trajectories of 100 steps.",
        "digits",
        20,
        MappingProxyType({"meta_lr": 1e-3, "schedule": "cosine", "keep": "last", "validation_problems": 4}),
        RNNpropRule.kind,
        MappingProxyType({"scaling": (3.0,), "convex": 20}),
    )

    def other(name: str, about: str, epochs: int = plain.epochs, **training: Any) -> Recipe:
        more = MappingProxyType({**plain.training, **training})
        return replace(plain, name=f"training-{name}", about=about, epochs=epochs, training=more)

    drawn: dict[str, Any] = {"horizon": (40, 1000), "validation_horizon": 100}
    exact: dict[str, Any] = {"second_derivatives": True}
    logs: dict[str, Any] = {"log_floor": 1e-3}
    teacher: dict[str, Any] = {"imitation": Imitation([baselines.Adam(0.01)], 0.25)}
    unseen: dict[str, Any] = {"second_minibatch": True}
    yield plain
    yield other("last-step", "The same, for the last step of a window.", step_weights="last")
    yield other("logs", "The same, for the log of the loss.", **logs)
    yield other("unseen", "The same, for minibatches that the rule does not see.", **unseen)
    yield other("exact", "The same, by exact meta-gradients.", **exact)
    yield other("teacher", "The same, a quarter of the trajectories Adam's.", **teacher)
    yield other("horizons", "Trained on 140 trajectories of 40 to 1,000 steps.", 7, **drawn)
    yield other(
        "all", "Trained on 140 trajectories of 40 to 1,000 steps, in all these ways.", 7,
        **drawn, **exact, **logs, **unseen, **teacher,
    )  # fmt: skip
    last = other("curriculum-1", "The first stage of training-curriculum.", 5)
    for stage, (epochs, trajectories, horizon) in enumerate(((5, 10, 200), (2, 10, 500), (1, 10, 1000)), start=2):
        name = f"training-curriculum-{stage}" if horizon < 1000 else "training-curriculum"
        longer = {"horizon": horizon, "trajectories": trajectories, "validation_horizon": 100}
        about = f"Longer and longer trajectories, up to {horizon} steps."
        last = _then(last, name, about, training={**plain.training, **longer}, epochs=epochs, seed=stage - 1)
    yield last


RECIPES = {
    recipe.name: recipe
    for recipe in (
        _lstm_mnist(),
        _rnnprop(),
        _rnnprop_long(),
        *_ablations(),
        *_ways_of_training(),
        _lstm_mnist_first(),
        *_cifar(),
        *_appendix_d(),
        _lstm_neural_art(),
        *_quadratic(),
    )
}
"""By name of the rule (Andrychowicz et al. 2016, sections 3.1, 3.2 and 3.4; Lv et al. 2017)."""
