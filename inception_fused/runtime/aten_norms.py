"""The ATen twins of the launchers of BatchNorm with batch statistics; see aten.py, formulas in block/batch_stats.py."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from inception_fused.block.batch_stats import (
    BATCH,
    COEFFICIENTS,
    MEAN,
    NONE,
    REST,
    SCALE,
    SHIFT,
    STATISTICS,
    VAR,
    NormColumns,
    VectorGrads,
    normalised,
)
from inception_fused.block.views import ChannelSlice
from inception_fused.runtime.aten import border_words


def norm_stats(x: ChannelSlice, parts: Tensor, *, gemm_m: int, ranges: tuple[int, int]) -> None:
    """N1; see kernels/norm_stats.py. One range."""
    raw = x.rows(gemm_m).to(parts.dtype)
    var, mean = torch.var_mean(raw - raw[0], dim=0, correction=0)
    parts[0, 0], parts[0, 1] = mean, var * gemm_m


def norm_combine(
    parts: Tensor, x: ChannelSlice, columns: Sequence[NormColumns], stats: ChannelSlice, *, gemm_m: int, rows: int
) -> None:
    """N2; see kernels/norm_combine.py."""
    wide, table = parts.dtype, stats.rows(STATISTICS)
    counts = _counts(parts, gemm_m, rows)
    pivot = x.rows(1)[0].to(wide)
    offset = (parts[:, 0] * counts).sum(0) / gemm_m
    m2 = (parts[:, 1] + counts * (parts[:, 0] - offset) ** 2).sum(0)
    mean = pivot + offset
    # Knuth's sum of two: what rounding left out, whichever is larger.
    back = mean - pivot
    rest = (pivot - (mean - back)) + (offset - back)
    for start, channels, mode, gamma, beta, fixed_mean, fixed_var, eps in columns:
        own = slice(start, start + channels)
        zeros = torch.zeros_like(mean[own])
        if mode == BATCH:
            found = mean[own], rest[own], m2[own] / gemm_m
        else:
            found = (zeros, zeros, zeros) if mode == NONE else (fixed_mean.to(wide), zeros, fixed_var.to(wide))
        table[MEAN, own], table[REST, own], table[VAR, own] = found
        scale = 1 / (found[2] + eps).sqrt()
        if gamma is not None:
            scale = scale * gamma.to(wide)
        shift = zeros if beta is None else beta.to(wide)
        # Where there is no rest, not 0 * inf either.
        table[SCALE, own], table[SHIFT, own] = scale, shift - found[1] * scale if mode == BATCH else shift


def norm_apply(x: ChannelSlice, stats: ChannelSlice, y: ChannelSlice, *, gemm_m: int, relu: bool) -> None:
    """N3; see kernels/norm_apply.py."""
    out = normalised(x.rows(gemm_m), stats.rows(STATISTICS), y.base.dtype)
    y.rows(gemm_m).copy_(F.relu(out) if relu else out)


def norm_grad_stats(
    dy: Tensor, x: ChannelSlice, stats: ChannelSlice, parts: Tensor, borders: Tensor,
    *, relu: bool, ranges: tuple[int, int],
) -> None:  # fmt: skip
    """N4; see kernels/norm_grad_stats.py. One range."""
    borders.copy_(border_words(tuple(dy.shape[2:]), borders.numel(), dy.device))
    gemm_m, table, wide = _pixels(dy), stats.rows(STATISTICS), parts.dtype
    raw = x.rows(gemm_m)
    g = _masked(dy, raw, table, relu).to(wide)
    parts[0, 0] = g.sum(0)
    parts[0, 1] = (g * (raw.to(wide) - table[MEAN])).sum(0)


def norm_grad_combine(
    parts: Tensor, stats: ChannelSlice, columns: Sequence[NormColumns], coefficients: ChannelSlice,
    outs: Sequence[VectorGrads], *, gemm_m: int,
) -> None:  # fmt: skip
    """N5; see kernels/norm_grad_combine.py."""
    table, coefficients = stats.rows(STATISTICS), coefficients.rows(COEFFICIENTS)
    total = parts.sum(0)
    for (start, channels, mode, *_, eps), out in zip(columns, outs, strict=True):
        own = slice(start, start + channels)
        s1, dots = total[0, own], total[1, own]
        rest, scale = table[REST, own], table[SCALE, own]
        inverse = 1 / (table[VAR, own] + eps)
        s2 = dots - rest * s1
        c1, c2 = torch.zeros_like(s1), torch.zeros_like(s1)
        if mode == BATCH:
            c1 = scale * (s2 * inverse / gemm_m)
            c2 = scale * (s1 / gemm_m) - c1 * rest
        for row, value in enumerate((scale, c1, c2)):
            coefficients[row, own] = value
        # Not 0 itself: NaN and Inf, of dy or of the raw values, have to be seen in every gradient.
        d_bias = (c1 + c2) * 0 if mode == BATCH else s1 * scale
        for grad, value in zip(out, (s2 * inverse.sqrt(), s1, d_bias), strict=True):
            if grad is not None:
                grad.copy_(value)


def norm_grad_apply(
    dy: Tensor, x: ChannelSlice, stats: ChannelSlice, coefficients: ChannelSlice, g: Sequence[ChannelSlice],
    *, relu: bool,
) -> None:  # fmt: skip
    """N6; see kernels/norm_grad_apply.py."""
    gemm_m, table, (c0, c1, c2) = _pixels(dy), stats.rows(STATISTICS), coefficients.rows(COEFFICIENTS)
    raw = x.rows(gemm_m)
    masked = _masked(dy, raw, table, relu).to(table.dtype)
    # Without the statistics of the batch nothing comes from x, not 0 * inf either.
    centred = torch.where(c1 == 0, 0, raw.to(table.dtype) - table[MEAN])
    out = (c0 * masked - c1 * centred - c2).to(dy.dtype)
    column = 0
    for part in g:
        part.rows(gemm_m).copy_(out[:, column : column + part.channels])
        column += part.channels


def _counts(parts: Tensor, gemm_m: int, rows: int) -> Tensor:
    """[ranges, 1]: rows of each range, ``rows`` but for the last one."""
    first = torch.arange(parts.shape[0], device=parts.device, dtype=parts.dtype) * rows
    return (gemm_m - first).clamp(max=rows)[:, None]


def _pixels(dy: Tensor) -> int:
    return dy.shape[0] * dy.shape[2] * dy.shape[3]


def _masked(dy: Tensor, raw: Tensor, stats: Tensor, relu: bool) -> Tensor:
    """dy as rows [M, C], 0 where ReLU lets nothing pass."""
    g = dy.permute(0, 2, 3, 1).flatten(0, 2)
    if not relu:
        return g
    return torch.where(normalised(raw, stats, raw.dtype) <= 0, 0, g)
