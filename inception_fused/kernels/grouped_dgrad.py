"""B3: the gradient to a block's input: one GEMM for the three 1x1 reductions, the max-pool's gradient in its epilogue.

    dx[q, c] = sum over k of g[q, k] * w_t[c, k]
             + sum over t = 3 * r + s of dpool[p, c] where taps[p, c] == t, p = pixel(q) - (r - 1, s - 1) in the image

Shapes:  g [M, K] slice: [g1 | dr3 | dr5], side by side in one buffer; w_t [C, K] dense: [w1; w2_reduce; w3_reduce]
         transposed; dpool [M, C] rows; taps [M, ceil(C / 2)] of uint8 (even channel in the low half of a byte);
         dx [M, C] rows.
GEMM:    GEMM_M = M = N*H*W, GEMM_N = C, GEMM_K = K, the concatenated channels of three convolutions.

A pooled pixel sent its gradient to one of nine input pixels; here every input pixel asks its nine neighbours, in a
fixed order, so there are no atomics and a repeat is bit-identical. Eager adds four tensors of dx's size instead.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from inception_fused.block.views import ChannelSlice, Tile
from inception_fused.kernels.common import tile_order, valid_taps
from inception_fused.runtime.launch import accumulator, launch

TAP_WORDS = {8: torch.int32, 4: torch.int16, 2: torch.uint8, 1: torch.uint8}
"""Type by which taps are read, for each unit: the taps of 16 bytes of dpool in one load."""

RUN_TIME = [
    "M", "H", "W", "K", "C", "g_offset", "g_stride", "dpool_offset", "dpool_stride", "dx_stride", "taps_stride",
]  # fmt: skip
"""Sizes and strides, for which no binary is made anew."""


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
    offs_k = tl.arange(0, BLOCK_K)

    # Bases advance to the tile in int64; offsets inside the tile stay in int32.
    g_ptrs = g_ptr + (m0.to(tl.int64) * g_stride + g_offset) + (offs_m[:, None] * g_stride + offs_k[None, :])
    w_ptrs = w_ptr + (n[None, :] * K + offs_k[:, None])
    acc = tl.zeros([BLOCK_M, BLOCK_N], dtype=ACC)
    for k0 in range(0, K, BLOCK_K):
        g = tl.load(g_ptrs + k0, mask=mask_m[:, None] & (offs_k < K - k0)[None, :], other=0.0)
        w = tl.load(w_ptrs + k0, mask=mask_n[None, :] & (offs_k < K - k0)[:, None], other=0.0)
        acc = tl.dot(g, w, acc, input_precision="tf32", out_dtype=ACC)

    pixel = m0 + offs_m
    taps_h = tl.where(mask_m, valid_taps(pixel // W % H, H, 3, 3), 0)
    taps_w = valid_taps(pixel % W, W, 3, 3)
    dpool_tile = dpool_ptr + (m0.to(tl.int64) * dpool_stride + dpool_offset)
    taps_tile = taps_ptr + m0.to(tl.int64) * taps_stride
    words = pid_n * (BLOCK_N // NIBBLES) + tl.arange(0, BLOCK_N // NIBBLES)
    shifts = 4 * tl.arange(0, NIBBLES)[None, None, :]
    # Not unrolled: nine taps' loads in flight at once put 792 bytes on the stack at 128x64 (sm_90).
    for tap in tl.range(9, num_stages=1):
        r = tap // 3
        s = tap - 3 * r
        # The pixel whose tap (r, s) leads here lies the other way.
        inside = ((taps_h >> (2 - r)) & (taps_w >> (2 - s)) & 1) != 0
        rows = offs_m + ((1 - r) * W + (1 - s))
        mask = inside[:, None] & (words * NIBBLES < C)[None, :]
        packed = tl.load(taps_tile + (rows[:, None] * taps_stride + words[None, :]), mask=mask, other=0)
        sent = tl.reshape((packed.to(tl.int32)[:, :, None] >> shifts) & 15, [BLOCK_M, BLOCK_N]) == tap
        mask = inside[:, None] & mask_n[None, :]
        dpool = tl.load(dpool_tile + (rows[:, None] * dpool_stride + n[None, :]), mask=mask, other=0.0)
        acc += tl.where(sent, dpool, 0.0).to(ACC)

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
