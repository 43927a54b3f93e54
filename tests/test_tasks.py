"""Problems are what the papers say, pure in their seeds, and twice differentiable."""

from __future__ import annotations

import dataclasses
import itertools
import json
import os
import subprocess
import sys
import threading
from contextlib import contextmanager

import numpy as np
import PIL.Image
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from fastl2l import tasks
from fastl2l.tasks import datasets, tables
from fastl2l.tasks.base import (
    Drawn,
    Minibatches,
    Problem,
    Task,
    check_start,
    evaluate_loss,
    generator,
    parts_of,
    problem_seed,
    value_and_grad,
)

CPU = torch.device("cpu")


def blobs(n=300, dtype=torch.float32):
    random = torch.Generator().manual_seed(0)
    inputs = torch.randn(n, 6, generator=random, dtype=dtype, device="cpu")
    return inputs, torch.randint(3, (n,), generator=random, device="cpu")


def small_net():
    return nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3))


class WithFactories(nn.Module):
    """Makes Tensors without a word on device and dtype, as does its data."""

    def __init__(self):
        super().__init__()
        self.layer, self.scale = nn.Linear(6, 3), torch.linspace(1, 2, 3)

    def forward(self, x):
        return self.layer(x) * self.scale + torch.linspace(0, 1, 3)


class Fresh(torch.utils.data.Dataset):
    """Items that are made when they are asked for."""

    def __len__(self):
        return 20

    def __getitem__(self, i):
        return torch.linspace(0, i / 20, 6), i % 3


def custom(make=small_net, **options):
    return tasks.from_module(make, F.cross_entropy, blobs(), batch_size=16, **options)


ALL = {
    "quadratic": lambda: tasks.Quadratic(dim=4, batch=3),
    "ill-conditioned": lambda: tasks.IllConditioned(dim=4, batch=3),
    "digits": lambda: tasks.Digits(batch_size=32),
    "mnist": lambda: tasks.MNIST(hidden=(5, 4), activation="elu"),
    "digits, convolutions": lambda: tasks.Digits((5,), "softplus", 8, convolutions=(1, 2), dtype=torch.float64),
    "sine": lambda: tasks.Sine(layers=2, units=4, batch_size=8),
    "table": lambda: tasks.Table("wine", batch_size=16),
    "table, own": lambda: tasks.Table((blobs()[0].numpy(), blobs()[0][:, :2] + 1), hidden=(4, 3), activation="tanh"),
    "custom": custom,
    "custom, with factories": lambda: tasks.from_module(WithFactories, F.cross_entropy, Fresh(), batch_size=16),
    "custom, batch norm and dropout": lambda: custom(
        lambda: nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5), nn.Dropout(0.5), nn.Linear(5, 3))
    ),
}


@pytest.fixture(params=ALL)
def task(request) -> Task:
    return ALL[request.param]()


# Any task


def test_a_problem_is_a_function_of_its_seed(task):
    first, second, other = task.sample(5), task.sample(5), task.sample(6)
    theta = first.theta0 + 0.1
    for step in (3, 0, 700, 3):  # back and forth, over the blocks in which minibatches are drawn
        torch.rand(3)  # whatever happens to the global random numbers
        loss, grad = value_and_grad(first, theta, step)
        again, same_grad = value_and_grad(second, theta, step)
        assert torch.equal(loss, again)
        assert torch.equal(grad, same_grad)
        assert not torch.equal(loss, value_and_grad(other, theta, step)[0])
    assert torch.equal(first.theta0, second.theta0)
    assert not torch.equal(first.theta0, other.theta0)


@pytest.mark.parametrize("name", ALL)
def test_global_random_numbers_are_left_alone(name):
    before = torch.get_rng_state()
    problem = ALL[name]().sample(1)
    value_and_grad(problem, problem.theta0, 0)
    assert torch.equal(before, torch.get_rng_state())


def test_a_problem_keeps_its_contract(task):
    problem = task.sample(2)
    start = problem.theta0.clone()
    check_start(problem)
    loss, grad = value_and_grad(problem, problem.theta0, 0)
    assert loss.shape == ()
    assert not loss.requires_grad
    assert grad.shape == problem.theta0.shape
    assert not grad.requires_grad
    assert problem.theta0.numel() % problem.functions == 0
    assert torch.equal(evaluate_loss(problem, problem.theta0, 0), loss)
    assert torch.equal(problem.theta0, start)


def test_evaluating_under_no_grad_gives_the_same_gradient(task):
    problem = task.sample(2)
    expected = value_and_grad(problem, problem.theta0, 1)[1]
    with torch.no_grad():
        assert torch.equal(value_and_grad(problem, problem.theta0, 1)[1], expected)


def test_second_derivatives(task):
    problem = task.sample(4)
    theta = problem.theta0.clone().requires_grad_()
    direction = torch.randn(theta.shape, generator=torch.Generator().manual_seed(1), dtype=theta.dtype)
    (grad,) = torch.autograd.grad(problem.loss(theta, 2), theta, create_graph=True)
    (product,) = torch.autograd.grad(grad @ direction, theta)
    epsilon = 1e-2 if theta.dtype == torch.float32 else 1e-6
    ahead, behind = (value_and_grad(problem, theta + e * direction, 2)[1] for e in (epsilon, -epsilon))
    difference = (ahead - behind) / (2 * epsilon)
    assert (product - difference).norm() < 0.03 * difference.norm()


