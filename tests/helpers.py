"""What several tests need: rules and inputs that exercise everything, the truth, and what counts as accurate."""

from __future__ import annotations

import dataclasses
import functools
from typing import NamedTuple

import torch
from torch import Tensor

from fastl2l import LSTMRule, Rule, reference
from fastl2l.ops import dispatch
from fastl2l.ops.layout import TILE, from_rows, new_state, to_rows
from fastl2l.rule_config import Adam, RuleConfig

ISAS = ("avx512", "avx2", "generic")
SHAPES = ((20, 2), (7, 3), (5, 1), (1, 1), (33, 2))
"""Hidden units and layers: the papers' rule, and sizes that fit no block of the kernels."""
DTYPES = (torch.float32, torch.float64)


def lstm(preprocess: str = "log_sign", hidden: int = 20, layers: int = 2) -> str:
    """The text of an LSTM rule."""
    features = {"raw": "raw:0.7", "log_sign": "log_sign:10"}[preprocess]
    return f"{features} lstm:{','.join([str(hidden)] * layers)} linear"


LSTMS = [lstm(preprocess, *shape) for preprocess in ("raw", "log_sign") for shape in SHAPES]
RNNPROP = "adam:0.95,0.95,1e-08 elu:20 lstm:20,20 tanh"
RULES = [
    *LSTMS,
    RNNPROP,
    "adam:0.9,0.99,1e-06 lstm:7,7,7 linear",
    "adam:0.5,0.5,0.001 elu:33 lstm:5 tanh",
    "log_sign:5 elu:3 lstm:20 linear",
    "raw:0.7 elu:1 lstm:1,1 tanh",
    "log_and_sign:5 lstm:20,20 linear",
]
"""What every backend is tested on: all parts, alone and together, and sizes that fit no block of the kernels."""
GIVEN = [
    "given:20 lstm:20 none",
    "log_sign:10 given:2 lstm:7,7 none",
    "adam:0.9,0.99,1e-06 given:1 elu:5 lstm:5 none",
    "raw:0.7 given:3 lstm:20,20 linear",
]
"""Rules with rows from outside, and with no output of their own."""


def randomized(rule: Rule, gain: float = 1.0) -> Rule:
    """None of its weights is zero; `gain` multiplies them, which saturates the gates."""
    with torch.no_grad():
        for name, weight in rule.named_parameters():
            if name in ("bias_in", "bias_out"):
                weight.copy_(torch.linspace(0.05, -0.04, weight.numel()).view_as(weight))
            weight.mul_(gain)
    return rule


def random_rule(preprocess="log_sign", hidden=20, layers=2, *, dtype=torch.float32, seed=0, gain=1.0, **constants):
    """An LSTM rule none of whose weights is zero."""
    constants = {"p": 10.0, "scale": 0.7, "output_scale": 0.3} | constants
    rule = LSTMRule(preprocess, hidden_size=hidden, num_layers=layers, seed=seed, dtype=dtype, **constants)
    return randomized(rule, gain)


def rule_of(text: str, *, dtype=torch.float32, seed=0, gain=1.0, output_scale=0.3) -> Rule:
    """The rule of any text, none of whose weights is zero."""
    config = dataclasses.replace(RuleConfig.parse(text), output_scale=output_scale)
    return randomized(Rule(config, seed=seed, dtype=dtype), gain)


def detached(rule: Rule, dtype: torch.dtype | None = None) -> list[Tensor]:
    return [weight.detach().to(dtype or weight.dtype) for weight in rule.weights()]


def constants(rule: Rule) -> tuple[str, float]:
    """The operators' arguments after the weights."""
    return rule.text, rule.config.output_scale


def random_gradients(*shape: int, preprocess: str = "log_sign", seed: int = 0) -> Tensor:
    """Float32 numbers of either sign. For raw, normal; else from 1e-8 to 100: on both sides of log_sign's switch.

    `preprocess` is the name of the features, or a text that begins with it.
    """
    generator = torch.Generator().manual_seed(seed)
    if preprocess.startswith("raw"):
        return torch.randn(shape, generator=generator) * 2
    exponents = torch.rand(shape, generator=generator, dtype=torch.float64) * 10 - 8
    exponents = torch.where((exponents + 10 / 2.302585).abs() < 0.01, 0.5, exponents)
    signs = torch.rand(shape, generator=generator).sub(0.5).sign()
    return (10**exponents * signs).float()


