"""The command line: arguments in, calls of the library, tables out. No logic of its own."""

from __future__ import annotations

import contextlib
import functools
import inspect
import math
import os
import shlex
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer
from rich.table import Table
from rich.text import Text

from fastl2l import baselines, environment, experiments, files, import_rules, plots, rule_files, tasks
from fastl2l.build import locked
from fastl2l.evaluate import Curves, check, comparisons, evaluate
from fastl2l.inside import look
from fastl2l.memory_config import memory_options
from fastl2l.meta import Imitation, MetaTrainer, search_meta_lr
from fastl2l.processes import current, joined
from fastl2l.progress import plain_console
from fastl2l.rules import RULES, Learned, LSTMRule, Rule
from fastl2l.stylize import Painting, default_optimizer, stylize
from fastl2l.tasks.base import integer
from fastl2l.tasks.networks import ACTIVATIONS
from fastl2l.tasks.neural_art import TERMS, Weights
from fastl2l.tasks.tables import TABLES
from fastl2l.tasks.vgg import NETWORKS

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Learned optimizers: meta-train an update rule, and compare it with tuned optimizers.",
)
console = plain_console()


def _say(text: str | Text) -> None:
    """Print a line, which is not cut where the terminal ends: what is copied from it is whole."""
    console.print(text, soft_wrap=True)


TaskName = Annotated[str, typer.Option("--task", help=f"One of {', '.join(tasks.names())}.")]
TASK_OPTIONS = {
    "hidden": Annotated[str | None, typer.Option(help="Hidden units, by layer: 20 or 40,40; '' for none.")],
    "convolutions": Annotated[str | None, typer.Option(help="3 x 3 convolutions of the network, by stage: 2 or 2,2.")],
    "activation": Annotated[str | None, typer.Option(help=f"Of the network: {', '.join(ACTIVATIONS)}.")],
    "batch_size": Annotated[int | None, typer.Option(help="Images, rows or sequences in a minibatch.")],
    "table": Annotated[str | None, typer.Option(help=f"For the task table: {', '.join(TABLES)}.")],
    "kinds": Annotated[str | None, typer.Option(help="Of random-networks: some, such as image-mlp,curve.")],
    "labels": Annotated[str | None, typer.Option(help="Of cifar10: those whose images are used, such as 0,1,8,9.")],
    "content": Annotated[str | None, typer.Option(help="Of neural-art: a folder of photographs, or one.")],
    "style": Annotated[str | None, typer.Option(help="Of neural-art: a picture, or one in the data folder.")],
    "size": Annotated[int | None, typer.Option(help="Of neural-art: pixels of a side.")],
    "split": Annotated[str | None, typer.Option(help="Of the data: train, test; of photographs also validation, all.")],
}
"""Of every command that takes a task; None is what the task has by default."""
SecondDerivatives = Annotated[bool, typer.Option("--second-derivatives", help="Exact meta-gradients.")]
Seed = Annotated[int, typer.Option(help="Of all random numbers.")]
Scaling = Annotated[
    str | None, typer.Option(help="Random scaling of coordinates: 3, or 0,1,3 for one of these ranges a problem.")
]
Convex = Annotated[int, typer.Option(help="Coordinates of a convex function that is added to each problem.")]
Spikes = Annotated[float, typer.Option(help="Share of the steps whose gradients are 100 times too large.")]
Kind = Annotated[str, typer.Option("--rule", help=f"What is trained: {' or '.join(RULES)}.")]


def _task(name: str, **options: str | int | None) -> tasks.Task:
    given: dict[str, Any] = {option: value for option, value in options.items() if value is not None}
    for option in given.keys() & {"hidden", "convolutions", "labels"}:
        given[option] = _numbers(option, given[option], int, "40,40") if given[option] else ()
    if "kinds" in given:
        given["kinds"] = tuple(given["kinds"].split(","))
    return tasks.by_name(name, **given)


