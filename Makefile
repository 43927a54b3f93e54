# make demo   trains a small optimizer and compares it with tuned baselines, in a few minutes
# make test   runs the tests
# make gpu    builds, tests and measures on this machine's GPU, in less than ten minutes: see docs/gpu.md
#
# The first two make the virtual environment VENV and install everything into it, where that has not been done. pip takes
# its settings from the usual PIP_* variables; TORCH_INDEX=URL names a further package index, one of CPU builds, say.
# The third installs nothing and needs no network: its PYTHON is one that has torch for CUDA.

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
READY := $(VENV)/.fastl2l-installed
CSRC := $(shell find csrc -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh')
PORTABLE := $(shell find tests/portable -name '*.cpp' -o -name '*.h')
# Python compiles what is imported when it is; to compile all takes a minute.
INSTALL := $(BIN)/python -m pip install --quiet --no-compile -c constraints.txt \
  $(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX))

.PHONY: help install demo test gpu lint format bench clean

help:
	@sed -n '/^#/!q; s/^# \{0,1\}//p' Makefile
	@echo "also: make install, lint, format, bench, clean"

install: $(READY)

demo: $(READY)
	$(BIN)/fastl2l train --task digits --epochs 75 --out runs/demo
	$(BIN)/fastl2l evaluate --task digits --rule runs/demo/rule.safetensors --out runs/demo/evaluation

# A process a core, each with one thread: by default all would use all cores, and wait for each other.
test: $(READY)
	FASTL2L_REQUIRE_EXT=1 OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --maxprocesses 8 --dist loadfile \
	  --no-loadscope-reorder $(ARGS)

gpu:
	@$(PYTHON) -c 'import torch' || \
	  { echo "make gpu installs nothing: name an interpreter that has torch: make gpu PYTHON=..." >&2; exit 1; }
	@PYTHONPATH="$(CURDIR)$${PYTHONPATH:+:$$PYTHONPATH}" $(PYTHON) bench/gpu $(ARGS)

lint: $(READY)
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/clang-format --dry-run -Werror $(CSRC) $(PORTABLE)
	$(BIN)/mypy

format: $(READY)
	$(BIN)/ruff check --fix
	$(BIN)/ruff format
	$(BIN)/clang-format -i $(CSRC) $(PORTABLE)

bench: $(READY)
	FASTL2L_REQUIRE_EXT=1 $(BIN)/python -m pytest bench/ --benchmark-only $(ARGS)

clean:
	rm -rf build dist *.egg-info fastl2l/_C.* .mypy_cache .pytest_cache .ruff_cache .benchmarks
	rm -f $(READY)

# torch comes first: the kernels are built against it (--no-build-isolation).
$(READY): pyproject.toml setup.py constraints.txt fastl2l/build.py $(CSRC)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
	  { echo "fastl2l needs Python 3.10 or newer, which $(PYTHON) is not; name another: make PYTHON=..." >&2; exit 1; }
	@command -v $${CXX:-c++} > /dev/null || \
	  { echo "fastl2l needs a C++20 compiler, such as g++: install one, or name it: CXX=... make" >&2; exit 1; }
	@echo "installing fastl2l and what it needs into $(VENV)"
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@$(INSTALL) torch setuptools wheel ninja
	@# A torch for CUDA has brought its Triton; else it is the one whose compiled kernels the tests have figures of.
	@$(BIN)/python -c 'import triton' 2> /dev/null || test "$$(uname)" != Linux || $(INSTALL) triton==3.6.0
	@FASTL2L_REQUIRE_EXT=1 $(INSTALL) --no-build-isolation -e ".[dev]"
	@touch $@
