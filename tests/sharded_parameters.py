"""What the processes of tests/test_processes.py do with sharded parameters."""

from __future__ import annotations

import functools
import json
import sys
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from helpers import RNNPROP, randomized, rule_of
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

from fastl2l import FusedLSTMOptimizer, GACRule, NTMRule, processes
from fastl2l.ops.coordinates import mean_of
from fastl2l.rules import stepping

FULL = StateDictOptions(full_state_dict=True, cpu_offload=True)


def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3))


def distributed(value, param):
    return distribute_tensor(value, param.device_mesh, param.placements) if isinstance(param, DTensor) else value


def run(optimizer, net, steps):
    for step in steps:
        random = torch.Generator().manual_seed(step)
        for param in net.parameters():
            param.grad = distributed(torch.randn(param.shape, generator=random), param)
        optimizer.step()


def whole(net):
    return [param.full_tensor() if isinstance(param, DTensor) else param.detach().clone() for param in net.parameters()]


def same(one, other) -> bool:
    return all(torch.equal(a, b) for a, b in zip(whole(one), whole(other), strict=True))


def at_the_same_place(net, other):
    for param, value in zip(net.parameters(), whole(other), strict=True):
        param.data.copy_(distributed(value, param))


def refuses(optimizer, net, spoil) -> bool:
    """Whether a NaN of the first process alone is an error in all, and nothing has changed."""
    run(optimizer, net, [7])
    before = whole(net)
    if dist.get_rank() == 0:
        spoil()
    try:
        optimizer.step()
    except FloatingPointError:
        return all(torch.equal(a, b) for a, b in zip(before, whole(net), strict=True))
    return False


def sharded(folder: Path, *, save: bool) -> dict[str, bool]:
    rule, found = stepping(rule_of(RNNPROP), relative=True, ramp=4), {}
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    made = functools.partial(FusedLSTMOptimizer, rule=rule)

    def fsdp():
        net = model()
        fully_shard(net, mesh=mesh)
        return net, made(net.named_parameters())

    plain = model()
    optimizer = made(plain.parameters())
    run(optimizer, plain, range(3))
    net, of_net = fsdp()
    run(of_net, net, range(3))
    found["fully_shard"] = same(net, plain)
    if save:
        dcp.save(
            {"model": get_model_state_dict(net), "optim": get_optimizer_state_dict(net, of_net)},
            checkpoint_id=folder / "checkpoint",
        )
        full = get_optimizer_state_dict(net, of_net, options=FULL)
        if dist.get_rank() == 0:
            torch.save(full, folder / "full.pt")
        dist.barrier()

    loaded = {"checkpoint": fsdp(), "full": fsdp(), "of an unsharded one": fsdp(), "full, unsharded": (model(), None)}
    net, of_net = loaded["checkpoint"]
    saved = {"model": get_model_state_dict(net), "optim": get_optimizer_state_dict(net, of_net)}
    dcp.load(saved, checkpoint_id=folder / "checkpoint")
    set_model_state_dict(net, saved["model"])
    set_optimizer_state_dict(net, of_net, saved["optim"])
    found["checkpoint, parameters"] = same(net, plain)
    loaded["of an unsharded one"][1].load_state_dict(optimizer.state_dict())
    loaded["full, unsharded"] = (loaded["full, unsharded"][0], made(loaded["full, unsharded"][0].named_parameters()))
    for name in ("full", "full, unsharded"):
        net, of_net = loaded[name]
        full = torch.load(folder / "full.pt", weights_only=False)
        set_optimizer_state_dict(net, of_net, full, options=StateDictOptions(full_state_dict=True))
    for net, _ in loaded.values():
        at_the_same_place(net, plain)
    run(optimizer, plain, (3, 4))
    for name, (net, of_net) in loaded.items():
        run(of_net, net, (3, 4))
        found[name] = same(net, plain)

    net, of_net = loaded["checkpoint"]
    found["not finite"] = refuses(of_net, net, lambda: next(net.parameters()).grad.to_local().fill_(torch.nan))
    return found


def talking(folder: Path, *, save: bool) -> dict[str, bool]:
    """Under a rule whose coordinates talk to those of other processes, through means summed in another order."""
    rule, found = randomized(GACRule(averages=(2, 3), hidden_size=6, output_scale=0.3, ramp=3)), {}
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))

    def close(one, other) -> bool:
        pairs = zip(whole(one), whole(other), strict=True)
        return all(torch.allclose(a, b, rtol=1e-5, atol=1e-6) for a, b in pairs)

    def fsdp(made=model):
        net = made()
        fully_shard(net, mesh=mesh)
        return net, FusedLSTMOptimizer(net.named_parameters(), rule)

    def one_row():
        torch.manual_seed(0)
        return nn.Linear(4, 1)

    little, (net, of_net) = one_row(), fsdp(one_row)  # all of it is in the first process
    run(FusedLSTMOptimizer(little.parameters(), rule), little, range(3))
    run(of_net, net, range(3))
    found["talking, nothing here"] = close(net, little) and not close(net, one_row())
    plain, (net, of_net), (other, of_other) = model(), fsdp(), fsdp()
    optimizer = FusedLSTMOptimizer(plain.parameters(), rule)
    run(optimizer, plain, range(3))
    run(of_net, net, range(3))
    found["talking"] = close(net, plain) and not close(net, model())
    saved = {"model": get_model_state_dict(net), "optim": get_optimizer_state_dict(net, of_net)}
    if save:
        dcp.save(saved, checkpoint_id=folder / "talking")
    saved = {"model": get_model_state_dict(other), "optim": get_optimizer_state_dict(other, of_other)}
    dcp.load(saved, checkpoint_id=folder / "talking")
    set_model_state_dict(other, saved["model"])
    set_optimizer_state_dict(other, of_other, saved["optim"])
    run(optimizer, plain, (3, 4))
    run(of_other, other, (3, 4))
    found["talking, loaded"] = close(other, plain)
    net = model()
    parallelize_module(net, mesh, {"0": ColwiseParallel(), "2": RowwiseParallel()})
    for name, one in {"sharded and replicated": rule, "with a memory": NTMRule("pairs", pairs=2)}.items():
        params = net.named_parameters() if one is rule else other.named_parameters()
        found[f"refused, {name}"] = refused(params, one)
    return found