def _on_task(command: Callable[..., None]) -> Callable[..., None]:
    """A command that has `TASK_OPTIONS` beside its own, and gets `problems`: the task that they and --task describe."""

    @functools.wraps(command)
    def with_options(task: str, **given: Any) -> None:
        command(task=task, problems=_task(task, **{name: given.pop(name) for name in TASK_OPTIONS}), **given)

    own = inspect.signature(command, eval_str=True).parameters.values()
    options = [
        inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=kind)
        for name, kind in TASK_OPTIONS.items()
    ]
    parameters = [*(parameter for parameter in own if parameter.name != "problems"), *options]
    with_options.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    with_options.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return with_options


def _numbers(name: str, text: str, kind: type[int] | type[float], example: str) -> tuple[Any, ...]:
    try:
        return tuple(kind(number) for number in text.split(","))
    except ValueError:
        raise ValueError(f"{name}: expected numbers such as {example}, got {text!r}") from None


def _averages(text: str | None) -> int | tuple[int, ...] | None:
    numbers = None if text is None else _numbers("averages", text, int, "5 or 2,5")
    return numbers[0] if numbers is not None and len(numbers) == 1 else numbers


def _augmented(task: tasks.Task, scaling: str | None, convex: int, spikes: float) -> tasks.Task:
    ranges = () if scaling is None else _numbers("scaling", scaling, float, "0,1,3")
    return tasks.augmented(task, scaling=ranges, convex=integer("convex", convex, least=0), spikes=spikes)


def _imitation(teachers: str | None, share: float | None) -> Imitation | None:
    if teachers is None:
        if share is not None:
            raise ValueError(f"imitation_share: expected none without --imitate, got {share:g}")
        return None
    built = []
    for entry in teachers.split(","):
        name, separator, lr = entry.partition(":")
        if not separator:
            raise ValueError(f"imitate: expected NAME:RATE such as adam:0.01, got {entry!r}")
        built.append(baselines.by_name(name, *_numbers("imitate", lr, float, "adam:0.01")))
    return Imitation(built) if share is None else Imitation(built, share)