def test_specs_are_json_and_tell_tasks_apart(task):
    assert json.loads(json.dumps(task.spec())) == task.spec()
    specs = [json.dumps(make().spec()) for make in ALL.values()]
    assert len(set(specs)) == len(specs)


@contextmanager
def default_device(device):
    torch.set_default_device(device)
    try:
        yield
    finally:
        torch.set_default_device(None)


@contextmanager
def default_dtype(dtype):
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


DEFAULTS = {
    "device, by with": lambda: torch.device("meta"),
    "device, for all": lambda: default_device("meta"),
    "dtype": lambda: default_dtype(torch.float64),
}


def outcome(task):
    problem, pair = task.sample(3), tasks.batch([task.sample(1), task.sample(2)])
    return [problem.theta0, *value_and_grad(problem, problem.theta0, 2), *value_and_grad(pair, pair.theta0, 70)]


@pytest.mark.parametrize("defaults", DEFAULTS)
def test_torch_s_defaults_do_not_change_a_task(task, defaults):
    expected = outcome(task)
    with DEFAULTS[defaults]():
        found = outcome(task)
    for one, other in zip(found, expected, strict=True):
        assert one.device == CPU
        assert one.dtype == other.dtype
        assert torch.equal(one, other)


@pytest.mark.parametrize("name", ALL)
def test_a_default_device_does_not_change_what_is_made(name):
    datasets._load.cache_clear()
    tables._bundled.cache_clear()
    expected = ALL[name]().spec(), *outcome(ALL[name]())
    datasets._load.cache_clear()
    tables._bundled.cache_clear()
    with torch.device("meta"):
        found = ALL[name]().spec(), *outcome(ALL[name]())
    assert found[0] == expected[0]
    assert all(map(torch.equal, found[1:], expected[1:]))


# Quadratic


def test_quadratic_is_the_paper_s_function():
    problem = tasks.Quadratic(dim=4, batch=3, dtype=torch.float64).sample(0)
    theta = torch.randn(12, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    loss, grad = value_and_grad(problem, theta, 9)
    residuals = [problem.w[i] @ theta[4 * i : 4 * i + 4] - problem.y[i, :, 0] for i in range(3)]
    torch.testing.assert_close(loss, sum(r @ r for r in residuals))
    torch.testing.assert_close(grad, torch.cat([2 * problem.w[i].T @ residuals[i] for i in range(3)]))


def test_ill_conditioned_functions_have_a_spectrum_each_and_a_minimum_of_0():
    problem = tasks.IllConditioned(dim=6, condition=1e4, batch=500, dtype=torch.float64).sample(0)
    spectra = torch.linalg.svdvals(problem.w).square()
    assert (spectra <= 1 + 1e-12).all()
    assert (spectra >= 1e-4 * (1 - 1e-9)).all()
    logs = spectra.log10()
    assert abs(logs.mean() + 2) < 4 * (4 / 3**0.5 / 2) / 3000**0.5  # uniform on [-4, 0]
    assert len(logs.flatten().unique()) == 3000
    best = torch.linalg.solve(problem.w, problem.y)
    assert abs(best.var() - 1) < 0.2
    loss, gradient = value_and_grad(problem, best.flatten(), 3)
    assert loss < 1e-18
    assert gradient.abs().max() < 1e-9


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"condition": 0.5}, ValueError, "condition: expected a finite number >= 1, got 0.5"),
        ({"condition": float("inf")}, ValueError, "condition: expected a finite number >= 1, got inf"),
        ({"condition": "high"}, TypeError, "condition: expected a number >= 1, got 'high'"),
        ({"dim": 0}, ValueError, "dim: expected an integer >= 1, got 0"),
    ],
)
def test_ill_conditioned_functions_that_cannot_be_are_refused(options, error, message):
    with pytest.raises(error, match=message):
        tasks.IllConditioned(**options)


def test_quadratic_is_drawn_from_the_standard_normal():
    problem = tasks.Quadratic(batch=2000, dtype=torch.float64).sample(0)
    for drawn in (problem.w, problem.y, problem.theta0):
        n = drawn.numel()
        assert abs(drawn.mean()) < 4 / n**0.5
        assert abs(drawn.var() - 1) < 4 * (2 / n) ** 0.5
        assert abs((drawn**4).mean() - 3) < 4 * (96 / n) ** 0.5


def test_precision_does_not_change_the_problem():
    single, double = (tasks.Quadratic(dtype=dtype).sample(1) for dtype in (torch.float32, torch.float64))
    assert torch.equal(double.theta0.float(), single.theta0)
    assert torch.equal(double.w.float(), single.w)


# Classification


