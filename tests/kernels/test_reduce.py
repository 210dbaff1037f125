"""B5 with the tile that a GPU takes, on partial sums that are given: every output alone, and who loads how often."""

from __future__ import annotations

import pytest
import torch
import triton
from triton.runtime.interpreter import InterpreterBuilder

from inception_fused.block.views import Partials
from inception_fused.kernels.reduce import TILE, reduce
from inception_fused.runtime import aten

C, FILTERS = 24, (96, 16, 72, 8, 40, 24)
R5, R_WIDTH = 16, 24
SIDES = (1, 1, 3, 1, 5, 1)
INPUTS = (C, C, FILTERS[1], C, FILTERS[3], C)
RANGES, TILES = 70, 130
"""Rows of the biases' partial sums: more than a program takes at once, and no multiples of it."""


def partials() -> Partials:
    k1, _, k2, _, k3, k4 = FILTERS
    shapes = ((3, k1 + R_WIDTH, C), (9, k2, 3, 3, INPUTS[2]), (1, k3, 5, 5, INPUTS[4]), (17, k4, 1, 1, C))
    return Partials(*map(torch.randn, (*shapes, (RANGES, k1 + k2 + k3 + k4), (TILES, R_WIDTH))))


def outputs(wanted, dtype=torch.float32):
    weights = [
        torch.empty(k, c, r, r, dtype=dtype) for k, c, r in zip(FILTERS, INPUTS, SIDES, strict=True)
    ]  # fmt: skip
    every = [*weights, *(torch.empty(k, dtype=dtype) for k in FILTERS)]
    return [out if i in wanted else None for i, out in enumerate(every)]


def truth(given: Partials, wanted) -> list[torch.Tensor | None]:
    outs = outputs(wanted, torch.float64)
    aten.reduce(Partials(*(part.double() for part in given)), outs, FILTERS, C, first=0, r5=R5, r_width=R_WIDTH)
    return outs


CASES = {"all": range(12), "weights": range(6), "biases": range(6, 12)} | {f"output {i}": (i,) for i in range(12)}


@pytest.mark.parametrize("name", CASES)
def test_every_output_and_no_idle_load(name, monkeypatch):
    """A program beyond its output must not walk the partial sums: of all outputs' programs most are such."""
    wanted, given = CASES[name], partials()
    outs, loads, original = outputs(wanted), [], InterpreterBuilder.create_masked_load
    monkeypatch.setattr(InterpreterBuilder, "create_masked_load", lambda *args: loads.append(1) or original(*args))
    reduce(given, outs, FILTERS, C, first=0, r5=R5, r_width=R_WIDTH, unit=8, tile=TILE)
    for out, exact in zip(outs, truth(given, wanted), strict=True):
        if out is not None:
            torch.testing.assert_close(out.double(), exact, rtol=1e-5, atol=1e-5)
    rows = (3, 3, 9, 3, 1, 17, RANGES, TILES, RANGES, TILES, RANGES, RANGES)
    expected = 0
    for i in wanted:
        at_once, elements = (TILE.BLOCK_M, TILE.BLOCK_N) if i < 6 else (8 * TILE.BLOCK_M, TILE.BLOCK_N // 8)
        expected += triton.cdiv(outs[i].numel(), elements) * triton.cdiv(rows[i], at_once)
    assert len(loads) == expected
