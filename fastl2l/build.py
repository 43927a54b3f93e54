"""Building and loading the native kernels: the shared library ``fastl2l/_C``.

setup.py builds it ahead of time; where that has not happened, :func:`load_native` builds it on first use. Both take
sources and flags from :func:`parameters`. setup.py loads this file by its path, before the package is installed, so
nothing at module level may import torch or the rest of the package.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import logging
import os
import shlex
import shutil
import sysconfig
import textwrap
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import IO, NamedTuple

PACKAGE = Path(__file__).resolve().parent
SUFFIXES = (".cpp", ".h", ".cu", ".cuh")
LIBRARY = "fastl2l_C"
"""Name of the library that is built on first use, without suffix."""

# One binary for every Python >= 3.10 and every torch >= 2.11.
DEFINES = ["-DTORCH_TARGET_VERSION=0x020b000000000000", "-DPy_LIMITED_API=0x030A0000"]
# The same flags for every file: instruction sets are chosen inside the sources and at run time, so a binary runs on
# any machine of its architecture. Contraction is off so that only the multiply-adds that are written are fused, and
# every instruction set gives the same bits.
CXX_FLAGS = ["-std=c++20", "-O3", "-ffp-contract=off", "-fvisibility=hidden"]
# An ahead-of-time build begins with the flags that Python was built with. These make the outcome the same: no debugging
# information, which is ten times the size of the rest, and no promises about overflow, which loops pay for.
CXX_FLAGS += ["-DNDEBUG", "-g0", "-fno-wrapv"]
# Contraction is off for the same reason: the emulator that the tests run the CUDA kernels on then does what a GPU does.
# Machine code for Ampere and Hopper, and for what comes later PTX, which the driver compiles.
NVCC_FLAGS = ["-std=c++20", "-O3", "-fmad=false", "-DNDEBUG", "-DUSE_CUDA", "-Xcompiler=-fvisibility=hidden"]
NVCC_FLAGS += [
    "-gencode=arch=compute_80,code=sm_80",
    "-gencode=arch=compute_90,code=sm_90",
    "-gencode=arch=compute_90,code=compute_90",
]


class Parameters(NamedTuple):
    """All that a build of the native kernels needs to know."""

    sources: list[Path]
    include_dirs: list[str]
    compile_args: dict[str, list[str]]
    """Flags of each compiler, ``cxx`` and ``nvcc``."""
    link_args: list[str]


def parameters() -> Parameters:
    """Sources and flags of the native kernels, for ahead-of-time and just-in-time builds alike."""
    cuda = _compiles_cuda()
    patterns = ["*.cpp", "cpu/*.cpp"] + (["cuda/*.cu"] if cuda else [])
    csrc = source_folder()
    return Parameters(
        sources=[path for pattern in patterns for path in sorted(csrc.glob(pattern))],
        include_dirs=[str(csrc)],
        compile_args={"cxx": CXX_FLAGS + DEFINES, "nvcc": NVCC_FLAGS + DEFINES},
        link_args=_cuda_link_args() if cuda else [],
    )


def source_folder() -> Path:
    """Folder of the C++ sources: inside the package once that is installed, beside it in a checkout."""
    inside = PACKAGE / "csrc"
    return inside if inside.is_dir() else PACKAGE.parent / "csrc"


def fingerprint() -> str:
    """Hash of all sources, headers and flags; two builds of the same fingerprint are the same build."""
    csrc = source_folder()
    digest = hashlib.sha256(repr([CXX_FLAGS, NVCC_FLAGS, DEFINES]).encode())
    for path in sorted(path for path in csrc.rglob("*") if path.suffix in SUFFIXES):
        content = path.read_bytes()
        digest.update(f"{path.relative_to(csrc).as_posix()} {len(content)}\n".encode() + content)
    return digest.hexdigest()


def build_environment() -> dict[str, str]:
    """Variables to set while building: ninja is found in an environment that is not activated, and two jobs run."""
    path = os.pathsep.join([sysconfig.get_path("scripts"), os.environ.get("PATH", os.defpath)])
    return {"PATH": path, "MAX_JOBS": os.environ.get("MAX_JOBS", "2")}


def has_compiler() -> bool:
    """Whether there is a C++ compiler: the one that ``CXX`` names, else ``c++``."""
    return shutil.which(_compiler()) is not None


def cache_folder() -> Path:
    """Folder for what can be made again, ``FASTL2L_CACHE`` or ``~/.cache/fastl2l``."""
    return Path(os.environ.get("FASTL2L_CACHE") or "~/.cache/fastl2l").expanduser()


def stamp_file(library: Path) -> Path:
    """The file beside a library built in a checkout that says what it was built from, and what came of it."""
    return library.with_name(library.name + ".fingerprint")


def stamp_text(library: Path) -> str:
    """What the stamp of a whole library of these sources holds."""
    return f"{fingerprint()}\n{_digest(library)}\n"


def prebuilt() -> Path | None:
    """The library that setup.py built, unless it did so in this checkout and sources or library have changed since."""
    library = PACKAGE / "_C.abi3.so"
    stamp = stamp_file(library)
    if not library.is_file():
        return None
    words, expected = _text(stamp).split(), stamp_text(library).split()
    stale = stamp.exists() and words not in (expected, expected[:1])  # older stamps have no digest
    return None if stale else library


def _digest(library: Path) -> str:
    return hashlib.sha256(library.read_bytes()).hexdigest()


def _text(path: Path) -> str:
    """Of a file that we wrote; nothing where it is missing or something else."""
    try:
        return path.read_text()
    except (OSError, ValueError):
        return ""


@functools.cache
def load_native() -> str | None:
    """Load the native kernels into ``torch.ops.fastl2l``, building them first where that has not been done.

    What the first call finds holds for the whole process. ``FASTL2L_NATIVE=0`` switches the native kernels off.

    Returns:
        None when the kernels are loaded, else the reason why not, which has been given as a warning too.

    Raises:
        RuntimeError: The kernels cannot be had and ``FASTL2L_REQUIRE_EXT=1``; holds the compiler's output.
    """
    if os.environ.get("FASTL2L_NATIVE") == "0":
        return "switched off by FASTL2L_NATIVE=0"
    try:
        _load()
    except (ImportError, OSError, RuntimeError) as error:
        if os.environ.get("FASTL2L_REQUIRE_EXT") == "1":
            raise RuntimeError(f"FASTL2L_REQUIRE_EXT=1, but there are no native kernels: {error}") from error
        reason = _summary(error)
        warnings.warn(
            f"fastl2l has no native kernels and goes on without, slowly: {reason}. "
            "With FASTL2L_REQUIRE_EXT=1 this is an error that shows the compiler's output.",
            RuntimeWarning,
            stacklevel=2,
        )
        return reason
    return None


def _load() -> None:
    import torch

    library = prebuilt()
    if library is None:
        _build_and_load()
    else:
        torch.ops.load_library(str(library))


def _build_and_load() -> None:
    """Load the library from the cache, where the first process to come by builds it and all others wait."""
    import torch

    build = parameters()
    if not build.sources:
        raise RuntimeError(f"there are no C++ sources in {source_folder()}")
    key = hashlib.sha256(f"{fingerprint()} {build.sources} {sysconfig.get_platform()}".encode()).hexdigest()[:16]
    folder = cache_folder().absolute() / "native" / f"torch-{torch.__version__}-{key}"
    library = folder / f"{LIBRARY}.so"
    if not _is_finished(library):
        with locked(folder.with_name(folder.name + ".lock")):
            if not _is_finished(library):
                # What a killed build left: half a library, or torch's own lock, which is never given back.
                shutil.rmtree(folder, ignore_errors=True)
                folder.mkdir()
                _compile_and_load(build, folder)
                _finished_file(library).write_text(_digest(library))
    torch.ops.load_library(str(library))


def _finished_file(library: Path) -> Path:
    """The mark beside a library that was built on first use: its digest. One that was cut would end the process."""
    return library.with_name("finished")


def _is_finished(library: Path) -> bool:
    return library.is_file() and _text(_finished_file(library)) == _digest(library)


@contextlib.contextmanager
def locked(path: Path, *, wait: bool = True) -> Iterator[None]:
    """Keep others out; the system gives the lock back when its holder ends, however it ends.

    The file is gone afterwards, unless its holder was killed. Where there are no such locks (Windows, some network file
    systems), nobody is kept out.

    Raises:
        BlockingIOError: another has the lock, and `wait` is False.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    while True:
        with open(path, "w") as file:
            try:
                import fcntl

                fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
            except BlockingIOError:
                raise
            except (ImportError, OSError):
                pass
            if not _is_at(file, path):  # its holder took the file away while this one waited
                continue
            try:
                yield
            finally:
                with contextlib.suppress(OSError):
                    path.unlink()
            return


