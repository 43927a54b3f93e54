"""Steps that fail in one process, for tests/test_processes.py: python failing_steps.py NAME FOLDER, with RANK set.

What goes wrong goes wrong in the last process alone. Every process says what it was told, and whether its parameters
are as before and go on when all is well again.
"""

from __future__ import annotations

import contextlib
import resource
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
import torch.distributed as dist
from process_group import main
from small_training import small_rule
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from fastl2l import FusedLSTMOptimizer
from fastl2l.processes import ProcessError, current
from fastl2l.rules import stepping
from fastl2l.sharded import local


def sharded(rows: int = 2, **options):
    """An optimizer of a parameter that has so many rows here, and the parameter; a relative rule, which has units."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    param = nn.Parameter(DTensor.from_local(torch.ones(rows, 3), mesh, [Shard(0)], run_check=False))
    return FusedLSTMOptimizer([("scale.weight", param)], stepping(small_rule(), relative=True), **options), param


def of_a_group(**options):
    """One of a parameter of this process's own, as ZeroRedundancyOptimizer makes them."""
    param = nn.Parameter(torch.ones(2, 3))
    return FusedLSTMOptimizer([param], stepping(small_rule(), relative=True), group=dist.group.WORLD, **options), param


def set_gradient(param) -> None:
    like = torch.ones_like(local(param).detach())
    if isinstance(param, DTensor):
        like = DTensor.from_local(like, param.device_mesh, param.placements, run_check=False)
    param.grad = like


def is_last() -> bool:
    return current().rank == current().size - 1


@contextlib.contextmanager
def little_memory() -> Iterator[None]:
    """In the last process."""
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    before = resource.getrlimit(resource.RLIMIT_AS)
    if is_last():
        resource.setrlimit(resource.RLIMIT_AS, (used + 2**27, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


@contextlib.contextmanager
def whole_gradient(param) -> Iterator[None]:
    if is_last():
        param.grad = DTensor.from_local(torch.ones(param.shape), param.device_mesh, [Replicate()], run_check=False)
    yield
    set_gradient(param)


@contextlib.contextmanager
def sparse_gradient(param, elsewhere: Callable[[], None] = lambda: None) -> Iterator[None]:
    if is_last():
        param.grad = torch.ones(2, 3).to_sparse()
    else:
        elsewhere()
    yield
    set_gradient(param)


@contextlib.contextmanager
def no_gradient(param) -> Iterator[None]:
    if is_last():
        param.grad = None
    yield
    set_gradient(param)


def flat_pieces() -> str:
    """Of FullyShardedDataParallel, of which a relative rule cannot tell the tensors."""
    wrapped = FullyShardedDataParallel(nn.Linear(3, 4), use_orig_params=True, device_id=torch.device("cpu"))
    try:
        FusedLSTMOptimizer(wrapped.parameters(), stepping(small_rule(), relative=True))
    except ValueError as error:
        return str(error)
    return "nothing"


@contextlib.contextmanager
def other_data(param) -> Iterator[None]:
    before = param.data
    if is_last():
        param.grad = None
        param.data = torch.ones(3, 3)
        set_gradient(param)
    yield
    param.grad = None
    param.data = before
    set_gradient(param)


@contextlib.contextmanager
def no_state(optimizer, param) -> Iterator[None]:
    kept = dict(optimizer.state[param])
    if is_last():
        optimizer.state.pop(param)
    yield
    optimizer.state[param] = kept


def outside_of_the_mesh() -> bool:
    """Whether a parameter that is the first process's is stepped there, beside one of all processes."""
    optimizer, param = sharded()
    theirs = nn.Parameter(distribute_tensor(torch.ones(4, 3), DeviceMesh("cpu", [0]), [Shard(0)]))
    optimizer.add_param_group({"params": [("theirs", theirs)]})
    set_gradient(param)
    theirs.grad = distribute_tensor(torch.ones(4, 3), theirs.device_mesh, theirs.placements)
    optimizer.step()
    return bool((local(theirs) != 1).all()) and bool((local(param) != 1).all())


def outcome(optimizer, param, spoiled, good_steps: int = 0) -> list[object]:
    """What a spoiled step says, whether it has changed nothing, and whether the next one has changed all."""
    set_gradient(param)
    for _ in range(good_steps):
        optimizer.step()
    before, told = local(param).detach().clone(), "nothing"
    with spoiled:
        try:
            optimizer.step()
        except (RuntimeError, FloatingPointError) as error:
            told = f"{type(error).__name__}: {error}"
    kept = torch.equal(local(param), before)
    optimizer.step()
    return [told, kept, bool((local(param) != before).all())]


def one(folder: Path) -> dict[str, list[object]]:
    found = {}
    optimizer, param = sharded(2**21)
    found["memory"] = outcome(optimizer, param, little_memory())
    optimizer, param = sharded()
    found["gradient"] = outcome(optimizer, param, whole_gradient(param))
    optimizer, param = sharded(capturable=True, nonfinite="skip")
    found["gradient, capturable"] = outcome(optimizer, param, whole_gradient(param), good_steps=1)
    found["skipped"] = [optimizer.skipped_steps]
    optimizer, param = of_a_group()
    found["sparse"] = outcome(optimizer, param, sparse_gradient(param))
    optimizer, param = of_a_group(nonfinite="skip")
    found["shape"] = outcome(optimizer, param, other_data(param), good_steps=1)
    optimizer, param = of_a_group()
    found["no gradient elsewhere"] = outcome(optimizer, param, sparse_gradient(param, optimizer.zero_grad))
    optimizer, param = sharded()
    found["no gradient"] = outcome(optimizer, param, no_gradient(param))
    optimizer, param = sharded()
    found["no state"] = outcome(optimizer, param, no_state(optimizer, param), good_steps=1)
    found["outside of the mesh"] = [outside_of_the_mesh()]
    found["flat pieces"] = [flat_pieces()]
    return found


def late(folder: Path) -> dict[str, object]:
    """The last process does not come to the second step."""
    optimizer, param = sharded()
    set_gradient(param)
    optimizer.step()
    before, start = local(param).detach().clone(), time.monotonic()
    if is_last():
        time.sleep(8)
        return {}
    try:
        optimizer.step()
    except ProcessError as error:
        return {"error": str(error), "seconds": time.monotonic() - start, "kept": torch.equal(local(param), before)}
    return {}


if __name__ == "__main__":
    main(globals(), ("late",))
