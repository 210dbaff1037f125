"""Floors: the least time that two ceilings allow each kernel of a block, and the block as one.

    floor = max(FLOP / peak, bytes / bandwidth)         one kernel; kernels in series add up

With M = N*H*W rows, e bytes per element, C input channels and [c1 | c2[1] | c3[1] | c4] output slices:

    K1  GEMM        M x (c1 + c2[0] + c3[0]) x C    reads x and three weights, writes a slice of y, and r
    K2  pool, GEMM  M x c4 x C                      reads x and one weight, writes a slice of y
    K3  3x3         M x c2[1] x 9*c2[0]             reads its part of r and one weight, writes a slice of y
    K4  5x5 or 3x3  M x c3[1] x 25*c3[0], 9*c3[0]   the same

and backwards B1 to B5, whose GEMMs have twice the FLOP of the forward's; plan.py says what each reads.

A GEMM of GEMM_M x GEMM_N x GEMM_K is 2*M*N*K FLOP (the taps that fall on zero padding counted, as a GEMM
does them). Every input is read once and every output written once; biases (1.5 KB a block) are left out, as
are the pool's comparisons, which are no tensor core work.

``branch3`` is everywhere the window of the third branch, 5 or 3.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from inception_fused.shapes import BlockShape

PARTIAL_SUM_BYTES = 4


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


def gemm(name: str, rows: int, channels: int, outputs: int, taps: int, element: int) -> Work:
    """A convolution as a GEMM: rows x outputs x (taps*channels), of ``element`` bytes each."""
    weights = channels * taps * outputs
    return Work(name, 2 * rows * weights, element * (rows * (channels + outputs) + weights))


def forward_kernels(shape: BlockShape, *, branch3: int = 5) -> tuple[Work, ...]:
    """The four launches K1 to K4 of a block."""
    rows, e, c = shape.gemm_m, shape.itemsize, shape.c
    return (
        gemm("K1", rows, c, shape.k1 + shape.k2_reduce + shape.k3_reduce, 1, e),
        gemm("K2", rows, c, shape.k4, 1, e),
        gemm("K3", rows, shape.k2_reduce, shape.k2, 9, e),
        gemm("K4", rows, shape.k3_reduce, shape.k3, branch3**2, e),
    )


def pack(shape: BlockShape, *, branch3: int = 5) -> Work:
    """The launch that rewrites the weights: casts, transposes or folds them."""
    return Work("pack", 0, 2 * shape.itemsize * weight_count(shape, branch3=branch3))


def backward_kernels(shape: BlockShape, *, branch3: int = 5) -> tuple[Work, ...]:
    """The launches of a backward for all gradients, named as ops.BACKWARD_LAUNCHES.

    Of the partial sums of weight gradients, fp32, one part is charged, which is the least there can be; parameters
    are taken in the compute dtype.
    """
    rows, e, c, taps5 = shape.gemm_m, shape.itemsize, shape.c, branch3**2
    r3, k3, r5, k5, k4 = shape.k2_reduce, shape.k2, shape.k3_reduce, shape.k3, shape.k4
    reductions, y, weights = shape.k1 + r3 + r5, shape.k, weight_count(shape, branch3=branch3)

    def dgrad(name: str, k: int, channels: int, taps: int, mask: bool) -> Work:
        work = gemm(name, rows, k, channels, taps, e)
        return Work(name, work.flop, work.bytes + mask * e * rows * channels)

    def wgrad(name: str, k: int, channels: int, taps: int) -> Work:
        size = k * channels * taps
        return Work(name, 2 * rows * size, e * rows * (k + channels) + PARTIAL_SUM_BYTES * size)

    grouped = gemm("B3", rows, reductions, c, 1, e)
    return (
        pack(shape, branch3=branch3),
        Work("B1", 0, rows * (2 * e * y + y // 8)),
        dgrad("B2 3x3", k3, r3, 9, mask=True),
        dgrad("B2 5x5", k5, r5, taps5, mask=True),
        dgrad("B2 1x1", k4, c, 1, mask=False),
        Work("B3", grouped.flop, grouped.bytes + rows * (e * c + c // 2)),
        wgrad("B4 1x1", reductions, c, 1),
        wgrad("B4 3x3", k3, r3, 9),
        wgrad("B4 5x5", k5, r5, taps5),
        wgrad("B4 pool", k4, c, 1),
        Work("B5", 0, (PARTIAL_SUM_BYTES + e) * weights),
    )


def block_work(shape: BlockShape, *, branch3: int = 5, training: bool = False) -> Work:
    """A whole block as one ideal kernel: reads x and the weights, writes y; nothing else leaves the chip.

    With ``training`` the backward is added: twice the FLOP (dgrad and wgrad); reads x, dy and the weights,
    writes dx and dw in the parameters' dtype. Saved activations are not charged, so no design can beat it.
    """
    rows, e = shape.gemm_m, shape.itemsize
    x, y, w = rows * shape.c, rows * shape.k, weight_count(shape, branch3=branch3)
    flop = sum(work.flop for work in forward_kernels(shape, branch3=branch3))
    if training:
        return Work("block fwd+bwd", 3 * flop, e * (3 * x + 2 * y + 3 * w))
    return Work("block fwd", flop, e * (x + y + w))


def convolutions(shape: BlockShape, *, branch3: int = 5) -> list[tuple[int, int, int]]:
    """(input channels, output channels, taps) of the six."""
    pointwise = [(shape.c, k, 1) for k in (shape.k1, shape.k2_reduce, shape.k3_reduce, shape.k4)]
    return [*pointwise, (shape.k2_reduce, shape.k2, 9), (shape.k3_reduce, shape.k3, branch3**2)]


def weight_count(shape: BlockShape, *, branch3: int = 5) -> int:
    """Elements of the six weights of a block."""
    return sum(channels * outputs * taps for channels, outputs, taps in convolutions(shape, branch3=branch3))
