"""B4: the gradient of a convolution to its weights (stride 1, "same" padding), in parts that are summed afterwards.

    part[i, k, r, s, c] = sum over the i-th range of pixels m of g[m, k] * x[pixel(m) + (r - P, s - P), c]   P = R // 2
    for branch 4 (1x1 behind the max-pool), x[m, c] is the maximum of x over the 3x3 window of m, taken while loading

Four launches a block: 3x3 from (g2, r3), 5x5 or 3x3 from (g3, r5), the three reductions as one from
([g1 | dr3 | dr5], x), and branch 4 from (g4, x).

Shapes:  g [M, K] slice; x [M, C] rows, row stride at run time; part fp32 [SPLIT_K, K, R, R, C] dense; borders int16.
GEMM:    GEMM_M = K, GEMM_N = R*R*C, GEMM_K = M = N*H*W, cut into SPLIT_K ranges (choice.split_k, by shape and tile).

Where a tap lies outside the image of its pixel, x counts as 0. The loop asks that of words that B1 has written, one a
pixel of an image (common.border_bits), whatever R is. The pool has a loop of its own: a thread pools four neighbouring
pixels, whose row and column it carries from step to step, and stores them to shared memory for the product.

A tile of columns may straddle taps: the 400 columns of a 5x5 over 16 channels take 4 tiles of 128 (78% useful)
where a tile per tap takes 25 (13%). The sums end in fp32 and are added in a fixed order by B5: repeats are identical.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from inception_fused.block.views import ChannelSlice, Tile
from inception_fused.kernels.common import border_bits, largest, largest_where, tile_order
from inception_fused.runtime.launch import accumulator, launch

RUN_TIME = ["M", "H", "W", "R", "K", "C", "g_offset", "g_stride", "x_offset", "x_stride", "span"]
"""Sizes and strides, for which no binary is made anew."""


@triton.jit
def next_pixel(row, column, H, W):
    """The pixel after (row, column): after an image's last the first of the next."""
    last = column == W - 1
    row = tl.where(last, row + 1, row)
    return tl.where(row == H, 0, row), tl.where(last, 0, column + 1)


@triton.jit
def three_rows(x_ptrs, pixel, up, down, W, x_stride):
    """Maximum of x at each pixel, above it where ``up`` and below it where ``down``."""
    above, below = tl.where(up, pixel - W, pixel), tl.where(down, pixel + W, pixel)
    value = largest(tl.load(x_ptrs + (above * x_stride)[:, None]), tl.load(x_ptrs + (below * x_stride)[:, None]))
    return largest(value, tl.load(x_ptrs + (pixel * x_stride)[:, None]))


