"""Bytes that PyTorch's operators name, as a count of what eager's kernels read and write."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from inception_fused.plan.floors import Work


class Traffic(TorchDispatchMode):
    """Bytes of the tensors that each operator reads and writes."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[object, int]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        leaves = torch.utils._pytree.tree_leaves((args, result))
        self.calls.append((func, sum(leaf.nbytes for leaf in leaves if isinstance(leaf, torch.Tensor))))
        return result

    @property
    def moved(self) -> dict[object, list[int]]:
        """By operator, in the order of its calls."""
        found: dict[object, list[int]] = {}
        for func, size in self.calls:
            found.setdefault(func.overloadpacket, []).append(size)
        return found


def by_name(works: Iterable[Work]) -> dict[str, Sequence[int]]:
    """Bytes of kernels by their name, in order."""
    found: dict[str, list[int]] = {}
    for work in works:
        found.setdefault(work.name, []).append(work.bytes)
    return found