@pytest.mark.parametrize("activation", ["sigmoid", "relu", "tanh", "elu"])
@pytest.mark.parametrize("hidden", [(), (7,), (7, 5, 6)])
def test_classification_is_torch_s_own_network(hidden, activation):
    task = tasks.Digits(hidden=hidden, activation=activation, dtype=torch.float64)
    problem = task.sample(3)
    layers = []
    for n_in, n_out in itertools.pairwise((64, *hidden, 10)):
        layers += [
            nn.Linear(n_in, n_out),
            {"sigmoid": nn.Sigmoid, "relu": nn.ReLU, "tanh": nn.Tanh, "elu": nn.ELU}[activation](),
        ]
    network = nn.Sequential(*layers[:-1]).double()
    nn.utils.vector_to_parameters(problem.theta0, network.parameters())
    rows = Minibatches(3, 1437, 128).at(5, CPU)
    images, labels, _ = task.data("train")
    expected = F.cross_entropy(network(images.flatten(1)[rows]), labels[rows])
    expected.backward()
    loss, grad = value_and_grad(problem, problem.theta0, 5)
    torch.testing.assert_close(loss, expected.detach())
    torch.testing.assert_close(grad, torch.cat([p.grad.flatten() for p in network.parameters()]))


def test_mnist_starts_as_the_paper_says():
    problem = tasks.MNIST().sample(0)
    theta0 = problem.theta0
    assert theta0.shape == (784 * 20 + 20 + 20 * 10 + 10,)
    assert abs(theta0.std() - 0.1) < 0.1 * 4 / (2 * 15910) ** 0.5
    assert abs(theta0.mean()) < 0.1 * 4 / 15910**0.5
    assert 2.2 < evaluate_loss(problem, theta0, 0) < 2.6  # about ln 10: it knows nothing yet


def test_training_makes_digits_accurate():
    problem = tasks.Digits().sample(0)
    theta = problem.theta0.clone().requires_grad_()
    optimizer = torch.optim.Adam([theta], lr=0.1)
    assert problem.accuracy(theta) < 0.3
    for step in range(60):
        theta.grad = value_and_grad(problem, theta, step)[1]
        optimizer.step()
    assert problem.accuracy(theta) > 0.9
    assert problem.accuracy(theta, "train") > 0.9


def test_the_splits_differ():
    theta = tasks.Digits().sample(0).theta0
    assert not torch.equal(
        evaluate_loss(tasks.Digits().sample(0), theta, 0), evaluate_loss(tasks.Digits(split="test").sample(0), theta, 0)
    )


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"hidden": 20}, TypeError, "hidden: expected a sequence"),
        ({"hidden": "20"}, TypeError, "hidden: expected a sequence"),
        ({"hidden": (20, 0)}, ValueError, "hidden: expected an integer >= 1, got 0"),
        ({"hidden": (2.5,)}, TypeError, "hidden: expected an integer >= 1, got 2.5"),
        ({"activation": "swish"}, ValueError, "activation: expected one of sigmoid, relu, tanh, elu, .*, got 'swish'"),
        ({"convolutions": 2}, TypeError, r"convolutions: expected a sequence .* such as \(2, 2\), got 2"),
        ({"convolutions": (2, 0)}, ValueError, "convolutions: expected an integer >= 1, got 0"),
        (
            {"convolutions": (1, 1, 1, 1)},
            ValueError,
            r"convolutions: expected at most 3 stages for inputs of 1 x 8 x 8, .* got \[1, 1, 1, 1\]",
        ),
        ({"batch_size": 0}, ValueError, "batch_size: expected an integer >= 1, got 0"),
        ({"split": "valid"}, ValueError, "split: expected one of train, test, got 'valid'"),
        ({"init_std": -1.0}, ValueError, "init_std: expected a finite number >= 0"),
        ({"init_std": "0.1"}, TypeError, "init_std: expected a number"),
        ({"dtype": torch.int64}, TypeError, "dtype: expected a floating torch.dtype"),
    ],
)
def test_bad_options_are_named(options, error, message):
    with pytest.raises(error, match=message):
        tasks.Digits(**options)


# Seeds and minibatches


def test_seeds_of_different_purposes_never_meet():
    purposes = ("train", "validation", "test", "tune")
    seeds = [problem_seed(s, p, i) for s in range(5) for p in purposes for i in range(2000)]
    assert len(set(seeds)) == len(seeds)
    assert all(0 <= seed < 2**63 for seed in seeds)
    assert problem_seed(1, "test", 2) == 8877313703680698200  # for ever: results that were published depend on it


def test_streams_of_numbers_are_independent():
    draws = [generator(s, name, b).standard_normal(4000) for s in (0, 1, 2**40) for name in ("a", "b") for b in (0, 1)]
    for a, b in itertools.combinations(draws, 2):
        assert not set(a) & set(b)  # nor the same numbers, shifted
        assert abs((a * b).mean()) < 5 / 4000**0.5


def test_minibatches_are_uniform_with_replacement():
    batches = Minibatches(7, rows=50, batch_size=128)
    drawn = torch.stack([batches.at(step, CPU) for step in range(1000)])
    assert drawn.dtype == torch.int64
    counts = torch.bincount(drawn.flatten(), minlength=50)
    assert len(counts) == 50
    expected = drawn.numel() / 50
    chi_squared = ((counts - expected) ** 2 / expected).sum()
    assert 20 < chi_squared < 95  # 49 degrees of freedom: five standard deviations either way
    assert len(drawn.unique(dim=0)) == 1000  # no step repeats another


