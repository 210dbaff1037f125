"""Two processes that train, broadcast and checkpoint converted models. Each saves what it found."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from clients import C1, C2, C3, C4, C, OldD2l
from inception_fused import backend, convert_, revert_

WORLD = 2

WRAPPERS = {
    "wrapped first": {},
    "wrapped first, buckets never rebuilt": {"find_unused_parameters": True},
    "wrapped first, gradients in the buckets": {"gradient_as_bucket_view": True},
}
"""DistributedDataParallel's options, of models that are converted inside it. Its buckets know the strides of before."""


def network(seed: int = 5) -> nn.Sequential:
    """A block between two convolutions."""
    torch.manual_seed(seed)
    return nn.Sequential(nn.Conv2d(3, C, 3, padding=1), OldD2l(C, C1, C2, C3, C4), nn.Conv2d(64, 8, 1))


def places(model: nn.Module) -> list[tuple[object, ...]]:
    """What somebody may have recorded of every parameter: identity, address, strides."""
    return [(id(p), p.untyped_storage().data_ptr(), p.data_ptr(), p.stride()) for p in model.parameters()]


def values(model: nn.Module) -> dict[str, Tensor]:
    return {name: t.detach().clone() for name, t in model.state_dict().items()}


def train(model: nn.Module, rank: int) -> tuple[list[Tensor], list[Tensor]]:
    """Gradients of two steps of SGD, and the parameters after them."""
    grads = []
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    for step in range(2):
        optimizer.zero_grad()
        x = torch.randn((1, 3, 5, 4), generator=torch.Generator().manual_seed(10 * step + rank))
        model(x).square().mean().backward()
        grads += [p.grad.clone() for p in model.parameters()]
        optimizer.step()
    return grads, [p.detach().clone() for p in model.parameters()]


def main(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=WORLD)
    try:
        found = {"truth": train(DistributedDataParallel(network()), rank)}
        with backend("kernels"):
            found |= _converted_first(rank)
        for name, options in WRAPPERS.items():
            model = convert_(DistributedDataParallel(network(), **options), strict=True)
            # Interpreted once: buckets do not ask what a gradient was computed by.
            with backend("auto" if options else "kernels"):
                found[name] = train(model, rank)
        found |= {"broadcast": _broadcast(rank), "checkpoint": _checkpoint(folder)}
        torch.save(found, Path(folder) / f"{rank}.pt")
    finally:
        dist.destroy_process_group()


def _converted_first(rank: int) -> dict[str, object]:
    model = network()
    before = places(model)
    trained = train(DistributedDataParallel(convert_(model, strict=True)), rank)
    kept = places(model) == before
    revert_(model)
    return {"converted first": trained, "places": kept, "places after revert_": places(model) == before}


def _broadcast(rank: int) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The state after rank 0, converted, has sent its own to rank 1, and after rank 1 has sent it back."""
    model, found = network(seed=rank), []
    if rank == 0:
        convert_(model, strict=True)
    for source in (0, 1):
        for t in model.state_dict().values():
            dist.broadcast(t, source)
        found.append(values(model))
        with torch.no_grad():
            for p in model.parameters():
                p.mul_(2 + rank)
    return found[0], found[1]


def _checkpoint(folder: str) -> dict[str, object]:
    """A converted model's checkpoint in another that is not, and the other way round."""
    found = {}
    for way, (convert_source, convert_target) in {"out": (True, False), "back": (False, True)}.items():
        source, target = network(seed=1), network(seed=2)
        for model, chosen in ((source, convert_source), (target, convert_target)):
            if chosen:
                convert_(model, strict=True)
        before = places(target)
        dcp.save({"model": source.state_dict()}, checkpoint_id=f"{folder}/{way}")
        state = {"model": target.state_dict()}
        dcp.load(state, checkpoint_id=f"{folder}/{way}")
        target.load_state_dict(state["model"])
        strides = [t.stride() for model in (source, target) for t in model.state_dict().values()]
        found[way] = values(source), values(target), places(target) == before, strides
    return found
