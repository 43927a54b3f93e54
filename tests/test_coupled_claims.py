"""What appendix D of Andrychowicz et al. 2016 says that coordinates can do by talking, with functions set by hand.

Coordinates do nothing here but arithmetic of their own numbers; what is of all of them goes through the same means,
memory and updates as that of a trained rule.
"""

from __future__ import annotations

import pytest
import torch
from helpers import random_gradients
from torch import Tensor

from fastl2l.memory_config import MemoryConfig
from fastl2l.ops import memory
from fastl2l.ops.coordinates import Coordinates

F64 = torch.float64


def mean_of(where: Coordinates, *rows: Tensor) -> list[Tensor]:
    """What each coordinate has of the averages of these rows [N], as averaged units give it."""
    tiles = where.tiles(torch.stack(rows))
    means = where.of_each(where.means(tiles)).expand(-1, -1, 16)
    return list(where.rows(means.expand(len(tiles), -1, -1)))


# Averages: gradients clipped by their norm


@pytest.mark.parametrize("dtype", [torch.float32, F64])
@pytest.mark.parametrize("largest", [0.01, 1.0, 1e6])
@pytest.mark.parametrize("shapes", [[(37,)], [(3, 7), (16,), (), (50, 20)]])
def test_one_average_is_enough_to_clip_by_the_norm(shapes, largest, dtype):
    params = [torch.zeros(shape, dtype=dtype, requires_grad=True) for shape in shapes]
    for number, param in enumerate(params):
        param.grad = random_gradients(*param.shape, preprocess="raw", seed=number).to(dtype)
    g = torch.cat([param.grad.reshape(-1) for param in params])
    (square,) = mean_of(Coordinates(tuple(param.numel() for param in params)), g * g)
    norm = (len(g) * square).sqrt()  # each coordinate by itself; the number of them is known
    clipped = g * (largest / (norm + 1e-6)).clamp(max=1)
    torch.nn.utils.clip_grad_norm_(params, largest)
    expected = torch.cat([param.grad.reshape(-1) for param in params])
    torch.testing.assert_close(clipped, expected, rtol=8 * torch.finfo(dtype).eps, atol=0)


def test_each_function_is_clipped_by_its_own_norm():
    where, g = Coordinates((45,), (36, 9), 3), random_gradients(45, preprocess="raw").double()
    (square,) = mean_of(where, g * g)
    clipped = where.by_function((g * (1.0 / (15 * square).sqrt()).clamp(max=1))[None])[0]
    assert (clipped.norm(dim=1) <= 1 + 1e-12).all()
    whole = where.by_function(g[None])[0]
    torch.testing.assert_close(clipped, whole * (1 / whole.norm(dim=1, keepdim=True)).clamp(max=1))


# One read head, three write heads and two averages: BFGS

FUNCTIONS, DIM, ITERATIONS, ALPHA, H0 = 128, 10, 20, 1.0, 0.01
WRITES = MemoryConfig("matrix", reads=1, writes=3, initial=H0)


class Quadratics:
    """||W theta - y||^2 for many W [10, 10] and y, side by side."""

    def __init__(self):
        generator = torch.Generator().manual_seed(0)
        self.w, self.y, theta = (
            torch.randn(FUNCTIONS, DIM, columns, dtype=F64, generator=generator) for columns in (DIM, 1, 1)
        )
        self.theta0 = theta.flatten()

    def gradient(self, theta: Tensor) -> Tensor:
        residual = self.w @ theta.view(FUNCTIONS, DIM, 1) - self.y
        return (2 * self.w.transpose(1, 2) @ residual).flatten()


def textbook(problem: Quadratics, iterations: int = ITERATIONS) -> tuple[list[Tensor], list[Tensor]]:
    """Theta and the inverse Hessian's estimate after each iteration of BFGS with a fixed step, by dense matrices."""
    theta, identity = problem.theta0.view(FUNCTIONS, DIM, 1), torch.eye(DIM, dtype=F64)
    h = (H0 * identity).expand(FUNCTIONS, DIM, DIM)
    g = problem.gradient(theta.flatten()).view_as(theta)
    thetas, estimates = [], []
    for _ in range(iterations):
        s = -ALPHA * h @ g
        theta = theta + s
        new = problem.gradient(theta.flatten()).view_as(theta)
        y, g = new - g, new
        rho = 1 / (y.transpose(1, 2) @ s)
        left = identity - rho * s @ y.transpose(1, 2)
        h = left @ h @ left.transpose(1, 2) + rho * s @ s.transpose(1, 2)
        thetas.append(theta.flatten())
        estimates.append(h)
    return thetas, estimates


