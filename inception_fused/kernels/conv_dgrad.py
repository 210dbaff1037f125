"""B2: the gradient of a convolution to its input (stride 1, "same" padding), behind the mask of that input's ReLU.

    dr[m, c] = sum over r, s, k of g[pixel(m) + (r - P, s - P), k] * w_t[c, r, s, k]       P = R // 2
    w_t[c, r, s, k] = w[k, c, R - 1 - r, R - 1 - s]
    dr is then 0 where r[m, c] <= 0; sums[i, c] = sum of dr[m, c] over the i-th tile of rows
    dots[i, c] = sum of dr[m, c] * (raw[m, c] - mean[c]) over it: behind a BatchNorm with the statistics of the batch

Three launches a block: dr3 from g2 (3x3), dr5 from g3 (5x5 or 3x3), and dpool = g4 @ w4 (1x1, no mask, no sums).

Shapes:  g [M, K] slice; w_t [C, R, R, K] dense; r and dr [M, C] slices of rows padded to 16 bytes, the padding of dr
         becomes 0; sums and dots fp32 [tiles of rows, row], partial sums of dr as it was before it was rounded: of
         the reduction's bias gradient, or of what norm_grad_combine makes of both.
GEMM:    GEMM_M = M = N*H*W, GEMM_N = C, GEMM_K = R*R*K: with flipped, transposed weights dgrad is the forward kernel's
         main loop, and both operands are read 16 bytes at a time, in TF32 too. R is a run-time value: one binary serves
         both windows. The 1x1 has its own, a plain GEMM.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from inception_fused.block.batch_stats import MEAN, Centred
from inception_fused.block.views import ChannelSlice, Tile
from inception_fused.kernels.common import add_gemm, tile_order
from inception_fused.kernels.conv_fprop import implicit_gemm
from inception_fused.runtime.launch import accumulator, launch

RUN_TIME = [
    "M", "H", "W", "R", "K", "C", "width", "g_offset", "g_stride", "r_offset", "r_stride", "dr_offset", "dr_stride",
    "sums_offset", "sums_stride", "raw_offset", "raw_stride", "mean_offset", "dots_offset",
]  # fmt: skip
"""Sizes and strides, for which no binary is made anew."""


@triton.jit(do_not_specialize=RUN_TIME)
def conv_dgrad_kernel(
    g_ptr, w_ptr, r_ptr, dr_ptr, sums_ptr, raw_ptr, mean_ptr,
    M, H, W, R, K, C, width, g_offset, g_stride, r_offset, r_stride, dr_offset, dr_stride, sums_offset, sums_stride,
    raw_offset, raw_stride, mean_offset, dots_offset,
    POINTWISE: tl.constexpr, UNIT: tl.constexpr, ACC: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr,
):  # fmt: skip
    # M, H, W, R and the places of sums, dots and means are plain counts, every other size and stride is in units of
    # UNIT elements.
    K, C, width, g_offset, g_stride = K * UNIT, C * UNIT, width * UNIT, g_offset * UNIT, g_stride * UNIT
    r_offset, r_stride, dr_offset, dr_stride = r_offset * UNIT, r_stride * UNIT, dr_offset * UNIT, dr_stride * UNIT
    raw_offset, raw_stride = raw_offset * UNIT, raw_stride * UNIT

    pid_m, pid_n = tile_order(tl.program_id(0), tl.cdiv(M, BLOCK_M), tl.cdiv(width, BLOCK_N), GROUP_M)
    m0 = pid_m * BLOCK_M
    offs_m = tl.arange(0, BLOCK_M)
    mask_m = offs_m < M - m0
    if POINTWISE:
        # The window's bits take longer than the one or two steps of a 1x1.
        acc = tl.zeros([BLOCK_M, BLOCK_N], dtype=ACC)
        acc = add_gemm(acc, g_ptr, w_ptr, m0, offs_m, mask_m, pid_n, K, C, g_offset, g_stride, BLOCK_N, BLOCK_K)
    else:
        acc = implicit_gemm(
            g_ptr, w_ptr, m0, offs_m, mask_m, pid_n, H, W, K, C, g_offset, g_stride, R, ACC, BLOCK_M, BLOCK_N, BLOCK_K
        )  # fmt: skip

    n = pid_n * BLOCK_N + tl.arange(0, BLOCK_N)
    if r_ptr is not None:
        r_tile = r_ptr + (m0.to(tl.int64) * r_stride + r_offset)
        mask = mask_m[:, None] & (n < C)[None, :]
        r = tl.load(r_tile + (offs_m[:, None] * r_stride + n[None, :]), mask=mask, other=1.0)
        # NaN passes, as through PyTorch's ReLU.
        acc = tl.where(r <= 0, 0.0, acc)
    dr_tile = dr_ptr + (m0.to(tl.int64) * dr_stride + dr_offset)
    mask = mask_m[:, None] & (n < width)[None, :]
    tl.store(dr_tile + (offs_m[:, None] * dr_stride + n[None, :]), acc.to(dr_ptr.dtype.element_ty), mask=mask)
    if sums_ptr is not None:
        sums_row = sums_ptr + (pid_m.to(tl.int64) * sums_stride + sums_offset)
        tl.store(sums_row + n, tl.sum(acc, axis=0), mask=n < C)
        if raw_ptr is not None:
            raw_tile = raw_ptr + (m0.to(tl.int64) * raw_stride + raw_offset)
            mask = mask_m[:, None] & (n < C)[None, :]
            raw = tl.load(raw_tile + (offs_m[:, None] * raw_stride + n[None, :]), mask=mask, other=0.0)
            mean = tl.load(mean_ptr + (mean_offset + n), mask=n < C, other=0.0)
            dots = tl.sum(acc * (raw.to(ACC) - mean[None, :]), axis=0)
            tl.store(sums_row + (dots_offset - sums_offset) + n, dots, mask=n < C)


def conv_dgrad(
    g: ChannelSlice,
    w_t: Tensor,
    r: ChannelSlice | None,
    dr: ChannelSlice,
    sums: ChannelSlice | None,
    *,
    gemm_m: int,
    image: tuple[int, int],
    width: int,
    centred: Centred | None = None,
    tile: Tile,
    unit: int,
) -> None:
    """Launch B2 once.

    g: K channels, fp16, bf16 or fp32 (as TF32). w_t: [C, R, R, K] dense, flipped and transposed, R 1, 3 or 5.
    r: C channels, what ReLU gave, or None for no mask. dr: C channels of rows that have ``width`` columns, of which
    those from C on become 0. sums: fp32, one row per tile of rows, C channels, or None for no sums. centred: for the
    second sum beside them, or None. image: (H, W); gemm_m = N*H*W.
    """
    raw, stats, dots = centred or (None, None, None)
    launch(
        conv_dgrad_kernel,
        (triton.cdiv(gemm_m, tile.BLOCK_M) * triton.cdiv(width, tile.BLOCK_N),),
        (
            g.base, w_t, r.base if r else None, dr.base, sums.base if sums else None,
            raw.base if raw else None, stats.base if stats else None,
            gemm_m, *image, w_t.shape[1], g.channels // unit, dr.channels // unit, width // unit,
            g.c_offset // unit, g.row_stride // unit, r.c_offset // unit if r else 0, r.row_stride // unit if r else 0,
            dr.c_offset // unit, dr.row_stride // unit,
            sums.c_offset if sums else 0, sums.row_stride if sums else 0,
            raw.c_offset // unit if raw else 0, raw.row_stride // unit if raw else 0,
            MEAN * stats.row_stride + stats.c_offset if stats else 0, dots.c_offset if dots else 0,
        ),
        dict(POINTWISE=w_t.shape[1] == 1, UNIT=unit, ACC=accumulator(g.base.dtype)),
        tile,
    )  # fmt: skip