@app.command()
@_on_task
def train(
    problems: tasks.Task,
    task: TaskName = "digits",
    out: Annotated[Path, typer.Option(help="Folder for the rule, the checkpoint and the figure.")] = Path("runs/train"),
    epochs: Annotated[int, typer.Option(help="Epochs in all; a run that is resumed must name the same.")] = 50,
    trajectories: Annotated[int, typer.Option(help="Trajectories an epoch.")] = 20,
    batch: Annotated[int, typer.Option(help="Trajectories side by side; divides the trajectories.")] = 1,
    pieces: Annotated[
        int | None,
        typer.Option(
            help="Of a batch, dealt out to processes; by default 4, or the most that divides 4 and the batch."
        ),
    ] = None,
    horizon: Annotated[
        str, typer.Option(help="Steps of a trajectory; 50,2000 for a number between these, drawn log-uniformly.")
    ] = "100",
    unroll: Annotated[int, typer.Option(help="Steps of a window of truncated BPTT; divides the horizon.")] = 20,
    validation_problems: Annotated[int, typer.Option(help="Problems that an epoch is validated on.")] = 20,
    validation_horizon: Annotated[int | None, typer.Option(help="For so many steps; by default the horizon.")] = None,
    meta_lr: Annotated[float, typer.Option(help="Learning rate of Adam on the rule.")] = 3e-3,
    schedule: Annotated[str, typer.Option(help="Of the meta learning rate: constant or cosine.")] = "cosine",
    seed: Seed = 0,
    by_part: Annotated[
        bool, typer.Option("--by-part", help="A rule for each part of the task's problems, such as conv and fc.")
    ] = False,
    scaling: Scaling = None,
    convex: Convex = 0,
    spikes: Spikes = 0.0,
    step_weights: Annotated[str | None, typer.Option(help="Of a window's losses: 'last', or a number a step.")] = None,
    log_floor: Annotated[float | None, typer.Option(help="Train on log(loss + this) in place of the loss.")] = None,
    second_minibatch: Annotated[
        bool, typer.Option("--second-minibatch", help="Train on losses of unseen ones.")
    ] = False,
    imitate: Annotated[str | None, typer.Option(help="Teachers to learn from too: adam:0.01,nag:0.1.")] = None,
    imitation_share: Annotated[
        float | None, typer.Option(help="Share of trajectories that teachers take; a quarter by default.")
    ] = None,
    rule: Kind = LSTMRule.kind,
    preprocess: Annotated[
        str | None, typer.Option(help="Of gradients, for lstm: log_sign or raw; by default the task's.")
    ] = None,
    output_scale: Annotated[float | None, typer.Option(help="Factor on updates; by default the task's.")] = None,
    hidden_size: Annotated[int | None, typer.Option(help="LSTM units a layer; 20 by default.")] = None,
    layers: Annotated[int | None, typer.Option(help="LSTM layers; 2 by default.")] = None,
    averages: Annotated[
        str | None, typer.Option(help="Averaged units of each layer, for gac and ntm: 5, or 2,5.")
    ] = None,
    memory: Annotated[
        str | None, typer.Option(help="For ntm, with its options: matrix, or pairs,pairs=20,inside,forget=0.05.")
    ] = None,
    relative: Annotated[
        bool, typer.Option("--relative", help="Updates in units of the size that each parameter has at first.")
    ] = False,
    ramp: Annotated[int | None, typer.Option(help="Steps in which updates rise to their full size.")] = None,
    decay: Annotated[int | None, typer.Option(help="Steps T after which they fall, to T/t of it at step t.")] = None,
    keep: Annotated[str, typer.Option(help="Which epoch's weights: best, by validation, or last.")] = "best",
    second_derivatives: SecondDerivatives = False,
    init: Annotated[str | None, typer.Option(help="A rule to start from, in place of fresh weights.")] = None,
    backend: Annotated[str, typer.Option(help="auto, native, triton or reference.")] = "auto",
    tensorboard: Annotated[Path | None, typer.Option(help="Folder for TensorBoard curves.")] = None,
) -> None:
    """Meta-train an update rule on a task. Run it again to go on where it was stopped.

    Example: fastl2l train --task mnist --hidden 20 --epochs 100 --out runs/mnist
    """
    changed: dict[str, Any] = {"preprocess": preprocess, "output_scale": output_scale}
    changed |= {"hidden_size": hidden_size, "num_layers": layers, "averages": _averages(averages)}
    changed = {name: value for name, value in changed.items() if value is not None}
    changed |= {} if memory is None else memory_options(memory)
    integer("epochs", epochs)
    if init is not None and (changed or rule != LSTMRule.kind):
        raise ValueError(f"{next(iter(changed), 'rule')}: expected none beside init, whose rule has its own")
    first = None if init is None else rule_files.load_rule(init)
    _check_folder(out)
    steps, weights = _numbers("horizon", horizon, int, "100 or 50,2000"), step_weights
    start: dict[str, Any] = {
        "kind": rule,
        "by_part": by_part,
        "init": first,
        "relative": relative or None,
        "ramp": ramp,
        "decay": decay,
        "seed": seed,
    }
    trained = experiments.first_rules(problems, **start | changed)
    trainer = MetaTrainer(
        trained,
        _augmented(problems, scaling, convex, spikes),
        horizon=steps[0] if len(steps) == 1 else steps,
        unroll=unroll,
        meta_lr=meta_lr,
        seed=seed,
        trajectories=trajectories,
        batch=batch,
        pieces=pieces,
        validation_problems=validation_problems,
        validation_horizon=validation_horizon,
        step_weights=weights if weights in (None, "last") else _numbers("step_weights", str(weights), float, "0,1"),
        log_floor=log_floor,
        second_minibatch=second_minibatch,
        imitation=_imitation(imitate, imitation_share),
        schedule=schedule,
        keep=keep,
        second_derivatives=second_derivatives,
        backend=backend,
        checkpoint=out / "checkpoint.pt",
        tensorboard=tensorboard,
    )
    if len(trainer.history) > epochs:
        raise ValueError(f"epochs: expected at least the {len(trainer.history)} that are done in {out}, got {epochs}")
    if trainer.history:
        _say(f"going on after epoch {len(trainer.history)} of {out / 'checkpoint.pt'}")
    with _alone(out):
        try:
            history = trainer.fit(epochs)
        except KeyboardInterrupt:
            _say(f"stopped after epoch {len(trainer.history)}; the same command goes on from there")
            raise
        recipe_made = {
            "command": shlex.join(["fastl2l", *sys.argv[1:]]),
            "epochs": len(history),
            **trainer.settings(),
            "keep": keep,
            "validation_loss": trainer.kept_loss,
        }
        write = current().first
        write(lambda: rule_files.save_rule(trained, out / "rule.safetensors", recipe=recipe_made))
    floor = trainer.log_floor
    write(lambda: plots.plot_history(history, out / "training.png", title=f"Meta-training on {task}", log_floor=floor))
    _say(f"validation loss {trainer.kept_loss:.4g} ({keep} epoch)")
    if not math.isfinite(trainer.kept_loss):
        _say("the rule diverges on validation problems; a smaller --output-scale or --meta-lr may help, or bounds")
    _say(f"rule:   {out / 'rule.safetensors'}\nfigure: {out / 'training.png'}")