def random_rows(rule: Rule, n: int, seed: int = 0) -> Tensor:
    """A state as after some steps, float32 [rows, n]: h within (-1, 1), c beyond; means that could be some."""
    generator = torch.Generator().manual_seed(seed)
    config = rule.config
    rows = torch.randn(config.num_layers, 2, config.hidden_size, n, generator=generator)
    rows[:, 0] = rows[:, 0].tanh() * 0.9
    rows = rows.reshape(config.lstm_rows, n)
    if not isinstance(config.features, Adam):
        return rows
    mean, rest = torch.randn(2, n, generator=generator) * 0.1
    ages = torch.rand(config.features.state_rows - 2, n, generator=generator) * 0.9 + 0.05
    return torch.cat([rows, mean[None], (mean.square() + rest.square())[None], ages])


def tiles(rows: Tensor, dtype: torch.dtype | None = None, poison: float = float("nan")) -> Tensor:
    """Rows in the operators' layout, with `poison` in the lanes that belong to no coordinate."""
    state = from_rows(rows.to(dtype or rows.dtype))
    if rows.shape[1] % TILE:
        state[-1, :, rows.shape[1] % TILE :] = poison
    return state


# A backend's results, the truth, and what float32 PyTorch makes of it


class Case(NamedTuple):
    """Windows of `steps` steps of `n` coordinates, drawn `draws` times with new weights and numbers each time.

    Errors are taken over all draws: of few numbers PyTorch's can be far below its usual one by chance.
    """

    rule: str
    n: int
    steps: int
    draws: int
    gain: float = 1.0
    magnitude: float = 1.0
    seed: int = 0

    def rules(self) -> list[Rule]:
        return _rules(self)


@functools.lru_cache(maxsize=2)
def _rules(case: Case) -> list[Rule]:
    return [rule_of(case.rule, gain=case.gain, seed=seed) for seed in range(case.seed, case.seed + case.draws)]


class Inputs(NamedTuple):
    """Float32, the first axis over draws."""

    grads: Tensor  # [draws, steps, n]
    rows: Tensor  # [draws, state rows, n]
    adjoints: Tensor
    drows: Tensor
    given: Tensor  # [draws, steps, given rows, n]


@functools.lru_cache(maxsize=2)
def inputs(case: Case) -> Inputs:
    generator = torch.Generator().manual_seed(case.seed)
    rule = case.rules()[0]
    shape = case.draws, case.steps, case.n
    grads = random_gradients(*shape, preprocess=case.rule, seed=case.seed) * case.magnitude
    rows = torch.stack([random_rows(rule, case.n, case.seed + draw) for draw in range(case.draws)])
    adjoints = torch.randn(grads.shape, generator=generator)
    drows = torch.randn(rows.shape, generator=generator)
    given = torch.randn(case.draws, case.steps, rule.config.given, case.n, generator=generator)
    return Inputs(grads, rows, adjoints, drows, given)


