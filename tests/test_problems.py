"""The networks of problems are torch's own, their data are as documented, and steps leave nothing behind."""

from __future__ import annotations

import gc
import tracemalloc

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from fastl2l import tasks
from fastl2l.tasks.base import Minibatches, evaluate_loss, parts_of, value_and_grad
from fastl2l.tasks.networks import ACTIVATIONS

CPU = torch.device("cpu")


def gradient(network: nn.Module) -> torch.Tensor:
    return torch.cat([p.grad.flatten() for p in network.parameters()])


# Networks


def stage(n_in, n_out, count):
    convolutions = [nn.Conv2d(n_in if i == 0 else n_out, n_out, 3, padding="same") for i in range(count)]
    return [*(layer for convolution in convolutions for layer in (convolution, nn.ReLU())), nn.MaxPool2d(2)]


NETWORKS = {
    "c-c-p-f": (
        {"convolutions": (2,), "hidden": ()},
        lambda: [*stage(1, 16, 2), nn.Flatten(), nn.Linear(256, 10)],
    ),
    "c-c-p-c-c-p-f-f": (
        {"convolutions": (2, 2), "hidden": (64,)},
        lambda: [
            *stage(1, 16, 2),
            *stage(16, 32, 2),
            *(nn.Flatten(), nn.Linear(128, 64), nn.ReLU(), nn.Linear(64, 10)),
        ],
    ),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_convolutions_are_torch_s_own(name):
    options, layers = NETWORKS[name]
    task = tasks.Digits(**options, activation="relu", batch_size=8, dtype=torch.float64)
    problem, network = task.sample(3), nn.Sequential(*layers()).double()
    nn.utils.vector_to_parameters(problem.theta0, network.parameters())
    images, labels, _ = task.data("train")
    rows = Minibatches(3, 1437, 8).at(5, CPU)
    expected = F.cross_entropy(network(images[rows]), labels[rows])
    expected.backward()
    loss, grad = value_and_grad(problem, problem.theta0, 5)
    torch.testing.assert_close(loss, expected.detach())
    torch.testing.assert_close(grad, gradient(network))
    images, labels, _ = task.data("test")
    right = (network(images).argmax(1) == labels).double().mean()
    assert problem.accuracy(problem.theta0) == pytest.approx(right.item())


def test_images_of_odd_sizes_lose_a_row_and_a_column():
    assert tasks.MNIST(hidden=(), convolutions=(1, 1, 1)).sample(0).theta0.numel() == (
        (9 * 16 + 16) + (9 * 16 * 32 + 32) + (9 * 32 * 64 + 64) + (3 * 3 * 64 * 10 + 10)
    )


def test_specs_without_convolutions_have_no_word_of_them():
    assert tasks.Digits().spec() == {
        "name": "digits",
        "hidden": [20],
        "activation": "sigmoid",
        "batch_size": 128,
        "split": "train",
        "init_std": 0.1,
        "dtype": "float32",
    }
    assert tasks.Digits(convolutions=[2]).spec() == tasks.Digits().spec() | {"convolutions": [2]}


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations_are_torch_s_own(activation):
    problem = tasks.Digits(activation=activation, batch_size=8).sample(0)
    function = getattr(F, activation)
    theta, (images, labels, _) = problem.theta0, tasks.Digits().data("train")
    weight, bias, weight_out, bias_out = theta.split([64 * 20, 20, 200, 10])
    rows = Minibatches(0, 1437, 8).at(0, CPU)
    hidden = function(F.linear(images.flatten(1)[rows], weight.view(20, 64), bias))
    expected = F.cross_entropy(F.linear(hidden, weight_out.view(10, 20), bias_out), labels[rows])
    torch.testing.assert_close(evaluate_loss(problem, theta, 0), expected)


BATCHED = {
    "convolutions": lambda: tasks.Digits((3,), "relu", 4, convolutions=(1, 1), dtype=torch.float64),
    "sine": lambda: tasks.Sine(layers=2, units=3, batch_size=4, dtype=torch.float64),
    "classification": lambda: tasks.Table("breast-cancer", batch_size=4, dtype=torch.float64),
    "regression": lambda: tasks.Table("linnerud", batch_size=4, dtype=torch.float64),
}


@pytest.mark.parametrize("name", BATCHED)
def test_problems_side_by_side_are_those_one_by_one(name):
    problems = [BATCHED[name]().sample(seed) for seed in range(3)]
    together = tasks.batch(problems)
    assert isinstance(together, tasks.PureProblem)
    loss, grad = value_and_grad(together, together.theta0, 70)
    losses, grads = zip(*(value_and_grad(problem, problem.theta0, 70) for problem in problems), strict=True)
    torch.testing.assert_close(loss, sum(losses))
    by_part = zip(*(grad.split(list(parts_of(problems[0]).values())) for grad in grads), strict=True)
    torch.testing.assert_close(grad, torch.cat([torch.cat(part) for part in by_part]))


# Sine


class Forecast(nn.Module):
    """torch's own LSTM, one of whose two biases stays zero."""

    def __init__(self, layers, units):
        super().__init__()
        self.lstm, self.out = nn.LSTM(1, units, layers), nn.Linear(units, 1)

    def forward(self, values):
        return self.out(self.lstm(values.unsqueeze(2))[0][-1]).squeeze(1)


def in_torch_s_order(gates):
    i, f, o, g = gates.chunk(4)
    return torch.cat([i, f, g, o])


@pytest.mark.parametrize("layers", [1, 2, 3])
def test_sine_is_torch_s_own_lstm(layers):
    problem = tasks.Sine(layers=layers, units=5, batch_size=7, dtype=torch.float64).sample(1)
    network = Forecast(layers, 5).double()
    theta = problem.theta0.clone().requires_grad_()
    rest, named = theta, {}
    for layer in range(layers):
        n_in = 5 if layer else 1
        *of_layer, rest = rest.split([20 * n_in, 100, 20, len(rest) - 20 * n_in - 120])
        for kind, part in zip(("weight_ih", "weight_hh", "bias_ih"), of_layer, strict=True):
            part = part.view(20, -1) if kind.startswith("weight") else part
            named[f"lstm.{kind}_l{layer}"] = in_torch_s_order(part)
        named[f"lstm.bias_hh_l{layer}"] = torch.zeros(20, dtype=torch.float64)
    named["out.weight"], named["out.bias"] = rest[None, :-1], rest[-1:]
    values, targets = problem.inputs(3, CPU)
    expected = F.mse_loss(torch.func.functional_call(network, named, (values,)), targets)
    loss, grad = value_and_grad(problem, problem.theta0, 3)
    torch.testing.assert_close(loss, expected.detach())
    torch.testing.assert_close(grad, torch.autograd.grad(expected, theta)[0])


def test_sequences_are_sines_and_their_noise():
    clean, noisy = (tasks.Sine(noise=noise, dtype=torch.float64).sample(5) for noise in (0.0, 0.1))
    values, targets = (torch.cat(x, -1).numpy() for x in zip(*(clean.inputs(t, CPU) for t in range(150)), strict=True))
    assert values.shape == (10, 150 * 128)
    whole = np.concatenate([values, targets[None]])
    twice_cosine = np.median((whole[2:] + whole[:-2]) / whole[1:-1], 0)
    assert np.abs(whole[2:] + whole[:-2] - twice_cosine * whole[1:-1]).max() < 1e-6
    frequency = np.arccos(np.clip(twice_cosine / 2, -1, 1))
    sine, cosine = whole[0], (whole[1] - whole[0] * np.cos(frequency)) / np.sin(frequency)
    amplitude, phase = np.hypot(sine, cosine), np.arctan2(sine, cosine) % (2 * np.pi)
    for drawn, top in ((amplitude, 10), (frequency, np.pi / 2), (phase, 2 * np.pi)):
        share = np.sort(drawn / top)
        n = len(share)
        assert np.abs(share - np.arange(n) / n).max() < 2 / n**0.5  # Kolmogorov and Smirnov: 7e-4
    noise = torch.cat([noisy.inputs(t, CPU)[0] - clean.inputs(t, CPU)[0] for t in range(150)], 1)
    assert abs(noise.std() - 0.1) < 0.1 * 4 / (2 * noise.numel()) ** 0.5
    assert abs(noise.mean()) < 0.1 * 4 / noise.numel() ** 0.5
    assert all(torch.equal(noisy.inputs(t, CPU)[1], clean.inputs(t, CPU)[1]) for t in (0, 149))


def test_sequences_are_fresh_and_do_not_depend_on_the_order_of_asking():
    forward, backward = (tasks.Sine(batch_size=3).sample(2) for _ in range(2))
    ahead = [forward.inputs(step, CPU) for step in range(150)]
    for step in reversed(range(150)):
        assert all(map(torch.equal, backward.inputs(step, CPU), ahead[step]))
    assert len(torch.stack([targets for _, targets in ahead]).unique()) == 450


def test_sine_starts_as_the_paper_says():
    assert tasks.Sine().sample(0).theta0.numel() == 80 + 1600 + 80 + 21
    theta0 = tasks.Sine(layers=2).sample(0).theta0
    assert theta0.numel() == 80 + 1600 + 80 + 1600 + 1600 + 80 + 21
    assert abs(theta0.std() - 0.1) < 0.1 * 4 / (2 * theta0.numel()) ** 0.5


def test_training_makes_forecasts_good():
    problem = tasks.Sine().sample(0)
    theta = problem.theta0.clone().requires_grad_()
    optimizer = torch.optim.Adam([theta], lr=0.03)
    before = evaluate_loss(problem, theta, 10_000)
    for step in range(150):
        theta.grad = value_and_grad(problem, theta, step)[1]
        optimizer.step()
    assert evaluate_loss(problem, theta, 10_000) < 0.4 * before


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"layers": 0}, ValueError, "layers: expected an integer >= 1, got 0"),
        ({"units": 2.0}, TypeError, "units: expected an integer >= 1, got 2.0"),
        ({"noise": -0.1}, ValueError, "noise: expected a finite number >= 0, got -0.1"),
        ({"batch_size": 0}, ValueError, "batch_size: expected an integer >= 1, got 0"),
        ({"init_std": float("nan")}, ValueError, "init_std: expected a finite number >= 0, got nan"),
        ({"dtype": torch.int32}, TypeError, "dtype: expected a floating torch.dtype"),
    ],
)
def test_bad_sines_are_named(options, error, message):
    with pytest.raises(error, match=message):
        tasks.Sine(**options)