def test_minibatches_do_not_depend_on_the_order_of_asking():
    forward, backward = (Minibatches(1, rows=1000, batch_size=8) for _ in range(2))
    ahead = [forward.at(step, CPU) for step in range(200)]
    for step in reversed(range(200)):
        assert torch.equal(backward.at(step, CPU), ahead[step])


@pytest.mark.parametrize("name", ["digits", "sine"])
def test_going_along_two_sequences_of_steps_draws_nothing_twice(name, monkeypatch):
    problem, drawn = tasks.by_name(name, batch_size=4).sample(0), []
    (kind,) = {type(value) for value in vars(problem).values() if isinstance(value, Drawn)}
    original = kind.draw
    monkeypatch.setattr(kind, "draw", lambda self, block, device: drawn.append(block) or original(self, block, device))
    for step in range(130):
        problem.inputs(step, CPU)
        problem.inputs(2**40 + step, CPU)
    assert len(drawn) == len(set(drawn)) == 6
    assert not torch.equal(problem.inputs(5, CPU)[0], problem.inputs(2**40 + 5, CPU)[0])


# Custom tasks


def test_from_module_is_the_module_s_own_gradient():
    task, (inputs, targets) = custom(), blobs()
    problem = task.sample(3)
    module = problem.module
    torch.testing.assert_close(nn.utils.parameters_to_vector(module.parameters()), problem.theta0)
    rows = Minibatches(3, 300, 16).at(4, CPU)
    F.cross_entropy(module(inputs[rows]), targets[rows]).backward()
    _, grad = value_and_grad(problem, problem.theta0, 4)
    torch.testing.assert_close(grad, torch.cat([p.grad.flatten() for p in module.parameters()]))


def test_frozen_parameters_and_buffers_stay_as_they_were():
    def make():
        network = nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5), nn.Linear(5, 3))
        network[0].requires_grad_(False)
        return network

    problem = custom(make).sample(0)
    before = {name: value.clone() for name, value in problem.module.state_dict().items()}
    assert problem.theta0.numel() == 5 + 5 + 15 + 3
    value_and_grad(problem, problem.theta0 * 2, 0)
    after = problem.module.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_dropout_is_drawn_anew_every_step_but_the_same_every_time():
    data = (torch.ones(10, 6), torch.zeros(10, dtype=torch.int64))  # one example ten times: only dropout can differ
    task = tasks.from_module(
        lambda: nn.Sequential(nn.Dropout(0.5), nn.Linear(6, 3)), F.cross_entropy, data, batch_size=1
    )
    problem = task.sample(0)
    losses = [evaluate_loss(problem, problem.theta0, step).item() for step in range(20)]
    assert len(set(losses)) > 10
    assert losses == [evaluate_loss(problem, problem.theta0, step).item() for step in range(20)]


def test_tied_weights_are_one_parameter():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Linear(6, 6, bias=False), nn.Linear(6, 6, bias=False)
            self.second.weight = self.first.weight

        def forward(self, x):
            return self.second(self.first(x))[:, :3]

    problem = custom(Tied).sample(0)
    theta = problem.theta0 + 1
    assert theta.numel() == 36
    inputs, targets = blobs()
    rows = Minibatches(0, 300, 16).at(0, CPU)
    w = theta.view(6, 6)
    expected = F.cross_entropy((inputs[rows] @ w.T @ w.T)[:, :3], targets[rows])
    torch.testing.assert_close(evaluate_loss(problem, theta, 0), expected)


def test_a_dataset_gives_the_same_task_as_its_tensors():
    inputs, targets = blobs()
    pairs = torch.utils.data.TensorDataset(inputs, targets)
    from_pairs = tasks.from_module(small_net, F.cross_entropy, pairs, batch_size=16)
    assert from_pairs.spec() == custom().spec()


def test_specs_of_custom_tasks_see_network_loss_and_data():
    inputs, targets = blobs()

    def smooth(output, target):
        return F.cross_entropy(output, target, label_smoothing=0.1)

    others = [
        tasks.from_module(small_net, smooth, (inputs, targets), batch_size=16),
        tasks.from_module(small_net, F.cross_entropy, (inputs + 1e-3, targets), batch_size=16),
        tasks.from_module(lambda: nn.Linear(6, 3), F.cross_entropy, (inputs, targets), batch_size=16),
        custom(name="other"),
    ]
    assert custom().spec() == custom().spec()
    assert all(other.spec() != custom().spec() for other in others)


class Marked(nn.Module):
    """Its repr holds an address, and not what it computes from the second step on."""

    def __init__(self, limit):
        super().__init__()
        self.layer, self.marker, self.limit = nn.Linear(6, 3), object(), limit

    def extra_repr(self):
        return repr(self.marker)

    def forward(self, x):
        return self.layer(x).clamp(-self.limit, self.limit)


def clamped(limit):
    return lambda output, target: F.cross_entropy(output.clamp(-limit, limit), target)


