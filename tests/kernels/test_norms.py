"""N1 to N6 alone, and B2's second sum: against float64 on the very operands, in wider rows with NaN around them."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from checks.block_cases import DTYPES
from inception_fused.block import batch_stats
from inception_fused.block.batch_stats import (
    BATCH,
    FIXED,
    MEAN,
    NONE,
    REST,
    SCALE,
    SHIFT,
    VAR,
    Centred,
    NormColumns,
    VectorGrads,
)
from inception_fused.block.views import ChannelSlice, Tile, accumulator_of, unit_of
from inception_fused.kernels.conv_dgrad import conv_dgrad
from inception_fused.kernels.norm_apply import norm_apply
from inception_fused.kernels.norm_combine import norm_combine
from inception_fused.kernels.norm_grad_apply import norm_grad_apply
from inception_fused.kernels.norm_grad_combine import norm_grad_combine
from inception_fused.kernels.norm_grad_stats import norm_grad_stats
from inception_fused.kernels.norm_stats import norm_stats
from inception_fused.plan import choice
from inception_fused.runtime import aten, aten_norms
from marks import each_once

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


@each_once
@pytest.mark.parametrize("dtype", EVERY, ids=str)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_parts(size, dtype):
    x = Guarded(3 * torch.randn(size).to(dtype) + 2)
    d = x.rows.double() - x.rows[0].double()
    for each in (1, 2):
        found = parts_of(x, each)
        mean = torch.stack([part.mean(0) for part in ranged(d, each)])
        m2 = torch.stack([part.var(0, correction=0) * len(part) for part in ranged(d, each)])
        close(found[:, 0], mean, d.abs().amax(0))
        close(found[:, 1], m2, m2 + 1e-9)
        assert torch.equal(found, parts_of(x, each))


@each_once
@pytest.mark.parametrize("affine", DTYPES[:2], ids=str)
@pytest.mark.parametrize("dtype", EVERY, ids=str)
@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("tile", [FEW, None], ids=["few", "own"])
def test_statistics(tile, size, dtype, affine):
    """Of convolutions of all three modes at once; of one row without the statistics of the batch."""
    modes = (FIXED, NONE, FIXED, NONE) if size[0] == 1 else (BATCH, FIXED, NONE, BATCH)
    x, columns = Guarded(torch.randn(size).to(dtype)), columns_for(size[1], affine, modes)
    table = stats_of(x, columns, *[tile] * (tile is not None))
    for start, k, mode, gamma, beta, mean, var, eps in columns:
        own, raw = table[:, start : start + k].double(), x.rows[:, start : start + k].double()
        if mode == BATCH:
            mean, var = raw.mean(0), raw.var(0, correction=0)
        elif mode == NONE:
            mean = var = torch.zeros(k)
        close(table[VAR, start : start + k], var, var)
        close((own[MEAN] + own[REST]).to(table.dtype), mean, raw.abs().amax(0) if mode == BATCH else mean)
        assert mode == BATCH or not own[REST].any()
        scale = (1 if gamma is None else gamma.double()) / (own[VAR] + eps).sqrt()
        close(table[SCALE, start : start + k], scale, scale)
        shift = (0 if beta is None else beta.double()) - own[REST] * own[SCALE]
        close(table[SHIFT, start : start + k], shift, shift.abs() + (own[REST] * own[SCALE]).abs())
    assert table[:, ~of_columns(columns, size[1])].isnan().all()
    assert torch.equal(table, stats_of(x, columns, *[tile] * (tile is not None))) or table.isnan().any()


def one_batch(k: int) -> list[NormColumns]:
    return [NormColumns(0, k, BATCH, None, None, None, None, EPS)]


VALUES = {
    "far from zero": lambda m, k: 1e4 + torch.randn(m, k),
    "first row an outlier": lambda m, k: torch.cat([torch.full((1, k), 3e4), torch.randn(m - 1, k)]),
    "last row an outlier": lambda m, k: torch.cat([torch.randn(m - 1, k), torch.full((1, k), -3e4)]),
    "two apart": lambda m, k: 1e4 + (torch.arange(m) % 2)[:, None] * torch.ones(k),
}


@pytest.mark.parametrize("values", VALUES)
def test_nothing_cancels(values):
    """fp32, whose plain sum of squares has no bits left at a mean of 1e4 and a deviation of 1."""
    x = Guarded(VALUES[values](300, 24))
    table, raw = stats_of(x, one_batch(24)), x.rows.double()
    mean, var = raw.mean(0), raw.var(0, correction=0)
    close(table[VAR], var, var)
    close(table[MEAN].double() + table[REST].double(), mean, (raw - raw[0]).abs().amax(0), 22)
    # An outlier of 300 rows is 17 deviations away.
    close(batch_stats.normalised(x.rows, table, torch.float32), (raw - mean) / (var + EPS).sqrt(), 18.0)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_constant_channels(dtype):
    """No variance at all, the mean to the bit, and what is left is the shift."""
    x = Guarded(torch.randn(24).expand(100, 24).to(dtype))
    beta = torch.randn(24)
    table = stats_of(x, [one_batch(24)[0]._replace(beta=beta)])
    assert torch.equal(table[MEAN], x.rows[0].float())
    assert not table[[REST, VAR]].any()
    assert torch.equal(applied(x, table, False), beta.to(dtype).expand(100, 24))


@pytest.mark.parametrize("row", [0, 5, 99])
@pytest.mark.parametrize("value", [NAN, INF, -INF])
def test_a_special_value_stays_in_its_channel(value, row):
    values = torch.randn(100, 24)
    values[row, 3] = value
    table = stats_of(Guarded(values), one_batch(24))
    others = torch.arange(24) != 3
    assert table[:, others].isfinite().all()
    assert table[VAR, 3].isnan()
    assert batch_stats.normalised(values, table, torch.float32)[:, 3].isnan().all()


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


@each_once
@pytest.mark.parametrize("relu", [True, False], ids=["relu", "none"])
@pytest.mark.parametrize("dtype", EVERY, ids=str)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_apply(size, dtype, relu):
    """To the twin's bit, elsewhere and in place."""
    table = some_stats(size[1], dtype)
    x, twin = Guarded(some_raw(size[0], table, dtype)), empty(*size, dtype)
    aten_norms.norm_apply(x.slice, Guarded(table).slice, twin.slice, gemm_m=size[0], relu=relu)
    for y in (empty(*size, dtype), x):
        torch.testing.assert_close(applied(x, table, relu, y), twin.rows, rtol=0, atol=0, equal_nan=True)


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


