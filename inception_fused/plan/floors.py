"""Floors: the least time that two ceilings allow each kernel of a block, and the block as one.

    floor = max(FLOP / peak, bytes / bandwidth)         one kernel; kernels in series add up

FLOP and bytes of the block's launches stand in launches.py: every input is read once and every output written once;
biases (1.5 KB a block) are left out, as are the pool's comparisons, which are no tensor core work.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch

from inception_fused.block.shapes import BlockShape
from inception_fused.plan import launches, problems


@dataclass(frozen=True)
class Ceilings:
    """What a card can do: ``bandwidth`` in bytes/s (read + written), ``flops`` in FLOP/s by dtype name ("bf16", "fp16",
    "tf32", "fp32"), ``launch`` in seconds from the end of a kernel to the beginning of the next."""

    name: str
    bandwidth: float
    flops: Mapping[str, float]
    multiprocessors: int
    launch: float

    @classmethod
    def measured(cls, name: str, found: Mapping[str, float]) -> Ceilings:
        """From what timing.measure_ceilings found on a card; fp16 is taken as bf16, TF32 that was not measured as half
        of it, fp32, the multiprocessors and the launch, where they are not there, as the H200's."""
        flops = {
            "bf16": found["bf16"],
            "fp16": found["bf16"],
            "tf32": found.get("tf32", found["bf16"] / 2),
            "fp32": H200.flops["fp32"],
        }
        multiprocessors = int(found.get("multiprocessors", H200.multiprocessors))
        launch = found["launch_us"] * 1e-6 if "launch_us" in found else H200.launch
        return cls(f"{name}, measured", found["bandwidth"], flops, multiprocessors, launch)


H200 = Ceilings(
    "NVIDIA H200", 4.3e12, {"bf16": 790e12, "fp16": 790e12, "tf32": 395e12, "fp32": 67e12}, 132, 1.3e-6
)  # fmt: skip
"""The reference card: a large device copy and a dense 8192^3 GEMM; TF32 is half of bf16, fp32 the data sheet's; the
launch is a guess. Another card's come from :meth:`Ceilings.measured`."""


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


def works(shape: BlockShape, direction: str, *, packs: bool = False) -> list[Work]:
    """The launches of a pass, "forward" or "backward", as launches.py has them. packs: whether a forward begins with
    pack."""
    # Any dtype: tiles depend on it, FLOP and bytes do not.
    found = problems.launches_of(shape, torch.float32, direction)
    skipped = direction == "forward" and not packs
    return [
        Work(item.name, item.flop, item.bytes) for item in found if not (skipped and item.row.role == launches.PACK)
    ]


def gemm(name: str, rows: int, channels: int, outputs: int, taps: int, element: int) -> Work:
    """A convolution as a GEMM: rows x outputs x (taps*channels), of ``element`` bytes each."""
    weights = channels * taps * outputs
    return Work(name, 2 * rows * weights, element * (rows * (channels + outputs) + weights))


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
