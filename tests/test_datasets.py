"""Data sets are whole, scaled and split as documented, and their absence is explained."""

from __future__ import annotations

import pickle
import re
import struct

import numpy as np
import pytest
import torch
from helpers import CIFAR10_FILES
from torch import nn
from torch.nn import functional as F

from fastl2l.tasks import CIFAR10, FashionMNIST, datasets
from fastl2l.tasks._torchvision import torchvision
from fastl2l.tasks.base import Minibatches, value_and_grad


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
    with pytest.raises(ValueError, match="name: expected one of mnist, fashion-mnist, digits, cifar10, got 'cifar'"):
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


def test_torchvision_works_beside_any_torch():
    assert torchvision().datasets.MNIST
    assert torchvision().models.vgg16


# CIFAR-10


def test_cifar10_is_read_from_its_binary_version(cifar10):
    _, images, labels = cifar10
    train, test = (datasets.load("cifar10", split) for split in ("train", "test"))
    assert train.images.dtype == torch.uint8
    assert train.classes == 10
    assert np.array_equal(train.images, images[:20])
    assert np.array_equal(test.images, images[20:])
    assert np.array_equal(torch.cat([train.labels, test.labels]), labels)


def test_cifar10_is_read_as_torchvision_has_it(cifar10, tmp_path, monkeypatch):
    """A folder of the Python version, with md5 sums of ours, gives the same as the binary one."""
    folder, *_ = cifar10
    expected = [datasets.load("cifar10", split) for split in ("train", "test")]
    batches = tmp_path / "python" / "cifar-10-batches-py"
    batches.mkdir(parents=True)
    sums = {}
    for file in CIFAR10_FILES:
        records = np.frombuffer((folder / file).read_bytes(), np.uint8).reshape(-1, 3073)
        data = {"data": records[:, 1:], "labels": records[:, 0].tolist()}
        (batches / file.removesuffix(".bin")).write_bytes(pickle.dumps(data))
        sums[file.removesuffix(".bin")] = None
    (batches / "batches.meta").write_bytes(pickle.dumps({"label_names": list("abcdefghij")}))
    kind = torchvision().datasets.CIFAR10
    monkeypatch.setattr(kind, "train_list", [[name, None] for name in sums if name != "test_batch"])
    monkeypatch.setattr(kind, "test_list", [["test_batch", None]])
    monkeypatch.setattr(kind, "meta", {"filename": "batches.meta", "key": "label_names", "md5": None})
    monkeypatch.setenv("FASTL2L_DATA", str(batches.parent))
    for split, binary in zip(("train", "test"), expected, strict=True):
        found = datasets.load("cifar10", split)
        assert torch.equal(found.images, binary.images)
        assert torch.equal(found.labels, binary.labels)


def test_problems_of_bytes_are_those_of_their_numbers(cifar10):
    _, images, labels = cifar10
    task = CIFAR10(hidden=(5,), activation="sigmoid", convolutions=(), batch_norm=False, batch_size=6)
    problem = task.sample(3)
    rows = Minibatches(3, 20, 6).at(2, torch.device("cpu"))
    network = nn.Sequential(nn.Flatten(), nn.Linear(3072, 5), nn.Sigmoid(), nn.Linear(5, 10))
    nn.utils.vector_to_parameters(problem.theta0, network.parameters())
    numbers, targets = torch.from_numpy(images).float() / 255, torch.from_numpy(labels).long()
    expected = F.cross_entropy(network(numbers[rows]), targets[rows])
    torch.testing.assert_close(value_and_grad(problem, problem.theta0, 2)[0], expected.detach())
    right = (network(numbers[20:]).argmax(1) == targets[20:]).float().mean()
    assert problem.accuracy(problem.theta0) == right


def paper_s_network(labels):
    """Of Andrychowicz et al. 2016, section 3.3."""
    layers = []
    for channels in (3, 16, 16):
        layers += [nn.Conv2d(channels, 16, 5, padding=2, bias=False), nn.BatchNorm2d(16), nn.ReLU(), nn.MaxPool2d(2)]
    hidden = [nn.Flatten(), nn.Linear(256, 32, bias=False), nn.BatchNorm1d(32), nn.ReLU()]
    return nn.Sequential(*layers, *hidden, nn.Linear(32, labels))