def test_specs_of_custom_tasks_hold_no_addresses_but_all_that_a_network_and_a_loss_are():
    def marked(network_limit, loss_limit):
        return tasks.from_module(lambda: Marked(network_limit), clamped(loss_limit), blobs(), batch_size=16).spec()

    assert marked(100, 100) == marked(100, 100)
    assert marked(100, 100) != marked(200, 100)  # though the first losses are the same
    assert marked(100, 100) != marked(100, 200)


def test_a_custom_task_s_checkpoints_and_rates_are_found_in_another_process(tmp_path):
    code = """
import sys, torch, test_tasks as t
from fastl2l import LSTMRule, MetaTrainer, baselines
task = t.tasks.from_module(lambda: t.Marked(100), lambda x, y: t.clamped(100)(x, y) + 1, t.blobs(), batch_size=16)
trainer = MetaTrainer(LSTMRule(hidden_size=2), task, horizon=2, unroll=2, trajectories=1, validation_problems=1,
                      checkpoint="checkpoint")
print(len(trainer.history), end=" ")
trainer.fit(1, progress=False)
tried = []
baselines.tune(task, baselines.SGD(), 1, runs=1, report=lambda *of: tried.append(of))
print(bool(tried))
"""
    environment = os.environ | {"PYTHONPATH": os.path.dirname(__file__), "FASTL2L_CACHE": str(tmp_path)}
    for expected in ("0 True", "1 False"):
        found = subprocess.run(
            [sys.executable, "-c", code], env=environment, cwd=tmp_path, check=True, capture_output=True, text=True
        )
        assert found.stdout.strip() == expected


def test_what_cannot_be_told_in_a_custom_task_is_named_at_once():
    def make():
        network = small_net()
        network[1].lock = threading.Lock()
        return network

    with pytest.raises(TypeError, match=r"make_module\.1\.lock: cannot tell what this _thread.lock is"):
        custom(make)
    lock = threading.Lock()
    with pytest.raises(TypeError, match=r"loss.lock.*: cannot tell what this _thread.lock is"):
        tasks.from_module(small_net, lambda o, t: F.cross_entropy(o, t) + (lock is None), blobs(), batch_size=16)


@dataclasses.dataclass(frozen=True)
class Described(tasks.Quadratic):
    about: object = None


def test_specs_hold_what_json_holds_or_name_what_it_has_no_word_for():
    about = {"rates": ((1, np.float32(0.5)), [np.int64(3)]), "limit": float("inf"), "dtype": torch.float64}
    spec = Described(about=about).spec()
    assert spec["about"] == {"rates": [[1, 0.5], [3]], "limit": "inf", "dtype": "float64"}
    assert json.loads(json.dumps(spec)) == spec
    with pytest.raises(TypeError, match="task 'quadratic': about: expected what JSON has a word for, got a function"):
        Described(about=clamped).spec()


class TwoInputs(nn.Module):
    """Indices and numbers."""

    def __init__(self):
        super().__init__()
        self.embedding, self.layer = nn.Embedding(3, 5), nn.Linear(6, 5)

    def forward(self, kinds, x):
        return self.embedding(kinds) * self.layer(x)


class Items(torch.utils.data.Dataset):
    def __init__(self, *items):
        self.items = items

    def __len__(self):
        return len(self.items)

    def __getitem__(self, i):
        return self.items[i]


def spec_of(data, make=small_net, loss=F.cross_entropy):
    return tasks.from_module(make, loss, data, batch_size=16).spec()


def test_networks_of_several_inputs_are_called_with_all():
    inputs, kinds = blobs()
    targets = torch.randn(300, 5, generator=torch.Generator().manual_seed(1))
    task = tasks.from_module(TwoInputs, F.mse_loss, (kinds, inputs, targets), batch_size=16)
    problem = task.sample(3)
    rows = Minibatches(3, 300, 16).at(4, CPU)
    expected = F.mse_loss(problem.module(kinds[rows], inputs[rows]), targets[rows])
    torch.testing.assert_close(evaluate_loss(problem, problem.theta0, 4), expected)
    pairs = torch.utils.data.TensorDataset(kinds, inputs, targets)
    assert spec_of(pairs, TwoInputs, F.mse_loss) == task.spec()
    pair = tasks.batch([problem, task.sample(4)])
    assert isinstance(pair, tasks.PureProblem)


def test_arrays_and_numbers_are_tensors_in_the_network_s_dtype():
    inputs, targets = blobs()
    expected = custom().spec()
    arrays = inputs.numpy().astype(np.float64), targets.numpy()
    arrays[0].flags.writeable = False
    assert spec_of(arrays) == expected
    assert spec_of((arrays[0][:, ::-1][:, ::-1], targets)) == expected
    assert spec_of((inputs.double(), targets)) == expected
    assert spec_of(Items(*((x, y.item()) for x, y in zip(arrays[0], targets, strict=True)))) == expected
    assert spec_of(Items(*((x.tolist(), y) for x, y in zip(inputs, targets, strict=True)))) == expected