@functools.lru_cache(maxsize=4)
def by_reference(case: Case, dtype: torch.dtype) -> dict[str, Tensor]:
    """Everything that the operators give, by reference.py and autograd; the first axis is over draws.

    In float64 the coordinates are taken in pieces: sums over thousands of them in one matrix product have errors of up
    to 15 epsilon there (against long double numbers; the kernels' have up to 3), which is too much for the truth.
    """
    pieces = -(-case.n // PIECE) if dtype == torch.float64 else 1
    rules = case.rules()
    *exact, given = (tensor.to(dtype) for tensor in inputs(case))
    grads, rows, adjoints, drows = (_cut(tensor, pieces) for tensor in exact)
    given_rows = given.shape[2]
    given = _cut(given.flatten(1, 2), pieces).requires_grad_()  # [draws * pieces, steps * rows, n]
    weights = [
        torch.stack(draws).repeat_interleave(pieces, 0).requires_grad_()
        for draws in zip(*(detached(rule, dtype) for rule in rules), strict=True)
    ]
    grads, rows = grads.requires_grad_(), rows.requires_grad_()
    step = torch.vmap(
        lambda grad, rows, given, *weights: reference.step(
            grad, rows, weights, *constants(rules[0]), given if given_rows else None
        )
    )
    updates, now = [], rows
    for t in range(case.steps):
        update, now = step(grads[:, t], now, given[:, t * given_rows : (t + 1) * given_rows], *weights)
        updates.append(update)
    update = torch.stack(updates, 1)
    objective = (update * adjoints).sum() + (now * drows).sum()
    leaves = [*weights, grads, rows, given]
    *dweights, dgrads, dstate, dgiven = torch.autograd.grad(
        objective, leaves, allow_unused=True, materialize_grads=True
    )
    found = {"update": update.detach(), "state": now.detach(), "d gradients": dgrads, "d state": dstate}
    found |= {"d given": dgiven} if given_rows else {}
    found = {name: _join(tensor, pieces)[..., : case.n] for name, tensor in found.items()}
    for (name, shape), dweight in zip(rules[0].config.weight_shapes, dweights, strict=True):
        found[f"d {name}"] = dweight.view(case.draws, pieces, *shape).sum(1)
    return found


PIECE = 64


def _cut(tensor: Tensor, pieces: int) -> Tensor:
    """[draws, rows, n] as [draws * pieces, rows, n / pieces], with zeros at the end."""
    if pieces == 1:
        return tensor
    draws, rows, n = tensor.shape
    padded = torch.nn.functional.pad(tensor, (0, pieces * PIECE - n))
    return padded.view(draws, rows, pieces, PIECE).transpose(1, 2).flatten(0, 1)


def _join(tensor: Tensor, pieces: int) -> Tensor:
    """The inverse of _cut, with what it put at the end."""
    return tensor.unflatten(0, (-1, pieces)).transpose(1, 2).flatten(2)


def steps_by(backend: dispatch.Backend, case: Case, dtype: torch.dtype) -> dict[str, Tensor]:
    """Updates and last states by the operator step_."""
    updates, states = [], []
    for rule, grads, rows, _, _, given in zip(case.rules(), *inputs(case), strict=True):
        state, draw, arguments = tiles(rows, dtype), [], (detached(rule, dtype), *constants(rule), 1.0, None)
        for grad, outside in zip(grads.to(dtype), given_tiles(given, dtype), strict=True):
            update = torch.zeros_like(grad)
            backend.step_([update], [grad], [state], *arguments, outside)
            draw.append(update)
        updates.append(torch.stack(draw))
        states.append(to_rows(state, case.n))
    return {"update": torch.stack(updates), "state": torch.stack(states)}


def given_tiles(given: Tensor, dtype: torch.dtype) -> list[Tensor | None]:
    """Given rows [steps, rows, n] as the operators take them, a step at a time; None where there are none."""
    return [tiles(rows, dtype) if len(rows) else None for rows in given]


def assert_bfloat16_steps_are_accurate(backend: dispatch.Backend, case: Case) -> None:
    """Steps with their state stored in bfloat16, each beside the reference from the state that the one before has left.

    Updates must be accurate, and the state what an accurate one is rounded to.
    """
    found, truth, single = [], [], []
    for rule, grads, rows in zip(case.rules(), inputs(case).grads, inputs(case).rows, strict=True):
        state, steps = tiles(rows, torch.bfloat16), []
        for grad in grads:
            before, update = to_rows(state, case.n).clone(), torch.zeros_like(grad)
            backend.step_([update], [grad], [state], detached(rule), *constants(rule), 1.0)
            exact, plain = (
                reference.step(grad.to(dtype), before.to(dtype), detached(rule, dtype), *constants(rule))
                for dtype in (torch.float64, torch.float32)
            )
            steps.append(((update, unrounded(to_rows(state, case.n), exact[1])), exact, plain))
        for results, outputs in zip((found, truth, single), zip(*steps, strict=True), strict=True):
            results.append([torch.stack(tensors) for tensors in zip(*outputs, strict=True)])
    named = (
        dict(zip(("update", "state"), map(torch.stack, zip(*draws, strict=True)), strict=True))
        for draws in (found, truth, single)
    )
    assert_as_accurate_as_pytorch(*named)


def unrounded(stored: Tensor, truth: Tensor) -> Tensor:
    """The numbers closest to `truth` that are rounded to what is stored in bfloat16."""
    low, high = (
        (stored.double() + torch.nextafter(stored, torch.full_like(stored, to)).double()) / 2
        for to in (float("-inf"), float("inf"))
    )
    return truth.clamp(low, high).float()


def assert_bfloat16_is_float32_rounded(backend: dispatch.Backend, rule: Rule, n: int) -> None:
    """A step from numbers that bfloat16 has: the same update whatever state is stored in, which is rounded then."""
    grad = random_gradients(n)
    # NaN whose bits are all ones: counting up, as rounding does, makes zero of it.
    grad[n // 2] = torch.tensor([0x7FFFFFFF], dtype=torch.int32).view(torch.float32)
    for rows in (random_rows(rule, n) * 0, random_rows(rule, n).bfloat16().float()):
        states, updates = [tiles(rows, dtype) for dtype in (torch.float32, torch.bfloat16)], torch.zeros(2, n)
        for update, state in zip(updates, states, strict=True):
            backend.step_([update], [grad], [state], detached(rule), *constants(rule), 1.0)
        exact, stored = (to_rows(state, n) for state in states)
        assert exact[:, n // 2].isnan().all()
        torch.testing.assert_close(updates[1], updates[0], rtol=0, atol=0, equal_nan=True)
        torch.testing.assert_close(stored, exact.bfloat16(), rtol=0, atol=0, equal_nan=True)


def assert_halves_are_rounded_to_even(backend: dispatch.Backend) -> None:
    """By a rule whose gates add 1/2 to c, of which bfloat16 has the integers from 128 to 256."""
    rule = random_rule(hidden=7, layers=1)
    with torch.no_grad():
        for weight in rule.weights():
            weight.zero_()
        rule.bias_l0[7:21] = 200.0  # f and g are 1, i is a half
    rows = torch.zeros(14, 254)
    rows[7:] = torch.cat([torch.arange(129, 256), -torch.arange(129, 256)])
    state, param = tiles(rows, torch.bfloat16), torch.zeros(254)
    backend.step_([param], [torch.ones(254)], [state], detached(rule), *constants(rule), 1.0)
    assert torch.equal(to_rows(state, 254)[7:].float(), (rows[7:] + 0.5).round())  # which takes the even one, too


def backward_by(backend: dispatch.Backend, case: Case, dtype: torch.dtype) -> dict[str, Tensor]:
    """All gradients by the operator window_backward."""
    found = []
    for rule, grads, rows, adjoints, drows, given in zip(case.rules(), *inputs(case), strict=True):
        weights, outside = detached(rule, dtype), given_tiles(given, dtype)
        dweights, dstate, dgrads, dgiven = backend.window_backward(
            tiles(rows, dtype), grads.to(dtype), adjoints.to(dtype), weights, *constants(rule), tiles(drows, dtype),
            True, True, None if outside[0] is None else torch.stack(outside), True,
        )  # fmt: skip
        parts = dweights.split([weight.numel() for weight in weights])
        named = {"d gradients": dgrads, "d state": to_rows(dstate, case.n)}
        if outside[0] is not None:
            named["d given"] = torch.cat([to_rows(step, case.n) for step in dgiven])
        for (name, shape), part in zip(rule.config.weight_shapes, parts, strict=True):
            named[f"d {name}"] = part.view(shape)
        found.append(named)
    return {name: torch.stack([draw[name] for draw in found]) for name in found[0]}


# Accuracy

FLOORS = {"rms": 2.0, "largest": 4.0}
"""What is allowed beside PyTorch's own error, in units of the dtype's epsilon: of the root mean square, what rounding
a result once makes at most; of the largest result, four such roundings."""

LEAST = 0.1
"""The smallest error that counts, in units of what is allowed."""


def all_finite(backend: dispatch.Backend, tensors: list[Tensor]) -> bool:
    finite = torch.ones(1, dtype=torch.bool, device=tensors[0].device)
    backend.find_nonfinite_(finite, tensors)
    return bool(finite)


def assert_one_state_does_for_all(backend: dispatch.Backend, device: torch.device | str = "cpu") -> None:
    """A step of several parameters, whose states are one tensor or one each."""
    rule, sizes = random_rule(), (3, 0, 20, 16, 33)
    weights = [weight.to(device) for weight in detached(rule)]
    grads = [random_gradients(size, seed=size).to(device) for size in sizes]
    together = tiles(random_rows(rule, 7 * 16)).to(device)
    results = []
    for states in (list(together.clone().split([1, 0, 2, 1, 3])), [together.clone()]):
        params = [torch.ones(size, device=device) for size in sizes]
        backend.step_(params, grads, states, weights, *constants(rule), 1.0)
        results.append((torch.cat(params), torch.cat(states)))
    assert torch.equal(results[0][0], results[1][0])
    assert torch.equal(results[0][1], results[1][1])
    assert not torch.equal(results[1][1], together)


def assert_units_multiply_updates_alone(
    backend: dispatch.Backend, text: str, dtype: torch.dtype = torch.float32
) -> None:
    """A step of parameters with a unit each: none and 1 are the same to the bit, states and decay do not see them."""
    rule, sizes = rule_of(text), (3, 0, 20, 16, 33)
    grads = [random_gradients(size, seed=size).to(dtype) for size in sizes]
    arguments, found = (detached(rule), *constants(rule), 1.0, None, None), {}
    units = torch.tensor([2.0, 5.0, 0.25, 0.0, 1.0])
    for name, decay, given in (
        ("none", 0.0, None),
        ("ones", 0.0, torch.ones(5)),
        ("units", 0.0, units),
        ("decayed", 0.25, units),
    ):
        params = [torch.full((size,), 2.0 if decay else 0.0, dtype=dtype) for size in sizes]
        states = [new_state(rule, size) for size in sizes]
        backend.step_(params, grads, states, *arguments, decay, None, given)
        found[name] = params, states
    updates, states = found["none"]
    assert all(map(torch.equal, updates + states, found["ones"][0] + found["ones"][1]))
    for name in ("units", "decayed"):
        assert all(map(torch.equal, states, found[name][1]))
    for update, unit, of_unit, decayed in zip(updates, units, found["units"][0], found["decayed"][0], strict=True):
        torch.testing.assert_close(of_unit, (update.double() * unit).to(dtype))
        torch.testing.assert_close(decayed, (update.double() * unit + 1.5).to(dtype))


def errors(found: Tensor, truth: Tensor) -> dict[str, float]:
    """Root mean square error and largest error, each relative to the truth's."""
    return {kind: error.item() for kind, error in errors_by_draw(found[None], truth[None]).items()}


def errors_by_draw(found: Tensor, truth: Tensor) -> dict[str, Tensor]:
    """The same of each draw, which the first axis is over."""
    difference, truth = (x.reshape(len(truth), -1) for x in (found.double() - truth, truth))
    tiny = 1e-300
    return {
        "rms": difference.square().mean(1).sqrt() / truth.square().mean(1).sqrt().clamp_min(tiny),
        "largest": difference.abs().amax(1) / truth.abs().amax(1).clamp_min(tiny),
    }


def excess(found: Tensor, truth: Tensor, single: Tensor) -> dict[str, Tensor]:
    """Errors of `found` in units of what is allowed: twice those of `single`, which is float32 PyTorch, and a floor.

    In float64 the truth is rounded as well, so its error counts once more: three times float32 PyTorch's, scaled. The
    first axis is over draws.
    """
    eps = torch.finfo(found.dtype).eps
    times = 2 if found.dtype == torch.float32 else 3 * eps / torch.finfo(torch.float32).eps
    mine, theirs = errors_by_draw(found, truth), errors_by_draw(single, truth)
    return {kind: mine[kind] / (times * theirs[kind] + floor * eps) for kind, floor in FLOORS.items()}


def assert_accurate(found: dict[str, Tensor], case: Case) -> None:
    assert_as_accurate_as_pytorch(found, by_reference(case, torch.float64), by_reference(case, torch.float32))


def assert_as_accurate_as_pytorch(
    found: dict[str, Tensor], truth: dict[str, Tensor], single: dict[str, Tensor]
) -> None:  # fmt: skip
    """The geometric mean over the draws must be within what is allowed.

    Errors of saturated gates differ by orders of magnitude from draw to draw: taken together, the luck of the worst
    draw would decide.
    """
    for name, mine in found.items():
        assert mine.shape == truth[name].shape, name
        assert mine.shape == single[name].shape, name
        for kind, draws in excess(mine, truth[name], single[name]).items():
            # An exact result of one draw must not make up for the others.
            ratio = draws.clamp_min(LEAST).log().mean().exp().item()
            assert ratio <= 1, f"{name}: {kind} error is {ratio:.2f} times what is allowed"


CIFAR10_FILES = [f"data_batch_{i}.bin" for i in range(1, 6)] + ["test_batch.bin"]
"""Of its binary version."""
