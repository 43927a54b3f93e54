"""The native operators of rules whose coordinates talk by means: against the same layer by layer in the reference."""

from __future__ import annotations

import pytest
import torch
from helpers import errors, random_gradients, randomized

from fastl2l import GACRule
from fastl2l.ops import averaged_native, coupled_window
from fastl2l.ops.coordinates import Coordinates
from fastl2l.ops.dispatch import select
from fastl2l.ops.layout import new_state, to_rows

F64 = torch.float64
pytestmark = pytest.mark.usefixtures("native")
STEPS = 4
WHERES = [
    Coordinates((1,)),
    Coordinates((37,)),
    Coordinates((9_001,)),  # sums of several stretches
    Coordinates((45,), (36, 9), 3),
    Coordinates((72,), (16, 48, 8), 2),
    Coordinates((1_280,), (), 128),
]


def gac(averages=(2, 3), preprocess="log_sign", dtype=F64):
    rule = GACRule(
        preprocess, averages=averages, hidden_size=5, num_layers=len(averages), dtype=dtype, output_scale=0.3, scale=0.7
    )
    randomized(rule)
    return rule


def window(rule, where, backend="native", steps=STEPS):
    """Updates, the last state as rows, and the gradient; the state before is not that of a start."""
    numel, native = where.numel, select(backend, "cpu")
    gradients = random_gradients(steps + 1, numel, preprocess=rule.config.features.name).to(rule.dtype)
    adjoints = torch.randn(steps, numel, generator=torch.Generator().manual_seed(1), dtype=F64).to(rule.dtype)
    first = coupled_window.record(rule, new_state(rule, numel), 1, where, native)
    first.step(gradients[-1])
    recording = coupled_window.record(rule, first.state, steps, where, native)
    updates = torch.stack([recording.step(gradient) for gradient in gradients[:-1]])
    state = to_rows(recording.state, numel)
    return updates, state, recording.backward(gradients[:-1], adjoints)


@pytest.mark.parametrize("where", WHERES, ids=lambda where: f"{where.parts}-{where.functions}")
@pytest.mark.parametrize(
    ("averages", "preprocess"),
    [((2, 3), "log_sign"), ((0, 1), "raw"), ((5, 0), "raw"), ((4,), "raw"), ((1, 0, 5), "raw")],
)
def test_windows_are_those_of_the_reference(averages, preprocess, where, isa):
    rule = gac(averages, preprocess)
    for found, expected in zip(window(rule, where), window(rule, where, "reference"), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-11, atol=1e-11)


def test_windows_in_float32_are_as_accurate_as_the_reference_s(isa):
    where = Coordinates((1_000,))
    exact = window(gac(), where, "reference")
    rule = gac(dtype=torch.float32)
    for mine, theirs, true in zip(window(rule, where), window(rule, where, "reference"), exact, strict=True):
        assert errors(mine, true)["largest"] <= 2 * errors(theirs, true)["largest"]


@pytest.mark.parametrize(
    "where", [Coordinates((30_000,)), Coordinates((1_280,), (), 128), Coordinates((20_000,), (), 2)]
)
def test_bits_do_not_depend_on_threads(where, set_threads):
    rule, found = gac(dtype=torch.float32), []
    for threads in (1, 2, 3):
        set_threads(threads)
        found.append(window(rule, where))
    for other in found[1:]:
        assert all(torch.equal(mine, theirs) for mine, theirs in zip(found[0], other, strict=True))


def test_several_tensors_take_the_step_that_they_take_as_one():
    rule, sizes = gac(), (5, 0, 16, 33)
    gradient = random_gradients(sum(sizes)).double()
    states = [new_state(rule, size).transpose(0, 1) for size in sizes]
    together, whole = torch.cat(states, 1), new_state(rule, sum(sizes)).transpose(0, 1)
    for _ in range(3):
        found = averaged_native.step_(rule, None, together, gradient, Coordinates(sizes), 0.3)
        expected = averaged_native.step_(rule, None, whole, gradient, Coordinates((sum(sizes),)), 0.3)
        torch.testing.assert_close(found, expected, rtol=1e-13, atol=1e-13)


def test_a_step_from_elsewhere_reads_it_alone_and_one_in_place_is_the_same():
    rule, where = gac(), Coordinates((37,))
    gradient = random_gradients(37).double()
    before = torch.randn(2, 3, 10, 16, dtype=F64)
    kept, after, in_place = before.clone(), torch.full_like(before, torch.nan), before.clone()
    update = averaged_native.step_(rule, before, after, gradient, where, 0.3)
    assert torch.equal(before, kept)
    assert torch.equal(averaged_native.step_(rule, None, in_place, gradient, where, 0.3), update)
    assert torch.equal(to_rows(in_place.transpose(0, 1), 37), to_rows(after.transpose(0, 1), 37))


def step(**changes):
    arguments = {
        "before": None,
        "state": torch.zeros(2, 3, 10, 16),
        "grad": torch.zeros(37),
        "weights": [weight.detach() for weight in gac(dtype=torch.float32).weights()],
        "rules": [layer.text for layer in gac().config.chain],
        "averages": [2, 3],
        "update_scale": 0.1,
        "tensors": [37],
        "parts": [37],
        "functions": 1,
    }
    return torch.ops.fastl2l.averaged_step_(**(arguments | changes))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"state": torch.zeros(2, 2, 10, 16)}, r"state: expected shape \[2, 3, 10, 16\], got \[2, 2, 10, 16\]"),
        ({"before": torch.zeros(2, 3, 10, 8)}, "before: expected shape"),
        ({"grad": torch.zeros(36)}, r"grad: expected shape \[37\], got \[36\]"),
        ({"grad": torch.zeros(37).double()}, "grad: expected float32, got float64"),
        ({"averages": [2, 6]}, "averages: expected 0 to 5 units, got 6"),
        ({"averages": [2]}, "averages: expected 2 numbers for as many layers, got 1"),
        ({"rules": ["log_sign:10 lstm:5 none", "given:5 lstm:5 none"]}, "rules: expected one LSTM of as many units"),
        ({"rules": []}, "averages: expected 0 numbers"),
        ({"weights": []}, "weights: expected 3 tensors"),
        ({"functions": 0}, "functions: expected an integer >= 1, got 0"),
        ({"functions": 2}, "parts: expected multiples of 2, got 37"),
        ({"parts": [36]}, "parts: expected 37 coordinates in all"),
        ({"parts": [74, -37]}, "parts: expected multiples of 1, got -37"),
        ({"tensors": [74, -37]}, "tensors: expected sizes >= 0, got -37"),
        ({"update_scale": float("inf")}, "update_scale: expected a finite float32, got inf"),
    ],
)  # fmt: skip
def test_bad_arguments_are_errors_that_name_them(changes, message):
    with pytest.raises(RuntimeError, match=message):
        step(**changes)


def test_shapes_are_known_without_the_kernels():
    rule, meta = gac(), torch.device("meta")
    weights = [weight.detach().to(meta) for weight in rule.weights()]
    network = weights, [layer.text for layer in rule.config.chain], rule.config.averages, 0.3
    states, gradients = torch.empty(5, 2, 3, 10, 16, device=meta), torch.empty(4, 37, device=meta)
    update = torch.ops.fastl2l.averaged_step_(None, states[0], gradients[0], *network, [37], [37], 1)
    assert update.shape == (37,)
    found = torch.ops.fastl2l.averaged_window_backward(states, gradients, gradients, *network, [37], 1)
    assert found.shape == (sum(weight.numel() for weight in weights),)