def test_what_vmap_raises_does_not_matter():
    class Picky(nn.Linear):
        def forward(self, x):
            if torch._C._functorch.is_functorch_wrapped_tensor(x):
                raise TypeError("expected a real Tensor")
            return super().forward(x)

    task = custom(lambda: Picky(6, 3))
    pair = tasks.batch([task.sample(0), task.sample(1)])
    assert torch.isfinite(value_and_grad(pair, pair.theta0, 0)[0])


@pytest.mark.parametrize(
    ("data", "error", "message"),
    [
        ({"x": blobs()[0], "y": blobs()[1]}, TypeError, "data: expected Tensors or arrays .*, got dict"),
        ([(torch.ones(6), 1)] * 1000, TypeError, "data: .*got list of tuple$"),
        ((), TypeError, "data: .*got tuple$"),
        ((blobs()[0],), TypeError, "data: .*got tuple of torch.Tensor"),
        ((blobs()[0], [1, 2]), TypeError, "data: .*got tuple of torch.Tensor, list"),
        (
            torch.utils.data.DataLoader(torch.utils.data.TensorDataset(*blobs())),
            TypeError,
            r"data: .*got torch\.utils\.data.*DataLoader; pass its dataset: minibatches are drawn here",
        ),
        (torch.utils.data.ChainDataset([]), ValueError, "data: expected a Dataset of numbered items.*ChainDataset"),
        (Items(), ValueError, "data: expected a Dataset of numbered items, at least one, got .*Items"),
        (Items({"x": blobs()[0][0], "y": 1}), TypeError, r"data: item 0: expected \(input, target\).*, got dict"),
        (Items((torch.ones(6), 1), torch.ones(6)), TypeError, "data: item 1: expected .*, got torch.Tensor"),
        (
            Items((torch.ones(6), 1), (torch.ones(5), 1)),
            ValueError,
            r"data: item 1: expected shapes \[\[6\], \[\]\] as item 0 has, got \[\[5\], \[\]\]; pad or crop them",
        ),
        (Items((torch.ones(6), 1), (torch.ones(6), torch.ones(6), 1)), ValueError, "data: item 1: expected shapes"),
        (
            Items((PIL.Image.new("RGB", (3, 3)), 1)),
            TypeError,
            r"data: item 0, part 0: expected a Tensor, an array or a number, got PIL\.Image\.Image",
        ),
        (Items((torch.ones(6), "cat")), TypeError, "data: item 0, part 1: expected a Tensor.*, got str"),
        ((np.array(["a", "b"]), np.ones(2)), TypeError, r"data\[0\]: expected .*, got numpy.ndarray of <U1"),
        ((torch.eye(6).to_sparse(), torch.ones(6)), TypeError, r"data\[0\]: expected a dense Tensor.*sparse_coo"),
        ((torch.ones(6), torch.ones(6, device="meta")), TypeError, r"data\[1\]: expected a dense Tensor.*on meta"),
        ((torch.ones(6, 1), torch.ones(())), ValueError, r"data: .*got shapes \[6, 1\] and \[\]"),
        (
            (torch.ones(6, 2), torch.tensor([0, 1, 2, float("nan"), 4, float("nan")])),
            ValueError,
            r"data\[1\]: expected no NaN, got nan in row 3 and 1 more",
        ),
    ],
)
def test_bad_data_are_named(data, error, message):
    with pytest.raises(error, match=message):
        spec_of(data)


@pytest.mark.filterwarnings("ignore:.*torch.jit.*is deprecated:DeprecationWarning")
@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: nn.Sequential(nn.LazyLinear(3)), ValueError, r"got a lazy one, whose 0\.weight has none yet; call it"),
        (lambda: nn.LazyBatchNorm1d(affine=False), ValueError, "got a lazy one, whose running_mean has none yet"),
        (lambda: torch.jit.script(small_net()), TypeError, "a network in Python, got one that is scripted or traced,"),
        (lambda: torch.jit.trace(small_net(), torch.ones(1, 6)), TypeError, "got one that is scripted or traced,"),
        (lambda: nn.Sequential(torch.jit.script(nn.Linear(6, 3))), TypeError, "scripted or traced in 0, whose"),
        (lambda: nn.Sequential(nn.Embedding(6, 3, sparse=True)), ValueError, "dense gradients, got sparse=True in 0"),
    ],
)
def test_bad_networks_are_named(make, error, message):
    with pytest.raises(error, match=f"make_module: .*{message}"):
        custom(make)


# Parts


