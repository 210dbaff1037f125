"""N4, N5 and N6 alone, and B2's second sum: as test_norms.py has the forward's."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

import norm_operands
from checks.block_cases import DTYPES
from inception_fused.block.batch_stats import (
    MEAN,
    Centred,
    VectorGrads,
)
from inception_fused.block.views import ChannelSlice, accumulator_of, unit_of
from inception_fused.kernels.conv_dgrad import conv_dgrad
from inception_fused.kernels.norm_grad_apply import norm_grad_apply
from inception_fused.kernels.norm_grad_combine import norm_grad_combine
from inception_fused.kernels.norm_grad_stats import norm_grad_stats
from inception_fused.plan import choice
from inception_fused.runtime import aten, aten_norms
from marks import each_once
from norm_operands import (
    EPS,
    EVERY,
    FEW,
    IMAGES,
    LAYOUTS,
    NAN,
    SIZES,
    Guarded,
    applied,
    close,
    columns_for,
    empty,
    gradient,
    guarded_parts,
    of_columns,
    one_batch,
    passing,
    ranged,
    ranges_of,
    some_raw,
    some_stats,
    stats_of,
    unit_for,
)


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
    run = dict(relu=relu, tile=norm_operands.TILE, unit=unit_for(x))
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
        run = dict(relu=relu, ranges=ranges, tile=norm_operands.TILE, unit=unit_for(x))
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
        norm_grad_apply(
            images, x.slice, stats.slice, numbers.slice, outs, relu=relu, tile=norm_operands.TILE, unit=unit
        )
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
    run = dict(relu=relu, tile=norm_operands.TILE, unit=1)
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
    tiles = -(-m // norm_operands.TILE.BLOCK_M)
    parts = torch.full((tiles, 2, width), NAN)
    sums, dots = (ChannelSlice(parts, 2 * width, start, c) for start in (4, width + 4))
    run = dict(gemm_m=m, image=(h, w), width=width, centred=Centred(raw.slice, mean.slice, dots))
    target = dr.slice._replace(channels=c)
    unit = unit_of(dtype, c, k, width, *dr.slice[1:])
    conv_dgrad(g.slice, w_t, r.slice if masked else None, target, sums, **run, tile=norm_operands.TILE, unit=unit)
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
