"""N2: the parts of norm_stats become the statistics of a block's columns; see block/batch_stats.py.

    n, mean, M2 of two parts     = n_a + n_b, mean_a + (mean_b - mean_a) * n_b / n, M2_a + M2_b + (mean_b - mean_a)**2 *
                                   n_a * n_b / n                                     (Chan, Golub, LeVeque, 1979)
    mean = x[0] + mean of parts  rounded, rest = what that left out (Knuth's sum of two)
    var  = M2 / M                scale = gamma / sqrt(var + eps)                     shift = beta - rest * scale

A convolution that has no BatchNorm, or one in eval mode, takes its mean and variance elsewhere, and rest = 0.

Shapes:  parts [ranges, 2, C] in fp32 or fp64; x: its row 0, C channels; stats [5, C] slice of the parts' dtype; gamma,
         beta, mean, var: [channels] of any floating dtype.
Grid:    axis 0 is a tile of columns, axis 1 a convolution.

BLOCK_M parts are combined with the next BLOCK_M in turn, then these as a tree, as the shape alone says.
"""

from __future__ import annotations

from collections.abc import Sequence

import triton
import triton.language as tl
from torch import Tensor

from inception_fused.block.batch_stats import NormColumns
from inception_fused.block.views import ChannelSlice, Tile, unit_of
from inception_fused.kernels.common import MEAN, REST, SCALE, SHIFT, VAR
from inception_fused.kernels.convolutions import BATCH, filled, of_group, root
from inception_fused.runtime.launch import accumulator, launch

TILE = Tile(256, 8, 1, GROUP_M=1, num_stages=1)
"""Parts combined at once, and columns of a program: two rounds of loads at most for GoogLeNet's 262 parts and fewer,
since nothing else runs meanwhile. With odd channels 512 put up to 128 bytes on the stack. A guess until timed."""

RUN_TIME = [
    "M", "C", "ranges", "rows", "x_offset", "stats_offset", "stats_stride",
    "start1", "start2", "start3", "start4", "K1", "K2", "K3", "K4", "mode1", "mode2", "mode3", "mode4",
]  # fmt: skip
"""Sizes, places and modes, for which no binary is made anew."""


