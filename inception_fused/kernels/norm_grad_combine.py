"""N5: partial sums become the coefficients of the backward and the gradients of vectors; see block/batch_stats.py.

    S1, dots = sum of parts over the ranges     S2 = dots - rest * S1     inverse = 1 / (var + eps)
    c0 = scale        c1 = scale * S2 * inverse / M          c2 = scale * S1 / M - c1 * rest
    d gamma = S2 * sqrt(inverse)      d beta = S1      d bias = (c1 + c2) * 0, which keeps NaN
                                      without the statistics of the batch c1 = c2 = 0, d bias = S1 * scale

Shapes:  parts [ranges, 2, C] in fp32 or fp64; stats [5, C] and coefficients [3, C] slices of that
         dtype; the gradients [K] of any floating dtype, each of its own or not there.
Grid:    axis 0 is a tile of columns, axis 1 a convolution.

Every BLOCK_M-th part is added in turn, then these BLOCK_M sums as a tree, as the shape alone says.
"""

from __future__ import annotations

from collections.abc import Sequence

import triton
import triton.language as tl
from torch import Tensor

from inception_fused.block.batch_stats import NormColumns, VectorGrads
from inception_fused.block.views import ChannelSlice, Tile, unit_of
from inception_fused.kernels.common import REST, SCALE, VAR, numbers
from inception_fused.kernels.convolutions import BATCH, GROUPS, filled, of_group, root
from inception_fused.runtime.launch import accumulator, launch

TILE = Tile(512, 8, 1, GROUP_M=1, num_stages=1)
"""Parts added at once, and columns of a program: two rounds of loads for the 784 tiles of rows that B2 has in 3a at
batch 128. A guess until timed."""

RUN_TIME = [
    "M", "part_stride", "kind_stride", "ranges", "stats_offset", "stats_stride", "coefficients_offset",
    "coefficients_stride", "start1", "start2", "start3", "start4", "K1", "K2", "K3", "K4", "mode1", "mode2", "mode3",
    "mode4",
]  # fmt: skip
"""Sizes, places and modes, for which no binary is made anew."""


@triton.jit(do_not_specialize=RUN_TIME)
def norm_grad_combine_kernel(
    parts_ptr, stats_ptr, coefficients_ptr, d_gammas, d_betas, d_biases, eps1, eps2, eps3, eps4,
    M, part_stride, kind_stride, ranges, stats_offset, stats_stride, coefficients_offset, coefficients_stride,
    start1, start2, start3, start4, K1, K2, K3, K4, mode1, mode2, mode3, mode4,
    UNIT: tl.constexpr, ACC: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr,
):  # fmt: skip
    # M, ranges and modes are plain numbers, the others are in units of UNIT elements.
    group = tl.program_id(1)
    part_stride, kind_stride = part_stride * UNIT, kind_stride * UNIT
    stats_offset, stats_stride = stats_offset * UNIT, stats_stride * UNIT
    coefficients_offset, coefficients_stride = coefficients_offset * UNIT, coefficients_stride * UNIT
    start = of_group(group, start1, start2, start3, start4) * UNIT
    K = of_group(group, K1, K2, K3, K4) * UNIT
    in_batch = of_group(group, mode1, mode2, mode3, mode4) == BATCH
    k = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_k = k < K
    offs_i = tl.arange(0, BLOCK_M)
    part_ptrs = parts_ptr + start + (offs_i[:, None] * part_stride + k[None, :])

    totals = tl.zeros([BLOCK_M, BLOCK_N], dtype=ACC)
    dots = tl.zeros([BLOCK_M, BLOCK_N], dtype=ACC)
    for i0 in range(0, ranges, BLOCK_M):
        mask = (offs_i < ranges - i0)[:, None] & mask_k[None, :]
        totals += tl.load(part_ptrs + i0 * part_stride, mask=mask, other=0.0)
        dots += tl.load(part_ptrs + (i0 * part_stride + kind_stride), mask=mask, other=0.0)
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
    # Not 0 itself: NaN and Inf, of dy or of the raw values, have to be seen in every gradient.
    d_bias = tl.where(in_batch, (c1 + c2) * 0.0, s1 * scale)
    for i in tl.static_range(4):
        if group == i:
            store_vector(d_gammas[i], k, s2 * root(inverse), mask_k)
            store_vector(d_betas[i], k, s1, mask_k)
            store_vector(d_biases[i], k, d_bias, mask_k)


@triton.jit
def store_vector(ptr, k, values, mask):
    """values [BLOCK_N] where somebody wants them."""
    if ptr is not None:
        tl.store(ptr + k, values.to(ptr.dtype.element_ty), mask=mask)


def norm_grad_combine(
    parts: Tensor, stats: ChannelSlice, columns: Sequence[NormColumns], coefficients: ChannelSlice,
    outs: Sequence[VectorGrads], *, gemm_m: int, tile: Tile = TILE,
) -> None:  # fmt: skip
    """Launch N5.

    parts: [ranges, 2, C] with adjacent columns, as norm_grad_stats or conv_dgrad left them. stats: as norm_combine left
    them, C columns. columns: the convolutions, at most four; outs: where the gradients of each one's vectors go.
    coefficients: C columns; those of no convolution stay as they are. gemm_m = N*H*W.
    """
    ranges, part_stride, kind_stride = len(parts), parts.stride(0), parts.stride(1)
    places = [place for table in (stats, coefficients) for place in (table.c_offset, table.row_stride)]
    starts, sizes, modes, _, _, _, _, eps = zip(*filled(columns), strict=True)
    # As columns that are not there, so that r, t and y share a binary.
    vectors = zip(*[*outs, *[outs[0]] * (GROUPS - len(outs))], strict=True)
    unit = unit_of(parts.dtype, part_stride, kind_stride, *places, *starts, *sizes)
    launch(
        norm_grad_combine_kernel,
        (triton.cdiv(max(sizes), tile.BLOCK_N), len(columns)),
        (
            parts, stats.base, coefficients.base, *vectors, *eps, gemm_m, part_stride // unit, kind_stride // unit,
            ranges, *(place // unit for place in places), *(start // unit for start in starts),
            *(size // unit for size in sizes), *modes,
        ),
        dict(UNIT=unit, ACC=accumulator(parts.dtype)),
        tile,
    )  # fmt: skip