@each_once
@pytest.mark.parametrize("relu", [True, False], ids=["relu", "none"])
@pytest.mark.parametrize("dtype", EVERY, ids=str)
@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_gradient_of_any_layout(layout, size, dtype, relu):
    """N4 and N6 pass what N3 lets through, bit for bit, NaN too; their sums are of that; borders as B1 writes them."""
    (m, c), table = size, some_stats(size[1], dtype)
    x, dy, stats = Guarded(some_raw(m, table, dtype)), gradient(layout, m, c, dtype), Guarded(table)
    passes = ~(applied(x, table, False) <= 0)
    assert torch.equal(passes, passing(x, table))
    g = dy.permute(0, 2, 3, 1).flatten(0, 2)
    g = torch.where(passes, g, 0) if relu else g

    ranges = ranges_of(m, 1)
    parts, behind = guarded_parts(ranges[0], c, dtype)
    words = choice.border_words(IMAGES[m])
    borders = torch.full((words + 64,), 0x5A5A, dtype=torch.int16)
    run = dict(relu=relu, tile=TILE, unit=unit_for(x))
    norm_grad_stats(dy, x.slice, stats.slice, parts, borders[:words], ranges=ranges, **run)
    assert torch.equal(borders[:words], aten.border_words(IMAGES[m], words, borders.device))
    assert (borders[words:] == 0x5A5A).all()
    assert behind.isnan().all()
    assert torch.equal(parts[:, 0].double(), torch.stack([part.sum(0) for part in ranged(g, 1)]))

    # c0 = 1 and c1 = c2 = 0: what passes, NaN and infinities of x or not.
    whole, out = torch.zeros(3, c, dtype=table.dtype), empty(m, c, dtype)
    whole[0] = 1
    norm_grad_apply(dy, x.slice, stats.slice, Guarded(whole).slice, [out.slice], **run)
    assert torch.equal(out.rows, g)
    out.check()


