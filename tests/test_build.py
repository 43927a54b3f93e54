"""The native kernels: built ahead of time, built on first use, or not to be had."""

import importlib.util
import os
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import threading
import zipfile
from pathlib import Path

import forked
import pytest
import torch

from fastl2l import build

REPO = Path(__file__).resolve().parent.parent

# A small stand-in for csrc/, of the same shape: one file registers, another computes, a header is between them.
ANSWER = {
    "registration.cpp": """
        #include <torch/csrc/stable/library.h>
        #include "cpu/answer.h"
        int64_t get() { return answer(); }
        STABLE_TORCH_LIBRARY(fastl2l, m) { m.def("answer() -> int"); }
        STABLE_TORCH_LIBRARY_IMPL(fastl2l, CompositeExplicitAutograd, m) { m.impl("answer", TORCH_BOX(&get)); }
    """,
    "cpu/answer.h": "#pragma once\nlong answer();\n",
    "cpu/answer.cpp": '#include "cpu/answer.h"\nlong answer() { return 42; }\n',
}
USE = """
import torch
from fastl2l.build import load_native
reason = load_native()
print(reason or torch.ops.fastl2l.answer())
"""
BUILDING = "building the native kernels"


def write_answer(csrc: Path) -> None:
    for name, text in ANSWER.items():
        (csrc / name).parent.mkdir(parents=True, exist_ok=True)
        (csrc / name).write_text(text)


def environment(folder: Path, **variables: object) -> dict[str, str]:
    """Variables for a process that finds the package in `folder`, and nothing that the tests themselves run under."""
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(("FASTL2L_", "PYTHON"))}
    own = {"PYTHONPATH": folder, "FASTL2L_CACHE": folder / "cache", **variables}
    return inherited | {name: str(value) for name, value in own.items()}


def run(*command: object, folder: Path, **variables: object) -> subprocess.CompletedProcess:
    return subprocess.run(
        [str(part) for part in command],
        cwd=folder,
        env=environment(folder, **variables),
        capture_output=True,
        text=True,
        timeout=600,
    )


def run_python(code: str, folder: Path, **variables: object) -> subprocess.CompletedProcess:
    with tempfile.TemporaryDirectory() as outputs:  # the folder may be this repository
        return forked.run(code, environment(folder, **variables), folder, Path(outputs), timeout=600)


def use(folder: Path, **variables: object) -> str:
    result = run_python(USE, folder, **variables)
    assert result.returncode == 0, result.stderr
    return result.stdout.strip()


def copy_repo(folder: Path) -> Path:
    """What an installation is made from, without what this checkout has built."""
    folder.mkdir()
    for name in ("pyproject.toml", "setup.py", "MANIFEST.in", "README.md", "LICENSE"):
        shutil.copy(REPO / name, folder)
    for name in ("fastl2l", "csrc", "kernels"):
        shutil.copytree(REPO / name, folder / name, ignore=shutil.ignore_patterns("_C.*", "__pycache__"))
    return folder


def make_wheel(repo: Path, **variables: object) -> Path:
    wheels = repo / "dist"
    pip = (sys.executable, "-m", "pip", "wheel", "-v", "--no-index", "--no-deps", "--no-build-isolation")
    result = run(*pip, "-w", wheels, repo, folder=repo, PYTHONPATH=repo / "hidden", **variables)
    assert result.returncode == 0, result.stdout + result.stderr
    return next(wheels.glob("*.whl"))


@pytest.fixture
def package(tmp_path):
    """A checkout of nothing but build.py and the stand-in for csrc/."""
    (tmp_path / "fastl2l").mkdir()
    (tmp_path / "fastl2l" / "__init__.py").touch()
    shutil.copy(build.__file__, tmp_path / "fastl2l" / "build.py")
    write_answer(tmp_path / "csrc")
    return tmp_path


@pytest.fixture
def no_tools(tmp_path):
    """A PATH on which there is no compiler."""
    folder = tmp_path / "no-tools"
    folder.mkdir()
    return folder


