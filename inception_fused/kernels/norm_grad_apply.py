"""N6: the gradient of raw values from that of what was normalised; see block/batch_stats.py.

    g[m, k] = c0[k] * d[m, k] - c1[k] * (x[m, k] - mean[k]) - c2[k]          the second term is 0 where c1[k] is
    d[m, k] = dy[m, k] where not (act's argument <= 0), else 0               all of dy without ReLU

Shapes:  dy [N, K, H, W], any strides; x [M, K] slice of raw values, M = N*H*W; stats [5, K], coefficients [3, K]
         slices; g: up to four slices of one buffer of rows, in the order of their columns in dy, which may be dy's own.
Grid:    axis 0 is a tile of rows, axis 1 a tile of columns of one slice.
"""

from __future__ import annotations

from collections.abc import Sequence

import triton
import triton.language as tl
from torch import Tensor

from inception_fused.block.views import ChannelSlice, Tile, strides_in, unit_of
from inception_fused.kernels.common import affine, load_gradient, normalised, numbers, place_of
from inception_fused.runtime.launch import launch

RUN_TIME = [
    "M", "H", "W", "K1", "K2", "K3", "K4", "n_stride", "c_stride", "h_stride", "w_stride", "x_offset", "x_stride",
    "g_stride", "g1", "g2", "g3", "g4", "stats_offset", "stats_stride", "coefficients_offset", "coefficients_stride",
]  # fmt: skip
"""Sizes and strides, for which no binary is made anew."""


@triton.jit(do_not_specialize=RUN_TIME)
def norm_grad_apply_kernel(
    dy_ptr, x_ptr, stats_ptr, coefficients_ptr, g_ptr,
    M, H, W, K1, K2, K3, K4, n_stride, c_stride, h_stride, w_stride, x_offset, x_stride, g_stride, g1, g2, g3, g4,
    stats_offset, stats_stride, coefficients_offset, coefficients_stride,
    UNIT: tl.constexpr, TABLE: tl.constexpr, ROWS: tl.constexpr, RELU: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr,
):  # fmt: skip
    # Strides of dy are plain counts but for w_stride where dy is a matrix of ROWS: that, the slices' widths K1 to K4,
    # their places g1 to g4 in a row of g, and the places of x are in units of UNIT elements, those of stats
    # and coefficients of TABLE.
    K1, K2, K3, K4 = K1 * UNIT, K2 * UNIT, K3 * UNIT, K4 * UNIT
    g_stride, g1, g2, g3, g4 = g_stride * UNIT, g1 * UNIT, g2 * UNIT, g3 * UNIT, g4 * UNIT
    x_offset, x_stride = x_offset * UNIT, x_stride * UNIT
    stats_offset, stats_stride = stats_offset * TABLE, stats_stride * TABLE
    coefficients_offset, coefficients_stride = coefficients_offset * TABLE, coefficients_stride * TABLE
    if ROWS:
        w_stride = w_stride * UNIT

    # The slice that this tile of columns belongs to: its width, first column and place in g.
    end1 = tl.cdiv(K1, BLOCK_N)
    end2 = end1 + tl.cdiv(K2, BLOCK_N)
    end3 = end2 + tl.cdiv(K3, BLOCK_N)
    at = tl.program_id(1)
    tile, K, first, g_start = place_of(at, end1, end2, end3, K1, K2, K3, K4, g1, g2, g3, g4)
    n = tile * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_n = n < K
    m0 = tl.program_id(0) * BLOCK_M
    offs_m = tl.arange(0, BLOCK_M)
    mask = (offs_m < M - m0)[:, None] & mask_n[None, :]

    dy = load_gradient(dy_ptr, m0, offs_m, first, n, mask, H, W, n_stride, c_stride, h_stride, w_stride, ROWS)
    x_tile = x_ptr + (m0.to(tl.int64) * x_stride + (x_offset + first))
    x = tl.load(x_tile + (offs_m[:, None] * x_stride + n[None, :]), mask=mask, other=0.0)
    mean, scale, shift = affine(stats_ptr, stats_offset + first, stats_stride, n, mask_n)
    centred, y = normalised(x, mean, scale, shift)
    d = dy.to(mean.dtype)
    if RELU:
        d = tl.where(y <= 0, 0.0, d)
    c0 = numbers(coefficients_ptr, 0, coefficients_offset + first, coefficients_stride, n, mask_n)
    c1 = numbers(coefficients_ptr, 1, coefficients_offset + first, coefficients_stride, n, mask_n)
    c2 = numbers(coefficients_ptr, 2, coefficients_offset + first, coefficients_stride, n, mask_n)
    # Without the statistics of the batch nothing comes from x, not 0 * inf either.
    centred = tl.where((c1 == 0)[None, :], 0.0, centred)
    out = c0[None, :] * d - c1[None, :] * centred - c2[None, :]
    g_tile = g_ptr + (m0.to(tl.int64) * g_stride + g_start)
    tl.store(g_tile + (offs_m[:, None] * g_stride + n[None, :]), out.to(g_ptr.dtype.element_ty), mask=mask)


def norm_grad_apply(
    dy: Tensor, x: ChannelSlice, stats: ChannelSlice, coefficients: ChannelSlice, g: Sequence[ChannelSlice],
    *, relu: bool, tile: Tile, unit: int,
) -> None:  # fmt: skip
    """Launch N6.

    dy: [N, K, H, W], any strides, the dtype of x and g. x: K channels. stats: as norm_combine left them, coefficients:
    as norm_grad_combine did, K columns. g: one to four slices of one buffer, K channels in all; they may be the very
    columns of dy, in its order.
    """
    n, _, h, w = dy.shape
    rows, strides = strides_in(dy, unit)
    parts = [*g, *[g[0]._replace(channels=0)] * (4 - len(g))]
    places = stats.c_offset, stats.row_stride, coefficients.c_offset, coefficients.row_stride
    table = unit_of(stats.base.dtype, *places)
    launch(
        norm_grad_apply_kernel,
        (triton.cdiv(n * h * w, tile.BLOCK_M), sum(triton.cdiv(part.channels, tile.BLOCK_N) for part in g)),
        (
            dy, x.base, stats.base, coefficients.base, g[0].base,
            n * h * w, h, w, *(part.channels // unit for part in parts), *strides,
            x.c_offset // unit, x.row_stride // unit,
            g[0].row_stride // unit, *(part.c_offset // unit for part in parts),
            *(place // table for place in places),
        ),
        dict(UNIT=unit, TABLE=table, ROWS=rows, RELU=relu),
        tile,
    )  # fmt: skip
