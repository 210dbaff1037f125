"""Floors: the least time that two ceilings allow each kernel, each block and the network's nine blocks.

    floor = max(FLOP / peak, bytes / bandwidth)         one kernel; kernels in series add up

With M = N*H*W rows, e bytes per element, C input channels and [c1 | c2[1] | c3[1] | c4] output slices:

    K1  GEMM        M x (c1 + c2[0] + c3[0]) x C    reads x and three weights, writes a slice of y, and r
    K2  pool, GEMM  M x c4 x C                      reads x and one weight, writes a slice of y
    K3  3x3         M x c2[1] x 9*c2[0]             reads its part of r and one weight, writes a slice of y
    K4  5x5         M x c3[1] x 25*c3[0]            the same

and backwards B1 to B5, whose GEMMs have twice the FLOP of the forward's; inception_fused/plan.py says what each reads.

A GEMM of GEMM_M x GEMM_N x GEMM_K is 2*M*N*K FLOP (the taps that fall on zero padding counted, as a GEMM
does them). Every input is read once and every output written once; biases (1.5 KB a block) are left out, as
are the pool's comparisons, which are no tensor core work. Run as a script it prints the table.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from inception_fused.googlenet import GOOGLENET_BLOCKS, InceptionConfig, spatial_size

ELEMENT_BYTES = {"bf16": 2, "fp16": 2, "tf32": 4, "fp32": 4}
INDEX_BYTES = 8
"""Eager's max-pool writes an int64 index beside each element."""

PARTIAL_SUM_BYTES = 4


@dataclass(frozen=True)
class Ceilings:
    """What a card can do: ``bandwidth`` in bytes/s (read + written), ``flops`` in FLOP/s by dtype name."""

    name: str
    bandwidth: float
    flops: Mapping[str, float]

    @classmethod
    def measured(cls, name: str, found: Mapping[str, float]) -> Ceilings:
        """From what timing.measure_ceilings found on a card; fp16 is taken as bf16, fp32 as the H200's."""
        flops = {
            "bf16": found["bf16"],
            "fp16": found["bf16"],
            "tf32": found["tf32"],
            "fp32": H200.flops["fp32"],
        }
        return cls(f"{name}, measured", found["bandwidth"], flops)


H200 = Ceilings("NVIDIA H200", 4.3e12, {"bf16": 790e12, "fp16": 790e12, "tf32": 395e12, "fp32": 67e12})
"""The reference card of the printed tables: a large device copy and a dense 8192^3 GEMM; TF32 is half of
bf16, fp32 the data sheet's. Another card's come from :meth:`Ceilings.measured`."""


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


def _gemm(name: str, rows: int, channels: int, outputs: int, taps: int, element: int) -> Work:
    weights = channels * taps * outputs
    return Work(name, 2 * rows * weights, element * (rows * (channels + outputs) + weights))


def forward_kernels(config: InceptionConfig, batch: int, size: int, dtype: str) -> tuple[Work, ...]:
    """The four launches K1 to K4 of a block on x [batch, in_channels, size, size]."""
    rows, e, c = batch * size * size, ELEMENT_BYTES[dtype], config.in_channels
    return (
        _gemm("K1", rows, c, config.c1 + config.c2[0] + config.c3[0], 1, e),
        _gemm("K2", rows, c, config.c4, 1, e),
        _gemm("K3", rows, *config.c2, 9, e),
        _gemm("K4", rows, *config.c3, 25, e),
    )


