"""Operands of N1 to N6 in wider rows of NaN, and what the first of them make of these."""

from __future__ import annotations

import torch

from checks.block_cases import DTYPES
from inception_fused.block import batch_stats
from inception_fused.block.batch_stats import (
    BATCH,
    FIXED,
    MEAN,
    NONE,
    SCALE,
    SHIFT,
    NormColumns,
)
from inception_fused.block.views import ChannelSlice, Tile, accumulator_of, unit_of
from inception_fused.kernels.norm_apply import norm_apply
from inception_fused.kernels.norm_combine import norm_combine
from inception_fused.kernels.norm_stats import norm_stats

NAN, INF = float("nan"), float("inf")
TILE = Tile(16, 32, 16, 1, num_stages=1)
FEW = Tile(4, 8, 1, 1, num_stages=1)
"""Of N2 and N5: several rounds of few parts, several tiles of columns."""
EVERY = [*DTYPES, torch.float64]
SIZES = [(1, 8), (15, 7), (16, 40), (100, 33), (150, 72)]
"""Rows and channels: one row, parts of a tile, whole ones, several ranges of two tiles of which the last has one."""
EPS = 2.0**-10
"""The same in fp32."""


class Guarded:
    """A matrix in wider rows of NaN. slice: its place; whole: all that was reserved."""

    def __init__(self, values: torch.Tensor, before: int = 8, after: int = 8) -> None:
        (m, c), stride = values.shape, before + values.shape[1] + after
        self.whole = torch.full((m + 2, stride), NAN, dtype=values.dtype)
        self.slice = ChannelSlice(self.whole[1:].flatten(), stride, before, c)
        self.rows = self.slice.rows(m)
        self.rows.copy_(values)

    def check(self) -> None:
        """That nothing else was written."""
        inside = self.slice.channels * self.rows.shape[0]
        base, m = self.slice.base.view(-1, self.slice.row_stride), self.rows.shape[0]
        outside = torch.ones_like(base, dtype=torch.bool)
        outside[:m, self.slice.c_offset : self.slice.c_offset + self.slice.channels] = False
        assert outside.sum() == base.numel() - inside
        assert base[outside].isnan().all()


def empty(rows: int, width: int, dtype: torch.dtype) -> Guarded:
    return Guarded(torch.full((rows, width), NAN, dtype=dtype))


def unit_for(x: Guarded) -> int:
    return unit_of(x.rows.dtype, *x.slice[1:])


