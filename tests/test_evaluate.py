"""Evaluation is fair, complete and exact, and survives being saved."""

from __future__ import annotations

import csv
import json
import math

import pytest
import safetensors.torch
import torch
from rich.console import Console
from scipy import stats
from torch import nn

from fastl2l import files
from fastl2l.baselines import SGD, Adam, descend
from fastl2l.evaluate import Curves, comparisons, evaluate, with_half_width
from fastl2l.optim import FusedLSTMOptimizer
from fastl2l.rules import LSTMRule
from fastl2l.tasks import Quadratic
from fastl2l.tasks.base import problem_seed

TASK = Quadratic(dim=3, batch=4)


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("FASTL2L_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def momentum(params):
    return torch.optim.SGD(params, lr=0.01, momentum=0.5)


@pytest.fixture(scope="module")
def curves():
    rule = LSTMRule("raw", output_scale=0.01)
    return evaluate(TASK, {"lstm": rule, "sgd": SGD(0.01), "mine": momentum}, steps=12, runs=6, seed=3)


# Running


def test_every_optimizer_meets_the_same_test_problems(curves):
    assert (curves.runs, curves.steps) == (6, 12)
    for run in range(6):
        problem = TASK.sample(problem_seed(3, "test", run))
        assert torch.equal(curves.losses["sgd"][run], descend(problem, SGD(0.01).build, 12))
        assert torch.equal(curves.losses["mine"][run], descend(problem, momentum, 12))
        starts = {losses[run, 0].item() for losses in curves.losses.values()}
        assert len(starts) == 1


def test_a_rule_runs_as_the_optimizer_a_user_would_make(curves):
    rule = LSTMRule("raw", output_scale=0.01)
    problem = TASK.sample(problem_seed(3, "test", 2))
    theta = problem.theta0.clone().requires_grad_()
    optimizer = FusedLSTMOptimizer([theta], rule)
    losses = []
    for step in range(13):
        loss = problem.loss(theta, step)
        losses.append(loss.item() / 4)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    torch.testing.assert_close(curves.losses["lstm"][2], torch.tensor(losses, dtype=torch.float64))
    assert curves.kind("lstm") == "learned"


def test_more_runs_do_not_change_the_first():
    few, many = (evaluate(TASK, {"sgd": SGD(0.01)}, steps=3, runs=runs) for runs in (2, 4))
    assert torch.equal(few.losses["sgd"], many.losses["sgd"][:2])
    other = evaluate(TASK, {"sgd": SGD(0.01)}, steps=3, runs=2, seed=2)
    assert not torch.equal(few.losses["sgd"], other.losses["sgd"])


def test_rates_to_be_tuned_are_tuned_and_kept():
    result = evaluate(TASK, {"adam": Adam()}, steps=5, runs=2)
    lr = result.metadata["optimizers"]["adam"]["lr"]
    assert 1e-4 <= lr <= 100
    problem = TASK.sample(problem_seed(1, "test", 0))
    assert torch.equal(result.losses["adam"][0], descend(problem, Adam(lr).build, 5))


def test_divergence_counts_and_does_not_touch_others():
    result = evaluate(TASK, {"wild": SGD(1e30), "sgd": SGD(0.01)}, steps=5, runs=3)
    assert result.diverged("wild") == 3
    assert result.diverged("sgd") == 0
    assert result.final("wild") == (math.inf, math.inf)
    assert math.isfinite(result.final("sgd")[0])
    assert result.ranking() == ["sgd", "wild"]
    assert result.difference("wild", "sgd")[0] == math.inf


def test_progress_is_shown_when_asked_for(capsys):
    evaluate(TASK, {"sgd": SGD(0.01)}, steps=1, runs=2, progress=True)
    assert "evaluating on quadratic" in capsys.readouterr().err
    evaluate(TASK, {"sgd": SGD(0.01)}, steps=1, runs=2)
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"task": "quadratic"}, TypeError, "task: expected a fastl2l Task, got str"),
        ({"optimizers": {}}, TypeError, "optimizers: expected a dict"),
        ({"optimizers": [SGD(0.1)]}, TypeError, "optimizers: expected a dict"),
        ({"optimizers": {1: SGD(0.1)}}, TypeError, "optimizers: expected strings as names, got 1"),
        ({"optimizers": {"a": "adam"}}, TypeError, r"optimizers\['a'\]: expected an update rule.*got 'adam'"),
        ({"optimizers": {"a": Adam}}, TypeError, r"optimizers\['a'\]: expected an update rule.*Adam"),
        ({"optimizers": {"a": nn.Linear(1, 1)}}, TypeError, r"optimizers\['a'\]: expected an update rule.*Linear"),
        ({"optimizers": {"a": lambda params: 3}}, TypeError, r"optimizers\['a'\]: expected it to return a torch opt"),
        ({"steps": 0}, ValueError, "steps: expected an integer >= 1, got 0"),
        ({"runs": 0}, ValueError, "runs: expected an integer >= 1, got 0"),
        ({"seed": 1.5}, TypeError, "seed: expected an integer >= 0, got 1.5"),
    ],
)
def test_bad_input_is_named(change, error, message, cache):
    arguments = {"task": TASK, "optimizers": {"sgd": SGD(0.1)}, "steps": 2, "runs": 2} | change
    with pytest.raises(error, match=message):
        evaluate(**arguments)
    assert not cache.exists()


