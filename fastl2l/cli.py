"""The command line: arguments in, calls of the library, tables out. No logic of its own."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer
from rich.console import Console

from fastl2l import baselines, environment, files, plots, rule_files, tasks
from fastl2l.evaluate import comparisons, evaluate
from fastl2l.meta import MetaTrainer
from fastl2l.rules import LSTMRule

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Learned optimizers: meta-train an update rule, and compare it with tuned optimizers.",
)
console = Console()

RECIPES: dict[str, dict[str, Any]] = {
    "quadratic": {"preprocess": "raw", "output_scale": 1.0},
}
"""What a task's rule is where that is not the default (Andrychowicz et al. 2016, section 3.1 and appendix A)."""

TaskName = Annotated[str, typer.Option("--task", help=f"One of {', '.join(tasks.names())}.")]
Hidden = Annotated[str | None, typer.Option(help="Hidden units of the network, by layer: 20 or 40,40.")]
Activation = Annotated[str | None, typer.Option(help="Of the network: sigmoid, relu, tanh or elu.")]
BatchSize = Annotated[int | None, typer.Option(help="Images in a minibatch.")]
Seed = Annotated[int, typer.Option(help="Of all random numbers.")]


def _task(name: str, hidden: str | None, activation: str | None, batch_size: int | None) -> tasks.Task:
    options: dict[str, Any] = {"activation": activation, "batch_size": batch_size}
    if hidden is not None:
        try:
            options["hidden"] = tuple(int(units) for units in hidden.split(","))
        except ValueError:
            raise ValueError(f"hidden: expected numbers such as 40,40, got {hidden!r}") from None
    return tasks.by_name(name, **{option: value for option, value in options.items() if value is not None})


@app.command()
def train(
    task: TaskName = "digits",
    out: Annotated[Path, typer.Option(help="Folder for the rule, the checkpoint and the figure.")] = Path("runs/train"),
    epochs: Annotated[int, typer.Option(help="Epochs in all; a run that is resumed must name the same.")] = 50,
    trajectories: Annotated[int, typer.Option(help="Trajectories an epoch.")] = 20,
    horizon: Annotated[int, typer.Option(help="Steps of a trajectory.")] = 100,
    unroll: Annotated[int, typer.Option(help="Steps of a window of truncated BPTT; divides the horizon.")] = 20,
    meta_lr: Annotated[float, typer.Option(help="Learning rate of Adam on the rule.")] = 3e-3,
    schedule: Annotated[str, typer.Option(help="Of the meta learning rate: constant or cosine.")] = "cosine",
    seed: Seed = 0,
    hidden: Hidden = None,
    activation: Activation = None,
    batch_size: BatchSize = None,
    preprocess: Annotated[
        str | None, typer.Option(help="Of gradients: log_sign or raw; by default the task's.")
    ] = None,
    output_scale: Annotated[float | None, typer.Option(help="Factor on updates; by default the task's.")] = None,
    hidden_size: Annotated[int, typer.Option(help="LSTM units a layer.")] = 20,
    layers: Annotated[int, typer.Option(help="LSTM layers.")] = 2,
    second_derivatives: Annotated[bool, typer.Option(help="Exact meta-gradients.")] = False,
    backend: Annotated[str, typer.Option(help="auto, native, triton or reference.")] = "auto",
    tensorboard: Annotated[Path | None, typer.Option(help="Folder for TensorBoard curves.")] = None,
) -> None:
    """Meta-train an update rule on a task. Run it again to go on where it was stopped.

    Example: fastl2l train --task mnist --hidden 20 --epochs 100 --out runs/mnist
    """
    options = {"preprocess": preprocess, "output_scale": output_scale}
    recipe = RECIPES.get(task, {}) | {name: value for name, value in options.items() if value is not None}
    rule = LSTMRule(**recipe, hidden_size=hidden_size, num_layers=layers, seed=seed)
    trainer = MetaTrainer(
        rule,
        _task(task, hidden, activation, batch_size),
        horizon=horizon,
        unroll=unroll,
        meta_lr=meta_lr,
        seed=seed,
        trajectories=trajectories,
        schedule=schedule,
        second_derivatives=second_derivatives,
        backend=backend,
        checkpoint=out / "checkpoint.pt",
        tensorboard=tensorboard,
    )
    if trainer.history:
        console.print(f"going on after epoch {len(trainer.history)} of {out / 'checkpoint.pt'}")
    history = trainer.fit(epochs)
    recipe_made = {"command": shlex.join(["fastl2l", *sys.argv[1:]]), "epochs": len(history), **trainer.settings()}
    rule_files.save_rule(rule, out / "rule.safetensors", recipe={**recipe_made, "validation_loss": trainer.best_loss})
    plots.plot_history(history, out / "training.png", title=f"Meta-training on {task}")
    console.print(f"best validation loss {trainer.best_loss:.4g}")
    console.print(f"rule:   {out / 'rule.safetensors'}\nfigure: {out / 'training.png'}", highlight=False)


@app.command(name="evaluate")
def evaluate_command(
    rule: Annotated[list[str], typer.Option(help="A rule file, or NAME=FILE; may be given several times.")],
    task: TaskName = "digits",
    out: Annotated[Path, typer.Option(help="Folder for the table, the curves and the figure.")] = Path("runs/evaluate"),
    baseline: Annotated[str, typer.Option(help="Tuned optimizers to compare with, or 'none'.")] = ",".join(
        baselines.ALL
    ),
    steps: Annotated[int, typer.Option(help="Optimization steps.")] = 100,
    runs: Annotated[int, typer.Option(help="Fresh problems; every optimizer sees the same.")] = 100,
    seed: Seed = 1,
    hidden: Hidden = None,
    activation: Activation = None,
    batch_size: BatchSize = None,
    backend: Annotated[str, typer.Option(help="auto, native, triton or reference.")] = "auto",
) -> None:
    """Compare update rules with tuned optimizers on fresh problems of a task: a table, a figure, CSV and JSON.

    Example: fastl2l evaluate --task digits --rule runs/demo/rule.safetensors --out runs/demo/evaluation
    """
    named = dict(_named(entry) for entry in rule)
    optimizers: dict[str, Any] = {name: rule_files.load_rule(path) for name, path in named.items()}
    if baseline != "none":
        optimizers |= {name: baselines.by_name(name) for name in baseline.split(",")}
    curves = evaluate(
        _task(task, hidden, activation, batch_size),
        optimizers,
        steps=steps,
        runs=runs,
        seed=seed,
        backend=backend,
        progress=True,
    )
    curves.save(out)
    files.write_text(out / "table.md", curves.markdown() + "\n")
    figure = plots.plot_curves(curves, out / "curves.png")
    console.print(curves.table())
    for line in comparisons(curves):
        console.print(line, highlight=False)
    console.print(f"figure: {figure}\nnumbers: {out}", highlight=False)


def _named(entry: str) -> tuple[str, str]:
    name, separator, path = entry.partition("=")
    return (name, path) if separator else ("lstm", entry)


@app.command()
def env() -> None:
    """Show versions, backends (and why one is missing), instruction set, threads and folders.

    Example: fastl2l env
    """
    console.print(environment.render(environment.describe()))


def main() -> None:
    """Entry point: errors that a user can mend are one line, without a traceback."""
    try:
        app()
    except (ValueError, TypeError, OSError, RuntimeError, ImportError) as error:
        _fail(error)


def _fail(error: Exception) -> NoReturn:
    Console(stderr=True).print(f"fastl2l: {error}", style="red", markup=False, highlight=False, soft_wrap=True)
    raise SystemExit(1)


if __name__ == "__main__":
    main()