def ranges_of(m: int, each: int = 2) -> tuple[int, int]:
    return -(-m // (TILE.BLOCK_M * each)), each


def guarded_parts(ranges: int, channels: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """Parts and the canaries behind them."""
    storage = torch.full((ranges * 2 * channels + 64,), NAN, dtype=accumulator_of(dtype))
    return storage[:-64].view(ranges, 2, channels), storage[-64:]


def ranged(rows: torch.Tensor, each: int = 2) -> tuple[torch.Tensor, ...]:
    return rows.double().split(TILE.BLOCK_M * each)


def parts_of(x: Guarded, each: int = 2) -> torch.Tensor:
    m, c = x.rows.shape
    ranges = ranges_of(m, each)
    parts, behind = guarded_parts(ranges[0], c, x.rows.dtype)
    norm_stats(x.slice, parts, gemm_m=m, ranges=ranges, tile=TILE, unit=unit_for(x))
    assert behind.isnan().all()
    return parts


def columns_for(c: int, dtype: torch.dtype = torch.float32, modes=(BATCH, FIXED, NONE, BATCH)) -> list[NormColumns]:
    """Up to four convolutions of unlike widths beside each other, a column between two that is nobody's."""
    widths = [c] if c < 16 else [8, c // 4, c // 8, c - 8 - c // 4 - c // 8 - 1]
    found, start = [], 0
    for i, (k, mode) in enumerate(zip(widths, modes, strict=False)):
        gamma, beta, mean = (torch.randn(k).to(dtype) for _ in range(3))
        gamma, beta = (None, None) if mode == NONE else (gamma, beta if i else None)
        fixed = (mean, torch.rand(k).to(dtype) + 0.5) if mode == FIXED else (None, None)
        found.append(NormColumns(start, k, mode, gamma, beta, *fixed, 1.0 if mode == NONE else EPS))
        start += k + (i == 2)
    return found


def stats_of(x: Guarded, columns: list[NormColumns], tile: Tile = FEW) -> torch.Tensor:
    """N1 and N2: the statistics, NaN where there is no convolution."""
    (m, c), each = x.rows.shape, 2
    table = empty(5, c, accumulator_of(x.rows.dtype))
    norm_combine(
        parts_of(x, each), x.slice, columns, table.slice, gemm_m=m, rows=TILE.BLOCK_M * each, tile=tile
    )  # fmt: skip
    table.check()
    return table.rows


def of_columns(columns: list[NormColumns], c: int) -> torch.Tensor:
    mine = torch.zeros(c, dtype=torch.bool)
    for column in columns:
        mine[column.start : column.start + column.channels] = True
    return mine


def close(found: torch.Tensor, expected: torch.Tensor, size: torch.Tensor | float, bits: int = 0) -> None:
    """Within 2**-bits of ``size``; by default 20 of fp32, 45 of fp64."""
    bits = bits or (45 if found.dtype == torch.float64 else 20)
    error = (found.double() - expected.double()).abs()
    assert (error <= 2.0**-bits * torch.as_tensor(size).double().abs() + 1e-30).all(), error.max()


def one_batch(k: int) -> list[NormColumns]:
    return [NormColumns(0, k, BATCH, None, None, None, None, EPS)]


def some_stats(c: int, dtype: torch.dtype) -> torch.Tensor:
    """Statistics under which arguments of ReLU round to zero, or are it, on both sides."""
    table = torch.randn(5, c, dtype=accumulator_of(dtype))
    table[MEAN] = table[MEAN].to(dtype)
    table[SCALE, ::3] *= 1e-8 if dtype == torch.float16 else 1e-40
    table[SHIFT, ::3] = 0
    table[SHIFT, 1::3] = -table[SCALE, 1::3] * 0.5
    return table


def some_raw(m: int, table: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    raw = table[MEAN] + torch.randint(-4, 5, (m, table.shape[1])) * 0.25
    raw.view(-1)[torch.randperm(raw.numel())[: raw.numel() // 8]] = NAN
    raw.view(-1)[torch.randperm(raw.numel())[: raw.numel() // 8]] = -INF
    raw.view(-1)[torch.randperm(raw.numel())[: raw.numel() // 8]] = INF
    return raw.to(dtype)


def applied(x: Guarded, table: torch.Tensor, relu: bool, y: Guarded | None = None) -> torch.Tensor:
    m, c = x.rows.shape
    y, stats = y or empty(m, c, x.rows.dtype), Guarded(table)
    norm_apply(x.slice, stats.slice, y.slice, gemm_m=m, relu=relu, tile=TILE, unit=unit_for(x))
    y.check()
    return y.rows


IMAGES = {1: (1, 1), 15: (5, 3), 16: (4, 4), 100: (10, 5), 150: (3, 5)}
LAYOUTS = ["rows", "wide rows", "NCHW", "reversed"]


def gradient(layout: str, m: int, c: int, dtype: torch.dtype) -> torch.Tensor:
    """dy [N, K, H, W] of powers of two, whose sum over a tile of rows says which of them were added."""
    h, w = IMAGES[m]
    dy = 2.0 ** (torch.arange(m) % 16)[:, None].expand(m, c).to(dtype)
    images = dy.view(-1, h, w, c).permute(0, 3, 1, 2)
    if layout == "wide rows":
        images = Guarded(dy).rows.view(-1, h, w, c).permute(0, 3, 1, 2)
    elif layout == "NCHW":
        images = images.contiguous()
    elif layout == "reversed":
        images = images.permute(1, 3, 2, 0).contiguous().permute(3, 0, 2, 1)
    return images


def passing(x: Guarded, table: torch.Tensor) -> torch.Tensor:
    return ~(batch_stats.normalised(x.rows, table, x.rows.dtype) <= 0)
