"""Floors: the least time that two ceilings allow each kernel of a block, and the block as one.

    floor = max(FLOP / peak, bytes / bandwidth)         one kernel; kernels in series add up

The ceilings stand in cards.py, FLOP and bytes of the block's launches in problems.py: every input is read once and
every output written once; biases (1.5 KB a block) are left out, as are the pool's comparisons, which are no tensor core
work.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch

from inception_fused.block.shapes import BlockShape
from inception_fused.plan import launches, problems
from inception_fused.plan.cards import Ceilings


@dataclass(frozen=True)
class Work:
    """What one kernel must do: ``flop`` on the matrix units and ``bytes`` through device memory."""

    name: str
    flop: int
    bytes: int

    def floor(self, ceilings: Ceilings, dtype: str) -> float:
        """Seconds, the larger of the two terms."""
        return max(self.flop / ceilings.flops[dtype], self.bytes / ceilings.bandwidth)

    def bound(self, ceilings: Ceilings, dtype: str) -> str:
        """Which of the two terms is the floor: "C" (compute) or "M" (memory)."""
        compute = self.flop / ceilings.flops[dtype] >= self.bytes / ceilings.bandwidth
        return "C" if compute else "M"


def total(works: Iterable[Work], ceilings: Ceilings, dtype: str) -> float:
    """Seconds that kernels in series cannot beat: the sum of their floors."""
    return sum(work.floor(ceilings, dtype) for work in works)


def works(shape: BlockShape, direction: str, *, packs: bool = False, normed: bool = False) -> list[Work]:
    """The launches of a pass, "forward" or "backward", as launches.py has them, each alone. packs: whether a forward
    begins with pack. normed: whether BatchNorm takes the statistics of the batch."""
    # Any dtype: tiles depend on it, FLOP and bytes do not.
    found = problems.launches_of(shape, torch.float32, direction, normed=normed)
    skipped = direction == "forward" and not packs
    return [
        Work(item.name, item.flop, item.bytes) for item in found if not (skipped and item.row.role == launches.PACK)
    ]


def joined(name: str, works: Iterable[Work]) -> Work:
    """Several kernels as one launch."""
    works = list(works)
    return Work(name, sum(work.flop for work in works), sum(work.bytes for work in works))


def block_work(shape: BlockShape, *, training: bool = False) -> Work:
    """A whole block as one ideal kernel: reads x and the weights, writes y; nothing else leaves the chip.

    With ``training`` the backward is added: twice the FLOP (dgrad and wgrad); reads x, dy and the weights,
    writes dx and dw in the parameters' dtype. Saved activations are not charged, so no design can beat it.
    """
    rows, e, w = shape.gemm_m, shape.itemsize, sum(shape.weight_sizes)
    x, y, flop = rows * shape.c, rows * shape.k, 2 * rows * w
    if training:
        return Work("block fwd+bwd", 3 * flop, e * (3 * x + 2 * y + 3 * w))
    return Work("block fwd", flop, e * (x + y + w))