@pytest.fixture(scope="module")
def pure_wheel(tmp_path_factory):
    """The wheel of a build that does not see torch."""
    repo = copy_repo(tmp_path_factory.mktemp("pure") / "repo")
    (repo / "hidden").mkdir()
    (repo / "hidden" / "torch.py").write_text('raise ImportError("hidden by the test")\n')
    return make_wheel(repo)


@pytest.fixture
def installed(pure_wheel, tmp_path):
    """A folder that the pure wheel is installed in."""
    folder = tmp_path / "site"
    with zipfile.ZipFile(pure_wheel) as wheel:
        wheel.extractall(folder)
    return folder


def load_copy(folder: Path):
    """build.py of the package in `folder`, as a module of its own."""
    spec = importlib.util.spec_from_file_location("build_copy", folder / "fastl2l" / "build.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


# ---------------------------------------------------------------------------------------- sources and flags


def test_parameters_name_every_source_once():
    sources = build.parameters().sources
    assert {path for path in sources if path.suffix == ".cpp"} == set((REPO / "csrc").rglob("*.cpp"))
    # Object files are named after them, in one folder.
    assert len({path.name for path in sources}) == len(sources)


def test_flags_keep_the_arithmetic_and_run_anywhere():
    args = build.parameters().compile_args
    for flag in args["cxx"] + args["nvcc"]:
        assert not flag.startswith(
            ("-march", "-mtune", "-mcpu", "-ffast-math", "-funsafe", "-Ofast", "--use_fast_math")
        )
    assert "-ffp-contract=off" in args["cxx"]


def test_cuda_sources_need_forcing_where_torch_has_no_cuda(package, monkeypatch):
    kernel = package / "csrc" / "cuda" / "kernel.cu"
    kernel.parent.mkdir()
    kernel.touch()
    copy = load_copy(package)
    monkeypatch.setattr(torch.version, "cuda", None)
    monkeypatch.delenv("FASTL2L_FORCE_CUDA", raising=False)
    assert kernel not in copy.parameters().sources
    monkeypatch.setenv("FASTL2L_FORCE_CUDA", "1")
    assert kernel in copy.parameters().sources


def test_cuda_sources_are_taken_where_torch_has_cuda_and_nvcc_is_there(package, tmp_path, monkeypatch):
    kernel = package / "csrc" / "cuda" / "kernel.cu"
    kernel.parent.mkdir()
    kernel.touch()
    nvcc = tmp_path / "home" / "bin" / "nvcc"
    nvcc.parent.mkdir(parents=True)
    copy = load_copy(package)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.delenv("FASTL2L_FORCE_CUDA", raising=False)
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("PATH", "")
    assert kernel not in copy.parameters().sources
    nvcc.touch(mode=0o755)
    assert kernel in copy.parameters().sources


def test_the_linker_finds_the_cuda_runtime_that_is_loaded(tmp_path):
    """Even if it goes by its full name alone, as in pip's packages, wherever it is."""
    runtime = tmp_path / "a folder" / "libcudart.so.13"
    runtime.parent.mkdir()
    (tmp_path / "runtime.c").write_text("int answer(void) { return 42; }")
    (tmp_path / "user.c").write_text("int answer(void); int main(void) { return answer() != 42; }")
    assert (
        run("cc", "-shared", "-Wl,-soname,libcudart.so.13", "-o", runtime, "runtime.c", folder=tmp_path).returncode == 0
    )
    shutil.copy(REPO / "fastl2l" / "build.py", tmp_path)
    code = f"import ctypes; ctypes.CDLL({str(runtime)!r}); import build; print(*build._cuda_link_args())"
    for _ in range(2):  # the second time it has its folder
        found = run(sys.executable, "-c", code, folder=tmp_path)  # in which torch has not been loaded
        assert found.returncode == 0, found.stderr
    linked = run("cc", "user.c", *found.stdout.split(), "-lcudart", "-o", "user", folder=tmp_path)
    assert linked.returncode == 0, linked.stderr
    assert run(tmp_path / "user", folder=tmp_path, LD_LIBRARY_PATH=runtime.parent).returncode == 0


@pytest.mark.parametrize("name", ["registration.cpp", "cpu/answer.h"])
def test_fingerprint_follows_sources_and_headers(package, name):
    copy = load_copy(package)
    before = copy.fingerprint()
    assert load_copy(package).fingerprint() == before
    with open(package / "csrc" / name, "a") as file:
        file.write("// changed\n")
    assert copy.fingerprint() != before


def test_fingerprint_follows_flags(monkeypatch):
    before = build.fingerprint()
    monkeypatch.setattr(build, "CXX_FLAGS", [*build.CXX_FLAGS, "-g"])
    assert build.fingerprint() != before


# ---------------------------------------------------------------------------------------- ahead of time


def test_wheel_with_torch_holds_one_binary_for_all_pythons(tmp_path):
    repo = copy_repo(tmp_path / "repo")
    shutil.rmtree(repo / "csrc")
    write_answer(repo / "csrc")
    wheel = make_wheel(repo, FASTL2L_REQUIRE_EXT=1)
    platform = sysconfig.get_platform().replace("-", "_").replace(".", "_")
    assert wheel.name == f"fastl2l-0.1.0-cp310-abi3-{platform}.whl"

    site = tmp_path / "site"
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(site)
    assert (site / "fastl2l" / "_C.abi3.so").exists()
    # No stamp: nothing in an installed package changes, so nothing needs to be compared.
    assert not list(site.glob("fastl2l/*.fingerprint"))
    (site / "fastl2l" / "__init__.py").write_text("")  # the whole package wants the real kernels
    assert use(site, FASTL2L_REQUIRE_EXT=1, PATH="") == "42"

    # The same flags as a build on first use.
    flags = build.parameters().compile_args["cxx"]
    ahead = next(repo.glob("build/temp*/**/build.ninja")).read_text()
    assert all(flag in ahead.split() for flag in flags)


def test_build_in_place_is_stamped_and_used_until_sources_change(package, no_tools):
    for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE"):
        shutil.copy(REPO / name, package)
    result = run(sys.executable, "setup.py", "build_ext", "--inplace", folder=package, FASTL2L_REQUIRE_EXT=1)
    assert result.returncode == 0, result.stdout + result.stderr
    library = package / "fastl2l" / "_C.abi3.so"
    assert load_copy(package).prebuilt() == library
    assert use(package, PATH=no_tools) == "42"

    stamp, whole = build.stamp_file(library), library.read_bytes()
    stamp.write_text(load_copy(package).fingerprint())  # as older versions did
    assert load_copy(package).prebuilt() == library
    stamp.write_text(load_copy(package).stamp_text(library))
    library.write_bytes(whole[:-1000])  # by a build that was killed, say
    assert load_copy(package).prebuilt() is None
    assert use(package) == "42"
    library.write_bytes(whole)

    source = package / "csrc" / "cpu" / "answer.cpp"
    source.write_text(source.read_text().replace("42", "43"))
    assert load_copy(package).prebuilt() is None
    assert use(package) == "43"


def test_pure_wheel_holds_the_sources(pure_wheel):
    assert pure_wheel.name == "fastl2l-0.1.0-py3-none-any.whl"
    with zipfile.ZipFile(pure_wheel) as wheel:
        names = set(wheel.namelist())
    for path in (REPO / "csrc").rglob("*"):
        if path.is_file():
            assert f"fastl2l/csrc/{path.relative_to(REPO / 'csrc').as_posix()}" in names
    for path in (REPO / "kernels").glob("*.py"):
        assert f"fastl2l/kernels/{path.name}" in names
    assert "fastl2l/py.typed" in names
    assert not [name for name in names if name.endswith(".so")]


FIND_KERNELS = "import fastl2l, importlib.util; print(importlib.util.find_spec('fastl2l.kernels').origin)"


@pytest.mark.parametrize("where", ["checkout", "wheel"])
def test_triton_kernels_are_found_in_a_checkout_and_in_a_wheel(installed, where):
    folder, kernels = (REPO, "kernels") if where == "checkout" else (installed, "fastl2l/kernels")
    result = run_python(FIND_KERNELS, folder, FASTL2L_NATIVE=0)
    assert result.stdout.strip() == str(folder / kernels / "__init__.py"), result.stderr


@pytest.mark.parametrize(("required", "status"), [("0", 0), ("1", 1)])
def test_setup_without_torch_is_pure_unless_the_extension_is_required(tmp_path, required, status):
    repo = copy_repo(tmp_path / "repo")
    (tmp_path / "hidden").mkdir()
    (tmp_path / "hidden" / "torch.py").write_text('raise ImportError("hidden by the test")\n')
    variables = {"PYTHONPATH": tmp_path / "hidden", "FASTL2L_REQUIRE_EXT": required}
    result = run(sys.executable, "setup.py", "--version", folder=repo, **variables)
    assert result.returncode == status
    assert "torch is not importable" in result.stderr


# ---------------------------------------------------------------------------------------- on first use


def test_first_use_builds_and_the_second_does_not(package, no_tools):
    first = run_python(USE, package, FASTL2L_REQUIRE_EXT=1)
    assert first.stdout.strip() == "42", first.stderr
    assert BUILDING in first.stderr
    ninja = next(package.glob("cache/native/*/build.ninja")).read_text()
    assert all(flag in ninja.split() for flag in build.parameters().compile_args["cxx"])

    second = run_python(USE, package, FASTL2L_REQUIRE_EXT=1, PATH=no_tools)
    assert second.stdout.strip() == "42", second.stderr
    assert BUILDING not in second.stderr


def test_changed_sources_are_built_anew(package):
    assert use(package) == "42"
    source = package / "csrc" / "cpu" / "answer.cpp"
    source.write_text(source.read_text().replace("42", "43"))
    assert use(package) == "43"


def test_processes_that_start_together_build_once(package):
    folders = [package / f"process {number}" for number in range(3)]
    for folder in folders:
        folder.mkdir()
    variables = environment(package, FASTL2L_REQUIRE_EXT=1)
    for process in [forked.start(USE, variables, package, folder) for folder in folders]:
        process.join(600)
    assert [(folder / forked.OUTPUT).read_text().strip() for folder in folders] == ["42"] * 3
    assert sum(BUILDING in (folder / forked.ERRORS).read_text() for folder in folders) == 1


def test_a_lock_is_one_holder_s_and_leaves_no_file(tmp_path):
    path, held, done = tmp_path / "folder" / "lock", threading.Event(), threading.Event()

    def wait_for_it():
        with build.locked(path):
            held.set()
            done.wait(60)

    waiting = threading.Thread(target=wait_for_it)
    with build.locked(path):
        waiting.start()
        with pytest.raises(BlockingIOError), build.locked(path, wait=False):
            pass
        assert not held.wait(0.2)
    assert held.wait(60)  # with a file of its own: the first holder has taken the other away
    with pytest.raises(BlockingIOError), build.locked(path, wait=False):
        pass
    done.set()
    waiting.join()
    assert list(path.parent.iterdir()) == []


def test_build_that_was_killed_does_not_stop_the_next(package):
    assert use(package) == "42"
    folder = next(package.glob("cache/native/*/finished")).parent
    (folder / "finished").unlink()
    (folder / "lock").touch()  # what torch leaves behind when it is killed
    (folder / "fastl2l_C.so").write_bytes(b"half a library")
    assert use(package, FASTL2L_REQUIRE_EXT=1) == "42"


@pytest.mark.slow
def test_a_library_that_is_damaged_or_missing_beside_the_mark_is_built_anew(package):
    assert use(package) == "42"
    library = next(package.glob("cache/native/*/fastl2l_C.so"))
    flipped = bytearray(library.read_bytes())
    flipped[len(flipped) // 2] ^= 1
    for content in (library.read_bytes()[:10_000], bytes(flipped), None):
        library.unlink()  # not written over: a process that has it mapped would end
        if content is not None:
            library.write_bytes(content)
        again = run_python(USE, package, FASTL2L_REQUIRE_EXT=1)
        assert again.stdout.strip() == "42", (again.returncode, again.stderr)
        assert BUILDING in again.stderr
    (library.parent / "finished").write_text("")
    assert use(package, FASTL2L_REQUIRE_EXT=1) == "42"


@pytest.mark.slow
def test_pure_wheel_builds_the_real_kernels(installed, tmp_path):
    compiler = tmp_path / "c++"  # what is optimized is tested elsewhere, and takes four times as long
    compiler.write_text(f'#!/bin/sh\nexec {shutil.which("c++")} "$@" -O0\n')
    compiler.chmod(0o755)
    code = """
import torch, fastl2l
from fastl2l import build
from fastl2l.ops.dispatch import available_backends
print(build.PACKAGE.parent, available_backends()["native"], torch.ops.fastl2l.cpu_isa())
"""
    result = run_python(code, installed, FASTL2L_REQUIRE_EXT=1, CXX=compiler)
    assert result.returncode == 0, result.stderr
    where, reason, isa = result.stdout.split()
    assert (where, reason) == (str(installed), "None")
    assert isa in ("avx512", "avx2", "generic")


# ---------------------------------------------------------------------------------------- not to be had


def test_without_compiler_there_is_one_warning_and_the_reason(package, no_tools):
    code = """
import warnings
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    from fastl2l.build import load_native
    reasons = [load_native(), load_native()]
own = [str(warning.message) for warning in caught if "fastl2l" in str(warning.message)]
assert reasons == ["there is no C++ compiler: c++ is not on PATH"] * 2, reasons
assert len(own) == 1 and reasons[0] in own[0], own
"""
    result = run_python(code, package, PATH=no_tools)
    assert result.returncode == 0, result.stderr


def test_without_compiler_the_package_works_on_the_reference(installed, no_tools):
    code = """
import warnings
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    import fastl2l, torch
    from fastl2l.ops.dispatch import available_backends
    weight = torch.nn.Parameter(torch.ones(3))
    optimizer = fastl2l.FusedLSTMOptimizer([weight], fastl2l.LSTMRule())
    weight.grad = torch.ones(3)
    optimizer.step()
assert fastl2l.__version__ == "0.1.0"
assert available_backends()["reference"] is None
assert "no C++ compiler" in available_backends()["native"]
assert not torch.equal(weight.detach(), torch.ones(3))
assert sum("native kernels" in str(warning.message) for warning in caught) == 1, caught
"""
    result = run_python(code, installed, PATH=no_tools)
    assert result.returncode == 0, result.stderr


def test_broken_sources_fall_back_with_the_compilers_first_error(package):
    (package / "csrc" / "cpu" / "answer.cpp").write_text("int broken = nonsense;\n")
    assert "nonsense" in use(package)


def test_cache_that_cannot_be_written_falls_back(package):
    (package / "file").touch()
    assert str(package / "file") in use(package, FASTL2L_CACHE=package / "file")


def test_required_extension_is_an_error_with_the_compilers_output(package):
    (package / "csrc" / "cpu" / "answer.cpp").write_text("int first = nonsense;\nint second = rubbish;\n")
    result = run_python(USE, package, FASTL2L_REQUIRE_EXT=1)
    assert result.returncode != 0
    assert "RuntimeError: FASTL2L_REQUIRE_EXT=1" in result.stderr
    assert "nonsense" in result.stderr
    assert "rubbish" in result.stderr


def test_required_extension_without_compiler_is_an_error(package, no_tools):
    result = run_python(USE, package, FASTL2L_REQUIRE_EXT=1, PATH=no_tools)
    assert result.returncode != 0
    assert "there is no C++ compiler" in result.stderr


def test_native_can_be_switched_off_without_a_warning(package):
    strict = "import warnings; warnings.simplefilter('error', RuntimeWarning)\n"
    result = run_python(strict + USE, package, FASTL2L_NATIVE=0)
    assert result.stdout.strip() == "switched off by FASTL2L_NATIVE=0", result.stderr
    assert not (package / "cache").exists()
