"""B4: the gradient of a convolution to its weights (stride 1, "same" padding), in parts that are summed afterwards.

    part[i, k, r, s, c] = sum over the i-th range of pixels m of g[m, k] * x[pixel(m) + (r - P, s - P), c]   P = R // 2
    for branch 4 (1x1 behind the max-pool), x[m, c] is the maximum of x over the 3x3 window of m, taken while loading

Four launches a block: 3x3 from (g2, r3), 5x5 or 3x3 from (g3, r5), the three reductions as one from
([g1 | dr3 | dr5], x), and branch 4 from (g4, x).

Shapes:  g [M, K] slice; x [M, C] rows, row stride at run time; part fp32 [SPLIT_K, K, R, R, C] dense; borders int16.
GEMM:    GEMM_M = K, GEMM_N = R*R*C, GEMM_K = M = N*H*W, cut into SPLIT_K ranges (choice.split_k, by shape alone).

Where a tap lies outside the image of its pixel, x counts as 0 (for the pool as minus infinity). The loop asks that of
words that B1 has written, one a pixel of an image (common.border_bits), whatever R is.

A tile of columns may straddle taps: the 400 columns of a 5x5 over 16 channels take 4 tiles of 128 (78% useful)
where a tile per tap takes 25 (13%). The sums end in fp32 and are added in a fixed order by B5: repeats are identical.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from inception_fused.block.views import ChannelSlice, Tile
from inception_fused.kernels.common import border_bits, tile_order
from inception_fused.runtime.launch import accumulator, launch

RUN_TIME = ["M", "HW", "W", "R", "K", "C", "g_offset", "g_stride", "x_offset", "x_stride", "span"]
"""Sizes and strides, for which no binary is made anew."""


@triton.jit
def store_part(part_tile, acc, k, mask_k, n0, GEMM_N, WIDTH: tl.constexpr):
    """Columns n0 to n0 + WIDTH of the rows k of a part."""
    n = n0 + tl.arange(0, WIDTH)
    tl.store(part_tile + (k[:, None] * GEMM_N + n[None, :]), acc, mask=mask_k[:, None] & (n < GEMM_N)[None, :])


@triton.jit(do_not_specialize=RUN_TIME)
def conv_wgrad_kernel(
    g_ptr, x_ptr, part_ptr, borders_ptr,
    M, HW, W, R, K, C, g_offset, g_stride, x_offset, x_stride, span,
    UNIT: tl.constexpr, POOL: tl.constexpr, ACC: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr,
):  # fmt: skip
    # M, HW, W, R and span (pixels of a range) are plain counts, every other is in units of UNIT elements.
    K, C = K * UNIT, C * UNIT
    g_offset, g_stride, x_offset, x_stride = g_offset * UNIT, g_stride * UNIT, x_offset * UNIT, x_stride * UNIT

    GEMM_N = R * R * C
    pid_k, pid_n = tile_order(tl.program_id(0), tl.cdiv(K, BLOCK_M), tl.cdiv(GEMM_N, BLOCK_N), GROUP_M)
    k = pid_k * BLOCK_M + tl.arange(0, BLOCK_M)
    mask_k = k < K
    n = pid_n * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_n = n < GEMM_N
    tap = n // C
    row, column = tap // R - R // 2, tap % R - R // 2
    # The bits that a pixel's word must have for this column's tap to lie in its image; none has bit 15.
    bits = tl.where(mask_n, border_bits(row, column), 1 << 15)
    offs_p = tl.arange(0, BLOCK_K)

    # Bases advance in int64; offsets from them, those of a tap's shift included, stay in int32.
    first = tl.program_id(1) * span
    g_tile = g_ptr + (first.to(tl.int64) * g_stride + g_offset)
    x_tile = x_ptr + (first.to(tl.int64) * x_stride + x_offset)
    g_ptrs = g_tile + (offs_p[None, :] * g_stride + k[:, None])
    x_ptrs = x_tile + (offs_p[:, None] * x_stride + ((row * W + column) * x_stride + n % C)[None, :])
    # A step's first pixel in its image, kept below HW without a division in the loop.
    pixel, advance = first % HW, BLOCK_K % HW

    acc = tl.zeros([BLOCK_M, BLOCK_N], dtype=ACC)
    for step in range(0, tl.minimum(span, M - first), BLOCK_K):
        mask_p = offs_p < M - first - step
        g = tl.load(g_ptrs, mask=mask_p[None, :] & mask_k[:, None], other=0.0)
        word = tl.load(borders_ptr + (pixel + offs_p), mask=mask_p, other=0).to(tl.int32)
        if POOL:
            x = tl.full([BLOCK_K, BLOCK_N], float("-inf"), x_ptr.dtype.element_ty)
            for i in tl.static_range(9):
                tap_bits = border_bits(i // 3 - 1, i % 3 - 1)
                inside = (word & tap_bits) == tap_bits
                shifted = ((i // 3 - 1) * W + (i % 3 - 1)) * x_stride
                value = tl.load(x_ptrs + shifted, mask=inside[:, None] & mask_n[None, :], other=float("-inf"))
                x = tl.maximum(x, value, propagate_nan=tl.PropagateNan.ALL)
            # Minus infinity times the zero gradients of pixels beyond M would be NaN.
            x = tl.where(mask_p[:, None] & mask_n[None, :], x, 0.0).to(x_ptr.dtype.element_ty)
        else:
            inside = (word[:, None] & bits[None, :]) == bits[None, :]
            x = tl.load(x_ptrs, mask=inside, other=0.0)
        acc = tl.dot(g, x, acc, input_precision="tf32", out_dtype=ACC)
        g_ptrs += BLOCK_K * g_stride
        x_ptrs += BLOCK_K * x_stride
        pixel += advance
        pixel = tl.where(pixel >= HW, pixel - HW, pixel)

    part_tile = part_ptr + tl.program_id(1).to(tl.int64) * (K * GEMM_N)
    HALF: tl.constexpr = BLOCK_N // 2
    if BLOCK_N > 128:
        # A store goes through shared memory, 128 KB of it for a whole tile of 128x256. The halves of a row lie in one
        # thread's registers in every MMA layout.
        left, right = tl.split(tl.permute(tl.reshape(acc, [BLOCK_M, 2, HALF]), [0, 2, 1]))
        store_part(part_tile, left, k, mask_k, pid_n * BLOCK_N, GEMM_N, HALF)
        store_part(part_tile, right, k, mask_k, pid_n * BLOCK_N + HALF, GEMM_N, HALF)
    else:
        store_part(part_tile, acc, k, mask_k, pid_n * BLOCK_N, GEMM_N, BLOCK_N)


def conv_wgrad(
    g: ChannelSlice,
    x: ChannelSlice,
    part: Tensor,
    borders: Tensor,
    *,
    gemm_m: int,
    image: tuple[int, int],
    pool: bool,
    tile: Tile,
    unit: int,
) -> None:
    """Launch B4 once.

    g: K channels, fp16, bf16 or fp32 (as TF32). x: C channels of the same dtype. part: fp32 [SPLIT_K, K, R, R, C]
    dense, R 1, 3 or 5. borders: int16 words of at least H*W + BLOCK_K - 1 pixels, as B1 writes them. image: (H, W);
    gemm_m = N*H*W. pool: x is pooled while it is loaded; R is 1.
    """
    (splits, k, r, _, c), (h, w) = part.shape, image
    span = triton.cdiv(triton.cdiv(gemm_m, tile.BLOCK_K), splits) * tile.BLOCK_K
    launch(
        conv_wgrad_kernel,
        (triton.cdiv(k, tile.BLOCK_M) * triton.cdiv(r * r * c, tile.BLOCK_N), splits),
        (
            g.base, x.base, part, borders,
            gemm_m, h * w, w, r, k // unit, c // unit, g.c_offset // unit, g.row_stride // unit,
            x.c_offset // unit, x.row_stride // unit, span,
        ),
        dict(UNIT=unit, POOL=pool, ACC=accumulator(g.base.dtype)),
        tile,
    )  # fmt: skip
