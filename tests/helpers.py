"""What several tests need: rules and inputs that exercise everything, the truth, and what counts as accurate."""

from __future__ import annotations

import functools
import statistics
from typing import NamedTuple

import torch
from torch import Tensor

from fastl2l import LSTMRule, reference
from fastl2l.ops import dispatch
from fastl2l.ops.layout import TILE, from_rows, to_rows

ISAS = ("avx512", "avx2", "generic")
SHAPES = ((20, 2), (7, 3), (5, 1), (1, 1), (33, 2))
"""Hidden units and layers: the papers' rule, and sizes that fit no block of the kernels."""
DTYPES = (torch.float32, torch.float64)


def random_rule(preprocess="log_sign", hidden=20, layers=2, *, dtype=torch.float32, seed=0, gain=1.0, **constants):
    """A rule none of whose weights is zero; `gain` multiplies them, which saturates the gates."""
    constants = {"p": 10.0, "scale": 0.7, "output_scale": 0.3} | constants
    rule = LSTMRule(preprocess, hidden_size=hidden, num_layers=layers, seed=seed, dtype=dtype, **constants)
    with torch.no_grad():
        rule.bias_out.fill_(0.05)
        for weight in rule.parameters():
            weight.mul_(gain)
    return rule


def detached(rule: LSTMRule, dtype: torch.dtype | None = None) -> list[Tensor]:
    return [weight.detach().to(dtype or weight.dtype) for weight in rule.weights()]


def constants(rule: LSTMRule) -> tuple[str, float, float]:
    """The operators' arguments after the weights."""
    config = rule.config
    return config.preprocess, config.preprocess_constant, config.output_scale


def random_gradients(*shape: int, preprocess: str = "log_sign", seed: int = 0) -> Tensor:
    """Float32 numbers of either sign. For raw, normal; else from 1e-8 to 100: on both sides of log_sign's switch."""
    generator = torch.Generator().manual_seed(seed)
    if preprocess == "raw":
        return torch.randn(shape, generator=generator) * 2
    exponents = torch.rand(shape, generator=generator, dtype=torch.float64) * 10 - 8
    exponents = torch.where((exponents + 10 / 2.302585).abs() < 0.01, 0.5, exponents)
    signs = torch.rand(shape, generator=generator).sub(0.5).sign()
    return (10**exponents * signs).float()


def random_rows(rule: LSTMRule, n: int, seed: int = 0) -> Tensor:
    """A state as after some steps, float32 [rows, n]: h within (-1, 1), c beyond."""
    generator = torch.Generator().manual_seed(seed)
    config = rule.config
    rows = torch.randn(config.num_layers, 2, config.hidden_size, n, generator=generator)
    rows[:, 0] = rows[:, 0].tanh() * 0.9
    return rows.reshape(config.state_rows, n)


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

    preprocess: str
    hidden: int
    layers: int
    n: int
    steps: int
    draws: int
    gain: float = 1.0
    magnitude: float = 1.0
    seed: int = 0

    def rules(self) -> list[LSTMRule]:
        seeds = range(self.seed, self.seed + self.draws)
        return [random_rule(self.preprocess, self.hidden, self.layers, gain=self.gain, seed=seed) for seed in seeds]


class Inputs(NamedTuple):
    """Float32, the first axis over draws."""

    grads: Tensor  # [draws, steps, n]
    rows: Tensor  # [draws, state rows, n]
    adjoints: Tensor
    drows: Tensor


@functools.lru_cache(maxsize=2)
def inputs(case: Case) -> Inputs:
    generator = torch.Generator().manual_seed(case.seed)
    rule = case.rules()[0]
    shape = case.draws, case.steps, case.n
    grads = random_gradients(*shape, preprocess=case.preprocess, seed=case.seed) * case.magnitude
    rows = torch.stack([random_rows(rule, case.n, case.seed + draw) for draw in range(case.draws)])
    adjoints = torch.randn(grads.shape, generator=generator)
    return Inputs(grads, rows, adjoints, torch.randn(rows.shape, generator=generator))


