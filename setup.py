"""Builds the native kernels where torch is importable; everything else about the package is in pyproject.toml.

    pip install --no-build-isolation -e .

An isolated build does not see torch, and must not: it would fetch another one of several GB. It makes a pure wheel
with the C++ sources inside, which are built on first use.
"""

import importlib.util
import os
import sys
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).resolve().parent


def load_build():
    """fastl2l/build.py, without the package around it."""
    spec = importlib.util.spec_from_file_location("fastl2l_build", ROOT / "fastl2l" / "build.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def pure(reason):
    """Arguments of setup() for a package whose kernels are built on first use."""
    message = f"fastl2l: {reason}: the native kernels will be built on first use"
    if os.environ.get("FASTL2L_REQUIRE_EXT") == "1":
        sys.exit(message + ", but FASTL2L_REQUIRE_EXT=1")
    print(message, file=sys.stderr)
    return {}


def native():
    """Arguments of setup() that build the native kernels, if that can be done here."""
    build = load_build()
    try:
        from torch.utils.cpp_extension import BuildExtension, CppExtension, CUDAExtension
    except ImportError:
        return pure("torch is not importable")
    if not build.has_compiler():
        return pure("there is no C++ compiler")

    class Build(BuildExtension):
        def copy_extensions_to_source(self):
            """Of a build inside the checkout, keep in mind what it was built from."""
            super().copy_extensions_to_source()
            for extension in self.extensions:
                library = build.PACKAGE / Path(self.get_ext_filename(extension.name)).name
                build.stamp_file(library).write_text(build.stamp_text(library))

    os.environ.update(build.build_environment())
    parameters = build.parameters()
    cuda = any(path.suffix == ".cu" for path in parameters.sources)
    extension = (CUDAExtension if cuda else CppExtension)(
        "fastl2l._C",
        [path.relative_to(ROOT).as_posix() for path in parameters.sources],
        include_dirs=parameters.include_dirs,
        extra_compile_args=parameters.compile_args,
        extra_link_args=parameters.link_args,
        py_limited_api=True,
    )
    return {
        "ext_modules": [extension],
        "cmdclass": {"build_ext": Build},
        "options": {"bdist_wheel": {"py_limited_api": "cp310"}},
    }


setup(
    # Beside the package in the checkout, within it once installed; headers and sources travel as its data.
    packages=[*find_packages(include=["fastl2l", "fastl2l.*"]), "fastl2l.csrc", "fastl2l.kernels"],
    package_dir={"fastl2l.csrc": "csrc", "fastl2l.kernels": "kernels"},
    package_data={
        "fastl2l": ["py.typed", "**/*.safetensors"],
        "fastl2l.csrc": ["**/*.cpp", "**/*.h", "**/*.cu", "**/*.cuh"],
    },
    **native(),
)
