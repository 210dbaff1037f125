"""A copy of a block on which it can be tried: other memory, other values, on the CPU in float64."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from inception_fused.errors import InceptionInputError
from inception_fused.modules.structure import NORMS

FRESH_BATCHES = 3
"""num_batches_tracked of the copy's BatchNorms, which some count from."""


def random_values(shape: Sequence[int], seed: int) -> Tensor:
    """Normal random values in float64 on the CPU, whatever the defaults are."""
    generator = torch.Generator("cpu").manual_seed(seed)
    return torch.randn(tuple(shape), generator=generator, dtype=torch.float32, device="cpu").double()


def drawn_anew(module: nn.Module, kind: type[nn.Module]) -> nn.Module:
    """A copy in float64 on the CPU with random values, of class kind."""
    twin = copy.deepcopy(module)
    if set(twin.modules()) & set(module.modules()) or _storages(twin) & _storages(module):
        raise InceptionInputError("a copy of it shares modules or memory with it")
    object.__setattr__(twin, "__class__", kind)
    twin = twin.to_empty(device="cpu").to(torch.float64)
    seeds = itertools.count()

    def fill(t: Tensor | None, scale: float, shift: float = 0.0) -> None:
        if t is not None:
            t.copy_(random_values(t.shape, next(seeds)) * scale + shift)

    with torch.no_grad():
        for inner in twin.modules():
            if isinstance(inner, nn.Conv2d):
                fill(inner.weight, (2 / inner.weight[0].numel()) ** 0.5)
                fill(inner.bias, 0.3)
            elif isinstance(inner, NORMS):
                # What SyncBatchNorm computes of one process's rows; on a CPU itself it refuses to.
                object.__setattr__(inner, "__class__", nn.BatchNorm2d)
                fill(inner.weight, 0.5, 1.0)
                fill(inner.bias, 0.3)
                fill(inner.running_mean, 0.3)
                if inner.running_var is not None:
                    inner.running_var.copy_(random_values(inner.running_var.shape, next(seeds)).square() + 0.5)
                if inner.num_batches_tracked is not None:
                    inner.num_batches_tracked.fill_(FRESH_BATCHES)
    twin.zero_grad(set_to_none=True)
    return twin


def _storages(module: nn.Module) -> set[int]:
    """Addresses of the tensors themselves and of what they hold."""
    tensors = [t for t in (*module.parameters(), *module.buffers()) if t.numel()]
    return {*map(id, tensors), *(t.data_ptr() for t in tensors if not t.is_meta)}
