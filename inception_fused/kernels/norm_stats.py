"""N1: partial statistics of raw values, a range of rows each; see block/batch_stats.py.

    d[m, c]        = x[m, c] - x[0, c]
    parts[i, 0, c] = mean of d[m, c] over the i-th range of rows
    parts[i, 1, c] = sum of (d[m, c] - that mean)**2 over it

Row 0 is the pivot: where a mean is far larger than the deviation, d loses no bits, and neither does what is made of it.

Shapes:  x [M, C] slice; parts fp32 [ranges, 2, C], fp64 where x is.
Grid:    axis 0 is a range of rows, several tiles of them (choice.statistics_ranges), axis 1 a tile of columns.

Each element of a tile is a place that takes one row of every tile, by Welford's update ("Note on a Method for
Calculating Corrected Sums of Squares and Products", 1962): its divisor is the same for all places. Then the places of a
column become one, in a fixed order.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from inception_fused.block.views import ChannelSlice, Tile
from inception_fused.runtime.launch import accumulator, launch


@triton.jit(do_not_specialize=["M", "C", "tiles", "x_offset", "x_stride"])
def norm_stats_kernel(
    x_ptr, parts_ptr, M, C, tiles, x_offset, x_stride,
    UNIT: tl.constexpr, ACC: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr,
):  # fmt: skip
    # M and tiles are plain counts, the others are in units of UNIT elements.
    C, x_offset, x_stride = C * UNIT, x_offset * UNIT, x_stride * UNIT
    n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_n = n < C
    offs_m = tl.arange(0, BLOCK_M)
    first = tl.program_id(0) * tiles * BLOCK_M
    rows = tl.minimum(M - first, tiles * BLOCK_M)
    x_ptrs = x_ptr + (first.to(tl.int64) * x_stride + x_offset) + (offs_m[:, None] * x_stride + n[None, :])
    pivot = tl.load(x_ptr + x_offset + n, mask=mask_n, other=0.0).to(ACC)

    mean = tl.zeros([BLOCK_M, BLOCK_N], dtype=ACC)
    m2 = tl.zeros([BLOCK_M, BLOCK_N], dtype=ACC)
    x = tl.load(x_ptrs, mask=(offs_m < rows)[:, None] & mask_n[None, :], other=0.0)
    for i in range(tiles):
        # The next tile is on its way while this one is added.
        left = rows - i * BLOCK_M
        x_ptrs += BLOCK_M * x_stride
        following = tl.load(x_ptrs, mask=(offs_m < left - BLOCK_M)[:, None] & mask_n[None, :], other=0.0)
        # 0 in rows beyond M, which then change nothing: their places have one row less.
        delta = tl.where((offs_m < left)[:, None], x.to(ACC) - pivot[None, :] - mean, 0.0)
        x = following
        share = 1.0 / tl.cast(i + 1, ACC)
        mean += delta * share
        m2 += delta * delta * (i * share)

    count = (tl.maximum(rows - offs_m + (BLOCK_M - 1), 0) // BLOCK_M).to(ACC)[:, None]
    average = tl.sum(mean * count, axis=0) / rows.to(ACC)
    away = mean - average[None, :]
    total = tl.sum(m2 + away * away * count, axis=0)
    parts_row = parts_ptr + tl.program_id(0).to(tl.int64) * (2 * C)
    tl.store(parts_row + n, average, mask=mask_n)
    tl.store(parts_row + C + n, total, mask=mask_n)


def norm_stats(
    x: ChannelSlice, parts: Tensor, *, gemm_m: int, ranges: tuple[int, int], tile: Tile, unit: int
) -> None:  # fmt: skip
    """Launch N1.

    x: C channels of any floating dtype. parts: [number of ranges, 2, C] dense, fp32, of fp64 that. ranges: (their
    number, tiles of rows in each), as choice.statistics_ranges() gives it. gemm_m = N*H*W.
    """
    launch(
        norm_stats_kernel,
        (ranges[0], triton.cdiv(x.channels, tile.BLOCK_N)),
        (x.base, parts, gemm_m, x.channels // unit, ranges[1], x.c_offset // unit, x.row_stride // unit),
        dict(UNIT=unit, ACC=accumulator(x.base.dtype)),
        tile,
    )