@pytest.mark.parametrize(
    ("optimizers", "options", "message"),
    [
        ({"a": LSTMRule()}, {"backend": "fast"}, "backend: expected one of auto"),
        ({"a": lambda params: 3}, {}, r"optimizers\['a'\]: expected it to return a torch optimizer"),
        ({"": SGD(0.1)}, {}, "optimizers: expected names that can be printed and saved, got ''"),
        ({"two\nlines": SGD(0.1)}, {}, "optimizers: expected names that can be printed and saved"),
        (
            {"__metadata__": SGD(0.1)},
            {},
            "optimizers: expected names that can be .*, got '__metadata__'",
        ),
    ],
)
def test_what_cannot_be_evaluated_is_known_before_rates_are_tuned(optimizers, options, message, cache):
    with pytest.raises((TypeError, ValueError), match=message):
        evaluate(Quadratic(dim=2, batch=2), {"adam": Adam(), **optimizers}, steps=2, runs=2, **options)
    assert not cache.exists()


# Statistics


def test_intervals_are_student_s():
    a = torch.tensor([[3.0, 1.0], [2.0, 2.5], [4.0, 0.5], [3.5, 3.0]], dtype=torch.float64)
    curves = Curves({"a": a, "b": a * 2})
    low, high = curves.interval("a")
    for step in (0, 1):
        expected = stats.t.interval(0.95, 3, a[:, step].mean(), stats.sem(a[:, step]))
        assert (low[step].item(), high[step].item()) == pytest.approx(expected)
    mean, half = curves.difference("b", "a")
    test = stats.ttest_rel((a * 2)[:, -1], a[:, -1]).confidence_interval()
    assert (mean - half, mean + half) == pytest.approx(test)


