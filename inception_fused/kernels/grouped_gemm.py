"""K1: the three 1x1 reductions of a block as one grouped GEMM; x is read once, results go to three places.

    y[:, 0:K1]     = act(x @ w1^T * scale1 + shift1)            branch 1, straight into its slice of the output
    r[:, 0:K2]     = act(x @ w2^T * scale2 + shift2)            reduction of the 3x3 branch
    r[:, r5:r5+K3] = act(x @ w3^T * scale3 + shift3)            reduction of the 5x5 branch

Shapes:  x [M, C] rows of an NHWC tensor, row stride at run time; w1 [K1, C], w2 [K2, C], w3 [K3, C] dense;
         bits [M, ceil(K1 / 8)] of uint8, one bit per element of y's slice.
GEMM:    GEMM_M = M = N*H*W, GEMM_N = K1 + K2 + K3, GEMM_K = C.

A tile of columns may straddle two groups: each column carries its own pointers. The 176 columns of 3a then take
three tiles of 64 (92% useful) where a tile per group takes four (69%).
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from inception_fused.block.views import ChannelSlice, Epilogue, Tile
from inception_fused.kernels.common import affine_relu, store_bits, tile_order
from inception_fused.runtime.launch import Arguments, accumulator, launcher_of


@triton.jit
def by_group(n, K1, K2, first, second, third):
    """Per column: the value of the group that the column belongs to."""
    return tl.where(n < K1, first, tl.where(n < K1 + K2, second, third))


@triton.jit
def load_by_group(n, K1, K2, K3, ptr1, ptr2, ptr3):
    """[BLOCK_N] values of three vectors laid end to end."""
    ptrs = by_group(n, K1, K2, ptr1 + n, ptr2 + (n - K1), ptr3 + (n - K1 - K2))
    return tl.load(ptrs, mask=n < K1 + K2 + K3, other=0.0)


RUN_TIME = [
    "M", "C", "K1", "K2", "K3", "r5", "x_stride", "y_stride", "r_stride", "bits_stride",
]  # fmt: skip
"""Sizes and strides, for which no binary is made anew."""


@triton.jit
def grouped_gemm_program(
    pid, x_ptr, w1_ptr, w2_ptr, w3_ptr, shift1_ptr, shift2_ptr, shift3_ptr, scale1_ptr, scale2_ptr, scale3_ptr,
    y_ptr, r_ptr, bits_ptr,
    M, C, K1, K2, K3, r5, x_stride, y_stride, r_stride, bits_stride,
    UNIT: tl.constexpr, RELU: tl.constexpr, HAS_SHIFT: tl.constexpr, HAS_SCALE: tl.constexpr,
    SAVE_BITS: tl.constexpr, ACC: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr,
    STAGES: tl.constexpr = None,
):  # fmt: skip
    """What one program of the product does. STAGES: of its loop, None for those of the launch."""
    tl.static_assert(RELU or not SAVE_BITS, "mask bits are ReLU's")
    # M and bits_stride are plain counts, every other size and stride is in units of UNIT elements.
    C, K1, K2, K3, r5 = C * UNIT, K1 * UNIT, K2 * UNIT, K3 * UNIT, r5 * UNIT
    x_stride, y_stride, r_stride = x_stride * UNIT, y_stride * UNIT, r_stride * UNIT

    GEMM_N = K1 + K2 + K3
    pid_m, pid_n = tile_order(pid, tl.cdiv(M, BLOCK_M), tl.cdiv(GEMM_N, BLOCK_N), GROUP_M)
    m0 = pid_m * BLOCK_M
    offs_m = tl.arange(0, BLOCK_M)
    mask_m = offs_m < M - m0
    n = pid_n * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_n = n < GEMM_N
    offs_k = tl.arange(0, BLOCK_K)

    # Bases advance to the tile in int64; offsets inside the tile stay in int32.
    x_ptrs = x_ptr + m0.to(tl.int64) * x_stride + (offs_m[:, None] * x_stride + offs_k[None, :])
    w_rows = by_group(n, K1, K2, w1_ptr + n * C, w2_ptr + (n - K1) * C, w3_ptr + (n - K1 - K2) * C)
    w_rows = w_rows[None, :]
    if UNIT > 1:
        # True because pack hands over weights on 16-byte boundaries only, and C is a multiple of UNIT. Triton 3.6 sees
        # through the selection, later ones do not; 3.8 ignores the hint on a vector, and then loads weights two bytes
        # at a time: 4176 bytes of stack at 128x128 on sm_80.
        w_rows = tl.multiple_of(w_rows, [16, 16])
    w_ptrs = w_rows + offs_k[:, None]

    acc = tl.zeros([BLOCK_M, BLOCK_N], dtype=ACC)
    for k0 in tl.range(0, C, BLOCK_K, num_stages=STAGES):
        x = tl.load(x_ptrs + k0, mask=mask_m[:, None] & (offs_k < C - k0)[None, :], other=0.0)
        w = tl.load(w_ptrs + k0, mask=mask_n[None, :] & (offs_k < C - k0)[:, None], other=0.0)
        acc = tl.dot(x, w, acc, input_precision="tf32", out_dtype=ACC)

    shift = load_by_group(n, K1, K2, K3, shift1_ptr, shift2_ptr, shift3_ptr) if HAS_SHIFT else 0.0
    scale = load_by_group(n, K1, K2, K3, scale1_ptr, scale2_ptr, scale3_ptr) if HAS_SCALE else 1.0
    out = affine_relu(acc, shift, scale, HAS_SHIFT, HAS_SCALE, RELU).to(y_ptr.dtype.element_ty)

    # Two stores, of which most tiles do one: per-column pointers into either tensor would cost 64-bit registers, and
    # 352 bytes of stack at 128x128 with bits on sm_80. Bits first, as in store_slice().
    if pid_n * BLOCK_N < K1:
        if SAVE_BITS:
            bits_tile = bits_ptr + m0.to(tl.int64) * bits_stride
            store_bits(bits_tile, out, offs_m, mask_m, pid_n, K1, bits_stride, BLOCK_M, BLOCK_N)
        y_tile = y_ptr + m0.to(tl.int64) * y_stride
        tl.store(y_tile + (offs_m[:, None] * y_stride + n[None, :]), out, mask=mask_m[:, None] & (n < K1)[None, :])
    if pid_n * BLOCK_N + BLOCK_N > K1:
        r_tile = r_ptr + m0.to(tl.int64) * r_stride
        column = tl.where(n < K1 + K2, n - K1, n - K1 - K2 + r5)
        mask = mask_m[:, None] & (mask_n & (n >= K1))[None, :]
        tl.store(r_tile + (offs_m[:, None] * r_stride + column[None, :]), out, mask=mask)


@triton.jit(do_not_specialize=RUN_TIME)
def grouped_gemm_kernel(
    x_ptr, w1_ptr, w2_ptr, w3_ptr, shift1_ptr, shift2_ptr, shift3_ptr, scale1_ptr, scale2_ptr, scale3_ptr,
    y_ptr, r_ptr, bits_ptr,
    M, C, K1, K2, K3, r5, x_stride, y_stride, r_stride, bits_stride,
    UNIT: tl.constexpr, RELU: tl.constexpr, HAS_SHIFT: tl.constexpr, HAS_SCALE: tl.constexpr,
    SAVE_BITS: tl.constexpr, ACC: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr,
):  # fmt: skip
    grouped_gemm_program(
        tl.program_id(0), x_ptr, w1_ptr, w2_ptr, w3_ptr,
        shift1_ptr, shift2_ptr, shift3_ptr, scale1_ptr, scale2_ptr, scale3_ptr, y_ptr, r_ptr, bits_ptr,
        M, C, K1, K2, K3, r5, x_stride, y_stride, r_stride, bits_stride,
        UNIT, RELU, HAS_SHIFT, HAS_SCALE, SAVE_BITS, ACC, BLOCK_M, BLOCK_N, BLOCK_K, GROUP_M,
    )  # fmt: skip


def arguments(
    x: ChannelSlice,
    weights: tuple[Tensor, Tensor, Tensor],
    y: ChannelSlice,
    r3: ChannelSlice,
    r5: ChannelSlice,
    bits: ChannelSlice | None,
    *,
    gemm_m: int,
    epilogues: tuple[Epilogue, Epilogue, Epilogue],
    tile: Tile,
    unit: int,
) -> Arguments:
    """What the device code is given.

    x: C channels, fp16, bf16 or fp32 (as TF32). weights: [K1, C, 1, 1], [K2, C, 1, 1], [K3, C, 1, 1], dense.
    y: branch 1's slice of the output, c_offset 0. r3, r5: slices of one buffer, r3 at c_offset 0.
    bits: uint8 slice for y's mask bits, c_offset 0, or None. The three epilogues agree in relu and in whether
    shift and scale are given.
    """
    gemm_n = y.channels + r3.channels + r5.channels
    shifts, scales = [e.shift for e in epilogues], [e.scale for e in epilogues]
    return Arguments(
        triton.cdiv(gemm_m, tile.BLOCK_M) * triton.cdiv(gemm_n, tile.BLOCK_N),
        (
            x.base, *weights, *shifts, *scales, y.base, r3.base, bits.base if bits else None,
            gemm_m, x.channels // unit, y.channels // unit, r3.channels // unit, r5.channels // unit,
            r5.c_offset // unit, x.row_stride // unit, y.row_stride // unit,
            r3.row_stride // unit, bits.row_stride if bits else 0,
        ),
        dict(
            UNIT=unit, RELU=epilogues[0].relu, HAS_SHIFT=shifts[0] is not None, HAS_SCALE=scales[0] is not None,
            SAVE_BITS=bits is not None, ACC=accumulator(x.base.dtype),
        ),
    )  # fmt: skip


grouped_gemm = launcher_of(grouped_gemm_kernel, arguments)
"""Launch K1, of what :func:`arguments` takes."""
