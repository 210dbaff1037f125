"""P1: 3x3 max-pool of stride 2, with the tap of each maximum in four bits; before it a bias and ReLU, or neither.

    y[p, c]    = act(max of x[q, c] over the pixels q of window p + bias[c])
                 rows 2 * i - P ... 2 * i - P + 2 of the image, columns alike
    taps[p, c] = 3 * r + s of the window's arg-max, four bits; NO_TAP where ReLU made 0 of it

Shapes:  x [N*H*W, C] rows of an NHWC tensor, y [N*Ho*Wo, C] rows, row strides at run time; bias [C];
         taps [N*Ho*Wo, ceil(C / 2)] of uint8 (even channel in the low half of a byte). P is the padding, 0 or 1; Ho and
         Wo are given, so that ceil_mode is a number too.
Grid:    tiles of pooled pixels by tiles of channels, the channels of a pixel next to each other.

PyTorch's arg-max, exactly, ties and NaN too: the clamped window of K2 serves any stride, since every
window has a place inside the image. It reads the places that it has twice where PyTorch reads none, and finds the same
pixel first, and last. A maximum of zeros of both signs is +0.0, where PyTorch's is the first of them.

Bias and ReLU follow the maximum, with which they commute: a sum that is rounded, and ReLU, keep the order. So y is
that of a convolution with bias, ReLU and the pool, without two passes over what the pool reads. Of elements that
differ, and are equal once the bias is added and rounded, the larger has the tap, where PyTorch takes the first.

With taps a tile is scanned without the rule for NaN, 16-bit elements two at a time, bf16 as fp16 patterns; only if NaN
is left at the end is it scanned again by the rule, as in K2.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from inception_fused.block import pools
from inception_fused.block.pools import PoolShape
from inception_fused.block.views import ChannelSlice, Tile
from inception_fused.kernels.common import in_byte, larger, largest, store_taps
from inception_fused.runtime.launch import Arguments, accumulator, launcher_of

RUN_TIME = [
    "M", "H", "W", "Ho", "Wo", "P", "C", "x_offset", "x_stride", "y_offset", "y_stride",
    "h_multiplier", "h_shift", "w_multiplier", "w_shift", "n_multiplier", "n_shift",
]  # fmt: skip
"""Sizes and strides, for which no binary is made anew."""

NO_TAP = tl.constexpr(pools.NO_TAP)


def reciprocal(divisor: int) -> tuple[int, int]:
    """(multiplier, shift) by which :func:`divided` divides: 2**(31 + shift) / divisor, rounded up, as a signed number
    of 32 bits."""
    shift = (divisor - 1).bit_length()
    multiplier = -(-(1 << (31 + shift)) // divisor)
    return multiplier - (multiplier >> 31 << 32), shift


@triton.jit
def divided(a, multiplier, shift):
    """a // divisor for 0 <= a < 2**31: three instructions, where a division at run time is about 25.

    The multiplier is less than 1 above its fraction and the divisor at most 2**shift, so that what is too much is less
    than one part of the divisor.
    """
    high = tl.umulhi(a.to(tl.uint32, bitcast=True) * 2, multiplier.to(tl.uint32, bitcast=True))
    return (high >> shift).to(tl.int32)


@triton.jit
def cells(m, H, W, h_multiplier, h_shift, w_multiplier, w_shift):
    """(image, row, column) of the cells m of images of H x W cells. The others: reciprocal() of H and of W."""
    line = divided(m, w_multiplier, w_shift)
    image = divided(line, h_multiplier, h_shift)
    return image, line - image * H, m - line * W


@triton.jit
def channels(n, C, UNIT: tl.constexpr):
    """Channels n, in the place of those from C on the first unit's: loaded without a mask, and stored by nobody."""
    return tl.max_contiguous(tl.multiple_of(tl.where(n < C, n, n & (UNIT - 1)), UNIT), UNIT)


@triton.jit
def neighbour(top, left, row, column, H, W, r, s):
    """(distance in pixels from (row, column), tap) of the pixel at place (r, s) of the window that begins at (top,
    left), in the place of one outside the image its nearest one inside."""
    down = tl.minimum(tl.maximum(top + r, 0), H - 1)
    right = tl.minimum(tl.maximum(left + s, 0), W - 1)
    return (down - row) * W + right - column, 3 * (down - top) + right - left


@triton.jit
def load_place(x_ptrs, n, window, x_stride, r, s):
    """(x at place (r, s) of the windows, its taps as in_byte() has them). x_ptrs: of the pixels from which window, the
    arguments of neighbour(), has distances."""
    top, left, row, column, H, W = window
    distance, tap = neighbour(top, left, row, column, H, W, r, s)
    return tl.load(x_ptrs[:, None] + ((distance * x_stride)[:, None] + n[None, :])), in_byte(tap, n)


