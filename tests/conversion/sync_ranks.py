"""Processes whose blocks share the statistics of their batches. Each saves what it found."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from checks.block_cases import SMALL, Block, make_block
from inception_fused import BatchNorm, InceptionParams, backend, convert_
from inception_fused.conversion.torchvision_block import TorchvisionInception
from inception_fused.op.normed_autograd import normed_block

IMAGE = (7, 5)
SPREADS = {"unequal": (2, 1), "one without images": (2, 0, 1)}
"""Images of each process."""


def block_of(double: bool, images: int) -> Block:
    return make_block(SMALL, (images, *IMAGE), torch.float64, double=double, branch3=3 if double else 5)


def leaves_of(block: Block, x: Tensor, seed: int = 1) -> tuple[list[Tensor], InceptionParams]:
    """x and every parameter as leaves, and these as a block's. Behind the second convolution BatchNorm is in eval mode,
    behind the third there is none."""
    generator = torch.Generator().manual_seed(seed)
    gammas, betas = (
        [torch.randn(w.shape[0], generator=generator).double() + shift for w in block.weights] for shift in (1, 0)
    )
    given = [t.detach().clone().requires_grad_() for t in (x, *block.weights, *block.biases, *gammas, *betas)]
    count = len(block.weights)
    weights, biases, gammas, betas = (tuple(given[1 + i * count : 1 + (i + 1) * count]) for i in range(4))
    norms: list[BatchNorm | None] = [
        BatchNorm(gamma, beta, None, None, 1e-3) for gamma, beta in zip(gammas, betas, strict=True)
    ]
    mean, var = (torch.rand(len(gammas[1]), generator=generator).double() for _ in range(2))
    norms[1], norms[2] = norms[1]._replace(mean=mean, var=var), None
    return given, InceptionParams(weights, biases, tuple(norms))


def gradients(y: Tensor, leaves: Sequence[Tensor], dy: Tensor) -> list[Tensor]:
    found = torch.autograd.grad(y, leaves, dy, allow_unused=True)
    return [torch.zeros_like(t) if g is None else g for t, g in zip(leaves, found, strict=True)]


def share_of(whole: Tensor, rank: int, spread: Sequence[int]) -> Tensor:
    return whole.split(list(spread))[rank]


def gradient_for(images: int, seed: int = 2) -> Tensor:
    return torch.randn((images, SMALL.out_channels, *IMAGE), generator=torch.Generator().manual_seed(seed)).double()


def network() -> nn.Module:
    torch.manual_seed(3)
    return TorchvisionInception(24, 16, 8, 24, 8, 16, 8)


def main(rank: int, folder: str, spread: tuple[int, ...]) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=len(spread))
    try:
        found = {double: _function(rank, spread, double) for double in (False, True)}
        found["module"] = _module(rank, spread)
        found["single values"] = _single_values(rank)
        torch.save(found, Path(folder) / f"{rank}.pt")
    finally:
        dist.destroy_process_group()


def _function(rank: int, spread: Sequence[int], double: bool) -> dict[str, Any]:
    """By ATen's twins in float64."""
    block = block_of(double, sum(spread))
    leaves, params = leaves_of(block, share_of(block.x, rank, spread))
    y, statistics = normed_block(leaves[0], params, relu=True, backend="auto", group=dist.group.WORLD.group_name)
    grads = gradients(y, leaves, share_of(gradient_for(sum(spread)), rank, spread))
    return {"y": y.detach(), "statistics": statistics, "grads": grads}


def _module(rank: int, spread: Sequence[int]) -> dict[str, Any]:
    """A converted block by interpreted kernels, two steps in training, then one in eval."""
    model = nn.SyncBatchNorm.convert_sync_batchnorm(copy.deepcopy(network()))
    convert_(model)
    ys, dy = [], gradient_for(sum(spread)).float()
    with backend("kernels"):
        for seed in range(2):
            model.zero_grad()
            x = torch.randn((sum(spread), 24, *IMAGE), generator=torch.Generator().manual_seed(seed))
            y = model(share_of(x, rank, spread))
            y.backward(share_of(dy, rank, spread))
            ys.append(y.detach())
        model.eval()
        # On one process alone, since nothing is shared in eval mode.
        evaluated = model(x).detach() if rank == 0 else None
    grads = {name: p.grad for name, p in model.named_parameters()}
    return {"ys": ys, "grads": grads, "buffers": dict(model.named_buffers()), "eval": evaluated}


def _single_values(rank: int) -> Tensor:
    """One value a channel on each process, which together are several."""
    model = nn.SyncBatchNorm.convert_sync_batchnorm(network())
    convert_(model)
    x = torch.randn((1, 24, 1, 1), generator=torch.Generator().manual_seed(rank))
    with backend("kernels"):
        return model(x).detach()