@app.command(name="evaluate")
@_on_task
def evaluate_command(
    problems: tasks.Task,
    rule: Annotated[
        list[str], typer.Option(help="A rule file, a shipped rule, or NAME=FILE; may be given several times.")
    ],
    task: TaskName = "digits",
    out: Annotated[Path, typer.Option(help="Folder for the table, the curves and the figure.")] = Path("runs/evaluate"),
    baseline: Annotated[str, typer.Option(help="Tuned optimizers to compare with, or 'none'.")] = ",".join(
        baselines.DEFAULT
    ),
    steps: Annotated[int, typer.Option(help="Optimization steps.")] = 100,
    runs: Annotated[int, typer.Option(help="Fresh problems; every optimizer sees the same.")] = 100,
    seed: Seed = 1,
    backend: Annotated[str, typer.Option(help="auto, native, triton or reference.")] = "auto",
) -> None:
    """Compare update rules with tuned optimizers on fresh problems of a task: a table, a figure, CSV and JSON.

    Example: fastl2l evaluate --task digits --rule runs/demo/rule.safetensors --out runs/demo/evaluation
    """
    optimizers: dict[str, Any] = _by_name("rule", map(_named_rule, rule))
    if baseline != "none":
        tuned = [(name, baselines.by_name(name)) for name in baseline.split(",")]
        optimizers = _by_name("rule and baseline", [*optimizers.items(), *tuned])
    arguments: dict[str, Any] = {"steps": steps, "runs": runs, "seed": seed, "backend": backend}
    check(problems, optimizers, **arguments)
    _check_folder(out)
    with _alone(out):
        curves = evaluate(problems, optimizers, **arguments, progress=True)
        write = current().first
        write(lambda: curves.save(out))
        write(lambda: files.write_text(out / "table.md", curves.markdown() + "\n"))
        figure = write(lambda: plots.plot_curves(curves, out / "curves.png"))
    _print_curves(curves)
    _say(f"figure: {figure}\nnumbers: {out}")


def _print_curves(curves: Curves) -> None:
    console.print(curves.table())
    for line in comparisons(curves):
        _say(line)


def _named_rule(entry: str) -> tuple[str, Learned]:
    """A rule, or some by part, and its name: what comes before the first =, unless that is in a path, or its kind."""
    name, separator, path = entry.partition("=")
    if not separator or Path(entry).exists() or Path(name).name != name:
        rule = rule_files.load_rule(entry)
        return _kind(rule), rule
    return name, rule_files.load_rule(path)


def _kind(rule: Learned) -> str:
    return rule.kind if isinstance(rule, Rule) else "+".join(dict.fromkeys(one.kind for one in rule.values()))


def _by_name(what: str, pairs: Iterable[tuple[str, Any]]) -> dict[str, Any]:
    """As a dict, in which nothing takes another's place."""
    found: dict[str, Any] = {}
    for name, value in pairs:
        if name in found:
            raise ValueError(f"{what}: expected another name for each, got {name!r} twice; NAME=FILE names a rule")
        found[name] = value
    return found


