"""The native operators of rules whose coordinates talk: against the same layer by layer in the reference."""

from __future__ import annotations

import weakref

import pytest
import torch
from helpers import errors, random_gradients, randomized

from fastl2l import GACRule, NTMRule
from fastl2l.heap import Scratch
from fastl2l.ops import averaged_native, coupled, coupled_window
from fastl2l.ops.coordinates import Coordinates
from fastl2l.ops.dispatch import select
from fastl2l.ops.layout import new_state, to_rows

F64 = torch.float64
pytestmark = pytest.mark.usefixtures("native")
STEPS = 4
LARGEST = (1 << 63) - 1
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


def ntm(kind="pairs", dtype=F64, **options):
    """A rule with a memory that writes from the first step on."""
    pairs = {"pairs": 3} if kind == "pairs" else {}
    rule = NTMRule(
        kind,
        averages=(2, 3),
        hidden_size=5,
        preprocess="raw",
        dtype=dtype,
        output_scale=0.3,
        scale=0.7,
        **pairs,
        **options,
    )
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for name, weight in rule.named_parameters():
            if name.endswith(("_write", "_read", "_step", "_out")):
                weight.add_(0.5 * torch.randn(weight.shape, generator=generator, dtype=F64).to(dtype))
    return rule


HELPS = {"inside": True, "differences": True, "multiply": True, "reads": 2}
BOUNDED = {"memory_bound": 2.0, "read_bound": 3.0, "update_bound": 1.0, "forget": 0.1}
WITH_A_MEMORY = {
    "paper": {},
    "two reads and differences": {"reads": 2, "differences": True, "writes": 1},
    "what helps": HELPS | BOUNDED,
    "reads within": {"inside": True},
}
"""The last is not taken by one call a step: what it reads is asked for by the first layer."""


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


def window_with_a_memory(rule, where, backend="native", steps=STEPS, scratch=None):
    """Updates, what the last state has, and the gradient; the state before is not that of a start."""
    chosen, generator = select(backend, "cpu"), torch.Generator().manual_seed(1)
    gradients, adjoints = torch.randn(2, steps + 1, where.numel, generator=generator, dtype=F64).to(rule.dtype)
    first = coupled_window.record(rule, coupled.begin(rule, where), 1, where, chosen)
    first.step(gradients[-1])
    recording = coupled_window.record(rule, first.state, steps, where, chosen, scratch)
    updates = torch.stack([recording.step(gradient) for gradient in gradients[:-1]])
    state = recording.state
    layers = torch.stack([where.rows(layer) for layer in state.layers])
    return updates, layers, state.rows, state.memory, recording.backward(gradients[:-1], adjoints[:-1])


@pytest.mark.parametrize("way", WITH_A_MEMORY)
@pytest.mark.parametrize("kind", ["matrix", "pairs"])
@pytest.mark.parametrize(
    "where", [Coordinates((37,)), Coordinates((45,), (36, 9), 3)], ids=lambda where: f"{where.parts}-{where.functions}"
)
def test_windows_with_a_memory_are_those_of_the_reference(where, kind, way, isa):
    rule = ntm(kind, **WITH_A_MEMORY[way])
    found, expected = (window_with_a_memory(rule, where, backend) for backend in ("native", "reference"))
    for mine, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-11, atol=1e-11)


def test_windows_with_a_memory_in_float32_are_as_accurate_as_the_reference_s(isa):
    where = Coordinates((1_000,))
    exact = window_with_a_memory(ntm(), where, "reference")
    rule = ntm(dtype=torch.float32)
    both = (window_with_a_memory(rule, where, backend) for backend in ("native", "reference"))
    for mine, theirs, true in zip(*both, exact, strict=True):
        assert errors(mine, true)["largest"] <= 2 * errors(theirs, true)["largest"]


@pytest.mark.parametrize("kind", ["matrix", "pairs"])
def test_a_window_in_memory_of_the_last_one_is_the_same(kind):
    rule, where, scratch = ntm(kind, **HELPS), Coordinates((37,)), Scratch()
    expected = window_with_a_memory(rule, where)
    for _ in range(2):
        found = window_with_a_memory(rule, where, scratch=scratch)
        assert all(torch.equal(mine, theirs) for mine, theirs in zip(found, expected, strict=True))
        for memory in scratch._kept:
            memory.fill_(torch.nan)


