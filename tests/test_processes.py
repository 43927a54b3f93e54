"""Nothing depends on how many processes there are; whatever is wrong is an error in all of them."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from multiprocessing.process import BaseProcess
from pathlib import Path

import forked
import process_group
import pytest
import torch

from fastl2l import MetaTrainer, processes
from fastl2l.ops.coordinates import mean_of
from fastl2l.processes import Processes
from fastl2l.rule_files import load_rule

HERE = Path(__file__).parent
LONGEST = 300
"""Seconds until a test gives processes up: none of them may hang."""


def environment(**more: str) -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(HERE.parent), **more}


def free_port() -> str:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return str(one.getsockname()[1])


def run(script: str, name: str, folder: Path, size: int, *, fresh: bool = False, **more: str) -> list[dict]:
    """What the processes of a group answer, in their order; None from those that ended otherwise.

    Where they are to find the same numbers, they are `fresh`: each has its sets in an order of its own.
    """
    group = {"WORLD_SIZE": str(size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port(), **more}
    begin = _begin_fresh if fresh else _begin_forked
    started = [begin(HERE / script, name, folder, environment(RANK=str(rank), **group)) for rank in range(size)]
    try:
        for one in started:
            one.join(LONGEST)
    finally:
        for one in started:
            one.kill()
    paths = [folder / f"{name}-{size}-{rank}.json" for rank in range(size)]
    return [json.loads(path.read_text()) if path.exists() else None for path in paths]


def _begin_forked(script: Path, name: str, folder: Path, variables: dict[str, str]) -> BaseProcess:
    code = f"import runpy, sys; sys.argv[1:] = {name!r}, {str(folder)!r}; "
    return forked.start(f"{code}runpy.run_path({str(script)!r}, run_name='__main__')", variables, folder)


def _begin_fresh(script: Path, name: str, folder: Path, variables: dict[str, str]) -> BaseProcess:
    arguments = [sys.executable, str(script), name, str(folder)]
    return forked.start(f"import os; os.execv({sys.executable!r}, {arguments!r})", variables, folder)


# The same numbers


def test_work_is_dealt_out_in_order_and_whole():
    for size in range(1, 6):
        shares = [list(Processes(rank, size).share(12)) for rank in range(size)]
        assert [number for share in shares for number in share] == list(range(12))
        assert max(map(len, shares)) - min(map(len, shares)) <= 1


@pytest.fixture(scope="module")
def in_one_process(tmp_path_factory):
    folder = tmp_path_factory.mktemp("one")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FASTL2L_CACHE", str(folder / "cache"))
        return json.loads(json.dumps(process_group.numbers(folder))), folder


@pytest.mark.parametrize("size", [2, 4])
def test_training_evaluation_and_tuning_give_the_same_bits_in_any_number_of_processes(size, in_one_process, tmp_path):
    expected, folder = in_one_process
    assert expected["skipped"][-1] == 1  # the window of one process's problem is skipped by all
    for found in run("process_group.py", "numbers", tmp_path, size, fresh=size == 2):  # which takes long to start
        assert found == expected
    for path in folder.glob("*.pt"):
        assert (tmp_path / path.name).read_bytes() == path.read_bytes()


# Bad input


def test_bad_input_is_an_error_in_every_process(tmp_path):
    first, second = run("process_group.py", "errors", tmp_path, 2)
    parts = {
        "undivided": ("ValueError: batch: expected pieces that 2 processes divide, got a batch of 1 in 1",) * 2,
        "pieces": ("ValueError: pieces: expected a divisor of the batch 4, got 3",) * 2,
        "one argument": ("ValueError: unroll: expected a divisor of the horizon 8, got 3",) * 2,
        "rules": ("ValueError: weights: expected the same in every process",) * 2,
        "kinds": ("ValueError: rule: expected the same in every process",) * 2,
        "tasks": ("ValueError: task: expected the same in every process",) * 2,
        "evaluate": ("ValueError: task: expected the same in every process",) * 2,
        "order": ("ValueError: optimizers: expected the same in every process, got ['a', 'b'] in process 0 and [",) * 2,
        "tuning": ("ValueError: tune: expected the same in every process, got task: dim: 3 in process 0",) * 2,
        "keep": ("ValueError: keep: expected the same in every process, got 'best' in process 0 and 'last'",) * 2,
        "no checkpoint": ("ValueError: checkpoint: expected the same in every process, got True in process 0",) * 2,
        "epochs": ("ValueError: epochs: expected the same in every process, got 1 in process 0 and 2",) * 2,
        "fit": ("ValueError: epochs: expected an integer >= 0, got -1",) * 2,
        "frozen": ("ValueError: rule: expected",) * 2,
        "searching": ("ValueError: trials: expected an integer >= 1, got -1",) * 2,
        "tuning runs": ("ValueError: runs: expected an integer >= 1, got -1",) * 2,
        "other work": ("at the same work, got fastl2l.baselines.tune", "at the same work, got fastl2l.meta.trainer"),
        "versions": ("ValueError: torch: expected the same in every process, got '0.0' in process 0 and '0.1'",) * 2,
        "one problem": ("ValueError: there is no such problem",) * 2,
        "checkpoint": ("of-0/checkpoint.pt: expected a folder that all", "of-1/checkpoint.pt: expected a folder that"),
        "partial": ("RuntimeError: parameter scale.weight: expected parameters that are sharded",) * 2,
        "gradient": ("RuntimeError: gradient of parameter scale.weight: expected it sharded as the parameter is",) * 2,
    }
    assert first.keys() == parts.keys()
    for name, (mine, theirs) in parts.items():
        assert mine in first[name], name
        assert theirs in second[name], name
    assert not (tmp_path / "of-1").exists()  # the first process alone writes


def test_a_process_that_dies_is_an_error_in_the_others_and_leaves_the_checkpoint_whole(tmp_path):
    survivor, dead = run("process_group.py", "lost", tmp_path, 2)
    assert dead is None
    assert "process 0 of 2: another process has ended" in survivor["error"]
    assert survivor["epochs"] == 1
    after = process_group.trainer(**process_group.BATCH, checkpoint=tmp_path / "checkpoint.pt")
    assert len(after.history) == 1


def test_a_process_that_leaves_well_is_an_error_in_those_that_have_not_finished(tmp_path):
    waiting, _ = run("process_group.py", "leaves", tmp_path, 2)  # long before the time-out
    assert "expected all processes at the same work" in waiting["error"]
    assert "_leave in process 1" in waiting["error"]


def test_a_process_that_says_nothing_is_an_error_after_the_time_out(tmp_path):
    waiting, _ = run("process_group.py", "silent", tmp_path, 2, FASTL2L_TIMEOUT="2")
    assert "said nothing until the time-out" in waiting["error"]
    assert 1 < waiting["seconds"] < 7


@pytest.mark.parametrize("text", ["soon", "0", "-1", "nan"])
def test_time_outs_that_are_none_are_refused(text, monkeypatch):
    monkeypatch.setenv("FASTL2L_TIMEOUT", text)
    started = {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
    for name, value in started.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match="FASTL2L_TIMEOUT: expected a number of seconds"), processes.joined():
        pass


@pytest.mark.parametrize("missing", ["WORLD_SIZE", "MASTER_ADDR"])
def test_without_all_that_torchrun_sets_there_is_no_group(missing, monkeypatch):
    for name in processes.STARTED - {missing}:
        monkeypatch.setenv(name, "1")
    monkeypatch.delenv(missing, raising=False)
    with processes.joined() as alone:
        assert alone == Processes()


def test_pieces_are_told_apart_by_checkpoints(tmp_path):
    process_group.trainer(**process_group.BATCH, checkpoint=tmp_path / "a.pt").fit(1, progress=False)
    with pytest.raises(ValueError, match="pieces: expected 2, got 4"):
        process_group.trainer(**process_group.BATCH, pieces=2, checkpoint=tmp_path / "a.pt")


# torchrun

TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--rdzv-backend", "c10d"]
TORCHRUN += ["--rdzv-endpoint", "localhost:0", "--monitor-interval", "0.1"]

TRAIN = [
    "train",
    "--task",
    "quadratic",
    "--batch",
    "2",
    "--trajectories",
    "4",
    "--horizon",
    "20",
    "--validation-problems",
    "2",
    "--hidden-size",
    "4",
]


def weights(folder: Path):
    return [weight.tolist() for weight in load_rule(folder / "rule.safetensors").weights()]


@pytest.mark.slow
def test_torchrun_goes_on_after_a_kill_to_the_same_bits(tmp_path):
    command = [*TRAIN, "--epochs", "12"]
    subprocess.run(
        [sys.executable, "-m", "fastl2l", *command, "--out", tmp_path / "one"],
        env=environment(), check=True, timeout=LONGEST, capture_output=True,
    )  # fmt: skip
    running = subprocess.Popen(
        [*TORCHRUN, "--max-restarts", "3", "-m", "fastl2l", *command, "--out", tmp_path / "two"],
        env=environment(TORCH_DISABLE_SHARE_RDZV_TCP_STORE="1"),
        stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    try:
        deadline = time.monotonic() + LONGEST
        while not (tmp_path / "two" / "checkpoint.pt").exists():
            assert running.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.02)
        children = Path(f"/proc/{running.pid}/task/{running.pid}/children").read_text().split()
        os.kill(int(children[-1]), signal.SIGKILL)
        out, err = running.communicate(timeout=LONGEST)
    finally:
        running.kill()
    assert running.returncode == 0, err
    assert "going on after epoch" in out
    assert weights(tmp_path / "two") == weights(tmp_path / "one")


def test_figures_made_under_torchrun_are_those_of_one_process(tmp_path):
    for name, start in {"one": [sys.executable], "two": TORCHRUN}.items():
        subprocess.run(
            [*start, "-m", "fastl2l", "reproduce", "fig4-quadratic", "--quick", "--out", tmp_path / name],
            env=environment(FASTL2L_CACHE=str(tmp_path / f"cache of {name}")),
            check=True, timeout=LONGEST, capture_output=True,
        )  # fmt: skip
    one, two = tmp_path / "one", tmp_path / "two"
    files = [path.relative_to(one) for path in sorted(one.rglob("*")) if path.is_file()]
    assert {"figure.png", "table.md"} <= {file.name for file in files}
    assert files == [path.relative_to(two) for path in sorted(two.rglob("*")) if path.is_file()]
    for file in files:
        assert (one / file).read_bytes() == (two / file).read_bytes(), file


# Sharded parameters


def test_means_over_one_process_are_means():
    values = torch.arange(12.0).reshape(3, 4)
    assert torch.equal(mean_of(values.sum(1), 4, []), values.mean(1))


def test_sharded_parameters_are_stepped_as_whole_ones_and_saved_for_any_number_of_processes(tmp_path):
    for name, size in (("save", 2), ("load", 1), ("load", 4)):
        for answer in run("sharded_parameters.py", name, tmp_path, size, fresh=name == "save"):
            assert answer is not None
            assert answer == dict.fromkeys(answer, True)


def test_what_goes_wrong_with_a_step_in_one_process_is_an_error_in_all_and_changes_nothing(tmp_path):
    first, last = run("failing_steps.py", "one", tmp_path, 2)
    own = {
        "memory": "OutOfMemoryError: state of 6,291,456 coordinates: expected",
        "gradient": "RuntimeError: gradient of parameter scale.weight: expected it sharded as the parameter is",
        "gradient, capturable": "RuntimeError: gradient of parameter scale.weight: expected it sharded as the",
        "sparse": "RuntimeError: gradient of a parameter of shape [2, 3]: expected a dense tensor, got a sparse one",
        "shape": "RuntimeError: state of a parameter of shape [3, 3]: expected shape [2, 3]",
        "no gradient elsewhere": "RuntimeError: gradient of a parameter of shape [2, 3]: expected a dense tensor",
    }
    for found in (first, last):
        told, *rest = found.pop("no gradient")
        assert "gradients: expected those of the same parameters in all processes" in told
        assert ("here: no gradient of 'parameter scale.weight'" in told) == (found is last)
        assert rest == [True, True]
        told, *rest = found.pop("no state")
        assert "states of the same ones, got others in another process" in told
        assert ("here: no state of 'parameter scale.weight'" in told) == (found is last)
        assert rest == [True, True]
        assert found.pop("outside of the mesh") == [True]
        assert "FullyShardedDataParallel's flat pieces" in found.pop("flat pieces")[0]
    theirs = "RuntimeError: step: expected every process to take it, got an error in another process"
    assert (first.pop("skipped"), last.pop("skipped")) == ([1], [0])
    assert first.keys() == last.keys() == own.keys()
    for name, message in own.items():
        assert message in last[name][0]
        assert ("nothing" if name == "gradient, capturable" else theirs) in first[name][0]
        assert first[name][1:] == last[name][1:] == [True, True]


def test_a_process_that_does_not_come_to_a_step_is_an_error_after_the_time_out(tmp_path):
    waiting, _ = run("failing_steps.py", "late", tmp_path, 2, FASTL2L_TIMEOUT="2")
    assert "said nothing until the time-out" in waiting["error"]
    assert 1 < waiting["seconds"] < 7
    assert waiting["kept"]


def test_a_trainer_outside_of_a_group_is_the_only_one():
    assert processes.current() == Processes(0, 1)
    made = process_group.trainer(**process_group.BATCH)
    assert isinstance(made, MetaTrainer)
    assert made.pieces == 4
