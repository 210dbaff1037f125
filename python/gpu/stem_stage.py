"""The stage of the stem's two convolutions, and their points of the parity stage."""

from __future__ import annotations

from functools import partial

import torch
from torch import nn

from benchmarks.cases.baselines import DTYPES, Point, build, operands
from checks.block_cases import ODD_STEM, Block, check_gradients, check_kernels, make_block
from checks.convolutions import convolutions
from gpu.launch_rows import rows_of
from gpu.run import Matrix, Row, Run
from inception_fused.block.googlenet_blocks import GOOGLENET_STEM, StemConfig, spatial_size


def stem_points(matrix: Matrix) -> list[Point]:
    """At the first two batches, in the first dtype."""
    size = spatial_size("stem", matrix.image_size)
    return [
        Point("stem", GOOGLENET_STEM, size, batch, dtype, mode)
        for dtype in matrix.dtypes[:1]
        for batch in matrix.batches[:2]
        for mode in ("forward", "training")
    ]


def stem_parity_points(matrix: Matrix) -> list[Point]:
    """The network's at batch 1, and one whose channels are odd."""
    size = spatial_size("stem", matrix.image_size)
    sizes = [Point("stem", GOOGLENET_STEM, size, 1, "bf16"), Point("odd stem", ODD_STEM, 7, 2, "bf16")]
    return [Point(p.block, p.config, p.size, p.batch, dtype) for dtype in ("bf16", "tf32", "fp16") for p in sizes]


def of_stem(point: Point) -> bool:
    """Whether a point is not a block's."""
    return isinstance(point.config, StemConfig)


def checked_stem(point: Point, device: str) -> Block:
    """The point's operands, in PyTorch's own layout. Raises AssertionError where a launch of either pass differs from
    float64 on what it read."""
    block = make_block(point.config, (point.batch, point.size, point.size), DTYPES[point.dtype], device=device)
    out = block.forward()
    check_kernels(block, out, tf32=block.x.is_cuda and block.x.dtype == torch.float32)
    check_gradients(block, out)
    return block


def stem_module(in_channels: int, reduced: int, out_channels: int, *, fused: bool, **_: object) -> nn.Module:
    """The two convolutions with their ReLUs, as GoogLeNet's b2 has them before its pool."""
    from inception_fused.modules.stem import FusedStem

    point, window = convolutions(StemConfig(in_channels, reduced, out_channels))
    return (FusedStem if fused else nn.Sequential)(point, nn.ReLU(), window, nn.ReLU())


def stem(run: Run) -> None:
    """At each point, after parity with float64: eager and ours, and at those of the forward each of our launches."""
    from inception_fused import backend

    def time_all(point: Point) -> list[Row]:
        block = checked_stem(point, run.device)
        ours, eager = (build(partial(stem_module, fused=fused), point, run.device) for fused in (True, False))
        rows = run.time_block(point, "eager", eager)
        # Demanded, not preferred: a fallback must fail here, not be timed as ours.
        with backend("kernels"):
            rows += run.time_block(point, "ours", ours, eager)
        if point.mode == "forward":
            x, weights, biases, _ = block
            rows += rows_of(run, point, operands(point, run.device)[1], x, weights, biases)
        return rows

    run.each(stem_points(run.matrix), time_all, seconds=5)