@pytest.mark.parametrize("way", WITH_A_MEMORY)
def test_states_of_a_memory_s_layers_are_stepped_as_they_are_in_a_window(way):
    rule, where = ntm(**WITH_A_MEMORY[way]), Coordinates((37,))
    updates, layers, rows, memory, _ = window_with_a_memory(rule, where)
    gradients = torch.randn(2, STEPS + 1, 37, generator=torch.Generator().manual_seed(1), dtype=F64)[0]
    state = coupled.begin(rule, where)
    for gradient, expected in zip([gradients[-1], *gradients[:-1]], [None, *updates], strict=True):
        update = coupled.step_(rule, gradient, state, where, 0.3, select("native", "cpu"))
        if expected is not None:
            torch.testing.assert_close(update, expected, rtol=1e-12, atol=1e-12)
    found = torch.stack([where.rows(layer) for layer in state.layers])
    for mine, other in ((found, layers), (state.rows, rows), (state.memory, memory)):
        torch.testing.assert_close(mine, other, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("where", [Coordinates((20_000,)), Coordinates((1_280,), (), 128)])
def test_bits_of_layers_given_rows_do_not_depend_on_threads(where, set_threads):
    rule = ntm(dtype=torch.float32, **HELPS)
    weights = [weight.detach() for weight in rule.weights()]
    generator = torch.Generator().manual_seed(0)
    gradient, extra, dunits = torch.randn(1 + 6 + 5, where.numel, generator=generator).split([1, 6, 5])
    before, found = new_state(rule, where.numel).transpose(0, 1).contiguous(), []
    for threads in (1, 2, 3):
        set_threads(threads)
        states, dstate = torch.stack([before, before]), torch.ones_like(before)
        step = averaged_native.step_(
            rule.config, weights, before, states[1], gradient[0], extra, where, 0.3, need_units=True
        )
        back = averaged_native.window_backward(
            rule.config, weights, states.unbind(), gradient, extra[None], gradient, dunits[None], dstate, where, 0.3,
            need_dgradients=True, need_dextra=True,
        )  # fmt: skip
        found.append((*step, *back, states[1], dstate))
    for other in found[1:]:
        assert all(torch.equal(mine, theirs) for mine, theirs in zip(found[0], other, strict=True))


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


def native_step(rule, *tensors_and_where):
    weights = [weight.detach() for weight in rule.weights()]
    *tensors, where = tensors_and_where
    return averaged_native.step_(rule.config, weights, *tensors, None, where, 0.3)[0]


def test_several_tensors_take_the_step_that_they_take_as_one():
    rule, sizes = gac(), (5, 0, 16, 33)
    gradient = random_gradients(sum(sizes)).double()
    states = [new_state(rule, size).transpose(0, 1) for size in sizes]
    together, whole = torch.cat(states, 1), new_state(rule, sum(sizes)).transpose(0, 1)
    for _ in range(3):
        found = native_step(rule, None, together, gradient, Coordinates(sizes))
        expected = native_step(rule, None, whole, gradient, Coordinates((sum(sizes),)))
        torch.testing.assert_close(found, expected, rtol=1e-13, atol=1e-13)


def test_a_step_from_elsewhere_reads_it_alone_and_one_in_place_is_the_same():
    rule, where = gac(), Coordinates((37,))
    gradient = random_gradients(37).double()
    before = torch.randn(2, 3, 10, 16, dtype=F64)
    kept, after, in_place = before.clone(), torch.full_like(before, torch.nan), before.clone()
    update = native_step(rule, before, after, gradient, where)
    assert torch.equal(before, kept)
    assert torch.equal(native_step(rule, None, in_place, gradient, where), update)
    assert torch.equal(to_rows(in_place.transpose(0, 1), 37), to_rows(after.transpose(0, 1), 37))


def step(**changes):
    arguments = {
        "before": None,
        "state": torch.zeros(2, 3, 10, 16),
        "grad": torch.zeros(37),
        "extra": None,
        "weights": [weight.detach() for weight in gac(dtype=torch.float32).weights()],
        "rules": [layer.text for layer in gac().config.chain],
        "averages": [2, 3],
        "update_scale": 0.1,
        "tensors": [37],
        "parts": [37],
        "functions": 1,
    }
    return torch.ops.fastl2l.averaged_step_(**(arguments | changes))


GIVEN = {
    "weights": [weight.detach() for weight in ntm(dtype=torch.float32).weights()][:8],
    "rules": [layer.text for layer in ntm().config.chain],
}
"""A rule with a memory, whose first layer is given what has been read."""


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"state": torch.zeros(2, 2, 10, 16)}, r"state: expected shape \[2, 3, 10, 16\], got \[2, 2, 10, 16\]"),
        ({"before": torch.zeros(2, 3, 10, 8)}, "before: expected shape"),
        ({"grad": torch.zeros(36)}, "tensors: expected multiples of 1 that are 36 in all, got 37"),
        ({"grad": torch.zeros(37).double()}, "grad: expected float32, got float64"),
        ({"averages": [2, 6]}, "averages: expected 0 to 5 units, got 6"),
        ({"averages": [2]}, "averages: expected 2 numbers for as many layers, got 1"),
        ({"rules": ["log_sign:10 lstm:5 none", "given:5 lstm:5 none"]}, "rules: expected one LSTM of as many units"),
        ({"rules": []}, "averages: expected 0 numbers"),
        ({"weights": []}, "weights: expected 3 tensors"),
        ({"grad": torch.zeros(1, 37)}, r"grad: expected shape \[N\], got \[1, 37\]"),
        ({"functions": 0}, "functions: expected 1 to 37, got 0"),
        ({"functions": 1 << 40}, "functions: expected 1 to 37, got 1099511627776"),
        ({"functions": 2}, "parts: expected multiples of 2 that are 37 in all, got 37"),
        ({"parts": [36]}, "parts: expected 37 coordinates in all, got 36"),
        ({"parts": [74, -37]}, "parts: expected multiples of 1 that are 37 in all, got 74"),
        ({"parts": [LARGEST, LARGEST, 39]}, f"parts: expected multiples of 1 that are 37 in all, got {LARGEST}"),
        ({"tensors": [38, -1]}, "tensors: expected multiples of 1 that are 37 in all, got 38"),
        ({"tensors": [LARGEST, LARGEST, *[1 << 62] * 4, 39]}, "tensors: expected multiples of 1 that are 37 in all"),
        ({"update_scale": float("inf")}, "update_scale: expected a finite float32, got inf"),
        ({"extra": torch.zeros(1, 37)}, "extra: expected None for rules that are given 0 rows besides units, got a"),
        (GIVEN, "extra: expected a tensor for rules that are given 1 rows besides units, got None"),
        (GIVEN | {"extra": torch.zeros(2, 37)}, r"extra: expected shape \[1, 37\], got \[2, 37\]"),
        (GIVEN | {"extra": torch.zeros(1, 37, dtype=F64)}, "extra: expected float32, got float64"),
    ],
)  # fmt: skip
def test_bad_arguments_are_errors_that_name_them(changes, message):
    with pytest.raises(RuntimeError, match=message):
        step(**changes)