def _is_at(file: IO[str], path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except FileNotFoundError:
        return False


def _compile_and_load(build: Parameters, folder: Path) -> None:
    from unittest import mock

    if not has_compiler():
        raise RuntimeError(f"there is no C++ compiler: {_compiler()} is not on PATH")
    logging.getLogger("fastl2l").warning("building the native kernels in %s, once; this may take a minute", folder)
    with mock.patch.dict(os.environ, build_environment()):
        from torch.utils import cpp_extension

        cpp_extension.load(
            LIBRARY,
            [str(path) for path in build.sources],
            extra_cflags=build.compile_args["cxx"],
            extra_cuda_cflags=build.compile_args["nvcc"],
            extra_ldflags=build.link_args,
            extra_include_paths=build.include_dirs,
            build_directory=str(folder),
            is_python_module=False,
        )


def _compiles_cuda() -> bool:
    """Whether CUDA sources are compiled: nvcc is there and torch was built for CUDA, or ``FASTL2L_FORCE_CUDA=1``."""
    import torch

    home = os.environ.get("CUDA_HOME", "/usr/local/cuda")
    nvcc = shutil.which("nvcc") or shutil.which(f"{home}/bin/nvcc")
    return os.environ.get("FASTL2L_FORCE_CUDA") == "1" or (nvcc is not None and torch.version.cuda is not None)


def _cuda_link_args() -> list[str]:
    """Where the linker finds the CUDA runtime that torch has loaded.

    torch's extensions are linked with it, but where torch looks there may be none, or none under the short name:
    toolkits come in pieces, and nvcc may be a script far from the rest.
    """
    try:
        maps = Path("/proc/self/maps").read_text()
    except OSError:
        return []
    runtime = next((line.split(maxsplit=5)[-1] for line in maps.splitlines() if "/libcudart.so" in line), None)
    if runtime is None:
        return []
    folder = cache_folder().absolute() / "native" / f"cudart-{hashlib.sha256(runtime.encode()).hexdigest()[:16]}"
    folder.mkdir(parents=True, exist_ok=True)
    with contextlib.suppress(FileExistsError):
        (folder / "libcudart.so").symlink_to(runtime)
    return [f"-L{folder}"]


def _compiler() -> str:
    return shlex.split(os.environ.get("CXX") or "c++")[0]


def _summary(error: Exception) -> str:
    """The one line of an error that tells most; a failed build's has all that the compiler said."""
    lines = str(error).splitlines() or [type(error).__name__]
    return textwrap.shorten(next((line for line in lines if "error:" in line), lines[0]), 300)
