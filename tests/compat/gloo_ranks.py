"""Two processes that train the block together: DDP, FSDP2 and DTensor parameters. Each saves what it found."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, distribute_module, distribute_tensor

from checks.block_cases import SMALL
from inception_fused import FusedInception, Inception, KernelError, backend

WORLD = 2


def network(memory_format: torch.memory_format = torch.contiguous_format) -> nn.Sequential:
    """A block between two convolutions, the same on every rank."""
    torch.manual_seed(5)
    layers = [nn.Conv2d(24, 24, 1), FusedInception(*SMALL), nn.Conv2d(SMALL.out_channels, 8, 1)]
    return nn.Sequential(*layers).to(memory_format=memory_format)


def batch(rank: int) -> torch.Tensor:
    return torch.randn((2 + rank, 24, 5, 4), generator=torch.Generator().manual_seed(rank))


def step(model: nn.Module, x: torch.Tensor) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """The loss and every parameter's gradient."""
    model.zero_grad()
    loss = model(x).square().mean()
    loss.backward()
    return loss.detach(), {name.removeprefix("module."): p.grad for name, p in model.named_parameters()}


def main(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=WORLD)
    try:
        with backend("kernels"):
            found = {"ddp": _ddp(rank), "fsdp": _fsdp(rank), "dtensor": _dtensor(rank)}
        torch.save(found, Path(folder) / f"{rank}.pt")
    finally:
        dist.destroy_process_group()


def _ddp(rank: int) -> dict[str, object]:
    model = nn.parallel.DistributedDataParallel(network(torch.channels_last), gradient_as_bucket_view=True)
    messages = []
    for run, wish in ((model, "kernels"), (nn.parallel.DistributedDataParallel(_Misplaced()), "auto")):
        with warnings.catch_warnings(record=True) as caught, backend(wish):
            warnings.simplefilter("always")
            for _ in range(2):
                loss, grads = step(run, batch(rank))
        messages.append([str(w.message) for w in caught])
        if run is model:
            first = loss, {name: g.clone() for name, g in grads.items()}
    return {"loss": first[0], "grads": first[1], "warnings": messages[0], "warnings elsewhere": messages[1]}


class _Misplaced(nn.Conv2d):
    """A 1x1 convolution whose gradient has not its weight's strides in the dimensions of size 1: of what DDP warns."""

    def __init__(self) -> None:
        super().__init__(24, 8, 1)
        self.to(memory_format=torch.channels_last)
        self.weight.register_hook(lambda g: g.as_strided(g.shape, (24, 1, 1, 1)))


def _fsdp(rank: int) -> dict[str, object]:
    """The block as a unit, gathered for its own forward and backward; FSDP takes no channels_last parameters."""
    mesh = init_device_mesh("cpu", (WORLD,))
    model = network()
    for child in (model[1], model):
        fully_shard(child, mesh=mesh)
    loss, grads = step(model, batch(rank))
    found = {
        "loss": loss,
        "grads": {name: g.full_tensor() for name, g in grads.items()},
        "reason": model[1].eager_reason(),
        "sharded": isinstance(model[1].p1_1.weight, DTensor),
    }
    # Past the hook that gathers them, the parameters are shards.
    try:
        FusedInception.forward(model[1], batch(rank))
    except KernelError as error:
        found["past the hook"] = str(error)
    single = network()
    fully_shard(single[1].p2_2, mesh=mesh)
    found["reason of a sharded child"] = single[1].eager_reason()
    with backend("auto"):
        found["y of a sharded child"] = single(batch(rank)).detach()
    return found


def _dtensor(rank: int) -> dict[str, object]:
    """Parameters, or biases alone, that are DTensors outside FSDP."""
    mesh = init_device_mesh("cpu", (WORLD,))
    torch.manual_seed(5)
    block = FusedInception(*SMALL)
    plain = Inception(*SMALL)
    plain.load_state_dict(block.state_dict())
    x = batch(0)
    mixed = copy.deepcopy(block)
    distribute_module(block, mesh)
    given = distribute_tensor(x, mesh, [Replicate()])
    for name in ("p1_1", "p2_1", "p2_2", "p3_1", "p3_2", "p4_2"):
        child = getattr(mixed, name)
        child.bias = nn.Parameter(distribute_tensor(child.bias.detach(), mesh, [Replicate()]))
    refusals = []
    for module, operand in ((block, given), (block, x), (mixed, x)):
        try:
            module(operand)
        except KernelError as error:
            refusals.append(str(error))
    with backend("auto"):
        y = block(given).full_tensor()
    return {"refusals": refusals, "y": y.detach(), "expected": plain(x).detach()}