def way_back(**changes):
    states = [torch.zeros(2, 3, 10, 16) for _ in range(5)]
    arguments = {"states": states, "grads": torch.zeros(4, 37), "extra": torch.zeros(4, 1, 37)}
    arguments |= {"adjoints": torch.zeros(4, 37), "dunits": torch.zeros(4, 5, 37), "dstate": states[0].clone()}
    network = GIVEN | {"averages": [2, 3], "update_scale": 0.1, "parts": [37], "functions": 1}
    return torch.ops.fastl2l.averaged_window_backward(
        **(arguments | network | changes), need_dgrads=True, need_dextra=True
    )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"states": [torch.zeros(2, 3, 10, 16)] * 4}, "states: expected 5 tensors, got 4"),
        ({"states": [torch.zeros(2, 3, 9, 16)] * 5}, r"states\[0\]: expected shape \[2, 3, 10, 16\], got \[2, 3, 9, "),
        ({"adjoints": torch.zeros(3, 37)}, r"adjoints: expected shape \[4, 37\], got \[3, 37\]"),
        ({"extra": None}, "extra: expected a tensor for rules that are given 1 rows besides units, got None"),
        ({"extra": torch.zeros(4, 37)}, r"extra: expected shape \[4, 1, 37\], got \[4, 37\]"),
        ({"dunits": torch.zeros(4, 6, 37)}, r"dunits: expected shape \[4, 5, 37\], got \[4, 6, 37\]"),
        ({"dunits": torch.zeros(4, 37, 5).mT}, "dunits: expected a contiguous tensor"),
        ({"dstate": torch.zeros(3, 3, 10, 16)}, r"dstate: expected shape \[2, 3, 10, 16\], got \[3, 3, 10, 16\]"),
    ],
)
def test_bad_arguments_of_the_way_back_are_errors_that_name_them(changes, message):
    assert [found.shape for found in way_back()] == [(386,), (4, 37), (4, 1, 37)]
    with pytest.raises(RuntimeError, match=message):
        way_back(**changes)


