"""The launches of a max-pool of stride 2 on tensors without data: to be compiled, not to be run."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import torch

from inception_fused.block.pools import PoolShape
from inception_fused.block.views import ChannelSlice, accumulator_of, taps_width, unit_of
from inception_fused.kernels.max_pool import max_pool
from inception_fused.kernels.max_pool_grad import max_pool_grad
from inception_fused.plan.choice import choose_tile
from inception_fused.plan.rules import PLANNED, Capability
from inception_fused.runtime.launch import Launch
from inception_fused.runtime.submit import record


def pool_launches(
    pool: PoolShape, channels: int, dtype: torch.dtype, *, save: bool, epilogue: bool = False,
    capability: Capability = PLANNED,
) -> list[Launch]:  # fmt: skip
    """The forward's launch, with save also that of the backward. Rows are dense. epilogue: with bias and ReLU, and the
    bias's gradient."""
    unit = unit_of(dtype, channels)
    columns = dict(gemm_n=channels, unit=unit, capability=capability)
    x, y = (torch.empty((rows, channels), dtype=dtype, device="meta") for rows in (pool.rows, pool.pooled_rows))
    taps = torch.empty((pool.pooled_rows, taps_width(channels)), dtype=torch.uint8, device="meta") if save else None
    x, y = (ChannelSlice(t, channels, 0, channels) for t in (x, y))
    with record() as launches:
        tile = choose_tile("P1", dtype, gemm_m=pool.pooled_rows, **columns)
        bias = y.base.new_empty(channels) if epilogue else None
        max_pool(x, y, taps, bias, relu=epilogue, pool=pool, tile=tile, unit=unit)
        if save:
            tile = choose_tile("P2", dtype, gemm_m=pool.cells, **columns)
            tiles = -(-pool.cells // tile.BLOCK_M)
            sums = y.base.new_empty((tiles, channels), dtype=accumulator_of(dtype)) if epilogue else None
            max_pool_grad(y, taps, x, sums, pool=pool, tile=tile, unit=unit)
    return launches


def pool_cases(*, odd: bool = True) -> Iterator[tuple[str, dict[str, Any]]]:
    """(name, pool_launches' arguments) whose launches are every binary of the pools: in units of 16 bytes and, with
    ``odd``, of single channels, inference and training, with and without bias and ReLU."""
    widths = (("", 64), (" odd", 33))[: 1 + odd]
    for (name, channels), save, epilogue in itertools.product(widths, (True, False), (False, True)):
        case = dict(pool=PoolShape(128, 112, 112, 1), channels=channels, save=save, epilogue=epilogue)
        yield f"pool{name}{' taps' * save}{' bias, ReLU' * epilogue}", case