@each_once
@pytest.mark.parametrize("relu", [True, False], ids=["relu", "none"])
@pytest.mark.parametrize("dtype", EVERY, ids=str)
@pytest.mark.parametrize("size", SIZES[1:], ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_gradient_sums(layout, size, dtype, relu):
    (m, c), table = size, some_stats(size[1], dtype)
    x, stats = Guarded(torch.randn(size).to(dtype)), Guarded(table)
    dy = gradient(layout, m, c, dtype)
    dy = dy * torch.randn(()) + torch.randn(())
    g = dy.permute(0, 2, 3, 1).flatten(0, 2).double() * (passing(x, table) if relu else 1)
    ranges = ranges_of(m)
    borders = torch.empty(choice.border_words(IMAGES[m]), dtype=torch.int16)
    found = []
    for _ in range(2):
        found.append(guarded_parts(ranges[0], c, dtype)[0])
        run = dict(relu=relu, ranges=ranges, tile=TILE, unit=unit_for(x))
        norm_grad_stats(dy, x.slice, stats.slice, found[-1], borders, **run)
    assert torch.equal(*found)
    products = g * (x.rows.double() - table[MEAN].double())
    for row, terms in enumerate((g, products)):
        expected = torch.stack([part.sum(0) for part in ranged(terms)])
        close(found[0][:, row], expected, torch.stack([part.abs().sum(0) for part in ranged(terms)]))


@each_once
@pytest.mark.parametrize("ranges", [1, 3, 9])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("c", [7, 40, 33])
@pytest.mark.parametrize("tile", [FEW, None], ids=["few", "own"])
def test_coefficients(tile, c, dtype, ranges):
    m, columns = 150, columns_for(c)
    parts, table = torch.randn(ranges, 3, c + 5, dtype=dtype)[:, :2, 5:], torch.rand(5, c, dtype=dtype) + 0.5
    out, vectors = empty(3, c, dtype), [empty(3, column.channels, torch.bfloat16) for column in columns]
    # Beta's of the last is not wanted.
    outs = [VectorGrads(*each.rows.unbind()) for each in vectors]
    outs[-1] = outs[-1]._replace(beta=None)
    run = dict(gemm_m=m) | (dict(tile=tile) if tile else {})
    norm_grad_combine(parts, Guarded(table).slice, columns, out.slice, outs, **run)
    expected, doubled = torch.full((3, c), NAN).double(), table.double()
    wanted = [VectorGrads(*torch.empty(3, column.channels).double().unbind()) for column in columns]
    slices = [ChannelSlice(t, c, 0, c) for t in (doubled, expected)]
    aten_norms.norm_grad_combine(parts.double(), slices[0], columns, slices[1], wanted, gemm_m=m)
    out.check()
    mine = of_columns(columns, c)
    close(out.rows[:, mine], expected[:, mine], 1 + expected[:, mine].abs())
    assert out.rows[:, ~mine].isnan().all()
    for guarded, found, truth in zip(vectors, outs, wanted, strict=True):
        guarded.check()
        for mine, theirs in zip(found, truth, strict=True):
            if mine is not None:
                close(mine, theirs, 1 + theirs.abs(), 7)
    assert vectors[-1].rows[1].isnan().all()


@each_once
@pytest.mark.parametrize("relu", [True, False], ids=["relu", "none"])
@pytest.mark.parametrize("dtype", EVERY, ids=str)
@pytest.mark.parametrize("branches", [(8, 16, 8, 8), (40, 8, 40, 24), (33, 1, 5, 7), (40,), (9, 24)], ids=str)
def test_gradient_of_raw_values(branches, dtype, relu):
    """Into a slice for each branch, the first behind the others; one slice also in place."""
    m, c = 100, sum(branches)
    table, coefficients = some_stats(c, dtype), torch.randn(3, c, dtype=accumulator_of(dtype))
    x, stats, numbers = Guarded(torch.randn(m, c).to(dtype)), Guarded(table), Guarded(coefficients)
    dy = Guarded(torch.randn(m, c).to(dtype))
    g, starts = empty(m, c, dtype), [sum(branches[1:i]) for i in range(1, len(branches))]
    starts = [c - branches[0], *starts]
    places = [g.slice._replace(c_offset=8 + o, channels=k) for o, k in zip(starts, branches, strict=True)]
    unit = unit_of(dtype, *branches, *x.slice[1:])
    masked = dy.rows.double() * (passing(x, table) if relu else 1)
    c0, c1, c2 = coefficients.double()
    terms = c0 * masked, -c1 * (x.rows.double() - table[MEAN].double()), -c2.expand(m, c)
    truth, size = sum(terms), sum(term.abs() for term in terms)
    images = dy.rows.view(-1, *IMAGES[m], c).permute(0, 3, 1, 2)

    def check(outs: list[ChannelSlice]) -> None:
        norm_grad_apply(images, x.slice, stats.slice, numbers.slice, outs, relu=relu, tile=TILE, unit=unit)
        for out, expected, bound in zip(outs, truth.split(branches, 1), size.split(branches, 1), strict=True):
            close(out.rows(m), expected, bound, {torch.float16: 10, torch.bfloat16: 7}.get(dtype, 0))

    check(places)
    g.check()
    if len(branches) == 1:
        check([dy.slice])
        dy.check()


@pytest.mark.parametrize("activation", ["relu", None])
def test_against_autograd(activation):
    """All six launches in fp64: what PyTorch's batch_norm makes of a float64 block."""
    m, c, relu = 150, 24, activation == "relu"
    h, w = IMAGES[m]
    raw, dy = torch.randn(m, c).double(), torch.randn(m, c).double()
    gamma, beta = torch.randn(c).double(), torch.randn(c).double()
    leaves = [t.clone().requires_grad_() for t in (raw, gamma, beta)]
    y = F.batch_norm(leaves[0], None, None, *leaves[1:], True, 0.0, EPS)
    y = F.relu(y) if relu else y
    y.backward(dy)

    x, columns = Guarded(raw), [one_batch(c)[0]._replace(gamma=gamma, beta=beta)]
    table = Guarded(stats_of(x, columns))
    torch.testing.assert_close(applied(x, table.rows, relu), y.detach())
    images, parts = dy.view(-1, h, w, c).permute(0, 3, 1, 2), torch.empty(ranges_of(m)[0], 2, c).double()
    run = dict(relu=relu, tile=TILE, unit=1)
    borders = torch.empty(choice.border_words((h, w)), dtype=torch.int16)
    norm_grad_stats(images, x.slice, table.slice, parts, borders, ranges=ranges_of(m), **run)
    coefficients, vectors, g = (empty(rows, c, torch.float64) for rows in (3, 3, m))
    outs = [VectorGrads(*vectors.rows.unbind())]
    norm_grad_combine(parts, table.slice, columns, coefficients.slice, outs, gemm_m=m)
    norm_grad_apply(images, x.slice, table.slice, coefficients.slice, [g.slice], **run)
    for found, leaf in zip((g.rows, *vectors.rows), leaves, strict=False):
        torch.testing.assert_close(found, leaf.grad)
    assert not outs[0].bias.any()


@each_once
@pytest.mark.parametrize("masked", [True, False], ids=["masked", "all"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("side", [3, 5])
@pytest.mark.parametrize("c", [24, 13])
def test_centred_sums_of_dgrad(c, side, dtype, masked):
    """Of dr as it was before it was rounded, beside its sums in one buffer of parts."""
    k, (h, w), m, width = 16, (5, 7), 70, 32
    g, r, raw = (Guarded(torch.randn(m, n).to(dtype)) for n in (k, c, c))
    w_t = torch.randn(c, side, side, k).to(dtype)
    mean, dr = Guarded(torch.randn(5, c)), Guarded(torch.full((m, width), NAN, dtype=dtype))
    tiles = -(-m // TILE.BLOCK_M)
    parts = torch.full((tiles, 2, width), NAN)
    sums, dots = (ChannelSlice(parts, 2 * width, start, c) for start in (4, width + 4))
    run = dict(gemm_m=m, image=(h, w), width=width, centred=Centred(raw.slice, mean.slice, dots))
    target = dr.slice._replace(channels=c)
    unit = unit_of(dtype, c, k, width, *dr.slice[1:])
    conv_dgrad(g.slice, w_t, r.slice if masked else None, target, sums, **run, tile=TILE, unit=unit)
    exact = F.conv2d(
        g.rows.double().view(-1, h, w, k).permute(0, 3, 1, 2), w_t.double().permute(0, 3, 1, 2), padding=side // 2
    ).permute(0, 2, 3, 1).reshape(m, c)  # fmt: skip
    exact = torch.where(r.rows <= 0, 0, exact) if masked else exact
    terms = exact, exact * (raw.rows.double() - mean.rows[MEAN].double())
    twin = torch.full((1, 2, width), NAN)
    sums, dots = (ChannelSlice(twin, 2 * width, start, c) for start in (4, width + 4))
    run["centred"] = run["centred"]._replace(dots=dots)
    aten.conv_dgrad(g.slice, w_t, r.slice if masked else None, target, sums, **run)
    for row, term in enumerate(terms):
        expected = torch.stack([part.sum(0) for part in ranged(term, 1)])
        size = torch.stack([part.abs().sum(0) for part in ranged(term, 1)])
        close(parts[:, row, 4 : 4 + c], expected, size + 1, 16)
        close(twin[0, row, 4 : 4 + c], term.sum(0), size.sum(0) + 1, 16 if dtype == torch.float32 else 6)
    assert parts[:, :, :4].isnan().all()
    assert parts[:, :, 4 + c :].isnan().all()
    dr.check()