def test_shapes_are_known_without_the_kernels():
    rule, meta = gac(), torch.device("meta")
    weights = [weight.detach().to(meta) for weight in rule.weights()]
    network = weights, [layer.text for layer in rule.config.chain], rule.config.averages, 0.3
    states, gradients = torch.empty(5, 2, 3, 10, 16, device=meta), torch.empty(4, 37, device=meta)
    update, units = torch.ops.fastl2l.averaged_step_(None, states[0], gradients[0], None, *network, [37], [37], 1, True)
    assert update.shape == (37,)
    assert units.shape == (5, 37)
    arguments = states.unbind(), gradients, None, gradients, None, None
    found, dgradients, rows = torch.ops.fastl2l.averaged_window_backward(*arguments, *network, [37], 1, True, True)
    assert found.shape == (sum(weight.numel() for weight in weights),)
    assert dgradients.shape == (4, 37)
    assert rows.shape == (4, 0, 37)


def test_a_window_that_is_not_gone_through_is_an_error():
    where = Coordinates((37,))
    recording = coupled_window.record(gac(), new_state(gac(), 37), 4, where, select("native", "cpu"))
    recording.step(torch.zeros(37, dtype=F64))
    with pytest.raises(
        RuntimeError, match="window: expected 4 steps and their gradients before its way back, got 1 and"
    ):
        recording.backward(torch.zeros(4, 37, dtype=F64), torch.zeros(4, 37, dtype=F64))


@pytest.mark.parametrize("backend", ["native", "reference"])
def test_a_window_has_the_weights_and_no_graph_of_its_beginning(backend):
    rule, where = gac(), Coordinates((37,))
    chosen, gradients = select(backend, "cpu"), torch.randn(2, 37, dtype=F64)
    found = []
    for change in (False, True):
        recording = coupled_window.record(rule, new_state(rule, 37).requires_grad_(), 2, where, chosen)
        if change:
            randomized(rule, gain=2.0)
        updates = [recording.step(gradient) for gradient in gradients]
        assert not recording.state.requires_grad
        found.append([*updates, recording.state, recording.backward(gradients, gradients)])
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))


def test_a_step_refuses_gradients_in_its_state():
    state = torch.zeros(2, 3, 10, 16)
    with pytest.raises(RuntimeError, match="state: expected memory of its own, but it shares that of grad"):
        step(state=state, grad=state.view(-1)[100:137])


def test_a_step_refuses_a_state_before_that_it_would_overwrite():
    memory = torch.zeros(2 * 3 * 10 * 16 + 160)
    state, before = memory[160:].view(2, 3, 10, 16), memory[:-160].view(2, 3, 10, 16)
    with pytest.raises(RuntimeError, match="state: expected memory of its own, but it shares that of before"):
        step(state=state, before=before)
    step(state=state, before=state)


