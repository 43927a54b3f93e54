"""Equal things have equal texts, in every process; different ones have not."""

from __future__ import annotations

import argparse
import functools
import os
import re
import subprocess
import sys
import threading
import weakref

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from fastl2l.tasks.identity import identity

pytestmark = pytest.mark.filterwarnings("ignore:.torch.jit.*is deprecated:DeprecationWarning")


class Options:
    """Whose repr holds an address."""

    def __init__(self, **options):
        self.__dict__.update(options)


class Network(nn.Module):
    def __init__(self, power=2, names=("a", "b", "c"), units=3, hooked=True):
        super().__init__()
        self.first, self.last = nn.LSTM(2, units), nn.utils.parametrizations.weight_norm(nn.Linear(units, 3))
        self.options, self.tied = Options(power=power, names=set(names), network=self), [self.last.bias]
        self.activation = lambda x: x**power
        self.register_buffer("mean", torch.zeros(2))
        if hooked:
            self.register_forward_hook(lambda module, inputs, output: output * 2)


def tell(value):
    tensors = [*value.parameters(), *value.buffers()] if isinstance(value, nn.Module) else []
    return identity("value", value, by_shape=tensors)


def scaled_by(factor):
    return lambda x, y: factor * F.mse_loss(x, y)


def scripted(x):
    return x.abs().sum()


def circle():
    values = [1]
    values.append(values)
    return values


SEVERAL = {
    "network": [
        Network,
        lambda: Network(power=3),
        lambda: Network(names="ab"),
        lambda: Network(units=4),
        lambda: Network(hooked=False),
        lambda: Network().eval(),
        lambda: Network().double(),
        lambda: Network().requires_grad_(False),
    ],
    "function": [
        lambda: F.cross_entropy,
        lambda: F.mse_loss,
        lambda: torch.relu,
        lambda: torch.tanh,
        lambda: torch.ops.aten.relu,
        lambda: scaled_by(2),
        lambda: scaled_by(3),
        lambda: lambda x, y: F.mse_loss(x, y) + 1,
        lambda: lambda x, y: F.mse_loss(x, y) + 2,
        lambda: lambda x, y=1: F.mse_loss(x, y) + 2,
        lambda: lambda x, y: [x in {"a", "b", "c"} for _ in y],
        lambda: functools.partial(F.cross_entropy, label_smoothing=0.1),
        lambda: functools.partial(F.cross_entropy, label_smoothing=0.2),
        lambda: nn.CrossEntropyLoss(label_smoothing=0.1).forward,
        lambda: torch.jit.script(scripted),
    ],
    "other": [
        lambda: 1,
        lambda: 1.0,
        lambda: True,
        lambda: "1",
        lambda: [1],
        lambda: (1,),
        lambda: {1},
        lambda: {1: None},
        circle,
        lambda: Options(),
        lambda: Options(one=1),
        lambda: object(),
        lambda: argparse.Namespace(one=1),
        lambda: re.compile("one"),
        lambda: np.arange(3),
        lambda: np.arange(4)[:3] + 1,
        lambda: torch.arange(3),
        lambda: torch.arange(3.0),
        lambda: torch.float32,
        lambda: torch.device("cpu"),
        lambda: torch.Size([1]),
        lambda: weakref.ref(Network),
        lambda: torch.Generator().manual_seed(1),
        lambda: torch.Generator().manual_seed(2),
        lambda: np,
    ],
}


@pytest.mark.parametrize("kind", SEVERAL)
def test_equal_things_have_equal_texts_and_different_ones_have_not(kind):
    texts, again = ([tell(make()) for make in SEVERAL[kind]] for _ in range(2))
    assert texts == again
    assert len(set(texts)) == len(texts)
    assert not any("0x" in text for text in texts)


def test_texts_are_the_same_in_every_process():
    code = "import test_identity as t; print(*(t.tell(make()) for kind in t.SEVERAL.values() for make in kind), sep='')"
    texts = [
        subprocess.run(
            [sys.executable, "-c", "import torch; held = [torch.nn.Module() for _ in range(10)]\n" * other + code],
            env=os.environ | {"PYTHONHASHSEED": str(other)},
            cwd=os.path.dirname(__file__),
            check=True,
            capture_output=True,
        ).stdout
        for other in (0, 1)
    ]
    assert texts[0] == texts[1]


def test_numbers_count_but_for_those_that_are_told_by_shape():
    one, other = nn.Linear(2, 3), nn.Linear(2, 3)
    assert tell(one) == tell(other)
    assert identity("value", one) != identity("value", other)


def test_compiling_a_network_does_not_change_what_it_is():
    network = nn.Linear(2, 3)
    before = tell(network)
    assert tell(torch.compile(nn.Linear(2, 3))) == before
    network.compile()
    assert tell(network) == before
    assert tell(torch.compile(scaled_by(2))) == tell(scaled_by(2))


def test_what_cannot_be_told_is_named():
    network = nn.Sequential(nn.Linear(2, 3))
    network[0].options = [Options(lock=threading.Lock())]
    with pytest.raises(TypeError, match=r"value\.0\.options\[0\]\.lock: cannot tell what this _thread.lock is"):
        tell(network)
    deep = []
    for _ in range(10_000):
        deep = [deep]
    with pytest.raises(TypeError, match="value: cannot tell what this list is, it is nested too deeply"):
        tell(deep)
