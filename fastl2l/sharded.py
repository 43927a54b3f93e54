"""Parameters that are in parts on several processes, as FSDP2 and tensor parallelism make them (DTensor).

Each process steps the coordinates that it has. Processes need to agree on two things alone: whether they take a step,
and means over coordinates, of rules whose coordinates talk.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from fastl2l.ops.layout import from_rows, to_rows
from fastl2l.processes import ProcessError


def is_sharded(tensor: object) -> bool:
    """Whether it is a DTensor. Their module takes long to import, and there are none before it has been."""
    return hasattr(tensor, "device_mesh") and hasattr(tensor, "placements")


def any_sharded(tensors: Iterable[Tensor]) -> bool:
    return any(type(tensor) not in (Tensor, torch.nn.Parameter) and is_sharded(tensor) for tensor in tensors)


def check(param: Any, name: str) -> None:
    """That each process may step what it has of a parameter.

    Raises:
        RuntimeError: it is sharded otherwise than by rows, columns or whole copies.
    """
    if type(param).__name__ == "ShardedTensor":
        raise RuntimeError(f"{name}: expected a tensor or a DTensor, got a ShardedTensor")
    if not is_sharded(param):
        return
    _check_placements(param, name)
    grad = param.grad
    if grad is None:
        return
    same = is_sharded(grad) and grad.placements == param.placements and grad.device_mesh == param.device_mesh
    if not same:
        got = f"{list(grad.placements)} on {grad.device_mesh}" if is_sharded(grad) else "a tensor that is no DTensor"
        raise RuntimeError(
            f"gradient of {name}: expected it sharded as the parameter is, {list(param.placements)} on "
            f"{param.device_mesh}, got {got}; let it be redistributed first"
        )


def _check_placements(param: Any, name: str) -> None:
    for placement in param.placements:
        if not (placement.is_shard() or placement.is_replicate() or type(placement).__name__ == "_StridedShard"):
            raise RuntimeError(f"{name}: expected parameters that are sharded (Shard) or replicated, got {placement}")


def local(tensor: Tensor) -> Tensor:
    """What this process has of it, in the same memory."""
    if not is_sharded(tensor):
        return tensor
    found: Tensor = tensor.to_local()  # type: ignore[attr-defined]
    return found


def groups_of(params: Iterable[Tensor], first: Sequence[dist.ProcessGroup]) -> list[dist.ProcessGroup]:
    """`first`, and all groups of this process and others that have parts of these, in the same order everywhere."""
    found = list(first)
    for param in params:
        if is_sharded(param):
            found += _groups(param.device_mesh)  # type: ignore[attr-defined]
    return list(dict.fromkeys(found))


def _groups(mesh: Any) -> list[dist.ProcessGroup]:
    """One for each dimension; none if this process is not in the mesh."""
    return [] if mesh.get_coordinate() is None else mesh.get_all_groups()


BEGINS, READY, NOT_FINITE, FAILED = 2, 1, 0, -1
"""What a process says of a step; of several the least counts. One that only begins makes states, and nothing else."""


def agree(
    word: Tensor, groups: Sequence[dist.ProcessGroup], digests: Mapping[Any, int] = MappingProxyType({})
) -> tuple[Tensor, Tensor]:
    """The least word [1] (int32) of all processes of all these groups. Each takes what the ones before it have found.

    Args:
        word: what this process says.
        groups: of processes, in the same order everywhere.
        digests: what `digests_of` gave.

    Returns:
        The word, and whether the digests were the same in all processes of each mesh [1].

    Raises:
        ProcessError: another process has ended, or has said nothing for as long as its group's time-out is.
    """
    # The least of numbers, and of the numbers below 0, are opposite if all are the same.
    least = {mesh: word.new_tensor([digest, -digest]) for mesh, digest in digests.items()}
    for group in groups:
        meshes = [mesh for mesh in least if group in _groups(mesh)]
        said = torch.cat([word, *(least[mesh] for mesh in meshes)])
        try:
            dist.all_reduce(said, dist.ReduceOp.MIN, group=group)
        except RuntimeError as error:
            raise ProcessError(
                "step: expected all processes that have parts of the parameters to take it, but another has ended, or "
                f"said nothing until the time-out ({str(error)[:200]}); nothing was changed"
            ) from error
        word, *found = said.split([1] + [2] * len(meshes))
        least |= zip(meshes, found, strict=True)
    ends = torch.cat([word.new_zeros(2), *least.values()]).view(-1, 2)
    return word, (ends[:, 0] == -ends[:, 1]).all().reshape(1)


def digests_of(params: Iterable[Tensor], begun: Callable[[Tensor], bool]) -> dict[Any, int]:
    """For each mesh of processes a digest of which of its parameters have a gradient here, and which have `begun`."""
    flags: dict[Any, list[int]] = {}
    for param in params:
        if is_sharded(param):
            mesh: Any = param.device_mesh  # type: ignore[attr-defined]
            flags.setdefault(mesh, []).append(2 * begun(param) + (param.grad is not None))
    return {mesh: zlib.crc32(bytes(found)) >> 1 for mesh, found in flags.items()}


def groups_between(params: Sequence[Tensor]) -> tuple[dist.ProcessGroup, ...]:
    """The groups whose processes have different coordinates of these, all of them alike: none if they are whole.

    Raises:
        ValueError: some are sharded otherwise than others.
    """
    kinds = {_mesh_and_shards(param) for param in params}
    if len(kinds) > 1:
        raise ValueError(
            "params: expected all of a group sharded over the same dimensions of one mesh, for a rule whose "
            f"coordinates talk, got {len(kinds)} kinds"
        )
    mesh, shards = kinds.pop() if kinds else (None, ())
    groups = _groups(mesh) if mesh else []
    return tuple(group for group, shard in zip(groups, shards, strict=True) if shard) if groups else ()


def _mesh_and_shards(param: Any) -> tuple[Any, tuple[bool, ...]]:
    if not is_sharded(param):
        return None, ()
    return param.device_mesh, tuple(not placement.is_replicate() for placement in param.placements)


# States, as they are saved


def to_saved(state: Tensor, param: Any) -> Tensor:
    """A state of the coordinates that are here, as one of the whole parameter: a DTensor [*shape, rows]."""
    from torch.distributed.tensor import DTensor

    shape = tuple(local(param).shape)
    rows = to_rows(state, math.prod(shape)).unflatten(1, shape).movedim(0, -1).contiguous()
    whole = torch.Size((*param.shape, rows.shape[-1]))
    stride = torch.empty(whole, device="meta").stride()
    saved: Tensor = DTensor.from_local(
        rows, param.device_mesh, param.placements, run_check=False, shape=whole, stride=stride
    )
    return saved


def from_saved(saved: Tensor, param: Any, rows: int) -> Tensor:
    """The state of the coordinates of `param` that are here, from one of the whole parameter.

    Raises:
        ValueError: it is not [*shape, rows], or is sharded otherwise than the parameter.
    """
    if tuple(saved.shape) != (*param.shape, rows):
        raise ValueError(f"expected shape {[*param.shape, rows]}, got {list(saved.shape)}")
    if is_sharded(saved):
        same = (
            is_sharded(param)
            and saved.placements == param.placements  # type: ignore[attr-defined]
            and saved.device_mesh == param.device_mesh  # type: ignore[attr-defined]
        )
        if not same:
            raise ValueError(f"expected it sharded as the parameter is, got {list(saved.placements)}")  # type: ignore[attr-defined]
        here = local(saved)
    elif is_sharded(param):
        from torch.distributed.tensor import DTensor

        # Every process has all of it: it takes its own part, without asking the others.
        whole = DTensor.from_local(saved, param.device_mesh, run_check=False)
        here = local(whole.redistribute(param.device_mesh, param.placements))
    else:
        here = saved
    flat: Tensor = from_rows(here.detach().movedim(-1, 0).reshape(rows, -1).contiguous())
    return flat
