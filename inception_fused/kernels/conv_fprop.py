"""K3 and K4: a 3x3 or 5x5 convolution (stride 1, "same" padding) as an implicit GEMM, written into a slice of y; and
the 1x1 of GoogLeNet's stem.

    y[m, k] = act(sum over r, s, c of x[pixel(m) + (r - P, s - P), c] * w[k, r, s, c] * scale[k] + shift[k])
    P = R // 2; pixels outside the image are zero.

Shapes:  x [M, C] rows of an NHWC tensor (a part of r), row stride at run time; w [K, R, R, C] dense (KRSC);
         y [M, K] slice; bits [M, ceil(K / 8)] of uint8.
GEMM:    GEMM_M = M = N*H*W, GEMM_N = K, GEMM_K = R*R*C, walked in chunks of BLOCK_K channels, each tap by tap, so that
         a chunk of a tile's rows is read R*R times in a row.

No im2col buffer: rows are pixels in memory order, so a tap is a shift by (r - P) * W + (s - P) rows; whether a
pixel's tap lies inside the image is read from one word of bits per row, made once (CUTLASS's predicate idea). R is a
run-time value: one binary serves both windows where their tiles are the same.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from inception_fused.block.views import ChannelSlice, Epilogue, Tile
from inception_fused.kernels.common import store_slice, tile_order
from inception_fused.runtime.launch import Arguments, accumulator, launcher_of


@triton.jit
def window_bits(pixel, mask_m, H, W, R):
    """[BLOCK_M] words: bit r * R + s is set where the tap (r, s) of a pixel lies inside the image; 0 beyond M."""
    # Unsigned divisions: 60 instructions fewer at 128 rows, counted on sm_90. common.coordinates() takes 30 to 60 more.
    row = (pixel.to(tl.uint32) // W.to(tl.uint32)).to(tl.int32)
    column = pixel - row * W
    row = (row.to(tl.uint32) % H.to(tl.uint32)).to(tl.int32)
    first_r, end_r = tl.maximum(R // 2 - row, 0), tl.minimum(H + R // 2 - row, R)
    first_s, end_s = tl.maximum(R // 2 - column, 0), tl.minimum(W + R // 2 - column, R)
    # A one at each r * R: the product repeats the taps of a row in every row of the window.
    every_row = ((1 << R * R) - 1) // ((1 << R) - 1)
    inside_h = (1 << end_r * R) - (1 << first_r * R)
    inside_w = (1 << end_s) - (1 << first_s)
    return tl.where(mask_m, every_row * inside_w & inside_h, 0)


@triton.jit
def implicit_gemm(
    x_ptr, w_ptr, m0, offs_m, mask_m, pid_n, H, W, C, K, x_offset, x_stride, R,
    ACC: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    STAGES: tl.constexpr = None,
):  # fmt: skip
    """Main loop of a convolution, forward or as dgrad: the tile [BLOCK_M, BLOCK_N] at row m0; 0 in rows beyond M. R may
    be a run-time value up to 5. STAGES: of the loop, None for those of the launch."""
    n = pid_n * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_n = n < K
    offs_k = tl.arange(0, BLOCK_K)
    words = window_bits(m0 + offs_m, mask_m, H, W, R)

    # Bases advance to the tile in int64; a tap's shift of at most (P*W + P) rows stays in int32.
    x_ptrs = x_ptr + (m0.to(tl.int64) * x_stride + x_offset) + (offs_m[:, None] * x_stride + offs_k[None, :])
    w_ptrs = w_ptr + (n[None, :] * (R * R * C) + offs_k[:, None])
    first_shift = -(R // 2) * (W + 1) * x_stride
    next_row = (W - R + 1) * x_stride

    # A step's tap and chunk by addition: with two divisions a step took 25 to 80 instructions more, counted on sm_90.
    tap = 1
    s = 0
    k0 = 0
    shift = first_shift
    w_shift = 0
    acc = tl.zeros([BLOCK_M, BLOCK_N], dtype=ACC)
    for _ in tl.range(R * R * tl.cdiv(C, BLOCK_K), num_stages=STAGES):
        mask_k = offs_k < C - k0
        x = tl.load(x_ptrs + shift, mask=((words & tap) != 0)[:, None] & mask_k[None, :], other=0.0)
        w = tl.load(w_ptrs + w_shift, mask=mask_n[None, :] & mask_k[:, None], other=0.0)
        acc = tl.dot(x, w, acc, input_precision="tf32", out_dtype=ACC)
        tap <<= 1
        s += 1
        shift += tl.where(s == R, next_row, x_stride)
        s = tl.where(s == R, 0, s)
        w_shift += C
        last = tap == 1 << R * R
        tap = tl.where(last, 1, tap)
        k0 += tl.where(last, BLOCK_K, 0)
        shift = tl.where(last, first_shift + k0, shift)
        w_shift = tl.where(last, k0, w_shift)
    return acc


RUN_TIME = [
    "M", "H", "W", "R", "C", "K", "x_offset", "x_stride", "y_offset", "y_stride", "bits_offset", "bits_stride",
]  # fmt: skip
"""Sizes and strides, for which no binary is made anew."""


@triton.jit
def conv_fprop_program(
    pid, x_ptr, w_ptr, shift_ptr, scale_ptr, y_ptr, bits_ptr,
    M, H, W, R, C, K, x_offset, x_stride, y_offset, y_stride, bits_offset, bits_stride,
    UNIT: tl.constexpr, RELU: tl.constexpr, HAS_SHIFT: tl.constexpr, HAS_SCALE: tl.constexpr,
    SAVE_BITS: tl.constexpr, ACC: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr,
    STAGES: tl.constexpr = None,
):  # fmt: skip
    """What one program of the convolution does. STAGES: as for :func:`implicit_gemm`."""
    # M, H, W, R and the bits' figures are plain counts, every other size and stride is in units of UNIT elements.
    C, K = C * UNIT, K * UNIT
    x_offset, x_stride, y_offset, y_stride = x_offset * UNIT, x_stride * UNIT, y_offset * UNIT, y_stride * UNIT

    pid_m, pid_n = tile_order(pid, tl.cdiv(M, BLOCK_M), tl.cdiv(K, BLOCK_N), GROUP_M)
    m0 = pid_m * BLOCK_M
    offs_m = tl.arange(0, BLOCK_M)
    mask_m = offs_m < M - m0
    acc = implicit_gemm(
        x_ptr, w_ptr, m0, offs_m, mask_m, pid_n, H, W, C, K, x_offset, x_stride, R,
        ACC, BLOCK_M, BLOCK_N, BLOCK_K, STAGES,
    )  # fmt: skip
    store_slice(
        acc, shift_ptr, scale_ptr, y_ptr, bits_ptr, m0, offs_m, mask_m, pid_n,
        K, y_offset, y_stride, bits_offset, bits_stride,
        RELU, HAS_SHIFT, HAS_SCALE, SAVE_BITS, BLOCK_M, BLOCK_N,
    )  # fmt: skip


@triton.jit(do_not_specialize=RUN_TIME)
def conv_fprop_kernel(
    x_ptr, w_ptr, shift_ptr, scale_ptr, y_ptr, bits_ptr,
    M, H, W, R, C, K, x_offset, x_stride, y_offset, y_stride, bits_offset, bits_stride,
    UNIT: tl.constexpr, RELU: tl.constexpr, HAS_SHIFT: tl.constexpr, HAS_SCALE: tl.constexpr,
    SAVE_BITS: tl.constexpr, ACC: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr,
):  # fmt: skip
    conv_fprop_program(
        tl.program_id(0), x_ptr, w_ptr, shift_ptr, scale_ptr, y_ptr, bits_ptr,
        M, H, W, R, C, K, x_offset, x_stride, y_offset, y_stride, bits_offset, bits_stride,
        UNIT, RELU, HAS_SHIFT, HAS_SCALE, SAVE_BITS, ACC, BLOCK_M, BLOCK_N, BLOCK_K, GROUP_M,
    )  # fmt: skip


def arguments(
    x: ChannelSlice,
    w: Tensor,
    y: ChannelSlice,
    bits: ChannelSlice | None,
    *,
    gemm_m: int,
    image: tuple[int, int],
    epilogue: Epilogue,
    tile: Tile,
    unit: int,
) -> Arguments:
    """What the device code is given.

    x: C channels, fp16, bf16 or fp32 (as TF32). w: [K, C, R, R] in channels_last memory (KRSC), R 1, 3 or 5.
    y: the branch's slice. bits: uint8 slice for its mask bits, or None. image: (H, W); gemm_m = N*H*W.
    """
    return Arguments(
        triton.cdiv(gemm_m, tile.BLOCK_M) * triton.cdiv(y.channels, tile.BLOCK_N),
        (
            x.base, w, epilogue.shift, epilogue.scale, y.base, bits.base if bits else None,
            gemm_m, *image, w.shape[-1], x.channels // unit, y.channels // unit,
            x.c_offset // unit, x.row_stride // unit, y.c_offset // unit, y.row_stride // unit,
            bits.c_offset if bits else 0, bits.row_stride if bits else 0,
        ),
        dict(
            UNIT=unit, RELU=epilogue.relu, HAS_SHIFT=epilogue.shift is not None,
            HAS_SCALE=epilogue.scale is not None, SAVE_BITS=bits is not None, ACC=accumulator(x.base.dtype),
        ),
    )  # fmt: skip


conv_fprop = launcher_of(conv_fprop_kernel, arguments)
"""Launch K3 or K4, of what :func:`arguments` takes."""
