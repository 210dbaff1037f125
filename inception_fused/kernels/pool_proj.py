"""K2: 3x3 max-pool (stride 1, padding 1) in the prologue of a 1x1 convolution, written into branch 4's slice of y.

    p[m, c] = max over the 3x3 window of pixel m of x[., c]
    y[m, k] = act(sum over c of p[m, c] * w[k, c] * scale[k] + shift[k])
    taps[m, c] = 3 * r + s of the window's arg-max, four bits

Shapes:  x [M, C] rows of an NHWC tensor, row stride at run time; w [K, C] dense; y [M, K] slice;
         bits [M, ceil(K / 8)] and taps [M, ceil(C / 2)] of uint8 (even channel in the low half of a byte).
GEMM:    GEMM_M = M = N*H*W, GEMM_N = K, GEMM_K = C. BLOCK_N >= K, else the pool is recomputed per tile of columns.
         Computed as filters x pixels, so that wgmma reads the pooled tile from shared memory.

PyTorch's arg-max, exactly: windows are scanned row by row, a later value wins if it is greater or NaN; so ties go to
the first maximum, the last NaN of a window wins, and a window of minus infinities keeps its first valid tap.

A window is clamped to the image: a pixel outside stands for its nearest neighbour inside, so there are no masks and no
infinities. Scanned in order, the clamped window meets every pixel that it names first, and last, in PyTorch's order,
and what is saved is the tap of the pixel that was read, not of the place in the window.

Whole chunks of channels are scanned two elements of 16 bits at a time (common.largest, common.larger). A maximum
alone is NaN where NaN is met. For the taps the scan leaves out the rule for NaN, and compares bf16 as fp16, bit pattern
by bit pattern: both order numbers below 2**121 alike, and what is larger is an fp16 NaN. If a NaN is left at the end,
the tile is computed again by the scan that knows it, which also takes the last, partial chunk.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from inception_fused.block.views import ChannelSlice, Epilogue, Tile
from inception_fused.kernels.common import coordinates, in_byte, larger, largest, store_slice, store_taps, tile_order
from inception_fused.runtime.launch import Arguments, accumulator, launcher_of

RUN_TIME = [
    "M", "H", "W", "C", "K", "x_stride", "y_offset", "y_stride", "bits_offset", "bits_stride", "taps_stride",
]  # fmt: skip
"""Sizes and strides, for which no binary is made anew."""


@triton.jit
def neighbour(row, col, H, W, r, s):
    """(distance in pixels, tap) of what stands at place (r, s) of the window clamped to the image."""
    down = tl.minimum(tl.maximum(row + (r - 1), 0), H - 1) - row
    right = tl.minimum(tl.maximum(col + (s - 1), 0), W - 1) - col
    return down * W + right, 3 * down + right + 4


@triton.jit
def pool_whole(x_ptr, rows, row, col, H, W, x_stride, offs_k, SAVE_TAPS: tl.constexpr):
    """(maxima, their taps as in_byte() has them) of a whole chunk of channels; of a window with NaN the maximum is NaN
    and the tap is any.

    With taps bf16 comes back as fp16, its bit pattern. x_ptr: the chunk's first channel of the tile's first pixel.
    rows: of x, from there.
    """
    for tap in tl.static_range(9):
        distance, name = neighbour(row, col, H, W, tap // 3, tap % 3)
        x = tl.load(x_ptr + (((rows + distance) * x_stride)[:, None] + offs_k[None, :]))
        named = in_byte(name, offs_k)
        if SAVE_TAPS:
            if x.dtype == tl.bfloat16:
                x = x.to(tl.float16, bitcast=True)
        if tap == 0:
            best, arg = x, named
        elif SAVE_TAPS:
            best, arg = larger(best, arg, x, named)
        else:
            best = largest(best, x)
    return best, arg


@triton.jit
def pool_any(x_ptr, rows, row, col, H, W, x_stride, offs_k, mask_k, SAVE_TAPS: tl.constexpr, ACC: tl.constexpr):
    """(maxima in ACC, their taps as in_byte() has them) of any chunk: with NaN, and channels that are not there."""
    _, name = neighbour(row, col, H, W, 0, 0)
    arg = in_byte(name, offs_k)
    best = tl.full(arg.shape, float("-inf"), ACC)
    # Three loads at once: this loop is rarely run, and must not cost registers.
    for r in tl.range(3, num_stages=1):
        for s in tl.static_range(3):
            distance, name = neighbour(row, col, H, W, r, s)
            x_ptrs = x_ptr + (((rows + distance) * x_stride)[:, None] + offs_k[None, :])
            x = tl.load(x_ptrs, mask=mask_k[None, :], other=0.0).to(ACC)
            if SAVE_TAPS:
                wins = (x > best) | (x != x)
                best = tl.where(wins, x, best)
                arg = tl.where(wins, in_byte(name, offs_k), arg)
            else:
                best = tl.maximum(best, x, propagate_nan=tl.PropagateNan.ALL)
    # Zero times infinity would be NaN.
    return tl.where(mask_k[None, :], best, 0.0), tl.where(mask_k[None, :], arg, 0)


@triton.jit
def pool_proj_program(
    pid, x_ptr, w_ptr, shift_ptr, scale_ptr, y_ptr, bits_ptr, taps_ptr,
    M, H, W, C, K, x_stride, y_offset, y_stride, bits_offset, bits_stride, taps_stride,
    UNIT: tl.constexpr, RELU: tl.constexpr, HAS_SHIFT: tl.constexpr, HAS_SCALE: tl.constexpr,
    SAVE_BITS: tl.constexpr, SAVE_TAPS: tl.constexpr, ACC: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr,
):  # fmt: skip
    """What one program does."""
    # M, H, W and the figures of bits are plain counts, taps_stride is in units of half as many bytes as UNIT, every
    # other figure in units of UNIT elements.
    C, K = C * UNIT, K * UNIT
    x_stride, y_offset, y_stride = x_stride * UNIT, y_offset * UNIT, y_stride * UNIT
    if UNIT > 1:
        taps_stride = taps_stride * (UNIT // 2)
    dtype: tl.constexpr = x_ptr.dtype.element_ty

    pid_m, pid_n = tile_order(pid, tl.cdiv(M, BLOCK_M), tl.cdiv(K, BLOCK_N), GROUP_M)
    m0 = pid_m * BLOCK_M
    offs_m = tl.arange(0, BLOCK_M)
    mask_m = offs_m < M - m0
    n = pid_n * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_n = n < K
    offs_k = tl.arange(0, BLOCK_K)

    # Behind the last pixel the last one is pooled again, for columns of the product that nobody stores.
    rows = tl.minimum(offs_m, M - 1 - m0)
    row, col = coordinates(m0, rows, H, W, BLOCK_M)
    x_tile = x_ptr + m0.to(tl.int64) * x_stride
    # A filter that is not there is the last one: whole chunks load it without a mask, for columns that nobody stores.
    w_ptrs = w_ptr + (tl.minimum(n, K - 1)[:, None] * C + offs_k[None, :])
    offs_t = tl.arange(0, BLOCK_K // 2)
    if SAVE_TAPS:
        taps_ptrs = taps_ptr + m0.to(tl.int64) * taps_stride + (offs_m[:, None] * taps_stride + offs_t[None, :])

    acc = tl.zeros([BLOCK_N, BLOCK_M], dtype=ACC)
    # Element by element nothing would be gained.
    whole = C // BLOCK_K * BLOCK_K if UNIT > 1 else 0
    most = tl.zeros([BLOCK_M, BLOCK_K], dtype=tl.float16 if dtype == tl.bfloat16 else dtype)
    if UNIT > 1:
        for k0 in tl.range(0, whole, BLOCK_K):
            # First, so that it is not waited for behind the nine (sm_90: 1050 -> 800 cycles of a warp a step).
            w = tl.load(w_ptrs + k0)
            best, arg = pool_whole(x_tile + k0, rows, row, col, H, W, x_stride, offs_k, SAVE_TAPS)
            if SAVE_TAPS:
                most = largest(most, best)
                if pid_n == 0:
                    store_taps(taps_ptrs + k0 // 2, arg, mask_m[:, None], BLOCK_M, BLOCK_K)
            # Always true, and folded. Without it Triton hoists the change to the product's layout above the nine loads
            # for mma.sync, and each of them goes through shared memory (sm_80: 567 instructions a step, with it 176).
            best = tl.where((offs_m >= 0)[:, None], best, 0.0).to(best.dtype)
            pooled = best.to(dtype, bitcast=True)
            acc = tl.dot(w, tl.trans(pooled), acc, input_precision="tf32", out_dtype=ACC)
        if SAVE_TAPS:
            if tl.max((most != most).to(tl.int32)) != 0:
                acc = tl.zeros([BLOCK_N, BLOCK_M], dtype=ACC)
                whole = 0

    for k0 in tl.range(whole, C, BLOCK_K, num_stages=1):
        mask_k = offs_k < C - k0
        best, arg = pool_any(x_tile + k0, rows, row, col, H, W, x_stride, offs_k, mask_k, SAVE_TAPS, ACC)
        w = tl.load(w_ptrs + k0, mask=mask_n[:, None] & mask_k[None, :], other=0.0)
        acc = tl.dot(w, tl.trans(best.to(dtype)), acc, input_precision="tf32", out_dtype=ACC)
        if SAVE_TAPS:
            if pid_n == 0:
                mask_t = mask_m[:, None] & (offs_t * 2 < C - k0)[None, :]
                store_taps(taps_ptrs + k0 // 2, arg, mask_t, BLOCK_M, BLOCK_K)

    store_slice(
        tl.trans(acc), shift_ptr, scale_ptr, y_ptr, bits_ptr, m0, offs_m, mask_m, pid_n,
        K, y_offset, y_stride, bits_offset, bits_stride,
        RELU, HAS_SHIFT, HAS_SCALE, SAVE_BITS, BLOCK_M, BLOCK_N,
    )  # fmt: skip


@triton.jit(do_not_specialize=RUN_TIME)
def pool_proj_kernel(
    x_ptr, w_ptr, shift_ptr, scale_ptr, y_ptr, bits_ptr, taps_ptr,
    M, H, W, C, K, x_stride, y_offset, y_stride, bits_offset, bits_stride, taps_stride,
    UNIT: tl.constexpr, RELU: tl.constexpr, HAS_SHIFT: tl.constexpr, HAS_SCALE: tl.constexpr,
    SAVE_BITS: tl.constexpr, SAVE_TAPS: tl.constexpr, ACC: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr,
):  # fmt: skip
    pool_proj_program(
        tl.program_id(0), x_ptr, w_ptr, shift_ptr, scale_ptr, y_ptr, bits_ptr, taps_ptr,
        M, H, W, C, K, x_stride, y_offset, y_stride, bits_offset, bits_stride, taps_stride,
        UNIT, RELU, HAS_SHIFT, HAS_SCALE, SAVE_BITS, SAVE_TAPS, ACC, BLOCK_M, BLOCK_N, BLOCK_K, GROUP_M,
    )  # fmt: skip


def arguments(
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
) -> Arguments:
    """What the device code is given.

    x: C channels, fp16, bf16 or fp32 (as TF32). w: [K, C, 1, 1] dense. y: branch 4's slice.
    bits: uint8 slice for its mask bits, or None. taps: uint8 [gemm_m, ceil(C / 2)] dense, or None.
    image: (H, W); gemm_m = N*H*W.
    """
    return Arguments(
        triton.cdiv(gemm_m, tile.BLOCK_M) * triton.cdiv(y.channels, tile.BLOCK_N),
        (
            x.base, w, epilogue.shift, epilogue.scale, y.base, bits.base if bits else None, taps,
            gemm_m, *image, x.channels // unit, y.channels // unit, x.row_stride // unit,
            y.c_offset // unit, y.row_stride // unit, bits.c_offset if bits else 0, bits.row_stride if bits else 0,
            taps.shape[1] // max(unit // 2, 1) if taps is not None else 0,
        ),
        dict(
            UNIT=unit, RELU=epilogue.relu, HAS_SHIFT=epilogue.shift is not None,
            HAS_SCALE=epilogue.scale is not None, SAVE_BITS=bits is not None, SAVE_TAPS=taps is not None,
            ACC=accumulator(x.base.dtype),
        ),
    )  # fmt: skip


pool_proj = launcher_of(pool_proj_kernel, arguments)
"""Launch K2, of what :func:`arguments` takes."""
