"""N4: partial sums over the gradient of what was normalised; see block/batch_stats.py.

    g[m, k]        = dy[m, k] where not (act's argument <= 0), else 0        (all of dy without ReLU)
    parts[i, 0, k] = sum of g[m, k] over the i-th range of rows
    parts[i, 1, k] = sum of g[m, k] * (x[m, k] - mean[k]) over it
    borders[q]     = as B1 writes them, in whose place this launch is

Shapes:  dy [N, K, H, W], any strides; x [M, K] slice of raw values, M = N*H*W; stats [5, K] slice; parts fp32
         [ranges, 2, K], fp64 where x is; borders int16, H*W words and those that a step of B4 reads beyond.
Grid:    axis 0 is a range of rows, several tiles of them (choice.statistics_ranges), axis 1 a tile of columns.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from inception_fused.block.views import ChannelSlice, Tile, strides_in, unit_of
from inception_fused.kernels.common import affine, load_gradient, normalised, write_borders
from inception_fused.runtime.launch import accumulator, launch

RUN_TIME = [
    "M", "H", "W", "words", "K", "tiles", "n_stride", "c_stride", "h_stride", "w_stride", "x_offset", "x_stride",
    "stats_offset", "stats_stride",
]  # fmt: skip
"""Sizes and strides, for which no binary is made anew."""


@triton.jit(do_not_specialize=RUN_TIME)
def norm_grad_stats_kernel(
    dy_ptr, x_ptr, stats_ptr, parts_ptr, borders_ptr,
    M, H, W, words, K, tiles, n_stride, c_stride, h_stride, w_stride, x_offset, x_stride, stats_offset, stats_stride,
    UNIT: tl.constexpr, TABLE: tl.constexpr, ROWS: tl.constexpr, RELU: tl.constexpr, ACC: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr,
):  # fmt: skip
    # Strides of dy are plain counts but for w_stride where dy is a matrix of ROWS: that, K and the places of x are in
    # units of UNIT elements, those of stats of TABLE.
    K, x_offset, x_stride = K * UNIT, x_offset * UNIT, x_stride * UNIT
    stats_offset, stats_stride = stats_offset * TABLE, stats_stride * TABLE
    if ROWS:
        w_stride = w_stride * UNIT
    n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_n = n < K
    offs_m = tl.arange(0, BLOCK_M)

    if tl.program_id(1) == 0:
        write_borders(borders_ptr, words, offs_m, H, W, BLOCK_M)

    mean, scale, shift = affine(stats_ptr, stats_offset, stats_stride, n, mask_n)
    total = tl.zeros([BLOCK_M, BLOCK_N], dtype=ACC)
    dots = tl.zeros([BLOCK_M, BLOCK_N], dtype=ACC)
    for i in range(tiles):
        m0 = (tl.program_id(0) * tiles + i) * BLOCK_M
        mask = (offs_m < M - m0)[:, None] & mask_n[None, :]
        dy = load_gradient(dy_ptr, m0, offs_m, 0, n, mask, H, W, n_stride, c_stride, h_stride, w_stride, ROWS)
        x_tile = x_ptr + (m0.to(tl.int64) * x_stride + x_offset)
        x = tl.load(x_tile + (offs_m[:, None] * x_stride + n[None, :]), mask=mask, other=0.0)
        centred, y = normalised(x, mean, scale, shift)
        g = dy.to(ACC)
        if RELU:
            g = tl.where(y <= 0, 0.0, g)
        total += g
        dots += g * centred
    parts_row = parts_ptr + tl.program_id(0).to(tl.int64) * (2 * K)
    tl.store(parts_row + n, tl.sum(total, axis=0), mask=mask_n)
    tl.store(parts_row + K + n, tl.sum(dots, axis=0), mask=mask_n)


def norm_grad_stats(
    dy: Tensor, x: ChannelSlice, stats: ChannelSlice, parts: Tensor, borders: Tensor,
    *, relu: bool, ranges: tuple[int, int], tile: Tile, unit: int,
) -> None:  # fmt: skip
    """Launch N4.

    dy: [N, K, H, W], any strides, the dtype of x. x: K channels. stats: as norm_combine left them, K columns. parts:
    [number of ranges, 2, K] dense, fp32, of fp64 that. borders: int16 words, as many as B4 wants. ranges: (their
    number, tiles of rows in each), as choice.statistics_ranges() gives it.
    """
    n, k, h, w = dy.shape
    rows, strides = strides_in(dy, unit)
    table = unit_of(stats.base.dtype, stats.c_offset, stats.row_stride)
    launch(
        norm_grad_stats_kernel,
        (ranges[0], triton.cdiv(k, tile.BLOCK_N)),
        (
            dy, x.base, stats.base, parts, borders, n * h * w, h, w, borders.numel(), k // unit, ranges[1], *strides,
            x.c_offset // unit, x.row_stride // unit, stats.c_offset // table, stats.row_stride // table,
        ),
        dict(UNIT=unit, TABLE=table, ROWS=rows, RELU=relu, ACC=accumulator(dy.dtype)),
        tile,
    )  # fmt: skip