def _check_folder(out: Path) -> None:
    """That results can go there, before there are any."""
    there = next(path for path in (out.absolute(), *out.absolute().parents) if path.exists())
    if not there.is_dir() or not os.access(there, os.W_OK):
        what = "a folder that cannot be written to" if there.is_dir() else "a file"
        raise ValueError(f"out: expected a folder, new or to be written to, got {out}, where {there} is {what}")


@contextlib.contextmanager
def _alone(out: Path) -> Iterator[None]:
    """While no other command writes to the folder."""

    def lock() -> None:
        try:
            stack.enter_context(locked(out / ".lock", wait=False))
        except BlockingIOError as error:
            raise ValueError(f"out: {out} is another command's at this moment; wait, or name another folder") from error

    with contextlib.ExitStack() as stack:
        current().first(lock)
        yield


@app.command()
@_on_task
def tune(
    problems: tasks.Task,
    task: TaskName = "digits",
    out: Annotated[Path, typer.Option(help="Folder for the study, the checkpoints and the figure.")] = Path(
        "runs/tune"
    ),
    trials: Annotated[int, typer.Option(help="Learning rates to try, in all.")] = 10,
    epochs: Annotated[int, typer.Option(help="Epochs of each.")] = 20,
    low: Annotated[float, typer.Option(help="Lowest rate.")] = 1e-4,
    high: Annotated[float, typer.Option(help="Highest rate.")] = 1e-1,
    trajectories: Annotated[int, typer.Option(help="Trajectories an epoch.")] = 20,
    schedule: Annotated[str, typer.Option(help="Of the meta learning rate: constant or cosine.")] = "cosine",
    rule: Kind = LSTMRule.kind,
    second_derivatives: SecondDerivatives = False,
    seed: Seed = 0,
    storage: Annotated[
        str | None, typer.Option(help="For machines without a folder in common: a database's URL, or a journal file.")
    ] = None,
) -> None:
    """Search the meta learning rate at random, by validation loss. Run it again to go on where it was stopped.

    Example: fastl2l tune --task quadratic --trials 10 --epochs 20
    """
    _check_folder(out)

    def make_trainer(meta_lr: float, checkpoint: Path) -> MetaTrainer:
        return MetaTrainer(
            experiments.fresh_rule(rule, task, seed=seed),
            problems,
            meta_lr=meta_lr,
            seed=seed,
            trajectories=trajectories,
            schedule=schedule,
            second_derivatives=second_derivatives,
            checkpoint=checkpoint,
        )

    found = search_meta_lr(
        make_trainer, out, trials=trials, epochs=epochs, low=low, high=high, seed=seed, storage=storage
    )
    rates = Table("meta learning rate", "validation loss", title=task)
    for trial in found:
        rates.add_row(f"{trial.meta_lr:.3g}", f"{trial.validation_loss:.4g}")
    console.print(rates)
    figure = current().first(
        lambda: plots.plot_search(found, out / "search.png", title=f"{task}, {epochs} epochs each")
    )
    _say(f"figure: {figure}\nthe best: --meta-lr {found[0].meta_lr:.3g}")