class Convolutional(nn.Module):
    """Layers of both kinds, not in order, one parametrized, with a parameter of its own."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(1))
        self.entry = nn.Linear(6, 16)
        self.features = nn.Sequential(nn.Conv2d(1, 2, 3, padding=1), nn.BatchNorm2d(2), nn.ReLU())
        self.head = nn.utils.parametrizations.weight_norm(nn.Linear(32, 3))
        self.more = nn.utils.parametrizations.weight_norm(nn.Conv2d(2, 2, 1))

    def forward(self, x):
        return self.head(self.more(self.features(self.entry(x).view(-1, 1, 4, 4))).flatten(1)) * self.scale


CONV = 2 * 9 + 2 + 2 + 2 + (4 + 2 + 2)
FC = 1 + (6 * 16 + 16) + (32 * 3 + 3 + 3)
PARTS = {
    "function": tasks.conv_and_fc,
    "names": {"fc": ["scale", "entry", "head"], "conv": ["features", "more"]},
    "patterns": {"fc": ["[!fm]*"], "conv": ["features.*", "more.bias", "more.*.weight"]},
}


@pytest.mark.parametrize("parts", PARTS)
def test_theta_lies_part_by_part(parts):
    plain, task = (custom(Convolutional, parts=parts).sample(3) for parts in (None, PARTS[parts]))
    assert plain.parts is None
    assert list(task.parts.items()) == [("fc", FC), ("conv", CONV)]
    named = dict(task.module.named_parameters())
    conv = [name for name in named if name.startswith(("features", "more"))]
    order = [*(name for name in named if name not in conv), *conv]
    assert torch.equal(task.theta0, torch.cat([named[name].detach().flatten() for name in order]))
    check_start(task)
    torch.testing.assert_close(evaluate_loss(task, task.theta0, 1), evaluate_loss(plain, plain.theta0, 1))
    grad, expected = (value_and_grad(problem, problem.theta0, 1)[1] for problem in (task, plain))
    by_name = dict(zip(named, expected.split([p.numel() for p in named.values()]), strict=True))
    torch.testing.assert_close(grad, torch.cat([by_name[name] for name in order]))


def test_parts_are_part_of_what_a_task_is():
    specs = [custom(Convolutional, parts=parts).spec() for parts in (None, *PARTS.values())]
    assert "parts" not in specs[0]
    assert specs[1] == specs[2] == specs[3] != specs[0]
    assert json.loads(json.dumps(specs[1])) == specs[1]


def test_tied_weights_belong_to_a_part_by_any_of_their_names():
    def tied():
        network = nn.Sequential(nn.Linear(6, 6, bias=False), nn.Linear(6, 6, bias=False), nn.Linear(6, 3))
        network[1].weight = network[0].weight
        return network

    assert custom(tied, parts={"a": ["1"], "b": ["2"]}).sample(0).parts == {"a": 36, "b": 21}
    with pytest.raises(ValueError, match=r"got 'a' and 'b' for 0\.weight = 1\.weight"):
        custom(tied, parts={"a": ["0"], "b": ["1", "2"]})


@pytest.mark.parametrize(
    ("parts", "error", "message"),
    [
        ({"a": ["0"]}, ValueError, r"parts: expected every parameter in one part, got none for 2\.weight"),
        ({"a": ["0", "2"], "b": ["2.bias"]}, ValueError, r"parts: .*in one part, got 'a' and 'b' for 2\.bias"),
        ({"a": [""], "b": ["0"]}, ValueError, r"parts: .*in one part, got 'a' and 'b' for 0\.weight"),
        ({"a": ["0", "2"], "b": ["head"]}, ValueError, r"parts\['b'\]: .*names of modules such as 0, 1, 2, got 'head'"),
        ({"a": ["0", "2"], "b": ["1"]}, ValueError, r"parts\['b'\]: expected some trainable parameters, got none in"),
        ({"a": ["*"], "b": []}, ValueError, r"parts\['b'\]: expected some trainable parameters, got none in \[\]"),
        ({}, ValueError, "parts: expected at least one part, got none"),
        ({"a": "0"}, TypeError, r"parts\['a'\]: expected a list of names of modules, got '0'"),
        ({"a": [0]}, TypeError, r"parts\['a'\]: expected a list of names of modules, got \[0\]"),
        ({1: ["*"]}, TypeError, "parts: expected non-empty strings as names of parts, got 1"),
        (["0", "2"], TypeError, "parts: expected a function or a dict of part: .*, got list"),
        (
            lambda name, parameter, module: None,
            TypeError,
            r"parts: expected the name of a part for 0\.weight, got None",
        ),
    ],
)
def test_bad_parts_are_named(parts, error, message):
    with pytest.raises(error, match=message):
        custom(parts=parts)


def no_parameters():
    return nn.Sequential(nn.Flatten(), nn.Tanh())


def mixed():
    return nn.Sequential(nn.Linear(6, 3), nn.Linear(3, 3).double())


def explodes(output, target):
    return output.sum() * float("nan")


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"make_module": small_net()}, TypeError, "make_module: expected a function, got .*Sequential"),
        ({"make_module": lambda: 3}, TypeError, "make_module: expected it to return a torch.nn.Module, got int"),
        ({"make_module": no_parameters}, ValueError, "make_module: expected a network with trainable parameters"),
        ({"make_module": mixed}, ValueError, "one floating dtype, got torch.float32, torch.float64"),
        ({"loss": "mse"}, TypeError, "loss: expected a function, got str"),
        ({"loss": lambda o, t: F.cross_entropy(o, t, reduction="none")}, ValueError, r"'custom'.*shape \[128\]"),
        ({"loss": lambda o, t: F.cross_entropy(o, t).item()}, TypeError, "'custom'.*got a float"),
        ({"loss": lambda o, t: F.cross_entropy(o, t).detach()}, ValueError, "'custom'.*autograd cannot follow"),
        ({"loss": explodes}, ValueError, "'custom': loss at theta0: expected a finite number, got nan"),
        ({"data": blobs()[0]}, TypeError, "data: expected Tensors or arrays .*, got torch.Tensor"),
        ({"data": (blobs()[0], blobs(299)[1])}, ValueError, r"data: expected as many targets.*\[300, 6\] and \[299\]"),
        ({"data": (torch.empty(0, 6), torch.empty(0))}, ValueError, "data: .*at least one"),
        ({"batch_size": -1}, ValueError, "batch_size: expected an integer >= 1, got -1"),
        ({"name": ""}, TypeError, "name: expected a non-empty string"),
    ],
)
def test_bad_custom_tasks_are_named(change, error, message):
    arguments = {"make_module": small_net, "loss": F.cross_entropy, "data": blobs()} | change
    with pytest.raises(error, match=message):
        tasks.from_module(**arguments)


# The contract


class Broken(Problem):
    task = "broken"

    def __init__(self, theta0, loss):
        self.theta0, self._loss = theta0, loss

    def loss(self, theta, step):
        return self._loss(theta)


@pytest.mark.parametrize(
    ("theta0", "loss", "error", "message"),
    [
        (
            torch.ones(3),
            lambda x: x.sum() / 0,
            ValueError,
            "'broken': loss at theta0: expected a finite number, got inf",
        ),
        (torch.ones(3), lambda x: x, ValueError, r"'broken': loss.*scalar.*shape \[3\]"),
        (torch.ones(3), lambda x: 1.0, TypeError, "'broken': loss.*got a float"),
        (torch.ones(3), lambda x: torch.ones(()), ValueError, "'broken': loss.*autograd cannot follow"),
        (torch.ones(3, 1), lambda x: x.sum(), ValueError, r"'broken': theta0.*shape \[3, 1\]"),
        (torch.ones(6)[::2], lambda x: x.sum(), ValueError, r"'broken': theta0.*strides \[2\]"),
        (torch.ones(0), lambda x: x.sum(), ValueError, "'broken': theta0.*non-empty"),
        (torch.ones(3, requires_grad=True), lambda x: x.sum(), ValueError, "'broken': theta0.*requires_grad=True"),
        (torch.ones(3, dtype=torch.int64), lambda x: x.sum(), TypeError, "'broken': theta0.*floating.*int64"),
        ([1.0], lambda x: x.sum(), TypeError, "'broken': theta0.*got a list"),
    ],
)
def test_problems_that_break_the_contract_are_named(theta0, loss, error, message):
    with pytest.raises(error, match=message):
        check_start(Broken(theta0, loss))


@pytest.mark.parametrize(
    ("parts", "error", "message"),
    [
        ({"a": 1, "b": 1}, ValueError, "'broken': parts: .*add up to the 3 coordinates of theta.*, which add up to 2"),
        ({"a": 2, "b": 2}, ValueError, "'broken': parts: .*which add up to 4"),
        ({"a": 3, "b": 0}, ValueError, r"'broken': parts\['b'\]: expected an integer >= 1, got 0"),
        ({"a": 1.5, "b": 1.5}, TypeError, r"'broken': parts\['a'\]: expected an integer >= 1, got 1.5"),
        ({"": 3}, TypeError, "'broken': parts: expected non-empty strings as names, got ''"),
        ([1, 2], TypeError, "'broken': parts: expected a dict of name: number of coordinates, got a list"),
    ],
)
def test_parts_that_do_not_make_up_theta_are_named(parts, error, message):
    problem = Broken(torch.ones(3), lambda x: x.sum())
    problem.parts = parts
    with pytest.raises(error, match=message):
        check_start(problem)


def test_parts_that_are_not_told_are_one():
    problem = Broken(torch.ones(3), lambda x: x.sum())
    for parts in (None, {}):
        problem.parts = parts
        check_start(problem)
        assert parts_of(problem) == {"theta": 3}
    problem.parts = {"b": np.int64(1), "a": 2}
    assert list(parts_of(problem).items()) == [("b", 1), ("a", 2)]


def test_non_finite_losses_pass_through_evaluation():
    problem = Broken(torch.ones(3), lambda x: x.log().sum())
    loss, grad = value_and_grad(problem, torch.tensor([0.0, 1.0, -1.0]), 0)
    assert loss.isnan()
    assert grad[0] == float("inf")


# By name


def test_by_name():
    expected = [
        "quadratic",
        "ill-conditioned",
        "mnist",
        "fashion-mnist",
        "digits",
        "cifar10",
        "sine",
        "table",
        "random-networks",
        "neural-art",
    ]
    assert tasks.names() == expected
    assert tasks.by_name("quadratic", dim=3) == tasks.Quadratic(dim=3)
    assert tasks.by_name("digits", hidden=[8]) == tasks.Digits(hidden=(8,))
    assert tasks.by_name("table", table="iris") == tasks.Table("iris")
    with pytest.raises(ValueError, match=r"name: expected one of quadratic, ill-conditioned, .*, neural-art, got"):
        tasks.by_name("cifar")
    with pytest.raises(ValueError, match=r"options of task 'quadratic': expected some of dim, batch.*, got 'hidden'"):
        tasks.by_name("quadratic", hidden=(3,))
