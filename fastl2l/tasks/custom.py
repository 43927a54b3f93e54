"""Anyone's own network, loss and data as a task."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence, Sized
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import cached_property
from itertools import chain
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils.data import DataLoader, Dataset, IterableDataset

from fastl2l.tasks.base import (
    DataProblem,
    Minibatches,
    Task,
    check_start,
    fingerprint,
    integer,
    problem_seed,
    refuse,
    take,
    value_and_grad,
)
from fastl2l.tasks.batch import batch
from fastl2l.tasks.identity import identity
from fastl2l.tasks.parts import Parts, names_by_part
from fastl2l.tasks.parts import check as check_parts
from fastl2l.units import units

Loss = Callable[[Any, Tensor], Tensor]


def from_module(
    make_module: Callable[[], nn.Module],
    loss: Loss,
    data: Sequence[Tensor | np.ndarray] | Dataset,
    *,
    batch_size: int = 128,
    name: str = "custom",
    parts: Parts | None = None,
    device: torch.device | str = "cpu",
) -> Task:
    """The task of training the networks that `make_module` makes on `data`.

        task = from_module(lambda: nn.Linear(64, 10), nn.functional.cross_entropy, (images, labels))

    A problem is a fresh network and a sequence of minibatches, iid uniform from `data`, with replacement. theta [N] is
    the network's trainable parameters, flattened in the order of `module.parameters()`, one part after the other.

    The function is that of the network as `make_module` leaves it: call `.eval()` there for the evaluation mode. It
    stays a pure function of theta and the step: buffers (such as batch norm's running statistics) are given to every
    call as they were at the start, and what a call writes to them is forgotten; a network that draws random numbers
    (dropout) draws them seeded by problem and step. Your own random numbers are left as they were. What is made without
    a dtype has torch's default of now, also later; torch's default device does not matter.

    In a batch, networks that differ in numbers alone (parameters and buffers) are evaluated at once. Those that draw
    random numbers, that `torch.func.vmap` cannot take (such as `nn.LSTM`, or control flow that depends on data), or
    whose other attributes differ are evaluated one after the other.

    Args:
        make_module: makes a network on the CPU, freshly initialised from torch's random numbers.
        loss: (output of the network, targets) -> scalar.
        data: inputs and targets [n, ...], Tensors or arrays, or a Dataset of such pairs, which is read once, into
            memory. Of more than two the last are the targets; the network is called with all others. Floating numbers
            are taken in the network's dtype.
        batch_size: examples in a minibatch.
        name: of the task. Checkpoints and tuned learning rates are kept for tasks of this name, network, loss and data.
            Networks and losses are told apart by what they hold (types, attributes, shapes, enclosed values) and by the
            first loss and gradient; use different names for tasks that differ in something else.
        parts: which parameters are to have an update rule of their own: a dict of part: names of modules (all that is
            in them) or parameters, in which * stands for anything, or a function from (name of a parameter, parameter,
            module that holds it) to the name of its part, such as `tasks.conv_and_fc`. By default all are one part.
        device: where theta, buffers and data live.

    Raises:
        TypeError, ValueError: an argument is not as above; the network has no trainable parameters, or some that are
            not floating or of several dtypes, or in no part or in two; it or the loss holds something that cannot be
            told from others (a lock, an open file); some of the data are NaN; the loss is not a finite scalar at the
            start of a first problem.
    """
    if not isinstance(name, str) or not name:
        raise TypeError(f"name: expected a non-empty string, got {name!r}")
    for argument, value in (("make_module", make_module), ("loss", loss)):
        if not callable(value) or (isinstance(value, nn.Module) and argument == "make_module"):
            raise TypeError(f"{argument}: expected a function, got {_type(value)}")
    integer("batch_size", batch_size)
    if parts is not None:
        check_parts(parts)
    return ModuleTask(make_module, loss, _columns(data), batch_size, name, parts, device)


class ModuleTask(Task):
    """See `from_module`."""

    def __init__(
        self,
        make_module: Callable[[], nn.Module],
        loss: Loss,
        data: Sequence[Tensor],
        batch_size: int,
        name: str,
        parts: Parts | None,
        device: torch.device | str,
    ) -> None:
        self.name, self.batch_size, self.device = name, batch_size, torch.device(device)
        self._make_module, self._loss, self._parts = make_module, loss, parts
        self._dtype = torch.get_default_dtype()
        dtype = next(iter(_trainable(self._module(0)).values())).dtype
        self._data = [
            column.to(self.device, dtype if column.is_floating_point() else None).contiguous() for column in data
        ]
        self._draws = self._alone = False
        first = self.sample(0)
        with seeded(0, self.device):
            before = _random_state(self.device)
            check_start(first)
            self._draws = not torch.equal(before, _random_state(self.device))
        self._alone = self._draws or not _taken_by_vmap(first)
        self._spec = self._describe(self.sample(0))

    def sample(self, seed: int) -> ModuleProblem:
        minibatches = Minibatches(seed, len(self._data[0]), self.batch_size)
        network = ModuleFunction(self._module(seed), self._loss, self._data, self._parts, self._dtype)
        if self._alone:
            return LoneModuleProblem(self.name, network, minibatches, seed if self._draws else None)
        return ModuleProblem(self.name, network, minibatches)

    def spec(self) -> dict[str, Any]:
        return dict(self._spec)

    def _module(self, seed: int) -> nn.Module:
        with seeded(seed, torch.device("cpu")), defaults(torch.device("cpu"), self._dtype):
            module = self._make_module()
        _check_module(module)
        return module

    def _describe(self, problem: ModuleProblem) -> dict[str, Any]:
        # Code that is imported is told by its name alone, but also by what it gives.
        loss, grad = value_and_grad(problem, problem.theta0, 0)
        return {
            "name": self.name,
            "module": problem.function.identity,
            "loss": identity("loss", self._loss),
            "batch_size": self.batch_size,
            "data": fingerprint(*self._data),
            "parameters": problem.theta0.numel(),
            "first_loss": f"{loss.item():.5g}",
            "first_gradient": f"{grad.norm().item():.4g}",
        } | ({} if self._parts is None else {"parts": problem.function.names_by_part})


class ModuleFunction:
    """From theta, what else a network holds and the rows of a minibatch to the loss.

    Attributes:
        shapes: of the parameters that theta is made of, in their order.
    """

    def __init__(
        self,
        module: nn.Module,
        loss: Loss,
        data: Sequence[Tensor],
        parts: Parts | None = None,
        default_dtype: torch.dtype = torch.float32,
    ) -> None:
        trainable = _trainable(module)
        self.module = module.to(data[0].device)
        self._loss, self._data, self._defaults = loss, data, (data[0].device, default_dtype)
        self.names_by_part = None if parts is None else names_by_part(module, list(trainable), parts)
        self._names = list(chain(*self.names_by_part.values())) if self.names_by_part else list(trainable)
        self.shapes = [trainable[name].shape for name in self._names]
        self._sizes = [shape.numel() for shape in self.shapes]
        self._has_tied = len(list(module.named_parameters(remove_duplicate=False))) > len(list(module.parameters()))
        self._frozen = [name for name, p in module.named_parameters() if not p.requires_grad]
        self._buffers = [name for name, _ in module.named_buffers()]

    def __eq__(self, other: object) -> bool:
        """Whether the two differ in the numbers of theta, frozen parameters and buffers alone."""
        if not isinstance(other, ModuleFunction) or self._loss is not other._loss or self._data is not other._data:
            return False
        return self._names == other._names and self.identity == other.identity

    @cached_property
    def identity(self) -> str:
        """What the network is, but for those numbers."""
        return identity("make_module", self.module, by_shape=[*self.module.parameters(), *self.module.buffers()])

    def theta0(self) -> Tensor:
        """The trainable parameters, flat."""
        return torch.cat([self.module.get_parameter(name).detach().flatten() for name in self._names])

    def parts(self) -> dict[str, int] | None:
        """How many coordinates of theta each part has."""
        if self.names_by_part is None:
            return None
        sizes = dict(zip(self._names, self._sizes, strict=True))
        return {part: sum(sizes[name] for name in names) for part, names in self.names_by_part.items()}

    def constants(self) -> tuple[Tensor, ...]:
        """The rest of what the network holds: frozen parameters and buffers."""
        frozen = [p.detach() for p in self.module.parameters() if not p.requires_grad]
        return (*frozen, *self.module.buffers())

    def __call__(self, theta: Tensor, *constants_and_rows: Tensor) -> Tensor:
        *constants, rows = constants_and_rows
        parts = (part.view(shape) for part, shape in zip(theta.split(self._sizes), self.shapes, strict=True))
        tensors = dict(zip([*self._names, *self._frozen, *self._buffers], [*parts, *constants], strict=True))
        tensors |= {name: tensors[name].clone() for name in self._buffers}  # which the network may write to
        *inputs, targets = (take(column, rows) for column in self._data)
        with defaults(*self._defaults):
            output = functional_call(self.module, tensors, tuple(inputs), tie_weights=self._has_tied)
            return self._loss(output, targets)


class ModuleProblem(DataProblem):
    """One network, whose trainable parameters are theta; everything else about it stays as it was made."""

    function: ModuleFunction

    def __init__(self, task: str, network: ModuleFunction, minibatches: Minibatches) -> None:
        super().__init__(minibatches)
        self.task, self.module, self.function = task, network.module, network
        self.theta0, self.constants, self.parts = network.theta0(), network.constants(), network.parts()

    @cached_property
    def units(self) -> Tensor:  # type: ignore[override]
        return units(self.theta0, self.function.shapes)


class LoneModuleProblem(ModuleProblem):
    """One that cannot be evaluated with others, since its network draws random numbers or vmap does not take it."""

    def __init__(self, task: str, network: ModuleFunction, minibatches: Minibatches, draws_from: int | None) -> None:
        super().__init__(task, network, minibatches)
        self._draws_from = draws_from

    def loss(self, theta: Tensor, step: int) -> Tensor:
        with self._random_numbers("forward", step, theta.device):
            return super().loss(theta, step)

    def whole_loss(self, theta: Tensor) -> Tensor:
        with self._random_numbers("whole", 0, theta.device):
            return super().whole_loss(theta)

    def _random_numbers(self, purpose: str, index: int, device: torch.device) -> AbstractContextManager[None]:
        if self._draws_from is None:
            return nullcontext()
        return seeded(problem_seed(self._draws_from, purpose, index), device)


def _taken_by_vmap(problem: ModuleProblem) -> bool:
    two = batch([problem, problem])
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of what is slow: nothing has been batched yet
            value_and_grad(two, two.theta0, 0)
    except Exception:  # by itself the network is evaluated without an error
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


def _check_module(module: object) -> None:
    if not isinstance(module, nn.Module):
        raise TypeError(f"make_module: expected it to return a torch.nn.Module, got {_type(module)}")
    for name, part in module.named_modules():
        if isinstance(part, torch.jit.ScriptModule):
            raise TypeError(
                "make_module: expected a network in Python, got one that is scripted or traced"
                f"{f' in {name}' if name else ''}, whose parameters cannot be replaced; return what it was made from"
            )
        if isinstance(part, (nn.Embedding, nn.EmbeddingBag)) and part.sparse:
            raise ValueError(f"make_module: expected dense gradients, got sparse=True in {name or _type(part)}")
    for name, tensor in (*module.named_parameters(), *module.named_buffers()):
        if nn.parameter.is_lazy(tensor):
            raise ValueError(
                f"make_module: expected a network with shapes, got a lazy one, whose {name} has none yet; call it "
                "once, on an example, before returning it"
            )


def _columns(data: object) -> list[Tensor]:
    """Inputs and targets, the targets last, as Tensors [n, ...]."""
    if isinstance(data, Dataset):
        columns = _read(data)
    elif isinstance(data, (tuple, list)) and len(data) > 1 and all(isinstance(x, (Tensor, np.ndarray)) for x in data):
        columns = [_tensor(f"data[{i}]", column) for i, column in enumerate(data)]
    else:
        hint = "; pass its dataset: minibatches are drawn here" if isinstance(data, DataLoader) else ""
        kinds = dict.fromkeys(map(_type, data)) if isinstance(data, (tuple, list)) else ()
        got = _type(data) + (f" of {', '.join(kinds)}" if kinds else "")
        raise TypeError(
            f"data: expected Tensors or arrays (inputs, targets), or a torch Dataset of such pairs, got {got}{hint}"
        )
    if len({column.shape[:1] for column in columns}) > 1 or not all(column.ndim and len(column) for column in columns):
        shapes = " and ".join(str(list(column.shape)) for column in columns)
        raise ValueError(f"data: expected as many targets as inputs, and at least one, got shapes {shapes}")
    for i, column in enumerate(columns):
        refuse(f"data[{i}]", column, column.isnan(), "no NaN")
    return columns


def _read(dataset: Dataset) -> list[Tensor]:
    if isinstance(dataset, IterableDataset) or not isinstance(dataset, Sized) or len(dataset) == 0:
        raise ValueError(f"data: expected a Dataset of numbered items, at least one, got {_type(dataset)}")
    examples: list[list[Tensor]] = []
    for i in range(len(dataset)):
        with defaults(torch.device("cpu"), torch.get_default_dtype()):
            item = dataset[i]
        if not isinstance(item, (tuple, list)) or len(item) < 2:
            raise TypeError(f"data: item {i}: expected (input, target) or (input, ..., target), got {_type(item)}")
        examples.append([_tensor(f"data: item {i}, part {j}", part) for j, part in enumerate(item)])
        first, shapes = ([list(part.shape) for part in example] for example in (examples[0], examples[i]))
        if shapes != first:
            raise ValueError(f"data: item {i}: expected shapes {first} as item 0 has, got {shapes}; pad or crop them")
    return [torch.stack(column) for column in zip(*examples, strict=True)]


def _tensor(name: str, value: object) -> Tensor:
    if isinstance(value, np.ndarray):
        value = np.array(value, order="C")  # torch takes neither read-only arrays nor negative strides
    try:
        tensor = value.detach() if isinstance(value, Tensor) else torch.as_tensor(value, device="cpu")
    except (TypeError, ValueError, RuntimeError) as error:
        got = f"{_type(value)} of {value.dtype}" if isinstance(value, np.ndarray) else _type(value)
        raise TypeError(f"{name}: expected a Tensor, an array or a number, got {got}") from error
    if tensor.layout != torch.strided or tensor.is_meta or tensor.is_quantized or tensor.is_nested:
        raise TypeError(f"{name}: expected a dense Tensor with numbers, got {tensor.layout} on {tensor.device}")
    return tensor


@contextmanager
def seeded(seed: int, device: torch.device) -> Iterator[None]:
    """Torch's random numbers of the CPU and `device` start from `seed` inside, and go on as before afterwards."""
    cuda = device.type == "cuda"
    with torch.random.fork_rng(devices=[device] if cuda else []):
        torch.default_generator.manual_seed(seed)  # torch.manual_seed would touch every other device as well
        if cuda:
            with torch.cuda.device(device):
                torch.cuda.manual_seed(seed)
        yield


@contextmanager
def defaults(device: torch.device, dtype: torch.dtype) -> Iterator[None]:
    """What anyone's code makes without a device or dtype has these inside, whatever is the default outside."""
    before = torch.get_default_dtype()
    if before == dtype and torch.get_default_device() in (device, torch.device("cpu")):
        yield  # as a rule; a default device costs time at each of torch's functions
        return
    torch.set_default_dtype(dtype)
    try:
        with device:
            yield
    finally:
        torch.set_default_dtype(before)


def _random_state(device: torch.device) -> Tensor:
    return torch.cuda.get_rng_state(device) if device.type == "cuda" else torch.get_rng_state()


def _type(value: object) -> str:
    return f"{type(value).__module__}.{type(value).__qualname__}".removeprefix("builtins.")