@triton.jit(do_not_specialize=RUN_TIME)
def max_pool_kernel(
    x_ptr, y_ptr, taps_ptr, bias_ptr, M, H, W, Ho, Wo, P, C, x_offset, x_stride, y_offset, y_stride,
    h_multiplier, h_shift, w_multiplier, w_shift, n_multiplier, n_shift,
    UNIT: tl.constexpr, RELU: tl.constexpr, ACC: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr,
):  # fmt: skip
    # M to P are plain counts, other sizes, strides and offsets are in units of UNIT elements.
    taps_stride = C * (UNIT // 2) if UNIT > 1 else (C + 1) // 2
    C, x_offset, x_stride = C * UNIT, x_offset * UNIT, x_stride * UNIT
    y_offset, y_stride = y_offset * UNIT, y_stride * UNIT
    dtype: tl.constexpr = x_ptr.dtype.element_ty

    pid_m = divided(tl.program_id(0), n_multiplier, n_shift)
    n0 = (tl.program_id(0) - pid_m * tl.cdiv(C, BLOCK_N)) * BLOCK_N
    m0 = pid_m * BLOCK_M
    offs_m, n = tl.arange(0, BLOCK_M), n0 + tl.arange(0, BLOCK_N)
    mask_m, mask_n = offs_m < M - m0, n < C
    # Behind the last window the last one is pooled again, and stored by nobody.
    m = tl.minimum(m0 + offs_m, M - 1)
    image, i, j = cells(m, Ho, Wo, h_multiplier, h_shift, w_multiplier, w_shift)
    top, left = 2 * i - P, 2 * j - P
    # Bases advance to a pixel of the window in int64: its pixels lie four times as far apart as windows.
    row, column = tl.minimum(top + 1, H - 1), tl.minimum(left + 1, W - 1)
    x_ptrs = x_ptr + x_offset + ((image * H + row) * W + column).to(tl.int64) * x_stride
    window = top, left, row, column, H, W
    n_read = channels(n, C, UNIT)

    best, arg = load_place(x_ptrs, n_read, window, x_stride, 0, 0)
    if taps_ptr is None:
        for tap in tl.static_range(1, 9):
            x, _ = load_place(x_ptrs, n_read, window, x_stride, tap // 3, tap % 3)
            best = largest(best, x)
    else:
        if dtype == tl.bfloat16:
            best = best.to(tl.float16, bitcast=True)
        for tap in tl.static_range(1, 9):
            x, named = load_place(x_ptrs, n_read, window, x_stride, tap // 3, tap % 3)
            best, arg = larger(best, arg, x.to(best.dtype, bitcast=True), named)
        again = 3 * tl.max((best != best).to(tl.int32))
        best = best.to(dtype, bitcast=True)
        # By PyTorch's rule, a row at a time: this is rarely run, and must not cost registers.
        for r in tl.range(again, num_stages=1):
            for s in tl.static_range(3):
                x, named = load_place(x_ptrs, n_read, window, x_stride, r, s)
                wins = (x > best) | (x != x) | (r + s == 0)
                best, arg = tl.where(wins, x, best), tl.where(wins, named, arg)
    if bias_ptr is not None:
        bias = tl.load(bias_ptr + n, mask=mask_n, other=0.0)
        best = (best.to(ACC) + bias.to(ACC)[None, :]).to(dtype)
    if RELU:
        # NaN passes, as through PyTorch's ReLU.
        stopped = best <= 0
        best = tl.where(stopped, 0.0, best).to(dtype)
        if taps_ptr is not None:
            arg = tl.where(stopped, in_byte(tl.full([BLOCK_M], NO_TAP, tl.int32), n), arg).to(tl.int16)
    if taps_ptr is not None:
        if UNIT == 1:
            # For the half of a byte beside an odd last channel.
            arg = tl.where(mask_n[None, :], arg, 0).to(tl.int16)
        offs_t = n0 // 2 + tl.arange(0, BLOCK_N // 2)
        taps_ptrs = taps_ptr + m0.to(tl.int64) * taps_stride + (offs_m[:, None] * taps_stride + offs_t[None, :])
        store_taps(taps_ptrs, arg, mask_m[:, None] & (offs_t < taps_stride)[None, :], BLOCK_M, BLOCK_N)
    y_tile = y_ptr + (m0.to(tl.int64) * y_stride + y_offset)
    tl.store(y_tile + (offs_m[:, None] * y_stride + n[None, :]), best, mask=mask_m[:, None] & mask_n[None, :])


def arguments(
    x: ChannelSlice, y: ChannelSlice, taps: Tensor | None, bias: Tensor | None = None, *, relu: bool = False,
    pool: PoolShape, tile: Tile, unit: int,
) -> Arguments:  # fmt: skip
    """What the device code is given.

    x, y: C channels of one floating dtype, rows of pool.rows and pool.pooled_rows pixels. taps: uint8
    [pool.pooled_rows, ceil(C / 2)] dense, or None. bias: [C] dense, or None; relu: whether ReLU follows it.
    """
    columns = triton.cdiv(x.channels, tile.BLOCK_N)
    return Arguments(
        triton.cdiv(pool.pooled_rows, tile.BLOCK_M) * columns,
        (
            x.base, y.base, taps, bias, pool.pooled_rows, pool.h, pool.w, *pool.pooled, pool.padding,
            x.channels // unit, x.c_offset // unit, x.row_stride // unit, y.c_offset // unit, y.row_stride // unit,
            *(number for size in (*pool.pooled, columns) for number in reciprocal(size)),
        ),
        dict(UNIT=unit, RELU=relu, ACC=accumulator(x.base.dtype)),
    )  # fmt: skip


max_pool = launcher_of(max_pool_kernel, arguments)
"""Launch P1, of what :func:`arguments` takes."""
