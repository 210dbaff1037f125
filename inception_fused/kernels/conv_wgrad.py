"""B4: the gradient of a convolution to its weights (stride 1, "same" padding), in parts that are summed afterwards.

    part[i, k, r, s, c] = sum over the i-th range of pixels m of g[m, k] * x[pixel(m) + (r - P, s - P), c]   P = R // 2
    for branch 4 (1x1 behind the max-pool), x[m, c] is the maximum of x over the 3x3 window of m, taken while loading

Four launches a block: 3x3 from (g2, r3), 5x5 or 3x3 from (g3, r5), the three reductions as one from
([g1 | dr3 | dr5], x), and branch 4 from (g4, x).

Shapes:  g [M, K] slice; x [M, C] rows, row stride at run time; part fp32 [SPLIT_K, K, R, R, C] dense.
GEMM:    GEMM_M = K, GEMM_N = R*R*C, GEMM_K = M = N*H*W, cut into SPLIT_K ranges (choice.split_k, by shape alone).

A tile of columns may straddle taps: the 400 columns of a 5x5 over 16 channels take 4 tiles of 128 (78% useful)
where a tile per tap takes 25 (13%). The sums end in fp32 and are added in a fixed order by B5: repeats are identical.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from inception_fused.block.views import ChannelSlice, Tile
from inception_fused.kernels.common import MAX_R, tile_order, valid_taps
from inception_fused.runtime.launch import accumulator, launch

RUN_TIME = ["M", "H", "W", "R", "K", "C", "g_offset", "g_stride", "x_offset", "x_stride", "span"]
"""Sizes and strides, for which no binary is made anew."""


@triton.jit
def window_taps(pixel, mask, H, W, R, LIMIT: tl.constexpr):
    """Bit r * R + s set where pixel + (r - R // 2, s - R // 2) lies in the image, R <= LIMIT; no bit where not mask."""
    rows = tl.where(mask, valid_taps(pixel // W % H, H, R, LIMIT), 0)
    columns = valid_taps(pixel % W, W, R, LIMIT) & ((1 << R) - 1)
    taps = tl.zeros_like(pixel)
    for r in tl.static_range(LIMIT):
        taps |= tl.where((rows >> r) & 1 != 0, columns, 0) << (r * R)
    return taps


@triton.jit(do_not_specialize=RUN_TIME)
def conv_wgrad_kernel(
    g_ptr, x_ptr, part_ptr,
    M, H, W, R, K, C, g_offset, g_stride, x_offset, x_stride, span,
    UNIT: tl.constexpr, POOL: tl.constexpr, ACC: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr,
):  # fmt: skip
    # M, H, W, R and span (pixels of a range) are plain counts, every other is in units of UNIT elements.
    K, C = K * UNIT, C * UNIT
    g_offset, g_stride, x_offset, x_stride = g_offset * UNIT, g_stride * UNIT, x_offset * UNIT, x_stride * UNIT

    GEMM_N = R * R * C
    pid_k, pid_n = tile_order(tl.program_id(0), tl.cdiv(K, BLOCK_M), tl.cdiv(GEMM_N, BLOCK_N), GROUP_M)
    k = pid_k * BLOCK_M + tl.arange(0, BLOCK_M)
    mask_k = k < K
    n = pid_n * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_n = n < GEMM_N
    tap = n // C
    r = tap // R
    columns = ((r - R // 2) * W + (tap - r * R - R // 2)) * x_stride + n % C
    offs_p = tl.arange(0, BLOCK_K)

    first = tl.program_id(1) * span
    acc = tl.zeros([BLOCK_M, BLOCK_N], dtype=ACC)
    for step in range(0, tl.minimum(span, M - first), BLOCK_K):
        p0 = first + step
        mask_p = offs_p < M - p0
        # Bases advance to the step in int64; a tap's shift of at most (P*W + P) rows stays in int32.
        g_tile = g_ptr + (p0.to(tl.int64) * g_stride + g_offset)
        mask_g = mask_p[None, :] & mask_k[:, None]
        g = tl.load(g_tile + (offs_p[None, :] * g_stride + k[:, None]), mask=mask_g, other=0.0)
        x_tile = x_ptr + (p0.to(tl.int64) * x_stride + x_offset)
        x_offs = offs_p[:, None] * x_stride + columns[None, :]
        if POOL:
            window = window_taps(p0 + offs_p, mask_p, H, W, 3, 3)
            x = tl.full([BLOCK_K, BLOCK_N], float("-inf"), x_ptr.dtype.element_ty)
            for i in tl.static_range(9):
                inside = ((window >> i) & 1) != 0
                shifted = ((i // 3 - 1) * W + (i % 3 - 1)) * x_stride
                mask_x = inside[:, None] & mask_n[None, :]
                value = tl.load(x_tile + (x_offs + shifted), mask=mask_x, other=float("-inf"))
                x = tl.maximum(x, value, propagate_nan=tl.PropagateNan.ALL)
            # Minus infinity times the zero gradients of pixels beyond M would be NaN.
            x = tl.where(mask_p[:, None] & mask_n[None, :], x, 0.0).to(x_ptr.dtype.element_ty)
        else:
            window = window_taps(p0 + offs_p, mask_p, H, W, R, MAX_R)
            inside = ((window[:, None] >> tap[None, :]) & 1) != 0
            x = tl.load(x_tile + x_offs, mask=inside & mask_n[None, :], other=0.0)
        acc = tl.dot(g, x, acc, input_precision="tf32", out_dtype=ACC)

    part_tile = part_ptr + tl.program_id(1).to(tl.int64) * (K * GEMM_N)
    tl.store(part_tile + (k[:, None] * GEMM_N + n[None, :]), acc, mask=mask_k[:, None] & mask_n[None, :])


def conv_wgrad(
    g: ChannelSlice,
    x: ChannelSlice,
    part: Tensor,
    *,
    gemm_m: int,
    image: tuple[int, int],
    pool: bool,
    tile: Tile,
    unit: int,
) -> None:
    """Launch B4 once.

    g: K channels, fp16, bf16 or fp32 (as TF32). x: C channels of the same dtype. part: fp32 [SPLIT_K, K, R, R, C]
    dense, R 1, 3 or 5. image: (H, W); gemm_m = N*H*W. pool: x is pooled while it is loaded; R is 1.
    """
    splits, k, r, _, c = part.shape
    span = triton.cdiv(triton.cdiv(gemm_m, tile.BLOCK_K), splits) * tile.BLOCK_K
    launch(
        conv_wgrad_kernel,
        (triton.cdiv(k, tile.BLOCK_M) * triton.cdiv(r * r * c, tile.BLOCK_N), splits),
        (
            g.base, x.base, part,
            gemm_m, *image, r, k // unit, c // unit, g.c_offset // unit, g.row_stride // unit,
            x.c_offset // unit, x.row_stride // unit, span,
        ),
        dict(UNIT=unit, POOL=pool, ACC=accumulator(g.base.dtype)),
        tile,
    )  # fmt: skip
