"""Weights brought into channels_last in place, but for those whose storage is tied to something else."""

from __future__ import annotations

from collections import Counter

import torch
from torch import Tensor, nn

STRIDES = "_inception_fused_strides"
"""The attribute of a module whose weights were brought into channels_last: by name their shape and strides before."""


def to_channels_last(model: nn.Module) -> None:
    """Brings the weights of the convolutions there are into channels_last, but for those whose storage is not theirs
    alone; revert_() knows their strides before."""
    shared = shared_storages(model)
    before: dict[Tensor, tuple[torch.Size, tuple[int, ...]]] = {}
    with torch.inference_mode(False):
        for module in (m for m in model.modules() if isinstance(m, nn.Conv2d)):
            for name, weight in module._parameters.items():
                if weight is None or not _is_plain(weight) or weight.dim() != 4:
                    continue
                ready = weight.is_contiguous(memory_format=torch.channels_last)
                if weight not in before and (ready or not owns_storage(weight, shared)):
                    continue
                # A parameter that two modules share has its strides noted in both.
                noted = before.setdefault(weight, (weight.shape, weight.stride()))
                module.__dict__.setdefault(STRIDES, {}).setdefault(name, noted)
                weight.data = weight.data.contiguous(memory_format=torch.channels_last)


def shared_storages(model: nn.Module) -> set[int]:
    """The storages that more than one of a model's parameters and buffers lie in."""
    owners = Counter(t.untyped_storage()._cdata for t in (*model.parameters(), *model.buffers()) if _is_plain(t))
    return {storage for storage, count in owners.items() if count > 1}


def owns_storage(t: Tensor, shared: set[int]) -> bool:
    """Whether moving a tensor into a new storage leaves nothing behind that it was tied to. shared: of its model."""
    if not _is_plain(t):
        return False
    storage = t.untyped_storage()
    # PyTorch calls every tensor on a GPU shared.
    elsewhere = storage._cdata in shared or (t.device.type == "cpu" and t.is_shared())
    return not elsewhere and storage.nbytes() == t.numel() * t.element_size() and 0 not in t.stride()


def _is_plain(t: Tensor) -> bool:
    """Neither a tensor subclass, whose storage is its own affair, nor without a size yet."""
    return not isinstance(t, nn.parameter.UninitializedTensorMixin) and type(t.data) is Tensor