# Tables

COLUMNS = {  # rows, inputs, classes or targets
    "diabetes": (442, 10, 1),
    "breast-cancer": (569, 30, 2),
    "wine": (178, 13, 3),
    "iris": (150, 4, 3),
    "linnerud": (20, 3, 3),
}


@pytest.mark.parametrize("name", COLUMNS)
def test_tables_are_scikit_learn_s_own(name):
    import sklearn.datasets
    from sklearn.preprocessing import StandardScaler

    n, n_in, n_out = COLUMNS[name]
    inputs, targets = getattr(sklearn.datasets, f"load_{name.replace('-', '_')}")(return_X_y=True)
    inputs = torch.from_numpy(StandardScaler().fit_transform(inputs))
    problem = tasks.Table(name, hidden=(6,), activation="tanh", dtype=torch.float64).sample(4)
    network = nn.Sequential(nn.Linear(n_in, 6), nn.Tanh(), nn.Linear(6, n_out)).double()
    nn.utils.vector_to_parameters(problem.theta0, network.parameters())
    rows = Minibatches(4, n, 32).at(2, CPU)
    if name in ("diabetes", "linnerud"):
        targets = torch.from_numpy(StandardScaler().fit_transform(targets.reshape(n, -1)))
        expected = F.mse_loss(network(inputs[rows]), targets[rows])
    else:
        expected = F.cross_entropy(network(inputs[rows]), torch.from_numpy(targets)[rows])
    expected.backward()
    loss, grad = value_and_grad(problem, problem.theta0, 2)
    torch.testing.assert_close(loss, expected.detach())
    torch.testing.assert_close(grad, gradient(network))