@app.command()
def reproduce(
    names: Annotated[list[str], typer.Argument(help=f"Some of {', '.join(experiments.ALL)}, or all.")],
    out: Annotated[Path, typer.Option(help="Folder; each experiment gets one in it.")] = Path("results"),
    quick: Annotated[bool, typer.Option(help="A tenth of the problems or fewer, as the figure says.")] = False,
    retrain: Annotated[bool, typer.Option(help="Train the rules anew from their recipes first.")] = False,
    rule: Annotated[
        list[str] | None,
        typer.Option(
            help="NAME=FILE: a rule of yours in place of the shipped one of that name; for own-networks also one of "
            "any other name, beside them, and for appendix-d those that its recipes are named after."
        ),
    ] = None,
) -> None:
    """Make figures and tables of the papers. What is in the cache is not computed again.

    Example: fastl2l reproduce fig4-mnist --quick
    """
    chosen = [experiments.by_name(name) for name in (experiments.ALL if names == ["all"] else dict.fromkeys(names))]
    replaced = _by_name("rule", map(_replacement, rule or []))
    if replaced and retrain:
        raise ValueError("rule: expected none beside retrain, which trains the rules anew")
    used = {name for experiment in chosen for name in experiment.rules}
    if not any(experiment.more_rules for experiment in chosen):
        for name in replaced.keys() - used:
            raise ValueError(f"rule: expected some of {', '.join(sorted(used))}, which are shown, got {name!r}")
    rules = {name: rule_files.load_rule(path) for name, path in replaced.items()}
    for name in sorted(rules.keys() & rule_files.shipped().keys()):
        _say(f"{name} is {replaced[name]} here, in place of the rule of that name that comes with fastl2l")
    if names == ["all"] and not retrain:
        for experiment in chosen:
            if absent := experiments.missing(experiment, rules):
                _say(f"without {experiment.name}, for which --rule NAME=FILE must give {', '.join(absent)}")
        chosen = [experiment for experiment in chosen if not experiments.missing(experiment, rules)]
    for experiment in chosen if not retrain else ():
        experiments.check_rules(experiment, rules)
    folders = [out / experiments.folder_name(experiment, quick) for experiment in chosen]
    for folder in (out, *folders):
        _check_folder(folder)
    with contextlib.ExitStack() as stack:
        for folder in folders:
            stack.enter_context(_alone(folder))
        for experiment, folder in zip(chosen, folders, strict=True):
            if retrain:
                rules = experiments.retrain(experiment, out, quick=quick)
            told = experiment.run(out, rules=rules, quick=quick)
            console.rule(experiment.title)
            for one in told:
                console.print(one, soft_wrap=isinstance(one, str))
            _say(f"in {folder}")


def _replacement(entry: str) -> tuple[str, str]:
    name, separator, path = entry.partition("=")
    if not separator:
        raise ValueError(f"rule: expected NAME=FILE, got {entry!r}")
    return name, path


