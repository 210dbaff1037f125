"""B5 with the tile that a GPU takes, on partial sums that are given: every output alone, its programs and loads."""

from __future__ import annotations

import pytest
import torch
import triton
from triton.runtime.interpreter import InterpreterBuilder

from inception_fused.block import chains
from inception_fused.block.shapes import BlockShape
from inception_fused.block.views import Partials
from inception_fused.kernels.reduce import TILE, reduce
from inception_fused.runtime import aten
from inception_fused.runtime.submit import record

SHAPES = {
    "one window": BlockShape(1, 4, 5, 24, (96, 16, 72, 8, 40, 24), (1, 1, 3, 1, 5, 1), 2),
    "two windows": BlockShape(1, 4, 5, 24, (96, 16, 72, 8, 40, 32, 24), (1, 1, 3, 1, 3, 3, 1), 2),
    "stem": BlockShape(1, 4, 5, 24, (16, 72), (1, 3), 2),
}
RANGES, TILES = 70, 130
"""Rows of the biases' partial sums: more than a program takes at once, and no multiples of it."""


def partials(s: BlockShape) -> Partials:
    sizes = list(zip(s.filters, s.sides, s.sides, s.inputs, strict=True))
    windows = [torch.randn(rows, *size) for rows, size in zip((9, 1, 5), chains.windows(sizes), strict=False)]
    projection = torch.randn(17, *chains.projection(sizes)) if chains.has_pool(sizes) else None
    group = torch.randn(3, s.reductions_width, s.c)
    return Partials(group, windows, projection, torch.randn(RANGES, s.k), torch.randn(TILES, s.r_width))


def outputs(s: BlockShape, wanted, dtype=torch.float32):
    weights = [torch.empty(k, c, r, r, dtype=dtype) for k, c, r in zip(s.filters, s.inputs, s.sides, strict=True)]
    every = [*weights, *(torch.empty(k, dtype=dtype) for k in s.filters)]
    return [out if i in wanted else None for i, out in enumerate(every)]


def truth(s: BlockShape, given: Partials, wanted) -> list[torch.Tensor | None]:
    group, windows, *others = given
    others = (part.double() if part is not None else None for part in others)
    doubles = Partials(group.double(), [part.double() for part in windows], *others)
    outs = outputs(s, wanted, torch.float64)
    aten.reduce(doubles, outs, s, first=0)
    return outs


def cases(s: BlockShape):
    count = len(s.filters)
    some = {"all": range(2 * count), "weights": range(count), "biases": range(count, 2 * count)}
    return some | {f"output {i}": (i,) for i in range(2 * count)}


CASES = [(variant, name) for variant, s in SHAPES.items() for name in cases(s)]


@pytest.mark.parametrize(("variant", "name"), CASES)
def test_every_output_and_no_idle_program(variant, name, monkeypatch):
    """Every program has elements of one output, and loads each of their partial sums once."""
    s = SHAPES[variant]
    wanted, given = cases(s)[name], partials(s)
    with record() as launches:
        reduce(given, outputs(s, wanted), s, first=0, unit=8, tile=TILE)
    outs, loads, original = outputs(s, wanted), [], InterpreterBuilder.create_masked_load
    monkeypatch.setattr(InterpreterBuilder, "create_masked_load", lambda *args: loads.append(1) or original(*args))
    reduce(given, outs, s, first=0, unit=8, tile=TILE)
    for out, exact in zip(outs, truth(s, given, wanted), strict=True):
        if out is not None:
            torch.testing.assert_close(out.double(), exact, rtol=1e-5, atol=1e-5)
    of_weights = chains.from_roles((3, 3, 3), [part.shape[0] for part in given.windows], 17)
    rows = of_weights + chains.from_outputs([RANGES] * 4, [TILES for _ in s.r_channels])
    programs = expected = 0
    for i in wanted:
        bias = i >= len(s.filters)
        at_once, elements = (8 * TILE.BLOCK_M, TILE.BLOCK_N // 8) if bias else (TILE.BLOCK_M, TILE.BLOCK_N)
        programs += triton.cdiv(outs[i].numel(), elements)
        expected += triton.cdiv(outs[i].numel(), elements) * triton.cdiv(rows[i], at_once)
    assert [launch.grid for launch in launches] == [(programs,)]
    assert len(loads) == expected
