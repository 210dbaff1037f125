"""B1: the gradient of a block's output behind ReLU's mask, as dense rows for every GEMM of the backward pass.

    g[m, k]    = dy[m, k] where bit[m, k], else 0               (all of dy without bits)
    sums[i, k] = sum of g[m, k] over the i-th range of rows      partial sums of the four output biases' gradients
    borders[q] = which rows and columns of a 5x5 window lie inside the image around its pixel q % (H*W)

Borders are what B4 masks its windows by (common.border_bits has the bits). They follow from the shape alone. This
launch writes them because it always runs, and before B4.

Shapes:  dy [N, K, H, W], any strides; bits [M, width] of uint8, each branch from a byte of its own;
         g: one slice per branch of a buffer of rows, M = N*H*W; sums fp32 [ranges, K] in dy's order of columns;
         borders int16, H*W words and those that a step of B4 reads beyond (choice.border_words).
Grid:    axis 0 is a range of rows, axis 1 a tile of columns of one branch, so that eight columns share a byte of bits.

A range is several tiles of rows (choice.row_ranges), so that few partial sums are left whatever the batch.
"""

from __future__ import annotations

from collections.abc import Sequence

import triton
import triton.language as tl
from torch import Tensor

from inception_fused.block.views import ChannelSlice, Tile, strides_in
from inception_fused.kernels.common import by_branch, load_gradient, place_of, write_borders
from inception_fused.runtime.launch import accumulator, launch

RUN_TIME = [
    "M", "H", "W", "words", "K1", "K2", "K3", "K4", "tiles", "n_stride", "c_stride", "h_stride", "w_stride",
    "g_stride", "g1", "g2", "g3", "g4", "bits_stride",
]  # fmt: skip
"""Sizes and strides, for which no binary is made anew."""

BRANCHES = 4
"""Of the longest block."""


@triton.jit
def expand_bits(packed, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """uint8 [BLOCK_M, BLOCK_N // 8] -> int1 [BLOCK_M, BLOCK_N], least significant bit first."""
    shifts = tl.arange(0, 8)[None, None, :]
    bits = (packed.to(tl.int32)[:, :, None] >> shifts) & 1
    return tl.reshape(bits, [BLOCK_M, BLOCK_N]) != 0


@triton.jit(do_not_specialize=RUN_TIME)
def mask_grad_kernel(
    dy_ptr, bits_ptr, g_ptr, sums_ptr, borders_ptr,
    M, H, W, words, K1, K2, K3, K4, tiles, n_stride, c_stride, h_stride, w_stride, g_stride, g1, g2, g3, g4,
    bits_stride,
    UNIT: tl.constexpr, ROWS: tl.constexpr, ACC: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr,
):  # fmt: skip
    # Strides of dy are plain counts but for w_stride where dy is a matrix of ROWS: that, g_stride, the branches' widths
    # K1 to K4 and their places g1 to g4 in a row of g are in units of UNIT elements.
    K1, K2, K3, K4 = K1 * UNIT, K2 * UNIT, K3 * UNIT, K4 * UNIT
    g_stride, g1, g2, g3, g4 = g_stride * UNIT, g1 * UNIT, g2 * UNIT, g3 * UNIT, g4 * UNIT
    if ROWS:
        w_stride = w_stride * UNIT

    # The branch that this tile of columns belongs to: its width, first column, first byte of bits and place in g.
    end1 = tl.cdiv(K1, BLOCK_N)
    end2 = end1 + tl.cdiv(K2, BLOCK_N)
    end3 = end2 + tl.cdiv(K3, BLOCK_N)
    at = tl.program_id(1)
    tile, K, y_start, g_start = place_of(at, end1, end2, end3, K1, K2, K3, K4, g1, g2, g3, g4)
    bytes1, bytes2, bytes3 = tl.cdiv(K1, 8), tl.cdiv(K2, 8), tl.cdiv(K3, 8)
    bits_start = by_branch(at, end1, end2, end3, 0, bytes1, bytes1 + bytes2, bytes1 + bytes2 + bytes3)
    n = tile * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_n = n < K
    offs_b = tile * (BLOCK_N // 8) + tl.arange(0, BLOCK_N // 8)
    offs_m = tl.arange(0, BLOCK_M)

    if at == 0:
        write_borders(borders_ptr, words, offs_m, H, W, BLOCK_M)

    total = tl.zeros([BLOCK_N], dtype=ACC)
    for i in range(tiles):
        m0 = (tl.program_id(0) * tiles + i) * BLOCK_M
        mask_m = offs_m < M - m0
        mask = mask_m[:, None] & mask_n[None, :]
        dy = load_gradient(
            dy_ptr, m0, offs_m, y_start, n, mask, H, W, n_stride, c_stride, h_stride, w_stride, ROWS
        )  # fmt: skip
        if bits_ptr is not None:
            bits_tile = bits_ptr + (m0.to(tl.int64) * bits_stride + bits_start)
            mask_b = mask_m[:, None] & (offs_b * 8 < K)[None, :]
            packed = tl.load(bits_tile + (offs_m[:, None] * bits_stride + offs_b[None, :]), mask=mask_b, other=0)
            dy = tl.where(expand_bits(packed, BLOCK_M, BLOCK_N), dy, 0.0).to(g_ptr.dtype.element_ty)
        g_tile = g_ptr + (m0.to(tl.int64) * g_stride + g_start)
        tl.store(g_tile + (offs_m[:, None] * g_stride + n[None, :]), dy, mask=mask)
        if sums_ptr is not None:
            total += tl.sum(dy.to(ACC), axis=0)
    if sums_ptr is not None:
        sums_row = sums_ptr + tl.program_id(0).to(tl.int64) * (K1 + K2 + K3 + K4)
        tl.store(sums_row + (y_start + n), total, mask=mask_n)


def mask_grad(
    dy: Tensor,
    bits: ChannelSlice | None,
    g: Sequence[ChannelSlice],
    sums: Tensor | None,
    borders: Tensor,
    *,
    ranges: tuple[int, int],
    tile: Tile,
    unit: int,
) -> None:
    """Launch B1.

    dy: [N, K, H, W], any strides, the dtype of g. bits: uint8, all branches' bytes, or None: everything passes.
    g: the branches' slices of one buffer, up to four. sums: fp32 [number of ranges, K] dense, or None.
    borders: int16 words, as many as B4 wants. ranges: (their number, tiles of rows in each), as choice.row_ranges()
    gives it.
    """
    n, _, h, w = dy.shape
    rows, strides = strides_in(dy, unit)
    # A branch that is not there has no tiles.
    g = [*g, *[g[0]._replace(channels=0)] * (BRANCHES - len(g))]
    launch(
        mask_grad_kernel,
        (ranges[0], sum(triton.cdiv(part.channels, tile.BLOCK_N) for part in g)),
        (
            dy, bits.base if bits else None, g[0].base, sums, borders,
            n * h * w, h, w, borders.numel(), *(part.channels // unit for part in g), ranges[1], *strides,
            g[0].row_stride // unit, *(part.c_offset // unit for part in g), bits.row_stride if bits else 0,
        ),
        dict(UNIT=unit, ROWS=rows, ACC=accumulator(dy.dtype)),
        tile,
    )  # fmt: skip