@app.command(name="stylize")
def stylize_command(
    content: Annotated[Path, typer.Argument(help="The photograph.")],
    styles: Annotated[list[Path], typer.Argument(metavar="STYLE...", help="Pictures whose style it is to have.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="The picture to write: .png, .jpg or .webp.")],
    size: Annotated[int, typer.Option(help="Pixels of the longer side.")] = 256,
    steps: Annotated[int, typer.Option(help="Optimization steps, at each size; of lbfgs evaluations.")] = 128,
    optimizer: Annotated[
        str | None, typer.Option(help="A shipped rule, a rule file, adam or lbfgs; lstm-neural-art if there is one.")
    ] = None,
    beside: Annotated[str | None, typer.Option(help="Another optimizer, whose picture is put beside.")] = None,
    lr: Annotated[float | None, typer.Option(help="Of adam (0.2), or a factor on a rule's updates (1).")] = None,
    content_weight: Annotated[float, typer.Option(help="Of likeness to the photograph.")] = Weights.content,
    style_weight: Annotated[float, typer.Option(help="Of likeness to the style.")] = Weights.style,
    smoothness: Annotated[float, typer.Option(help="Of total variation.")] = Weights.smoothness,
    style_shares: Annotated[str | None, typer.Option(help="Weights of several styles, such as 2,1.")] = None,
    content_layer: Annotated[str, typer.Option(help="Of the network; deeper ones leave more freedom.")] = (
        Weights.content_layer
    ),
    style_layers: Annotated[str, typer.Option(help="Of the network; deeper ones see larger strokes.")] = ",".join(
        Weights.style_layers
    ),
    network: Annotated[str, typer.Option(help=f"{' or '.join(NETWORKS)}, with torchvision's weights.")] = (
        Weights.network
    ),
    start: Annotated[str, typer.Option(help="noise or content.")] = "noise",
    keep_colours: Annotated[bool, typer.Option("--keep-colours", help="The photograph's; brightness is painted.")] = (
        False
    ),
    seed: Annotated[int, typer.Option(help="Of the noise.")] = 0,
    levels: Annotated[int, typer.Option(help="Sizes from coarse to fine, each twice the one before.")] = 1,
    save_every: Annotated[int, typer.Option(help="Keep the picture after so many steps, each time.")] = 0,
    frames: Annotated[str, typer.Option(help="What is made of those: images, strip or gif.")] = "images",
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
) -> None:
    """Paint a photograph in the style of pictures. Ctrl-C leaves the best picture so far.

    Example: fastl2l stylize photo.jpg painting.jpg -o out.png --size 256 --steps 128 --beside adam
    """
    layers = tuple(style_layers.split(","))
    painting = Painting(
        content,
        styles,
        out,
        size=size,
        steps=steps,
        optimizer=optimizer or default_optimizer(),
        beside=beside,
        lr=lr,
        weights=Weights(content_weight, style_weight, smoothness, content_layer, layers, network),
        style_shares=() if style_shares is None else _numbers("style_shares", style_shares, float, "2,1"),
        start=start,
        keep_colours=keep_colours,
        seed=seed,
        levels=levels,
        save_every=save_every,
        frames=frames,
        device=device,
    )
    painted = stylize(painting, before=_say)
    for name, (loss, terms) in painted.losses.items():
        shares = ", ".join(f"{word} {term:.3g}" for word, term in zip(TERMS, terms, strict=True))
        done = f"stopped after step {painted.steps[name]}" if painted.interrupted else f"{painted.steps[name]} steps"
        _say(f"{name}: {done}, loss {loss:.4g} ({shares})")
    for file in painted.files:
        _say(f"picture: {file}")


@app.command(name="inspect")
@_on_task
def inspect_command(
    problems: tasks.Task,
    rule: Annotated[str, typer.Option(help="A rule file, a shipped rule, or NAME=FILE.")],
    task: TaskName = "digits",
    out: Annotated[Path, typer.Option(help="Folder for the figures and the numbers.")] = Path("runs/inspect"),
    steps: Annotated[int, typer.Option(help="Optimization steps.")] = 100,
    coordinates: Annotated[str | None, typer.Option(help="To be watched, such as 0,17; three at random.")] = None,
    at: Annotated[str | None, typer.Option(help="Steps at which to ask for other gradients, such as 1,10,50.")] = None,
    sgd_lr: Annotated[float | None, typer.Option(help="Of SGD; by default it is tuned.")] = None,
    adam_lr: Annotated[float | None, typer.Option(help="Of Adam; by default it is tuned.")] = None,
    seed: Seed = 1,
) -> None:
    """Look inside a rule: what it proposes along its way, beside SGD and Adam on the same gradients.

    Example: fastl2l inspect --rule lstm-mnist --task mnist --out runs/inside
    """
    name, inspected = _named_rule(rule)
    _check_folder(out)
    given = {"sgd": sgd_lr, "adam": adam_lr}
    with _alone(out):
        seen = look(
            inspected,
            problems,
            steps=steps,
            coordinates=None if coordinates is None else _numbers("coordinates", coordinates, int, "0,17"),
            at=None if at is None else _numbers("at", at, int, "1,10,50"),
            rates={optimizer: lr for optimizer, lr in given.items() if lr is not None},
            seed=seed,
            progress=True,
        )
        written = [*seen.draw(out, title=f"{name} on {task}"), *seen.save(out)]
    rates = seen.metadata["rates"]
    _say(f"loss {seen.losses[0]:.4g} to {seen.losses[-1]:.4g}; sgd at {rates['sgd']:.3g}, adam at {rates['adam']:.3g}")
    for file in written:
        _say(f"written: {file}")


@app.command(name="import")
def import_command(
    file: Annotated[Path, typer.Argument(help="An .l2l file, or a state_dict that torch.save wrote.")],
    out: Annotated[Path, typer.Option(help="The rule file to write.")],
    source: Annotated[str, typer.Option("--from", help="What wrote it: tensorflow or torch.")] = "tensorflow",
    features: Annotated[
        str | None,
        typer.Option(
            help="Of gradients: raw:SCALE, log_sign:P or adam:BETA1,BETA2,EPSILON; by default raw:1 for one input, "
            "log_and_sign:5 (tensorflow) or log_sign:10 (torch) for two, adam:0.95,0.95,1e-08 with a projection."
        ),
    ] = None,
    output: Annotated[str | None, typer.Option(help="linear, or tanh, the default with a projection.")] = None,
    output_scale: Annotated[
        float | None, typer.Option(help="Factor on updates; by default 0.01 (tensorflow) or 0.1 (torch).")
    ] = None,
) -> None:
    """Make a rule file of weights that others trained. Nothing in their file is executed.

    Example: fastl2l import rnnprop.l2l --out rnnprop.safetensors
    """
    rule, recipe = import_rules.import_rule(file, source, features=features, output=output, output_scale=output_scale)
    rule_files.save_rule(rule, out, recipe=recipe)
    console.print(f"{rule.text}, output scale {rule.config.output_scale:g}\nrule: {out}", highlight=False)


@app.command()
def rules(
    name: Annotated[str | None, typer.Argument(help="A shipped rule or a rule file: all that is known of it.")] = None,
) -> None:
    """List the trained rules that come with fastl2l, or say all about one of them, or about a file.

    Example: fastl2l rules lstm-mnist
    """
    if name is not None:
        _print_rule(name)
        return
    table = Table("rule", "kind", "good for", title='load_rule("name"), or --rule name')
    for shipped, path in rule_files.shipped().items():
        table.add_row(shipped, _kind(rule_files.load_rule(path)), rule_files.read_recipe(path).get("about", ""))
    console.print(table)
    _say("how one was trained: fastl2l rules NAME")


def _print_rule(name: str) -> None:
    rule, recipe = rule_files.load_rule(name), dict(rule_files.read_recipe(name))
    _say(Text.assemble((name, "bold"), f": {recipe.pop('about', '')}"))
    for part, one in ({"": rule} if isinstance(rule, Rule) else rule).items():
        weights = sum(weight.numel() for weight in one.weights())
        of = f"{part}: " if part else ""
        steps = ", in units of each parameter's size at first" * one.config.relative
        steps += f", in {one.config.ramp} steps to their full size" * bool(one.config.ramp)
        steps += f", from step {one.config.decay} on falling as 1/t" * bool(one.config.decay)
        steps += f", the mean of {' and '.join(map(str, one.config.averages))} units by layer" * one.config.coupled
        steps += f", {one.config.memory}" * (one.config.memory is not None)
        _say(f"{of}{one.text}, output scale {one.config.output_scale:g}{steps}, {weights:,} weights")
    for command in recipe.pop("commands", []):
        _say(command)
    for about, what in recipe.items():
        _say(f"{about}: {_briefly(what)}")


def _briefly(value: Any) -> Any:
    """A list of one number over and over as that number and how often it is there."""
    if isinstance(value, list) and len(value) > 3 and all(item == value[0] for item in value):
        return f"{value[0]}, {len(value)} times"
    return value


@app.command()
def env() -> None:
    """Show versions, backends (and why one is missing), instruction set, threads and folders.

    Example: fastl2l env
    """
    console.print(environment.render(environment.describe()))


def main() -> None:
    """Entry point: errors that a user can mend are one line, without a traceback, and so are warnings."""
    warnings.showwarning = _show_warning
    try:
        with joined() as processes:
            console.quiet = processes.rank > 0
            app()
    except (ValueError, TypeError, OSError, RuntimeError, ImportError, MemoryError, OverflowError) as error:
        _fail(error)


def _show_warning(message: Warning | str, *_: Any, **__: Any) -> None:
    plain_console(stderr=True).print(f"fastl2l: {message}", style="yellow", soft_wrap=True)


def _fail(error: Exception) -> NoReturn:
    message = f"fastl2l: {str(error) or 'there is no memory for such sizes'}"
    plain_console(stderr=True).print(message, style="red", soft_wrap=True)
    raise SystemExit(1)


if __name__ == "__main__":
    main()