@triton.jit(do_not_specialize=RUN_TIME)
def norm_combine_kernel(
    parts_ptr, x_ptr, gammas, betas, means, variances, eps1, eps2, eps3, eps4, stats_ptr,
    M, C, ranges, rows, x_offset, stats_offset, stats_stride,
    start1, start2, start3, start4, K1, K2, K3, K4, mode1, mode2, mode3, mode4,
    UNIT: tl.constexpr, ACC: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr,
):  # fmt: skip
    # M, ranges, rows, x_offset and modes are plain numbers, the others are in units of UNIT elements.
    group = tl.program_id(1)
    C, stats_offset, stats_stride = C * UNIT, stats_offset * UNIT, stats_stride * UNIT
    start = of_group(group, start1, start2, start3, start4) * UNIT
    K = of_group(group, K1, K2, K3, K4) * UNIT
    in_batch = of_group(group, mode1, mode2, mode3, mode4) == BATCH
    k = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_k = k < K
    offs_i = tl.arange(0, BLOCK_M)
    part_ptrs = parts_ptr + start + (offs_i[:, None] * (2 * C) + k[None, :])

    count = tl.zeros([BLOCK_M, 1], dtype=ACC)
    mean = tl.zeros([BLOCK_M, BLOCK_N], dtype=ACC)
    m2 = tl.zeros([BLOCK_M, BLOCK_N], dtype=ACC)
    for i0 in range(0, ranges, BLOCK_M):
        left = ranges - 1 - i0 - offs_i
        mask = (left >= 0)[:, None] & mask_k[None, :]
        part_mean = tl.load(part_ptrs + i0 * (2 * C), mask=mask, other=0.0)
        part_m2 = tl.load(part_ptrs + (i0 * (2 * C) + C), mask=mask, other=0.0)
        added = tl.where(left > 0, rows, tl.where(left == 0, M - (ranges - 1) * rows, 0)).to(ACC)[:, None]
        delta = part_mean - mean
        share = added / tl.maximum(count + added, 1.0)
        mean += delta * share
        m2 += part_m2 + delta * delta * (count * share)
        count += added
    pixels = M.to(ACC)
    offset = tl.sum(mean * count, axis=0) / pixels
    away = mean - offset[None, :]
    var = tl.sum(m2 + away * away * count, axis=0) / pixels
    pivot = tl.load(x_ptr + (x_offset + start) + k, mask=mask_k, other=0.0).to(ACC)
    total = pivot + offset
    back = total - pivot
    rest = (pivot - (total - back)) + (offset - back)

    zeros = tl.zeros([BLOCK_N], dtype=ACC)
    fixed_mean, fixed_var, gamma, beta = zeros, zeros, zeros + 1.0, zeros
    # The branches on None are decided when the kernel is compiled.
    for i in tl.static_range(4):
        if group == i:
            if means[i] is not None:
                fixed_mean = tl.load(means[i] + k, mask=mask_k, other=0.0).to(ACC)
            if variances[i] is not None:
                fixed_var = tl.load(variances[i] + k, mask=mask_k, other=0.0).to(ACC)
            if gammas[i] is not None:
                gamma = tl.load(gammas[i] + k, mask=mask_k, other=0.0).to(ACC)
            if betas[i] is not None:
                beta = tl.load(betas[i] + k, mask=mask_k, other=0.0).to(ACC)
    var = tl.where(in_batch, var, fixed_var)
    scale = 1.0 / root(var + of_group(group, eps1, eps2, eps3, eps4).to(ACC)) * gamma
    stats_ptrs = stats_ptr + (stats_offset + start) + k
    tl.store(stats_ptrs + MEAN * stats_stride, tl.where(in_batch, total, fixed_mean), mask=mask_k)
    tl.store(stats_ptrs + REST * stats_stride, tl.where(in_batch, rest, 0.0), mask=mask_k)
    tl.store(stats_ptrs + VAR * stats_stride, var, mask=mask_k)
    tl.store(stats_ptrs + SCALE * stats_stride, scale, mask=mask_k)
    # Where there is no rest, not 0 * inf either.
    tl.store(stats_ptrs + SHIFT * stats_stride, tl.where(in_batch, beta - rest * scale, beta), mask=mask_k)


def norm_combine(
    parts: Tensor, x: ChannelSlice, columns: Sequence[NormColumns], stats: ChannelSlice,
    *, gemm_m: int, rows: int, tile: Tile = TILE,
) -> None:  # fmt: skip
    """Launch N2.

    parts: [ranges, 2, C] dense, as norm_stats left them. x: what they are of. columns: the convolutions, at most
    GROUPS, their vectors dense. stats: C columns; those of no convolution stay as they are. rows: of x in each range
    but the last. gemm_m = N*H*W.
    """
    ranges, _, channels = parts.shape
    starts, sizes, modes, gammas, betas, means, variances, eps = zip(*filled(columns), strict=True)
    unit = unit_of(parts.dtype, channels, stats.c_offset, stats.row_stride, *starts, *sizes)
    launch(
        norm_combine_kernel,
        (triton.cdiv(max(sizes), tile.BLOCK_N), len(columns)),
        (
            parts, x.base, gammas, betas, means, variances, *eps, stats.base,
            gemm_m, channels // unit, ranges, rows, x.c_offset, stats.c_offset // unit, stats.row_stride // unit,
            *(start // unit for start in starts), *(size // unit for size in sizes), *modes,
        ),
        dict(UNIT=unit, ACC=accumulator(parts.dtype)),
        tile,
    )  # fmt: skip
