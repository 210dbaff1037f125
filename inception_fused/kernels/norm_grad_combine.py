"""N5: partial sums become the coefficients of the backward and the gradients of vectors; see block/batch_stats.py.

    S1, dots = sum of parts over the ranges     S2 = dots - rest * S1     inverse = 1 / (var + eps)
    c0 = scale        c1 = scale * S2 * inverse / M          c2 = scale * S1 / M - c1 * rest
    d gamma = S2 * sqrt(inverse)      d beta = S1      d bias = S1 * 0, which keeps NaN and Inf
                                      without the statistics of the batch c1 = c2 = 0, d bias = S1 * scale

Shapes:  parts [ranges, 2, C] in fp32 or fp64; stats [5, C], coefficients and vectors [3, C] slices of that dtype.
Grid:    axis 0 is a tile of columns, axis 1 a convolution.

Every BLOCK_M-th part is added in turn, then these BLOCK_M sums as a tree, as the shape alone says.
"""

from __future__ import annotations

from collections.abc import Sequence

import triton
import triton.language as tl
from torch import Tensor

from inception_fused.block import batch_stats
from inception_fused.block.batch_stats import NormColumns
from inception_fused.block.views import ChannelSlice, Tile, unit_of
from inception_fused.kernels.common import REST, SCALE, VAR, numbers
from inception_fused.kernels.norm_combine import BATCH, TILE, filled, of_group, root
from inception_fused.runtime.launch import accumulator, launch

D_GAMMA, D_BETA, D_BIAS = (
    tl.constexpr(row) for row in (batch_stats.D_GAMMA, batch_stats.D_BETA, batch_stats.D_BIAS)
)  # fmt: skip

RUN_TIME = [
    "M", "C", "ranges", "stats_offset", "stats_stride", "coefficients_offset", "coefficients_stride", "vectors_offset",
    "vectors_stride", "start1", "start2", "start3", "start4", "K1", "K2", "K3", "K4", "mode1", "mode2", "mode3",
    "mode4",
]  # fmt: skip
"""Sizes, places and modes, for which no binary is made anew."""


@triton.jit(do_not_specialize=RUN_TIME)
def norm_grad_combine_kernel(
    parts_ptr, stats_ptr, coefficients_ptr, vectors_ptr, eps1, eps2, eps3, eps4,
    M, C, ranges, stats_offset, stats_stride, coefficients_offset, coefficients_stride, vectors_offset, vectors_stride,
    start1, start2, start3, start4, K1, K2, K3, K4, mode1, mode2, mode3, mode4,
    UNIT: tl.constexpr, ACC: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr,
):  # fmt: skip
    # M, ranges and modes are plain numbers, the others are in units of UNIT elements.
    group = tl.program_id(1)
    C, stats_offset, stats_stride = C * UNIT, stats_offset * UNIT, stats_stride * UNIT
    coefficients_offset, coefficients_stride = coefficients_offset * UNIT, coefficients_stride * UNIT
    vectors_offset, vectors_stride = vectors_offset * UNIT, vectors_stride * UNIT
    start = of_group(group, start1, start2, start3, start4) * UNIT
    K = of_group(group, K1, K2, K3, K4) * UNIT
    in_batch = of_group(group, mode1, mode2, mode3, mode4) == BATCH
    k = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_k = k < K
    offs_i = tl.arange(0, BLOCK_M)
    part_ptrs = parts_ptr + start + (offs_i[:, None] * (2 * C) + k[None, :])

    totals = tl.zeros([BLOCK_M, BLOCK_N], dtype=ACC)
    dots = tl.zeros([BLOCK_M, BLOCK_N], dtype=ACC)
    for i0 in range(0, ranges, BLOCK_M):
        mask = (offs_i < ranges - i0)[:, None] & mask_k[None, :]
        totals += tl.load(part_ptrs + i0 * (2 * C), mask=mask, other=0.0)
        dots += tl.load(part_ptrs + (i0 * (2 * C) + C), mask=mask, other=0.0)
    s1 = tl.sum(totals, axis=0)

    rest = numbers(stats_ptr, REST, stats_offset + start, stats_stride, k, mask_k)
    var = numbers(stats_ptr, VAR, stats_offset + start, stats_stride, k, mask_k)
    scale = numbers(stats_ptr, SCALE, stats_offset + start, stats_stride, k, mask_k)
    inverse = 1.0 / (var + of_group(group, eps1, eps2, eps3, eps4).to(ACC))
    s2 = tl.sum(dots, axis=0) - rest * s1
    pixels = M.to(ACC)
    c1 = tl.where(in_batch, scale * (s2 * inverse / pixels), 0.0)
    c2 = tl.where(in_batch, scale * (s1 / pixels) - c1 * rest, 0.0)
    c_ptrs = coefficients_ptr + (coefficients_offset + start) + k
    tl.store(c_ptrs, scale, mask=mask_k)
    tl.store(c_ptrs + coefficients_stride, c1, mask=mask_k)
    tl.store(c_ptrs + 2 * coefficients_stride, c2, mask=mask_k)
    v_ptrs = vectors_ptr + (vectors_offset + start) + k
    tl.store(v_ptrs + D_GAMMA * vectors_stride, s2 * root(inverse), mask=mask_k)
    tl.store(v_ptrs + D_BETA * vectors_stride, s1, mask=mask_k)
    # Not 0 itself: NaN and Inf have to be seen in every gradient.
    tl.store(v_ptrs + D_BIAS * vectors_stride, s1 * tl.where(in_batch, 0.0, scale), mask=mask_k)


def norm_grad_combine(
    parts: Tensor, stats: ChannelSlice, columns: Sequence[NormColumns], coefficients: ChannelSlice,
    vectors: ChannelSlice, *, gemm_m: int, tile: Tile = TILE,
) -> None:  # fmt: skip
    """Launch N5.

    parts: [ranges, 2, C] dense, as norm_grad_stats or conv_dgrad left them. stats: as norm_combine left them, C
    columns. columns: the convolutions, at most four. coefficients, vectors: C columns; those of no convolution stay as
    they are. gemm_m = N*H*W.
    """
    ranges, _, channels = parts.shape
    places = [place for table in (stats, coefficients, vectors) for place in (table.c_offset, table.row_stride)]
    starts, sizes, modes, _, _, _, _, eps = zip(*filled(columns), strict=True)
    unit = unit_of(parts.dtype, channels, *places, *starts, *sizes)
    launch(
        norm_grad_combine_kernel,
        (triton.cdiv(max(sizes), tile.BLOCK_N), len(columns)),
        (
            parts, stats.base, coefficients.base, vectors.base, *eps, gemm_m, channels // unit, ranges,
            *(place // unit for place in places), *(start // unit for start in starts),
            *(size // unit for size in sizes), *modes,
        ),
        dict(UNIT=unit, ACC=accumulator(parts.dtype)),
        tile,
    )  # fmt: skip
