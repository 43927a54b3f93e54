"""Anyone's own network, loss and data as a task."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sized
from contextlib import contextmanager
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from fastl2l.tasks.base import (
    Minibatches,
    PureProblem,
    Task,
    check_start,
    fingerprint,
    integer,
    problem_seed,
    take,
    value_and_grad,
)
from fastl2l.tasks.batch import batch
from fastl2l.tasks.identity import identity

Loss = Callable[[Any, Tensor], Tensor]


def from_module(
    make_module: Callable[[], nn.Module],
    loss: Loss,
    data: tuple[Tensor, Tensor] | torch.utils.data.Dataset,
    *,
    batch_size: int = 128,
    name: str = "custom",
    device: torch.device | str = "cpu",
) -> Task:
    """The task of training the networks that `make_module` makes on `data`.

        task = from_module(lambda: nn.Linear(64, 10), nn.functional.cross_entropy, (images, labels))

    A problem is a fresh network and a sequence of minibatches, iid uniform from `data`, with replacement. theta [N] is
    the network's trainable parameters, flattened in the order of `module.parameters()`.

    The function is that of the network as `make_module` leaves it: call `.eval()` there for the evaluation mode. It
    stays a pure function of theta and the step: buffers (such as batch norm's running statistics) are given to every
    call as they were at the start, and what a call writes to them is forgotten; a network that draws random numbers
    (dropout) draws them seeded by problem and step. Your own random numbers are left as they were.

    In a batch, networks that differ in numbers alone (parameters and buffers) are evaluated at once. Those that draw
    random numbers, that `torch.func.vmap` cannot take (such as `nn.LSTM`, or control flow that depends on data), or
    whose other attributes differ are evaluated one after the other.

    Args:
        make_module: makes a network on the CPU, freshly initialised from torch's random numbers.
        loss: (output of the network, targets) -> scalar.
        data: inputs and targets [n, ...], or a Dataset of such pairs, which is read once, into memory.
        batch_size: examples in a minibatch.
        name: of the task. Checkpoints and tuned learning rates are kept for tasks of this name, network, loss and data.
            Networks and losses are told apart by what they hold (types, attributes, shapes, enclosed values) and by the
            first loss and gradient; use different names for tasks that differ in something else.
        device: where theta, buffers and data live.

    Raises:
        TypeError, ValueError: an argument is not as above; the network has no trainable parameters, or some that are
            not floating or of several dtypes; it or the loss holds something that cannot be told from others (a lock,
            an open file); the loss is not a finite scalar at the start of a first problem.
    """
    if not isinstance(name, str) or not name:
        raise TypeError(f"name: expected a non-empty string, got {name!r}")
    for argument, value in (("make_module", make_module), ("loss", loss)):
        if not callable(value) or (isinstance(value, nn.Module) and argument == "make_module"):
            raise TypeError(f"{argument}: expected a function, got {_type(value)}")
    inputs, targets = _tensors(data)
    integer("batch_size", batch_size)
    return ModuleTask(make_module, loss, inputs.to(device), targets.to(device), batch_size, name, device)


class ModuleTask(Task):
    """See `from_module`."""

    def __init__(
        self,
        make_module: Callable[[], nn.Module],
        loss: Loss,
        inputs: Tensor,
        targets: Tensor,
        batch_size: int,
        name: str,
        device: torch.device | str,
    ) -> None:
        self.name, self.batch_size, self.device = name, batch_size, torch.device(device)
        self.inputs, self.targets = inputs, targets
        self._make_module, self._loss = make_module, loss
        self._draws = self._alone = False
        first = self.sample(0)
        with _seeded(0, self.device):
            before = _random_state(self.device)
            check_start(first)
            self._draws = not torch.equal(before, _random_state(self.device))
        self._alone = self._draws or not _taken_by_vmap(first)
        self._spec = self._describe(self.sample(0))

    def sample(self, seed: int) -> ModuleProblem:
        with _seeded(seed, torch.device("cpu")):
            module = self._make_module()
        if not isinstance(module, nn.Module):
            raise TypeError(f"make_module: expected it to return a torch.nn.Module, got {_type(module)}")
        minibatches = Minibatches(seed, len(self.targets), self.batch_size)
        network = _Network(module, self._loss, self.inputs, self.targets)
        if self._alone:
            return LoneModuleProblem(self.name, network, minibatches, seed if self._draws else None)
        return ModuleProblem(self.name, network, minibatches)

    def spec(self) -> dict[str, Any]:
        return dict(self._spec)

    def _describe(self, problem: ModuleProblem) -> dict[str, Any]:
        # Code that is imported is told by its name alone, but also by what it gives.
        loss, grad = value_and_grad(problem, problem.theta0, 0)
        return {
            "name": self.name,
            "module": problem.function.identity,
            "loss": identity("loss", self._loss),
            "batch_size": self.batch_size,
            "data": fingerprint(self.inputs, self.targets),
            "parameters": problem.theta0.numel(),
            "first_loss": f"{loss.item():.5g}",
            "first_gradient": f"{grad.norm().item():.4g}",
        }


class _Network:
    """From theta, what else a network holds and the rows of a minibatch to the loss."""

    def __init__(self, module: nn.Module, loss: Loss, inputs: Tensor, targets: Tensor) -> None:
        trainable = _trainable(module)
        self.module = module.to(inputs.device)
        self._loss, self._data = loss, (inputs, targets)
        self._names, self._shapes = list(trainable), [p.shape for p in trainable.values()]
        self._sizes = [p.numel() for p in trainable.values()]
        self._frozen = [name for name, p in module.named_parameters() if not p.requires_grad]
        self._buffers = [name for name, _ in module.named_buffers()]

    def __eq__(self, other: object) -> bool:
        """Whether the two differ in the numbers of theta, frozen parameters and buffers alone."""
        if not isinstance(other, _Network) or self._loss is not other._loss:
            return False
        if any(mine is not theirs for mine, theirs in zip(self._data, other._data, strict=True)):
            return False
        return self.identity == other.identity

    @cached_property
    def identity(self) -> str:
        """What the network is, but for those numbers."""
        return identity("make_module", self.module, by_shape=[*self.module.parameters(), *self.module.buffers()])

    def theta0(self) -> Tensor:
        """The trainable parameters, flat."""
        return torch.cat([p.detach().flatten() for p in self.module.parameters() if p.requires_grad])

    def constants(self) -> tuple[Tensor, ...]:
        """The rest of what the network holds: frozen parameters and buffers."""
        frozen = [p.detach() for p in self.module.parameters() if not p.requires_grad]
        return (*frozen, *self.module.buffers())

    def __call__(self, theta: Tensor, *constants_and_rows: Tensor) -> Tensor:
        *constants, rows = constants_and_rows
        parts = (part.view(shape) for part, shape in zip(theta.split(self._sizes), self._shapes, strict=True))
        tensors = dict(zip([*self._names, *self._frozen, *self._buffers], [*parts, *constants], strict=True))
        tensors |= {name: tensors[name].clone() for name in self._buffers}  # which the network may write to
        inputs, targets = (take(part, rows) for part in self._data)
        return self._loss(functional_call(self.module, tensors, (inputs,)), targets)


class ModuleProblem(PureProblem):
    """One network, whose trainable parameters are theta; everything else about it stays as it was made."""

    function: _Network

    def __init__(self, task: str, network: _Network, minibatches: Minibatches) -> None:
        self.task, self.module, self.function = task, network.module, network
        self.theta0, self.constants = network.theta0(), network.constants()
        self._minibatches = minibatches

    def inputs(self, step: int, device: torch.device) -> tuple[Tensor, ...]:
        return (self._minibatches.at(step, device),)


class LoneModuleProblem(ModuleProblem):
    """One that cannot be evaluated with others, since its network draws random numbers or vmap does not take it."""

    def __init__(self, task: str, network: _Network, minibatches: Minibatches, draws_from: int | None) -> None:
        super().__init__(task, network, minibatches)
        self._draws_from = draws_from

    def loss(self, theta: Tensor, step: int) -> Tensor:
        if self._draws_from is None:
            return super().loss(theta, step)
        with _seeded(problem_seed(self._draws_from, "forward", step), theta.device):
            return super().loss(theta, step)


def _taken_by_vmap(problem: ModuleProblem) -> bool:
    two = batch([problem, problem])
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of what is slow: nothing has been batched yet
            value_and_grad(two, two.theta0, 0)
    except RuntimeError:
        return False
    return True


def _trainable(module: nn.Module) -> dict[str, Tensor]:
    trainable: dict[str, Tensor] = {name: p for name, p in module.named_parameters() if p.requires_grad}
    if not trainable:
        raise ValueError("make_module: expected a network with trainable parameters, got one without any")
    dtypes = {p.dtype for p in trainable.values()}
    if len(dtypes) > 1 or not all(dtype.is_floating_point for dtype in dtypes):
        got = ", ".join(sorted(map(str, dtypes)))
        raise ValueError(f"make_module: expected trainable parameters of one floating dtype, got {got}")
    for name, p in trainable.items():
        if p.device.type != "cpu":
            raise ValueError(f"make_module: expected a network on the CPU (see device=), got {name} on {p.device}")
    return trainable


def _tensors(data: object) -> tuple[Tensor, Tensor]:
    if isinstance(data, torch.utils.data.Dataset):
        if not isinstance(data, Sized) or len(data) == 0:
            raise ValueError("data: expected a Dataset with a length of at least 1")
        inputs, targets = zip(*(data[i] for i in range(len(data))), strict=True)
        return torch.stack([torch.as_tensor(x) for x in inputs]), torch.stack([torch.as_tensor(y) for y in targets])
    if not isinstance(data, (tuple, list)) or len(data) != 2 or not all(isinstance(part, Tensor) for part in data):
        raise TypeError(f"data: expected two Tensors (inputs, targets) or a torch Dataset, got {_type(data)}")
    inputs, targets = data
    if inputs.ndim == 0 or targets.ndim == 0 or len(inputs) != len(targets) or len(inputs) == 0:
        shapes = f"{list(inputs.shape)} and {list(targets.shape)}"
        raise ValueError(f"data: expected as many targets as inputs, and at least one, got shapes {shapes}")
    return inputs.detach().contiguous(), targets.detach().contiguous()


@contextmanager
def _seeded(seed: int, device: torch.device) -> Iterator[None]:
    """Torch's random numbers of the CPU and `device` start from `seed` inside, and go on as before afterwards."""
    cuda = device.type == "cuda"
    with torch.random.fork_rng(devices=[device] if cuda else []):
        torch.default_generator.manual_seed(seed)  # torch.manual_seed would touch every other device as well
        if cuda:
            with torch.cuda.device(device):
                torch.cuda.manual_seed(seed)
        yield


def _random_state(device: torch.device) -> Tensor:
    return torch.cuda.get_rng_state(device) if device.type == "cuda" else torch.get_rng_state()


def _type(value: object) -> str:
    return f"{type(value).__module__}.{type(value).__qualname__}".removeprefix("builtins.")
