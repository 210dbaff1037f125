"""N3: raw values normalised, and ReLU; see block/batch_stats.py.

    y[m, c] = act(fma(x[m, c] - mean[c], scale[c], shift[c]))

Shapes:  x and y [M, C] slices of one dtype, or the same slice; stats [5, C] slice.
Grid:    axis 0 is a tile of rows, axis 1 a tile of columns.
"""

from __future__ import annotations

import triton
import triton.language as tl

from inception_fused.block.views import ChannelSlice, Tile, unit_of
from inception_fused.kernels.common import affine, normalised
from inception_fused.runtime.launch import launch

RUN_TIME = ["M", "C", "x_offset", "x_stride", "y_offset", "y_stride", "stats_offset", "stats_stride"]
"""Sizes and strides, for which no binary is made anew."""


@triton.jit(do_not_specialize=RUN_TIME)
def norm_apply_kernel(
    x_ptr, stats_ptr, y_ptr, M, C, x_offset, x_stride, y_offset, y_stride, stats_offset, stats_stride,
    UNIT: tl.constexpr, TABLE: tl.constexpr, RELU: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr,
):  # fmt: skip
    # M is a plain count, the places of stats are in units of TABLE elements, the others of UNIT.
    C, x_offset, x_stride = C * UNIT, x_offset * UNIT, x_stride * UNIT
    y_offset, y_stride = y_offset * UNIT, y_stride * UNIT
    stats_offset, stats_stride = stats_offset * TABLE, stats_stride * TABLE
    n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_n = n < C
    mean, scale, shift = affine(stats_ptr, stats_offset, stats_stride, n, mask_n)
    m0 = tl.program_id(0) * BLOCK_M
    offs_m = tl.arange(0, BLOCK_M)
    mask = (offs_m < M - m0)[:, None] & mask_n[None, :]
    x_tile = x_ptr + (m0.to(tl.int64) * x_stride + x_offset)
    x = tl.load(x_tile + (offs_m[:, None] * x_stride + n[None, :]), mask=mask, other=0.0)
    _, y = normalised(x, mean, scale, shift)
    if RELU:
        # A comparison keeps NaN, as PyTorch's ReLU does.
        y = tl.where(y < 0, 0.0, y).to(y.dtype)
    y_tile = y_ptr + (m0.to(tl.int64) * y_stride + y_offset)
    tl.store(y_tile + (offs_m[:, None] * y_stride + n[None, :]), y, mask=mask)


def norm_apply(
    x: ChannelSlice, stats: ChannelSlice, y: ChannelSlice, *, gemm_m: int, relu: bool, tile: Tile, unit: int
) -> None:  # fmt: skip
    """Launch N3.

    x, y: C channels of one floating dtype, the same slice or none that overlap. stats: as norm_combine left them, C
    columns. gemm_m = N*H*W.
    """
    table = unit_of(stats.base.dtype, stats.c_offset, stats.row_stride)
    launch(
        norm_apply_kernel,
        (triton.cdiv(gemm_m, tile.BLOCK_M), triton.cdiv(x.channels, tile.BLOCK_N)),
        (
            x.base, stats.base, y.base, gemm_m, x.channels // unit, x.c_offset // unit, x.row_stride // unit,
            y.c_offset // unit, y.row_stride // unit, stats.c_offset // table, stats.row_stride // table,
        ),
        dict(UNIT=unit, TABLE=table, RELU=relu),
        tile,
    )  # fmt: skip
