"""Fixtures that several tests use."""

from __future__ import annotations

import functools

import numpy as np
import pytest
import torch
from helpers import CIFAR10_FILES, ISAS

from fastl2l.ops import dispatch
from fastl2l.tasks import datasets


def supported_isas() -> list[str]:
    """What this machine has as torch, not fastl2l, sees it: a set of ours that goes missing must not go unnoticed."""
    return list(ISAS[{"AVX512": 0, "AVX2": 1}.get(torch.backends.cpu.get_cpu_capability(), 2) :])


@pytest.fixture(scope="session", autouse=True)
def _one_thread():
    """Most tests are small, and threads of torch that wait for a busy machine make them many times slower."""
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def native() -> dispatch.Backend:
    return dispatch.select("native", "cpu")


@pytest.fixture(params=ISAS)
def isa(request, monkeypatch) -> str:
    """The test runs once with every instruction set."""
    if request.param not in supported_isas():
        pytest.skip(f"this machine does not have {request.param}")
    monkeypatch.setenv("FASTL2L_CPU_ISA", request.param)
    return request.param


@pytest.fixture
def set_threads():
    """torch.set_num_threads, undone afterwards."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.fixture
def poisoned_memory():
    """Fresh memory holds NaN, also that which operators allocate for their results."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def cifar10(tmp_path, monkeypatch):
    """The binary version with 4 images a file: a folder, and what is in it as images and labels."""
    monkeypatch.setenv("FASTL2L_DATA", str(tmp_path))
    monkeypatch.setattr(datasets, "_load", functools.cache(datasets._load.__wrapped__))  # which is gone with the test
    few = datasets._KINDS["cifar10"]._replace(images={"train": 20, "test": 4})
    monkeypatch.setitem(datasets._KINDS, "cifar10", few)
    folder = tmp_path / "cifar-10-batches-bin"
    folder.mkdir()
    random = np.random.default_rng(0)
    images, labels = random.integers(256, size=(24, 3, 32, 32), dtype=np.uint8), np.arange(24, dtype=np.uint8) % 10
    for i, name in enumerate(CIFAR10_FILES):
        records = zip(labels[4 * i : 4 * i + 4], images[4 * i : 4 * i + 4], strict=True)
        (folder / name).write_bytes(b"".join(bytes([label]) + image.tobytes() for label, image in records))
    return folder, images, labels
