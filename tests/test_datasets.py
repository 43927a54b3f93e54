"""Data sets are whole, scaled and split as documented, and their absence is explained."""

from __future__ import annotations

import re
import struct
import subprocess
import sys

import pytest
import torch

from fastl2l.tasks import FashionMNIST, datasets
from fastl2l.tasks._torchvision import torchvision


def test_digits():
    train, test = (datasets.load("digits", split) for split in ("train", "test"))
    assert train.images.shape == (1437, 1, 8, 8)
    assert test.images.shape == (360, 1, 8, 8)
    assert train.images.dtype == torch.float32
    assert train.labels.dtype == torch.int64
    assert train.classes == test.classes == 10
    assert train.images.min() == 0
    assert train.images.max() == 1
    from sklearn.datasets import load_digits

    whole = torch.from_numpy(load_digits().images).float() / 16
    assert torch.equal(test.images[1, 0], whole[5])
    assert torch.equal(train.images[:4, 0], whole[1:5])


@pytest.mark.parametrize(("split", "n"), [("train", 60000), ("test", 10000)])
def test_mnist(split, n):
    images, labels, classes = datasets.load("mnist", split)
    assert images.shape == (n, 1, 28, 28)
    assert labels.shape == (n,)
    assert classes == 10
    assert images.min() == 0
    assert images.max() == 1
    assert abs(images.mean() - 0.1307) < 0.003  # the well-known mean of MNIST's pixels
    assert (torch.bincount(labels) > 0.08 * n).all()


def test_a_data_set_is_loaded_once_a_process():
    assert datasets.load("digits", "train").images is datasets.load("digits", "train").images


def test_unknown_names_and_splits():
    with pytest.raises(ValueError, match="name: expected one of mnist, fashion-mnist, digits, got 'cifar'"):
        datasets.load("cifar", "train")
    with pytest.raises(ValueError, match="split: expected one of train, test, got 'all'"):
        datasets.load("digits", "all")


def idx(array: torch.Tensor) -> bytes:
    return struct.pack(f">BBBB{array.ndim}i", 0, 0, 8, array.ndim, *array.shape) + array.numpy().tobytes()


@pytest.fixture
def write_fashion_mnist(tmp_path, monkeypatch):
    """Writes files of 20 images, which is how many the data set has here."""
    monkeypatch.setenv("FASTL2L_DATA", str(tmp_path))
    few = datasets._KINDS["fashion-mnist"]._replace(images={"train": 20, "test": 20})
    monkeypatch.setitem(datasets._KINDS, "fashion-mnist", few)
    folder = tmp_path / "FashionMNIST" / "raw"
    folder.mkdir(parents=True)

    def write(images, labels):
        for part in ("train", "t10k"):
            (folder / f"{part}-images-idx3-ubyte").write_bytes(idx(images))
            (folder / f"{part}-labels-idx1-ubyte").write_bytes(idx(labels))

    return write


def labels_and_images(n=20, height=28, width=28):
    labels = torch.arange(n, dtype=torch.uint8) % 10
    return labels[:, None, None].expand(n, height, width).contiguous() * 25, labels


def test_fashion_mnist_is_read_from_the_data_folder(write_fashion_mnist):
    images, labels = labels_and_images()
    write_fashion_mnist(images, labels)
    loaded = datasets.load("fashion-mnist", "train")
    assert torch.equal(loaded.labels, labels.long())
    torch.testing.assert_close(loaded.images[:, 0], images / 255)
    assert FashionMNIST(batch_size=4).sample(0).theta0.numel() == 15910


def test_classes_are_those_of_the_data_set_and_not_of_the_labels_that_occur(write_fashion_mnist):
    images, labels = labels_and_images()
    write_fashion_mnist(images, labels.clamp(max=3))
    assert datasets.load("fashion-mnist", "train").classes == 10


WRONG = {
    "more labels": (labels_and_images()[0], labels_and_images(21)[1], r"got images \[20, 28, 28\] and labels \[21\]"),
    "fewer labels": (labels_and_images()[0], labels_and_images(19)[1], r"got images \[20, 28, 28\] and labels \[19\]"),
    "fewer images and labels": (*labels_and_images(19), r"got images \[19, 28, 28\] and labels \[19\]"),
    "higher": (*labels_and_images(height=29), r"got images \[20, 29, 28\]"),
    "narrower": (*labels_and_images(width=14), r"got images \[20, 28, 14\]"),
    "a label of 200": (
        labels_and_images()[0],
        labels_and_images()[1].clone().index_fill_(0, torch.tensor([7]), 200),
        "got numbers 0 to 225 and labels 0 to 200",
    ),
}


@pytest.mark.parametrize("what", WRONG)
def test_data_that_are_not_what_the_data_set_is_are_refused(what, write_fashion_mnist, tmp_path):
    images, labels, message = WRONG[what]
    write_fashion_mnist(images, labels)
    expected = (
        f"data set 'fashion-mnist' in {tmp_path}, train: expected 20 images 28 x 28 of numbers 0 to 255, labels 0"
    )
    with pytest.raises(ValueError, match=f"{re.escape(expected)} to 9, {message}"):
        FashionMNIST()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"target": slice(1000)}, r"data set 'digits', test: .*got images \[360, 8, 8\] and labels \[200\]"),
        ({"images": slice(1000)}, r"data set 'digits', test: .*got images \[200, 8, 8\] and labels \[360\]"),
    ],
)
def test_other_digits_are_refused(change, message, monkeypatch):
    import sklearn.datasets

    data = sklearn.datasets.load_digits()
    for name, rows in change.items():
        data[name] = data[name][rows]
    monkeypatch.setattr(sklearn.datasets, "load_digits", lambda: data)
    datasets._load.cache_clear()
    with pytest.raises(ValueError, match=message):
        datasets.load("digits", "test")


def test_absent_data_are_explained(tmp_path, monkeypatch):
    monkeypatch.setenv("FASTL2L_DATA", str(tmp_path))

    def offline(*_, **__):
        raise OSError("no network")

    monkeypatch.setattr(torchvision().datasets.FashionMNIST, "download", offline)
    with pytest.raises(FileNotFoundError) as caught:
        FashionMNIST()
    message = str(caught.value)
    assert "fashion-mnist" in message
    assert str(tmp_path / "FashionMNIST" / "raw") in message
    assert "no network" in message
    assert "FASTL2L_DATA" in message
    assert list(tmp_path.iterdir()) == []


def test_importing_tasks_imports_neither_torchvision_nor_sklearn():
    code = "import sys, fastl2l.tasks; assert not {'torchvision', 'sklearn'} & sys.modules.keys()"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_torchvision_works_beside_any_torch():
    assert torchvision().datasets.MNIST
    assert torchvision().models.vgg16
