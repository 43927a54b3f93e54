"""What `fastl2l env` tells."""

import io
import json
import subprocess
import sys

import pytest
import torch
from rich.console import Console

from fastl2l import environment
from fastl2l.ops.dispatch import available_backends


def test_what_takes_long_to_import_waits_until_it_is_needed():
    late = {"matplotlib", "optuna", "scipy", "sklearn", "torchvision", "triton"}
    code = (
        f"import sys, torch; late = {late} - sys.modules.keys(); import fastl2l.cli; print(late & sys.modules.keys())"
    )
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert done.stdout == "set()\n"


def test_description_is_in_order_and_can_be_json():
    description = environment.describe()
    assert list(description) == ["versions", "backends", "processor", "folders"]
    assert json.loads(json.dumps(description)) == description


def test_versions_are_those_that_run():
    versions = environment.describe()["versions"]
    assert versions["torch"] == torch.__version__
    assert versions["fastl2l"] == "0.1.0"
    assert list(versions) == ["fastl2l", "python", "torch", "torchvision", "triton", "numpy", "CUDA"]


def test_every_backend_is_there_or_says_why_not():
    backends = environment.describe()["backends"]
    assert list(backends) == list(available_backends())
    assert backends["reference"] == "available"
    for name, reason in available_backends().items():
        assert backends[name] == ("available" if reason is None else reason)


def test_processor_names_the_instruction_set_in_use():
    processor = environment.describe()["processor"]
    assert processor["threads"] == str(torch.get_num_threads())
    assert processor["instruction set (FASTL2L_CPU_ISA)"] == torch.ops.fastl2l.cpu_isa()


def test_processor_without_native_backend(monkeypatch):
    monkeypatch.setattr(environment, "available_backends", lambda: {"reference": None, "native": "no compiler"})
    assert "none" in environment.describe()["processor"]["instruction set (FASTL2L_CPU_ISA)"]
    assert environment.describe()["backends"]["native"] == "no compiler"


@pytest.mark.parametrize(("variable", "name"), [("FASTL2L_DATA", "data"), ("FASTL2L_CACHE", "cache")])
def test_folders_follow_their_variables(monkeypatch, variable, name):
    monkeypatch.setenv(variable, "/somewhere/else")
    assert environment.describe()["folders"][f"{name} ({variable})"] == "/somewhere/else"
    monkeypatch.delenv(variable)
    assert ".cache/fastl2l" in environment.describe()["folders"][f"{name} ({variable})"]


def test_rendering_shows_every_entry_as_it_is():
    description = {"versions": {"torch": "2.13.0"}, "backends": {"native": "failed: [bold] is not markup here"}}
    console = Console(file=io.StringIO(), width=120)
    console.print(environment.render(description))
    text = console.file.getvalue()
    for expected in ("versions", "torch", "2.13.0", "native", "failed: [bold] is not markup here"):
        assert expected in text
