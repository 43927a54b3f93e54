"""Memories over coordinates, and rules that read and write them; the truth is `reference.remembering_step`."""

from __future__ import annotations

import copy
import math
from fractions import Fraction

import numpy as np
import pytest
import torch
from helpers import errors, random_gradients
from test_coupled import SHAPES, Bowl, give, go_on_alike, loaded, optimizer_of

from fastl2l import (
    FusedLSTMOptimizer,
    LSTMRule,
    MetaTrainer,
    NTMRule,
    Trajectory,
    evaluate,
    load_rule,
    reference,
    save_rule,
)
from fastl2l.memory_config import MemoryConfig, memory_options
from fastl2l.ops import coupled, memory
from fastl2l.ops.coordinates import Coordinates
from fastl2l.ops.dispatch import select
from fastl2l.ops.layout import TILE, to_rows
from fastl2l.ops.recorded_pairs import RecordedPairs
from fastl2l.ops.remembering import Remembered
from fastl2l.tasks import Quadratic, batch

F64 = torch.float64
HELPS = {"inside": True, "differences": True, "multiply": True, "reads": 2, "forget": 0.05}
BOUNDS = {"memory_bound": 0.5, "read_bound": 0.5, "update_bound": 0.5}
"""Such that each of them has something to do."""
WAYS = {
    "paper": {},
    "paper, two reads, one write": {"reads": 2, "writes": 1, "initial": 0.5},
    "inside": {"inside": True},
    "differences": {"differences": True, "scale": 0.3},
    "multiply": {"differences": True, "multiply": True, "reads": 2},
    "forget": {"forget": 0.3, "initial": 0.7},
    "bounds": {"memory_bound": 0.5, "read_bound": 0.2, "update_bound": 0.13},
    "what helps": HELPS,
    "what helps, bounded": {**HELPS, **BOUNDS},
}


def ntm(way="paper", kind="matrix", *, hidden=4, dtype=F64, seed=0, averages=(1, 2), **options) -> NTMRule:
    """A rule that writes from the first step on."""
    options = {"preprocess": "raw", "output_scale": 0.3} | WAYS[way] | options
    if kind == "pairs":  # whose bound is that of what was written alone
        options = {"pairs": 3} | options | ({"memory_bound": 0.01} if options.get("memory_bound") else {})
    rule = NTMRule(kind, averages=averages, hidden_size=hidden, seed=seed, dtype=dtype, **options)
    generator = torch.Generator().manual_seed(seed + 1)
    with torch.no_grad():
        for name, weight in rule.named_parameters():
            if name.endswith(("_write", "_read", "_step", "_out")):
                weight.add_(0.5 * torch.randn(weight.shape, generator=generator, dtype=F64).to(dtype))
    return rule


def truth(rule, gradient, state):
    config = rule.config
    return reference.remembering_step(
        gradient, state, dict(rule.named_parameters()), config, config.memory, config.output_scale
    )


def first(rule, n):
    return reference.Remembering.first(rule.config, rule.config.memory, n)