def own(n=12):
    random = np.random.default_rng(0)
    return random.standard_normal((n, 3)), random.standard_normal(n)


def test_a_table_of_one_s_own_is_what_is_in_it():
    inputs, targets = own()
    task = tasks.Table((inputs, targets))
    assert task == tasks.Table((torch.from_numpy(inputs), targets.tolist()))
    assert task.spec() == tasks.Table((inputs, targets[:, None])).spec()
    other = tasks.Table((inputs, targets + np.arange(12)))
    assert task != other
    assert task.spec() != other.spec()
    assert tasks.Table((inputs, np.arange(12) % 3)).sample(0).theta0.numel() == 3 * 20 + 20 + 20 * 3 + 3
    assert len(tasks.batch([task.sample(0), task.sample(1)]).theta0) == 2 * 101


def test_constant_columns_are_zero():
    inputs, targets = own()
    inputs[:, 1] = 0.1  # whose mean over 12 rows is another number
    problem = tasks.Table((inputs, targets), hidden=()).sample(0)
    grad = value_and_grad(problem, problem.theta0, 0)[1]
    assert abs(grad[1]) < 1e-12
    assert grad.isfinite().all()


def spoiled(what, row, value):
    table = own()
    table[what][row] = value
    return table


@pytest.mark.parametrize(
    ("table", "error", "message"),
    [
        ("boston", ValueError, "table: expected one of diabetes, .*, linnerud or .inputs, targets., got 'boston'"),
        (3, TypeError, "table: expected a name or .inputs, targets., got int"),
        (own()[:1], TypeError, "table: expected a name or .inputs, targets., got tuple of 1"),
        (spoiled(0, 11, np.nan), ValueError, "table: inputs: expected finite numbers, got nan in row 11 and 2 more"),
        (spoiled(1, 5, np.inf), ValueError, "table: targets: expected finite numbers, got inf in row 5 and 0 more"),
        ((own()[0], own(11)[1]), ValueError, r"table: expected inputs .*, got \[12, 3\] and \[11\]"),
        ((own()[1], own()[1]), ValueError, r"table: expected inputs .*, got \[12\] and \[12\]"),
        ((own()[0], np.arange(12) - 1), ValueError, r"table: expected labels 0, 1, ... .*, got -1"),
        ((own()[0], np.ones((12, 2), int)), ValueError, r"table: expected labels .*, got shape \[12, 2\]"),
        ((np.array([["a"]] * 12), own()[1]), TypeError, "table: inputs: expected numbers, got <U1"),
    ],
)
def test_bad_tables_are_named(table, error, message):
    with pytest.raises(error, match=message):
        tasks.Table(table)


# Memory


@pytest.mark.parametrize(
    "make", [tasks.Digits, tasks.Sine, tasks.Table, lambda: tasks.Digits((), "relu", 4, convolutions=(1,))]
)
def test_steps_leave_nothing_behind(make):
    problem = make().sample(0)

    def run(steps):
        for step in steps:
            value_and_grad(problem, problem.theta0, step)
        gc.collect()
        alive = sum(found.numel() for found in gc.get_objects() if type(found) is torch.Tensor)
        return alive, tracemalloc.get_traced_memory()[0]

    tracemalloc.start()
    try:
        tensors, python = run(range(70))
        tensors_later, python_later = run(range(70, 500))
        assert tensors_later == tensors
        assert python_later < python + 20_000
    finally:
        tracemalloc.stop()
