"""`make gpu` without a GPU: how it deals with its stages, and what it makes of numbers that are made up here."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch

SUITE = Path(__file__).resolve().parents[1] / "bench" / "gpu"
COPY = 4000.0
"""Bytes a nanosecond of the GPU that these tests make up."""


@pytest.fixture(scope="module", autouse=True)
def _path():
    before = list(sys.path)
    sys.path.append(str(SUITE))
    yield
    sys.path[:] = before


@pytest.fixture
def run(tmp_path):
    """Runs stages in a folder of the test's own; gives the exit status and what is in the results file."""
    import suite

    def run(*stages):
        status = suite.Suite(tmp_path, "cpu", quick=True).run([suite.Stage(*stage) for stage in stages])
        return status, json.loads((tmp_path / "results.json").read_text())

    return run


def python(code):
    """A stage's command: `found` is its file, and `save` writes to it."""
    start = "import json, sys, time; found = sys.argv[sys.argv.index('--out') + 1]\n"
    start += "def save(value): open(found, 'w').write(json.dumps(value))\n"
    return sys.executable, "-S", "-c", start + code


def is_running(pid):
    """Not that it is there: where nobody collects them, ended processes stay."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(") ", 1)[1][0] not in "ZX"
    except (FileNotFoundError, ProcessLookupError):
        return False


# How stages are run


@pytest.fixture(scope="module")
def dry(tmp_path_factory):
    """The folder of a dry run of everything, and the finished process."""
    folder = tmp_path_factory.mktemp("gpu")
    command = [sys.executable, str(SUITE), "--quick", "--device", "cpu", "--out", str(folder)]
    variables = os.environ | {"PYTHONPATH": str(SUITE.parents[1]), "OMP_NUM_THREADS": "1"}
    return folder, subprocess.run(command, capture_output=True, text=True, env=variables)


@pytest.mark.slow
def test_a_dry_run_finds_what_a_gpu_is_to_be_asked(dry):
    folder, _ = dry
    results = json.loads((folder / "results.json").read_text())
    assert results["about"].keys() == {"command", "started", "commit", "changed_files", "device", "quick"}
    assert results["about"]["quick"] is True

    machine, speed = (results["stages"][name]["found"] for name in ("machine", "speed: native"))
    assert machine["copy"]["bytes_per_ns"] > 0
    assert machine["versions"]["torch"] == str(torch.__version__)
    rows = {tuple(row[key] for key in ("what", "coordinates", "state", "mode")): row for row in speed["rows"]}
    assert len(rows) == len(speed["rows"]) == 2 * 2 * 2 + 2 * 2 + 2
    assert {what for what, *_ in rows} == {
        kind + of for kind in ("step", "meta-gradient") for of in ("", " of rnnprop")
    }
    for (what, numel, _, mode), row in rows.items():
        assert row["who"] == "native"
        if mode == "graph":
            assert row["failed"] == "no CUDA device"
        else:
            steps = 20 if what.startswith("meta-gradient") else 1
            assert 0 < row["low_s"] <= row["median_s"] <= row["high_s"]
            assert row["ns_per_coordinate_step"] == pytest.approx(row["median_s"] / numel / steps * 1e9)
    assert {row["model"] for row in speed["optimizer"]} == {"one tensor", "300 tensors"}
    assert (folder / "speed.png").read_bytes().startswith(b"\x89PNG")
    assert all(mark["reached"] is None and mark["why"] for mark in results["marks"])


@pytest.mark.slow
def test_dry_run_of_everything(dry):
    folder, done = dry
    stages = json.loads((folder / "results.json").read_text())["stages"]
    without_gpu = {"tests": "left out", "sanitizer": "left out", "speed: triton": "left out"}
    assert {name: stage["outcome"] for name, stage in stages.items()} == dict.fromkeys(stages, "passed") | without_gpu
    assert done.returncode == 0, done.stdout + done.stderr
    for name in ("tests", "sanitizer"):
        assert stages[name]["found"]["left_out"] == "no CUDA device"
    assert (folder / "trace.json.gz").stat().st_size == stages["profile"]["found"]["trace_bytes"]
    assert stages["profile"]["found"]["kernels"]
    assert [row["problem"] for row in stages["training"]["found"]["training"] if "failed" not in row]


def test_a_stage_that_fails_is_reported_and_the_others_run(run, capsys):
    status, results = run(
        ("first", python("save({'half': 1}); print('told'); sys.exit(3)"), 10, 1),
        ("second", python("save({})"), 10, 1),
    )
    assert status == 1
    first, second = results["stages"].values()
    assert (first["outcome"], first["exit_status"], first["found"]) == ("failed", 3, {"half": 1})
    assert second["outcome"] == "passed"
    assert "first            failed" in capsys.readouterr().out


def test_a_stage_that_takes_too_long_is_ended_with_all_that_it_started(run):
    code = "import subprocess; child = subprocess.Popen(['sleep', '600']); save({'child': child.pid}); time.sleep(600)"
    status, results = run(("slow", python(code), 0.3, 1))
    assert status == 1
    slow = results["stages"]["slow"]
    assert (slow["outcome"], slow["exit_status"], list(slow["found"])) == ("timed out", None, ["child"])
    until = time.monotonic() + 10
    while is_running(slow["found"]["child"]):
        assert time.monotonic() < until
        time.sleep(0.01)


def test_a_stage_without_its_tool_is_left_out_and_says_why(run, capsys):
    status, results = run(("tool", python("save({'left_out': 'it is not there'})"), 10, 1))
    assert status == 0
    assert results["stages"]["tool"]["outcome"] == "left out"
    assert "it is not there" in capsys.readouterr().out


def test_a_run_that_is_cut_off_keeps_what_it_has(tmp_path):
    import suite

    stages = [
        suite.Stage("first", python("save({'n': 1})"), 10, 1),
        suite.Stage("second", python("save({'n': 2}); time.sleep(60)"), 10, 1),
        suite.Stage("third", python("save({'n': 3})"), 10, 1),
    ]
    half_way = tmp_path / "second.json"

    def interrupt():
        while not (half_way.exists() and half_way.read_text().endswith("}")):
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=interrupt).start()
    with pytest.raises(SystemExit) as ended:
        suite.Suite(tmp_path, "cpu", quick=True).run(stages)
    assert ended.value.code == 128 + signal.SIGTERM
    first, second, third = json.loads((tmp_path / "results.json").read_text())["stages"].values()
    assert (first["outcome"], first["found"]) == ("passed", {"n": 1})
    assert (second["outcome"], second["found"]) == ("cut off", {"n": 2})
    assert third == {"outcome": "not run"}


def test_without_native_kernels_no_later_stage_builds_them(run, tmp_path):
    seen = tmp_path / "seen"
    tell = f"import os; open({str(seen)!r}, 'w').write(os.environ.get('FASTL2L_NATIVE', 'unset'))"
    assert run(("build", python("sys.exit(1)"), 10, 1), ("next", python(tell), 10, 1))[0] == 1
    assert seen.read_text() == "0"


def test_limits_leave_ten_minutes():
    import suite

    assert sum(stage.limit for stage in suite.stages(Path())) < 600
    assert all(stage.expected <= stage.limit for stage in suite.stages(Path()))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [([], "there is no CUDA device"), (["--device", "cpu", "--only", "build,tset"], "--only: expected .* got 'tset'")],
)
def test_bad_arguments_are_named(arguments, message, capsys, monkeypatch):
    import suite

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit) as ended:
        suite.parse(arguments)
    assert ended.value.code == 2
    assert re.search(message, capsys.readouterr().err)


# Marks


def made_up(**times):
    """Stages of a GPU on which every mark is just reached, but for what `times` multiplies: who -> factor.

    Floors are those of COPY: a step of N coordinates takes N * 640 / COPY nanoseconds at full bandwidth.
    """

    def row(what, who, numel, nanoseconds, mode="launches", state="float32"):
        steps = 20 if what == "meta-gradient" else 1
        taken = nanoseconds * times.get(who, 1) * times.get(state, 1)
        return {
            "what": what, "who": who, "coordinates": numel, "mode": mode, "state": state, "median_s": taken * numel
            * steps / 1e9, "ns_per_coordinate_step": taken, "peak_bytes": int(numel * 6000 * times.get("memory", 1)),
        }  # fmt: skip

    share = {"float32": 640 / COPY / 0.86, "bfloat16": 320 / COPY / 0.76}
    rows = [row("step", "native", n, share[s], state=s) for s in share for n in (1_000_000, 10_000_000)]
    small = {"native": 0.6, "eager": 4.9, "compile": 2.5}
    rows += [row("step", who, n, ns, "graph") for who, ns in small.items() for n in (12_288, 49_152)]
    floor = (640 + 12 + 8 + 16) / COPY
    windows = {"native": 2.9 * floor, "eager": 30 * floor, "compile": 15 * floor}
    rows += [row("meta-gradient", who, 1_000_000, ns) for who, ns in windows.items()]
    rows += [row("meta-gradient", "native", 20_000_000, windows["native"])]
    counts = {"passed": 5, "failed": times.get("failed", 0)}
    accurate, bits = "test_steps_and_windows_are_as_accurate_as_pytorch", "test_any_run_gives_the_same_bits"
    return {
        "machine": {"found": {"copy": {"bytes_per_ns": COPY}, "gpu": {"memory_bytes": 140e9}}},
        "tests": {"found": {"tests": {"native": {accurate: counts, bits: counts}}, "exit_statuses": {"native": 0}}},
        "speed": {"found": {"rows": rows}},
        "figure": {"outcome": "not run"},
    }


def reached(stages):
    import marks

    return [mark["reached"] for mark in marks.judge(stages)]


def test_marks_that_are_reached():
    import marks

    judged = marks.judge(made_up())
    assert [mark["reached"] for mark in judged] == [True] * 11
    expected = [0.86, 0.76, 4.9 / 0.6, 2.5 / 0.6, 0.6 * 12.288, 30 / 2.9, 15 / 2.9, 2.9, 120 / 140, 0, 0]
    assert [mark["measured"] for mark in judged] == pytest.approx(expected)


@pytest.mark.parametrize(
    ("change", "missed"),
    [
        ({"native": 1.1}, [0, 1, 2, 3, 4, 5, 6, 7]),
        ({"bfloat16": 1.1}, [1]),
        ({"eager": 0.9}, [2, 5]),
        ({"compile": 0.9}, [3, 6]),
        ({"memory": 1.2}, [8]),
        ({"failed": 1}, [9, 10]),
    ],
)
def test_marks_that_are_missed(change, missed):
    assert [i for i, mark in enumerate(reached(made_up(**change))) if mark is False] == missed
    assert None not in reached(made_up(**change))


def test_the_slowest_large_size_decides():
    stages = made_up()
    (slow,) = (
        row
        for row in stages["speed"]["found"]["rows"]
        if (row["what"], row["coordinates"], row["state"]) == ("step", 10_000_000, "float32")
    )
    slow["ns_per_coordinate_step"] *= 1.1
    assert reached(stages)[:2] == [False, True]


def test_what_was_not_measured_is_neither_reached_nor_missed():
    import marks

    stages = made_up()
    for row in stages["speed"]["found"]["rows"]:
        if row["who"] == "eager":
            row["failed"] = "out of memory"
    judged = marks.judge(stages)
    assert [mark["reached"] for mark in judged].count(None) == 2
    assert judged[5]["why"] == "meta-gradient by eager, N = 1,000,000, launches, float32: out of memory"
    assert reached({}) == [None] * 11
    stages["tests"]["found"]["exit_statuses"] = {"triton": 0}
    assert [mark["why"] for mark in marks.judge(stages)[-2:]] == ["the tests of backend native did not end"] * 2
    del stages["machine"]
    assert marks.judge(stages)[0]["why"] == "the copy bandwidth was not measured"


def test_what_must_fit_and_does_not_is_missed():
    import suite

    stages = made_up()
    stages["speed"]["found"]["rows"][-1]["failed"] = "out of memory"
    assert reached(stages) == [True] * 8 + [False] + [True] * 2
    text = suite.describe_mark(reached_marks(stages)[8])
    assert text.startswith("MISSED ")
    assert text.endswith("N = 20,000,000, launches, float32: out of memory")
    stages["speed"]["found"]["rows"][-1]["failed"] = "left out: no time left"
    assert reached(stages)[8] is None


def test_marks_are_about_the_backend_that_auto_takes():
    import marks

    stages = made_up()
    slow = [row | {"who": "triton", "ns_per_coordinate_step": 1e3} for row in stages["speed"]["found"]["rows"]]
    stages["speed"]["found"]["rows"] = slow + stages["speed"]["found"]["rows"]
    assert reached(stages) == [True] * 11
    only = {"speed": {"found": {"rows": slow}}, "machine": stages["machine"]}
    assert marks.judge(only)[0] == {
        "mark": marks.MARKS[0].text, "at_least": 0.85, "measured": 640 / 1e3 / COPY, "reached": False,
        "backend": "triton",
    }  # fmt: skip


def test_summary_tells_marks_apart(tmp_path):
    import suite

    tried = suite.Suite(tmp_path, "cpu", quick=True)
    tried.results["stages"] = made_up(bfloat16=1.1) | {"speed": {"outcome": "failed", "log": "logs/speed.log"}}
    lines = [suite.describe_mark(mark) for mark in reached_marks(made_up(bfloat16=1.1))]
    assert lines[0].startswith("reached      step, float32 state")
    assert lines[0].endswith("0.86, at least 0.85")
    assert lines[1].startswith("MISSED       step, bfloat16 state")
    assert suite.describe_mark(reached_marks({})[0]).startswith("not measured step, float32 state")


def reached_marks(stages):
    import marks

    return marks.judge(stages)


# What the stages make of others' output


def test_outcomes_of_tests_are_counted(tmp_path):
    from harness import Findings
    from parity import Counts

    counts = Counts(Findings(tmp_path / "found.json"))
    for line in [
        "tests/test_gpu.py::test_a[native-raw-20-2] PASSED                     [  1%]",
        "tests/test_gpu.py::test_a[native-log sign] FAILED                     [  2%]",
        "tests/test_gpu.py::test_b SKIPPED (there is no CUDA device)          [  3%]",
        "tests/test_gpu.py::test_b ERROR                                      [  3%]",
        "FAILED tests/test_gpu.py::test_a[native-log sign] - AssertionError",
        "SKIPPED [83] tests/test_gpu.py:130: there is no CUDA device",
    ]:
        counts.add("native", line)
    found = json.loads((tmp_path / "found.json").read_text())
    assert found["tests"] == {
        "native": {"test_a": {"passed": 1, "failed": 1}, "test_b": {"skipped": 1, "error": 1}},
    }
    assert found["failures"] == ["tests/test_gpu.py::test_a[native-log sign]", "tests/test_gpu.py::test_b"]


@pytest.mark.parametrize(
    ("status", "output", "outcome"),
    [
        (0, "ran: native\nran: triton\n========= ERROR SUMMARY: 0 errors\n", "clean"),
        (0, "ran: native\n========= RACECHECK SUMMARY: 0 hazards displayed (0 errors, 0 warnings)\n", "clean"),
        (86, "ran: native\n========= ERROR SUMMARY: 2 errors\n", "errors"),
        (0, "left out: no backend\n========= ERROR SUMMARY: 0 errors\n", "failed"),
        (0, "ran: native\n", "failed"),
        (1, "Traceback\n========= ERROR SUMMARY: 0 errors\n", "failed"),
        (255, "========= Error: Device not supported. Please refer\n", "device not supported"),
    ],
)
def test_verdicts_of_compute_sanitizer(status, output, outcome):
    from sanitize import verdict

    assert verdict(status, output)["outcome"] == outcome


def test_resources_of_kernels_are_read(monkeypatch):
    import building

    dump = """
