"""P2: the gradient of a 3x3 max-pool of stride 2, gathered by the taps that P1 saved.

    dx[q, c]   = sum over the windows p of which q is place (r, s) of dy[p, c] where taps[p, c] == 3 * r + s
    sums[i, c] = sum over the windows p of the i-th tile of cells of dy[p, c] where taps[p, c] != NO_TAP

Shapes:  dy [N*Ho*Wo, C] rows, dx [N*H*W, C] rows, row strides at run time; taps [N*Ho*Wo, ceil(C / 2)] of uint8 (even
         channel in the low half of a byte); sums fp32 [tiles of cells, C], partial sums of the gradient of the bias
         before the pool, or none. P is the padding, 0 or 1.
Grid:    tiles of cells by tiles of channels, the channels of a cell next to each other.

A cell (a, b) is the square of the pixels (2 * a - P, 2 * b - P) to (2 * a + 1 - P, 2 * b + 1 - P). Its first pixel lies
in the windows a - 1 and a of both dimensions, the others in fewer: nine terms for four pixels, of dy and taps that are
loaded once for all of them.

                     column 2 * b - P                          column 2 * b + 1 - P
    row 2 * a - P      (a-1, b-1): 8  (a-1, b): 6  (a, b-1): 2  (a, b): 0      (a-1, b): 7  (a, b): 1
    row 2 * a + 1 - P  (a, b-1): 5  (a, b): 3                                  (a, b): 4

Every element of dx is written once, that of no window as 0. Terms are added in fp32 in the order of the windows, which
is that of PyTorch on a CPU; there are no atomics, and a repeat is bit-identical.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from inception_fused.block.pools import PoolShape
from inception_fused.block.views import TAP_WORDS, ChannelSlice, Tile
from inception_fused.kernels.max_pool import NO_TAP, cells, divided, reciprocal
from inception_fused.runtime.launch import Arguments, accumulator, launcher_of

RUN_TIME = [
    "M", "H", "W", "Ho", "Wo", "P", "C", "dy_offset", "dy_stride", "dx_offset", "dx_stride",
    "h_multiplier", "h_shift", "w_multiplier", "w_shift", "n_multiplier", "n_shift",
]  # fmt: skip
"""Sizes and strides, for which no binary is made anew."""


@triton.jit
def within(place, size):
    """0 <= place < size, as one comparison of numbers without a sign."""
    return place.to(tl.uint32, bitcast=True) < size.to(tl.uint32, bitcast=True)


@triton.jit
def repeated(taps, NIBBLES: tl.constexpr):
    """Words of NIBBLES taps, as often as they fit into 32 bits; see sent()."""
    if NIBBLES == 8:
        return taps.to(tl.int32)
    else:
        LAST: tl.constexpr = (1 << 4 * NIBBLES) - 1
        return (taps.to(tl.int32) & LAST) * (0xFFFFFFFF // LAST)


@triton.jit
def load_window(dy_ptrs, taps_ptrs, windows, columns, down, right, NIBBLES: tl.constexpr):
    """(dy, its taps as repeated() has them) of the windows ``down`` below and ``right`` of those of the pointers, 0
    where there is none.

    windows: (row, column, Ho, Wo); columns: (channels, words, which of them there are, row strides).
    """
    a, b, Ho, Wo = windows
    n, words, mask_n, mask_w, dy_stride, taps_stride = columns
    there, distance = (within(a + down, Ho) & within(b + right, Wo))[:, None], down * Wo + right
    dy_ptrs = dy_ptrs[:, None] + (distance * dy_stride + n)[None, :]
    taps_ptrs = taps_ptrs[:, None] + (distance * taps_stride + words)[None, :]
    taps = tl.load(taps_ptrs, mask=there & mask_w[None, :], other=0)
    return tl.load(dy_ptrs, mask=there & mask_n[None, :], other=0.0), repeated(taps, NIBBLES)


@triton.jit
def sent(window, TAP: tl.constexpr, NIBBLES: tl.constexpr):
    """Where the tap of a window, (dy, repeated taps), is TAP.

    Every other tap is looked at in the next repetition. Of 16 bits, all in one place, LLVM would make vectors of two
    words, and of their bits masks one by one (fp32 on sm_90: 763 instructions a tile, so 522).
    """
    dy, taps = window
    places = tl.arange(0, NIBBLES)
    if NIBBLES < 8:
        places += NIBBLES * (places & 1)
    # Eight times the tap, as a number with a sign.
    eight: tl.constexpr = TAP * 0x11111111 - (TAP // 8 << 32)
    found = ((taps ^ eight)[:, :, None] & (15 << (4 * places))[None, None, :]) == 0
    return tl.reshape(found, dy.shape)


@triton.jit
def first_sent(window, TAP: tl.constexpr, NIBBLES: tl.constexpr, ACC: tl.constexpr):
    """dy in ACC where its tap is TAP, 0 elsewhere."""
    return tl.where(sent(window, TAP, NIBBLES), window[0].to(ACC), 0.0)


@triton.jit
def add_sent(acc, window, TAP: tl.constexpr, NIBBLES: tl.constexpr):
    """acc + dy where its tap is TAP."""
    # Not a sum of where(sent, dy, 0.0): this is one predicated addition.
    return tl.where(sent(window, TAP, NIBBLES), acc + window[0].to(acc.dtype), acc)


@triton.jit
def store_pixel(dx_ptrs, acc, pixels, columns, down, right):
    """acc into the pixels ``down`` below and ``right`` of those of dx_ptrs, where there are such.

    pixels: (row, column, H, W); columns: (channels, row stride, which elements of the tile there are).
    """
    row, column, H, W = pixels
    n, dx_stride, mask = columns
    there = within(row + down, H) & within(column + right, W)
    dx_ptrs = dx_ptrs[:, None] + ((down * W + right) * dx_stride + n)[None, :]
    tl.store(dx_ptrs, acc.to(dx_ptrs.dtype.element_ty), mask=there[:, None] & mask)


@triton.jit(do_not_specialize=RUN_TIME)
def max_pool_grad_kernel(
    dy_ptr, taps_ptr, dx_ptr, sums_ptr, M, H, W, Ho, Wo, P, C, dy_offset, dy_stride, dx_offset, dx_stride,
    h_multiplier, h_shift, w_multiplier, w_shift, n_multiplier, n_shift,
    UNIT: tl.constexpr, NIBBLES: tl.constexpr, ACC: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr,
):  # fmt: skip
    # M to P are plain counts, other sizes, strides and offsets are in units of UNIT elements, of which the taps are one
    # word of NIBBLES; those of single channels are bytes.
    taps_stride = C if UNIT > 1 else (C + 1) // 2
    C, dy_offset, dy_stride = C * UNIT, dy_offset * UNIT, dy_stride * UNIT
    dx_offset, dx_stride = dx_offset * UNIT, dx_stride * UNIT

    pid_m = divided(tl.program_id(0), n_multiplier, n_shift)
    pid_n = tl.program_id(0) - pid_m * tl.cdiv(C, BLOCK_N)
    m = pid_m * BLOCK_M + tl.arange(0, BLOCK_M)
    n = pid_n * BLOCK_N + tl.arange(0, BLOCK_N)
    words = pid_n * (BLOCK_N // NIBBLES) + tl.arange(0, BLOCK_N // NIBBLES)
    mask_m, mask_n = m < M, n < C
    rows, columns = (H + P + 1) // 2, (W + P + 1) // 2
    # Behind the last cell the last one is computed again, and stored by nobody.
    image, a, b = cells(tl.minimum(m, M - 1), rows, columns, h_multiplier, h_shift, w_multiplier, w_shift)

    # Bases advance to a window and to a pixel in int64, since pixels lie four times as far apart as windows.
    window = ((image * Ho + a) * Wo + b).to(tl.int64)
    dy_ptrs, taps_ptrs = dy_ptr + dy_offset + window * dy_stride, taps_ptr + window * taps_stride
    windows, read = (a, b, Ho, Wo), (n, words, mask_n, words < taps_stride, dy_stride, taps_stride)
    above_left = load_window(dy_ptrs, taps_ptrs, windows, read, -1, -1, NIBBLES)
    above = load_window(dy_ptrs, taps_ptrs, windows, read, -1, 0, NIBBLES)
    left = load_window(dy_ptrs, taps_ptrs, windows, read, 0, -1, NIBBLES)
    own = load_window(dy_ptrs, taps_ptrs, windows, read, 0, 0, NIBBLES)

    row, column = 2 * a - P, 2 * b - P
    dx_ptrs = dx_ptr + dx_offset + ((image * H + row) * W + column).to(tl.int64) * dx_stride
    pixels, written = (row, column, H, W), (n, dx_stride, mask_m[:, None] & mask_n[None, :])
    acc = first_sent(above_left, 8, NIBBLES, ACC)
    acc = add_sent(acc, above, 6, NIBBLES)
    acc = add_sent(acc, left, 2, NIBBLES)
    store_pixel(dx_ptrs, add_sent(acc, own, 0, NIBBLES), pixels, written, 0, 0)
    acc = first_sent(above, 7, NIBBLES, ACC)
    store_pixel(dx_ptrs, add_sent(acc, own, 1, NIBBLES), pixels, written, 0, 1)
    acc = first_sent(left, 5, NIBBLES, ACC)
    store_pixel(dx_ptrs, add_sent(acc, own, 3, NIBBLES), pixels, written, 1, 0)
    store_pixel(dx_ptrs, first_sent(own, 4, NIBBLES, ACC), pixels, written, 1, 1)
    if sums_ptr is not None:
        # Cell (a, b) has window (a, b), and the last of a row or column may have none: 0.
        passed = tl.where(sent(own, NO_TAP, NIBBLES) | (mask_m == 0)[:, None], 0.0, own[0].to(ACC))
        tl.store(sums_ptr + pid_m.to(tl.int64) * C + n, tl.sum(passed, axis=0), mask=mask_n)


def arguments(
    dy: ChannelSlice, taps: Tensor, dx: ChannelSlice, sums: Tensor | None = None, *,
    pool: PoolShape, tile: Tile, unit: int,
) -> Arguments:  # fmt: skip
    """What the device code is given.

    dy, dx: C channels of one floating dtype, rows of pool.pooled_rows and pool.rows pixels. taps: uint8
    [pool.pooled_rows, ceil(C / 2)] dense. sums: fp32 [ceil(pool.cells / BLOCK_M), C] dense, or None.
    """
    words, columns = taps.view(TAP_WORDS[unit]), triton.cdiv(dy.channels, tile.BLOCK_N)
    return Arguments(
        triton.cdiv(pool.cells, tile.BLOCK_M) * columns,
        (
            dy.base, words, dx.base, sums, pool.cells, pool.h, pool.w, *pool.pooled, pool.padding,
            dy.channels // unit, dy.c_offset // unit, dy.row_stride // unit, dx.c_offset // unit,
            dx.row_stride // unit,
            *(number for size in (*pool.cells_of_image, columns) for number in reciprocal(size)),
        ),
        dict(UNIT=unit, NIBBLES=2 * words.element_size(), ACC=accumulator(dy.base.dtype)),
    )  # fmt: skip


max_pool_grad = launcher_of(max_pool_grad_kernel, arguments)
"""Launch P2, of what :func:`arguments` takes."""