class Machine:
    """The memory and the averages that coordinates have, and what they do with them: a read and three writes a step."""

    def __init__(self):
        self.where = Coordinates((FUNCTIONS * DIM,), functions=FUNCTIONS)
        self.memory = memory.begin_(WRITES, torch.empty(memory.shape(WRITES, FUNCTIONS, DIM), dtype=F64))
        self.steps = 0

    def read(self, r: Tensor) -> Tensor:
        found = memory.read(WRITES, self.memory, self.where.by_function(r[None]), self.steps)
        return self.where.flat(found)[0]

    def write(self, *pairs: tuple[Tensor, Tensor]) -> None:
        sides = [self.where.by_function(torch.stack(side)) for side in zip(*pairs, strict=True)]
        self.memory = memory.write(WRITES, self.memory, torch.stack(sides), self.steps)
        self.steps += 1

    def matrix(self) -> Tensor:
        return self.memory.transpose(1, 2)


def three_writes(s: Tensor, z: Tensor, sy: Tensor, yz: Tensor) -> list[tuple[Tensor, Tensor]]:
    """H+ = H - rho s z^T - rho z s^T + (rho^2 y.z + rho) s s^T, with z = H y; what is averaged comes as means."""
    rho = 1 / (DIM * sy)
    return [(-rho * s, z), (-rho * z, s), ((rho * rho * DIM * yz + rho) * s, s)]


def assert_same(theta, machine, thetas, estimates, iteration):
    assert (theta - thetas[iteration]).abs().max() < 1e-12 * (1 + thetas[iteration].abs().max())
    assert (machine.matrix() - estimates[iteration]).abs().max() < 1e-12 * (1 + estimates[iteration].abs().max())


def test_the_papers_interface_carries_out_bfgs_in_three_steps_an_iteration():
    """What is read is there at the next step, the writes of this one included; a step has one read and two averages."""
    problem, machine = Quadratics(), Machine()
    thetas, estimates = textbook(problem)
    theta = problem.theta0
    # A coordinate's own state: the gradient of the iteration before, its last update, and what arrived.
    g = problem.gradient(theta)
    s = -ALPHA * machine.read(g)
    theta = theta + s
    for iteration in range(ITERATIONS):
        # First step: a new gradient; what is asked for is H y.
        new = problem.gradient(theta)
        y, g = new - g, new
        arrives = machine.read(y)
        # Second: z is there; both averages, three writes, and what is asked for is H g, of the new H.
        z = arrives
        machine.write(*three_writes(s, z, *mean_of(machine.where, s * y, y * z)))
        assert_same(theta, machine, thetas, estimates, iteration)
        arrives = machine.read(g)
        # Third: the move.
        s = -ALPHA * arrives
        theta = theta + s


def test_with_the_read_inside_the_step_an_iteration_takes_one():
    """H g is read, from the old H; H y is that less the old direction, and the new one follows by the formula.

    It takes two averages more, of s g and z g, in the place of two more steps.
    """
    problem, machine = Quadratics(), Machine()
    thetas, estimates = textbook(problem)
    theta = problem.theta0
    g = problem.gradient(theta)
    direction = machine.read(g)
    s = -ALPHA * direction
    theta = theta + s
    for iteration in range(ITERATIONS):
        new = problem.gradient(theta)
        y, g = new - g, new
        before, read = direction, machine.read(g)  # between the layers, before anything is written
        z = read - before
        sy, yz, sg, zg = mean_of(machine.where, s * y, y * z, s * g, z * g)
        pairs = three_writes(s, z, sy, yz)
        machine.write(*pairs)
        assert_same(theta, machine, thetas, estimates, iteration)
        (a, _), (b, _), (c, _) = pairs
        direction = read + DIM * (a * zg + b * sg + c * sg)  # H+ g, without reading once more
        s = -ALPHA * direction
        theta = theta + s


def test_what_they_agree_with_descends():
    """That two ways agree says nothing if both go astray: half of the functions are all but at their minimum, 0."""
    problem = Quadratics()
    theta = textbook(problem, iterations=41)[0][-1]
    losses = (problem.w @ theta.view(FUNCTIONS, DIM, 1) - problem.y).square().sum((1, 2))
    assert losses.median() < 1e-3