KINDS = ["matrix", "pairs"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("n", [1, 19])
def test_steps_are_the_references(way, kind, n):
    rule, where = ntm(way, kind), Coordinates((n,))
    for_autograd, in_place, expected = coupled.begin(rule, where), coupled.begin(rule, where), first(rule, n)
    for gradient in random_gradients(7, n, preprocess="raw").double():
        change, expected = truth(rule, gradient, expected)
        one, for_autograd = coupled.step(rule, gradient, for_autograd, where)
        two = coupled.step_(rule, gradient, in_place, where, 0.3, select("native", "cpu"))
        for found, state in ((one, for_autograd), (two, in_place)):
            torch.testing.assert_close(found, change, rtol=1e-11, atol=1e-12)
            lstm = torch.cat([to_rows(layer, n) for layer in state.layers])
            torch.testing.assert_close(lstm, expected.lstm, rtol=1e-11, atol=1e-12)
            if kind == "matrix":
                torch.testing.assert_close(state.memory[0].T, expected.matrix, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("way", ["bounds", "what helps, bounded"])
@pytest.mark.parametrize("kind", KINDS)
def test_bounds_have_something_to_do_in_these_tests(way, kind):
    names = ("memory_bound", "read_bound", "update_bound")
    bounds = {name: getattr(ntm(way, kind).config.memory, name) for name in names}

    def last_update(**bound):
        rule = ntm(way, kind, **dict.fromkeys(names) | bound)
        state = first(rule, 19)
        for gradient in random_gradients(7, 19, preprocess="raw").double():
            change, state = truth(rule, gradient, state)
        return change.detach()

    for name, bound in bounds.items():
        assert not torch.allclose(last_update(**{name: bound}), last_update()), name


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("way", WAYS)
def test_gradients_are_those_of_the_reference(way, kind):
    rule, n = ntm(way, kind), 19
    gradients = random_gradients(5, n, preprocess="raw").double().requires_grad_()
    weigh = torch.randn(5, n, dtype=F64, generator=torch.Generator().manual_seed(3))
    sums = []
    for step, state in ((coupled.step, coupled.begin(rule, Coordinates((n,)))), (truth, first(rule, n))):
        total = 0
        for gradient, factors in zip(gradients, weigh, strict=True):
            change, state = step(rule, gradient, state)
            total = total + (factors * change).sum()
        sums.append(torch.autograd.grad(total, [gradients, *rule.weights()], materialize_grads=True))
    for name, found, right in zip(["g", *dict(rule.named_parameters())], *sums, strict=True):
        assert errors(found, right)["largest"] < 1e-10, name


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("way", ["paper", "what helps"])
def test_second_derivatives_are_those_of_differences(way, kind):
    rule, where = ntm(way, kind, hidden=2, averages=(1, 1)), Coordinates((4,), (4,), 2)
    gradients = torch.randn(2, 4, dtype=F64, generator=torch.Generator().manual_seed(0), requires_grad=True)

    def steps(gradients, *weights):
        state, total = coupled.begin(rule, where), 0
        for gradient in gradients:
            change, state = coupled.step(rule, gradient, state, where)
            total = total + change.sin()
        return total

    assert torch.autograd.gradcheck(steps, (gradients, *rule.weights()), eps=1e-6, atol=1e-6, rtol=1e-4, fast_mode=True)
    assert torch.autograd.gradgradcheck(steps, (gradients, *rule.weights()), atol=1e-5, rtol=1e-3, fast_mode=True)


# Functions side by side


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("way", ["paper", "what helps, bounded"])
@pytest.mark.parametrize("parts", [(36,), (36, 9)])
def test_each_function_has_a_memory_of_its_own(way, kind, parts):
    rule, problem = ntm(way, kind), Bowl(parts)
    trajectory = Trajectory(problem, rule)
    states = [first(rule, int((problem.owner == function).sum())) for function in range(3)]
    for _ in range(5):
        gradient, before = trajectory.gradient.clone(), trajectory.theta.clone()
        trajectory.advance()
        for function in range(3):
            mine = problem.owner == function
            change, states[function] = truth(rule, gradient[mine], states[function])
            torch.testing.assert_close((trajectory.theta - before)[mine], change, rtol=1e-9, atol=1e-10)


def by_autograd(problem, rule, window_weights, second=False):
    theta = problem.theta0.clone().requires_grad_(second)
    owners = [problem.owner == function for function in range(problem.functions)]
    states, objective, losses = [first(rule, int(mine.sum())) for mine in owners], 0, []
    for step, weight in enumerate(window_weights):
        now = theta if second else theta.detach().requires_grad_()
        (gradient,) = torch.autograd.grad(problem.loss(now, step), now, create_graph=second)
        change = torch.zeros_like(theta)
        for function, mine in enumerate(owners):
            own, states[function] = truth(rule, gradient[mine], states[function])
            change = change.index_put((mine.nonzero()[:, 0],), own)
        theta = theta + change
        loss = problem.loss(theta, step + 1) / problem.functions
        losses.append(loss.detach())
        objective = objective + weight * loss
    found = torch.autograd.grad(objective, rule.weights(), materialize_grads=True)
    return torch.stack(losses), torch.cat([gradient.flatten() for gradient in found])


@pytest.mark.parametrize("second", [False, True])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("way", ["paper", "what helps, bounded"])
@pytest.mark.parametrize("weights", [[1.0], [0.0, 2.0, 0.5, 1.0, 3.0]])
def test_a_window_has_the_gradient_that_autograd_gives(weights, way, kind, second):
    rule, problem = ntm(way, kind), Bowl()
    found = Trajectory(problem, rule).window(weights, second_derivatives=second)
    losses, gradients = by_autograd(problem, rule, weights, second)
    torch.testing.assert_close(found.losses, losses, rtol=1e-10, atol=1e-10)
    assert errors(found.gradients, gradients)["largest"] < 1e-9


@pytest.mark.parametrize("second", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_windows_go_on_where_the_last_one_ended(kind, second):
    rule, problem = ntm("what helps", kind), Bowl()
    one, two = Trajectory(problem, rule), Trajectory(problem, rule)
    losses = torch.stack([one.advance() for _ in range(6)])
    found = torch.cat([two.window([1.0] * 3, second_derivatives=second).losses for _ in range(2)])
    torch.testing.assert_close(found, losses, rtol=1e-11, atol=1e-11)
    torch.testing.assert_close(one.state.memory, two.state.memory, rtol=1e-10, atol=1e-11)
    two.restart()
    assert torch.equal(torch.stack([two.advance() for _ in range(6)]), losses)


def test_a_fresh_rule_does_not_write_but_has_gradients_to_learn_it():
    rule = NTMRule("matrix", **WAYS["what helps"], preprocess="raw", dtype=F64)
    trajectory = Trajectory(Bowl(), rule)
    found = trajectory.window([1.0] * 4)
    identity = torch.eye(12, dtype=F64).expand(3, 12, 12)
    torch.testing.assert_close(trajectory.state.memory, identity, rtol=0, atol=1e-15)
    sizes = [weight.numel() for weight in rule.weights()]
    names = [name for name, _ in rule.named_parameters()]
    gradients = dict(zip(names, found.gradients.split(sizes), strict=True))
    assert gradients["weight_write"][: 3 * 2 * 20].any()


def test_the_trainer_lowers_the_loss():
    bounds = {"memory_bound": 20.0, "read_bound": 5.0, "update_bound": 3.0}
    rule = NTMRule("matrix", **HELPS, **bounds, preprocess="raw", scale=0.05, hidden_size=8)
    options = {"horizon": 10, "unroll": 5, "trajectories": 8, "batch": 4, "validation_problems": 4}
    history = MetaTrainer(rule, Quadratic(dim=4, batch=4), meta_lr=3e-3, **options).fit(4, progress=False)
    assert history[-1].validation_loss < 0.7 * history[0].validation_loss
    curves = evaluate(Quadratic(dim=4, batch=4), {"ntm": rule}, steps=10, runs=2)
    assert curves.losses["ntm"][:, -1].mean() < 0.7 * curves.losses["ntm"][:, 0].mean()


# Sizes


def test_a_matrix_that_is_too_large_is_refused_before_it_is_allocated(monkeypatch):
    rules, param = {dtype: ntm(dtype=dtype) for dtype in (F64, torch.float32)}, torch.zeros(30_000, requires_grad=True)
    monkeypatch.setattr(torch, "empty", lambda *_, **__: pytest.fail("allocated"))
    with pytest.raises(ValueError, match=r"memory: .* at most 2 GiB, got 1 of 50,000 x 50,000 numbers, 18\.6 GiB"):
        coupled.begin(rules[F64], Coordinates((50_000,)))
    with pytest.raises(ValueError, match=r"memory: .* at most 2 GiB, got 1 of 30,000 x 30,000 numbers, 3\.4 GiB"):
        FusedLSTMOptimizer([param], rules[torch.float32])


def test_problems_of_different_sizes_in_a_batch_are_refused():
    problems = [Quadratic(dim=dim, batch=1, dtype=F64).sample(0) for dim in (3, 5)]
    with pytest.raises(ValueError, match="task 'quadratic': expected 2 functions with as many coordinates each"):
        Trajectory(batch(problems), ntm())


def test_a_ring_is_written_in_one_place_alone():
    config = MemoryConfig("pairs", pairs=3, writes=2)
    ring = memory.begin_(config, torch.empty(memory.shape(config, 1, 5)))
    for step in range(5):
        before = ring.clone()
        memory.write_(config, ring, torch.full((2, 2, 1, 5), step + 1.0), step)
        assert (ring != before).transpose(0, 1).flatten(1).any(1).tolist() == [step % 3 == place for place in range(3)]


def test_what_a_window_has_recorded_is_not_written_to_twice():
    config = MemoryConfig("pairs", pairs=3, writes=2)
    ring = memory.begin_(config, torch.empty(memory.shape(config, 1, 5)))
    before, pairs = RecordedPairs(config, ring, 0, 4), torch.ones(2, 2, 1, 5)
    after = before.write(pairs)
    for go_on in (lambda: before.write(pairs), lambda: before.read(torch.ones(1, 1, 5))):
        with pytest.raises(RuntimeError, match="memory: expected the steps of a window one after the other"):
            go_on()
    assert not ring.any()
    assert torch.equal(after.detach(), memory.write(config, ring, pairs, 0))


@pytest.mark.parametrize("forget", [0.0, 0.2])
def test_pairs_that_are_all_kept_are_the_matrix(forget):
    """The third claim: with room for all pairs, the memory of pairs is the matrix."""
    steps, functions, dim = 12, 2, 7
    generator = torch.Generator().manual_seed(0)
    options = {"writes": 3, "initial": 0.4, "forget": forget}
    configs = MemoryConfig("matrix", **options), MemoryConfig("pairs", pairs=steps, **options)
    memories = [memory.begin_(one, torch.empty(memory.shape(one, functions, dim), dtype=F64)) for one in configs]
    for step in range(steps):
        pairs = torch.randn(2, 3, functions, dim, dtype=F64, generator=generator)
        vectors = torch.randn(2, functions, dim, dtype=F64, generator=generator)
        for config, one in zip(configs, memories, strict=True):
            memory.write_(config, one, pairs, step)
        found = [memory.read(config, one, vectors, step + 1) for config, one in zip(configs, memories, strict=True)]
        torch.testing.assert_close(found[1], found[0], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("way", ["paper", "what helps"])
def test_rules_with_pairs_that_are_all_kept_take_the_matrix_s_steps(way):
    one, other = ntm(way), ntm(way, "pairs", pairs=8)
    with torch.no_grad():
        for weight, same in zip(other.weights(), one.weights(), strict=True):
            weight.copy_(same)
    thetas = []
    for rule in (one, other):
        trajectory = Trajectory(Bowl(), rule)
        thetas.append(torch.stack([trajectory.advance() for _ in range(8)]))
    torch.testing.assert_close(*thetas, rtol=1e-11, atol=1e-11)


# In an optimizer


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("way", ["paper", "what helps, bounded"])
def test_an_optimizer_has_a_memory_for_all_parameters_of_a_group(way, kind):
    rule = ntm(way, kind)
    params, optimizer = optimizer_of(rule, *SHAPES)
    theta = torch.cat([param.detach().reshape(-1) for param in params])
    state = first(rule, theta.numel())
    for seed in range(6):
        give(params, seed)
        change, state = truth(rule, torch.cat([param.grad.reshape(-1) for param in params]), state)
        theta = theta + change
        optimizer.step()
        found = torch.cat([param.detach().reshape(-1) for param in params])
        torch.testing.assert_close(found, theta, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("apart", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_a_memory_is_told_of_all_that_parameters_change_by(kind, apart):
    """Of the decay of weights too, and of a rate that changes; also after a state was loaded."""
    rule, rates = ntm("what helps, bounded", kind), [0.5, 2.0, 0.3, 1.0, 1.0, 0.7]
    params, optimizer = optimizer_of(rule, *SHAPES, weight_decay=0.1)
    theta = torch.cat([param.detach().reshape(-1) for param in params])
    state = first(rule, theta.numel())
    for seed, rate in enumerate(rates):
        give(params, seed)
        if apart:
            optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
        optimizer.param_groups[0]["lr"] = rate
        change, state = truth(rule, torch.cat([param.grad.reshape(-1) for param in params]), state)
        change = rate * change - rate * 0.1 * theta
        theta, state = theta + change, state._replace(update=change)
        optimizer.step()
        found = torch.cat([param.detach().reshape(-1) for param in params])
        torch.testing.assert_close(found, theta, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("copied", ["saved", "deepcopy"])
def test_a_saved_state_goes_on_to_the_same_bits(kind, copied, tmp_path):
    rule = ntm("what helps", kind, dtype=torch.float32)
    params, optimizer = optimizer_of(rule, *SHAPES, dtype=torch.float32)
    for seed in range(4):
        give(params, seed)
        optimizer.step()
    if copied == "deepcopy":
        others, other = copy.deepcopy((params, optimizer))
    else:
        others, other = loaded(params, optimizer, rule, tmp_path / "saved.pt")
    go_on_alike((params, optimizer), (others, other), range(4, 9))


def stepped(rule, *shapes):
    params, optimizer = optimizer_of(rule, *shapes)
    give(params, 0)
    optimizer.step()
    return params, optimizer


@pytest.mark.parametrize("kind", KINDS)
def test_a_saved_state_of_another_number_of_coordinates_is_refused(kind):
    rule = ntm("what helps", kind)
    _, optimizer = stepped(rule, (3,), (4,))
    _, other = stepped(rule, (3,), (5,))
    saved, before = optimizer.state_dict(), copy.deepcopy(other.state_dict()["state"])
    with pytest.raises(ValueError, match="state of parameter"):
        other.load_state_dict(saved)
    torch.testing.assert_close(other.state_dict()["state"], before, rtol=0, atol=0)
    del saved["state"][1]
    with pytest.raises(ValueError, match=r"expected the states of all parameters of a group, .* got 1 of 2"):
        other.load_state_dict(saved)


def test_saved_states_of_different_steps_are_refused():
    rule = ntm("what helps")
    _, optimizer = stepped(rule, (3,), (4,))
    saved = copy.deepcopy(optimizer.state_dict())
    saved["state"][1]["step"] += 1
    with pytest.raises(ValueError, match=r"state of group 0: expected step to be the same of all parameters, .* 1, 2"):
        optimizer.load_state_dict(saved)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("first", ["step", "load_state_dict"])
def test_what_is_made_in_inference_mode_is_of_use_outside(kind, first):
    rule = ntm("what helps", kind, dtype=torch.float32)
    (params, optimizer), (others, other) = (optimizer_of(rule, *SHAPES, dtype=torch.float32) for _ in range(2))
    for seed in range(2):
        give(params, seed)
        give(others, seed)
        optimizer.step()
        with torch.inference_mode(first == "step" and seed == 0):
            other.step()
    with torch.inference_mode(first == "load_state_dict"):
        other.load_state_dict(other.state_dict())
    go_on_alike((params, optimizer), (others, other), range(2, 4))


@pytest.mark.parametrize("copied", [False, True])
@pytest.mark.parametrize(
    ("before", "after", "message"),
    [
        (
            ntm(kind="pairs"),
            ntm(kind="pairs", pairs=5),
            r"expected memory of \[2, 5, .*, got \[2, 3, 3, 1, 3\]",
        ),
        (ntm(), ntm(kind="pairs"), r"expected memory of \[2, 3, 3, 1, 3\] of torch.float64, .*, got \[1, 7, 3\] of"),
        (ntm(), ntm("differences"), r"expected memory_rows of \[3, 1, 3\] .*, got \[1, 1, 3\]"),
        (ntm(), LSTMRule("raw", hidden_size=4, dtype=F64), "expected no memory of LSTMRule.*, got one"),
        (LSTMRule(hidden_size=4, ramp=3, dtype=F64), ntm(), r"expected memory_rows of \[1, 1, 3\] .*, got None"),
    ],
)
def test_a_rule_with_another_memory_takes_a_new_optimizer(before, after, message, copied):
    params, optimizer = stepped(before, (3,), (4,))
    if copied:
        optimizer = copy.deepcopy(optimizer)
        params = optimizer.param_groups[0]["params"]
    optimizer.param_groups[0]["rule"] = after
    give(params, 1)
    kept = copy.deepcopy((params, [dict(optimizer.state[param]) for param in params]))
    with pytest.raises(RuntimeError, match=f"state: {message}.*; a rule with another memory takes a new optimizer"):
        optimizer.step()
    assert_same((params, [dict(optimizer.state[param]) for param in params]), kept)


def assert_same(found, expected):
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


def test_a_memory_that_somebody_has_put_there_is_looked_at():
    params, optimizer = stepped(ntm(), (3,), (4,))
    for odd in (None, optimizer.state[params[0]]["memory"].float()):
        optimizer.state[params[0]]["memory"] = odd
        give(params, 1)
        before = copy.deepcopy(params), optimizer.state[params[0]]["lstm_state"].clone()
        with pytest.raises(RuntimeError, match=r"state: expected memory of \[1, 7, 3\] of torch.float64, .*, got "):
            optimizer.step()
        assert_same((params, optimizer.state[params[0]]["lstm_state"]), before)


def test_saved_parts_of_a_memory_are_dense_numbers():
    """And may be parameters, or be part of a graph."""
    rule = ntm("what helps")
    _, optimizer = stepped(rule, (3,), (4,))
    saved, before = copy.deepcopy(optimizer.state_dict()), copy.deepcopy(optimizer.state_dict()["state"])
    good = saved["state"][1]["memory"]
    for odd in (good.to_sparse(), good.to("meta")):
        saved["state"][1]["memory"] = odd
        with pytest.raises(ValueError, match=r"state of group 0: expected memory of .*, got .*(sparse|meta)"):
            optimizer.load_state_dict(saved)
    saved["state"][1]["memory"] = good
    saved["state"][1]["lstm_state"] = saved["state"][1]["lstm_state"].to("meta")
    with pytest.raises(ValueError, match="state of parameter 1: expected a dense tensor"):
        optimizer.load_state_dict(saved)
    saved = copy.deepcopy(optimizer.state_dict())
    for steps in (0.5, math.nan, -1.0):
        saved["state"][1]["step"] = torch.tensor(steps)
        with pytest.raises(ValueError, match="state of parameter 1: expected its steps, a whole number >= 0"):
            optimizer.load_state_dict(saved)
    saved["state"][1] = [1]
    with pytest.raises(ValueError, match=r"state of parameter 1: expected a dictionary, got \[1\]"):
        optimizer.load_state_dict(saved)
    assert_same(optimizer.state_dict()["state"], before)
    saved = copy.deepcopy(optimizer.state_dict())
    for name in ("memory", "memory_rows", "lstm_state"):
        saved["state"][0][name] = torch.nn.Parameter(saved["state"][0][name])
    optimizer.load_state_dict(saved)
    assert_same(optimizer.state_dict()["state"], before)


def test_a_memory_that_is_too_large_for_the_machine_changes_nothing(monkeypatch):
    params, optimizer = optimizer_of(ntm(), (3,), (4,))

    def little_memory(*arguments):
        raise RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory")

    monkeypatch.setattr(Remembered, "new", little_memory)
    give(params, 0)
    with pytest.raises(torch.OutOfMemoryError, match=r"state of 7 coordinates: .* take fewer parameters"):
        optimizer.step()
    assert not optimizer.state


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", [1e16, 1e19, 1e25, 3e37])
def test_gradients_that_are_far_too_large_do_what_they_do_in_float64(kind, size):
    """As far as float32 can tell: their squares are beyond it."""
    options = {"read_bound": 5.0, "update_bound": 3.0, "memory_bound": 0.3, "scale": 0.02, "preprocess": "log_sign"}
    found, single = [], ntm("what helps", kind, dtype=torch.float32, **options)
    for dtype in (torch.float32, F64):
        rule = copy.deepcopy(single).to(dtype)
        params, optimizer = optimizer_of(rule, (5, 4), dtype=dtype)
        for seed in range(4):
            give(params, seed, size if seed == 1 else 1.0)
            optimizer.step()
        found.append(params[0].detach().double())
    torch.testing.assert_close(*found, rtol=1e-3, atol=1e-3)


def test_parameters_come_and_go_together():
    params, optimizer = stepped(ntm(), (3,), (4,))
    give(params, 1)
    params[0].grad = None
    before = copy.deepcopy((params, optimizer.state_dict()))
    missing = (
        r"gradient: expected one for every parameter of a group .* got 1 of 2: none for its parameter 0, of shape .*"
    )
    with pytest.raises(RuntimeError, match=missing + r"\(3,\)$"):
        optimizer.step()
    params[0].requires_grad_(False)
    with pytest.raises(RuntimeError, match=missing + ", which takes none: leave out what requires_grad=False"):
        optimizer.step()
    params[0].requires_grad_()
    now = params, optimizer.state_dict()["state"]
    torch.testing.assert_close(now, (before[0], before[1]["state"]), rtol=0, atol=0)
    with pytest.raises(ValueError, match="old: expected a parameter whose rule has no memory"):
        optimizer.replace_parameter(params[0], torch.zeros(2, dtype=F64, requires_grad=True), [0, 1])


# What it is made of


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"memory": "tape"}, "memory: expected one of matrix, pairs, got 'tape'"),
        ({"memory": "pairs", "pairs": 0}, "pairs: expected an integer of at least 1 and at most 1024, got 0"),
        ({"pairs": 3}, "pairs: expected none of a matrix, got 3"),
        ({"reads": 0}, "reads: expected an integer of at least 1 and at most 1024, got 0"),
        ({"writes": 0}, "writes: expected an integer of at least 1 and at most 1024, got 0"),
        ({"initial": 0.0}, "initial: expected a number from 1e-30 to 1e30, got 0.0"),
        ({"forget": 1.0}, "forget: expected a number of at least 0 and below 1, got 1.0"),
        ({"initial": 10**400}, "initial: expected a number from 1e-30 to 1e30, got 10{10}"),
        ({"read_bound": -1.0}, "read_bound: expected None or a number from 1e-30 to 1e30, got -1.0"),
        ({"read_bound": 1e39}, r"read_bound: expected None or a number from 1e-30 to 1e30, got 1e\+39"),
        ({"inside": 1}, "inside: expected True or False, got 1"),
        ({"inside": True, "num_layers": 1}, "inside: expected a second layer"),
        ({"multiply": True}, "differences: expected True with multiply"),
        ({"multiply": True, "differences": True}, "reads: expected 2 with multiply, of the gradient and its change"),
        ({"averages": 21}, "averages: expected an integer of at least 0 and at most 20, got 21"),
    ],
)  # fmt: skip
def test_bad_arguments_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        NTMRule(**arguments)


def test_numbers_of_any_kind_are_kept(tmp_path):
    """Numpy's too, which JSON does not know."""
    numbers = {"forget": np.float32(0.25), "initial": Fraction(1, 2), "reads": np.int64(2), "read_bound": 5}
    rule = NTMRule("pairs", pairs=np.int32(3), **numbers)
    loaded = load_rule(save_rule(rule, tmp_path / "rule.safetensors"))
    assert loaded.config == rule.config
    assert rule.config.memory.forget == 0.25
    assert {type(getattr(rule.config.memory, name)) for name in ("forget", "initial", "read_bound")} == {float}


def test_options_are_told_once():
    with pytest.raises(ValueError, match="memory: expected each option once, got forget twice"):
        memory_options("matrix,forget=0.1,forget=0.2")
    with pytest.raises(ValueError, match="inside: expected no value, inside alone switches it on, got 'True'"):
        memory_options("matrix,inside=True")


def test_twenty_pairs_are_kept_unless_it_is_said():
    assert NTMRule("pairs").config.memory == NTMRule("pairs", pairs=20).config.memory


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("way", WAYS)
def test_a_file_keeps_it(way, kind, tmp_path):
    rule = ntm(way, kind)
    loaded = load_rule(save_rule(rule, tmp_path / "rule.safetensors"))
    assert isinstance(loaded, NTMRule)
    assert loaded.describe() == rule.describe()
    assert loaded.config == rule.config


def test_it_says_what_it_is():
    rule = NTMRule(**HELPS)
    said = "memory matrix, reads 2, inside, differences, multiply, forget 0.05"
    assert repr(rule) == f"NTMRule('log_sign:10 lstm:20,20 linear', output_scale=0.1, averages=(2, 2), {said})"
    texts = [config.text for config in rule.config.chain]
    assert texts == ["log_sign:10 given:3 lstm:20 none", "given:23 lstm:20 linear"]


def test_a_state_says_where_a_trajectory_is():
    state = coupled.begin(ntm("what helps"), Coordinates((20,)))
    assert isinstance(state, Remembered)
    assert (state.rows.shape, state.memory.shape) == ((2, 1, 20), (1, 20, 20))
    assert [layer.shape for layer in state.layers] == [(2, 8, TILE)] * 2
