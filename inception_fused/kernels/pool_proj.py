"""K2: 3x3 max-pool (stride 1, padding 1) in the prologue of a 1x1 convolution, written into branch 4's slice of y.

    p[m, c] = max over the 3x3 window of pixel m of x[., c]          outside the image: minus infinity
    y[m, k] = act(sum over c of p[m, c] * w[k, c] * scale[k] + shift[k])
    taps[m, c] = 3 * r + s of the window's arg-max, four bits

Shapes:  x [M, C] rows of an NHWC tensor, row stride at run time; w [K, C] dense; y [M, K] slice;
         bits [M, ceil(K / 8)] and taps [M, ceil(C / 2)] of uint8 (even channel in the low half of a byte).
GEMM:    GEMM_M = M = N*H*W, GEMM_N = K, GEMM_K = C. BLOCK_N >= K, else the pool is recomputed per tile of columns.

PyTorch's arg-max, exactly: windows are scanned row by row, a later value wins if it is greater or NaN; so ties go to
the first maximum, the last NaN of a window wins, and a window of minus infinities keeps its first valid tap.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from inception_fused.block.views import ChannelSlice, Epilogue, Tile
from inception_fused.kernels.common import store_slice, tile_order, valid_taps
from inception_fused.runtime.launch import accumulator, launch

RUN_TIME = [
    "M", "H", "W", "C", "K", "x_stride", "y_offset", "y_stride", "bits_offset", "bits_stride", "taps_stride",
]  # fmt: skip
"""Sizes and strides, for which no binary is made anew."""


@triton.jit(do_not_specialize=RUN_TIME)
def pool_proj_kernel(
    x_ptr, w_ptr, shift_ptr, scale_ptr, y_ptr, bits_ptr, taps_ptr,
    M, H, W, C, K, x_stride, y_offset, y_stride, bits_offset, bits_stride, taps_stride,
    UNIT: tl.constexpr, RELU: tl.constexpr, HAS_SHIFT: tl.constexpr, HAS_SCALE: tl.constexpr,
    SAVE_BITS: tl.constexpr, SAVE_TAPS: tl.constexpr, ACC: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr,
):  # fmt: skip
    # M, H, W and the figures of bits and taps are plain counts, every other is in units of UNIT elements.
    C, K = C * UNIT, K * UNIT
    x_stride, y_offset, y_stride = x_stride * UNIT, y_offset * UNIT, y_stride * UNIT

    pid_m, pid_n = tile_order(tl.program_id(0), tl.cdiv(M, BLOCK_M), tl.cdiv(K, BLOCK_N), GROUP_M)
    m0 = pid_m * BLOCK_M
    offs_m = tl.arange(0, BLOCK_M)
    mask_m = offs_m < M - m0
    n = pid_n * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_n = n < K
    offs_k = tl.arange(0, BLOCK_K)

    pixel = m0 + offs_m
    taps_h = tl.where(mask_m, valid_taps(pixel // W % H, H, 3, 3), 0)
    taps_w = valid_taps(pixel % W, W, 3, 3)
    first_tap = tl.where(taps_h & 1 != 0, 0, 3) + tl.where(taps_w & 1 != 0, 0, 1)

    x_tile = x_ptr + (m0.to(tl.int64) * x_stride)
    x_offs = offs_m[:, None] * x_stride + offs_k[None, :]
    w_ptrs = w_ptr + (n[None, :] * C + offs_k[:, None])

    acc = tl.zeros([BLOCK_M, BLOCK_N], dtype=ACC)
    for k0 in range(0, C, BLOCK_K):
        mask_k = offs_k < C - k0
        best = tl.full([BLOCK_M, BLOCK_K], float("-inf"), x_ptr.dtype.element_ty)
        arg = tl.zeros([BLOCK_M, BLOCK_K], tl.int32) + first_tap[:, None]
        for tap in tl.static_range(9):
            inside = ((taps_h >> (tap // 3)) & (taps_w >> (tap % 3)) & 1) != 0
            shifted = ((tap // 3 - 1) * W + (tap % 3 - 1)) * x_stride + k0
            x = tl.load(x_tile + (x_offs + shifted), mask=inside[:, None] & mask_k[None, :], other=float("-inf"))
            if SAVE_TAPS:
                wins = (x > best) | (x != x)
                best = tl.where(wins, x, best)
                arg = tl.where(wins, tap, arg)
            else:
                # Half the instructions of the comparison above (SASS, sm_80 and sm_90).
                best = tl.maximum(best, x, propagate_nan=tl.PropagateNan.ALL)
        # Minus infinity times the zero weights beyond C or K would be NaN.
        best = tl.where(mask_m[:, None] & mask_k[None, :], best, 0.0).to(x_ptr.dtype.element_ty)
        w = tl.load(w_ptrs + k0, mask=mask_n[None, :] & mask_k[:, None], other=0.0)
        acc = tl.dot(best, w, acc, input_precision="tf32", out_dtype=ACC)
        if SAVE_TAPS:
            if pid_n == 0:
                even, odd = tl.split(tl.reshape(tl.where(mask_k[None, :], arg, 0), [BLOCK_M, BLOCK_K // 2, 2]))
                offs_t = k0 // 2 + tl.arange(0, BLOCK_K // 2)
                taps_tile = taps_ptr + m0.to(tl.int64) * taps_stride
                mask_t = mask_m[:, None] & (offs_t * 2 < C)[None, :]
                taps_ptrs = taps_tile + (offs_m[:, None] * taps_stride + offs_t[None, :])
                tl.store(taps_ptrs, (even | odd << 4).to(tl.uint8), mask=mask_t)

    store_slice(
        acc, shift_ptr, scale_ptr, y_ptr, bits_ptr, m0, offs_m, mask_m, pid_n,
        K, y_offset, y_stride, bits_offset, bits_stride,
        RELU, HAS_SHIFT, HAS_SCALE, SAVE_BITS, BLOCK_M, BLOCK_N,
    )  # fmt: skip


def pool_proj(
    x: ChannelSlice,
    w: Tensor,
    y: ChannelSlice,
    bits: ChannelSlice | None,
    taps: Tensor | None,
    *,
    gemm_m: int,
    image: tuple[int, int],
    epilogue: Epilogue,
    tile: Tile,
    unit: int,
) -> None:
    """Launch K2.

    x: C channels, fp16, bf16 or fp32 (as TF32). w: [K, C, 1, 1] dense. y: branch 4's slice.
    bits: uint8 slice for its mask bits, or None. taps: uint8 [gemm_m, ceil(C / 2)] dense, or None.
    image: (H, W); gemm_m = N*H*W.
    """
    launch(
        pool_proj_kernel,
        (triton.cdiv(gemm_m, tile.BLOCK_M) * triton.cdiv(y.channels, tile.BLOCK_N),),
        (
            x.base, w, epilogue.shift, epilogue.scale, y.base, bits.base if bits else None, taps,
            gemm_m, *image, x.channels // unit, y.channels // unit, x.row_stride // unit,
            y.c_offset // unit, y.row_stride // unit, bits.c_offset if bits else 0, bits.row_stride if bits else 0,
            taps.shape[1] if taps is not None else 0,
        ),
        dict(
            UNIT=unit, RELU=epilogue.relu, HAS_SHIFT=epilogue.shift is not None,
            HAS_SCALE=epilogue.scale is not None, SAVE_BITS=bits is not None, SAVE_TAPS=taps is not None,
            ACC=accumulator(x.base.dtype),
        ),
        tile,
    )  # fmt: skip