def test_intervals_cover_the_truth_as_often_as_they_say():
    draws = torch.randn(4000, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    finals = [Curves({"a": row[:, None]}).final("a") for row in draws]
    hits = sum(mean - half < 0 < mean + half for mean, half in finals)
    assert abs(hits / 4000 - 0.95) < 4 * (0.95 * 0.05 / 4000) ** 0.5


def test_one_run_has_no_interval():
    curves = Curves({"a": torch.tensor([[2.0, 1.0]], dtype=torch.float64)})
    assert curves.final("a") == (1.0, math.inf)
    assert curves.interval("a")[0].tolist() == [-math.inf, -math.inf]


@pytest.mark.parametrize(
    ("mean", "half", "text"),
    [
        (0.066143, 0.00492, "0.0661 ± 0.0049"),
        (0.2, 0.021, "0.200 ± 0.021"),
        (1234.5, 120.0, "1234 ± 120"),
        (0.5, math.inf, "0.5"),
        (math.inf, math.inf, "inf"),
        (0.25, 0.0, "0.25"),
        (0.000011234, 0.0000123, "0.000011 ± 0.000012"),
        (6.6e-15, 2.24e-15, "(6.6 ± 2.2)e-15"),
        (3.0e-10, 4.2e-10, "(3.0 ± 4.2)e-10"),
        (0.00015641, 0.0000063, "(1.564 ± 0.063)e-4"),
    ],
)
def test_numbers_are_shown_to_their_precision(mean, half, text):
    assert with_half_width(mean, half) == text


def test_comparisons_say_who_is_lower():
    noise = torch.tensor([[-0.1], [0.0], [0.1], [0.05]], dtype=torch.float64)
    losses = {"lstm": 1 + noise, "better": 0.5 + noise * 1.1, "worse": 2 + noise * 0.9, "level": 1 - noise}
    losses["wild"] = losses["worse"].masked_fill(noise > 0, math.inf)
    kinds = {name: {"kind": "learned" if name == "lstm" else "baseline"} for name in losses}
    lines = comparisons(Curves(losses, {"optimizers": kinds}))
    assert [line.split(",")[0].split(":")[0] for line in lines] == [
        "lstm ends above better",
        "lstm ends level with level",
        "lstm ends below worse",
        "lstm against wild",
    ]
    assert lines[2].startswith("lstm ends below worse, by 0.999")
    assert lines[3].endswith("0 and 2 diverged")


# Tables and files


def test_tables_are_sorted_and_mark_what_is_learned(curves):
    lines = curves.markdown().splitlines()
    names = [line.split("|")[1].strip() for line in lines[2:]]
    finals = [curves.losses[name][:, -1].mean() for name in names]
    assert finals == sorted(finals)
    (lstm,) = (line for line in lines if line.startswith("| lstm"))
    (sgd,) = (line for line in lines if line.startswith("| sgd"))
    assert "learned" in lstm
    assert "baseline" in sgd
    assert "0.01" in sgd
    console = Console(width=100, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(curves.table())
    shown = console.export_text()
    assert all(text in shown for text in ("quadratic", "mean over 6 problems after 12 steps", *names))


def test_saved_curves_come_back(curves, tmp_path):
    assert curves.save(tmp_path / "deep" / "folder") == tmp_path / "deep" / "folder"
    loaded = Curves.load(tmp_path / "deep" / "folder")
    assert list(loaded.losses) == list(curves.losses)
    assert all(torch.equal(loaded.losses[name], curves.losses[name]) for name in curves.losses)
    assert loaded.metadata == curves.metadata
    assert loaded.markdown() == curves.markdown()


def test_saved_files_are_complete_and_plain(tmp_path):
    curves = evaluate(TASK, {"sgd": SGD(0.01), "wild": SGD(1e30)}, steps=4, runs=3)
    curves.save(tmp_path)
    results = json.loads((tmp_path / "results.json").read_text(), parse_constant=pytest.fail)
    assert results["final"]["sgd"]["runs"] == curves.losses["sgd"][:, -1].tolist()
    assert results["final"]["wild"] == {"mean": "inf", "half_width_95": "inf", "diverged": 3, "runs": ["inf"] * 3}
    assert results["metadata"]["task"] == TASK.spec()
    assert results["metadata"]["seed"] == 1
    with open(tmp_path / "curves.csv", newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["optimizer"] == "sgd"]
    assert [int(row["step"]) for row in rows] == list(range(5))
    assert [float(row["mean"]) for row in rows] == curves.mean("sgd").tolist()
    assert [float(row["low"]) for row in rows] == curves.interval("sgd")[0].tolist()
    assert Curves.load(tmp_path).diverged("wild") == 3


def test_curves_made_by_hand_can_be_saved(tmp_path):
    Curves({"a": torch.ones(2, 3, dtype=torch.float64)}).save(tmp_path)
    assert Curves.load(tmp_path).losses["a"].tolist() == [[1.0] * 3] * 2


def test_damaged_and_mixed_files_are_refused(curves, tmp_path):
    one, two = tmp_path / "one", tmp_path / "two"
    curves.save(one)
    evaluate(TASK, {"lstm": SGD(0.1), "sgd": SGD(0.02), "mine": momentum}, steps=12, runs=6).save(two)
    whole = (one / "losses.safetensors").read_bytes()
    results = (one / "results.json").read_text()
    for damaged in ((two / "losses.safetensors").read_bytes(), whole[:-8], b""):
        (one / "losses.safetensors").write_bytes(damaged)
        with pytest.raises(ValueError, match=r"folder: expected curves saved by fastl2l in .*one"):
            Curves.load(one)
    (one / "losses.safetensors").write_bytes(whole)
    for damaged in (results[:100], "{}", results.replace('"format": 1', '"format": 99')):
        (one / "results.json").write_text(damaged)
        with pytest.raises(ValueError, match=r"folder: expected curves saved by fastl2l in .*one"):
            Curves.load(one)
    with pytest.raises(FileNotFoundError):
        Curves.load(tmp_path / "nowhere")


def test_nothing_that_is_printed_is_taken_from_a_damaged_file(curves, tmp_path):
    path = curves.save(tmp_path) / "results.json"
    whole = path.read_text()
    for before, after in (
        ('"lr": 0.01', '"lr": 0.03'),
        ('"kind": "baseline"', '"kind": "cbseline"'),
        ('"name": "quadratic"', '"name": "quadratib"'),
        ('"seed": 3', '"seed": 2'),
        ('"digest"', '"digess"'),
        (whole, "[" * 10**6),
        (whole, '{"format": 1, "metadata": {"optimizers": {}}, "final": {}, "losses": ""}'),
        (whole, '{"format": 1, "metadata": 3, "final": {}, "losses": ""}'),
        (whole, '{"format": 1, "metadata": {"optimizers": {"sgd": 3}}, "final": {}, "losses": ""}'),
        (whole, "[1]"),
    ):
        damaged = whole.replace(before, after)
        assert damaged != whole
        path.write_text(damaged)
        with pytest.raises(ValueError, match=r"folder: expected curves saved by fastl2l in .*(results.json|losses)"):
            Curves.load(tmp_path)


def test_losses_of_another_shape_are_not_read(curves, tmp_path, monkeypatch):
    curves.save(tmp_path)
    other = {name: torch.zeros(6, 14, dtype=torch.float64) for name in curves.losses}
    files.write_tensors(tmp_path / "losses.safetensors", other)
    monkeypatch.setattr(files.StoredTensors, "load", pytest.fail)
    with pytest.raises(ValueError, match=r"expected losses of shape \[6, 13\], got .*\(6, 14\)"):
        Curves.load(tmp_path)


def test_curves_from_before_there_were_digests_are_read(curves, tmp_path):
    curves.save(tmp_path)
    results = json.loads((tmp_path / "results.json").read_text())
    older = {name: results[name] for name in ("format", "metadata", "final", "losses")}
    (tmp_path / "results.json").write_text(json.dumps(older))
    (tmp_path / "losses.safetensors").write_bytes(safetensors.torch.save(curves.losses))
    loaded = Curves.load(tmp_path)
    assert loaded.metadata == curves.metadata
    assert all(torch.equal(loaded.losses[name], curves.losses[name]) for name in curves.losses)


def test_the_same_curves_are_the_same_bytes(curves, tmp_path):
    for name in ("one", "two"):
        curves.save(tmp_path / name)
    for file in (tmp_path / "one").iterdir():
        assert file.read_bytes() == (tmp_path / "two" / file.name).read_bytes()


def test_a_final_loss_may_be_a_mean_of_the_last_ones(curves, tmp_path):
    averaged = Curves(curves.losses, curves.metadata | {"last": 4})
    tails = {name: losses[:, -4:].mean(1) for name, losses in curves.losses.items()}
    assert averaged.final("sgd")[0] == pytest.approx(tails["sgd"].mean().item())
    assert averaged.final("sgd", 1) == curves.final("sgd")
    assert averaged.difference("sgd", "lstm")[0] == pytest.approx((tails["sgd"] - tails["lstm"]).mean().item())
    assert averaged.ranking() == sorted(tails, key=lambda name: tails[name].mean().item())
    header, _, row, *_ = averaged.markdown().splitlines()
    assert [cell.strip() for cell in header.split("|")][4:6] == ["mean of the last 4", "last loss"]
    best = averaged.ranking()[0]
    assert [cell.strip() for cell in row.split("|")][4:6] == [
        with_half_width(*averaged.final(best)),
        with_half_width(*curves.final(best)),
    ]
    again = Curves.load(averaged.save(tmp_path))
    assert (again.last, curves.last) == (4, 1)
    record = json.loads((tmp_path / "results.json").read_text())
    assert record["final"]["sgd"]["runs"] == pytest.approx(tails["sgd"].tolist())


def test_only_some_of_the_optimizers(curves):
    some = curves.only(["sgd", "lstm"])
    assert list(some.losses) == list(some.metadata["optimizers"]) == ["sgd", "lstm"]
    assert some.kind("lstm") == "learned"
    assert some.final("sgd") == curves.final("sgd")
