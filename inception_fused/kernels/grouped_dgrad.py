"""B3: the gradient to a block's input: the max-pool's gradient, and on top one GEMM for the three 1x1 reductions.

    dx[q, c] = sum over t = 3 * r + s of dpool[p, c] where taps[p, c] == t, p = pixel(q) - (r - 1, s - 1) in the image
             + sum over k of g[q, k] * w_t[c, k]

Shapes:  g [M, K] slice: [g1 | dr3 | dr5], side by side in one buffer; w_t [C, K] dense: [w1; w2_reduce; w3_reduce]
         transposed; dpool [M, C] rows; taps [M, ceil(C / 2)] of uint8 (even channel in the low half of a byte);
         dx [M, C] rows.
GEMM:    GEMM_M = M = N*H*W, GEMM_N = C, GEMM_K = K, the concatenated channels of three convolutions.

A pooled pixel sent its gradient to one of nine input pixels; here every input pixel asks its nine neighbours, in a
fixed order, so there are no atomics and a repeat is bit-identical. Eager adds four tensors of dx's size instead.

The order of a sum: the pool's nine terms by tap, in fp32, then the products, for which that sum is the accumulator's
first value. So dpool is selected and added in the layout in which it is loaded, and goes to the accumulator's layout
once; behind the GEMM it would go there at every tap (706 instructions a tap instead of 311, counted on sm_90).
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from inception_fused.block.views import TAP_WORDS, ChannelSlice, Tile
from inception_fused.kernels.common import add_gemm, coordinates, tile_order
from inception_fused.runtime.launch import accumulator, launch

RUN_TIME = [
    "M", "H", "W", "K", "C", "g_offset", "g_stride", "dpool_offset", "dpool_stride", "dx_stride", "taps_stride",
]  # fmt: skip
"""Sizes and strides, for which no binary is made anew."""


@triton.jit
def reaching_taps(row, col, H, W):
    """Bit 3 * r + s set where pixel (row - (r - 1), col - (s - 1)) lies in the image: the taps that may lead here."""
    outside = tl.where(row == H - 1, 0o007, 0) | tl.where(row == 0, 0o700, 0)
    outside |= tl.where(col == W - 1, 0o111, 0) | tl.where(col == 0, 0o444, 0)
    return 0o777 & ~outside


@triton.jit(do_not_specialize=RUN_TIME)
def grouped_dgrad_kernel(
    g_ptr, w_ptr, dpool_ptr, taps_ptr, dx_ptr,
    M, H, W, K, C, g_offset, g_stride, dpool_offset, dpool_stride, dx_stride, taps_stride,
    UNIT: tl.constexpr, NIBBLES: tl.constexpr, ACC: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr,
):  # fmt: skip
    # M, H, W are plain counts, taps_stride is in words of NIBBLES taps, every other size and stride in units of UNIT
    # elements.
    K, C, g_offset, g_stride = K * UNIT, C * UNIT, g_offset * UNIT, g_stride * UNIT
    dpool_offset, dpool_stride, dx_stride = dpool_offset * UNIT, dpool_stride * UNIT, dx_stride * UNIT

    pid_m, pid_n = tile_order(tl.program_id(0), tl.cdiv(M, BLOCK_M), tl.cdiv(C, BLOCK_N), GROUP_M)
    m0 = pid_m * BLOCK_M
    offs_m = tl.arange(0, BLOCK_M)
    mask_m = offs_m < M - m0
    n = pid_n * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_n = n < C

    # Bases advance to the tile in int64; offsets inside the tile stay in int32.
    words = pid_n * (BLOCK_N // NIBBLES) + tl.arange(0, BLOCK_N // NIBBLES)
    row, col = coordinates(m0, offs_m, H, W, BLOCK_M)
    reached = reaching_taps(row, col, H, W)
    reached = tl.where(mask_m[:, None] & (words * NIBBLES < C)[None, :], reached[:, None], 0)
    nibbles = (15 << (4 * tl.arange(0, NIBBLES)))[None, None, :]
    taps_ptrs = taps_ptr + m0.to(tl.int64) * taps_stride + (offs_m[:, None] * taps_stride + words[None, :])
    dpool_tile = dpool_ptr + (m0.to(tl.int64) * dpool_stride + dpool_offset)
    dpool_ptrs = dpool_tile + (offs_m[:, None] * dpool_stride + n[None, :])
    acc = tl.zeros([BLOCK_M, BLOCK_N], dtype=ACC)
    # Not unrolled: with nine taps' loads in flight at once 32 bytes (fp32) and 112 (bf16) lie on the stack (sm_90).
    for tap in tl.range(9, num_stages=1):
        # The pixel whose tap (r, s) leads here lies the other way.
        r = tap // 3
        rows = (1 - r) * W + (1 - tap + 3 * r)
        inside = (reached & (1 << tap)) != 0
        # Eight times this tap. No tap is 15.
        eight = tl.zeros([1, 1], tl.int32) + tap
        eight = eight * 0x1111111 | eight << 28
        packed = tl.load(taps_ptrs + rows * taps_stride, mask=inside, other=-1).to(tl.int32)
        sent = tl.reshape(((packed ^ eight)[:, :, None] & nibbles) == 0, [BLOCK_M, BLOCK_N])
        mask = tl.broadcast_to(inside[:, :, None], [BLOCK_M, BLOCK_N // NIBBLES, NIBBLES])
        mask = tl.max_constancy(tl.reshape(mask, [BLOCK_M, BLOCK_N]), [1, NIBBLES])
        if UNIT == 1:
            mask = mask & mask_n[None, :]
        dpool = tl.load(dpool_ptrs + rows * dpool_stride, mask=mask, other=0.0)
        # Not a sum of where(sent, dpool, 0.0): this is one predicated addition.
        acc = tl.where(sent, acc + dpool.to(ACC), acc)

    acc = add_gemm(acc, g_ptr, w_ptr, m0, offs_m, mask_m, pid_n, K, C, g_offset, g_stride, BLOCK_N, BLOCK_K)
    dx_tile = dx_ptr + m0.to(tl.int64) * dx_stride
    mask = mask_m[:, None] & mask_n[None, :]
    tl.store(dx_tile + (offs_m[:, None] * dx_stride + n[None, :]), acc.to(dx_ptr.dtype.element_ty), mask=mask)


def grouped_dgrad(
    g: ChannelSlice,
    w_t: Tensor,
    dpool: ChannelSlice,
    taps: Tensor,
    dx: ChannelSlice,
    *,
    gemm_m: int,
    image: tuple[int, int],
    tile: Tile,
    unit: int,
) -> None:
    """Launch B3.

    g: K channels, fp16, bf16 or fp32 (as TF32). w_t: [C, K] dense. dpool: C channels. taps: uint8
    [gemm_m, ceil(C / 2)] dense. dx: C channels, c_offset 0. image: (H, W); gemm_m = N*H*W.
    """
    words = taps.view(TAP_WORDS[unit])
    launch(
        grouped_dgrad_kernel,
        (triton.cdiv(gemm_m, tile.BLOCK_M) * triton.cdiv(dx.channels, tile.BLOCK_N),),
        (
            g.base, w_t, dpool.base, words, dx.base,
            gemm_m, *image, g.channels // unit, dx.channels // unit, g.c_offset // unit, g.row_stride // unit,
            dpool.c_offset // unit, dpool.row_stride // unit, dx.row_stride // unit, words.shape[1],
        ),
        dict(UNIT=unit, NIBBLES=2 * words.element_size(), ACC=accumulator(g.base.dtype)),
        tile,
    )  # fmt: skip