@pytest.mark.parametrize("labels", [None, (7, 2, 5)])
def test_the_paper_s_network_on_some_labels(labels, cifar10):
    _, images, all_labels = cifar10
    task = CIFAR10(labels=labels, batch_size=9, dtype=torch.float64)
    problem = task.sample(3)
    network = paper_s_network(len(labels or range(10))).double()
    assert problem.parts == {
        "conv": sum(part.numel() for part in network[:12].parameters()),
        "fc": sum(part.numel() for part in network[12:].parameters()),
    }
    nn.utils.vector_to_parameters(problem.theta0, network.parameters())
    assert all(
        (module.weight == 1).all() and (module.bias == 0).all()
        for module in network
        if isinstance(module, (nn.BatchNorm1d, nn.BatchNorm2d))
    )
    chosen = [place for place in range(20) if all_labels[place] in (labels or range(10))]
    numbers = torch.from_numpy(images[chosen]).double() / 255
    targets = torch.tensor([(labels or range(10)).index(label) for label in all_labels[chosen]])
    rows = Minibatches(3, len(chosen), 9).at(2, torch.device("cpu"))
    expected = F.cross_entropy(network(numbers[rows]), targets[rows])
    loss, gradient = value_and_grad(problem, problem.theta0, 2)
    torch.testing.assert_close(loss, expected.detach())
    wanted = torch.autograd.grad(expected, list(network.parameters()))
    torch.testing.assert_close(gradient, torch.cat([part.flatten() for part in wanted]))


@pytest.mark.parametrize("labels", [(), (3,), (3, 3), (1, 10), (-1, 2), (1.0, 2), 3, "01"])
def test_labels_that_make_no_subset_are_named(labels, cifar10):
    with pytest.raises((TypeError, ValueError), match="labels: expected"):
        CIFAR10(labels=labels)


@pytest.mark.parametrize(
    ("options", "message"),
    [({"kernel": 4}, "kernel: expected an odd"), ({"batch_norm": 1}, "batch_norm: expected True")],
)
def test_options_of_a_network_are_named(options, message, cifar10):
    with pytest.raises((TypeError, ValueError), match=message):
        CIFAR10(**options)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (lambda file: file.write_bytes(file.read_bytes()[:-1]), ValueError, "12292 bytes in all, got 12291"),
        (lambda file: file.write_bytes(file.read_bytes() + b"1"), ValueError, "12292 bytes in all, got 12293"),
        (lambda file: file.write_bytes(b""), ValueError, "12292 bytes in all, got 0"),
        (lambda file: file.write_bytes(b"\12" + file.read_bytes()[1:]), ValueError, "in all, got a label 10"),
        (lambda file: file.unlink(), FileNotFoundError, "in all, got no such file"),
    ],
)
def test_other_binary_files_are_named(change, error, message, cifar10):
    file = cifar10[0] / "data_batch_3.bin"
    change(file)
    expected = f"{file}: expected 4 records of 3073 bytes, the first of them a label 0 to 9"
    with pytest.raises(error, match=f"{re.escape(expected)}.*{message}"):
        CIFAR10()


def test_absent_cifar10_is_explained(tmp_path, monkeypatch):
    monkeypatch.setenv("FASTL2L_DATA", str(tmp_path))

    def offline(*_, **__):
        raise OSError("no network")

    monkeypatch.setattr(torchvision().datasets.CIFAR10, "download", offline)
    with pytest.raises(FileNotFoundError, match=re.escape(str(tmp_path / "cifar-10-batches-bin"))):
        CIFAR10()


@pytest.mark.skipif(
    not (datasets.data_folder() / "cifar-10-batches-bin").is_dir(), reason="CIFAR-10 is not in the data folder"
)
def test_the_real_cifar10():
    train, test = (datasets.load("cifar10", split) for split in ("train", "test"))
    assert train.images.shape == (50_000, 3, 32, 32)
    assert (torch.bincount(train.labels) == 5000).all()
    assert (torch.bincount(test.labels) == 1000).all()
    means = train.images.float().mean((0, 2, 3)) / 255
    torch.testing.assert_close(means, torch.tensor([0.4914, 0.4822, 0.4465]), atol=1e-4, rtol=0)  # the well-known ones


def test_many_data_sets_are_held_at_once():
    kinds = [("digits", split, dtype) for split in datasets.SPLITS for dtype in (torch.float32, torch.float64)]
    kinds += [("digits", split, dtype) for split in datasets.SPLITS for dtype in (torch.float16, torch.bfloat16)]
    kinds += [("mnist", split, torch.float32) for split in datasets.SPLITS]
    first = [datasets.load(name, split, dtype=dtype) for name, split, dtype in kinds]
    again = [datasets.load(name, split, dtype=dtype) for name, split, dtype in kinds]
    assert all(one is other for one, other in zip(first, again, strict=True))