def at_rate_0() -> dict[str, bool]:
    """A warm-up whose first rate is 0, while the first process has gradients of 0 alone."""
    found = {}

    def moved(net, rule, **options):
        optimizer = FusedLSTMOptimizer(net.parameters(), rule, **options)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, step / 2))
        for step in range(4):
            random = torch.Generator().manual_seed(step)
            for param in net.parameters():
                gradient = torch.randn(param.shape, generator=random)
                gradient[: len(gradient) // 2] *= step > 0
                param.grad = distributed(gradient, param)
            optimizer.step()
            schedule.step()
        return torch.cat([value.flatten() for value in whole(net)])

    for name, (rule, options) in {
        "lstm": (rule_of("raw:0.7 lstm:5 linear"), {}),
        "ramp, propagate": (stepping(rule_of(RNNPROP), ramp=4), {"nonfinite": "propagate"}),
        "talking": (randomized(GACRule(averages=(2, 3), hidden_size=6, ramp=3)), {}),
    }.items():
        plain, net = (nn.Linear(3, 4, bias=False) for _ in range(2))
        for param in (plain.weight, net.weight):
            param.data = torch.linspace(-1, 1, 12).view(4, 3)
        fully_shard(net)
        mine, theirs = moved(net, rule, **options), moved(plain, rule, **options)
        found[f"rate 0, {name}"] = torch.allclose(mine, theirs, rtol=1e-5, atol=1e-6 if name == "talking" else 0.0)
        found[f"rate 0, {name}, moves"] = bool((mine != torch.linspace(-1, 1, 12)).all())
    return found


def refused(params, rule) -> bool:
    try:
        FusedLSTMOptimizer(params, rule)
    except ValueError as error:
        return str(error).startswith("params: expected")
    return False


def in_parallel() -> dict[str, bool]:
    """Tensor parallelism, DDP and ZeRO."""
    rule, found, size = rule_of(RNNPROP), {}, dist.get_world_size()
    plain = model()
    run(FusedLSTMOptimizer(plain.parameters(), rule), plain, range(3))

    net = model()
    parallelize_module(net, init_device_mesh("cpu", (size,)), {"0": ColwiseParallel(), "2": RowwiseParallel()})
    run(FusedLSTMOptimizer(net.named_parameters(), rule), net, range(3))
    found["tensor parallelism"] = same(net, plain)

    net = model()
    parallel = nn.parallel.DistributedDataParallel(net)
    optimizer = FusedLSTMOptimizer(parallel.parameters(), rule)
    for step in range(2):
        optimizer.zero_grad()
        inputs = torch.randn(4, 5, generator=torch.Generator().manual_seed(10 * step + dist.get_rank()))
        parallel(inputs).square().mean().backward()
        optimizer.step()
    ranks = [None] * size
    dist.all_gather_object(ranks, [value.tolist() for value in whole(net)])
    found["DDP"] = all(one == ranks[0] for one in ranks) and not same(net, model())

    net = model()
    constructor = functools.partial(FusedLSTMOptimizer, group=dist.group.WORLD)
    zero = ZeroRedundancyOptimizer(net.parameters(), constructor, rule=rule)
    run(zero, net, range(3))
    found["ZeRO"] = same(net, plain)
    owned = [param for group in zero.optim.param_groups for param in group["params"]]
    found["ZeRO, not finite"] = refuses(zero, net, lambda: owned[0].grad.fill_(torch.nan))

    mine = torch.arange(10.0).split([3, 7])[dist.get_rank()].repeat(2, 1)
    found["means"] = mean_of(mine.sum(1), mine.shape[1], [dist.group.WORLD]).tolist() == [4.5, 4.5]
    return found


if __name__ == "__main__":
    torch.set_num_threads(1)
    name, folder = sys.argv[1], Path(sys.argv[2])
    with processes.joined() as group:
        answer = sharded(folder, save=name == "save") | talking(folder, save=name == "save")
        if name == "save":
            answer |= in_parallel() | at_rate_0()
        (folder / f"{name}-{group.size}-{group.rank}.json").write_text(json.dumps(answer))
