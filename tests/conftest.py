"""Fixtures that several tests use."""

from __future__ import annotations

import collections
import functools
import signal

import numpy as np
import pytest
import torch
from helpers import CIFAR10_FILES, ISAS
from PIL import Image

from fastl2l.experiments import neural_art
from fastl2l.ops import dispatch
from fastl2l.tasks import datasets, vgg


def supported_isas() -> list[str]:
    """What this machine has as torch, not fastl2l, sees it: a set of ours that goes missing must not go unnoticed."""
    return list(ISAS[{"AVX512": 0, "AVX2": 1}.get(torch.backends.cpu.get_cpu_capability(), 2) :])


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files with slow tests first, then those with many: what one process is still at in the end should be short."""
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    tests = collections.Counter(item.path for item in items)
    items.sort(key=lambda item: (item.path not in slow, -tests[item.path]))  # keeps the order within a file


def pytest_configure():
    """Shells start what is in the background deaf to Ctrl-C, which tests send to processes that inherit that."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


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
def own_cache(tmp_path, monkeypatch):
    """Nothing is taken from what other tests or people have kept."""
    monkeypatch.setenv("FASTL2L_CACHE", str(tmp_path / "own cache"))


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


@pytest.fixture
def tiny_vgg(monkeypatch):
    """A network of VGG's form with 4 channels everywhere, in place of the real weights."""

    def load(network, convolutions, dtype, device):
        random, layers = torch.Generator().manual_seed(0), []
        for number in range(convolutions):
            pooled = number > 0 and vgg.block_of(number, network) > vgg.block_of(number - 1, network)
            weight = torch.randn(4, 4 if number else 3, 3, 3, generator=random, dtype=torch.float64) / 4
            bias = 0.1 * torch.randn(4, generator=random, dtype=torch.float64)
            layers.append(vgg.Layer(pooled, weight.to(device, dtype), bias.to(device, dtype)))
        return vgg.Features(layers, vgg.Normalization((0.5,) * 3, (0.25,) * 3))

    monkeypatch.setattr(vgg, "load", load)


@pytest.fixture
def pictures(tmp_path, monkeypatch):
    """FASTL2L_DATA with 40 photographs in images/content, and three pictures of waves in images/style."""
    monkeypatch.setenv("FASTL2L_DATA", str(tmp_path))
    folder = tmp_path / "images"
    (folder / "content").mkdir(parents=True)
    (folder / "style").mkdir()
    random = np.random.default_rng(0)
    for number in range(40):
        coarse = Image.fromarray(random.integers(256, size=(5, 6, 3), dtype=np.uint8))
        coarse.resize((48, 40), Image.Resampling.BICUBIC).save(folder / "content" / f"{number}.png")
    x, y = np.meshgrid(np.arange(50.0), np.arange(40.0))
    waves = np.stack([np.sin(x / 3 + np.sin(y / 5)), np.cos(y / 2), np.sin(x / 7)], 2)
    for name in ("waves", neural_art.TRAINING_STYLE, neural_art.OTHER_STYLE):
        Image.fromarray(((waves + 1) * 127).astype(np.uint8)).save(folder / "style" / f"{name}.png")
    return folder
