"""N1, N2 and N3 alone: against float64 on the very operands, in wider rows with NaN around them."""

from __future__ import annotations

import pytest
import torch

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
)
from inception_fused.runtime import aten_norms
from marks import each_once
from norm_operands import (
    EPS,
    EVERY,
    FEW,
    INF,
    NAN,
    SIZES,
    Guarded,
    applied,
    close,
    columns_for,
    empty,
    of_columns,
    one_batch,
    parts_of,
    ranged,
    some_raw,
    some_stats,
    stats_of,
)


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