@functools.lru_cache(maxsize=4)
def by_reference(case: Case, dtype: torch.dtype) -> dict[str, Tensor]:
    """Everything that the operators give, by reference.py and autograd; the first axis is over draws.

    In float64 the coordinates are taken in pieces: sums over thousands of them in one matrix product have errors of up
    to 15 epsilon there (against long double numbers; the kernels' have up to 3), which is too much for the truth.
    """
    pieces = -(-case.n // PIECE) if dtype == torch.float64 else 1
    rules = case.rules()
    grads, rows, adjoints, drows = (_cut(tensor.to(dtype), pieces) for tensor in inputs(case))
    weights = [
        torch.stack(draws).repeat_interleave(pieces, 0).requires_grad_()
        for draws in zip(*(detached(rule, dtype) for rule in rules), strict=True)
    ]
    grads, rows = grads.requires_grad_(), rows.requires_grad_()
    step = torch.vmap(lambda grad, rows, *weights: reference.step(grad, rows, weights, *constants(rules[0])))
    updates, now = [], rows
    for t in range(case.steps):
        update, now = step(grads[:, t], now, *weights)
        updates.append(update)
    update = torch.stack(updates, 1)
    objective = (update * adjoints).sum() + (now * drows).sum()
    *dweights, dgrads, dstate = torch.autograd.grad(objective, [*weights, grads, rows])
    found = {"update": update.detach(), "state": now.detach(), "d gradients": dgrads, "d state": dstate}
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
    for rule, grads, rows in zip(case.rules(), inputs(case).grads, inputs(case).rows, strict=True):
        state, draw = tiles(rows, dtype), []
        for grad in grads.to(dtype):
            update = torch.zeros_like(grad)
            backend.step_([update], [grad], [state], detached(rule, dtype), *constants(rule), 1.0)
            draw.append(update)
        updates.append(torch.stack(draw))
        states.append(to_rows(state, case.n))
    return {"update": torch.stack(updates), "state": torch.stack(states)}


def backward_by(backend: dispatch.Backend, case: Case, dtype: torch.dtype) -> dict[str, Tensor]:
    """All gradients by the operator window_backward."""
    found = []
    for rule, grads, rows, adjoints, drows in zip(case.rules(), *inputs(case), strict=True):
        weights = detached(rule, dtype)
        dweights, dstate, dgrads = backend.window_backward(
            tiles(rows, dtype), grads.to(dtype), adjoints.to(dtype), weights, *constants(rule), tiles(drows, dtype),
            True, True,
        )  # fmt: skip
        parts = dweights.split([weight.numel() for weight in weights])
        named = {"d gradients": dgrads, "d state": to_rows(dstate, case.n)}
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


def errors(found: Tensor, truth: Tensor) -> dict[str, float]:
    """Root mean square error and largest error, each relative to the truth's."""
    difference, rms = found.double() - truth, lambda x: x.square().mean().sqrt()
    tiny = 1e-300
    return {
        "rms": (rms(difference) / rms(truth).clamp_min(tiny)).item(),
        "largest": (difference.abs().max() / truth.abs().max().clamp_min(tiny)).item(),
    }


def excess(found: Tensor, truth: Tensor, single: Tensor) -> dict[str, float]:
    """Errors of `found` in units of what is allowed: twice those of `single`, which is float32 PyTorch, and a floor.

    In float64 the truth is rounded as well, so its error counts once more: three times float32 PyTorch's, scaled.
    """
    eps = torch.finfo(found.dtype).eps
    times = 2 if found.dtype == torch.float32 else 3 * eps / torch.finfo(torch.float32).eps
    mine, theirs = errors(found, truth), errors(single, truth)
    return {kind: mine[kind] / (times * theirs[kind] + floor * eps) for kind, floor in FLOORS.items()}


def assert_accurate(found: dict[str, Tensor], case: Case) -> None:
    """The geometric mean over the draws must be within what is allowed.

    Errors of saturated gates differ by orders of magnitude from draw to draw: taken together, the luck of the worst
    draw would decide.
    """
    truth, single = by_reference(case, torch.float64), by_reference(case, torch.float32)
    for name, mine in found.items():
        assert mine.shape == truth[name].shape, name
        draws = [excess(*draw) for draw in zip(mine, truth[name], single[name], strict=True)]
        for kind in FLOORS:
            # An exact result of one draw must not make up for the others.
            ratio = statistics.geometric_mean(max(draw[kind], LEAST) for draw in draws)
            assert ratio <= 1, f"{name}: {kind} error is {ratio:.2f} times what is allowed"