@triton.jit
def pooled_step(
    acc, g_tile, g_offs, x_ptrs, row, column, left, H, W, g_stride, x_stride, mask_k,
    WHOLE: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """acc + g @ pooled x of BLOCK_K pixels, of which ``left`` exist: WHOLE, all.

    A neighbour outside the image is replaced by one inside, which leaves the maximum as it is. Four neighbouring pixels
    are one thread's: of six columns it needs the maxima of three rows, hence 18 loads where each alone needs nine. The
    first pixels of all fours are the first product's, their seconds the next one's.
    """
    p1 = 4 * tl.arange(0, BLOCK_K // 4)
    r1, c1 = row, column
    r2, c2 = next_pixel(r1, c1, H, W)
    r3, c3 = next_pixel(r2, c2, H, W)
    r4, c4 = next_pixel(r3, c3, H, W)
    p2, p3, p4 = p1 + 1, p1 + 2, p1 + 3
    e1, e2, e3, e4 = p1 < left, p2 < left, p3 < left, p4 < left
    u1, u2, u3, u4 = r1 > 0, r2 > 0, r3 > 0, r4 > 0
    d1, d2, d3, d4 = r1 < H - 1, r2 < H - 1, r3 < H - 1, r4 < H - 1
    p0, p5 = tl.where(c1 > 0, p1 - 1, p1), tl.where(c4 < W - 1, p4 + 1, p4)
    if not WHOLE:
        # A pixel that does not exist is the last one that does, without neighbours.
        u1, u2, u3, u4, d1, d2, d3, d4 = u1 & e1, u2 & e2, u3 & e3, u4 & e4, d1 & e1, d2 & e2, d3 & e3, d4 & e4
        p0, p1, p2 = tl.minimum(p0, left - 1), tl.minimum(p1, left - 1), tl.minimum(p2, left - 1)
        p3, p4, p5 = tl.minimum(p3, left - 1), tl.minimum(p4, left - 1), tl.minimum(p5, left - 1)

    v0 = three_rows(x_ptrs, p0, u1, d1, W, x_stride)
    v1 = three_rows(x_ptrs, p1, u1, d1, W, x_stride)
    v2 = three_rows(x_ptrs, p2, u2, d2, W, x_stride)
    v3 = three_rows(x_ptrs, p3, u3, d3, W, x_stride)
    v4 = three_rows(x_ptrs, p4, u4, d4, W, x_stride)
    v5 = three_rows(x_ptrs, p5, u4, d4, W, x_stride)
    x1 = largest_where(c1 < W - 1, largest(v0, v1), v2, v1)
    x2 = largest_where(c2 < W - 1, largest_where(c2 > 0, v2, v1, v2), v3, v2)
    x3 = largest_where(c3 < W - 1, largest_where(c3 > 0, v3, v2, v3), v4, v3)
    x4 = largest_where(c4 > 0, largest(v5, v4), v3, v4)
    acc = multiplied(acc, g_tile + g_offs, x1, mask_k, e1, WHOLE)
    acc = multiplied(acc, g_tile + (g_offs + g_stride), x2, mask_k, e2, WHOLE)
    acc = multiplied(acc, g_tile + (g_offs + 2 * g_stride), x3, mask_k, e3, WHOLE)
    return multiplied(acc, g_tile + (g_offs + 3 * g_stride), x4, mask_k, e4, WHOLE)


@triton.jit
def multiplied(acc, g_ptrs, x, mask_k, exists, WHOLE: tl.constexpr):
    """acc + g @ x over the pixels that exist."""
    if WHOLE:
        g = tl.load(g_ptrs, mask=mask_k[:, None], other=0.0)
    else:
        g = tl.load(g_ptrs, mask=mask_k[:, None] & exists[None, :], other=0.0)
        # What is not finite would be NaN times zero.
        x = tl.where(exists[:, None], x, 0.0).to(x.dtype)
    return tl.dot(g, x, acc, input_precision="tf32", out_dtype=acc.dtype)


@triton.jit
def pooled_range(
    acc, g_tile, x_tile, first, end, H, W, C, g_stride, x_stride, k, mask_k, n,
    UNIT: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """acc + g @ pooled x over a range's pixels, ``end`` from the first on. Plain loads, so that L1 serves what rows and
    columns of neighbouring pixels share."""
    quads = 4 * tl.arange(0, BLOCK_K // 4)
    g_offs = quads[None, :] * g_stride + k[:, None]
    # Channels beyond C read the first one's: what they give is not stored.
    x_ptrs = x_tile + tl.max_contiguous(tl.multiple_of(tl.where(n < C, n, 0), UNIT), UNIT)[None, :]
    pixel = first + quads
    row, column = pixel // W % H, pixel % W
    # A step is so many rows and columns further.
    rows, columns = BLOCK_K // W % H, BLOCK_K % W
    for _ in range(end // BLOCK_K):
        acc = pooled_step(
            acc, g_tile, g_offs, x_ptrs, row, column, BLOCK_K, H, W, g_stride, x_stride, mask_k, True, BLOCK_K
        )
        g_tile += BLOCK_K * g_stride
        x_ptrs += BLOCK_K * x_stride
        column += columns
        row += rows + (column >= W).to(tl.int32)
        column = tl.where(column >= W, column - W, column)
        row = tl.where(row >= H, row - H, row)
    left = end % BLOCK_K
    if left != 0:
        acc = pooled_step(
            acc, g_tile, g_offs, x_ptrs, row, column, left, H, W, g_stride, x_stride, mask_k, False, BLOCK_K
        )
    return acc


@triton.jit
def store_part(part_tile, acc, k, mask_k, n0, GEMM_N, WIDTH: tl.constexpr):
    """Columns n0 to n0 + WIDTH of the rows k of a part."""
    n = n0 + tl.arange(0, WIDTH)
    tl.store(part_tile + (k[:, None] * GEMM_N + n[None, :]), acc, mask=mask_k[:, None] & (n < GEMM_N)[None, :])


@triton.jit(do_not_specialize=RUN_TIME)
def conv_wgrad_kernel(
    g_ptr, x_ptr, part_ptr, borders_ptr,
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
    HW = H * W
    pixel, advance = first % HW, BLOCK_K % HW

    acc = tl.zeros([BLOCK_M, BLOCK_N], dtype=ACC)
    end = tl.minimum(span, M - first)
    if POOL:
        acc = pooled_range(
            acc, g_tile, x_tile, first, end, H, W, C, g_stride, x_stride, k, mask_k, n, UNIT, BLOCK_N, BLOCK_K
        )
    else:
        for step in range(0, end, BLOCK_K):
            mask_p = offs_p < M - first - step
            g = tl.load(g_ptrs, mask=mask_p[None, :] & mask_k[:, None], other=0.0)
            word = tl.load(borders_ptr + (pixel + offs_p), mask=mask_p, other=0).to(tl.int32)
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
    dense, R 1, 3 or 5. borders: int16 words of at least H*W + BLOCK_K - 1 pixels, as B1 writes them; the pool reads
    none. image: (H, W); gemm_m = N*H*W. pool: x is pooled while it is loaded; R is 1, BLOCK_K a multiple of 4.
    """
    splits, k, r, _, c = part.shape
    span = triton.cdiv(triton.cdiv(gemm_m, tile.BLOCK_K), splits) * tile.BLOCK_K
    launch(
        conv_wgrad_kernel,
        (triton.cdiv(k, tile.BLOCK_M) * triton.cdiv(r * r * c, tile.BLOCK_N), splits),
        (
            g.base, x.base, part, borders,
            gemm_m, *image, r, k // unit, c // unit, g.c_offset // unit, g.row_stride // unit,
            x.c_offset // unit, x.row_stride // unit, span,
        ),
        dict(UNIT=unit, POOL=pool, ACC=accumulator(g.base.dtype)),
        tile,
    )  # fmt: skip