def test_the_way_back_refuses_an_adjoint_in_the_states():
    states = [torch.zeros(2, 3, 10, 16) for _ in range(5)]
    with pytest.raises(RuntimeError, match="dstate: expected memory of its own, but it shares that of states"):
        way_back(states=states, dstate=states[3])


# A window


@pytest.mark.parametrize("backend", ["native", "reference"])
@pytest.mark.parametrize("made", [gac, ntm, lambda: ntm("matrix"), lambda: ntm(inside=True)])
def test_a_window_is_gone_through_once_and_in_order(made, backend):
    rule, where = made(), Coordinates((37,))
    recording = coupled_window.record(rule, coupled.begin(rule, where), 2, where, select(backend, "cpu"))
    gradients = torch.randn(2, 37, dtype=F64)
    with pytest.raises(RuntimeError, match="window: expected 2 steps and their gradients before its way back, got"):
        recording.backward(gradients, gradients)
    for gradient in gradients:
        recording.step(gradient)
    with pytest.raises(RuntimeError, match="window: expected 2 steps before its way back, got another one"):
        recording.step(gradients[0])
    recording.backward(gradients, gradients)
    with pytest.raises(RuntimeError, match="window: expected one way back, got another one"):
        recording.backward(gradients, gradients)
    with pytest.raises(RuntimeError, match="window: expected its state to be asked for before its way back"):
        recording.state  # noqa: B018


@pytest.mark.parametrize("over", [True, False])
@pytest.mark.parametrize("made", [gac, ntm, lambda: ntm("matrix"), lambda: ntm(inside=True)])
def test_nothing_of_a_window_is_left(made, over):
    rule, where = made(), Coordinates((37,))
    recording = coupled_window.record(rule, coupled.begin(rule, where), 2, where, select("native", "cpu"))
    gradients = torch.randn(2, 37, dtype=F64)
    for gradient in gradients:
        recording.step(gradient)
    network = getattr(recording, "_network", recording)
    parts = [weakref.ref(part) for part in (recording, network, getattr(network, "_tape", network))]
    if over:
        recording.backward(gradients, gradients)
    del recording, network
    assert [part() for part in parts] == [None] * 3  # the collector does not see cycles through autograd's graph


@pytest.mark.parametrize("made", [gac, ntm, lambda: ntm("matrix"), lambda: ntm(inside=True)])
def test_a_window_in_inference_mode_is_the_same(made):
    rule, where = made(), Coordinates((37,))
    find = window if rule.config.memory is None else window_with_a_memory
    expected = find(rule, where)
    with torch.inference_mode():
        found = find(rule, where)
    assert all(torch.equal(mine, theirs) for mine, theirs in zip(found, expected, strict=True))


@pytest.mark.parametrize("made", [gac, ntm, lambda: ntm("matrix")])
def test_a_state_that_is_stepped_before_the_way_back_of_another_step_is_noticed(made):
    rule, where, gradient = made(), Coordinates((37,)), torch.randn(37, dtype=F64)
    state = coupled.begin(rule, where)
    update, _ = coupled.step(rule, gradient, state, where)
    coupled.step_(rule, gradient, state, where, 0.3, select("native", "cpu"))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.autograd.grad(update.sum(), rule.weights(), materialize_grads=True)


def test_recorded_steps_have_one_way_back_and_no_second_derivatives():
    rule, where = ntm(), Coordinates((37,))
    state, updates = coupled.recorded(coupled.begin(rule, where), 3), []
    for gradient in torch.randn(3, 37, dtype=F64):
        update, state = coupled.step(rule, gradient, state, where)
        updates.append(update.sum())
    weights = rule.weights()
    with pytest.raises(RuntimeError, match="without create_graph=True"):
        torch.autograd.grad(sum(updates), weights, create_graph=True)
    torch.autograd.grad(sum(updates), weights, retain_graph=True, materialize_grads=True)
    with pytest.raises(RuntimeError, match="expected one way back, got another one"):
        torch.autograd.grad(sum(updates), weights)