Fatbin elf code:
================
arch = sm_90
code version = [1,8]

Resource usage:
 Common:
  GLOBAL:0
 Function _ZN8fastl2l4cuda11step_kernelINS0_5ShapeILi2ELi20EEEEEvNS0_13StepArgumentsIT_EE:
  REG:118 STACK:0 SHARED:0 LOCAL:0 CONSTANT[0]:4000 TEXTURE:0 SURFACE:0 SAMPLER:0
"""
    monkeypatch.setattr(building, "cuobjdump", lambda: "/bin/echo")
    done = subprocess.CompletedProcess([], 0, stdout=dump, stderr="")
    monkeypatch.setattr(building.subprocess, "run", lambda *arguments, **options: done)
    assert building.resources(Path("library.so")) == [
        {"kernel": "step_kernel", "architecture": "sm_90", "registers": 118, "stack": 0, "static_shared": 0, "local": 0}
    ]


def test_everyone_computes_the_same():
    import speed

    for who in ("native", "lstm"):
        speed.check(who, "cpu", True)


def test_training_is_timed_without_what_is_done_once():
    import training

    task = training.denoising(4, "cpu")
    sample, calls = task.sample, []

    def slow_at_first(seed):
        calls.append(seed)
        if len(calls) == 3:
            time.sleep(1)
        return sample(seed)

    task.sample = slow_at_first
    problem = {"task": task, "horizon": 4, "unroll": 2, "trajectories": 3}
    begin = time.perf_counter()
    row = training.train(problem, {}, "cpu")
    assert 0 < row["seconds"] < time.perf_counter() - begin - 1
    assert row["coordinates"] == 48
    assert row["trajectories_per_s"] == pytest.approx(3 / row["seconds"])
    assert row["coordinate_steps_per_s"] == pytest.approx(3 * 4 * 48 / row["seconds"])


def test_sizes_of_the_marks_come_first():
    import speed

    cases = [case for case in speed.cases("native", False) if case.state == "float32"]
    first = [(case.what, case.coordinates) for case in cases if case.kind == "lstm"]
    assert first[: len(speed.MARKED)] == speed.MARKED
    assert len(set(first)) == len(first) == sum(map(len, speed.SIZES.values()))
    assert [(case.what, case.coordinates, case.kind) for case in cases if case.kind != "lstm"] == speed.OTHER_RULES
    compiled = [(case.what, case.coordinates) for case in speed.cases("compile", False)]
    assert {("step", 49_152), ("meta-gradient", 1_000_000)} == set(compiled[:2])


def test_figure_of_everything(tmp_path):
    import picture

    rows = []
    for who, factor in {"native": 1.0, "triton": 1.4, "eager": 12.0, "compile": 6.0, "lstm": 5.0}.items():
        for what, numel in [(what, n) for what in ("step", "meta-gradient") for n in (1e3, 49_152, 1e6, 1e8)]:
            for state in ("float32", "bfloat16") if what == "step" and factor < 2 else ("float32",):
                for mode, launch in (("launches", 20e3), ("graph", 2e3)):
                    ns = factor * (0.19 if what == "step" else 0.5) * (1 if state == "float32" else 0.55)
                    ns += launch / numel
                    row = {"what": what, "who": who, "coordinates": int(numel), "state": state, "mode": mode}
                    rows.append(row | {"median_s": ns * numel / 1e9, "ns_per_coordinate_step": ns})
    found = {"machine": made_up()["machine"], "speed": {"found": {"rows": rows}}, "late": {"outcome": "not run"}}
    results = {"about": {"device": "Made Up", "commit": "none", "quick": True}, "stages": found}
    png = picture.draw(results)
    (tmp_path / "speed.png").write_bytes(png)
    assert png.startswith(b"\x89PNG")
    quickest = picture.fastest(rows, "step", "native")
    assert list(quickest) == [1000, 49_152, 1_000_000, 100_000_000]
    assert all(row["mode"] == "graph" for row in quickest.values())
    assert picture.draw({**results, "stages": {}}).startswith(b"\x89PNG")
