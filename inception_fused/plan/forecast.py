"""Predicted time of a block's launches: a floor knows no tiles, this does.

    seconds = max(compute, bytes / bandwidth) + launch

    compute = waves * 2 * BLOCK_M*BLOCK_N*BLOCK_K * steps * multiprocessors / peak
    waves   = ceil(programs / multiprocessors)

A program computes whole tiles in whole steps of BLOCK_K, and the multiprocessor with the most programs is the last to
end. A launch that somebody has timed (tuned.py) takes what it took, in proportion to its pixels. Left out: what the L2
cache can feed, the latency of a program that has a multiprocessor to itself, the clock under load. So a large block is
predicted too fast, by how much only a measurement tells.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch

from inception_fused.block.shapes import BlockShape
from inception_fused.plan import choice, launches, problems, tuned
from inception_fused.plan.floors import Ceilings, Work
from inception_fused.plan.problems import Launch


class Forecast(NamedTuple):
    """One launch. floor, predicted: seconds; timed: whether predicted is a tuned table's."""

    name: str
    floor: float
    predicted: float
    timed: bool


def forecast(
    shape: BlockShape,
    dtype: torch.dtype,
    ceilings: Ceilings,
    *,
    precision: str,
    training: bool = False,
    packs: bool = False,
    chosen: Mapping[str, str] | None = None,
    gpu: tuned.Gpu | None = None,
) -> list[Forecast]:
    """Every launch of a block's forward, with ``training`` of its backward too, in order.

    precision: "bf16", "fp16", "tf32" or "fp32", whose peak counts. packs: whether the forward begins with pack, since
    3x3 and 5x5 weights are not channels_last, any need casting, or BatchNorm is folded. chosen: "native" or "triton" by
    kernel, as dispatch.choices() gives it; None for Triton's. gpu: whose tuned tables are asked, as tuned.key() gives
    it.
    """
    found = []
    for direction in ("forward", "backward") if training else ("forward",):
        for launch in problems.launches_of(shape, dtype, direction):
            if launch.row.role == launches.PACK and direction == "forward" and not packs:
                continue
            native = chosen is not None and chosen.get(launch.kernel.name) == "native"
            floor = Work(launch.name, launch.flop, launch.bytes).floor(ceilings, precision)
            known = choice.tuned_of(launch, gpu) if launch.rules and not native else None
            if known is not None:
                seconds = known.entry.us * 1e-6 * launch.pixels / known.entry.pixels
            elif launch.rules:
                seconds = _seconds(launch, ceilings, precision, native) + ceilings.launch
            else:
                seconds = floor + ceilings.launch
            found.append(Forecast(launch.name, floor, seconds, timed=known is not None))
    return found


def _seconds(launch: Launch, ceilings: Ceilings, precision: str, native: bool) -> float:
    """A launch without what it costs to launch it."""
    moving = launch.bytes / ceilings.bandwidth
    if not launch.flop:
        return moving
    gemm, tile = launch.gemm, choice.native_tile_of(launch) if native else choice.tile_of(launch)
    tiles = -(-gemm.m // tile.BLOCK_M) * -(-gemm.n // tile.BLOCK_N)
    steps, ranges = gemm.taps * -(-gemm.k // tile.BLOCK_K), choice.ranges(launch, tile)
    waves = -(-tiles * ranges // ceilings.multiprocessors)
    flop = 2 * tile.BLOCK_M * tile.BLOCK_N * tile.BLOCK_K * -(-steps // ranges)
    return max(moving, waves * flop * ceilings.multiprocessors / ceilings.flops[precision])