def backward_kernels(config: InceptionConfig, batch: int, size: int, dtype: str) -> tuple[Work, ...]:
    """The launches of a backward for all gradients, named as ops.BACKWARD_LAUNCHES.

    Of the partial sums of weight gradients, fp32, one part is charged, which is the least there can be; parameters
    are taken in the compute dtype.
    """
    rows, e, c = batch * size * size, ELEMENT_BYTES[dtype], config.in_channels
    (r3, k3), (r5, k5), k4 = config.c2, config.c3, config.c4
    reductions, y, weights = config.c1 + r3 + r5, config.out_channels, weight_count(config)

    def dgrad(name: str, k: int, channels: int, taps: int, mask: bool) -> Work:
        work = _gemm(name, rows, k, channels, taps, e)
        return Work(name, work.flop, work.bytes + mask * e * rows * channels)

    def wgrad(name: str, k: int, channels: int, taps: int) -> Work:
        size = k * channels * taps
        return Work(name, 2 * rows * size, e * rows * (k + channels) + PARTIAL_SUM_BYTES * size)

    grouped = _gemm("B3", rows, reductions, c, 1, e)
    return (
        Work("pack", 0, 2 * e * weights),
        Work("B1", 0, rows * (2 * e * y + y // 8)),
        dgrad("B2 3x3", k3, r3, 9, mask=True),
        dgrad("B2 5x5", k5, r5, 25, mask=True),
        dgrad("B2 1x1", k4, c, 1, mask=False),
        Work("B3", grouped.flop, grouped.bytes + rows * (e * c + c // 2)),
        wgrad("B4 1x1", reductions, c, 1),
        wgrad("B4 3x3", k3, r3, 9),
        wgrad("B4 5x5", k5, r5, 25),
        wgrad("B4 pool", k4, c, 1),
        Work("B5", 0, (PARTIAL_SUM_BYTES + e) * weights),
    )


def weight_count(config: InceptionConfig) -> int:
    """Elements of the six weights of a block."""
    return sum(channels * outputs * taps for channels, outputs, taps in _convolutions(config))


def block_work(config: InceptionConfig, batch: int, size: int, dtype: str, *, training: bool = False) -> Work:
    """A whole block as one ideal kernel: reads x and the weights, writes y; nothing else leaves the chip.

    With ``training`` the backward is added: twice the FLOP (dgrad and wgrad); reads x, dy and the weights,
    writes dx and dw in the parameters' dtype. Saved activations are not charged, so no design can beat it.
    """
    rows, e = batch * size * size, ELEMENT_BYTES[dtype]
    x, y, w = rows * config.in_channels, rows * config.out_channels, weight_count(config)
    flop = sum(work.flop for work in forward_kernels(config, batch, size, dtype))
    if training:
        return Work("block fwd+bwd", 3 * flop, e * (3 * x + 2 * y + 3 * w))
    return Work("block fwd", flop, e * (x + y + w))


def eager_backward_kernels(config: InceptionConfig, batch: int, size: int, dtype: str) -> tuple[Work, ...]:
    """The 29 launches of the eager backward for all gradients, in autograd's order: six times ReLU's mask, the
    bias's sum, dgrad and wgrad; the pool's zeros and scatter; three sums of two gradients to x. The
    concatenation's gradient is views."""
    rows, e, c = batch * size * size, ELEMENT_BYTES[dtype], config.in_channels
    first, second, third, fourth, wide, widest = _convolutions(config)
    x = e * rows * c

    def convolution(channels: int, outputs: int, taps: int) -> list[Work]:
        dy = e * rows * outputs
        gemms = [_gemm(name, rows, channels, outputs, taps, e) for name in ("dgrad", "wgrad")]
        return [Work("relu'", 0, 3 * dy), Work("db", 0, dy), *gemms]

    pool = [Work("zeros", 0, x), Work("pool'", 0, rows * c * (2 * e + INDEX_BYTES))]
    add = Work("add", 0, 3 * x)
    branches = [*convolution(*fourth), *pool]
    for branch in ((widest, third), (wide, second), (first,)):
        for one in branch:
            branches += convolution(*one)
        branches.append(add)
    return tuple(branches)


def eager_kernels(config: InceptionConfig, batch: int, size: int, dtype: str) -> tuple[Work, ...]:
    """The twenty launches of the eager forward: six times convolution, bias and ReLU (the last two read and
    write the whole output each), the max-pool with its int64 indices, and the concatenation."""
    rows, e, c = batch * size * size, ELEMENT_BYTES[dtype], config.in_channels
    works = [Work("pool", 0, rows * c * (2 * e + INDEX_BYTES))]
    for channels, outputs, taps in _convolutions(config):
        works.append(_gemm("conv", rows, channels, outputs, taps, e))
        works += [Work(name, 0, 2 * e * rows * outputs) for name in ("bias", "relu")]
    works.append(Work("cat", 0, 2 * e * rows * config.out_channels))
    return tuple(works)


def network_works(
    module: nn.Module, x: Tensor, dtype: str, *, blocks: tuple[type[nn.Module], ...], training: bool = False
) -> tuple[Work, ...]:
    """A whole network as a series of ideal kernels: one for each of ``blocks``, one for every other convolution or
    linear layer, each with the ReLU, BatchNorm and pool that follow it.

    module, x: the network and its input, on any device; "meta" computes nothing. Each kernel reads its input and
    weights and writes what is left after the pool. With ``training`` it is charged as :func:`block_work` does, but the
    first one has no gradient to its input. FLOP are those of the convolutions and linear layers, biases left out.
    """
    inside = {inner for block in module.modules() if isinstance(block, blocks) for inner in block.modules()}
    units = [m for m in module.modules() if isinstance(m, blocks)]
    units += [m for m in module.modules() if isinstance(m, (nn.Conv2d, nn.Linear)) and m not in inside]
    pools = [m for m in module.modules() if isinstance(m, (nn.MaxPool2d, nn.AdaptiveAvgPool2d)) and m not in inside]
    sizes: list[dict[str, int]] = []

    def product(layer: nn.Module, _: object, y: Tensor) -> None:
        sizes[-1]["flop"] += 2 * y.numel() * layer.weight[0].numel()
        sizes[-1]["w"] += layer.weight.numel()

    def begin(unit: nn.Module, args: tuple[Tensor, ...]) -> None:
        sizes.append({"x": args[0].numel(), "y": 0, "w": 0, "flop": 0})

    def end(_: nn.Module, __: object, y: Tensor) -> None:
        sizes[-1]["y"] = y.numel()

    handles = [unit.register_forward_pre_hook(begin) for unit in units]
    handles += [unit.register_forward_hook(end) for unit in (*units, *pools)]
    layers = [layer for unit in units for layer in unit.modules() if isinstance(layer, (nn.Conv2d, nn.Linear))]
    handles += [layer.register_forward_hook(product) for layer in layers]
    try:
        with torch.no_grad():
            module(x)
    finally:
        for handle in handles:
            handle.remove()
    works, e = [], ELEMENT_BYTES[dtype]
    for index, n in enumerate(sizes):
        times = (3 if index else 2) if training else 1
        works.append(
            Work(f"layer {index + 1}", times * n["flop"], e * (times * (n["x"] + n["w"]) + (1 + training) * n["y"]))
        )
    return tuple(works)


def total(works: Iterable[Work], ceilings: Ceilings, dtype: str) -> float:
    """Seconds that kernels in series cannot beat: the sum of their floors."""
    return sum(work.floor(ceilings, dtype) for work in works)


def valid_tap_fraction(config: InceptionConfig, size: int) -> float:
    """Share of a block's multiply-adds whose input pixel lies inside the image, not in the zero padding."""

    def valid(kernel: int) -> float:
        pairs = sum(max(0, size - abs(shift)) for shift in range(-(kernel // 2), kernel // 2 + 1))
        return (pairs / (size * kernel)) ** 2

    macs = [(c * k * taps, valid(round(taps**0.5))) for c, k, taps in _convolutions(config)]
    return sum(n * share for n, share in macs) / sum(n for n, _ in macs)


def _convolutions(config: InceptionConfig) -> list[tuple[int, int, int]]:
    """(input channels, output channels, taps) of the six."""
    pointwise = [(config.in_channels, k, 1) for k in (config.c1, config.c2[0], config.c3[0], config.c4)]
    return [*pointwise, (*config.c2, 9), (*config.c3, 25)]


def table(batch: int, dtype: str, image_size: int = 224, ceilings: Ceilings = H200) -> str:
    """Floors in microseconds of the nine blocks as a Markdown table.

    K1 to K4 carry the term that bounds them (C compute, M memory) and their FLOP/byte; "four" is their sum,
    "one" the block as one kernel, "eager" its twenty eager launches, "fwd+bwd" a training step as one.
    """
    peak = ceilings.flops[dtype]
    lines = [
        f"{ceilings.name}: {ceilings.bandwidth / 1e12:.2f} TB/s, {peak / 1e12:.0f} TFLOP/s {dtype}; "
        f"batch {batch}, image {image_size}x{image_size}, microseconds",
        "",
        "| block | HxW | GFLOP | K1 | K2 | K3 | K4 | four | one | eager | fwd+bwd |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    sums = [0.0] * 5
    for name, config in GOOGLENET_BLOCKS.items():
        size = spatial_size(name, image_size)
        kernels = forward_kernels(config, batch, size, dtype)
        forward = block_work(config, batch, size, dtype)
        row = [
            forward.flop / 1e9,
            total(kernels, ceilings, dtype) * 1e6,
            forward.floor(ceilings, dtype) * 1e6,
            total(eager_kernels(config, batch, size, dtype), ceilings, dtype) * 1e6,
            block_work(config, batch, size, dtype, training=True).floor(ceilings, dtype) * 1e6,
        ]
        sums = [a + b for a, b in zip(sums, row, strict=True)]
        cells = [
            f"{k.floor(ceilings, dtype) * 1e6:.1f} {k.bound(ceilings, dtype)} ({k.flop / k.bytes:.0f})" for k in kernels
        ]
        figures = [f"{value:.1f}" for value in row[1:]]
        lines.append("| " + " | ".join([name, f"{size}x{size}", f"{row[0]:.2f}", *cells, *figures]) + " |")
    figures = " | ".join(f"{value:.1f}" for value in sums[1:])
    lines.append(f"| sum | | {sums[0]:.2f} | | | | | {figures} |")
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> None:
    """Prints :func:`table` for the command line's point."""
    parser = argparse.ArgumentParser(description="Floors of the nine blocks on the reference card.")
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--dtype", choices=sorted(ELEMENT_BYTES), default="bf16")
    parser.add_argument("--image-size", type=int, default=224, help="224, or 96 for the small variant")
    options = parser.parse_args(arguments)
    print(table(options.batch, options.dtype, options.image_size))


if __name__ == "__main__":
    main()
